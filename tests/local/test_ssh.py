"""`runner bench` over a real sshd on loopback: a working node, and every way in which one cannot be used."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stand_ins
import yaml

from loopback_sshd import SSHD, Sshd, running

RUNNER = Path(sys.executable).with_name("runner")
pytestmark = [pytest.mark.local, pytest.mark.skipif(SSHD is None, reason="sshd is not installed")]


class Server(Sshd):
    def inventory(self, folder: Path, **changes: object) -> Path:
        """An inventory of this server; `changes` are host variables, `others` more hosts."""
        others = changes.pop("others", {})
        variables = {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": getpass.getuser(),
            "ansible_ssh_private_key_file": str(self.folder / "client"),
            "runner_host_key": self.host_key,
            "runner_python": sys.executable,
            "runner_gpus_per_node": 2,
            "runner_device": "cpu",
            "runner_scratch": str(folder / "scratch"),
            **changes,
        }
        hosts = {"gpu-a": variables, **{name: {**variables, **more} for name, more in others.items()}}
        target = folder / "inventory"
        target.mkdir()
        (target / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": {"gpu_nodes": {"hosts": hosts}}}}))
        return target


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sshd")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "stranger"], check=True)
    with running(folder) as sshd:
        yield Server(sshd.folder, sshd.port, sshd.host_key)


def bench(inventory: Path, *arguments: str, results: Path) -> subprocess.CompletedProcess[str]:
    small = ["--test", "torch", "--set", "torch.max_bytes=64", "--set", "torch.collectives=[all_reduce]"]
    return subprocess.run(
        [RUNNER, "bench", "-i", inventory, "--results", results, *small, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        # This machine is one node, however it is called: other tests' runs on it would hold it.
        env={**os.environ, "XDG_STATE_HOME": str(results.parent / "state")},
    )


@pytest.mark.parametrize("engine", ["torchrun", "deepspeed"])
def test_a_cell_over_ssh_leaves_its_artefacts_here_and_nothing_there(server, tmp_path, engine):
    if engine == "deepspeed" and shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    results = tmp_path / "re $(x) 'é"
    done = bench(server.inventory(tmp_path), "--engine", engine, "--json", results=results)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["cells"][0]["state"] == "complete" and summary["cells"][0]["world_size"] == 2
    assert "torch-1n-r1: complete after" in done.stderr, "progress is shown, on stderr"
    cell = results / "latest" / "nodes" / "gpu-a" / "torch-1n-r1"
    assert {"facts.json", "outcome.json", "job.json", "rank0.jsonl", "rank1.jsonl", "telemetry.jsonl"} <= set(
        os.listdir(cell)
    )
    assert os.listdir(tmp_path / "scratch") == ["lock"]
    assert (results / "latest" / "report.html").exists()


@pytest.mark.parametrize(("backend", "engine"), [("local", "torchrun"), ("local", "deepspeed"), ("ssh", "deepspeed")])
def test_ranks_load_the_built_nccl_and_its_version_is_recorded(server, tmp_path, engine, backend):
    """With a stand-in for NCCL: gloo's ranks load what their environment tells them to, and call nothing of it."""
    if engine == "deepspeed" and shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    root = stand_ins.nccl(tmp_path / "nccl", 90807)
    more = {"ansible_connection": "local"} if backend == "local" else {}
    inventory = server.inventory(tmp_path, nccl_build_root=root, **more)
    done = bench(inventory, "--engine", engine, "--set", "nccl=built", results=tmp_path / "results")
    assert done.returncode == 0, done.stderr
    cell = tmp_path / "results" / "latest" / "nodes" / "gpu-a" / "torch-1n-r1"
    for rank in range(2):
        events = [json.loads(line) for line in (cell / f"rank{rank}.jsonl").read_text().splitlines()]
        (told,) = [event["libraries"] for event in events if event["event"] == "nccl"]
        assert told == {str(Path(root, "a-build", "lib", "libnccl.so.2")): "9.8.7"}
    assert json.loads((cell / "facts.json").read_text())["nccl"] == "9.8.7"


def test_the_built_nccl_where_none_is_built_is_one_line_before_anything_starts(server, tmp_path):
    done = bench(server.inventory(tmp_path), "--set", "nccl=built", results=tmp_path / "results")
    assert done.returncode == 3
    remedy = f"run `runner setup -i {tmp_path}/inventory --tags nccl_build`, or use torch's with --set nccl=torch"
    assert f"node001 (gpu-a): no NCCL is built in /opt/nccl: {remedy}" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
