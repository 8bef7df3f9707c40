"""The graph of stages: what is chosen, what is kept, what continues, and which job waits for which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UsageError
from runner.workflow.stages import (
    WORKFLOWS,
    Action,
    Former,
    Program,
    Where,
    chosen,
    inputs,
    stages_of,
    steps,
    submissions,
)

PREPARED = {"environment": "l1", "model": "m1", "sft-data": "d1", "rl-data": "d2"}
SETTINGS = {"sft": {"lr": 1e-5, "steps": 10}, "ppo": {"lr": 1e-6}}
NAMES = ["prepare", "sft", "merge-sft", "ppo", "merge-ppo", "publish"]


def recorded(now, **but):
    """A former run in which every stage is complete, but for these."""
    return {
        name: but.get(name.replace("-", "_"), Former("complete", made, artefact=True)) for name, made in now.items()
    }


def became(former, settings=SETTINGS, prepared=PREPARED, workflow="sft-ppo"):
    found = steps(stages_of(workflow), inputs(workflow, settings, prepared), former)
    return {step.stage.name: step.action.value for step in found}


# --- the graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_need_is_left_by_an_earlier_stage_and_nothing_is_left_for_nobody(workflow):
    left = set()
    for stage in stages_of(workflow):
        assert set(stage.needs) <= left, f"{stage.name} would start before what it needs is there"
        assert not set(stage.leaves) & left
        left.update(stage.leaves)
    assert left - {need for stage in stages_of(workflow) for need in stage.needs} == {"published"}
    assert len({stage.name for stage in stages_of(workflow)}) == len(stages_of(workflow))


def test_ppo_after_fine_tuning_begins_with_the_fine_tuned_model():
    by_name = {stage.name: stage for stage in stages_of("sft-ppo")}
    assert list(by_name) == NAMES
    assert "sft-model" in by_name["ppo"].needs
    assert "sft-model" not in {stage.name: stage for stage in stages_of("ppo")}["ppo"].needs


def test_an_unknown_workflow_or_stage_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="unknown workflow 'sft-pp'; did you mean 'sft-ppo'"):
        stages_of("sft-pp")
    with pytest.raises(UsageError, match="workflow sft-ppo: unknown stage 'mergesft'; did you mean 'merge-sft'"):
        chosen("sft-ppo", ["mergesft"])
    with pytest.raises(UsageError, match="workflow grpo: unknown stage 'ppo'"):
        chosen("grpo", ["ppo"])


# --- --stages --------------------------------------------------------------------------------------------


def test_without_names_all_stages_are_chosen():
    assert [stage.name for stage in chosen("sft-ppo", [])] == NAMES


def test_a_stage_alone_takes_its_input_from_the_run_that_is_resumed():
    assert [stage.name for stage in chosen("sft-ppo", ["ppo"], ["sft-model"])] == ["prepare", "ppo"]


def test_a_stage_whose_input_nothing_leaves_is_refused_with_what_to_add():
    with pytest.raises(UsageError) as refused:
        chosen("sft-ppo", ["ppo"])
    assert str(refused.value) == (
        "stage ppo needs sft-model, which stage merge-sft leaves: add it (--stages merge-sft,ppo), "
        "or go on with a run that has it (--resume RUN)"
    )


def test_a_program_names_all_its_stages_in_the_workflows_order():
    names = [stage.name for stage in chosen("sft-ppo", ["merge"], ["sft-checkpoint", "ppo-checkpoint"])]
    assert names == ["prepare", "merge-sft", "merge-ppo"]
    assert [stage.name for stage in chosen("sft-ppo", ["publish", "merge-ppo"], ["ppo-checkpoint"])][1:] == [
        "merge-ppo",
        "publish",
    ]


@given(names=st.lists(st.sampled_from([*NAMES, "merge"]), unique=True))
def test_what_is_chosen_can_run_in_its_order_or_is_refused(names):
    try:
        found = chosen("sft-ppo", names)
    except UsageError as error:
        assert "--resume RUN" in str(error)
        return
    left = set()
    for stage in found:
        assert set(stage.needs) <= left
        left.update(stage.leaves)


# --- inputs ----------------------------------------------------------------------------------------------


def test_a_setting_changes_its_stage_and_all_behind_it_and_nothing_before():
    now, later = (inputs("sft-ppo", settings, PREPARED) for settings in (SETTINGS, {**SETTINGS, "ppo": {"lr": 2e-6}}))
    assert [name for name in NAMES if now[name] != later[name]] == ["ppo", "merge-ppo", "publish"]


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("environment", NAMES),
        ("model", ["prepare", *NAMES[1:]]),
        ("sft-data", NAMES),
        ("rl-data", ["prepare", "ppo", "merge-ppo", "publish"]),  # what was fine-tuned remains valid
    ],
)
def test_another_model_data_set_or_lock_changes_what_was_made_of_it(part, changed):
    now, later = (inputs("sft-ppo", SETTINGS, prepared) for prepared in (PREPARED, {**PREPARED, part: "other"}))
    assert [name for name in NAMES if now[name] != later[name]] == changed


def test_the_order_of_settings_is_no_input():
    turned = {"ppo": {"lr": 1e-6}, "sft": {"steps": 10, "lr": 1e-5}}
    assert inputs("sft-ppo", SETTINGS, PREPARED) == inputs("sft-ppo", turned, PREPARED)


# --- what becomes of each stage --------------------------------------------------------------------------


def test_what_stands_is_kept():
    now = inputs("sft-ppo", SETTINGS, PREPARED)
    assert set(became(recorded(now)).values()) == {"keep"}
    assert set(became({}).values()) == {"run"}


def test_an_interrupted_ppo_continues_from_its_checkpoint_and_what_is_before_it_is_kept():
    now = inputs("sft-ppo", SETTINGS, PREPARED)
    former = recorded(now, ppo=Former("incomplete", now["ppo"], checkpoint="global_step_40"))
    del former["merge-ppo"], former["publish"]
    assert became(former) == {
        "prepare": "keep", "sft": "keep", "merge-sft": "keep", "ppo": "continue", "merge-ppo": "run", "publish": "run",
    }  # fmt: skip
    ppo = steps(stages_of("sft-ppo"), now, former)[3]
    assert (ppo.checkpoint, ppo.reason) == ("global_step_40", "incomplete, from global_step_40")


def test_a_checkpoint_of_other_settings_is_no_place_to_continue_from():
    now = inputs("sft-ppo", SETTINGS, PREPARED)
    former = recorded(now, ppo=Former("incomplete", now["ppo"], checkpoint="global_step_40"))
    after = steps(stages_of("sft-ppo"), inputs("sft-ppo", {**SETTINGS, "ppo": {"lr": 1.0}}, PREPARED), former)
    assert (after[3].action, after[3].reason) == (Action.RUN, "changed since: setting lr")


def test_what_was_deleted_is_made_again_with_all_that_needs_it():
    now = inputs("sft-ppo", SETTINGS, PREPARED)
    former = recorded(now, merge_sft=Former("complete", now["merge-sft"], artefact=False))
    found = steps(stages_of("sft-ppo"), now, former)
    assert [step.action.value for step in found] == ["keep", "keep", "run", "run", "run", "run"]
    assert [step.reason for step in found[2:4]] == ["no longer there: sft-model", "made anew: sft-model"]


def test_other_data_for_ppo_leave_what_was_fine_tuned():
    now, later = (inputs("sft-ppo", SETTINGS, prepared) for prepared in (PREPARED, {**PREPARED, "rl-data": "other"}))
    found = steps(stages_of("sft-ppo"), later, recorded(now))
    assert [step.action.value for step in found] == ["run", "keep", "keep", "run", "run", "run"]
    assert found[3].reason == "changed since: rl-data"


@pytest.mark.parametrize("state", ["failed", "cancelled", "incomplete", "running"])
@pytest.mark.parametrize("name", ["merge-sft", "publish"])
def test_only_what_trains_has_checkpoints(state, name):
    now = inputs("sft-ppo", SETTINGS, PREPARED)
    former = recorded(now, **{name.replace("-", "_"): Former(state, now[name], checkpoint="global_step_1")})
    assert became(former)[name] == "run"


@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["complete", "failed", "incomplete"])), st.booleans())
def test_nothing_is_kept_behind_what_runs_again(states, artefacts):
    now = inputs("sft-ppo", SETTINGS, PREPARED)
    former = {name: Former(state, now[name], artefacts, "global_step_2") for name, state in states.items()}
    anew = set()
    for step in steps(stages_of("sft-ppo"), now, former):
        if step.action is Action.KEEP:
            assert states[step.stage.name] == "complete" and not anew & set(step.stage.needs)
        elif step.stage.name != "prepare":
            anew.update(step.stage.leaves)


# --- jobs ------------------------------------------------------------------------------------------------


def test_each_stage_on_nodes_is_a_job_that_waits_for_the_one_before():
    jobs = submissions(steps(stages_of("sft-ppo"), inputs("sft-ppo", SETTINGS, PREPARED), {}), one_allocation=False)
    assert [(job.stages[0].name, job.after) for job in jobs] == [
        ("sft", None), ("merge-sft", 0), ("ppo", 1), ("merge-ppo", 2),
    ]  # fmt: skip


def test_one_allocation_has_all_of_them_in_order():
    (job,) = submissions(steps(stages_of("sft-ppo"), inputs("sft-ppo", SETTINGS, PREPARED), {}), one_allocation=True)
    assert [stage.name for stage in job.stages] == ["sft", "merge-sft", "ppo", "merge-ppo"]


def test_what_is_kept_is_not_submitted_and_nobody_waits_for_it():
    now = inputs("sft-ppo", SETTINGS, PREPARED)
    former = recorded(now, ppo=Former("failed", now["ppo"]))
    jobs = submissions(steps(stages_of("sft-ppo"), now, former), one_allocation=False)
    assert [(job.stages[0].name, job.after) for job in jobs] == [("ppo", None), ("merge-ppo", 0)]
    assert submissions(steps(stages_of("sft-ppo"), now, recorded(now)), one_allocation=True) == ()


def test_only_training_takes_all_nodes():
    for workflow in WORKFLOWS:
        for stage in stages_of(workflow):
            assert (stage.where is Where.NODES) == (stage.program in (Program.SFT, Program.PPO, Program.GRPO))
