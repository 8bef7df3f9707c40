"""`--env-from`: what is read of each kind of lock, and environments that real agents on this machine make of it."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from runner.cluster import environments
from runner.errors import UsageError
from runner.launch import talk
from runner.launch import venv as env_from
from runner.node import venv
from runner.node.requests import EnvironmentRequest


def wheel(folder: Path, name: str, version: str, requires: str = "", script: bool = False) -> Path:
    """A wheel as a build makes it, with a RECORD that pip completes."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = '{version}'\ndef main():\n    print('{name} {version}')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if script:
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name} = {name}:main\n"
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text.encode())}\n")
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as made:
        for path, text in files.items():
            made.writestr(path, text)
        made.writestr(f"{info}/RECORD", "".join([*rows, f"{info}/RECORD,,\n"]))
    return file


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """pip has only what is in this folder."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "alpha", "1.0", requires="beta", script=True)
    wheel(folder, "beta", "2.0")
    for name, value in {"FIND_LINKS": str(folder), "NO_INDEX": "1", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def nodes(cluster, tmp_path, monkeypatch):
    """Three nodes with folders of their own; an agent of each on this machine, in place of ssh."""
    monkeypatch.setitem(talk.COMMANDS, "ssh", lambda node, arguments, ssh_config: [sys.executable, *arguments])
    return [replace(node, scratch=str(tmp_path / node.alias), env={}) for node in cluster.nodes[:3]]


def lock(tmp_path: Path, text: str, name: str = "requirements.txt") -> env_from.Lock:
    file = tmp_path / name
    file.write_text(text)
    made = env_from.of_option(str(file), tmp_path)
    assert isinstance(made, env_from.Lock)
    return made


def ensure(made, nodes):
    seen = []
    return made.ensure(nodes, None, lambda share, step: seen.append((share, step))), seen


def says(python: str, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_an_environment_is_made_once_on_each_node_and_its_programs_work_from_where_it_is(
    tmp_path, wheels, nodes, monkeypatch
):
    made = lock(tmp_path, "alpha==1.0\n")
    for name in ("FIND_LINKS", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}")
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}  # the inventory says where they are
    nodes = [replace(node, env=env) for node in nodes[:2]]
    problems, seen = ensure(made, nodes)
    assert problems == {}
    assert {f"{node.alias}: made" for node in nodes} <= {step for _, step in seen} and seen[-1][0] == 1.0
    assert any("package" in step for _, step in seen) and all(0 <= share <= 1 for share, _ in seen)
    for node in nodes:
        python = made.python_on(node)
        assert says(python, "import alpha, beta, sys; print(alpha.version, beta.version, sys.prefix)").startswith(
            f"1.0 2.0 {node.scratch}/env/"
        )
        program = Path(python).with_name("alpha")
        assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "alpha 1.0\n"
    before = {node.name: Path(made.python_on(node)).parents[1].resolve() for node in nodes}
    problems, seen = ensure(made, nodes)
    assert problems == {} and {step for _, step in seen} == {f"{node.alias}: is whole" for node in nodes}
    assert {node.name: Path(made.python_on(node)).parents[1].resolve() for node in nodes} == before


def site(python: str) -> Path:
    return next(Path(python).parents[1].glob("lib/python3*/site-packages"))


def lose_metadata(python):
    (site(python) / "beta-2.0.dist-info" / "METADATA").unlink()


def lose_module(python):
    (site(python) / "alpha.py").unlink()


def cut_module(python):
    (site(python) / "alpha.py").write_text("")


def lose_stamp(python):
    (Path(python).parents[1] / environments.STAMP).unlink()


def lose_python(python):
    Path(python).unlink()


def lose_base(python):
    Path(python).unlink()
    Path(python).symlink_to("/gone/python")


def lose_folder(python):
    shutil.rmtree(Path(python).parents[1].resolve())


def replace_link(python):
    folder = Path(python).parents[1]
    folder.unlink()
    (folder / "bin").mkdir(parents=True)


TORN = [lose_metadata, lose_module, cut_module, lose_stamp, lose_python, lose_base, lose_folder, replace_link]


def test_what_is_torn_is_seen_and_made_anew_and_nothing_of_the_old_one_stays(tmp_path, wheels, nodes, monkeypatch):
    made, (node, *_) = lock(tmp_path, "alpha==1.0\n"), nodes
    assert ensure(made, [node])[0] == {}
    folder = Path(made.python_on(node)).parents[1]
    for tear in TORN:
        copy = tmp_path / tear.__name__
        shutil.copytree(folder.resolve(), copy, symlinks=True)
        link = copy.with_suffix(".link")
        link.symlink_to(copy)
        assert venv.fault(link) == ""
        tear(str(link / "bin" / "python"))
        assert venv.fault(link) != "", tear.__name__
    with monkeypatch.context() as other:
        other.setattr(venv, "_base", lambda: "/other 3.99.1")
        assert "/other 3.99.1 now" in venv.fault(folder), "the node has another Python than it was made by"
    lose_python(made.python_on(node))
    problems, seen = ensure(made, [node])
    assert problems == {} and seen[-1] == (1.0, f"{node.alias}: made")
    assert says(made.python_on(node), "import alpha; print(alpha.version)") == "1.0"
    (whole,) = (each for each in Path(node.scratch, "env").iterdir() if each.is_dir() and not each.is_symlink())
    assert whole == folder.resolve()


def test_a_folder_in_place_of_the_link_is_replaced(tmp_path):
    folder = tmp_path / "env" / ("ab" * 8)
    (folder / "bin").mkdir(parents=True)
    venv._replace(folder, lambda aside: (aside / "bin").mkdir(parents=True))
    assert folder.is_symlink() and (folder / "bin").is_dir()
    assert sorted(each.name for each in folder.parent.iterdir()) == sorted([folder.name, folder.resolve().name])


def test_two_runs_at_the_same_time_make_it_once(tmp_path, wheels, nodes):
    made, (node, *_) = lock(tmp_path, "alpha==1.0\n"), nodes
    results = []
    threads = [threading.Thread(target=lambda: results.append(ensure(made, [node]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [problems for problems, _ in results] == [{}, {}]
    assert sorted(seen[-1][1] for _, seen in results) == [f"{node.alias}: is whole", f"{node.alias}: made"]


def test_a_failure_names_the_node_with_the_last_line_of_pip_and_leaves_nothing(tmp_path, wheels, nodes):
    made = lock(tmp_path, "alpha==1.0\ngamma==3\n")
    problems, _ = ensure(made, nodes[:1])
    problem = problems[nodes[0].name]
    assert problem.kind == "environment_missing" and "\n" not in problem.message
    assert problem.message.endswith(
        "requirements.txt: pip: Could not find a version that satisfies the requirement gamma==3 (from versions: none)"
    )
    assert [each.suffix for each in Path(nodes[0].scratch, "env").iterdir()] == [".lock"]


def test_a_node_without_an_index_is_told_how_it_gets_one(tmp_path, wheels, nodes):
    env = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_FIND_LINKS": ""}
    problems, _ = ensure(lock(tmp_path, "alpha==1.0\n"), [replace(nodes[0], env=env)])
    message = problems[nodes[0].name].message
    assert (
        "requirement alpha==1.0 (from versions: none) (no package index answers): name one with runner_env" in message
    )


def test_a_controller_that_is_gone_leaves_no_pip_and_no_environment(tmp_path, nodes, monkeypatch):
    """pip waits for an index that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        env = {"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": "/dev/null"}
        request = EnvironmentRequest(str(tmp_path / "env"), "ab" * 32, venv.PIP, {venv.REQUIREMENTS: "alpha"}, env=env)
        agent = subprocess.Popen([sys.executable, *talk.AGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert agent.stdin and agent.stdout
        agent.stdin.write(json.dumps(request.to_json()).encode() + b"\n")
        agent.stdin.flush()
        silent.settimeout(30)
        silent.accept()[0].close()  # pip is at work, and tries again
        agent.stdin.close()
        assert agent.wait(20) == 0
        agent.stdout.close()
    assert [each.suffix for each in (tmp_path / "env").iterdir()] == [".lock"]
    deadline = time.monotonic() + 5
    while (left := _running(str(tmp_path / "env"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def _running(word: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in file.read_bytes():
                found.append(str(file))
        except OSError:
            continue
    return found


def test_nodes_with_different_pythons_and_one_that_is_too_old_are_refused(tmp_path, nodes):
    from runner.node.protocol import Environment

    answers = {n.name: Environment("/p", v) for n, v in zip(nodes, ("3.11.4", "3.11.9", "3.12.1"), strict=True)}
    ((name, problem),) = env_from._other_versions(nodes, answers, "uv.lock").items()
    assert name == nodes[2].name and problem.message == (
        "uv.lock: its environment has Python 3.12, but 3.11 on node[001-002]"
    )
    request = EnvironmentRequest(str(tmp_path), "ab" * 32, venv.PIP, {venv.REQUIREMENTS: ""}, python="3.99")
    answer = venv.make(request)
    assert answer.kind == "version_mismatch" and answer.problem.endswith("the lock requires 3.99 or newer")


# --- conda, by a stand-in -------------------------------------------------------------------------------


def test_environment_yml_without_conda_is_said_by_name_and_remedy(tmp_path, nodes, monkeypatch):
    made = lock(tmp_path, "name: x\ndependencies: [python=3.11]\n", "environment.yml")
    monkeypatch.setenv("PATH", str(tmp_path))
    problems, _ = ensure(made, nodes[:1])
    message = problems[nodes[0].name].message
    assert "requires one of micromamba, mamba, conda on its PATH, which has none: install micromamba" in message


@pytest.mark.parametrize("name", ["micromamba", "mamba", "conda"])
@pytest.mark.parametrize("fails", [False, True])
def test_environment_yml_by_a_stand_in_of_conda(tmp_path, nodes, monkeypatch, name, fails):
    """The stand-in makes a venv where the real one would solve and download; conda cannot be had here."""
    programs = tmp_path / "bin"
    programs.mkdir()
    words = {"micromamba": "create --yes --quiet"}.get(name, "env create --quiet")
    end = "echo 'critical libmamba Could not solve'; exit 1" if fails else ""
    (programs / name).write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/said\ncase "$*" in "{words} --prefix "*" --file "*) ;; *) exit 9;; esac\n'
        f'while [ "$1" != --prefix ]; do shift; done\n{end}\n{sys.executable} -m venv --without-pip "$2"\n'
    )
    (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    made = lock(tmp_path, "dependencies: [conda-forge::python=3.11, {pip: [x]}]\n", "environment.yml")
    problems, seen = ensure(made, nodes[:1])
    if fails:
        assert problems[nodes[0].name].message.endswith(f"{name}: critical libmamba Could not solve")
        assert [each.suffix for each in Path(nodes[0].scratch, "env").iterdir()] == [".lock"]
    else:
        assert problems == {} and seen[-1][1].endswith("made")
        assert says(made.python_on(nodes[0]), "print(1)") == "1"


# --- what is read ---------------------------------------------------------------------------------------


def test_requirements_take_in_the_files_that_they_name(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "base.txt").write_text("torch==2.7 \\\n    --hash=sha256:ab\n# nothing\n-r more/dev.txt\n")
    (tmp_path / "more" / "dev.txt").write_text("./pkg # local\n--constraint=../pins.txt\n")
    (tmp_path / "pins.txt").write_text("numpy<2\n")
    made = lock(tmp_path, "-rbase.txt\n--find-links ./wheels\nx @ https://h/x.whl#sha256=1\n--requirement  base.txt\n")
    nested = f"torch==2.7 --hash=sha256:ab\n{tmp_path}/more/pkg\n"
    assert made.files == {
        venv.REQUIREMENTS: f"{nested}--find-links {tmp_path}/wheels\nx @ https://h/x.whl#sha256=1\n{nested}",
        venv.CONSTRAINTS: "numpy<2\nnumpy<2\n",
    }


def test_the_digest_is_that_of_all_that_it_is_made_from(tmp_path):
    (tmp_path / "base.txt").write_text("a==1\n")
    first = lock(tmp_path, "-r base.txt\n").digest
    assert lock(tmp_path, "# a comment\na==1\n").digest == first
    (tmp_path / "base.txt").write_text("a==2\n")
    assert lock(tmp_path, "-r base.txt\n").digest != first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n-r gone.txt\n", "line 2: -r gone.txt: no such file"),
        ("-r requirements.txt\n", "line 1: -r requirements.txt: that file is being read already"),
        ("-r https://h/r.txt\n", "line 1: -r https://h/r.txt: what is at a URL changes unseen"),
        ("a\n\n--index-url https://me:secret@h/simple\n", "line 3: --index-url has a password or a token"),
    ],
)
def test_a_line_that_cannot_work_on_nodes_is_named(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        lock(tmp_path, text)
    assert words in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone.txt", None, "no such file, and no profile either: those are cpu-smoke, gpu-vllm"),
        ("setup.py", "", "a uv.lock, a requirements.txt or an environment.yml is needed"),
        ("uv.lock", "", "requires the pyproject.toml beside it"),
        ("environment.yml", "dependencies: [", "is no YAML"),
        ("environment.yml", "name: x\n", "has no list `dependencies`"),
        ("environment.yml", "dependencies: [numpy]\n", "lack python"),
    ],
)
def test_what_is_no_lock_is_refused_in_one_line(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        env_from.of_option(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_profile_is_taken_by_its_name(tmp_path, cluster):
    made = env_from.of_option("cpu-smoke", tmp_path)
    node = replace(cluster.nodes[0], pythons={"cpu-smoke": "/opt/rl/bin/python"})
    assert made.python_on(node) == "/opt/rl/bin/python" and len(made.digest) == 64


UV_LOCK = """version = 1
requires-python = ">=3.9"

[[package]]
name = "alpha"
version = "1.0"
source = { registry = "https://pypi.org/simple" }
wheels = [{ url = "https://files.example/alpha-1.0-py3-none-any.whl", hash = "sha256:HASH" }]

[[package]]
name = "beta"
version = "2.0"
source = { registry = "https://download.example/whl/cpu" }
wheels = [{ url = "https://files.example/beta-2.0-py3-none-any.whl", hash = "sha256:HASH" }]

[[package]]
name = "mine"
version = "0.1.0"
source = { virtual = "." }
dependencies = [{ name = "alpha" }, { name = "beta", marker = "sys_platform == 'linux'" }]

[package.metadata]
requires-dist = [{ name = "alpha" }, { name = "beta", marker = "sys_platform == 'linux'" }]
"""
PROJECT = """[project]
name = "mine"
version = "0.1.0"
requires-python = ">=3.9"
dependencies = ["alpha", "beta; sys_platform == 'linux'"]
"""


@pytest.mark.skipif(shutil.which("uv") is None, reason="requires uv")
def test_a_lock_of_uv_is_read_by_uv_itself(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    made = lock(tmp_path, UV_LOCK.replace("HASH", "a" * 64), "uv.lock")
    assert made.python == "3.9"
    first, *pins = made.files[venv.REQUIREMENTS].replace(" \\\n    ", " ").splitlines()
    assert first == "--extra-index-url https://download.example/whl/cpu"
    assert [pin.split(" --hash")[0] for pin in pins] == ["alpha==1.0", "beta==2.0 ; sys_platform == 'linux'"]


def test_a_lock_of_uv_with_a_package_of_this_machine_is_refused(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    with pytest.raises(UsageError, match=r"beta comes from \.\./beta on this machine"):
        lock(tmp_path, UV_LOCK.replace('{ registry = "https://download.example/whl/cpu" }', '{ directory = "../beta" }'),
             "uv.lock")  # fmt: skip
