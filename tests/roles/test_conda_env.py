"""conda_env: what a lock says, what is refused before anything is fetched, and that an environment is whole or absent."""

from __future__ import annotations

import hashlib
import http.server
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from role_modules import ROOT, carry_out, load
from runner.workloads import rl

ROLE = ROOT / "roles" / "conda_env"
node, controller = load("conda_env"), load("conda_env", "conda_env_wheels")
index = importlib.import_module("ansible.module_utils.conda_env_index")
locks = importlib.import_module("ansible.module_utils.environments")
phases = importlib.import_module("ansible.module_utils.phase")
version_of = importlib.import_module("ansible.module_utils.nvidia").version

STAND_IN = ROOT / "molecule" / "resources" / "stand-ins"
LOCK = "# cuda: none\nalpha==1.0\nbeta==2.1\n"
HERE = "{}.{}".format(*sys.version_info[:2])


def problem(answer, what):
    """The one problem about `what`."""
    (found,) = [p for p in answer.problems if p["what"].startswith(what)]
    return found


# --- a lock ---


def test_a_lock_says_versions_cuda_and_a_further_index():
    lock = locks.Lock("# cuda: 12.1\n# index: https://x/whl\nTorch == 2.3.1  # why\nhuggingface_hub==0.36.2\n")
    assert lock.pins == {"torch": "2.3.1", "huggingface-hub": "0.36.2"}
    assert (lock.cuda, lock.index, lock.errors) == ("12.1", "https://x/whl", [])


def test_hashes_extras_and_markers_are_part_of_a_pin():
    lock = locks.Lock('a[x]==1 \\\n  --hash=sha256:00 \\\n  --hash=sha256:11\nb==2 ; python_version < "3.12"\n')
    assert lock.pins == {"a": "1", "b": "2"} and not lock.errors
    assert lock.conditional == {"b"}
    assert lock.lines["a"].endswith("--hash=sha256:11")


@pytest.mark.parametrize(
    "line", ["torch", "torch>=2", "torch==2.*", "-r other.txt", "--index-url http://x", "a @ file:///a.whl", "../a.whl"]
)
def test_what_is_no_pin_is_an_error(line):
    assert locks.Lock(f"a==1\n{line}\n").errors == [line]


def test_a_package_pinned_twice_is_an_error():
    assert locks.Lock("a_b==1\nA-B==2\n").errors == ["A-B==2 (a second time)"]


@pytest.mark.parametrize(
    ("torch", "cuda"), [("2.3.1+cu121", "12.1"), ("2.13.0+cu130", "13.0"), ("2.1+cpu", "none"), ("2.3.1", "")]
)
def test_torchs_own_version_says_the_cuda_where_no_comment_does(torch, cuda):
    assert locks.Lock(f"torch=={torch}\n").cuda == cuda


@given(st.text())
def test_no_text_breaks_the_reader(text):
    lock = locks.Lock(text)
    assert set(lock.pins) == set(lock.lines)


@pytest.mark.parametrize(
    ("pinned", "found", "same"),
    [
        ("2.3.1", "2.3.1+cu121", True),
        ("2.3.1+cu121", "2.3.1+cu118", False),
        ("2.3.1+cu121", "2.3.1", False),
        ("13.0.3.0", "13.0.3", True),
        ("2.30", "2.3", False),
        ("1.0rc1", "1.0RC1", True),
    ],
)
def test_versions_compare_as_pip_compares_them(pinned, found, same):
    assert locks.same(pinned, found) is same


@pytest.mark.parametrize("profile", locks.PROFILES)
def test_each_profile_is_a_lock_without_an_error_and_says_its_cuda(profile):
    lock = locks.Lock((ROLE / "files" / "profiles" / f"{profile}.txt").read_text())
    assert not lock.errors and {"torch", "deepspeed", "transformers", "accelerate", "datasets"} <= set(lock.pins)
    assert lock.cuda == locks.PROFILES[profile]


@pytest.mark.parametrize(
    ("profile", "own"),
    [("current", set()), ("cpu", set()), ("cuda12", {"torch"})],
)
def test_profiles_have_the_versions_that_are_tested_together(profile, own):
    tested = locks.Lock((ROOT / "constraints.txt").read_text()).pins
    pins = locks.Lock((ROLE / "files" / "profiles" / f"{profile}.txt").read_text()).pins
    both = set(pins) & set(tested)
    assert "torch" in both and len(both) > 40
    assert {n for n in both if pins[n].partition("+")[0] != tested[n]} == own


