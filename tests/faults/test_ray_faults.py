"""Faults of Ray over real nodes, with the real Ray and verl: exit code, node, kind, and that nothing is left.

A stage's ranks need not train: each fault is planted as soon as Ray has taken the job. On every node a user's other
process has the name of one of Ray's; it must live on.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import verl_environment
from faults.conftest import SLURM, assert_no_orphan, assert_nothing_half_written, assert_nothing_left, error_of, slurm
from runner.errors import EXIT_INFRASTRUCTURE, EXIT_INTERRUPTED
from runner.plan.engines import ray
from runner.provision.testbed import containers as provision_testbed
from runner.provision.testbed import layout
from testbed.benches import RUNNER, Bench, inside, until
from testbed.conftest import Testbed

pytestmark = [pytest.mark.testbed, pytest.mark.slow]

STAGE = "ppo"
OTHERS = "exec -a raylet sleep 3600"


class Workflow(Bench):
    """`runner workflow ppo` on two nodes."""

    program = (RUNNER, "workflow", STAGE)

    def said(self) -> str:
        """benchmark.log so far."""
        log = self.results / "latest" / "benchmark.log"
        return log.read_text() if log.exists() else ""

    def until_submitted(self) -> None:
        """Until Ray has all nodes and the job."""
        until(lambda: " submitted" in self.said() or self.process.poll() is not None, 400)
        assert self.process.poll() is None, self.end()[1]
        assert " submitted" in self.said(), self.said()


@pytest.fixture(scope="module")
def environment() -> None:
    """The profile with Ray, which nodes see at the controller's path."""
    try:
        verl_environment.python()
    except LookupError as error:
        pytest.skip(f"no profile with Ray: {error}")


@pytest.fixture(scope="module")
def bed(environment: None, containers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Two nodes and a folder that they share."""
    name, folder = "pytest-ray", tmp_path_factory.mktemp("ray")
    (folder / "share").mkdir()
    try:
        wanted = layout.Options(nodes=2, name=name, inventory=folder / "inventory", share=folder / "share")
        state = provision_testbed.up(wanted)
        for node in state["nodes"]:
            inside(node["container"], f"nohup bash -c {OTHERS!r} >/dev/null 2>&1 &")
        yield Testbed(name, Path(state["folder"]), state["nodes"], folder / "share")
    finally:
        provision_testbed.down(name)


def workflow(bed: Testbed, results: Path, *more: str) -> Workflow:
    return Workflow(bed.inventory, results, "--nodes", "2", "--steps", "1", *more)


def assert_gone(bed: Testbed, run: Workflow) -> None:
    """Neither a process of the stage nor Ray's folder on any node; what others have there is as it was."""
    assert_no_orphan(run.marker)
    for node in bed.nodes:
        assert until(lambda node=node: ray.folder(run.marker) not in inside(node["container"], "ls -d /tmp/*"), 20)
        assert "raylet 3600" in inside(node["container"], "ps -eo args=")
    assert_nothing_half_written(run.run)


def kill_ray(container: str, program: str) -> None:
    """Kill one of Ray's processes on a node, as the kernel does that has no memory."""
    inside(container, f"pkill -KILL -f '/core/src/ray/{program}'")


@pytest.mark.parametrize(("index", "program"), [(0, "gcs/gcs_server"), (1, "raylet/raylet")])
def test_a_ray_that_dies_is_named_by_its_node(bed, tmp_path, index, program):
    run = workflow(bed, bed.share / tmp_path.name)
    run.until_submitted()
    kill_ray(bed.nodes[index]["container"], program)
    code, output = run.end()
    error = error_of(run.run, STAGE)
    assert code == EXIT_INFRASTRUCTURE, output
    assert (error["kind"], error["host"]) == ("ray_died", bed.nodes[index]["name"]), error
    assert "Ray has ended with status" in output
    assert_gone(bed, run)


def test_a_node_that_never_joins_is_named_with_the_deadline(bed, tmp_path):
    head, late = (node["container"] for node in bed.nodes)
    address = inside(head, "hostname -I").split()[0]
    inside(late, f"ip route add unreachable {address}/32")
    try:
        run = workflow(bed, bed.share / tmp_path.name, "--set", f"{STAGE}.join_s=60")
        code, output = run.end()
    finally:
        inside(late, f"ip route del unreachable {address}/32")
    error = error_of(run.run, STAGE)
    assert code == EXIT_INFRASTRUCTURE, output
    assert (error["kind"], error["host"]) == ("never_joined", bed.nodes[1]["name"]), error
    assert re.search(r"has not reached Ray's head at \S+ within 60 s: ", error["message"])
    assert_gone(bed, run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_controller_that_is_stopped_or_killed_leaves_no_ray(bed, tmp_path, number):
    run = workflow(bed, bed.share / tmp_path.name)
    run.until_submitted()
    os.kill(run.process.pid, number)
    code, output = run.end()
    assert code == (EXIT_INTERRUPTED if number == signal.SIGINT else -number), output
    assert_gone(bed, run)


def test_a_job_that_is_cancelled_leaves_no_ray(environment, slurm3, tmp_path):
    run = workflow(slurm3, slurm3.share / tmp_path.name, *SLURM)
    run.until_submitted()
    slurm(slurm3, "scancel", run.run.read_status()["cells"][STAGE]["job"]["id"])
    code, output = run.end()
    assert code == EXIT_INTERRUPTED, output  # as by Ctrl-C
    error = run.run.read_status()["cells"][STAGE]["error"]
    assert (error["kind"], error["host"]) == ("job_cancelled", None), error
    assert_nothing_left(slurm3, run.run)
    for node in slurm3.nodes:
        assert ray.folder(run.marker) not in inside(node["container"], "ls -d /tmp/*")
