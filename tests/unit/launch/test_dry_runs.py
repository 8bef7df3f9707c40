"""What a dry run shows of tests nccl and gpu, and under Slurm what the nodes' agents then start."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from plans import request

from golden_files import check as golden
from runner.launch.slurm import allocations
from runner.node import slurm_step
from runner.node.requests import StepRequest
from runner.plan import build, config, describe
from runner.system import nodeset

NCCL = {"collectives": ["all_reduce", "send_recv"], "splits": ["none", "node"]}
GIVEN = {"nccl": NCCL, "gpu": {}}


@pytest.fixture
def plan(cluster, machine):
    """The plan of a test by a backend, on nodes that Slurm chooses unless they are `named`."""

    def of(name: str, backend: str, count: int, **changes):
        source = machine if backend == "local" else cluster
        nodes = tuple(replace(node, backend=backend, nccl_root="/opt/nccl") for node in source.nodes)
        tests = {name: config.load_test(name, GIVEN[name]).model_dump()}
        asked = request(source, backend=backend, tests=tests, node_counts=(count,), model="llama-2-7b", slurm={})
        return build.build(replace(asked, **changes), nodes)

    return of


@pytest.mark.parametrize(("backend", "count"), [("local", 1), ("ssh", 1), ("ssh", 8)])
def test_nccl_tests_are_started_by_mpirun_on_the_node_or_on_the_controller(plan, backend, count):
    text = describe.describe(plan("nccl", backend, count), nodeset.fold)
    golden(f"dry-run/nccl-{backend}-{count}.txt", text + "\n")
    assert ("controller runs" in text) == (count > 1)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize(
    ("way", "count", "changes"),
    [
        ("slurm-1", 1, {}),
        ("slurm-2", 2, {}),
        ("slurm-2-placed-by-slurm", 2, {"named": False}),
        ("slurm-2-one-allocation", 2, {"one_allocation": True, "repeats": 2}),
    ],
)
def test_what_is_submitted_to_slurm_and_what_its_agents_start(plan, name, way, count, changes):
    built = plan(name, "slurm", count, **changes)
    files = allocations.preview(built, built.cells)
    shown = "\n".join([describe.describe(built, nodeset.fold), "", *files])
    steps = [StepRequest.from_json(json.loads(found[2])) for found in HEREDOC.finditer(shown)]
    started = "\n".join(line for step in steps for line in commands(step, count))
    golden(
        f"dry-run/{name}-{way}.txt",
        HEREDOC.sub(r"\1...\3", shown) + f"\non the nodes:\n{started}\n".replace(sys.executable, "PYTHON"),
    )
    assert len(files) == (1 if "one_allocation" in changes else len(built.cells))
    assert [step.job["params"] for step in steps] == [json.loads(json.dumps(cell.params)) for cell in built.cells]


HEREDOC = re.compile(r"(<<'REQUEST'\n)(.*?)(\nREQUEST\n)", re.DOTALL)


def commands(step: StepRequest, count: int) -> Iterator[str]:
    """What the agent of each node of Slurm's allocation starts."""
    names = [f"node{number:03d}" for number in range(1, count + 1)]
    for name in names:
        placed = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": ",".join(names), "SLURMD_NODENAME": name}
        request, _ = slurm_step.placed(step, placed, lambda: None, lambda: ("none", "pmix"))
        yield f"{step.cell} on {name}: {shlex.join(request.argv) if request.argv else '(by the first agent)'}"
