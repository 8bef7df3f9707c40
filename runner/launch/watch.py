"""One cell while it runs: what the agents say, what they are told, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from runner.cluster.inventory import Node
from runner.launch.blame import LATE, blame, error, standstill
from runner.launch.signals import Stop
from runner.launch.slurm.ledger import Ledger
from runner.launch.talk import Talk
from runner.node.protocol import ALIVE_S, POLL_S, SILENCE_S, STACKS_S, Line, Message, Outcome, Started, Word
from runner.plan.plan import Cell
from runner.results import records
from runner.results.celldir import LAUNCHER, holds_events
from runner.results.rundir import RunDir
from runner.system.clock import now

# A peer notices a dead rank at once, its own node's launcher a moment later: both are heard before
# anything is stopped, so that the guilty one can be told from its victims.
SETTLE_S = 2.0
# Once ranks have begun to measure, none of the workloads is silent for so long.
STALL_S = 600.0
_ASK = ("timed_out", "rank_hung")  # what is judged by where ranks are: they are asked before they are stopped
_NONE = Outcome()  # of an agent that gave none


@dataclass(frozen=True)
class Course:
    """What a transport may need to know of the run a cell belongs to, and whom it tells what it decides.

    `entry` is the cell's in status.json, `pending` are the cells of the job that it needs, this one first (none: it
    has one), and `ledger` has the job of each cell that has one.
    `on_placed` gets the nodes that Slurm chose and gives the cell as it is then planned.
    """

    entry: Mapping[str, Any]
    pending: Sequence[Cell]
    ledger: Ledger
    on_job: Callable[[Any], None]
    on_placed: Callable[[Sequence[Node]], Cell]


def read_outcomes(run: RunDir, cell: Cell) -> dict[str, Outcome]:
    """What every host of a cell left in its outcome.json, where that is whole."""
    found = {}
    for host, value in run.read_outcomes(cell.hosts, cell.id).items():
        with suppress(AttributeError, TypeError):
            found[host] = Outcome.from_json(value)
    return found


@dataclass
class CellRun:
    """One cell while it runs: hears the agents and decides what to tell them."""

    cell: Cell
    stop: Stop
    on_progress: Callable[[float, str], None]
    on_line: Callable[[str, str, str], None]
    on_look: Callable[[], None] = lambda: None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    talks: list[Talk] = field(default_factory=list)
    started: set[str] = field(default_factory=set)
    first_failure: float | None = None
    reason: str | None = None
    kind: str = "unknown"  # of the failure that `reason` tells
    reason_at: float = 0.0
    silent: str | None = None  # the node that was given up for its silence
    stall_s: float = STALL_S
    stepped: float | None = None  # when a rank last said something, since the first step
    deadline: float = 0.0
    looked: float = 0.0

    def begin(self, more_s: float = 0.0) -> None:
        """The cell's time starts now."""
        self.deadline = time.monotonic() + self.cell.params["timeout_s"] + more_s

    def hear(self, talk: Talk, message: Message) -> None:
        """Take in what an agent sends."""
        if isinstance(message, Started):
            self.started.add(talk.name)
        elif isinstance(message, Outcome):
            self.outcomes[talk.name] = message
            if not message.ended_well:
                self._failed()
        elif isinstance(message, Line):
            self.on_line(talk.name, message.file, message.line)
            if self.stepped:
                self.stepped = time.monotonic()
            if holds_events(message.file):
                for event in records.parse_jsonl(message.line):
                    if event.get("event") == "progress":
                        if event["done"] > 0:
                            self.stepped = time.monotonic()
                        self.on_progress(event["done"] / max(1, event["total"]), event["phase"])

    def _failed(self) -> None:
        self.first_failure = self.first_failure or time.monotonic()

    def word(self, talk: Talk) -> Word | None:
        """What to tell this agent now."""
        moment = time.monotonic()
        if moment - self.looked > POLL_S / 2:  # once for all agents of a round, not once for each
            self.looked = moment
            self._look_around(moment)
        if self.kind in _ASK and not self.stop.asked and moment - self.reason_at < STACKS_S:
            return Word.STACKS
        if self.reason or (self.first_failure and moment - self.first_failure > SETTLE_S):
            return Word.STOP
        if self.cell.launch.head:
            if talk.name == LAUNCHER:
                return Word.GO if self.started >= set(self.cell.hosts) else None
            if LAUNCHER in self.outcomes:
                return Word.DONE
        return None

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The live state of each node: starting, running, ended, failed or silent, and when it was last heard."""
        moment = time.monotonic()
        states = {}
        for talk in self.talks:
            if talk.name == LAUNCHER:
                continue
            if talk.name in self.outcomes:
                state = "ended" if self.outcomes[talk.name].ended_well else "failed"
            elif not talk.alive:
                state = "failed"
            elif moment - talk.heard > 2 * ALIVE_S:
                state = "silent"
            else:
                state = "running" if talk.name in self.started else "starting"
            states[talk.name] = {"state": state, "heard": now(moment - talk.heard)}
        return states

    def _look_around(self, moment: float) -> None:
        self.on_look()
        for talk in self.talks:
            if talk.rc is not None and talk.name not in self.outcomes:
                self._failed()
            elif talk.alive and moment - talk.heard > SILENCE_S:
                self.silent = self.silent or talk.name
                self._end("hung", f"{self.silent} has not answered for {SILENCE_S:g} s", moment)
        if moment > self.deadline:
            self._end("timed_out", f"not finished within its limit of {self.cell.params['timeout_s']:g} s", moment)
        if self.stepped and moment - self.stepped > self.stall_s:
            self._end("rank_hung", f"no rank has said anything for {self.stall_s:g} s", moment)
        if self.stop.asked:
            self._end("interrupted", "interrupted", moment)

    def _end(self, kind: str, reason: str, moment: float) -> None:
        """The first reason to end the cell counts."""
        if self.reason is None:
            self.kind, self.reason, self.reason_at = kind, reason, moment

    def state(self) -> tuple[str, dict[str, Any] | None]:
        """How the cell ended, and why if not well."""
        if self.talks and all(self.outcomes.get(talk.name, _NONE).ended_well for talk in self.talks):
            return "complete", None
        if self.stop.asked:
            return "cancelled", None
        if self.reason:
            silent = {t.name for t in self.talks if t.name not in self.outcomes} or {self.silent} - {None}
            if silent:  # an agent that does not even say how it ended
                return "incomplete", error("hung", self.reason, silent.pop() if len(silent) == 1 else None)
            return "incomplete", standstill(self.kind, self.reason, self.outcomes)
        found = blame(self.talks, self.outcomes)
        return "incomplete" if found["kind"] in LATE.values() else "failed", found
