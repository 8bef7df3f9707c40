"""One cell while it runs: what the agents say, what they are told, and how it ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from runner import backends, records
from runner.backends import Talk
from runner.blame import LAUNCHER, blame, ended_well
from runner.display import Display
from runner.plan import Cell

# A peer notices a dead rank at once, its own node's launcher a moment later: both are heard before
# anything is stopped, so that the guilty one can be told from its victims.
SETTLE_S = 2.0


class Stop:
    """What the user's signals ask for. The first asks for an orderly end, the second leaves at once."""

    def __init__(self, display: Display) -> None:
        self.asked = False
        self._display = display

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._heard) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, _frame: object) -> None:
        again, self.asked = self.asked, True
        if again:
            raise KeyboardInterrupt
        self._display.note("stopping the ranks and gathering what was measured; once more to leave at once")


@dataclass
class CellRun:
    """One cell while it runs: hears the agents and decides what to tell them."""

    cell: Cell
    stop: Stop
    on_progress: Callable[[float, str], None]
    on_line: Callable[[str, str, str], None]
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    talks: list[Talk] = field(default_factory=list)
    started: set[str] = field(default_factory=set)
    first_failure: float | None = None
    reason: str | None = None
    deadline: float = 0.0
    looked: float = 0.0

    def hear(self, talk: Talk, message: Mapping[str, Any]) -> None:
        kind = message["message"]
        if kind == "started":
            self.started.add(talk.name)
        elif kind == "outcome":
            self.outcomes[talk.name] = dict(message)
            if not ended_well(message):
                self._failed()
        elif kind == "line":
            self.on_line(talk.name, message["file"], message["line"])
            if message["file"].endswith(".jsonl"):
                for event in records.parse_jsonl(message["line"]):
                    if event.get("event") == "progress":
                        self.on_progress(event["done"] / max(1, event["total"]), event["phase"])

    def _failed(self) -> None:
        self.first_failure = self.first_failure or time.monotonic()

    def word(self, talk: Talk) -> str | None:
        """What to tell this agent now."""
        moment = time.monotonic()
        if moment - self.looked > backends.POLL_S / 2:  # once for all agents of a round, not once for each
            self.looked = moment
            self._look_around(moment)
        if self.reason or (self.first_failure and moment - self.first_failure > SETTLE_S):
            return "stop"
        if self.cell.launch.head:
            if talk.name == LAUNCHER:
                return "go" if self.started >= set(self.cell.hosts) else None
            if LAUNCHER in self.outcomes:
                return "done"
        return None

    def _look_around(self, moment: float) -> None:
        for talk in self.talks:
            if talk.rc is not None and talk.name not in self.outcomes:
                self._failed()
            elif talk.alive and moment - talk.heard > backends.SILENCE_S:
                self.reason = self.reason or f"{talk.name} has not answered for {backends.SILENCE_S:g} s"
        if moment > self.deadline:
            self.reason = self.reason or f"not finished within its limit of {self.cell.params['timeout_s']:g} s"
        if self.stop.asked:
            self.reason = self.reason or "interrupted"

    def state(self) -> tuple[str, dict[str, Any] | None]:
        """How the cell ended, and why if not well."""
        if all(ended_well(self.outcomes.get(talk.name, {})) for talk in self.talks):
            return "complete", None
        if self.stop.asked:
            return "cancelled", None
        if self.reason:
            silent = [t.name for t in self.talks if t.name not in self.outcomes]
            return "incomplete", {"message": self.reason, "host": silent[0] if len(silent) == 1 else None, "stderr": []}
        return "failed", blame(self.talks, self.outcomes)
