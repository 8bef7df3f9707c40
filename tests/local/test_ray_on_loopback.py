"""The real Ray on addresses of loopback: what the stand-in for it claims, and another Ray of the same user beside it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cell import Cell

import verl_environment
from runner.plan.engines import ray

pytestmark = [pytest.mark.local, pytest.mark.slow]


@pytest.fixture(scope="module")
def python() -> str:
    """The Python of the environment with Ray."""
    try:
        return str(verl_environment.python())
    except (LookupError, OSError) as error:
        pytest.skip(f"no environment with Ray: {error}")


@pytest.fixture(scope="module")
def another(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray.Ports]:
    """A Ray that a user has on this machine, and its ports."""
    folder = tmp_path_factory.mktemp("another")
    ports = ray.in_order("another user's", range(32768, 61000))[0]
    argv = ray.head(python, "127.0.0.9", ports, ray.Grant(1, 0), f"another/{os.getpid()}", 100 << 20)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with open(folder / "output", "wb") as output:
        child = subprocess.Popen(argv, env=kept, stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while not answers(ports):
            assert child.poll() is None and time.monotonic() < until, (folder / "output").read_text()
            time.sleep(0.1)
        yield ports
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(60)
        subprocess.run(["rm", "-rf", ray.folder(f"another/{os.getpid()}")], check=True)


def answers(ports: ray.Ports) -> bool:
    """Whether that Ray's API answers."""
    connection = http.client.HTTPConnection("127.0.0.9", ports["dashboard"], timeout=5)
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture
def cell(tmp_path: Path, python: str, another: ray.Ports) -> Iterator[Cell]:
    """A cell of two nodes; nothing of it may be left, and the other Ray still answers."""
    made = Cell(tmp_path, python)
    yield made
    try:
        assert made.left_over() == []
        assert answers(another)
    finally:
        made.close()


def test_tasks_run_on_both_nodes_and_the_status_of_the_job_is_the_engines(cell):
    cell.params.update(nodes=True, fails=7)
    cell.start()
    assert cell.wait(180) == [7, 0], cell.said(0) + cell.said(1)
    assert cell.fault(0) is None, "the rank's own words tell why"
    events = [json.loads(line) for line in cell.cell(0).events(0).read_text().splitlines()]
    assert [event["value"] for event in events if event["event"] == "value"] == [2]
    assert next(event for event in events if event["event"] == "seen")["token"] is False
    head = json.loads(cell.cell(0).ray_head.read_text())
    assert (head["address"], head["ray"]) == ("127.0.0.2", "2.60.0")
    assert list(cell.cell(0).ray_logs.glob("raylet.out*")), "Ray's own logs are kept"


def test_a_raylet_that_is_killed_is_named_by_its_node(cell):
    cell.params["sleep_s"] = 600
    cell.start()
    cell.until(0, "submitted", 120)
    raylet = next(pid for pid in cell.processes("raylet/raylet ") if b"127.0.0.3" in command(pid))
    os.kill(raylet, signal.SIGKILL)
    assert cell.wait(60) == [1, 1]
    assert cell.fault(1)["kind"] == "ray_died", cell.said(1)
    assert cell.fault(0) == {"kind": "lost_peers", "message": "has lost n1", "host": None}


def command(pid: int) -> bytes:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()
