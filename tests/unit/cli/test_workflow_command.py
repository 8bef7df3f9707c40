"""`runner workflow` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from conftest import ROOT
from runner.cli import main, workflow
from runner.launch.prepare import Options as RunOptions
from runner.results.rundir import RunDir
from runner.workflow import start
from runner.workflow.asked import Options
from runner.workflow.record import Stages
from runner.workflow.stages import WORKFLOWS


@pytest.fixture
def typed(monkeypatch, tmp_path, capsys):
    """(exit code, stdout, stderr) of `runner workflow` with these arguments, in the product's folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RUNNER_RESULTS", str(tmp_path / "results"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.run(main.cli, ["workflow", *arguments])
        return (code, *capsys.readouterr())

    return run


def test_the_list_has_every_workflow_with_what_its_stages_need_and_leave(typed):
    code, out, err = typed("list")
    assert (code, err) == (0, "")
    for name, stages in WORKFLOWS.items():
        assert f"{name}:\n" in out and all(f"  {stage.name}: {stage.summary}\n" in out for stage in stages)
    code, out, _ = typed("list", "--json")
    found = json.loads(out)
    assert list(found) == list(WORKFLOWS)
    assert found["sft-ppo"][1]["needs"] == ["environment", "model", "sft-data"]


# --- a workflow ------------------------------------------------------------------------------------------

LOCAL = ("-i", "inventory/local")
SLURM = ("-i", "inventory/slurm-example", "--nodes", "2", "--model", "a/b", "--data", "gsm8k")
HGX = ("-i", "inventory/fukushimadc-02", "--nodes", "2", "--data", "gsm8k", "--dry-run")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_dry_run_of_each_workflow_on_this_machine_needs_nothing_else(typed, tmp_path, name):
    code, out, err = typed(name, *LOCAL, "--dry-run")
    assert (code, err) == (0, "") and not (tmp_path / "results").exists()
    assert all(f". {stage.name}: run (it has not run)" in out for stage in WORKFLOWS[name] if stage.name != "publish")
    assert ("ray start --block" in out) == (name != "sft")
    code, out, _ = typed(name, *LOCAL, "--dry-run", "--json")
    assert code == 0 and [cell["test"] for cell in json.loads(out)["plan"]["cells"]][-1] == "rl-merge"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sft-po", *LOCAL), "unknown workflow 'sft-po'; did you mean 'sft-ppo'?"),
        (("sft-ppo", "-i", "inventory/fukushimadc-02", "--dry-run"), "on GPUs a workflow needs --model and --data"),
        (("sft-ppo", *HGX, "--model", "a/b", "--dp", "7"), "nearest that works: DP 16 × TP 1 × PP 1;"),
        (("sft-ppo", *HGX, "--model", "a/b", "--tp", "2"), "megatron, which gpu-vllm has not"),
        (("sft-ppo", *HGX, "--model", "a/b", "--rollout-tp", "16"), "give one of 1, 2, 4, 8"),
        (("sft-ppo", *LOCAL, "--set", "verl.data.train_batch_sise=1"), "did you mean 'train_batch_size'?"),
        (("sft-ppo", *LOCAL, "--profile", "gpu-vllm"), "--profile gpu-vllm is for cuda"),
        (("sft-ppo", *LOCAL, "--stages", "pppo"), "unknown stage 'pppo'; did you mean 'ppo'?"),
        (("sft-ppo", *LOCAL, "--stages", "ppo"), "or go on with a run that has it (--resume RUN)"),
        (("sft-ppo", *LOCAL, "--stages", "publish"), "say where to with --publish"),
        (("sft-ppo", *LOCAL, "--publish", "ftp:x"), "ftp:x"),
        (("sft-ppo", *LOCAL, "--steps", "2", "--epochs", "1"), "--steps and --epochs exclude each other"),
        (("sft", *LOCAL, "--rl-data", "gsm8k"), "--rl-data: for PPO and GRPO, and workflow sft has neither"),
        (("sft", *LOCAL, "--reward", "x.py", "--rollout-tp", "2"), "--reward, --rollout-tp: for PPO and GRPO"),
        (("sft-ppo", *LOCAL, "--nodes", "2"), "2 nodes asked for"),
        (("sft-ppo", *LOCAL, "--backend", "shh"), "did you mean 'ssh'?"),
        (("sft-ppo", *LOCAL, "--reward", "/nope.py"), "reward /nope.py: cannot be read"),
        (("sft-ppo", *LOCAL, "--one-allocation"), "--one-allocation goes with --backend slurm"),
        (("sft-ppo", *LOCAL, "--resume", "nothing"), "no run 'nothing'"),
        (("sft", *SLURM, "--set", "slurm.shared=false"), "where checkpoints and models are: give a folder that they"),
        (("from-verl-yaml", "/nope.yaml", *LOCAL), "/nope.yaml"),
    ],
)
def test_a_mistake_is_one_line(typed, arguments, said):
    code, out, err = typed(*arguments, *([] if "--dry-run" in arguments else ["--dry-run"]))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and said in err


