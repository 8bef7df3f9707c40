"""Stages of a workflow by their rank programs, with the real verl: trained on two ranks, merged, asked. Some 70 s.

What trains is the tiny Llama, and what it learns is the form of the arithmetic set's answers.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

import ranks
import verl_environment
from role_modules import ROOT
from runner.cluster.tools import verl_metrics
from runner.system import manifest
from runner.workflow.parallelism import split
from runner.workflow.stages import Program
from runner.workflow.verl import PROFILES, Training, overrides, words
from runner.workloads import rl
from runner.workloads.data import verl as data
from runner.workloads.rl import tiny

pytestmark = [pytest.mark.local, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS, SAVED = 48, 40
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have now?"
ENV = {**rl.ENVIRONMENT, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return verl_environment.python()
    except LookupError as error:
        pytest.skip(f"no environment with verl: {error}")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rl")


@pytest.fixture(scope="module")
def told(place) -> dict:
    """The settings of a cell that trains."""
    rows = data.prepare(data.open_source(data.ARITHMETIC, 256), data.Schema.MESSAGES, place)
    model, _ = tiny.make(place)
    asked = Training(
        model=str(model), train=str(rows.train), val=None, folder=str(place / "checkpoints"), nodes=1, gpus_per_node=2,
        split=split(1, 2), profile=PROFILES["cpu-smoke"], project="test", experiment="sft", batch=16, steps=STEPS,
        save_every=SAVED, prompt_tokens=64, response_tokens=64, recompute=False, learning_rate=1e-2,
    )  # fmt: skip
    return {"words": words(Program.SFT, overrides(Program.SFT, asked)), "checkpoint": asked.folder}


@pytest.fixture(scope="module")
def trained(place, told, python) -> ranks.Ended:
    ended = ranks.start(place / "sft", ranks.job("rl-sft", 2, told), env=ENV, python=python, timeout_s=600)
    assert ended.outcome.rc == 0, ended.outcome.stderr[-3000:]
    return ended


def merge(place: Path, told: dict, python: Path, name: str, **changes: str) -> ranks.Ended:
    params = {"program": "sft", "checkpoint": told["checkpoint"], "backend": "fsdp", "question": QUESTION}
    params |= {"target": str(place / "models" / name), **changes}
    return ranks.start(place / name, ranks.job("rl-merge", 1, params), env=ENV, python=python, timeout_s=600)


def test_it_learns_and_says_how_far_it_is(trained):
    losses = trained.values("loss")
    assert len(losses) == STEPS and losses[-1] < losses[0] / 2
    done = [event["done"] for event in trained.ranks[0] if event["event"] == "progress"]
    assert done[-1] == STEPS and all(before <= after for before, after in pairwise(done)) and len(set(done)) > 3
    assert {event["total"] for event in trained.ranks[0] if event["event"] == "progress"} == {STEPS}
    assert [[event["world_size"] for event in rank if event["event"] == "start"] for rank in trained.ranks] == [
        [2],
        [2],
    ]
    assert trained.values("loss", rank=1) == [], "verl has one rank write"


def test_a_checkpoint_is_there_of_the_steps_that_were_asked_for(trained, told):
    folder = Path(told["checkpoint"])
    assert {path.name for path in folder.glob("global_step_*")} == {f"global_step_{step}" for step in (SAVED, STEPS)}
    assert len(list((folder / f"global_step_{STEPS}").glob("model_world_size_2_rank_*.pt"))) == 2


def test_the_merged_model_answers_as_it_was_taught(trained, place, told, python):
    ended = merge(place, told, python, "merged")
    assert ended.outcome.rc == 0, ended.outcome.stderr[-3000:]
    model = place / "models" / "merged"
    found = manifest.complete(model)
    assert found and {"config.json", "model.safetensors", "tokenizer.json"} <= {file.path for file in found.files}
    assert found.about["made_of"] == f"{told['checkpoint']}/global_step_{STEPS}"
    assert found.about["versions"]["verl"] == rl.VERL
    assert re.search(r" has .*<<.*>>", found.about["answer"]), "the weights are those after training"
    assert [path.name for path in model.parent.iterdir()] == ["merged"]
    (context,) = ended.contexts("answer_s")
    assert context["answer"] == found.about["answer"] and ended.values("merge_s")[0] > 0


def test_an_attempt_after_the_last_step_does_nothing(trained, place, told, python):
    before = sorted(path.name for path in Path(told["checkpoint"]).iterdir())
    ended = ranks.start(place / "again", ranks.job("rl-sft", 2, told), env=ENV, python=python, timeout_s=600)
    assert ended.outcome.rc == 0, ended.outcome.stderr[-3000:]
    assert sorted(path.name for path in Path(told["checkpoint"]).iterdir()) == before
    assert ended.values("loss") == trained.values("loss"), "what was recorded is recorded again"
    assert ended.ranks[0][-1]["event"] == "end"


def test_an_attempt_that_was_interrupted_goes_on_from_its_last_checkpoint(trained, place, told, python):
    folder = place / "interrupted"
    shutil.copytree(told["checkpoint"], folder, ignore=shutil.ignore_patterns(f"global_step_{STEPS}"))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    given = [word.replace(told["checkpoint"], str(folder)) for word in told["words"]]
    params = {"words": given, "checkpoint": str(folder)}
    ended = ranks.start(place / "continued", ranks.job("rl-sft", 2, params), env=ENV, python=python, timeout_s=600)
    assert ended.outcome.rc == 0, ended.outcome.stderr[-3000:]
    assert [context["step"] for context in ended.contexts("loss")] == list(range(1, STEPS + 1))
    fresh = [c["step"] for c in ended.contexts("loss") if not c.get("earlier")]
    assert fresh == list(range(SAVED + 1, STEPS + 1))
    assert math.isclose(ended.values("loss")[-1], trained.values("loss")[-1], rel_tol=0.2)


def test_a_checkpoint_that_does_not_merge_is_named_and_leaves_no_model(trained, place, told, python):
    folder = place / "torn"
    shutil.copytree(told["checkpoint"], folder)
    shard = folder / f"global_step_{STEPS}" / "model_world_size_2_rank_1.pt"
    shard.write_bytes(shard.read_bytes()[:1000])
    ended = merge(place, told, python, "of-torn", checkpoint=str(folder))
    assert ended.outcome.rc == 1
    assert f"\nrank 0: checkpoint unusable: {shard.parent} does not merge: RuntimeError: " in ended.outcome.stderr
    assert not (place / "models" / "of-torn").exists()
    assert all(event["event"] != "end" for event in ended.ranks[0])


def test_a_model_of_nan_is_not_called_good(trained, place, told, python):
    folder = place / "nan"
    shutil.copytree(told["checkpoint"], folder)
    code = f"""
