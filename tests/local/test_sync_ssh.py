"""A user's folders sent over a real sshd on loopback: once a content, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loopback_sshd
from runner.cluster.inventory import Node
from runner.launch import code, stores
from runner.launch.agents import Agents
from runner.system import tree

pytestmark = [
    pytest.mark.local,
    pytest.mark.skipif(
        loopback_sshd.SSHD is None or shutil.which("rsync") is None, reason="sshd or rsync is not installed"
    ),
]


@pytest.fixture(scope="module")
def ssh_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Reaches this machine as gpu-a, and nothing as gpu-dead."""
    folder = tmp_path_factory.mktemp("sshd")
    with loopback_sshd.running(folder) as sshd:
        (folder / "known_hosts").write_text(f"node {sshd.host_key}\n")
        (folder / "ssh_config").write_text(
            f"Host gpu-a\nPort {sshd.port}\nHost gpu-dead\nPort 1\n"
            f"Host *\nHostName 127.0.0.1\nHostKeyAlias node\nIdentityFile {sshd.client}\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile /dev/null\nBatchMode yes\n"
        )
        yield str(folder / "ssh_config")


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("own")))


@pytest.fixture
def nodes(cluster) -> list[Node]:
    return [
        dataclasses.replace(cluster.nodes[number], name=name, python=sys.executable, become=None)
        for number, name in enumerate(("gpu-a", "gpu-dead"))
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "my 'code' $(x)"
    (made / "-lib").mkdir(parents=True)
    (made / "train.py").write_text("print(1)\n")
    (made / "-lib" / "run me.sh").write_text("true\n")
    (made / "-lib" / "run me.sh").chmod(0o755)
    (made / "link").symlink_to("-lib")
    (made / ".gitignore").write_text("*.pt\n")
    (made / "huge.pt").write_text("x")
    return made


def part(source: Path, root: Path, work: Path | str = "") -> stores.Part:
    found = code.of_script(["train.py"], source)
    return stores.Part("code", found, found.tree(), str(root), str(work))


def test_code_is_sent_once_and_each_run_has_its_copy(source, nodes, ssh_config, tmp_path):
    said: list[str] = []
    first = part(source, tmp_path / "scratch" / "code", tmp_path / "scratch" / "work" / "run-1")
    plan, agents = SimpleNamespace(backend="ssh"), Agents(None, ssh_config)
    assert agents.store(plan, nodes[:1], first, said.append, lambda: False) == {}
    stored, work = Path(first.on_nodes), Path(first.work)
    assert tree.measure(stored) == tree.measure(work) == first.tree
    assert not (stored / "huge.pt").exists() and (work / "-lib" / "run me.sh").stat().st_mode & 0o111
    assert len(said) == 1 and said[0].startswith("sending the code (") and said[0].endswith(" to 1 node")
    inode = (stored / "train.py").stat().st_ino
    again = dataclasses.replace(first, work=str(tmp_path / "scratch" / "work" / "run-2"))
    assert stores.send(again, nodes[:1], ssh_config, said.append) == {} and len(said) == 1
    assert (stored / "train.py").stat().st_ino == inode and tree.measure(Path(again.work)) == first.tree


def test_a_node_that_is_down_fails_alone_and_a_torn_copy_is_mended(source, nodes, ssh_config, tmp_path):
    wanted = part(source, tmp_path / "code")
    assert stores.send(wanted, nodes[:1], ssh_config, print) == {}
    torn = Path(wanted.on_nodes, "train.py")
    torn.chmod(0o644)
    torn.write_text("print(2)\n")
    said: list[str] = []
    problems = stores.send(wanted, nodes, ssh_config, said.append)
    assert {name: problem.kind for name, problem in problems.items()} == {"gpu-dead": "unreachable"}
    assert tree.measure(Path(wanted.on_nodes)) == wanted.tree and len(said) == 1


def test_a_file_that_changes_after_it_was_listed_is_no_silent_difference(source, nodes, ssh_config, tmp_path):
    wanted = part(source, tmp_path / "code")
    (source / "train.py").write_text("print('changed meanwhile')\n")
    said: list[str] = []
    problems = stores.send(wanted, nodes[:1], ssh_config, said.append)
    assert problems["gpu-a"].kind == "copy_differs" and wanted.tree.digest[:12] in problems["gpu-a"].message
    assert len(said) == 2, "it is sent again, once"
    assert not Path(wanted.on_nodes).exists()


def test_an_interrupted_transfer_leaves_no_copy_and_no_process_and_the_next_one_completes_it(
    source, nodes, ssh_config, tmp_path, monkeypatch
):
    with open(source / "big.bin", "wb") as file:
        for _ in range(200):
            file.write(os.urandom(1 << 18))
    wanted = part(source, tmp_path / "code")
    incoming = Path(f"{wanted.on_nodes}.incoming")
    original = stores._options

    @stores.contextmanager
    def slow(part):
        with original(part) as options:
            yield [*options, "--bwlimit=4m"]

    stop = threading.Event()

    def watch() -> None:
        while not (incoming.is_dir() and any(incoming.iterdir())):
            time.sleep(0.02)
        stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(stores, "_options", slow)
        threading.Thread(target=watch, daemon=True).start()
        began = time.monotonic()
        stores.send(wanted, nodes[:1], ssh_config, print, stop.is_set)
        assert time.monotonic() - began < 10 and stop.is_set()
        assert "rsync" not in {child.name() for child in psutil.Process().children(recursive=True)}
    assert not Path(wanted.on_nodes).exists()
    assert stores.send(wanted, nodes[:1], ssh_config, print) == {}
    assert tree.measure(Path(wanted.on_nodes)) == wanted.tree and not incoming.exists()


def test_a_full_disk_is_said_of_the_node(source, nodes, ssh_config, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs a mount, which is not permitted here")
    try:
        (source / "big.bin").write_bytes(os.urandom(1 << 20))
        wanted = part(source, small / "code")
        problems = stores.send(wanted, nodes[:1], ssh_config, print)
        assert {name: problem.kind for name, problem in problems.items()} == {"gpu-a": "disk_full"}
        assert not Path(wanted.on_nodes).exists()
        assert shutil.disk_usage(small).free > 200 << 10, "what is of no use does not keep it full"
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_folder_that_all_nodes_see_gets_it_once(source, tmp_path):
    said: list[str] = []
    wanted = part(source, tmp_path / "results" / ".code", tmp_path / "results" / "run-1" / "work")
    for _ in range(2):
        stores.send_here(wanted, said.append)
    assert tree.measure(Path(wanted.on_nodes)) == tree.measure(Path(wanted.work)) == wanted.tree and len(said) == 1


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in {".", ".."}
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_whatever_files_are_called_they_arrive(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("named")
    (folder / "from" / "- 'sub'\n$(x)").mkdir(parents=True)
    try:
        for name in [*names, "- 'sub'\n$(x)/#;", os.fsdecode(b"\xff")]:
            (folder / "from" / name).write_text(name, errors="surrogateescape")
    except OSError:  # a name that is too long in UTF-8
        return
    found = code.data_of(folder / "from")
    wanted = stores.Part("data", found, found.tree(), str(folder / "data-sets"))
    stores.send_here(wanted, print)
    assert tree.measure(Path(wanted.on_nodes)) == wanted.tree
