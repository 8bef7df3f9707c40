"""The supervisors of a cell of engine `ray`, with a stand-in for `ray start`: how it ends, and that nothing is left.

They run in a Python without any package, as that of a profile may be.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray_cell import Cell, stand_in

from runner.node import leftovers
from runner.plan.engines import ray

pytestmark = pytest.mark.local


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Cell]]:
    """Makes the test's cell; nothing of it may be left after the test, nor may another's Ray have been touched."""
    cells: list[Cell] = []
    python = stand_in(tmp_path)
    others = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "ray", "raylet", "gcs_server"])

    def make(**given: object) -> Cell:
        cells.append(Cell(tmp_path, python, **given))  # type: ignore[arg-type]
        return cells[-1]

    yield make
    try:
        for cell in cells:
            assert cell.left_over() == []
        assert others.poll() is None, "another's Ray was ended"
    finally:
        for cell in cells:
            cell.close()
        others.kill()
        others.wait()


def events(cell: Cell) -> list[dict]:
    return [json.loads(line) for line in cell.cell(0).events(0).read_text().splitlines()]


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_the_rank_is_a_job_of_a_ray_of_all_nodes_and_ends_as_that_does(made, nodes):
    cell = made(nodes=nodes)
    cell.start()
    assert cell.wait() == [0] * nodes
    seen = next(event for event in events(cell) if event["event"] == "seen")
    head = json.loads(cell.cell(0).ray_head.read_text())
    assert seen["greeting"] == "hello there" and seen["token"] is False, "the rank has the job's variables, no secret"
    assert seen["ray"] == f"{head['address']}:{head['gcs']}" and head["ray"] == "2.60.0"
    assert events(cell)[0]["world_size"] == 1 and events(cell)[-1]["event"] == "end"
    assert cell.cell(0).stream(0, "stdout").read_text() == "the rank's own words\n"
    assert f"{nodes} node" in cell.said(0) and "1 GPU each" in cell.said(0)
    assert (cell.cell(0).ray_logs / "gcs_server.out").read_text() == "the GCS's own log\n"
    assert not any(cell.fault(index) for index in range(nodes))
    assert cell.token not in "".join(
        path.read_text(errors="replace") for path in cell.folder.rglob("*") if path.is_file()
    )


def test_the_status_of_the_job_is_that_of_the_engine(made):
    cell = made(params={"fails": 7})
    cell.start()
    assert cell.wait() == [7, 0], "the other node has not failed"
    assert cell.fault(0) is None, "the rank's own words tell why"
    assert cell.cell(0).stream(0, "stderr").read_text() == "the rank's last words\n"


@pytest.mark.parametrize(("address", "host"), [("127.0.0.2", None), ("127.0.0.3", "n1"), ("192.0.2.1", None)])
def test_a_task_that_failed_on_another_node_is_that_nodes_failure(made, address, host):
    said = f"ray.exceptions.RayTaskError(ValueError): ray::WorkerDict.update() (pid=9, ip={address}, actor_id=cd)"
    cell = made(params={"fails": 3, "says": said})
    cell.start()
    assert cell.wait() == [3, 0]
    assert cell.fault(0) == ({"kind": None, "message": None, "host": host} if host else None)


def test_a_program_that_does_not_start_says_why_in_the_engines_output(made):
    cell = made(nodes=1)
    cell.start()
    cell.cell(0).job.write_text(cell.cell(0).job.read_text().replace('"ray_probe"', '"no such test"'))
    cell.until(0, "the job has ended with status 1")
    assert cell.wait() == [1]


def test_a_node_that_never_comes_is_named_with_the_deadline(made):
    cell = made(nodes=3, params={"join_s": 2.0})
    cell.start(0, 1)
    statuses = cell.wait()
    assert statuses == [1, 1]
    fault = cell.fault(0)
    assert (fault["kind"], fault["host"]) == ("never_joined", "n2")
    assert fault["message"] == "n2 (127.0.0.4) has not joined Ray within 2 s"
    assert cell.fault(1)["kind"] == "lost_peers", "which has done nothing wrong"


def test_a_node_that_does_not_reach_the_head_says_so_itself(made):
    cell = made(params={"join_s": 1.0})
    cell.start(1)
    assert cell.wait() == [1]
    fault = cell.fault(1)
    where = f"127.0.0.2:{cell.port}"
    assert (fault["kind"], fault["host"]) == ("never_joined", None)
    assert fault["message"] == f"has not reached Ray's head at {where} within 1 s: Connection refused"


def test_a_node_whose_ray_never_joins_says_so_itself(made):
    cell = made(params={"join_s": 3.0}, wrong={"127.0.0.3": {"never": True}})
    cell.start()
    assert cell.wait() == [1, 1]
    fault = cell.fault(1)
    assert fault["kind"] == "never_joined" and fault["message"].startswith("has not joined Ray within 3 s: ")


@pytest.mark.parametrize("index", [0, 1])
def test_a_ray_that_was_too_slow_for_its_own_patience_is_started_once_more(made, index):
    """That of the head perhaps after others have joined it, which then join the next one."""
    cell = made(wrong={f"127.0.0.{2 + index}": {"slow": True}})
    cell.start()
    assert cell.wait() == [0, 0]
    assert "timed out during startup" in cell.cell(index).ray_output.read_text()


def test_a_node_with_fewer_gpus_is_named_long_before_the_deadline(made):
    cell = made(gpus=2, wrong={"127.0.0.3": {"gpus": 1}})
    cell.start()
    assert cell.wait(30) == [1, 1]
    fault = cell.fault(0)
    assert (fault["kind"], fault["host"]) == ("gpus_missing", "n1")
    assert fault["message"] == "n1 has joined Ray with 1 GPU, 2 asked for"


def test_a_node_with_another_token_is_refused_at_once(made):
    cell = made()
    cell.start(0)
    cell.start(1, token="f" * 64)
    assert cell.children[1].wait(30) == 1
    fault = cell.fault(1)
    assert fault["kind"] == "ray_refused" and "another token than Ray's head at 127.0.0.2:" in fault["message"]
    cell.children[0].send_signal(signal.SIGTERM)
    assert cell.children[0].wait(30) == 128 + signal.SIGTERM


def test_an_api_that_refuses_the_token_is_not_ours(made):
    cell = made(nodes=1, wrong={"127.0.0.2": {"refuses": True}})
    cell.start()
    assert cell.wait() == [1]
    assert cell.fault(0)["kind"] == "ray_refused" and cell.fault(0)["message"].endswith("(HTTP 403)")


def test_without_a_token_no_ray_is_started(made):
    cell = made(nodes=1)
    cell.token = ""
    cell.start()
    assert cell.wait() == [1]
    assert cell.fault(0)["kind"] == "ray_refused" and not cell.cell(0).ray_output.exists()


SAID = [
    ("port_taken", "OSError: [Errno 98] error while attempting to bind on address: address already in use"),
    ("port_taken", "ValueError: Ray component worker_ports is trying to use a port number 30001 that is used by gcs."),
    ("port_taken", "AssertionError: Session name session_1 does not match persisted value b'session_2'."),
    ("ray_refused", "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing"),
    ("ray_died", "RuntimeError: something else"),
]


@pytest.mark.parametrize(("kind", "said"), SAID)
@pytest.mark.parametrize("index", [0, 1])
def test_a_ray_that_does_not_start_is_told_by_its_last_words(made, index, kind, said):
    cell = made(wrong={f"127.0.0.{2 + index}": {"says": said}}, params={"join_s": 15})
    cell.start()
    assert cell.wait() == [1, 1]
    assert cell.fault(index) == {"kind": kind, "message": f"Ray has ended with status 1: {said}", "host": None}
    # The head may have gone before the other has met it.
    assert cell.fault(1 - index)["kind"] in ("lost_peers", "never_joined")


@pytest.mark.parametrize("index", [0, 1])
def test_a_ray_that_dies_is_named_by_its_own_node(made, index):
    cell = made(params={"sleep_s": 60})
    cell.start()
    cell.until(0, "submitted")
    victim = next(pid for pid in cell.processes("time.sleep(600)") if address_of_parent(pid) == f"127.0.0.{2 + index}")
    os.kill(victim, signal.SIGKILL)
    assert cell.wait() == [1, 1]
    fault, other = cell.fault(index), cell.fault(1 - index)
    assert fault["kind"] == "ray_died" and "raylet [exit code=-9]" in fault["message"]
    assert other["kind"] == "lost_peers" and other["message"] == ("has lost n1" if index else "has lost Ray's head")


def address_of_parent(pid: int) -> str:
    """The address of the node whose `ray start` has started this process."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    words = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
    return next(word.partition("=")[2] for word in words if word.startswith("--node-ip-address="))


