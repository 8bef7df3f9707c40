"""A rank that starts a user's program: what is started, with what around it, and how the rank ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from runner.node import ranks
from runner.results.celldir import CellDir
from runner.system import folders
from runner.workloads.job import DATA_VARIABLE
from runner.workloads.script import rank

PYTHON = "/opt/mine/bin/python"


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (["train.py", "-x"], [PYTHON, "train.py", "-x"]),
        (["python", "-m", "my.trainer"], [PYTHON, "-m", "my.trainer"]),
        (["python3", "a.py"], [PYTHON, "a.py"]),
        (["./own", "python"], ["./own", "python"]),
        (["sh", "-c", "x"], ["/bin/sh", "-c", "x"]),
        (["not-there"], ["not-there"]),
    ],
)
def test_a_python_file_has_the_users_python_and_any_other_word_is_a_program(words, started):
    assert rank.command(words, PYTHON, {"PATH": "/bin"}) == started


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))))
def test_the_users_words_are_never_changed(words):
    assert rank.command(["train.py", *words], PYTHON, {})[2:] == words


def test_the_programs_beside_the_users_python_come_first_and_its_own_variables_last():
    env = rank.environment({"PATH": "/bin", "A": "1"}, {"A": "2"}, PYTHON)
    assert env == {"PATH": "/opt/mine/bin:/bin", "A": "2"}


def started(folder: Path, *words: str, **params) -> subprocess.Popen[bytes]:
    cell = folder / "cell"
    cell.mkdir(exist_ok=True)
    given = {"argv": words, "python": "", "folder": str(folder), "env": {}, "env_pass": (), **params}
    job = {"run_id": "r", "cell": "script", "test": "script", "num_nodes": 1, "gpus_per_node": 1, "world_size": 1}
    CellDir(cell).job.write_text(json.dumps(job | {"device": "cpu", "seed": 0, "params": given}))
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "runner.workloads", str(cell)], env=env, stdout=subprocess.PIPE)


def ended(folder: Path):
    return ranks.ends(CellDir(folder / "cell"))["rank0"]


@pytest.mark.parametrize(
    ("body", "code"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137), ("", 0)]
)
def test_the_rank_ends_as_its_program_does_and_says_so(tmp_path, body, code):
    (tmp_path / "a.py").write_text(body)
    child = started(tmp_path, "a.py")
    child.communicate(timeout=60)
    assert child.returncode == code
    end = ended(tmp_path)
    assert (end.code, end.ended) == (code, code == 0) and end.ended_s > 0


def test_the_program_gets_its_words_byte_for_byte_its_folder_and_its_variables(tmp_path):
    words = ["a b", "$(id)", "'\"", "two\nlines", "größe", ""]
    (tmp_path / "a.py").write_text(
        "import os, sys, json; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ['K']]))"
    )
    child = started(tmp_path, "a.py", *words, env={"K": "v $x"})
    assert json.loads(child.communicate(timeout=60)[0]) == [words, str(tmp_path), "v $x"]


def test_a_signal_goes_on_to_the_program_and_to_what_it_has_started(tmp_path):
    (tmp_path / "a.py").write_text(
        "import subprocess, time, pathlib\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "pathlib.Path('worker.new').write_text(str(child.pid))\n"
        "pathlib.Path('worker.new').rename('worker')\n"
        "time.sleep(300)\n"
    )
    child = started(tmp_path, "a.py")
    deadline = time.monotonic() + 60
    while not (tmp_path / "worker").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int((tmp_path / "worker").read_text())
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM and ended(tmp_path).code == 143
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert time.monotonic() < deadline


def test_a_program_that_cannot_be_started_has_no_code(tmp_path):
    child = started(tmp_path, "./none")
    child.communicate(timeout=60)
    assert child.returncode == 1
    assert ended(tmp_path).code is None


def test_data_that_were_sent_are_held_while_the_program_runs_and_a_users_own_folder_is_left_alone(tmp_path):
    sent, own = tmp_path / "sent", tmp_path / "own"
    for folder in (sent, own):
        folder.mkdir()
    folders.use_of(sent).touch()
    (tmp_path / "a.py").write_text(
        "import fcntl, sys\n"
        "try:\n"
        "    fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n"
        "    sys.exit(9)\n"
    )
    child = started(tmp_path, "a.py", str(folders.use_of(sent)), env={DATA_VARIABLE: str(sent)})
    child.communicate(timeout=60)
    assert child.returncode == 9
    child = started(tmp_path, "a.py", str(tmp_path / "x"), env={DATA_VARIABLE: str(own)})
    child.communicate(timeout=60)
    assert child.returncode == 0 and not folders.use_of(own).exists()


def test_a_line_that_was_not_written_whole_tells_no_code(tmp_path):
    cell = CellDir(tmp_path)
    cell.events(0).write_text('{"event": "start", "rank": 0}\n{"event": "exit", "rank": 0, "co')
    assert ranks.ends(cell)["rank0"].code is None
