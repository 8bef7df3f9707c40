"""One cell while it runs: messages from its agents, words to them, and how it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from runner.cluster.inventory import Node
from runner.launch.blame import LATE, blame, error, first_hand, hang_error
from runner.launch.signals import Stop
from runner.launch.slurm.ledger import Ledger
from runner.launch.supply import Supply
from runner.launch.talk import AgentSession
from runner.node.protocol import ALIVE_S, POLL_S, SILENCE_S, STACKS_S, Line, Message, Outcome, Started, Word
from runner.plan.plan import Cell
from runner.results import records
from runner.results.celldir import LAUNCHER, holds_events
from runner.results.rundir import RunDir
from runner.results.status import each_error, joined
from runner.system.clock import now
from runner.workloads.registry import SILENT_S

# A peer notices a dead rank at once, the launcher on its own node a moment later: both are received before
# anything is stopped, so that the cause can be distinguished from its victims.
SETTLE_S = 2.0
_ASK = ("timed_out", "rank_hung")  # judged by the stacks of ranks, which are read before the ranks are stopped
_NONE = Outcome()  # of an agent that sent none


@dataclass(frozen=True)
class CellContext:
    """What a transport may need to know about the run of a cell, and the callbacks for its decisions.

    `entry` is the cell's entry in status.json. `pending` are the cells of the job to submit, this one first (empty: it
    has a job), and `ledger` has the job of each cell that has one. `on_job` is notified of each state of the job;
    `on_placed` receives the nodes that Slurm chose and returns the cell planned on them. `behind` are the cells of a
    chain that are to run after this one, in order, and `record` writes the ledger into the run directory.
    """

    entry: Mapping[str, Any]
    pending: Sequence[Cell]
    ledger: Ledger
    on_job: Callable[[Any], None]
    on_placed: Callable[[Sequence[Node]], Cell]
    behind: Sequence[Cell] = ()
    record: Callable[[], None] = lambda: None


def read_outcomes(run: RunDir, cell: Cell) -> dict[str, Outcome]:
    """The outcomes by host, from each complete outcome.json of a cell."""
    found = {}
    for host, value in run.read_outcomes(cell.hosts, cell.id).items():
        with suppress(AttributeError, TypeError):
            found[host] = Outcome.from_json(value)
    return found


@dataclass
class CellRun:
    """One cell while it runs: receives messages of its agents and decides what is sent to them.

    `on_progress` gets the fraction (0-1), the phase, and for people what is done and what came of it; `on_notice` host
    and text of what the user is to know at once; `on_line` host, file and line, `on_failure` the error of a node
    as soon as it is known, while the others are still being stopped. Ranks are held until `supply` is done (None: what
    they need is there): only then the time limit begins. Times are monotonic, in s.
    """

    cell: Cell
    stop: Stop
    on_progress: Callable[[float, str, str, str], None]
    on_line: Callable[[str, str, str], None]
    on_look: Callable[[], None] = lambda: None
    on_failure: Callable[[Mapping[str, Any]], None] = lambda error: None
    supply: Supply | None = None
    on_notice: Callable[[str, str], None] = lambda host, text: None
    released: bool = False  # its ranks may use the data
    before_release: tuple[float, str, str, str] | None = None  # the last progress of held ranks
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    sessions: list[AgentSession] = field(default_factory=list)
    started: set[str] = field(default_factory=set)
    first_failure: float | None = None
    reason: str | None = None
    kind: str = "unknown"  # of the failure that `reason` describes
    reason_at: float = 0.0
    silent: set[str] = field(default_factory=set)  # nodes that were given up since nothing was received from them
    told: set[str | None] = field(default_factory=set)  # the hosts whose errors `on_failure` was notified of
    stall_s: float = SILENT_S  # without output of any rank after the first unit of work: they hang
    stepped: float | None = None  # monotonic time of the last output of a rank, since the first step
    deadline: float = 0.0
    looked: float = 0.0

    def begin(self, more_s: float = 0.0) -> None:
        """Start the cell's time limit, `more_s` longer than planned; of a held one there is none yet."""
        limit_s = self.cell.params["timeout_s"]
        limit_s = math.inf if self.held or limit_s is None else limit_s + more_s
        self.deadline = time.monotonic() + limit_s

    @property
    def held(self) -> bool:
        """Whether its ranks wait for data before they go on."""
        return self.supply is not None and not self.released

    def receive(self, session: AgentSession, message: Message) -> None:
        """Process a message from an agent."""
        if isinstance(message, Started):
            self.started.add(session.name)
        elif isinstance(message, Outcome):
            self.outcomes[session.name] = message
            if not message.ended_well:
                self._failed()
        elif isinstance(message, Line):
            self.on_line(session.name, message.file, message.line)
            if self.stepped:
                self.stepped = time.monotonic()
            if holds_events(message.file):
                for event in records.parse_jsonl(message.line):
                    if event.get("event") == "notice":
                        self.on_notice(session.name, event["text"])
                    if event.get("event") == "progress":
                        if event["done"] > 0:
                            self.stepped = time.monotonic()
                        texts = event.get("detail", ""), event.get("result", "")
                        progress = event["done"] / max(1, event["total"]), event["phase"], *texts
                        if self.held:
                            self.before_release = progress
                        else:
                            self.on_progress(*progress)

    def _release(self) -> None:
        """The data are there: what ranks do from now on is the cell's own."""
        self.released = True
        self.begin()
        if self.before_release:
            self.on_progress(*self.before_release)

    def _failed(self) -> None:
        self.first_failure = self.first_failure or time.monotonic()

    def next_word(self, session: AgentSession) -> Word | None:
        """The word to send to this agent now, or None."""
        moment = time.monotonic()
        if moment - self.looked > POLL_S / 2:  # once for all agents of a round, not once for each
            self.looked = moment
            self._look_around(moment)
        if self.kind in _ASK and not self.stop.asked and moment - self.reason_at < STACKS_S:
            return Word.STACKS
        if self.reason or (self.first_failure and moment - self.first_failure > SETTLE_S):
            return Word.STOP
        if self.cell.launch.head:
            if session.name == LAUNCHER:
                return Word.GO if self.started >= set(self.cell.hosts) else None
            if LAUNCHER in self.outcomes:
                return Word.DONE
        return Word.GO if self.released and session.name != LAUNCHER else None

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The state of each node: starting, running, ended, failed or silent; `heard` is when its last output came."""
        moment = time.monotonic()
        states = {}
        for session in self.sessions:
            if session.name == LAUNCHER:
                continue
            if session.name in self.outcomes:
                state = "ended" if self.outcomes[session.name].ended_well else "failed"
            elif not session.alive:
                state = "failed"
            elif moment - session.last_output > 2 * ALIVE_S:
                state = "silent"
            else:
                state = "running" if session.name in self.started else "starting"
            states[session.name] = {"state": state, "heard": now(moment - session.last_output)}
        return states

    def _look_around(self, moment: float) -> None:
        self.on_look()
        if self.supply and self.held and self.supply.done and not self.first_failure:
            if self.supply.failed:
                self._end("unknown", "it has no data", moment)
            else:
                self._release()
        for session in self.sessions:
            if session.rc is not None and session.name not in self.outcomes:
                self._failed()
            elif session.alive and moment - session.last_output > SILENCE_S:
                self.silent.add(session.name)
                self._tell(_silent(session.name))
                self._end("hung", _silent(session.name)["message"], moment)
        if self.first_failure and moment - self.first_failure > SETTLE_S:
            for found in self._failures_so_far():
                self._tell(found)
        if moment > self.deadline:
            self._end("timed_out", f"not finished within its limit of {self.cell.params['timeout_s']:g} s", moment)
        if self.stepped and moment - self.stepped > self.stall_s:
            self._end("rank_hung", f"no output from any rank for {self.stall_s:g} s", moment)
        if self.stop.asked:
            self._end("interrupted", "interrupted", moment)

    def _failures_so_far(self) -> list[dict[str, Any]]:
        """The errors that are known while some agents still run, of which a silent one ends half a minute later."""
        over = [session for session in self.sessions if session.name in self.outcomes or not session.alive]
        if all(self.outcomes.get(session.name, _NONE).ended_well for session in over):
            return []
        return each_error(blame(over, self.outcomes, self._names()))

    def _names(self) -> dict[str, str]:
        """The host by its name in the launcher's file of hosts, which are in the order of the cell's."""
        lines = self.cell.launch.files.get("hostfile", "").splitlines()
        return {line.split()[0]: host for line, host in zip(lines, self.cell.hosts, strict=False)}

    def _tell(self, found: Mapping[str, Any]) -> None:
        """Notify of the error of a host, once."""
        if found["host"] not in self.told and not self.stop.asked:
            self.told.add(found["host"])
            self.on_failure(found)

    def _end(self, kind: str, reason: str, moment: float) -> None:
        """End the cell for `reason`; the first reason counts."""
        if self.reason is None:
            self.kind, self.reason, self.reason_at = kind, reason, moment

    def state(self) -> tuple[str, dict[str, Any] | None]:
        """How the cell ended (complete, failed, incomplete or cancelled), and its error, None if there is none."""
        if self.sessions and all(self.outcomes.get(session.name, _NONE).ended_well for session in self.sessions):
            return "complete", None
        if self.stop.asked:
            return "cancelled", None
        if self.reason:
            silent = [_silent(session.name) for session in self.sessions if session.name in self.silent]
            failed = [*silent, *first_hand(self.sessions, self.outcomes, but=self.silent)]
            return "incomplete", joined(failed) if failed else hang_error(self.kind, self.reason, self.outcomes)
        found = blame(self.sessions, self.outcomes, self._names())
        return "incomplete" if found["kind"] in LATE.values() else "failed", found


def _silent(host: str) -> dict[str, Any]:
    """The error of a node from which nothing was received."""
    return error("hung", f"{host} has not answered for {SILENCE_S:g} s", host)
