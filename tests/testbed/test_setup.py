"""`runner setup` and `runner check` on containers, for real: changed once, then unchanged, then broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.provision.testbed import containers as provision_testbed
from runner.provision.testbed import layout
from runner.system import process

RUNNER = Path(sys.executable).with_name("runner")
pytestmark = pytest.mark.testbed
ROLES = ("ssh_mesh", "slurm_cluster")
WITHOUT = ("--set", "conda_env_further=[]")  # no profiles: tests/unit/provision/test_profiles.py has those


@pytest.fixture(scope="module")
def nodes(containers, tmp_path_factory):
    """Three bare nodes of their own: the others' tests must not find Slurm on theirs."""
    from testbed.conftest import Testbed

    folder = tmp_path_factory.mktemp("setup")
    try:
        state = provision_testbed.up(layout.Options(nodes=3, name="pytest-setup", inventory=folder))
        yield Testbed("pytest-setup", folder, state["nodes"])
    finally:
        provision_testbed.down("pytest-setup")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def runner(nodes, home, *arguments, seconds=240):
    """The command's exit code, what it printed and what it said."""
    command = [str(RUNNER), arguments[0], "-i", str(nodes.inventory), *arguments[1:]]
    command += ["--results", str(home), *WITHOUT] if arguments[0] == "setup" else []
    done = process.run(command, timeout_s=seconds)
    return done.rc, done.stdout, done.stderr


def states(printed, role):
    """The role's state by alias, from --json."""
    return {alias: node["roles"].get(role) for alias, node in json.loads(printed)["nodes"].items()}


def inside(nodes, word, *argv, check=True):
    return process.run(["podman", "exec", nodes.container(word), *argv], timeout_s=60, check=check).stdout


def drift(nodes, word):
    inside(nodes, word, "sed", "-i", "$ a # by hand", "/etc/slurm/slurm.conf")


@pytest.fixture(scope="module")
def provisioned(nodes, home):
    """The first run, from bare nodes; what it printed."""
    code, printed, said = runner(nodes, home, "setup", "--json")
    assert code == 0, printed + said
    return printed


def test_a_dry_run_names_the_tasks_and_touches_nothing(nodes, home):
    code, printed, _ = runner(nodes, home, "setup", "--dry-run", "--tags", "ssh_mesh")
    assert code == 0 and printed.startswith("runner inventory -i ") and "node[001-003]" in printed
    assert "SSH_CONFIG" not in printed and "\nansible-playbook " in printed
    assert "ssh_mesh : " in printed and "slurm_cluster : " not in printed
    assert not list(home.iterdir())


def test_a_check_of_bare_nodes_tells_what_would_change_and_changes_nothing(nodes, home):
    code, printed, said = runner(nodes, home, "setup", "--check", "--tags", "ssh_mesh")
    assert code == 0, printed + said
    assert "node[001-003]" in printed and "changed" in printed
    assert not inside(nodes, "node001", "find", "/root/.ssh", "-name", "id_*", check=False)


def test_the_first_run_brings_a_cluster_up(nodes, provisioned):
    for role in ROLES:
        assert set(states(provisioned, role).values()) == {"changed"}, role
    assert len(inside(nodes, "node001", "srun", "-N3", "hostname").split()) == 3
    assert inside(nodes, "node002", "ssh", "node003", "hostname").strip().endswith("0003")


def test_the_second_run_changes_nothing(nodes, home, provisioned):
    code, printed, said = runner(nodes, home, "setup", "--json")
    assert code == 0, printed + said
    for role in ROLES:
        assert set(states(printed, role).values()) == {"ok"}, printed


def test_events_are_kept_host_by_host_without_invocations(home, provisioned):
    of_all_roles = [
        path.parents[1] for path in home.glob("*/ansible/events.jsonl") if "slurm_cluster" in path.read_text()
    ]
    folder = min(of_all_roles)
    events = [json.loads(line) for line in (folder / "ansible" / "events.jsonl").read_text().splitlines()]
    assert {event["role"] for event in events} >= set(ROLES) and len({event["host"] for event in events}) == 3
    assert json.loads((folder / "summary.json").read_text())["state"] == "complete"
    everything = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert "invocation" not in everything and "module_args" not in everything
    assert folder.stat().st_mode & 0o777 == 0o700


def test_check_is_quiet_about_good_nodes(nodes, home, provisioned):
    code, printed, said = runner(nodes, home, "check")
    assert code == 0, printed + said
    assert "3 of 3 nodes as expected" in printed