def test_the_profile_user_has_the_versions_of_its_name():
    pins = locks.Lock((ROLE / "files" / "profiles" / "user.txt").read_text()).pins
    assert pins["torch"].startswith("2.3.") and pins["deepspeed"] == "0.14.0"


# --- the driver ---


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A function that puts a stand-in for nvidia-smi with this driver on PATH; "" for none."""

    def put(version):
        folder = tmp_path / "path"
        folder.mkdir()
        for name in ("rsync", "bash"):
            (folder / name).symlink_to("/bin/true")
        if version:
            (tmp_path / "smi.json").write_text(json.dumps({"driver": version}))
            (folder / "nvidia-smi").symlink_to(STAND_IN / "nvidia-smi")
        monkeypatch.setenv("PATH", f"{folder}:{os.path.dirname(sys.executable)}")
        monkeypatch.setenv("NVIDIA_SMI_STATE", str(tmp_path / "smi.json"))

    return put


def settings(tmp_path, **changed):
    want = {
        "prefix": str(tmp_path / "opt" / "env"),
        "manager": "venv",
        "python": HERE,
        "profile": "cpu",
        "lock": "/x/own.txt",
        "lock_text": LOCK,
        "package": "",
        "wheels": [],
        "source": "wheelhouse",
        "index_url": "",
        "netrc": "",
        "wheelhouse": str(tmp_path / "cache"),
        "platform": "manylinux_2_17_" + os.uname().machine,
        "sdists": [],
        "miniforge": {"version": "1", "url": "", "sha256": ""},
        "channels": [],
        "imports": ["alpha"],
        "min_free_gib": 0.0,
        "timeout_s": 60.0,
    }
    return {**want, **changed}


@pytest.mark.parametrize(
    ("driver", "cuda", "oldest", "remedy"),
    [
        ("560.35.03", "13.0", "580.65.06", "conda_env_profile: cuda12"),
        ("515.105.01", "12.1", "525.60.13", "conda_env_profile: cpu,"),
        ("", "12.1", "525.60.13", "conda_env_profile: cpu,"),
    ],
)
def test_a_build_that_the_driver_cannot_run_is_refused_with_one_that_fits(tmp_path, gpus, driver, cuda, oldest, remedy):
    gpus(driver)
    answer = carry_out(node.PHASES, "validate", settings(tmp_path, lock_text=f"# cuda: {cuda}\na==1\n"))
    refused = problem(answer, f"NVIDIA driver for PyTorch built for CUDA {cuda}")
    assert refused["expected"] == f">= {oldest}"
    assert refused["found"] == driver or refused["found"].startswith("none (nvidia-smi")
    assert remedy in refused["remedy"]


@pytest.mark.parametrize(
    ("driver", "profile"),
    [
        ("515.105.01", "cuda12"),  # which is then refused, with the driver that it needs
        ("525.60.13", "cuda12"),
        ("535.183.06", "cuda12"),
        ("560.35.03", "cuda12"),
        ("575.57.08", "cuda12"),
        ("580.65.06", "current"),
        ("595.10", "current"),
        ("", "cuda12"),
    ],
)
def test_auto_takes_the_newest_profile_that_the_driver_runs(gpus, driver, profile):
    gpus(driver)
    assert carry_out(node.PHASES, "validate", {"step": "choose", "profile": "auto"}).facts["profile"] == profile


@pytest.mark.parametrize(
    ("driver", "lock"),
    [
        ("515.105.01", "gpu-vllm-cuda12"),  # which is then refused
        ("525.60.13", "gpu-vllm-cuda12"),
        ("579.99", "gpu-vllm-cuda12"),
        ("580.65.06", "gpu-vllm-cuda13"),
        ("", "gpu-vllm-cuda12"),
    ],
)
def test_gpu_vllm_takes_the_newest_lock_that_the_driver_runs(gpus, driver, lock):
    gpus(driver)
    assert carry_out(node.PHASES, "validate", {"step": "choose", "profile": "gpu-vllm"}).facts["profile"] == lock


@pytest.mark.parametrize(
    ("driver", "lock", "oldest", "remedy"),
    [
        ("560.35.03", "gpu-vllm-cuda13", "580.65.06", "conda_env_profile: gpu-vllm-cuda12,"),
        ("515.105.01", "gpu-vllm-cuda12", "525.60.13", "conda_env_profile: cpu-smoke,"),
        ("", "gpu-vllm-cuda13", "580.65.06", "conda_env_profile: cpu-smoke,"),
    ],
)
def test_what_a_lock_of_verl_is_refused_for_has_verl_too(tmp_path, gpus, driver, lock, oldest, remedy):
    gpus(driver)
    path = ROLE / "files" / "profiles" / f"{lock}.txt"
    answer = carry_out(node.PHASES, "validate", settings(tmp_path, lock=str(path), lock_text=path.read_text()))
    refused = problem(answer, "NVIDIA driver for PyTorch built for CUDA")
    assert refused["what"].endswith(f"(lock {lock})") and refused["expected"] == f">= {oldest}"
    assert refused["found"] == driver or refused["found"].startswith("none (nvidia-smi")
    assert remedy in refused["remedy"] and refused["remedy"].endswith("or install a newer driver")


def test_every_choice_is_one_of_locks_and_the_settings_know_them_all():
    assert {lock for choice in locks.CHOICES.values() for lock in choice} <= set(locks.PROFILES)
    for choice in locks.CHOICES.values():
        drivers = [version_of(locks.oldest_driver(locks.PROFILES[lock])) for lock in choice]
        assert drivers == sorted(drivers, reverse=True)
    options = yaml.safe_load((ROLE / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    assert set(options["conda_env_profile"]["choices"]) == {*locks.PROFILES, *locks.CHOICES}
    asked = yaml.safe_load((ROLE / "tasks" / "profile.yml").read_text())[0]["when"]
    assert {name for name in locks.CHOICES if repr(name) in asked} == set(locks.CHOICES)


# --- the locks with verl ---


@pytest.mark.parametrize("lock", [lock for lock in locks.PROFILES if lock == "cpu-smoke" or "vllm" in lock])
def test_the_locks_with_verl_have_the_same_verl_and_ray(lock):
    pins = locks.Lock((ROLE / "files" / "profiles" / f"{lock}.txt").read_text()).pins
    assert (pins["verl"], pins["ray"], pins["transferqueue"]) == (rl.VERL, "2.60.0", "0.1.11")
    # verl imports them but declares them only in an extra.
    assert {"uvicorn", "fastapi", "cachetools", "msgspec", "pyzmq"} <= set(pins)
    assert ("vllm" in pins) == ("vllm" in lock)


@pytest.mark.parametrize(
    ("lock", "torch", "vllm"), [("gpu-vllm-cuda13", "2.11.0", "0.24.0"), ("gpu-vllm-cuda12", "2.10.0", "0.19.1")]
)
def test_vllm_has_the_torch_that_it_is_built_with(lock, torch, vllm):
    pins = locks.Lock((ROLE / "files" / "profiles" / f"{lock}.txt").read_text()).pins
    assert (pins["torch"], pins["vllm"], pins["transformers"]) == (torch, vllm, "5.9.0")
    major = locks.PROFILES[lock].partition(".")[0]
    assert f"nvidia-nccl-cu{major}" in pins and not any(name.endswith(f"-cu{25 - int(major)}") for name in pins)


@pytest.mark.parametrize(
    ("driver", "cuda"), [("560.35.03", "12.1"), ("580.95.05", "13.0"), ("580.95.05", "12.1"), ("", "none")]
)
def test_a_build_that_the_driver_runs_is_accepted(tmp_path, gpus, driver, cuda):
    gpus(driver)
    assert carry_out(node.PHASES, "validate", settings(tmp_path, lock_text=f"# cuda: {cuda}\na==1\n")).ok


def test_what_is_unknown_is_a_warning_not_a_refusal(tmp_path, gpus):
    gpus("")
    unsaid = carry_out(node.PHASES, "validate", settings(tmp_path, lock_text="torch==9\n"))
    assert unsaid.ok and "does not state the CUDA" in unsaid.warnings[0]
    new = carry_out(node.PHASES, "validate", settings(tmp_path, lock_text="# cuda: 99.0\ntorch==9\n"))
    assert new.ok and "CUDA 99.0 is unknown" in new.warnings[0]


# --- what else is refused first, all at once ---


def test_every_reason_to_stop_is_found_in_one_go(tmp_path, gpus):
    gpus("")
    (tmp_path / "path" / "rsync").unlink()
    (tmp_path / "opt" / "env").mkdir(parents=True)
    want = settings(tmp_path, lock_text="alpha\n", python="3.99", min_free_gib=1e9, platform="manylinux_2_99_riscv64")
    answer = carry_out(node.PHASES, "validate", want)
    assert problem(answer, "lock /x/own.txt")["found"] == "alpha"
    assert problem(answer, "python")["found"].startswith(HERE)
    assert problem(answer, "free space")["expected"] == ">= 1e+09 GiB"
    assert problem(answer, str(tmp_path / "opt" / "env"))["found"] == "a folder"
    assert problem(answer, "rsync") and problem(answer, "processor")["expected"] == "riscv64"
    assert problem(answer, "glibc")["expected"] == ">= 2.99"
    assert not answer.changed


def test_a_python_without_venv_is_named(tmp_path, gpus, monkeypatch):
    gpus("")
    stand_in = tmp_path / "path" / "python3.98"
    stand_in.write_text("#!/bin/sh\n# STAND-IN for a Python without venv\necho 3.98.1\nexit 1\n")
    stand_in.chmod(0o755)
    found = problem(carry_out(node.PHASES, "validate", settings(tmp_path, python="3.98")), "python")
    assert found["found"] == f"3.98.1 at {stand_in} without it" and found["remedy"] == "install python3.98-venv"


@pytest.fixture
def mirror(tmp_path):
    """An index on the loopback that has alpha and lets in only who:secret; gives its URL."""
    path = wheel(tmp_path / "served", "alpha", "1.0")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            pages = {
                "/simple/alpha/": f'<a href="/{path.name}">{path.name}</a>'.encode(),
                f"/{path.name}": path.read_bytes(),
            }
            allowed = self.headers.get("Authorization") == "Basic d2hvOnNlY3JldA=="
            content = pages.get(self.path) if allowed else None
            self.send_response(401 if not allowed else 404 if content is None else 200)
            self.send_header("WWW-Authenticate", "Basic")
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()
        thread.join()


@pytest.fixture
def netrc(tmp_path):
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1 login who password secret\n")
    file.chmod(0o600)
    return file


def test_a_mirror_is_asked_with_the_credentials_of_the_netrc_file(tmp_path, gpus, mirror, netrc):
    gpus("")
    want = settings(tmp_path, source="mirror", index_url=mirror)
    assert problem(carry_out(node.PHASES, "validate", want), f"package index {mirror}")["found"] == "status 401"
    assert carry_out(node.PHASES, "validate", {**want, "netrc": str(netrc)}).ok
    netrc.chmod(0o644)
    answer = carry_out(node.PHASES, "validate", {**want, "netrc": str(netrc)})
    assert problem(answer, "conda_env_netrc")["found"] == "mode 0644"
    assert "secret" not in json.dumps(answer.__dict__)


@pytest.mark.parametrize("source", ["mirror", "wheelhouse"])
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path, gpus, source):
    gpus("")
    want = settings(tmp_path, source=source, index_url="https://who:secret@example.invalid/simple")
    answer = carry_out(node.PHASES, "validate", want)
    assert "netrc" in problem(answer, "conda_env_index_url")["remedy"]
    assert "secret" not in json.dumps(answer.__dict__)


def test_an_index_that_does_not_answer_is_told_from_one_that_does(tmp_path):
    assert "refused" in index.unreachable("http://127.0.0.1:9/simple")
    assert index.unreachable(f"file://{tmp_path}") == ""
    assert index.unreachable(f"file://{tmp_path}/nothing") == "no such folder"


def test_the_index_asked_is_the_one_that_pip_would_ask(tmp_path):
    file = tmp_path / "pip.conf"
    assert index.default_index((file,), {}) == "https://pypi.org/simple/"
    file.write_text("[global]\nindex-url = https://mirror/%40/simple\n")
    assert index.default_index((file,), {}) == "https://mirror/%40/simple"
    assert index.default_index((file,), {"PIP_INDEX_URL": "https://other/simple"}) == "https://other/simple"
    file.write_text("garbage\n")
    assert index.default_index((file,), {}) == "https://pypi.org/simple/"


# --- what pip says when it fails: its words, shortened ---

HASHES = """\
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the package versions, \
please update the hashes. Otherwise, examine the package contents carefully; someone may have tampered with them.
    click==8.5.1 from file:///x/click-8.5.1-py3-none-any.whl (from -r bad.txt (line 1)):
        Expected sha256 00ff
             Got        8bb5

