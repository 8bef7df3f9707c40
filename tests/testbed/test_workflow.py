"""Fine-tuning and then PPO on two nodes, as jobs of a real Slurm with the real Ray and verl: one command, nothing left."""

from __future__ import annotations

import json
import re

import pytest

from runner.system import manifest
from testbed.benches import RUNNER, Bench, inside

pytestmark = pytest.mark.testbed

STAGES = ["sft", "merge-sft", "ppo", "merge-ppo"]
BECAME = re.compile(r"^([a-z-]+): (keep|run|continue) \(", re.MULTILINE)


class Workflow(Bench):
    """One `runner workflow sft-ppo`."""

    program = (RUNNER, "workflow", "sft-ppo")


@pytest.mark.timeout(1500)  # the profile may have to be made first
def test_the_whole_chain_runs_as_jobs_and_is_kept_when_it_is_asked_for_again(slurm3, tmp_path, record_property):
    results, published = slurm3.share / "workflow", tmp_path / "published"
    asked = ("--backend", "slurm", "--nodes", "2", "--publish", f"dir:{published}")
    code, output = Workflow(slurm3.inventory, results, *asked).end(900)
    assert code == 0, output

    run = Workflow.begun[-1].run
    status = run.read_status()
    assert {name: entry["state"] for name, entry in status["cells"].items()} == dict.fromkeys(STAGES, "complete")
    assert {name: entry["state"] for name, entry in status["stages"].items()} == {
        "prepare": "complete", "publish": "complete",
    }  # fmt: skip
    jobs = [entry["job"]["id"] for entry in status["cells"].values()]
    assert len(set(jobs)) == len(STAGES), "a job for each stage"
    record_property("seconds", {name: entry["phases"] for name, entry in status["cells"].items()})

    model = manifest.complete(published)
    assert model is not None and model.about["question"] and isinstance(model.about["answer"], str)
    of_ppo = [record for record in run.read_records() if record.cell == "ppo"]
    phases = {record.context.get("phase") for record in of_ppo if record.metric == "phase_s"}
    assert {"rollout", "reference", "value", "update_actor", "update_critic"} <= phases, phases
    assert {record.context.get("step") for record in of_ppo if record.metric == "step_time_s"} == {1, 2}

    for node in slurm3.nodes:
        # Written so that the shell which asks is not found itself.
        script = "pgrep -fa '[r]aylet|[g]cs_server|runner[.]node'; ls -d /tmp/shakedown-ray-*; true"
        left = inside(node["container"], script)
        assert not left.strip(), left
    assert not inside(slurm3.nodes[0]["container"], "squeue --noheader").strip()

    # Once more: nothing has changed, so nothing runs.
    code, output = Workflow(slurm3.inventory, results, "--resume", run.run_id).end(120)
    assert code == 0, output
    became = dict(BECAME.findall(output))
    assert became == dict.fromkeys(["prepare", *STAGES, "publish"], "keep"), output
    again = run.read_status()
    assert [again["cells"][name]["attempt"] for name in STAGES] == [1, 1, 1, 1]
    assert [again["cells"][name]["job"]["id"] for name in STAGES] == jobs

    # With other settings for PPO, what was fine-tuned remains valid.
    changed = ("--resume", run.run_id, "--set", "verl.rl.algorithm.gamma=0.9", "--dry-run", "--json")
    code, output = Workflow(slurm3.inventory, results, *changed).end(60)
    actions = {stage["name"]: stage["action"] for stage in json.loads(output)["stages"]}
    assert (code, actions) == (
        0,
        {
            **dict.fromkeys(["prepare", "sft", "merge-sft"], "keep"),
            **dict.fromkeys(["ppo", "merge-ppo", "publish"], "run"),
        },
    )
