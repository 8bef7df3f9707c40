"""The testbed itself: nodes that SSH takes for real ones, and nothing left behind, however it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import runner
from runner.cluster.inventory import read
from runner.cluster.ssh import known_hosts, ssh_config
from runner.provision.testbed import containers as provision_testbed
from runner.provision.testbed import layout

from .conftest import Testbed

pytestmark = pytest.mark.testbed
RUNNER = [sys.executable, "-c", "from runner.cli.main import main; main()"]


def podman(*arguments: str) -> str:
    return subprocess.run(["podman", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


def left_of(name: str) -> list[str]:
    """Containers and networks of the testbed `name`, by what podman itself says."""
    containers = podman("ps", "--all", "--format", "{{.Names}}").split()
    networks = podman("network", "ls", "--format", "{{.Name}}").split()
    return [word for word in containers + networks if f"{word}-".startswith(f"shakedown-{name}-")]


@pytest.fixture(scope="module")
def two(containers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    name, folder = "pytest-two", tmp_path_factory.mktemp("two") / "an inventory"
    try:
        state = provision_testbed.up(layout.Options(nodes=2, name=name, inventory=folder))
        yield Testbed(name, folder, state["nodes"])
    finally:
        provision_testbed.down(name)


@pytest.fixture(scope="module")
def ssh(two: Testbed, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`ssh -F` with the configuration that the product renders from the inventory."""
    folder = tmp_path_factory.mktemp("ssh")
    inventory = read(str(two.inventory), folder / "cache")
    (folder / "known_hosts").write_text(known_hosts(inventory))
    (folder / "config").write_text(ssh_config(inventory, str(folder / "known_hosts")))
    return ["ssh", "-F", str(folder / "config")]