"""
VERSION = """\
ERROR: Could not find a version that satisfies the requirement click==9 (from versions: 8.5.1)
ERROR: No matching distribution found for click==9
"""
GONE = """\
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken by \
'NewConnectionError('<pip._vendor.urllib3.connection.HTTPConnection object at 0x7f>: Failed to establish a new \
connection: [Errno 111] Connection refused')': /simple/click/
ERROR: Could not find a version that satisfies the requirement click==8 (from versions: none)
ERROR: No matching distribution found for click==8
"""
PYTHON = "ERROR: Package 'shakedown' requires a different Python: 3.10.9 not in '>=3.11'\n"
DISK = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device: '/opt/x'\n"


@pytest.mark.parametrize(
    ("stderr", "what", "expected", "found"),
    [
        (HASHES, "sha256 of click==8.5.1", "00ff", "8bb5"),
        (VERSION, "package click==9", "available", "8.5.1"),
        (GONE, "package click==8", "available", "no answer from the index"),
        (PYTHON, "python for shakedown", ">=3.11", "3.10.9"),
        (DISK, "disk", "room for the environment", "no space left on device"),
        ("ERROR: something new\n", "pip install", "packages installed", "something new"),
        ("", "pip install", "packages installed", "Killed"),
    ],
)
def test_a_failed_pip_is_one_clear_problem(stderr, what, expected, found):
    assert node.pip_problem(stderr, "Killed")[:3] == (what, expected, found)


# --- the wheels: made once, on the controller ---


def wheel(folder, name, version, body=""):
    """A wheel that pip installs: one module of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(zipfile.ZipInfo(f"{name}.py"), body)
        file.writestr(zipfile.ZipInfo(f"{info}/METADATA"), f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(
            zipfile.ZipInfo(f"{info}/RECORD"), f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return path


FLASH = {"url": "https://x/flash_attn-2.whl", "sha256": "00", "python": "3.11", "torch": "2.3", "cuda": "12"}


def test_an_optional_wheel_is_taken_where_it_fits():
    lock = locks.Lock("torch==2.3.1+cu121\n")
    assert controller.choose([FLASH], "3.11", lock) == ([FLASH], [])
    assert controller.choose([FLASH], "3.11.9", lock) == ([FLASH], [])


@pytest.mark.parametrize(
    ("torch", "python", "reason"),
    [
        ("2.3.1+cu121", "3.12", "is for Python 3.11, the environment has 3.12"),
        ("2.30.0+cu121", "3.11", "is for torch 2.3, the lock has 2.30.0+cu121"),
        ("2.3.1+cu130", "3.11", "is for CUDA 12, the lock's torch for 13.0"),
        ("2.3.1+cpu", "3.11", "is for CUDA 12, the lock's torch for none"),
        ("2.3.1", "3.11", "is for CUDA 12, the lock's torch for unknown"),
    ],
)
def test_elsewhere_it_is_left_out_and_the_reason_is_given(torch, python, reason):
    fitting, (said,) = controller.choose([FLASH], python, locks.Lock(f"torch=={torch}\n"))
    assert not fitting and said == f"flash_attn-2.whl is left out: it {reason}"


def test_a_wheel_with_another_sha256_is_refused_and_nothing_is_kept(tmp_path, offline):
    path = wheel(tmp_path / "given", "alpha", "1.0")
    extra = {"path": str(path), "sha256": "0" * 64, "python": HERE, "torch": "none", "cuda": "none"}
    answer = send(settings(tmp_path, lock_text="# cuda: none\n", source="online", wheels=[extra]))
    refused = problem(answer, "sha256 of wheel alpha-1.0-py3-none-any.whl")
    assert refused["expected"] == "0" * 64
    assert refused["found"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.suffix for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [".partial"]


def test_a_platform_names_all_that_it_can_use():
    tags = controller.platforms("manylinux_2_28_x86_64")
    assert tags[0] == "manylinux_2_28_x86_64"
    assert {"manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux1_x86_64"} < set(tags)
    assert "manylinux_2_29_x86_64" not in tags


words = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=5)


@given(words)
def test_ssh_arguments_survive_the_quoting_of_rsync(given_words):
    target = {"port": 44222, "key": "", "ssh_args": shlex.join(given_words)}
    text = controller.shell_for_rsync(target)
    split, word, quote, position = [], None, "", 0
    while position < len(text):  # as rsync's do_cmd does
        letter = text[position]
        if quote and text[position : position + 2] == quote * 2:
            word, position = word + quote, position + 1
        elif quote and letter == quote:
            quote = ""
        elif quote:
            word += letter
        elif letter in "'\"":
            quote, word = letter, word or ""
        elif letter == " ":
            split, word = [*split, word] if word is not None else split, None
        else:
            word = (word or "") + letter
        position += 1
    split += [word] if word is not None else []
    assert split == ["ssh", "-p", "44222", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", *given_words]


def test_the_hash_changes_with_each_thing_that_decides_what_is_installed(tmp_path):
    want = settings(tmp_path)
    lock = locks.Lock(LOCK)
    base = controller.identity(want, lock, "p", [])
    assert base == controller.identity({**want, "source": "online", "timeout_s": 1.0}, lock, "p", [])
    others = [
        controller.identity({**want, "python": "3.12"}, lock, "p", []),
        controller.identity({**want, "manager": "conda"}, lock, "p", []),
        controller.identity(want, locks.Lock(LOCK + "c==1\n"), "p", []),
        controller.identity(want, lock, "q", []),
        controller.identity(want, lock, "p", [FLASH]),
    ]
    assert len({base, *others}) == 6


MAKING = SimpleNamespace(check=False, change=lambda *_: True)


def test_the_nodes_wheel_is_made_of_a_checkout_or_of_what_is_installed_and_is_the_same(tmp_path):
    """An installed package holds its own files in runner/_files, pyproject.toml and README.md among them."""
    checkout, installed = tmp_path / "checkout", tmp_path / "site-packages" / "runner" / "_files"
    for folder in (checkout / "runner" / "system", installed / "roles"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "README.md", checkout)
    (checkout / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "shakedown"\nversion = "1"\n'
        '[tool.setuptools.packages.find]\ninclude = ["runner", "runner.*"]\nnamespaces = false\n'
    )
    for name in ("runner/__init__.py", "runner/system/__init__.py"):
        (checkout / name).write_text("x = 1\n")
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(checkout / name, installed)
    shutil.copytree(checkout / "runner", installed.parent, dirs_exist_ok=True)
    (installed / "roles" / "main.py").touch()
    assert controller.package_source(str(installed)) == controller.package_source(str(checkout)) != ""
    made = []
    for path, folder in ((checkout, tmp_path / "a"), (installed, tmp_path / "b")):
        folder.mkdir()
        want = {"package": str(path), "index_url": "", "timeout_s": 60}
        controller.build_package(SimpleNamespace(want=want, run=partial(phases.Phase.run, None)), str(folder))
        (wheel,) = folder.iterdir()
        made.append(wheel.read_bytes())
    assert made[0] == made[1]
    assert [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("runner")] == [
        "runner/__init__.py",
        "runner/system/__init__.py",
    ]


def test_a_check_run_makes_nothing_and_says_what_it_would(tmp_path):
    want = {**settings(tmp_path), "target": {"local": True}}
    answer = carry_out(controller.PHASES, "install", want, check=True)
    assert answer.changed and [diff["after"] for diff in answer.diff] == ["built\n"] * 2
    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_once_for_all_who_want_it_at_the_same_time(tmp_path):
    made = []

    def fill(folder):
        time.sleep(0.05)
        made.append(folder)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: controller.keep(MAKING, str(tmp_path / "local-1"), fill), range(8)))
    assert len(made) == 1
    assert (tmp_path / "local-1" / "requirements.txt").read_text() == ""


def test_who_waited_for_one_that_failed_does_not_try_again(tmp_path):
    tried = []

    def fill(folder):
        time.sleep(0.1)
        tried.append(folder)
        raise controller.Stop("index", "reachable", "refused")

    def keep(_):
        with pytest.raises(controller.Stop, match="index"):
            controller.keep(MAKING, str(tmp_path / "local-1"), fill)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(keep, range(4)))
    assert len(tried) == 1
    keep(0)  # a later run does
    assert len(tried) == 2


