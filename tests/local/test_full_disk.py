"""A full disk, of the controller or of a node: one line, the right code, and nothing left running."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from runner.system import process

RUNNER = Path(sys.executable).with_name("runner")
pytestmark = pytest.mark.local


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip() or 'not root'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_the_controllers(small_disk, this_machine):
    command = [RUNNER, "bench", "-i", this_machine(), "--test", "torch", "--results", small_disk, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    *_, line, last = done.stderr.splitlines()
    assert line.endswith("is full: free some space and run again")
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["kind"], error["nodes"]) == (3, "controller_disk_full", [])
    run = next(p for p in small_disk.iterdir() if p.is_dir() and not p.is_symlink())
    assert last == f"to finish it: runner bench --resume {run.name} --results {small_disk}"
    assert process.marked(f"{run.name}/torch-1n-r1") == []


def test_the_controllers_when_nothing_can_be_created(small_disk, this_machine):
    with contextlib.suppress(OSError), open(small_disk / "other", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    command = [RUNNER, "bench", "-i", this_machine(), "--test", "torch", "--results", small_disk / "results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    line = done.stderr.splitlines()[-1]
    assert line.startswith("runner: no run directory was created: the disk of") and "is full" in line
    assert not (small_disk / "results").exists() or os.listdir(small_disk / "results") == []


def test_a_nodes(small_disk, tmp_path):
    """The rank fills it; the agent still tells what happened and ends the rank."""
    marker = f"run/{tmp_path.name}"
    fill = "import time\nwhile True: print('x' * 1000, flush=True)"
    request = {
        "kind": "cell",
        "run_id": "run-a",
        "cell": "c",
        "attempt": 1,
        "marker": marker,
        "host": "n1",
        "scratch": str(tmp_path / "scratch"),
        "cell_dir": str(small_disk / "cell"),
        "job": {},
        "argv": [sys.executable, "-c", fill],
        "env": {},
        "telemetry_interval_s": 0.2,
        "heartbeat_timeout_s": 60,
        "grace_s": 0.5,
    }
    agent = [sys.executable, "-P", "-u", "-m", "runner.node"]
    with subprocess.Popen(agent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ) as child:
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        outcome = next(m for m in map(json.loads, child.stdout) if m["message"] == "outcome")
    assert outcome["error"] == f"disk full: {small_disk}/cell"
    assert process.marked(marker) == []