@pytest.mark.parametrize("declared", [{}, {"runner_device": "cuda"}, {"runner_gpus_per_node": 8}], ids=str)
def test_a_node_without_a_gpu_is_at_fault_only_where_the_inventory_says_that_it_has_some(server, tmp_path, declared):
    inventory = server.inventory(tmp_path)
    content = yaml.safe_load((inventory / "hosts.yml").read_text())
    variables = content["all"]["children"]["gpu_nodes"]["hosts"]["gpu-a"]
    del variables["runner_device"], variables["runner_gpus_per_node"]
    variables |= {"ansible_python_interpreter": sys.executable, **declared}
    (inventory / "hosts.yml").write_text(yaml.safe_dump(content))
    command = [RUNNER, "check", "-i", inventory, "--tags", "cuda_check,nccl_build"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    off = "off: cuda_check, nccl_build: no NVIDIA GPU here"
    if declared:
        assert done.returncode == 1 and off not in done.stdout and "nccl_build: " in done.stdout, done.stdout
    else:
        assert done.returncode == 0 and off in done.stdout, done.stdout


def test_a_relative_key_is_found_from_the_users_folder_by_ansible_and_by_the_dry_runs_own_commands(server, tmp_path):
    """Neither Ansible, which plays files of another folder, nor ssh is started elsewhere."""
    shutil.copy(server.folder / "client", tmp_path / "id")
    inventory = server.inventory(tmp_path, ansible_ssh_private_key_file="id")
    content = yaml.safe_load((inventory / "hosts.yml").read_text())
    variables = content["all"]["children"]["gpu_nodes"]["hosts"]["gpu-a"]
    del variables["runner_device"], variables["runner_gpus_per_node"]
    variables["ansible_python_interpreter"] = sys.executable
    (inventory / "hosts.yml").write_text(yaml.safe_dump(content))
    path = f"{RUNNER.parent}:{os.environ['PATH']}"
    env = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": path}
    asked = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path, "env": env}
    done = subprocess.run([RUNNER, "check", "-i", "inventory", "--tags", "cuda_check"], **asked)
    assert "NO ANSWER" not in done.stdout and "1 of 1 node as expected" in done.stdout, done.stdout
    done = subprocess.run([RUNNER, "setup", "-i", "inventory", "--dry-run", "--tags", "cuda_check"], **asked)
    writes, plays, *_ = done.stdout.splitlines()
    assert not (tmp_path / "cache" / "shakedown" / "ssh").exists(), "a dry run writes nothing"
    subprocess.run(["sh", "-c", writes], check=True, **asked)
    [config] = re.findall(r"-F (\S+/ssh_config)", plays)
    elsewhere = {**asked, "cwd": "/"}
    assert subprocess.run(["ssh", "-F", config, "gpu-a", "true"], **elsewhere).returncode == 0


def test_the_users_own_ssh_takes_the_same_config(server, tmp_path):
    inventory = server.inventory(tmp_path)
    subprocess.run(
        [RUNNER, "inventory", "-i", inventory, "--ssh-config", tmp_path / "a b"], check=True, capture_output=True
    )
    for word in ("gpu-a", "node001"):
        said = subprocess.run(
            ["ssh", "-F", tmp_path / "a b" / "ssh_config", word, "echo", "hi"], capture_output=True, text=True
        )
        assert said.stdout == "hi\n", said.stderr


