"""Engine `accelerate` under Slurm: each node's agent knows its own rank, the batch file knows none."""

from __future__ import annotations

from dataclasses import replace

from plans import request

from runner.launch import preflight
from runner.launch.slurm import allocations
from runner.launch.slurm.script import render
from runner.node import slurm_step
from runner.node.requests import StepRequest
from runner.plan import build, config

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]"}


def test_the_rank_of_a_node_is_its_agents_and_never_in_the_batch_file(cluster):
    nodes = tuple(replace(node, backend="slurm") for node in cluster.nodes[:2])
    tests = {"torch": config.load_test("torch", {}).model_dump()}
    asked = request(cluster, backend="slurm", engine="accelerate", tests=tests, node_counts=(2,), slurm={})
    plan = build.build(asked, nodes)
    checks = preflight.checks(nodes[0], "cuda", "accelerate", ("torch",))
    job = allocations.prepare(plan, "job", plan.cells[:1], None, True, [node.alias for node in nodes], checks, {})
    script = render(job, allocations.slurm_settings.Settings())
    assert "machine-rank" not in script and "SLURM_PROCID" not in script and "SLURM_NODEID" not in script
    step = StepRequest.from_json(job.steps[0].request)
    for index, name in enumerate(("node001", "node002")):
        placed, _ = slurm_step.placed(step, {**STEP, "SLURMD_NODENAME": name}, lambda: None, lambda: ())
        argv = placed.argv or ()
        assert argv[1:3] == ("-m", "runner.node.accelerate")
        assert {f"--machine-rank={index}", "--machines=2", "--gpus=8"} <= {*argv}