# --- a node, from nothing to whole ---


@pytest.fixture
def offline(monkeypatch):
    """pip sees no index but the folder that it is given: nothing here goes over a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def send(want):
    return carry_out(controller.PHASES, "install", {**want, "target": {"local": True}})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def world(tmp_path, monkeypatch, offline, cache):
    """Settings for a wheelhouse of two packages, made once by the controller's own pip, and a quick Python."""
    pip = next(path for path in map(Path, sys.path) if (path / "pip").is_dir())
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip").symlink_to(pip / "pip")
    (tmp_path / "path").mkdir()
    python = tmp_path / "path" / f"python{HERE}"
    python.write_text(f"""#!/bin/sh
# STAND-IN for a Python whose venv brings pip: it borrows that of the tests, since unpacking one takes seconds.
[ "$2" = venv ] || exec {sys.executable} "$@"
{sys.executable} -m venv --without-pip "$3" && echo {tmp_path}/pip > "$3/lib/python{HERE}/site-packages/pip.pth"
""")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    wheel(tmp_path / "index", "alpha", "1.0")
    wheel(tmp_path / "index", "beta", "2.1", "print('noise on stdout')\n")
    want = settings(tmp_path, imports=["alpha", "beta", "torch"], wheelhouse=str(cache))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert send(want).ok
    monkeypatch.delenv("PIP_FIND_LINKS")
    return want


