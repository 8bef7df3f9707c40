"""A workflow planned: its chain, its folders, its dry run; and what becomes of a run that goes on."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from golden_files import check as golden
from runner.cluster import profiles
from runner.errors import UsageError
from runner.launch.carry import RunResult
from runner.launch.prepare import Options as RunOptions
from runner.plan.engines import ray
from runner.report.progress import Display
from runner.results.rundir import RunDir
from runner.system import manifest
from runner.system.process import cell_marker
from runner.workflow import prepare, preview, publish, start
from runner.workflow.asked import Options
from runner.workflow.prepare import Files
from runner.workflow.record import Stages
from runner.workflow.stages import Action

RUN_ID = "20260102-030405-abcd"
FOUND = prepare.Prepared(
    model=Path("/d/tiny"),
    data={"sft-data": Files(Path("/d/sft.parquet")), "rl-data": Files(Path("/d/rl.parquet"))},
    checksums={"environment": "e", "model": "m", "sft-data": "s", "rl-data": "r"},
    question="What is 2 + 3?",
    parameters=100_000,
)
DONE = publish.Published("/models", 1, "d")
NAMES = ["sft", "merge-sft", "ppo", "merge-ppo"]


@pytest.fixture
def found(monkeypatch):
    """What is found for a workflow, in place of looking for it: set `checksums` of it to change that."""
    has = {"found": FOUND}
    for name in ("preview", "prepare"):
        monkeypatch.setattr(prepare, name, lambda asked, on_progress=None: has["found"])
    monkeypatch.setattr(start, "new_id", lambda: RUN_ID)
    monkeypatch.setattr(publish, "check", lambda target: None)
    return has


def options(results="/r", workflow="sft-ppo", **changes):
    of_run = {key: changes.pop(key) for key in ("node_counts", "one_allocation", "backend") if key in changes}
    return Options(workflow, RunOptions(results=Path(results), command="runner workflow", **of_run), **changes)


@pytest.fixture
def on_cpus(cluster):
    """Eight nodes with two CPU ranks each, over ssh."""
    nodes = tuple(
        replace(node, gpus=2, device="cpu", hardware="cpu", python="/opt/shakedown/env/bin/python",
                pythons={"cpu-smoke": "/opt/shakedown/env-cpu-smoke/bin/python"})
        for node in cluster.nodes
    )  # fmt: skip
    return replace(cluster, nodes=nodes)


def over(source, backend):
    return replace(source, nodes=tuple(replace(node, backend=backend) for node in source.nodes))


# --- the chain -------------------------------------------------------------------------------------------


def test_each_stage_on_nodes_is_a_cell_after_the_one_before(found, machine):
    plan = start.planned(options(), lambda source: machine).run.plan
    assert [(cell.id, cell.after) for cell in plan.cells] == list(zip(NAMES, [None, *NAMES], strict=False))
    assert {cell.profile for cell in plan.cells} == {"cpu-smoke"}


def test_a_stage_takes_what_the_one_before_it_leaves(found, machine):
    cells = {cell.id: cell for cell in start.planned(options(), lambda source: machine).run.plan.cells}
    assert cells["merge-sft"].params["checkpoint"] == cells["sft"].params["checkpoint"]
    assert f"trainer.default_local_dir={cells['sft'].params['checkpoint']}" in cells["sft"].params["words"]
    assert f"actor_rollout_ref.model.path={cells['merge-sft'].params['target']}" in cells["ppo"].params["words"]
    assert f"critic.model.path={cells['merge-sft'].params['target']}" in cells["ppo"].params["words"]
    assert all(cell.params["checkpoint"].startswith(f"/r/{RUN_ID}/checkpoints/") for cell in cells.values())


def test_paths_follow_the_name_that_the_run_is_given_in_the_end(found, machine):
    made = start.planned(options(), lambda source: machine)
    renamed = made.run.located(replace(made.run.request, run_id="other"))
    assert "/r/other/checkpoints/" in renamed.chain[0].params["checkpoint"] and RUN_ID not in str(renamed.chain)
    assert [link.inputs for link in renamed.chain] == [link.inputs for link in made.run.request.chain]


def test_a_folder_is_of_what_is_made_in_it(found, machine):
    def folders(**changes):
        cells = start.planned(options(**changes), lambda source: machine).run.plan.cells
        return {cell.id: Path(cell.params["checkpoint"]).name for cell in cells if "words" in cell.params}

    first, other = folders(), folders(settings=("verl.rl.algorithm.gamma=0.9",))
    assert first["sft"] == other["sft"] and first["ppo"] != other["ppo"]


@pytest.mark.parametrize("key", ["trainer.save_freq", "trainer.max_actor_ckpt_to_keep"])
def test_what_is_kept_on_the_way_is_no_input(found, machine, key):
    before, after = (
        start.planned(options(settings=given), lambda source: machine) for given in ((), (f"verl.{key}=7",))
    )
    assert before.inputs == after.inputs
    assert f"{key}=7" in after.run.plan.cells[2].params["words"]


def test_without_a_target_nothing_is_published(found, machine):
    assert "publish" not in [step.stage.name for step in start.planned(options(), lambda source: machine).steps]
    made = start.planned(options(publish="dir:/p"), lambda source: machine)
    assert made.steps[-1].stage.name == "publish"
    with pytest.raises(UsageError, match="--stages publish: say where to with --publish"):
        start.planned(options(stages=("publish",)), lambda source: machine)


@pytest.mark.parametrize("workflow", ["sft", "ppo", "grpo"])
def test_a_trainer_alone_begins_with_the_model_that_is_given(found, machine, workflow):
    first = start.planned(options(workflow=workflow), lambda source: machine).run.plan.cells[0]
    key = "model.path" if workflow == "sft" else "actor_rollout_ref.model.path"
    assert f"{key}=/d/tiny" in first.params["words"]


def test_a_reward_is_told_to_ppo_alone_and_is_an_input(found, machine):
    before = start.planned(options(), lambda source: machine)
    found["found"] = replace(FOUND, reward=Path("/d/reward.py"), reward_sha256="abc")
    after = start.planned(options(reward="reward.py"), lambda source: machine)
    words = {cell.id: cell.params.get("words", ()) for cell in after.run.plan.cells}
    assert "reward.custom_reward_function.path=/d/reward.py" in words["ppo"]
    assert not any("reward" in word for word in words["sft"])
    assert [name for name in before.inputs if before.inputs[name] != after.inputs[name]] == [
        "ppo",
        "merge-ppo",
        "publish",
    ]


def test_the_time_limit_of_a_stage_is_its_own(found, machine):
    cells = start.planned(options(settings=("ppo.timeout_s=60",)), lambda source: machine).run.plan.cells
    assert [cell.params["timeout_s"] for cell in cells] == [86400.0, 86400.0, 60.0, 86400.0]


# --- the dry run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend", "changes"),
    [
        ("ssh", "ssh", {"node_counts": (2,)}),
        ("slurm", "slurm", {"node_counts": (2,)}),
        ("slurm-one", "slurm", {"node_counts": (2,), "one_allocation": True, "workflow": "grpo", "publish": "dir:/p"}),
    ],
)
def test_a_dry_run_shows_what_ranks_get(found, on_cpus, name, backend, changes):
    made = start.planned(options(**changes), lambda source: over(on_cpus, backend))
    shown = preview.text(made)
    golden(f"workflow/command-{name}.txt", shown + "\n")
    for cell in made.run.plan.cells:
        assert all(shlex.quote(word) in shown for word in cell.params.get("words", ()))
    assert "ray start" in shown and "main_ppo" in shown
    assert "--num-cpus=CORES" in shown and f"--object-store-memory={200 << 20}" in shown, "what a supervisor starts"
    ports = ray.in_order(cell_marker(made.run.plan.run_id, "ppo"), preview.EPHEMERAL)[0]
    assert backend == "slurm" or f"--port={ports['gcs']} " in shown, "those that it tries first"
    assert ("#SBATCH" in shown) == (backend == "slurm")
    assert json.loads(json.dumps(preview.as_dict(made)))["stages"][1]["commands"]


# --- a run that goes on ----------------------------------------------------------------------------------


@pytest.fixture
def run(found, machine, tmp_path):
    """A run of a workflow whose stages are complete, with what they left."""
    made = start.planned(options(tmp_path), lambda source: machine)
    folder = RunDir.create(tmp_path, made.run.plan.to_dict())
    status = folder.read_status()
    for cell in made.run.plan.cells:
        status["cells"][cell.id].update(state="complete", inputs=dict(cell.inputs))
        where = Path(cell.params.get("target") or cell.params["checkpoint"])
        where.mkdir(parents=True, exist_ok=True)
        if "target" in cell.params:
            (where / "model.safetensors").write_text("x")
            manifest.write(where)
        else:
            (where / "latest_checkpointed_iteration.txt").write_text("2")
    folder.write_status(status)
    with Stages(folder).running("prepare", made.inputs["prepare"]):
        pass
    return folder


def left(run, machine, **changes):
    """(what becomes of each stage, the planned workflow) of a run that goes on."""
    made = start.planned(options(run.path.parent, **changes), lambda source: machine, run=run)
    return {step.stage.name: step.action.value for step in made.steps}, made


def test_what_stands_is_kept(run, machine):
    assert set(left(run, machine)[0].values()) == {"keep"}


def test_other_data_for_ppo_keep_what_was_fine_tuned(run, machine, found):
    found["found"] = replace(FOUND, checksums={**FOUND.checksums, "rl-data": "other"})
    becomes, made = left(run, machine)
    assert becomes == {"prepare": "run", "sft": "keep", "merge-sft": "keep", "ppo": "run", "merge-ppo": "run"}
    before = start.Plan.from_dict(run.read_plan())
    plan, status = start.replanned(made, before, run.read_status())
    assert plan.cells[:2] == before.cells[:2] and plan.cells[2].params != before.cells[2].params
    assert [status["cells"][name]["state"] for name in NAMES] == ["complete", "complete", "incomplete", "incomplete"]
    assert status["cells"]["ppo"]["error"]["message"] == "changed since: rl-data"


def test_a_model_that_is_gone_is_merged_again(run, machine):
    plan = start.Plan.from_dict(run.read_plan())
    (Path(plan.cells[3].params["target"]) / "model.safetensors").unlink()
    assert left(run, machine)[0]["merge-ppo"] == "run"
    assert left(run, machine)[0]["ppo"] == "keep"


def test_an_interrupted_ppo_continues_from_its_checkpoint(run, machine):
    status = run.read_status()
    status["cells"]["ppo"]["state"] = "cancelled"
    status["cells"]["merge-ppo"]["state"] = "planned"
    run.write_status(status)
    becomes, made = left(run, machine)
    assert becomes["ppo"] == "continue" and becomes["merge-ppo"] == "run"
    assert made.steps[3].checkpoint == "global_step_2"


def test_a_stage_that_goes_on_does_so_where_it_was_and_one_made_from_something_else_gives_up_its_job(
    run, machine, found
):
    """Its job may run without a controller: it is known by its attempt and its nodes."""
    plan, status = start.Plan.from_dict(run.read_plan()), run.read_status()
    cells = [replace(cell, attempt=3, master_port=23456) if cell.id == "ppo" else cell for cell in plan.cells]
    run.write_plan(replace(plan, cells=tuple(cells)).to_dict())
    for name in ("ppo", "merge-ppo"):
        status["cells"][name].update(state="incomplete", started="2026-01-01T00:00:00Z", attempt=3)
    run.write_status({**status, "allocation": {"ppo": ["7", None, "j"], "merge-ppo": ["8", None, "k"]}})

    def ppo_and_its_merge(**changes):
        _, made = left(run, machine, **changes)
        plan, status = start.replanned(made, start.Plan.from_dict(run.read_plan()), run.read_status())
        kinds = [(status["cells"][name]["error"] or {}).get("kind") for name in ("ppo", "merge-ppo")]
        return plan.cells[2], kinds

    cell, kinds = ppo_and_its_merge()
    assert (cell.attempt, cell.master_port, cell.hosts) == (3, 23456, cells[2].hosts) and kinds == [None, None]
    cell, kinds = ppo_and_its_merge(settings=("verl.rl.algorithm.gamma=0.9",))
    assert cell.attempt == 3 and kinds == ["plan_changed", "plan_changed"]


def test_a_stage_alone_takes_what_the_run_has_and_no_other_runs(run, machine):
    status = run.read_status()
    for name in ("ppo", "merge-ppo"):
        status["cells"][name]["state"] = "failed"
    run.write_status(status)
    becomes, made = left(run, machine, stages=("ppo",))
    assert becomes == {"prepare": "keep", "ppo": "continue"}
    plan, status = start.replanned(made, start.Plan.from_dict(run.read_plan()), run.read_status())
    assert [cell.id for cell in plan.cells] == ["sft", "merge-sft", "ppo"] == list(status["cells"])
    assert plan.cells[2].after == "merge-sft"


def test_a_stage_alone_is_refused_where_what_it_needs_would_be_another_than_the_run_has(run, machine):
    """Its folder would be one that is not there: found on the nodes, after the job has waited."""
    changed = {"settings": ("verl.sft.optim.lr=0.5",)}
    with pytest.raises(UsageError) as caught:
        left(run, machine, stages=("ppo", "merge-ppo"), **changed)
    assert str(caught.value) == (
        "stage ppo needs sft-model, which the run has of other inputs (stage merge-sft, changed since: "
        "sft-checkpoint): run sft, merge-sft again as well, or leave out what changes them"
    )
    becomes, made = left(run, machine, stages=("sft", "merge-sft", "ppo"), **changed)
    assert becomes["ppo"] == "run"
    becomes, made = left(run, machine, stages=("ppo", "merge-ppo"))
    assert (
        f"actor_rollout_ref.model.path={made.run.plan.cells[1].params['target']}"
        in made.run.plan.cells[2].params["words"]
    )


def test_a_finished_run_is_published_after_the_environment_has_changed(run, machine, found, monkeypatch):
    """A newer lock makes nothing of what the run has wrong."""
    asked = options(run.path.parent, stages=("sft", "merge", "ppo"))
    Stages(run).ask("sft-ppo", start.to_json(asked))
    found["found"] = replace(FOUND, checksums={**FOUND.checksums, "environment": "another"})
    published = replace(asked, stages=("publish",), publish="dir:/models")
    made = start.planned(published, lambda source: machine, run=run)
    assert [(step.stage.name, step.action) for step in made.steps][1:] == [("publish", Action.RUN)]
    took = []
    monkeypatch.setattr(publish, "publish", lambda folder, target, progress: took.append(folder) or DONE)
    start._published(made, RunResult(run, {"cells": [{"state": "complete"}]}), Display())
    assert [manifest.complete(folder) is not None for folder in took] == [True]
    with pytest.raises(UsageError, match="which the run has of other inputs"):
        start.planned(replace(published, steps=7), lambda source: machine, run=run)


@pytest.mark.parametrize("option", ["results", "work"])
def test_a_folder_of_a_run_that_is_a_file_is_refused_before_anything_is_planned(found, machine, tmp_path, option):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        places = {"results": tmp_path, option: str(path)}
        with pytest.raises(UsageError, match=rf"--{option} {path}: {tmp_path}/file is a file: give a folder"):
            start.planned(options(**places), lambda source: machine)


def test_stages_that_a_run_did_not_have_are_added(found, machine, tmp_path):
    made = start.planned(options(tmp_path, stages=("sft",)), lambda source: machine)
    folder = RunDir.create(tmp_path, made.run.plan.to_dict())
    assert [cell.id for cell in made.run.plan.cells] == ["sft"]
    becomes, again = left(folder, machine)
    assert list(becomes) == ["prepare", *NAMES] and becomes["ppo"] == "run"
    plan, status = start.replanned(again, start.Plan.from_dict(folder.read_plan()), folder.read_status())
    assert [cell.id for cell in plan.cells] == NAMES == list(status["cells"])


def test_a_run_that_was_moved_finds_what_it_has_left(run, machine, tmp_path):
    moved = tmp_path / "elsewhere" / run.path.name
    moved.parent.mkdir()
    run.path.rename(moved)
    assert set(left(RunDir(moved), machine)[0].values()) == {"keep"}


# --- status.json -----------------------------------------------------------------------------------------


def test_status_says_what_was_asked_for_and_it_is_read_back(run):
    asked = options("/r", settings=("verl.optim.lr=1",), node_counts=(2,), stages=("sft",), reward="r.py")
    Stages(run).ask("sft-ppo", start.to_json(asked))
    name, values = Stages(run).asked()
    assert name == "sft-ppo" and start.from_json({**values, "later": 1}) == asked
    for damaged in ({}, {"run": None}, {**values, "run": {}}):
        with pytest.raises(UsageError, match=r"status\.json does not have what the workflow was asked for"):
            start.from_json(damaged)


def test_a_stage_that_fails_says_why_and_one_that_is_stopped_is_cancelled(run):
    with pytest.raises(UsageError), Stages(run).running("publish", {"model": "m"}):
        raise UsageError("no such folder", "not_permitted")
    entry = Stages(run).entries()["publish"]
    assert (entry["state"], entry["error"]) == ("failed", {"kind": "not_permitted", "message": "no such folder"})
    with pytest.raises(KeyboardInterrupt), Stages(run).running("publish", {}):
        raise KeyboardInterrupt
    assert Stages(run).entries()["publish"]["state"] == "cancelled"
    with Stages(run).running("publish", {"model": "m"}) as filled:
        filled["where"] = "/p"
    entry = Stages(run).entries()["publish"]
    assert (entry["state"], entry["error"], entry["left"]) == ("complete", None, {"where": "/p"})


def test_the_profiles_that_are_offered_are_those_with_a_lock():
    from runner.cli.workflow import PROFILES
    from runner.workflow import verl

    assert set(PROFILES) == set(verl.PROFILES) == set(profiles.LOCKS)
    assert {action.value for action in Action} == {"keep", "continue", "run"}