def said(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ssh_reaches_every_node_by_name_and_alias_with_its_pinned_key(two, ssh):
    for node in two.nodes:
        for word in (node["name"], node["alias"], node["address"]):
            assert said([*ssh, word, "hostname"]) == node["name"]


def test_a_node_is_an_ordinary_machine_with_systemd_on_port_44222(ssh):
    said([*ssh, "node001", "systemctl is-system-running --wait"])  # fails if any unit did
    assert said([*ssh, "node001", "cat /proc/1/comm"]) == "systemd"
    assert ":44222 " in said([*ssh, "node001", "ss -ltn"])
    assert said([*ssh, "node001", "cat /etc/machine-id"]) != said([*ssh, "node002", "cat /etc/machine-id"])


def test_another_host_key_than_the_pinned_one_is_refused(two, ssh, tmp_path):
    inventory = read(str(two.inventory), tmp_path / "cache")
    first, second = inventory.nodes
    (tmp_path / "known_hosts").write_text(f"{first.name} {second.host_key}\n")
    done = subprocess.run(
        [*ssh, "-o", f"UserKnownHostsFile={tmp_path}/known_hosts", "node001", "true"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr


def test_without_the_key_nobody_gets_in(ssh):
    done = subprocess.run(
        [*ssh, "-o", "PubkeyAuthentication=no", "node001", "true"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr


def test_nodes_know_each_other_by_name_and_reach_nothing_else(two, ssh):
    for node in two.nodes:
        for word in (node["name"], node["alias"]):
            assert said([*ssh, "node001", f"getent ahostsv4 {word}"]).split()[0] == node["address"]
    assert said([*ssh, "node001", "ip -4 route show default"]) == ""


def test_the_controllers_python_runs_in_the_node_and_cannot_be_changed_there(two, ssh):
    code = "import torch, runner, sys; print(torch.__version__, runner.__file__, sys.prefix)"
    from importlib.metadata import version

    seen = said([*ssh, "node002", f"{sys.executable} -c '{code}'"]).split()
    assert seen == [version("torch"), str(runner.__file__), sys.prefix]
    write = subprocess.run([*ssh, "node002", f"touch {sys.prefix}/x"], capture_output=True, text=True, timeout=60)
    assert "Read-only file system" in write.stderr


def test_files_go_over_with_rsync(two, ssh, tmp_path):
    (tmp_path / "a b.txt").write_text("content")
    said(["rsync", "-a", "-e", " ".join(ssh), f"{tmp_path}/a b.txt", "node002:/var/tmp/"])
    assert said([*ssh, "node002", "cat '/var/tmp/a b.txt'"]) == "content"


def test_plain_ansible_reaches_the_nodes_from_a_folder_with_a_space(two):
    out = said([str(Path(sys.executable).with_name("ansible")), "-i", str(two.inventory), "gpu_nodes", "-m", "ping"])
    assert out.count("pong") == 2


def test_a_second_up_changes_nothing(two):
    state = provision_testbed.up(layout.Options(nodes=2, name=two.name, inventory=two.inventory))
    assert state["already"] is True
    assert state["nodes"] == two.nodes


def test_status_tells_a_hung_node_from_a_good_one(two):
    assert [(n["name"], n["state"], n["sshd"]) for n in provision_testbed.status(two.name)] == [
        ("fukushimadc-02-hgx-0001", "running", True),
        ("fukushimadc-02-hgx-0002", "running", True),
    ]
    podman("pause", two.container("node002"))
    try:
        shown = subprocess.run([*RUNNER, "testbed", "status", "--name", two.name, "--json"], capture_output=True)
        assert [(n["state"], n["sshd"]) for n in json.loads(shown.stdout)] == [("running", True), ("paused", False)]
        assert shown.returncode == 3
    finally:
        podman("unpause", two.container("node002"))


def test_another_number_of_nodes_makes_it_anew_and_a_half_dead_one_can_be_taken_down(containers, tmp_path):
    name = "pytest-anew"
    folder = tmp_path / "inventory"
    try:
        first = provision_testbed.up(layout.Options(nodes=3, name=name, inventory=folder))
        second = provision_testbed.up(layout.Options(nodes=2, name=name, inventory=folder, memory="512m", cpus=0.5))
        assert not {n["container"] for n in first["nodes"]} & {n["container"] for n in second["nodes"]}
        assert [n["sshd"] for n in provision_testbed.status(name)] == [True, True]
        one, other = (node["container"] for node in second["nodes"])
        assert json.loads(podman("inspect", one))[0]["HostConfig"]["Memory"] == 512 * 2**20
        podman("rm", "--force", "--time", "0", one)
        podman("pause", other)
        assert [n["state"] for n in provision_testbed.status(name)] == ["missing", "paused"]
    finally:
        assert provision_testbed.down(name) is True
    assert left_of(name) == []
    assert not folder.exists()
    assert not (provision_testbed.state_home() / f"{name}.json").exists()
    assert provision_testbed.down(name) is False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_nothing(containers, tmp_path, number):
    name = "pytest-cut"
    child = begun(name, tmp_path / "inventory")
    child.send_signal(number)
    assert child.wait(60) == 130
    assert left_of(name) == []
    assert not (provision_testbed.state_home() / f"{name}.json").exists()
    assert not (tmp_path / "inventory").exists()


def test_what_a_killed_up_left_is_taken_down(containers, tmp_path):
    name = "pytest-killed"
    child = begun(name, tmp_path / "inventory")
    child.kill()
    child.wait(60)
    assert left_of(name) != []
    assert provision_testbed.down(name) is True
    assert left_of(name) == []


def begun(name: str, folder: Path) -> subprocess.Popen:
    """`runner testbed up` of eight nodes that has started the first of them and is not yet through."""
    record = provision_testbed.state_home() / f"{name}.json"
    argv = [*RUNNER, "testbed", "up", "--nodes", "8", "--name", name, "--inventory", str(folder)]
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300  # the image may have to be built first
    while time.monotonic() < deadline and child.poll() is None:
        if record.exists() and json.loads(record.read_text())["nodes"]:
            assert not (folder / "hosts.yml").exists()
            return child
        time.sleep(0.02)
    child.kill()
    raise AssertionError(f"no node of {name} was started; up ended with {child.wait()}")


def test_up_without_doing_it_shows_every_command(containers, tmp_path):
    argv = [
        *RUNNER,
        "testbed",
        "up",
        "--nodes",
        "3",
        "--name",
        "pytest-dry",
        "--inventory",
        str(tmp_path / "x"),
        "--dry-run",
    ]
    out = said(argv)
    assert out.count(" run --detach ") == 3
    assert "podman network create --internal" in out
    assert str(tmp_path / "x" / "hosts.yml") in out
    assert left_of("pytest-dry") == [] and not (tmp_path / "x").exists()