def whole(want):
    sent = send(want)
    assert sent.ok, sent.msg
    return {**want, "sent": sent.facts}


def test_it_is_built_beside_switched_at_once_verified_and_left_alone_afterwards(world, tmp_path):
    bare = carry_out(node.PHASES, "install", {**world, "sent": send({**world}).facts}, check=True)
    assert bare.changed and not os.path.lexists(world["prefix"])

    want = whole(world)
    first = carry_out(node.PHASES, "install", want)
    assert first.ok and first.changed, first.msg
    place = os.readlink(world["prefix"])
    assert place == f"env-{want['sent']['hash'][:12]}"
    verified = carry_out(node.PHASES, "verify", want)
    assert verified.ok and verified.facts["imported"] == ["alpha", "beta"], verified.msg
    fact = carry_out(node.PHASES, "configure", want, check=True)
    assert json.loads(fact.diff[0]["after"])["profile"] == "own"
    assert not send(world).changed and not carry_out(node.PHASES, "install", want).changed

    # A package changed behind our back: reported by name, and built anew beside what runs.
    metadata = next((tmp_path / "opt").glob("env/lib/python3*/site-packages/alpha-1.0.dist-info/METADATA"))
    metadata.write_text(metadata.read_text().replace("1.0", "0.9"))
    drifted = problem(carry_out(node.PHASES, "verify", want), "package alpha")
    assert (drifted["expected"], drifted["found"]) == ("1.0", "0.9")
    mended = carry_out(node.PHASES, "install", want)
    assert mended.changed and mended.diff[0]["before"].endswith("alpha changed since\n")
    assert os.readlink(world["prefix"]) == f"{place}-b" and (tmp_path / "opt" / place).is_dir()
    assert carry_out(node.PHASES, "verify", want).ok

    # Another lock is drift until it is installed.
    other = {**want, "lock_text": LOCK.replace("beta==2.1\n", "")}
    assert problem(carry_out(node.PHASES, "verify", other), "lock of the environment")


