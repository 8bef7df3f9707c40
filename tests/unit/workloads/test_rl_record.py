"""What verl writes of its steps becomes a rank's events, once, however often training was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
from verl_lines import rl_line, sft_line

from runner.results import records
from runner.results.celldir import CellDir
from runner.workloads.job import Events
from runner.workloads.rl import metrics, phases
from runner.workloads.rl.record import HISTORY, NEWEST, Follower, Recorder

BASE = {"run_id": "r", "cell": "c", "test": "t", "model": None, "num_nodes": 2, "world_size": 1, "repeat": 1}


class Attempt:
    """One attempt of a stage, whose trainer writes `lines` one after the other, a second apart."""

    opened: ClassVar[list[Events]] = []

    def __init__(self, folder: Path, checkpoint: Path, total: int | None = 8) -> None:
        folder.mkdir()
        self.now = 1000.0
        self.events = Events(folder, 0)
        self.opened.append(self.events)
        self.file = CellDir(folder).verl_metrics(0)
        self.follower = Follower(self.file, Recorder(self.events, checkpoint, total, lambda: self.now))
        self.folder = folder

    def train(self, *lines: str) -> Attempt:
        self.follower._recorder.begin()
        for line in lines:
            self.write(line)
        return self

    def write(self, text: str) -> None:
        with self.file.open("a") as file:
            file.write(text)
        self.now += 1.0
        self.follower.look()

    def written(self) -> list[dict]:
        return list(records.parse_jsonl(CellDir(self.folder).events(0).read_text()))

    def records(self) -> list[records.Record]:
        return list(records.from_events(self.written(), BASE, "node001"))

    def progress(self) -> list[str]:
        found = [event for event in self.written() if event["event"] == "progress"]
        return ["; ".join(filter(None, (event["detail"], event.get("result")))) for event in found]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Closes the files of all attempts."""
    yield
    while Attempt.opened:
        Attempt.opened.pop().end()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "ppo.0123"


def test_a_step_is_recorded_as_soon_as_its_line_is_whole(tmp_path: Path, checkpoint: Path) -> None:
    attempt = Attempt(tmp_path / "cell", checkpoint).train(rl_line(1), rl_line(2)[:40])
    assert [step.number for step in metrics.steps(attempt.records())] == [1], "the second line is torn"
    attempt.write(rl_line(2)[40:])
    assert [step.number for step in metrics.steps(attempt.records())] == [1, 2]


def test_the_first_step_of_an_attempt_is_not_measured(tmp_path: Path, checkpoint: Path) -> None:
    attempt = Attempt(tmp_path / "cell", checkpoint).train(rl_line(1), rl_line(2), rl_line(3))
    assert [step.measured for step in metrics.steps(attempt.records())] == [False, True, True]


def test_fine_tuning_is_timed_by_when_its_lines_come(tmp_path: Path, checkpoint: Path) -> None:
    attempt = Attempt(tmp_path / "cell", checkpoint).train(sft_line(1), sft_line(2), sft_line(3) + sft_line(4))
    assert [step.seconds for step in metrics.steps(attempt.records())] == [None, 1.0, 0.5, 0.5]


def test_an_attempt_that_continues_records_the_whole_training(tmp_path: Path, checkpoint: Path) -> None:
    """Steps behind the checkpoint are done again: they count once, and with what they are now."""
    first = Attempt(tmp_path / "1", checkpoint)
    first.train(rl_line(1), rl_line(2), rl_line(3, reward=0.5), rl_line(4, reward=None), rl_line(5)[:60])
    (checkpoint / NEWEST).write_text("3")
    with (checkpoint / HISTORY).open("a") as file:
        file.write('{"metric": "loss", "val')  # killed while it wrote
    second = Attempt(tmp_path / "2", checkpoint).train(rl_line(4, reward=0.75), rl_line(5, reward=1.0))
    (checkpoint / NEWEST).write_text("5")
    third = Attempt(tmp_path / "3", checkpoint).train(rl_line(6))
    steps = metrics.steps(third.records())
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.curves["reward_mean"] for step in steps] == [0.25, 0.25, 0.5, 0.75, 1.0, 0.25]
    assert [step.measured for step in steps] == [False, True, True, False, True, False]
    assert not any(step.not_numbers for step in steps), "a step that was NaN was done again, and is no longer"
    assert second.progress()[0].startswith("step 4 of 8")