def test_a_job_that_fails_with_its_node_is_the_nodes_failure(made):
    """The rank notices first that a node is gone, and fails; the node tells a moment later."""
    cell = made(params={"sleep_s": 1, "fails": 1})
    cell.start()
    cell.until(0, "submitted")
    time.sleep(0.8)
    cell.children[1].kill()
    assert cell.children[0].wait(30) == 1
    assert cell.fault(0) == {"kind": "lost_peers", "message": "has lost n1", "host": None}
    leftovers.remove(cell.marker, 1)  # as the node's agent does


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("index", [0, 1])
def test_a_supervisor_that_is_told_to_end_leaves_nothing(made, index, number, deaf):
    cell = made(params={"sleep_s": 60}, wrong={f"127.0.0.{2 + index}": {"deaf": deaf}})
    cell.start()
    cell.until(0, "submitted")
    cell.children[index].send_signal(number)
    assert cell.children[index].wait(15) == 128 + number
    assert cell.children[1 - index].wait(15) == 1
    assert cell.fault(index) is None and cell.fault(1 - index)["kind"] == "lost_peers"


def test_a_supervisor_that_is_told_to_end_while_nodes_join_leaves_nothing(made):
    cell = made()
    cell.start(0)
    cell.until(0, "answers at")
    cell.children[0].send_signal(signal.SIGINT)
    assert cell.wait(15) == [130]