def test_check_shows_drift_with_its_node_and_setup_mends_it(nodes, home, provisioned):
    drift(nodes, "node002")
    code, printed, _ = runner(nodes, home, "check", "--json")
    told = json.loads(printed)
    assert code == 1 and {f["nodes"] for f in told["failures"]} == {"node002"} and "slurm.conf" in json.dumps(told)
    code, printed, _ = runner(nodes, home, "setup", "--json", "--tags", "slurm_cluster")
    assert code == 0 and states(printed, "slurm_cluster")["node002"] == "changed"
    assert runner(nodes, home, "check")[0] == 0


def told_by_check(nodes, home, code):
    """The lines of `runner check` about nodes, sorted; and that nothing else is red."""
    found, printed, said = runner(nodes, home, "check")
    assert found == code, printed + said
    return sorted(line for line in printed.splitlines() if line.startswith("node0") and ": " in line)


def test_one_cause_is_one_line_on_the_node_that_has_it_with_the_command_that_mends_it(nodes, home, provisioned):
    hosts = inside(nodes, "node003", "cat", "/etc/hosts")
    one, other = (inside(nodes, "node003", "getent", "hosts", name).split()[0] for name in ("node001", "node002"))
    swapped = hosts.replace(f"{one}\t", "X\t").replace(f"{other}\t", f"{one}\t").replace("X\t", f"{other}\t")
    inside(nodes, "node001", "chmod", "0666", "/etc/ssh/sshd_config")
    inside(nodes, "node002", "mv", "/root/.ssh/id_ed25519", "/root/key")
    inside(nodes, "node003", "sh", "-c", 'printf %s "$0" > /etc/hosts', swapped)
    try:
        first, second, third = told_by_check(nodes, home, code=1)
    finally:
        inside(nodes, "node003", "sh", "-c", 'printf %s "$0" > /etc/hosts', hosts)
    again = f"(run `runner setup -i {nodes.inventory} --tags ssh_mesh`)"
    assert first == f"node001: ssh_mesh: /etc/ssh/sshd_config: expected mode 0644, found mode 0666 {again}"
    assert second == f"node002: ssh_mesh: /root/.ssh/id_ed25519: expected a key pair, found no such file {again}"
    assert third.startswith("node003: bench: has ") and f"at {other}, which is node002; " in third
    inside(nodes, "node002", "mv", "/root/key", "/root/.ssh/id_ed25519")
    assert runner(nodes, home, "setup", "--tags", "ssh_mesh")[0] == 0
    assert inside(nodes, "node001", "stat", "-c", "%a", "/etc/ssh/sshd_config") == "644\n"


def test_a_stopped_sshd_turns_one_node_red_whether_ansible_is_still_connected_or_not(nodes, home, provisioned):
    inside(nodes, "node002", "systemctl", "stop", "ssh")
    try:
        (line,) = told_by_check(nodes, home, code=1)  # over the connection that the last play left open
        assert line.startswith("node002: ssh_mesh: sshd: expected running, found stopped")
        inside(nodes, "node002", "pkill", "-f", "sshd", check=False)
        (line,) = told_by_check(nodes, home, code=3)
        assert line.startswith("node002: ssh_mesh: nothing listens on its SSH port")
    finally:
        inside(nodes, "node002", "systemctl", "start", "ssh")


@pytest.mark.skipif(shutil.which("iptables") is None, reason="requires iptables, to block a direction")
def test_a_direction_that_is_blocked_is_named_from_source_to_target(nodes, home, provisioned):
    source, target = (inside(nodes, name, "hostname", "-I").split()[0] for name in ("node001", "node002"))
    found = process.run(["podman", "inspect", "-f", "{{.State.Pid}}", nodes.container("node002")], timeout_s=30)
    rule = ["INPUT", "-s", source, "-p", "tcp", "--dport", "29500", "-j", "DROP"]
    within = ["nsenter", "--target", found.stdout.strip(), "--net", "--", "iptables"]
    process.run([*within, "-A", *rule], timeout_s=30, check=True)
    try:
        code, printed, _ = runner(nodes, home, "check", "--json")
    finally:
        process.run([*within, "-D", *rule], timeout_s=30, check=True)
    told = json.loads(printed)
    (failure,) = told["failures"]
    assert code == 1 and (failure["nodes"], failure["role"]) == ("node002", "links")
    assert failure["what"] == f"node001 → node002 ({target}): TCP no answer on 29500"
    assert failure["remedy"].startswith("see `") and "; fix it with " in failure["remedy"]
    assert told["links"]["matrix"]["node001"] == {"node002": {"29500": "no answer"}, "node003": {}}
    assert told["links"]["matrix"]["node002"] == {"node001": {}, "node003": {}}