@pytest.mark.parametrize(
    ("changes", "said", "kind"),
    [
        ({"ansible_port": 1}, "nothing listens on its SSH port (127.0.0.1:1,", "unreachable"),
        (
            {"runner_host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEwnvr0GkbYv6Yj9E7rGm2wYvYgGq0pWqkqYJkqYJkqY"},
            "its host key",
            "host_key_changed",
        ),
        ({"ansible_ssh_private_key_file": "STRANGER"}, "it refuses the key for this user", "refused_key"),
        ({"runner_python": "/nowhere/bin/python"}, "has no /nowhere/bin/python: provision it", "environment_missing"),
        ({"runner_python": "/usr/bin/python3"}, "its environment lacks this package", "environment_missing"),
        ({"runner_scratch": "/proc/nothing"}, "cannot write to /proc/nothing", "unknown"),
        ({"runner_min_free_disk_gib": 1e9}, " GiB free in ", "disk_full"),
    ],
)
def test_a_node_that_cannot_be_used_is_named_with_the_reason_before_anything_starts(
    server, tmp_path, changes, said, kind
):
    changes = {k: str(server.folder / "stranger") if v == "STRANGER" else v for k, v in changes.items()}
    done = bench(server.inventory(tmp_path, **changes), "--json", results=tmp_path / "results")
    assert done.returncode == 3
    assert "node001 (gpu-a): " in done.stderr and said in done.stderr
    error = json.loads(done.stdout)["error"]
    assert [(error["kind"], bad["kind"], bad["host"], bad["alias"]) for bad in error["nodes"]] == [
        (kind, kind, "gpu-a", "node001")
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_all_bad_nodes_are_named_at_once_and_good_ones_take_their_place(server, tmp_path):
    others = {
        "gpu-b": {"ansible_port": 1},
    }
    inventory = server.inventory(
        tmp_path,
        ansible_port=2,
        others={
            **others,
            "gpu-c": {"runner_python": "/nowhere/python", "ansible_port": server.port},
            "gpu-d": {"ansible_port": server.port},
        },
    )
    done = bench(inventory, "--nodes", "2", results=tmp_path / "results")
    assert (
        done.returncode == 3 and "node001" in done.stderr and "node002" in done.stderr and "node003" not in done.stderr
    )
    done = bench(inventory, "--nodes", "1", "--skip-bad-nodes", results=tmp_path / "results")
    assert done.returncode == 0, done.stderr
    for alias in ("node001", "node002", "node003"):
        assert f"skipped {alias}" in done.stderr
    plan = json.loads((tmp_path / "results" / "latest" / "plan.json").read_text())
    assert [n["name"] for n in plan["nodes"]] == ["gpu-d"]
    assert [(bad["alias"], bad["kind"]) for bad in plan["passed_over"]] == [
        ("node001", "unreachable"),
        ("node002", "unreachable"),
        ("node003", "environment_missing"),
    ]


def test_artefacts_that_cannot_be_fetched_stay_on_the_node_and_the_run_says_so(server, tmp_path):
    """An rsync that fails on the way back stands in for a full disk."""
    shim = tmp_path / "bin" / "rsync"
    shim.parent.mkdir()
    shim.write_text(
        "#!/bin/sh\n"
        'case "$*" in */nodes/*) echo "rsync: write failed: No space left on device" >&2; exit 11;; esac\n'
        f'exec {shutil.which("rsync")} "$@"\n'
    )
    shim.chmod(0o755)
    inventory, results = server.inventory(tmp_path), tmp_path / "results"
    env = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}"}
    command = [RUNNER, "bench", "-i", inventory, "--results", results, "--test", "torch", "--set", "torch.max_bytes=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "artefacts of node001 were not gathered, they stay there: this machine's disk is full" in done.stderr
    run = (results / "latest").resolve().name
    assert (tmp_path / "scratch" / run / "torch-1n-r1" / "facts.json").exists()


def test_a_terminal_that_is_closed_costs_nothing_but_the_progress(server, tmp_path):
    results = tmp_path / "results"
    command = [RUNNER, "bench", "-i", server.inventory(tmp_path), "--results", results, "--test", "torch"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as bench_:
        assert bench_.stderr and bench_.stderr.readline()
        bench_.stderr.close()  # what `2>&1 | head -1` does
        assert bench_.wait(120) == 0
    assert (results / "latest" / "report.html").exists()
    assert json.loads((results / "latest" / "status.json").read_text())["state"] == "complete"


def test_ctrl_c_while_data_is_sent_ends_the_sending(server, tmp_path):
    shim = tmp_path / "bin" / "rsync"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexec sleep 300\n")
    shim.chmod(0o755)
    env = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}"}
    command = [RUNNER, "bench", "-i", server.inventory(tmp_path), "--results", tmp_path / "results", "--test", "sft"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env) as bench_:
        for _ in range(200):
            status = tmp_path / "results" / "latest" / "status.json"
            if status.exists() and json.loads(status.read_text())["state"] == "running":  # the data is prepared
                break
            time.sleep(0.1)
        time.sleep(0.5)
        bench_.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert bench_.wait(60) == 130
        assert time.monotonic() - started < 20