def test_ports_that_another_has_are_left_to_it(made):
    job = str(os.getpid())
    every = ray.in_order(job, range(32768, 61000))
    with socket.create_server(("127.0.0.2", every[0].workers[7])):
        cell = made(env={"SLURM_JOB_ID": job})
        cell.start()
        assert cell.wait() == [0, 0]
        head = json.loads(cell.cell(0).ray_head.read_text())
        taken = {ports.first + ray.SERVICES.index("gcs") for ports in every[:1]}
        assert head["gcs"] not in taken


def test_a_port_to_meet_on_that_another_has_taken_is_named(made):
    cell = made()
    with socket.create_server(("", cell.port)):
        cell.start(0)
        assert cell.wait() == [1]
    assert cell.fault(0) == {
        "kind": "port_taken",
        "message": f"port {cell.port}, on which the nodes meet: Address already in use",
        "host": None,
    }


def test_a_folder_of_somebody_else_is_refused(made):
    cell = made(nodes=1)
    folder = Path(ray.folder(cell.marker))
    folder.mkdir()
    folder.chmod(0o777)
    try:
        cell.start()
        assert cell.wait() == [1]
        assert cell.fault(0) == {
            "kind": "not_permitted",
            "message": f"{folder} is not a folder of this user alone: remove it",
            "host": None,
        }
    finally:
        folder.rmdir()


def test_what_a_killed_supervisor_left_is_removed_by_the_next(made):
    cell = made(nodes=1)
    folder = Path(ray.folder(cell.marker))
    folder.mkdir(mode=0o700)
    (folder / "session_latest").symlink_to("session_of_another")
    cell.start()
    assert cell.wait() == [0]


def test_the_token_is_its_users_alone(made):
    cell = made(nodes=1, params={"sleep_s": 60})
    cell.start()
    cell.until(0, "submitted")
    folder = Path(ray.folder(cell.marker))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    for pid in cell.processes():
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert cell.token.encode() not in words
        if "runner.node.ray" not in words.decode():
            assert cell.token.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    cell.children[0].send_signal(signal.SIGINT)
    assert cell.wait(15) == [130]
