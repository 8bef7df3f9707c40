"""What verl writes of its steps, made into a rank's events while it trains, and kept for attempts that continue.

verl's own file begins anew with each attempt. So what is recorded of a step is kept beside the checkpoints as well: an
attempt that continues from one writes again what led to it, and its records are those of the whole training.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.cluster.tools.verl_metrics import IDLE, Reader, Step
from runner.system.files import write_text_atomic
from runner.workloads.job import Events
from runner.workloads.rl.phases import in_words

LOOK_S = 0.1  # between two looks at verl's file: what a step of fine-tuning is timed by
NEWEST = "latest_checkpointed_iteration.txt"  # verl's name of the file that has the step of the newest checkpoint
HISTORY = "recorded.jsonl"  # in the folder of checkpoints


def newest_step(checkpoint: Path) -> int:
    """The step of the newest checkpoint in a folder of them, from which verl continues; 0 without one."""
    try:
        return int((checkpoint / NEWEST).read_text())
    except (OSError, ValueError):
        return 0


def values_of(step: Step, seconds: float | None, measured: bool) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(metric, value, context) of all that is recorded of a step; `seconds` are what it took, None: not known.

    `measured` says that the step counts in rates and shares.
    """
    context: dict[str, Any] = {"step": step.number}
    if step.trained:
        if seconds is not None:
            yield "step_time_s", seconds, {**context, "measured": measured}
        for phase, phase_s in step.phases_s.items():
            yield "phase_s", phase_s, {**context, "phase": phase}
        for phase, rate in step.tokens_per_s.items():
            yield "phase_tokens_per_s", rate, {**context, "phase": phase}
        for timer, timer_s in step.other_s.items():
            yield "other_s", timer_s, {**context, "timer": timer}
        for of, ratio in step.spreads.items():
            yield "spread", ratio, {**context, "of": of}
        if step.tokens is not None:
            yield "tokens", step.tokens, context
    for metric, value in step.curves.items():
        yield metric, value, context
    if step.not_numbers:
        yield "not_a_number", len(step.not_numbers), {**context, "names": list(step.not_numbers)}


class Recorder:
    """Writes the steps of one attempt to `events`, and to the folder `checkpoint`, as soon as each has ended.

    `total` is the number of steps, None: not known. The first step of an attempt is not `measured`: it compiles, and
    carries the weights to the rollout for the first time. `clock` gives seconds since the epoch.
    """

    def __init__(
        self, events: Events, checkpoint: Path, total: int | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._events, self._history, self._total, self._clock = events, checkpoint / HISTORY, total, clock
        self._done = newest_step(checkpoint)
        self._last: float | None = None  # when the step before ended
        self._result = ""
        self._shown: tuple[int, str] | None = None
        self._named: set[str] = set()  # metrics whose NaN the user knows of

    def begin(self) -> None:
        """Write again what earlier attempts recorded up to the checkpoint that this one continues from.

        The steps behind it are done again: what was recorded of them is dropped.
        """
        kept = [one for one in _history(self._history) if one["context"]["step"] <= self._done]
        with suppress(OSError):
            write_text_atomic(self._history, "".join(json.dumps(one) + "\n" for one in kept))
        for one in kept:
            # When it was is not said: the telemetry of that attempt is not this one's.
            self._events.value(one["metric"], one["value"], **{**one["context"], "earlier": True})
        if self._done:
            self.show("")

    def take(self, steps: list[Step]) -> None:
        """Record steps that have ended just now, one after the other."""
        trained = [step for step in steps if step.trained]
        moment = self._clock()
        # verl times no step of fine-tuning: it is the time since the one before, with its checkpoint and validation.
        between = None if self._last is None or not trained else (moment - self._last) / len(trained)
        for step in steps:
            seconds = between if step.seconds is None else step.seconds
            measured = step.trained and self._last is not None
            for metric, value, context in values_of(step, seconds, measured):
                started = {}
                if metric == "step_time_s":
                    started = {"started_s": round(moment - step.after_s - value, 3)}
                self._events.value(metric, value, **context, **started)
                self._keep(metric, value, context)
            if step.trained:
                self._last, self._done = moment, step.number
                self._result = _result(step, seconds)
            if new := [name for name in step.not_numbers if name not in self._named]:
                self._named.update(new)
                self._events.notice(f"NaN in step {step.number}: {', '.join(new)}")
        if trained:
            self.show("")

    def show(self, phase: str) -> None:
        """Write the progress, if it has changed: the step that runs, what it does (`phase`, empty: not known), and the
        results of the one before.
        """
        if self._shown == (self._done, phase):
            return
        self._shown = self._done, phase
        total = max(self._done, self._total or self._done + 1)
        of = f" of {self._total}" if self._total else ""
        now = f"step {self._done + 1}{of}" if self._done < total else f"{self._done} steps done"
        detail = now + (f", {in_words(phase)}" if phase else "")
        self._events.progress(self._done, total, "training", detail, self._result)

    def _keep(self, metric: str, value: float, context: dict[str, Any]) -> None:
        # Without it an attempt that continues knows less of the past; training goes on.
        with suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            with self._history.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"metric": metric, "value": value, "context": context}) + "\n")


def _history(path: Path) -> list[dict[str, Any]]:
    """What was recorded, without lines that are torn."""
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                one = json.loads(line)
                step = int(one["context"]["step"])
                context = {**one["context"], "step": step}
                found.append({"metric": str(one["metric"]), "value": float(one["value"]), "context": context})
    return found


def _result(step: Step, seconds: float | None) -> str:
    """What a step gave, in words."""
    parts = []
    if "reward_mean" in step.curves:
        parts.append(f"reward {step.curves['reward_mean']:.3g}")
    if "loss" in step.curves:
        parts.append(f"loss {step.curves['loss']:.3g}")
    if seconds is not None:
        parts.append(f"{seconds:.3g} s")
    own = {phase: phase_s for phase, phase_s in step.phases_s.items() if phase != IDLE}
    if own and seconds:
        longest = max(own, key=lambda phase: own[phase])
        parts.append(f"{in_words(longest)} {100 * own[longest] / seconds:.0f} %")
    if step.not_numbers:
        more = f" and {len(step.not_numbers) - 1} more" if len(step.not_numbers) > 1 else ""
        parts.append(f"NaN: {step.not_numbers[0]}{more}")
    return f"step {step.number}: {', '.join(parts)}"


class Follower:
    """Follows verl's file in a thread of its own while a trainer runs: a context manager. Once the trainer has ended,
    it raises what kept it from recording a step.

    `phase` returns what the trainer does at the moment, empty: not known.
    """

    def __init__(self, path: Path, recorder: Recorder, phase: Callable[[], str] = lambda: "") -> None:
        self._path, self._recorder, self._phase = path, recorder, phase
        self._reader, self._read = Reader(), 0
        self._over = threading.Event()
        self._failed: Exception | None = None  # records would be incomplete, and nobody would know
        self._thread = threading.Thread(target=self._follow, name="verl-metrics", daemon=True)

    def __enter__(self) -> Follower:
        self._recorder.begin()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._failed is not None and kind is None:
            raise self._failed

    def _follow(self) -> None:
        last = False
        try:
            while not last:
                last = self._over.wait(LOOK_S)
                self.look()
        except Exception as error:
            self._failed = error

    def look(self) -> None:
        """Record what was added since the last look."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                added = file.read()
        except OSError:
            added = b""
        self._read += len(added)
        self._recorder.take(self._reader.feed(added))
        if phase := self._phase():
            self._recorder.show(phase)