def test_telemetry_of_an_earlier_attempt_is_not_looked_for_in_this_one(tmp_path: Path, checkpoint: Path) -> None:
    Attempt(tmp_path / "1", checkpoint).train(rl_line(1), rl_line(2))
    (checkpoint / NEWEST).write_text("2")
    second = Attempt(tmp_path / "2", checkpoint).train(rl_line(3))
    times = {r.context["step"]: r.context.get("started_s") for r in second.records() if r.metric == "step_time_s"}
    assert times == {1: None, 2: None, 3: pytest.approx(1001 - 9.0)}


def test_a_folder_of_other_settings_has_another_history(tmp_path: Path, checkpoint: Path) -> None:
    Attempt(tmp_path / "1", checkpoint).train(rl_line(1))
    (checkpoint / NEWEST).write_text("1")
    other = Attempt(tmp_path / "2", checkpoint.with_name("ppo.4567")).train(rl_line(1, reward=0.0))
    assert [step.curves["reward_mean"] for step in metrics.steps(other.records())] == [0.0]


def test_nan_is_recorded_by_name(tmp_path: Path, checkpoint: Path) -> None:
    attempt = Attempt(tmp_path / "cell", checkpoint).train(rl_line(1), rl_line(2, reward=None))
    (found,) = [record for record in attempt.records() if record.metric == "not_a_number"]
    assert found.context == {"step": 2, "names": ["critic/rewards/mean"]}
    assert attempt.progress()[-1].endswith("NaN: critic/rewards/mean")


def test_the_user_is_told_of_nan_at_once_and_once_of_each_metric(tmp_path: Path, checkpoint: Path) -> None:
    attempt = Attempt(tmp_path / "cell", checkpoint)
    attempt.train(
        rl_line(1, reward=None), rl_line(2, reward=None), rl_line(3, reward=None, **{"actor/grad_norm": None})
    )
    notices = [event["text"] for event in attempt.written() if event["event"] == "notice"]
    assert notices == ["NaN in step 1: critic/rewards/mean", "NaN in step 3: actor/grad_norm"]


def test_progress_says_step_phase_reward_and_where_the_time_went(tmp_path: Path, checkpoint: Path) -> None:
    attempt = Attempt(tmp_path / "cell", checkpoint).train(rl_line(1))
    assert attempt.progress() == ["step 2 of 8; step 1: reward 0.25, 9 s, rollout 44 %"]
    attempt.follower._phase = lambda: "update_actor"
    attempt.follower.look()
    attempt.follower.look()
    assert attempt.progress()[1:] == ["step 2 of 8, update actor; step 1: reward 0.25, 9 s, rollout 44 %"]
    events = [event for event in attempt.written() if event["event"] == "progress"]
    assert {(event["done"], event["total"], event["phase"]) for event in events} == {(1, 8, "training")}


def test_the_number_of_steps_may_be_unknown(tmp_path: Path, checkpoint: Path) -> None:
    attempt = Attempt(tmp_path / "cell", checkpoint, total=None).train(sft_line(1), sft_line(2))
    assert attempt.progress()[-1] == "step 3; step 2: loss 1.5, 1 s"
    last = Attempt(tmp_path / "2", checkpoint.with_name("other"), total=2).train(sft_line(1), sft_line(2))
    assert last.progress()[-1].startswith("2 steps done")


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    attempt = Attempt(tmp_path / "cell", tmp_path / "file" / "ppo").train(rl_line(1))
    assert len(metrics.steps(attempt.records())) == 1


def test_the_follower_ends_with_all_that_was_written(tmp_path: Path, checkpoint: Path) -> None:
    attempt = Attempt(tmp_path / "cell", checkpoint)
    with attempt.follower:
        attempt.file.write_text("".join(rl_line(number) for number in (1, 2, 3)))
    assert len(metrics.steps(attempt.records())) == 3


# --- the phase while it lasts -------------------------------------------------------------------------------------


def test_verls_timer_says_which_phase_it_times(tmp_path: Path) -> None:
    at, timed = tmp_path / "phase", {}

    @contextmanager
    def timer(name, timing_raw, color=None):
        yield
        timing_raw[name] = color

    marked = phases.noted(timer, at)
    assert phases.read(at) == ""
    with marked("step", timed):
        assert phases.read(at) == "", "the step itself is no phase of it"
        with marked("gen", timed, color="red"):
            assert phases.read(at) == "rollout"
        with marked("update_weights", timed):
            assert phases.read(at) == "weight_sync"
    assert timed == {"gen": "red", "update_weights": None, "step": None}
    with phases.noted(timer, tmp_path / "no" / "folder")("gen", timed):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["phase"]