def test_the_build_of_torch_that_is_installed_is_compared_with_the_lock_and_the_driver(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel(tmp_path / "index", "torch", "2.0", "class version:\n    cuda = None\n")
    want = whole({**world, "lock_text": f"{LOCK}torch==2.0\n"})
    assert carry_out(node.PHASES, "install", want).ok
    verified = carry_out(node.PHASES, "verify", want)
    assert verified.ok and "torch" in verified.facts["imported"], verified.msg


def test_a_further_profile_is_an_environment_beside_the_main_one_which_it_leaves_alone(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    main = whole(world)
    assert carry_out(node.PHASES, "install", main).ok
    beside = {**world, "beside": "rl", "prefix": f"{world['prefix']}-rl", "lock_text": "# cuda: none\nalpha==1.0\n"}
    further = whole(beside)
    assert carry_out(node.PHASES, "install", further).changed
    # No fact is of it, so none is missed.
    verified = carry_out(node.PHASES, "verify", further)
    assert verified.ok and verified.facts["imported"] == ["alpha"], verified.msg
    for want in (main, further):
        assert not send(want).changed and not carry_out(node.PHASES, "install", want).changed
    assert environments_of(tmp_path) == ["env", "env-rl"]


def environments_of(tmp_path):
    """The names of the links to environments."""
    return sorted(path.name for path in (tmp_path / "opt").iterdir() if path.is_symlink())


def test_what_runs_while_the_link_is_switched_keeps_its_environment(world, tmp_path):
    assert carry_out(node.PHASES, "install", whole(world)).ok
    python, first = f"{world['prefix']}/bin/python", os.path.realpath(world["prefix"])
    script = "import sys; print(1, flush=True); input(); import alpha; print(alpha.__file__); print(sys.executable)"
    running = subprocess.Popen([python, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "1\n"
    node.switch(world["prefix"], str(tmp_path / "opt" / "env-000000000000"))
    said, _ = running.communicate("\n", timeout=30)
    assert all(line.startswith(first) for line in said.splitlines())


def test_nothing_half_made_is_taken_for_whole(world, tmp_path):
    want = whole(world)
    half = tmp_path / "opt" / f"env-{want['sent']['hash'][:12]}"
    (half / "bin").mkdir(parents=True)
    (tmp_path / "opt" / "env").symlink_to(half.name)
    assert problem(carry_out(node.PHASES, "verify", want), "environment")["found"] == "an incomplete one"
    assert carry_out(node.PHASES, "install", want).ok
    assert os.readlink(world["prefix"]) == f"{half.name}-b"
    assert carry_out(node.PHASES, "verify", want).ok


def test_a_damaged_wheel_is_refused_sent_anew_and_leaves_nothing(world, tmp_path):
    want = whole(world)
    damaged = next((tmp_path / "opt" / "wheels").glob("lock-*/alpha-*.whl"))
    kept = os.stat(damaged)
    damaged.write_bytes(bytes(kept.st_size))
    os.utime(damaged, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    answer = carry_out(node.PHASES, "install", want)
    assert "the wheels are then sent again" in problem(answer, "sha256 of alpha==1.0")["remedy"]
    assert os.listdir(tmp_path / "opt") == ["wheels"]
    whole(world)
    assert damaged.stat().st_size and any(damaged.read_bytes())


def test_pip_installs_from_a_mirror_with_the_credentials_of_the_netrc_file(world, mirror, netrc, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    text = "# cuda: none\nalpha==1.0\n"
    want = whole({**world, "source": "mirror", "index_url": mirror, "netrc": str(netrc), "lock_text": text})
    answer = carry_out(node.PHASES, "install", want)
    assert answer.ok, answer.msg
    assert "secret" not in json.dumps(answer.__dict__)
    assert carry_out(node.PHASES, "verify", want).facts["imported"] == ["alpha"]


@given(st.binary(max_size=200))
def test_a_damaged_stamp_is_no_stamp(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("prefix")
    (folder / node.STAMP).write_bytes(content)
    assert node.stamp(str(folder)) == {}


# --- what is not this role's is left alone ---


def test_other_folders_of_wheels_stay_where_they_are(world, tmp_path):
    want = whole(world)
    others = tmp_path / "opt" / "wheels"
    (others / "torch-nightly").mkdir()
    (others / "local-000000000000").mkdir()
    assert carry_out(node.PHASES, "install", want).ok
    assert (others / "torch-nightly").is_dir()
    assert not (others / "local-000000000000").exists()


def test_a_link_of_another_origin_is_not_replaced(tmp_path, gpus):
    gpus("")
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt" / "env").symlink_to("miniconda3")
    want = settings(tmp_path, lock_text="# cuda: none\na==1\n")
    assert problem(carry_out(node.PHASES, "validate", want), want["prefix"])["found"] == "a link to miniconda3"
    (tmp_path / "opt" / "env").unlink()
    (tmp_path / "opt" / "env").symlink_to("env-0123456789ab")
    assert carry_out(node.PHASES, "validate", want).ok


def test_a_miniforge_of_another_origin_is_refused_and_a_half_made_one_is_not(tmp_path, gpus):
    gpus("")
    root = tmp_path / "opt" / "miniforge"
    root.mkdir(parents=True)
    want = settings(tmp_path, lock_text="# cuda: none\na==1\n", manager="conda")
    assert problem(carry_out(node.PHASES, "validate", want), str(root))["found"] == "another's"
    (tmp_path / "opt" / "miniforge.begun").touch()
    assert carry_out(node.PHASES, "validate", want).ok