import torch, glob
for path in glob.glob({str(folder)!r} + "/global_step_{STEPS}/model_*.pt"):
    shard = torch.load(path, weights_only=False)
    shard["model.norm.weight"]._local_tensor.fill_(float("nan"))
    torch.save(shard, path)"""
    spoilt = verl_environment.run(code)
    assert spoilt.returncode == 0, spoilt.stderr[-2000:]
    ended = merge(place, told, python, "of-nan", checkpoint=str(folder))
    assert ended.outcome.rc == 1 and "checkpoint unusable: its model computes NaN or infinity" in ended.outcome.stderr
    assert not (place / "models" / "of-nan").exists()


def test_the_epochs_of_the_data_tell_how_many_steps_there_will_be(place, told, python):
    rows, replaced = (
        224,
        {"trainer.total_epochs": 3, "trainer.total_training_steps": None},
    )  # of 256, without validation
    kept = [word for word in told["words"] if word.partition("=")[0] not in replaced]
    cases = [[*kept, "trainer.total_epochs=3"], kept, [*kept, "trainer.total_epochs=3", "+data.train_max_samples=40"]]
    code = f"""
import json
from runner.workloads.rl import trainer
print(json.dumps([trainer.expected(words) for words in {cases!r}]))"""
    outcome = verl_environment.run(code, plugin=False)
    assert json.loads(outcome.stdout.splitlines()[-1]) == [rows // 16 * 3, None, 40 // 16 * 3], outcome.stderr[-2000:]


def test_what_verl_writes_of_a_step_is_what_is_read(trained, place):
    lines = (place / "sft" / "verl.rank0.jsonl").read_text().splitlines()
    steps = [verl_metrics.step_of(line) for line in lines]
    assert [step.number for step in steps] == list(range(1, STEPS + 1))
    assert all("loss" in step.curves and json.loads(line) for step, line in zip(steps, lines, strict=True))
