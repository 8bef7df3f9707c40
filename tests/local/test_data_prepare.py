"""`runner data prepare` as a user and two users at once run it; the hub is a stand-in on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from runner.workloads.data import instructions
from runner.workloads.data.prepare import prepare

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUNNER = [sys.executable, "-c", "from runner.cli.main import main; main()", "data", "prepare"]


def start(*arguments: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUNNER, *arguments],
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(*arguments: str, env: dict[str, str] | None = None, **options) -> tuple[int, str, str]:
    process = start(*arguments, env=env, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_the_second_command_answers_from_the_cache(tmp_path):
    arguments = ("--samples", "200", "--seq-len", "256", "--cache-dir", str(tmp_path), "--json")
    status, planned, err = run(*arguments, "--dry-run")
    assert (status, err) == (0, "")
    assert not list(tmp_path.iterdir()), "a dry run wrote"
    status, first, err = run(*arguments)
    assert status == 0
    assert "200/200" in err, "no progress was shown"
    status, second, err = run(*arguments)
    assert (status, second, err) == (0, first, "")
    manifest = json.loads(first)
    assert json.loads(planned) == {"path": manifest["path"], "cached": False}
    assert manifest["n_samples"] == 200


def test_the_table_says_what_was_made_and_where(tmp_path):
    status, out, _ = run("--samples", "2000", "--seq-len", "128", "--cache-dir", str(tmp_path))
    assert status == 0
    table = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert table["n_samples"].isdigit() or "," in table["n_samples"]
    assert table["packing_utilisation_pct"].startswith("9")
    assert Path(table["path"]).is_dir()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "missing.json"], "runner: data source 'missing.json': neither a file or folder nor a hub id"),
        (["--source", "alpaca", "--samples", "5"], "runner: --samples is for builtin; 'alpaca' has its own number"),
        (["--seq-len", "many"], "runner: Invalid value for '--seq-len': 'many' is not a valid integer"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(tmp_path, arguments, says):
    status, out, err = run(*arguments, "--cache-dir", str(tmp_path))
    assert (status, out) == (2, "")
    assert err.startswith(says) and err.count("\n") == 1


def test_two_at_once_make_one_whole_folder(tmp_path):
    arguments = ("--samples", "3000", "--seq-len", "256", "--cache-dir", str(tmp_path), "--json")
    pair = [start(*arguments) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert answers[0][0] == answers[1][0]
    assert sum("tokenise" in err for _, err in answers) == 1, "both did the work"
    folder = Path(json.loads(answers[0][0])["path"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_killed_prepare_leaves_nothing_that_is_taken_as_whole(tmp_path):
    arguments = ("--samples", "20000", "--seq-len", "256", "--cache-dir", str(tmp_path), "--json")
    process = start(*arguments)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.shakedown-*")):
        assert process.poll() is None and time.monotonic() < deadline, "nothing was started to be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("*/manifest.json"))
    _, planned, _ = run(*arguments, "--dry-run")
    assert json.loads(planned)["cached"] is False
    again = prepare(seq_len=256, samples=20000, cache_dir=tmp_path)
    assert np.load(again.path / "n_tokens.npy").sum() == again.manifest["n_tokens"]
    assert not list(tmp_path.glob(".*.shakedown-*"))


def test_a_full_disk_is_one_line_exit_3_and_leaves_no_half_folder(tmp_path):
    limit = 200_000  # bytes a file may have; the same error path as a disk without space

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ("--samples", "3000", "--seq-len", "256", "--cache-dir", str(tmp_path))
    status, _, err = run(*arguments, preexec_fn=small_files)
    assert status == 3
    assert f"runner: cannot prepare data in {tmp_path}: File too large; free space or choose another" in err
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_hugging_face_tokenizer_folder_is_used_with_its_own_special_tokens(tmp_path):
    folder = prepare(seq_len=1024, samples=50, cache_dir=tmp_path).path
    same = prepare(seq_len=1024, samples=50, tokenizer=str(folder), cache_dir=tmp_path)
    assert same.path != folder
    assert (same.path / "input_ids.npy").read_bytes() == (folder / "input_ids.npy").read_bytes()

    other = tmp_path / "with bos"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|eos|>"}
    del config["pad_token"]
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    made = prepare(seq_len=1024, samples=50, tokenizer=str(other), cache_dir=tmp_path)
    ids, positions = np.load(made.path / "input_ids.npy"), np.load(made.path / "position_ids.npy")
    assert made.manifest["bos_token_id"] == made.manifest["pad_token_id"] == 1, "padding falls back to eos"
    assert (ids[positions == 0] == 1).all()
    assert made.manifest["n_tokens"] == same.manifest["n_tokens"] + 50


# ---- the hub: a stand-in that speaks as much of its API as `datasets` asks for ----


class Hub(http.server.ThreadingHTTPServer):
    """Serves one data set, stand-in/alpaca, with one Parquet file."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = content


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub
    repo, file = "stand-in/alpaca", "data/train.parquet"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        entry = {"type": "file", "path": self.file, "size": len(self.server.content), "oid": "f" * 40}
        if not path.removeprefix("/api").startswith(f"/datasets/{self.repo}"):
            self.reply(b'{"error": "Repository not found"}', 404, X_Error_Code="RepoNotFound")
        elif path.startswith(f"/api/datasets/{self.repo}/tree/"):
            inside = path.rstrip("/").split(f"/tree/{COMMIT}")[1].strip("/")
            folder = {"type": "directory", "path": "data", "size": 0, "oid": "e" * 40}
            recursive = "recursive=true" in self.path.lower()
            entries = [entry] if inside == "data" else [folder, entry] if recursive else [folder]
            self.reply(json.dumps(entries).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/datasets/{self.repo}/paths-info/"):
            self.reply(json.dumps([entry]).encode(), Content_Type="application/json")
        elif path.startswith("/api/"):
            about = {
                "id": self.repo,
                "sha": COMMIT,
                "siblings": [{"rfilename": self.file}],
                "private": False,
                "tags": [],
            }
            self.reply(json.dumps(about).encode(), Content_Type="application/json")
        elif path.endswith(self.file):
            etag = hashlib.sha256(self.server.content).hexdigest()
            self.reply(self.server.content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        else:
            self.reply(b"Entry not found", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    do_HEAD = do_GET


ROWS = [row | {"text": "a column that Alpaca has and nobody needs"} for row in instructions.generate(300, seed=4)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    with Hub(table.read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def at(hub: Hub | None, tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose hub is `hub`; None is a port where nobody listens."""
    port = hub.server_port if hub else 9
    return {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_hub_id_gives_the_arrays_of_its_rows_and_is_cached_by_commit(tmp_path, hub):
    cache = tmp_path / "cache"
    arguments = ("--seq-len", "256", "--cache-dir", str(cache), "--json")
    status, out, err = run("--source", "stand-in/alpaca", *arguments, env=at(hub, tmp_path))
    assert status == 0, err
    found = Path(json.loads(out)["path"])
    local = prepare(str(tmp_path / "rows.parquet"), seq_len=256, cache_dir=cache).path
    assert found != local
    assert (found / "input_ids.npy").read_bytes() == (local / "input_ids.npy").read_bytes()

    status, again, err = run("--source", f"stand-in/alpaca@{COMMIT}", *arguments, env=at(None, tmp_path))
    assert (status, again, err) == (0, out, ""), "a commit that was prepared needs no hub"


@pytest.mark.parametrize(
    "arguments",
    [["--source", "stand-in/alpaca"], ["--source", "alpaca"], ["--tokenizer", "stand-in/llama"]],
)
def test_without_a_hub_one_line_says_what_to_use_instead(tmp_path, arguments):
    status, _, err = run(*arguments, "--cache-dir", str(tmp_path / "cache"), env=at(None, tmp_path))
    assert status == 3
    assert "the Hugging Face hub does not answer; give a local file or folder, or use 'builtin'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--source", "stand-in/none"], ["--tokenizer", "stand-in/none"]])
def test_an_id_that_the_hub_does_not_have_is_wrong_usage(tmp_path, hub, arguments):
    status, _, err = run(*arguments, "--cache-dir", str(tmp_path / "cache"), env=at(hub, tmp_path))
    assert status == 2
    assert "'stand-in/none'" in err and err.count("\n") == 1, err