@pytest.mark.parametrize(
    "option",
    ["--model", "--data", "--rl-data", "--reward", "--profile", "--work", "--project", "--publish", "--resume"],
)
def test_an_empty_option_is_not_as_if_left_out(typed, option):
    code, out, err = typed("sft-ppo", *LOCAL, "--dry-run", option, "")
    assert (code, out) == (2, "") and err.startswith(f"runner: {option} is empty: ")


@pytest.mark.parametrize("stages", ["", " ", ",", " , "])
def test_no_stage_is_not_every_stage(typed, stages):
    code, _, err = typed("sft-ppo", *LOCAL, "--dry-run", "--stages", stages)
    assert code == 2 and "--stages is empty: give it a value, or leave it out" in err


def test_a_run_is_gone_on_with_by_what_started_it(typed, tmp_path, capsys):
    folder = tmp_path / "results" / "r1"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"run_id": "r1", "cells": []}))
    (folder / "status.json").write_text(json.dumps({"state": "failed", "cells": {"a": {}}}))
    code, _, err = typed("sft", "--resume", "r1")
    assert code == 2 and "r1 is no run of a workflow: resume it with runner bench --resume r1" in err
    (folder / "status.json").write_text(
        json.dumps({"state": "failed", "cells": {"a": {}}, "workflow": {"name": "ppo", "asked": {}}})
    )
    code, _, err = typed("sft", "--resume", "r1")
    assert code == 2 and "r1 is a run of ppo: runner workflow ppo --resume r1" in err
    assert main.run(main.cli, ["bench", "--resume", "r1"]) == 2
    assert "r1 is a run of a workflow: runner workflow ppo --resume r1" in capsys.readouterr().err
    code, _, err = typed("ppo", "--resume", "r1", "--nodes", "2")
    assert code == 2 and "omit --nodes" in err


def test_epochs_take_the_place_of_the_steps_that_a_run_was_asked_for(typed, tmp_path):
    planned = json.loads(typed("sft", *LOCAL, "--dry-run", "--json")[1])["plan"]
    run = RunDir.create(tmp_path / "results", planned)
    asked = RunOptions(results=tmp_path / "results", command="runner workflow", inventory="inventory/local")
    Stages(run).ask("sft", start.to_json(Options("sft", asked, steps=3)))
    code, out, err = typed("sft", "--resume", run.run_id, "--epochs", "2", "--dry-run")
    assert (code, err) == (0, "") and "trainer.total_epochs=2" in out and "trainer.total_training_steps" not in out
    assert "trainer.total_training_steps=3" in typed("sft", "--resume", run.run_id, "--dry-run")[1]


