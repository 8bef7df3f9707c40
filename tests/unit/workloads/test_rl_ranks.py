"""What ranks of a workflow decide without verl: which checkpoint is merged, how long a training is, what it is told."""

from __future__ import annotations

import ast
import subprocess
import sys
from types import SimpleNamespace

import pytest

from runner.errors import RunnerError
from runner.workloads.job import Events, RankJob
from runner.workloads.registry import TESTS
from runner.workloads.rl import merge, trainer
from runner.workloads.rl.record import Follower


def job(tmp_path, **params) -> RankJob:
    given = {"words": ["trainer.total_training_steps=4"], "checkpoint": str(tmp_path / "checkpoints"), **params}
    return RankJob("run", "cell", "rl-sft", 1, 1, 1, "cpu", 0, given)


# --- checkpoints ---


@pytest.mark.parametrize(("program", "below"), [("sft", "."), ("ppo", "actor"), ("grpo", "actor")])
def test_the_newest_checkpoint_is_the_one_that_its_trainer_says(tmp_path, program, below):
    for step in (2, 4, 10):
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\n")
    assert merge.newest(tmp_path, program) == tmp_path / "global_step_4" / below


@pytest.mark.parametrize("content", [None, "", "four", "0"])
def test_a_folder_in_which_nothing_was_saved_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    with pytest.raises(RunnerError) as error:
        merge.newest(tmp_path, "sft")
    line = f"checkpoint unusable: {tmp_path} has no latest_checkpointed_iteration.txt: nothing was saved there"
    assert (str(error.value), error.value.kind) == (line, "checkpoint_unusable")


def test_a_checkpoint_without_its_actor_is_named(tmp_path):
    (tmp_path / "global_step_4").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(RunnerError, match=f"step 4 is the newest, and {tmp_path}/global_step_4/actor is not there"):
        merge.newest(tmp_path, "ppo")


def test_a_full_disk_is_no_fault_of_the_checkpoint(tmp_path, monkeypatch):
    def full(name):
        raise RuntimeError('I/O error: No space left on device (os error 28), path: "model.safetensors"')

    monkeypatch.setattr(merge, "import_module", full)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(RuntimeError, match="No space left on device"):
        merge._merge(tmp_path, tmp_path, "fsdp")


# --- trainers ---


@pytest.mark.parametrize(
    ("words", "total"),
    [
        (["trainer.total_training_steps=100"], 100),
        (["trainer.total_epochs=3"], None),
        (["trainer.total_training_steps=null"], None),
        (["trainer.total_training_steps=100", "trainer.total_training_steps=7"], 7),
        (["critic.optim.total_training_steps=5"], None),
    ],
)
def test_the_length_of_a_training_is_what_it_is_told(words, total):
    assert trainer.total_of(words) == total


@pytest.mark.parametrize("words", [[], ["data.train_files=/gone.parquet"], ["data.train_files=[]", "a=={"]])
def test_a_length_that_cannot_be_told_is_left_open(words):
    assert trainer.expected(words) is None


class Verl:
    """Stands in for a trainer's module: `main` notes what it was started with, and trains no step."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []

    def main(self) -> None:
        self.started.append(list(sys.argv))


@pytest.fixture
def verl(monkeypatch):
    module = Verl()
    monkeypatch.setattr(trainer, "import_module", lambda name: module)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(trainer, "os", SimpleNamespace(environ={}))
    return module


@pytest.fixture
def events(tmp_path):
    written = Events(tmp_path, 0)
    yield written
    written.end()


@pytest.mark.parametrize(("saved", "starts"), [(None, 1), (3, 1), (4, 0), (5, 0)])
def test_a_trainer_is_started_unless_its_last_step_is_saved(tmp_path, events, verl, saved, starts):
    told = job(tmp_path)
    if saved is not None:
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        (folder / "latest_checkpointed_iteration.txt").write_text(str(saved))
    trainer.run("verl.trainer.x", told, events)
    assert len(verl.started) == starts
    assert all(argv[0] == "verl.trainer.x" and argv[-1] == told.params["words"][-1] for argv in verl.started)


def test_a_trainer_writes_into_its_cell_and_asks_no_hub(tmp_path, events, verl):
    trainer.run("verl.trainer.x", job(tmp_path), events)
    told = trainer.os.environ
    assert told["HF_HUB_OFFLINE"] == "1" and told["WANDB_MODE"] == "offline" and told["HYDRA_FULL_ERROR"] == "1"
    assert all(
        told[name].startswith(str(tmp_path)) for name in ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR", "WANDB_DIR")
    )


def test_what_a_trainer_raises_is_what_its_rank_dies_of(tmp_path, events, verl, monkeypatch):
    def diverge() -> None:
        raise ValueError("loss is NaN")

    monkeypatch.setattr(verl, "main", diverge)
    with pytest.raises(ValueError, match="loss is NaN"):
        trainer.run("verl.trainer.x", job(tmp_path), events)


# --- imports ---


@pytest.mark.parametrize("name", [name for name, test in TESTS.items() if test.workflow])
def test_a_rank_loads_nothing_heavy_before_it_runs(name):
    heavy = ["torch", "verl", "ray", "transformers", "pydantic", "hydra"]
    code = f"import sys, {TESTS[name].rank}; print([name for name in {heavy} if name in sys.modules])"
    assert (
        ast.literal_eval(
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
        )
        == []
    )


# --- what is recorded while it trains ---


def test_a_training_whose_steps_cannot_be_recorded_does_not_end_well(tmp_path):
    class Full:
        def begin(self):
            pass

        def take(self, steps):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), Follower(tmp_path / "verl.jsonl", Full()):
        pass
    with pytest.raises(ZeroDivisionError), Follower(tmp_path / "verl.jsonl", Full()):
        1 / 0  # noqa: B018
