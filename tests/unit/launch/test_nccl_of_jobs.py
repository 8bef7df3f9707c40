"""The NCCL of the ranks under Slurm, where no controller sees the nodes: what a job says, and what its agents make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plans import request

from runner.cluster import nccl
from runner.launch import preflight
from runner.launch.slurm import allocations
from runner.node import slurm_step
from runner.node.requests import StepRequest
from runner.plan import build

HERE = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURMD_NODENAME": "a2"}
PRELOADED = {"LD_PRELOAD": "/opt/nccl/current/lib/libnccl.so.2", "PYTHONPATH": "/opt/nccl/python"}
GOOD = nccl.Built("/opt/nccl", "2.30.7")
TOO_OLD = nccl.Built("/opt/nccl", "2.26.2", "it is too old")


@pytest.fixture
def step(cluster):
    """The request of a step of a plan with this choice, as it is in the sbatch file."""

    def of(choice: str | None, root: str | None = None) -> StepRequest:
        nodes = tuple(replace(node, backend="slurm") for node in cluster.nodes[:2])
        asked = request(cluster, backend="slurm", node_counts=(2,), slurm={}, named=False, nccl=choice, nccl_root=root)
        plan = build.build(asked, nodes)
        checks = preflight.checks(nodes[0], "cuda", "torchrun", ("sft",), root)
        job = allocations.prepare(plan, "name", plan.cells, None, True, ("a1", "a2"), checks, {})
        return StepRequest.from_json(job.steps[0].request)

    return of


def placed_env(step: StepRequest, built: nccl.Built | None) -> dict[str, str]:
    return dict(slurm_step.placed(step, HERE, lambda: built)[0].env)


@pytest.mark.parametrize("built", [None, GOOD])
def test_what_was_asked_for_is_the_environment_of_every_rank_and_checked_on_every_node(step, built):
    asked = step("built", "/opt/nccl")
    assert PRELOADED.items() <= placed_env(asked, built).items()
    assert asked.check and asked.check.nccl_root == "/opt/nccl"


@pytest.mark.parametrize(("built", "used"), [(GOOD, True), (TOO_OLD, False), (None, False)])
def test_without_a_choice_each_node_uses_what_was_built_on_it(step, built, used):
    asked = step(None)
    assert (PRELOADED.items() <= placed_env(asked, built).items()) == used
    assert ("LD_PRELOAD" in placed_env(asked, built)) == used
    assert asked.check and asked.check.nccl_root is None


def test_torchs_own_is_kept_where_it_was_asked_for(step):
    assert "LD_PRELOAD" not in placed_env(step("torch"), GOOD)


def test_ranks_keep_their_compiled_kernels_where_every_backend_does(step):
    job = slurm_step.placed(step(None), HERE, lambda: GOOD)[0].job
    assert job["env"]["TRITON_CACHE_DIR"] == "/var/tmp/shakedown/kernels/triton"
    assert PRELOADED.items() <= job["env"].items()