def test_stages_and_profiles_are_completed():
    options = {
        option.name: option for option in main.cli.get_command(None, "workflow").get_command(None, "sft-ppo").params
    }

    def completed(name, begun, command="sft-ppo"):
        context = click.Context(click.Command(command), info_name=command)
        return [each.value for each in options[name].shell_complete(context, begun)]

    assert completed("stages", "m") == ["merge-sft", "merge", "merge-ppo"]
    assert completed("stages", "sft,p") == ["sft,prepare", "sft,ppo", "sft,publish"]
    assert completed("stages", "m", "from-verl-yaml") == ["merge-ppo", "merge"]
    assert completed("profile", "gpu") == ["gpu-vllm"]
    assert completed("publish", "") == ["dir:", "hf:", "rsync:"]


# --- a user's document -----------------------------------------------------------------------------------

DOCUMENT = """
parallelism: {data_parallel_size: 16, tensor_parallel_size: 1, pipeline_parallel_size: 1}
distributed: {backend: nccl, init_method: "env://", timeout: 1800}
model: {path: qwen/Qwen2.5-7B, trust_remote_code: true}
training: {batch_size: 128, micro_batch_size: 2, gradient_accumulation_steps: 4, zero_stage: 2}
inference: {backend: vllm, tensor_parallel_size: 2, pipeline_parallel_size: 1}
"""


def test_a_document_is_translated_line_by_line_and_its_words_are_those_that_ranks_get(typed, tmp_path):
    file = tmp_path / "multinode_ppo.yaml"
    file.write_text(DOCUMENT)
    code, out, err = typed("from-verl-yaml", str(file), *HGX)
    assert (code, err) == (0, "")
    translated, _, plan = out.partition("workflow ppo:")
    lines = [line for line in translated.splitlines()[1:] if line]
    assert len(lines) == 15 and all(" → " in line for line in lines)
    for word in (
        "nccl_timeout=1800",
        "reshard_after_forward=false",
        "tensor_model_parallel_size=2",
        "train_batch_size=128",
    ):
        assert word in translated and f"{word} \\" in plan
    code, out, _ = typed("from-verl-yaml", str(file), *HGX, "--set", "verl.data.train_batch_size=256")
    assert code == 0 and "data.train_batch_size=256 \\" in out
    (line,) = [line for line in out.splitlines() if line.startswith("training.batch_size: ")]
    assert line.endswith("; but by --set data.train_batch_size=256"), "what a line became is not told of another's"


@pytest.mark.parametrize(
    ("line", "arguments", "said"),
    [
        ("tensor_parallel_size: 1", (), ""),
        ("tensor_parallel_size: 2", (), "nearest that works: DP 8 × TP 2 × PP 1"),
        ("tensor_parallel_sise: 1", (), "tensor_parallel_sise"),
        ("tensor_parallel_size: 1", ("--model", "a/b"), "--model a/b and model.path qwen/Qwen2.5-7B"),
    ],
)
def test_a_document_that_does_not_fit_is_refused(typed, tmp_path, line, arguments, said):
    file = tmp_path / "multinode_ppo.yaml"
    file.write_text(DOCUMENT.replace("tensor_parallel_size: 1", line, 1))
    code, _, err = typed("from-verl-yaml", str(file), *HGX, *arguments)
    assert code == (2 if said else 0) and said in err and len(err.splitlines()) == bool(said)


@pytest.mark.parametrize(("typed_now", "length"), [("epochs", (None, 2)), ("steps", (2, None)), ("seed", (10, None))])
def test_a_run_that_goes_on_may_be_told_its_length_in_the_other_unit(typed_now, length):
    """What was asked for at first does not exclude it: one of the two is typed."""
    command = main.cli.get_command(None, "workflow").get_command(None, "ppo")
    before = Options("ppo", RunOptions(results=Path("r"), command="c"), steps=10)
    with command.make_context("ppo", [f"--{typed_now}", "2"]) as context:
        given = {key: one for key, one in context.params.items() if key not in ("resume", "dry_run", "as_json")}
        after = workflow._renewed(before, "ppo", given, {typed_now}, SimpleNamespace(path="r/run"))
    assert (after.steps, after.epochs) == length