def test_a_hung_node_is_named_and_the_others_go_on(nodes, home, provisioned):
    process.run(["podman", "pause", nodes.container("node003")], timeout_s=30, check=True)
    try:
        code, printed, _ = runner(nodes, home, "setup", "--tags", "ssh_mesh", "--json")
    finally:
        process.run(["podman", "unpause", nodes.container("node003")], timeout_s=30, check=True)
    told = json.loads(printed)
    assert code == 3
    first = told["failures"][0]
    assert (first["nodes"], "answer" in first["what"], "SSH port" in first["what"]) == ("node003", True, True)
    assert states(printed, "ssh_mesh")["node001"] in ("ok", "failed")  # it says that it does not reach node003


def test_a_mistyped_variable_is_refused_before_a_node_is_asked(nodes, home, tmp_path):
    folder = tmp_path / "inventory"
    shutil.copytree(nodes.inventory, folder)
    (folder / "group_vars").mkdir()
    (folder / "group_vars" / "gpu_nodes.yml").write_text("ssh_mesh_usr: amy\nslurm_cluster_gpus: many\n")
    done = process.run([str(RUNNER), "setup", "-i", str(folder), "--results", str(home), *WITHOUT], timeout_s=120)
    assert done.rc == 1
    assert "node[001-003]: ssh_mesh: unknown variable 'ssh_mesh_usr': did you mean 'ssh_mesh_user'?" in done.stdout
    assert "slurm_cluster_gpus" in done.stdout and "many" in done.stdout


def test_a_full_disk_and_a_read_only_file_system_are_named_and_the_next_run_completes(nodes, home, provisioned):
    def mount(word, *options):
        pid = process.run(["podman", "inspect", "--format", "{{.State.Pid}}", nodes.container(word)], timeout_s=30)
        argv = ["nsenter", "--target", pid.stdout.strip(), "--mount", "--pid", "--", *options]
        process.run(argv, timeout_s=30, check=True)

    drift(nodes, "node001")
    drift(nodes, "node002")
    mount("node001", "mount", "--bind", "/etc/slurm", "/etc/slurm")
    mount("node001", "mount", "-o", "remount,ro,bind", "/etc/slurm")
    mount("node002", "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", "/etc/ansible")
    try:
        inside(nodes, "node002", "dd", "if=/dev/zero", "of=/etc/ansible/full", "bs=1k", "count=16", check=False)
        code, printed, _ = runner(nodes, home, "setup", "--tags", "slurm_cluster")
    finally:
        mount("node001", "umount", "/etc/slurm")
        mount("node002", "umount", "/etc/ansible")
    assert code == 1
    assert "node001: slurm_cluster: /etc/slurm" in printed and "read-only file system" in printed
    assert "node002: slurm_cluster: /etc/ansible/facts.d" in printed and "no space left" in printed
    code, printed, said = runner(nodes, home, "setup")
    assert code == 0, printed + said


def started_by(pid):
    """The name of the program that started a process."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return Path(f"/proc/{parent}/comm").read_text().strip()


def test_a_killed_controller_leaves_no_ansible_behind_and_the_next_run_completes(nodes, home, provisioned):
    command = [RUNNER, "setup", "-i", str(nodes.inventory), "--results", str(home), *WITHOUT]

    def ansible():
        argv = ["pgrep", "--full", f"ansible-playbook.*--inventory {nodes.inventory}"]
        return [int(pid) for pid in process.run(argv, timeout_s=10).stdout.split()]

    killed = []
    for hangs in (False, True):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not ansible() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        if hangs:  # as one that waits for a lock which a worker held when it was ended
            (itself,) = (pid for pid in ansible() if started_by(pid) == "timeout")
            os.kill(itself, signal.SIGSTOP)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        killed.append(child.pid)
        deadline = time.monotonic() + 10
        while ansible() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not ansible()
    code, printed, said = runner(nodes, home, "setup")
    assert code == 0, printed + said
    assert not [path for pid in killed for path in Path("/dev/shm").glob(f"shakedown-play-{pid}-*")]


def test_ctrl_c_says_how_to_go_on(nodes, home, provisioned):
    command = [RUNNER, "setup", "-i", str(nodes.inventory), "--results", str(home), *WITHOUT]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    time.sleep(4)
    child.send_signal(signal.SIGINT)
    printed, _ = child.communicate(timeout=30)
    assert child.returncode == 130 and "run it again" in printed
