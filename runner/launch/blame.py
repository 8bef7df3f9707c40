"""Why a cell failed and on which node, from the outcomes of all agents. Pure.

An error is {"kind", "message", "host", "stderr"}: `kind` is one of `KINDS`, `host` is None where no single
node can be named: a cause that cannot be determined is not assigned to a node. Where several nodes failed, it is the
first one's, and `also` has the errors of the others (`results.status.each_error`).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runner.cluster import reasons, xids
from runner.failures import KINDS, NODE, Problem
from runner.launch.spellings import COMPLAINT, kind_of, waited
from runner.launch.talk import AgentSession
from runner.launch.unstarted import Unstarted, unstarted
from runner.node import lastwords
from runner.node.protocol import LAST_WORDS, Outcome, RankEnd, Stopped, Word
from runner.results.celldir import LAUNCHER, rank_name
from runner.results.status import joined

# Clocks that differ by more make logs and time limits misleading; NTP keeps them within milliseconds.
CLOCK_OFF_S = 60.0


def error(kind: str, message: str, host: str | None = None, stderr: Sequence[str] = ()) -> dict[str, Any]:
    """The error of a cell in status.json."""
    return {"kind": kind, "message": message, "host": host, "stderr": list(stderr)}


def may_retry(found: Mapping[str, Any], continues: bool = False) -> bool:
    """Whether a retry may help: the infrastructure failed, and neither a user nor a configuration caused it; or the
    cell `continues` from a checkpoint, and gets further.
    """
    kind = KINDS.get(found.get("kind", ""))
    return kind is not None and (kind.retry or (continues and kind.continues))


def unusable(host: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """The error of a node that has `problems` (at least one): of the kind of the first one."""
    return error(problems[0].kind, "; ".join(problem.message for problem in problems), host)


def clock_problem(offset_s: float) -> Problem | None:
    """The problem of a node whose clock is `offset_s` ahead of the controller's; None up to CLOCK_OFF_S."""
    if abs(offset_s) <= CLOCK_OFF_S:
        return None
    side = "ahead of" if offset_s > 0 else "behind"
    return Problem("clock", f"its clock is {abs(offset_s):,.0f} s {side} the controller's")


def exit_code(outcomes: Mapping[str, Outcome]) -> int | None:
    """The exit code of a user's program: that of the rank that failed first, 0 where all of them have succeeded; None
    where none has ended.
    """
    ranks = [rank for outcome in outcomes.values() for rank in outcome.ranks.values()]
    failed = [rank for rank in ranks if rank.code]
    if failed:
        return min(failed, key=_when).code
    return 0 if ranks and all(rank.code == 0 for rank in ranks) else None


def _when(rank: RankEnd) -> tuple[bool, float]:
    """By what ranks whose programs failed are in order: what a launcher ended after another failed is no first one."""
    return rank.code == 128 + signal.SIGTERM, rank.ended_s


# Why an agent under Slurm ended its ranks without a controller, and the kind of that failure.
LATE: Mapping[str | None, str] = {Stopped.TIME_LIMIT: "time_limit", Stopped.TIMED_OUT: "timed_out"}
# Why an agent ended its ranks: these ranks have not failed.
_STOPPED_BY_AGENT = (*LAST_WORDS, *LATE)


def blame(
    sessions: Sequence[AgentSession], outcomes: Mapping[str, Outcome], aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The error of a cell some of whose ranks or agents failed: one for each host that failed first-hand.

    `aliases` has the host by each name that a launcher on this machine has for it, where that is another.

    A host whose ranks only report a lost peer is a victim, and is blamed for nothing while another host has failed.
    What no other try can change, and what fails alike on several hosts, is no fault of theirs: none is named.
    """
    suspects, victims = _told_apart(sessions, outcomes)
    if suspects:
        return _alike(suspects) or joined(suspects)
    if late := [o.stopped for o in outcomes.values() if o.stopped in LATE]:
        return hang_error(LATE[late[0]], str(late[0]), outcomes)
    if victims:
        names = ", ".join(one["host"] for one in victims)
        message = f"only lost peers were reported, by {names}; first: {victims[0]['message']}"
        return error(COMPLAINT, message, stderr=victims[0]["stderr"])
    launcher = outcomes.get(LAUNCHER, Outcome())
    if found := unstarted(launcher.engine_stderr):
        host = _by_its_name(found.host, {session.name: session.name for session in sessions} | dict(aliases or {}))
        where = f" ({found.host})" if found.host and not host else ""
        return error(found.kind, f"{found.message}{where}", host, lastwords.evidence(launcher.engine_stderr, None))
    death = _death(None, _status(launcher), launcher.engine_stderr)
    kind = "launcher_failed" if death.kind in (*_UNPROVED, COMPLAINT) else death.kind
    return error(kind, f"the launcher {death.how}", stderr=death.evidence)


def _by_its_name(name: str | None, hosts: Mapping[str, str]) -> str | None:
    """The host that a launcher means by `name`, with or without its domain; None if it is none of `hosts`."""
    return hosts.get(name or "", hosts.get((name or "").partition(".")[0]))


def _alike(suspects: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The one error of several hosts that fail alike for good; None if they do not."""
    own = (*_UNPROVED, "script_failed")
    texts = {(one["kind"], one["kind"] in own and re.sub(r"\d+", "", one["message"])) for one in suspects}
    if len(suspects) == 1 or len(texts) > 1 or may_retry(suspects[0]):
        return None
    names = ", ".join(one["host"] for one in suspects)
    message = f"failed at the same time on {names}; first: {suspects[0]['message']}"
    return error(suspects[0]["kind"], message, stderr=suspects[0]["stderr"])


def first_hand(
    sessions: Sequence[AgentSession], outcomes: Mapping[str, Outcome], but: Container[str] = ()
) -> list[dict[str, Any]]:
    """The errors of the hosts that failed first-hand, one for each, without the hosts in `but`."""
    return _told_apart(sessions, outcomes, but)[0]


def _told_apart(
    sessions: Sequence[AgentSession], outcomes: Mapping[str, Outcome], but: Container[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The errors of the hosts that failed first-hand, and of those that only lost a peer.

    A launcher on this machine that fails together with nodes is a victim of them, and so is a rank that fails in a
    collective without a reason. Where one launcher of MPI started all ranks and saw which one ended first, a host whose
    ranks tell nothing of themselves was ended by it.
    """
    seen = next((found for one in outcomes.values() if (found := _told_by_mpi(one))), {})
    root = next(iter(seen), None)
    away = any(root in one.ranks for one in outcomes.values())  # else it died before it had a file of its own
    suspects: list[dict[str, Any]] = []
    vague: list[dict[str, Any]] = []
    victims: list[dict[str, Any]] = []
    accusations: list[dict[str, Any]] = []  # of nodes that may not tell it themselves
    hosts = [session for session in sessions if session.name != LAUNCHER]
    for session in sessions:
        outcome = outcomes.get(session.name)
        if session.name in but:
            continue
        if outcome is None:
            suspects.append(_no_outcome(session))
        elif outcome.error:
            told = victims if outcome.kind == COMPLAINT else accusations if outcome.accused else suspects
            host = session.name if outcome.kind == COMPLAINT else outcome.accused or session.name
            told.append(error(outcome.kind or "unknown", outcome.error, host, outcome.engine_stderr))
        elif session.name != LAUNCHER and _failed(outcome, root):
            death = _failure(outcome, _seen_by_launcher(outcomes), alone=len(hosts) == 1, table=seen)
            if away and root not in outcome.ranks and death.quiet(root) and _rank_of(death.kind) != 0:
                continue
            told = victims if death.complains else vague if death.vague else suspects
            told.append(death.error(outcome.accused or session.name))
    themselves = {suspect["host"] for suspect in suspects}
    suspects += [one for one in accusations if one["host"] not in themselves and one["host"] not in but]
    of_nodes = [suspect for suspect in suspects if suspect["host"] != LAUNCHER]
    return of_nodes or vague or suspects, victims


def _failed(outcome: Outcome, root: str | None) -> bool:
    """Whether ranks of this node failed: others were ended by their agent. Where their launcher, elsewhere, saw `root`
    end first, that one's agent was told so, perhaps before it saw it itself; and so was that of a rank whose own words
    prove a failure, while the launcher has seen its victim first.
    """
    if outcome.ended_well or outcome.stopped not in _STOPPED_BY_AGENT:
        return not outcome.ended_well
    return root in outcome.ranks or (outcome.stopped == Word.DONE and _proves(outcome))


def _proves(outcome: Outcome) -> bool:
    """Whether the last words of a rank of this node are those of a failure of its own."""
    told = (ending for rank in outcome.ranks.values() for ending in lastwords.endings(rank.stderr))
    own = (ending for ending in told if ending.form < lastwords.Form.STOPPED)
    return any(_kind(None, ending, outcome.oom_kills) != COMPLAINT for ending in own)


def _no_outcome(session: AgentSession) -> dict[str, Any]:
    """The error of an agent that sent no outcome."""
    stderr = session.stderr[-10:]
    if not session.answered:
        kind = reasons.reason_kind(session.rc, session.stderr)
        if session.rc not in (None, *_OF_SSH):  # what ssh started there failed, not ssh
            said = [text for ending in lastwords.endings(session.stderr) for text in (ending.text, *ending.also)]
            kind = kind_of(said) or kind
        last = next((f": {line.strip()}" for line in reversed(stderr) if line.strip()), "")
        return error(kind, f"its agent did not answer{last}", session.name, stderr)
    if session.rc == reasons.GIVEN_UP:
        return error("hung", "it no longer answers", session.name, stderr)
    return error("lost_connection", "lost the connection to it", session.name, stderr)


# --- how a rank ended -----------------------------------------------------------------------------

# The status of ssh where it reached nothing, and that of a talk that was given up.
_OF_SSH = (255, reasons.GIVEN_UP)
# Kinds that tell nothing of the cause: another node's failure may have led to them.
_UNPROVED = ("rank_crashed", "unknown")
_COLLECTIVE = re.compile(r"\bNCCL (?:error|failure|communicator)|DistBackendError|ProcessGroup|\bgloo\b", re.IGNORECASE)
# Signals by which somebody ends a process; any other is the process's own fault.
_SENT = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What a signal says where the rank said nothing.
_SIGNS = {signal.SIGBUS: "bus error", signal.SIGILL: "illegal instruction"}


@dataclass(frozen=True)
class _Death:
    """How a rank ended, or the engine (`name` None): its status, what kind of failure that is, and its last words."""

    name: str | None
    status: int | None
    kind: str
    ending: lastwords.Ending | None
    evidence: Sequence[str]
    kernel: str = ""  # what the kernel said of a GPU that failed
    unstarted: Unstarted | None = None  # why a launcher of MPI started no rank
    program: bool = False  # whether what failed is a user's program

    @property
    def complains(self) -> bool:
        """Whether it only reports that it has lost others."""
        return self.kind == COMPLAINT

    @property
    def vague(self) -> bool:
        """Whether it failed in a collective, and does not tell why: any of its ranks may have been the cause."""
        return self.kind in _UNPROVED and bool(self.ending and _COLLECTIVE.search(self.ending.text))

    def quiet(self, root: str | None) -> bool:
        """Whether it tells nothing of the cause: its launcher ended it, or it said nothing of itself after `root`, the
        rank that its launcher saw fail first.
        """
        if self.name == root or self.status == -signal.SIGTERM:
            return self.name != root
        told = self.ending is not None and (root is None or self.ending.form < lastwords.Form.STOPPED)
        return self.status in (None, 1) and not told

    @property
    def how(self) -> str:
        """How it ended, for people, such as "died with status 1: ValueError: x"."""
        if self.unstarted:
            return f"started no rank: {self.unstarted.message}"
        if self.kind == "out_of_memory" and self.status in (None, -signal.SIGKILL):
            return "was killed by the kernel, which was out of memory"
        writer = f"{self.ending.writer}: " if self.ending and self.ending.writer else ""
        words = f": {writer}{self.ending.said}" if self.ending else ""
        if self.status is not None and self.status < 0:
            how = f"was killed by {signal.Signals(-self.status).name}"
            return how if -self.status in _SENT else how + words
        return ("ended too soon" if self.status in (0, None) else f"died with status {self.status}") + words

    def error(self, host: str) -> dict[str, Any]:
        """The error of a cell that this caused on `host`."""
        kernel = f"; the kernel: {self.kernel}" if self.kernel else ""
        kind = "script_failed" if self.program and self.kind in _UNPROVED else self.kind
        return error(kind, f"{self.name or 'the engine'} {self.how}{kernel}", host, self.evidence)


def _death(name: str | None, status: int | None, stderr: Sequence[str], oom_kills: int = 0) -> _Death:
    """How the process ended that wrote `stderr`; of several that wrote it, the one that proves most.

    Of those that prove as much, the first that failed: what others say after it may be its consequence, and the last
    line of one that did not fail says nothing.
    """
    found = unstarted(stderr) if name is None else None
    told = lastwords.endings(stderr)
    ending = min(told, key=lambda one: (_rank_of(_kind(status, one, oom_kills)), one.form), default=None)
    kind = found.kind if found else _kind(status, ending, oom_kills)
    return _Death(name, status, kind, ending, lastwords.evidence(stderr, ending), unstarted=found)


def _kind(status: int | None, ending: lastwords.Ending | None, oom_kills: int) -> str:
    """The kind of failure of a process that ended with `status` (None: unknown), and said `ending`."""
    if oom_kills and status in (-signal.SIGKILL, None):
        return "out_of_memory"
    if status is not None and -status in _SENT:
        return "rank_killed"
    texts = [] if ending is None else [ending.text, *ending.also]
    if status is not None and status < 0 and -status != signal.SIGABRT:
        # An exception does not end a process by a signal: what was said before was handled.
        texts = [text for text in texts if ending and ending.fatal] or [_SIGNS.get(signal.Signals(-status), "")]
    kind = kind_of(texts) or ("unknown" if status in (0, None) else "rank_crashed")
    return "out_of_memory" if oom_kills and kind == "rank_killed" else kind


def _rank_of(kind: str) -> int:
    """How much a kind proves, the most first: a failure of the node, another known one, a crash, a complaint."""
    if kind == COMPLAINT:
        return 3
    if kind in _UNPROVED:
        return 2
    return 0 if KINDS[kind].fault == NODE else 1


def _failure(outcome: Outcome, seen: int | None, alone: bool, table: Mapping[str, int]) -> _Death:
    """What failed on a node: a GPU of which the kernel says so, else what its first rank to die says.

    `alone`: no other node takes part, so no network can have lost one. `table` is what the launcher of all ranks saw.
    """
    death = _first_to_die(outcome, seen, table)
    if failed := xids.serious("\n".join(outcome.kernel)):
        told = ", ".join(f"{xid.name} on {xid.pci}" for xid in failed)
        kernel = f"{told}: {failed[0].text}" if failed[0].text else told
        return replace(death, kind="gpu_failed" if _rank_of(death.kind) else death.kind, kernel=kernel)
    if alone and death.complains:
        hung = bool(death.ending and waited(death.ending.text))
        return replace(death, kind="rank_hung" if hung else "rank_crashed")
    return death


def _first_to_die(outcome: Outcome, seen: int | None, told: Mapping[str, int]) -> _Death:
    """The rank that failed on its own on this node; the engine if it was killed or no rank started.

    What proves a failure of the node counts first, then the rank that torchrun saw fail first, then what a rank says of
    itself, then complaints about others.
    """
    dead = {name: rank for name, rank in outcome.ranks.items() if not rank.ended}
    if (outcome.rc or 0) < 0:  # the engine itself was killed; the output of its ranks came after
        return _death(None, _status(outcome), [], outcome.oom_kills)
    if not dead:
        status = _status(outcome)
        return _death(None, seen if status is None else status, outcome.engine_stderr, outcome.oom_kills)
    if failed := {name: rank for name, rank in dead.items() if rank.code}:
        name, rank = min(failed.items(), key=lambda one: _when(one[1]))
        return replace(_death(name, _signalled(rank.code or 0), rank.stderr, outcome.oom_kills), program=True)
    own = _table(outcome)
    table = {name: status for name, status in told.items() if name in outcome.ranks} or own
    root = next(iter(told or own), None)
    deaths = []
    for name, rank in dead.items():
        status = table.get(name) if table else outcome.rc
        death = _death(name, status, rank.stderr, outcome.oom_kills)
        if status is None and not table and not death.complains:
            death = _death(name, seen, rank.stderr, outcome.oom_kills)
        deaths.append(death)
    if root and root in own and root not in outcome.ranks:  # it died before it had a file of its own
        deaths.append(_death(root, table[root], outcome.engine_stderr, outcome.oom_kills))
    return min(deaths, key=lambda one: (one.quiet(root), _rank_of(one.kind) != 0, *_order(one, root)))


def _order(death: _Death, root: str | None) -> tuple[bool, bool, int]:
    return death.complains, death.name != root, _rank_of(death.kind)


# torchrun's table of ranks that failed; the one below the title "Root Cause" is the one that it saw first.
_FAILED = re.compile(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)
_SIGNALS = {int(number) for number in signal.Signals}
# Under DeepSpeed's launcher a node's agent does not see how a rank ends; pdsh does: its launcher there ends as the
# rank did, with 256 - N after signal N. 255 is ssh's own failure.
_EXITED = re.compile(r"^pdsh@\S+: \S+: ssh exited with exit code (2[2-4]\d|25[0-4])$", re.MULTILINE)


def _table(outcome: Outcome) -> dict[str, int]:
    """The status by rank of torchrun's table of failures, the first that failed first; empty without a table."""
    others, _, first = "\n".join(outcome.engine_stderr).partition("Root Cause")
    found = _FAILED.findall(first)[:1]
    if found:
        found += _FAILED.findall(others)
    return {rank_name(rank): _signalled(int(status)) for rank, status in found}


# What Open MPI says of the rank that it saw end first; the name of the program and the breaks of lines differ.
_NOTICED = re.compile(r"noticed that process rank (\d+) with PID \d+ on node \S+\s+exited\s+on\s+signal\s+(\d+)")
_DETECTED = re.compile(r"The first process to do so was:\s+Process name:\s*\[.*,(\d+)\]\s+Exit code:\s*(-?\d+)")
# srun names the tasks of a node that ended alike, the first to end first.
_TASKS = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (?:Exited with exit code (\d+)|(\w[\w ]*))", re.MULTILINE)
_BY_NAME = {signal.strsignal(number): -int(number) for number in signal.Signals}


def _told_by_mpi(outcome: Outcome) -> dict[str, int]:
    """The status by rank of what mpirun or srun saw of all ranks of a cell, the first that ended first; else empty."""
    text = "\n".join(outcome.engine_stderr)
    if found := _NOTICED.search(text):
        return {rank_name(found[1]): -int(found[2])}
    if found := _DETECTED.search(text):
        return {rank_name(found[1]): _signalled(int(found[2]))}
    seen: dict[str, int] = {}
    for tasks, code, name in _TASKS.findall(text):
        status = _signalled(int(code)) if code else _BY_NAME.get(name.strip())
        if status is not None:
            seen.update({rank_name(task): status for task in _numbers(tasks) if rank_name(task) not in seen})
    return seen


def _numbers(text: str) -> list[int]:
    """The numbers of Slurm's `0-2,5`."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return [number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)]


def _signalled(status: int) -> int:
    """A process's status; that of a shell, 128 + N, as Python has it after signal N."""
    return 128 - status if status - 128 in _SIGNALS else status


def _seen_by_launcher(outcomes: Mapping[str, Outcome]) -> int | None:
    """The status of the only rank that a signal ended under DeepSpeed's launcher; None if there is no such rank."""
    found = _EXITED.findall("\n".join(outcomes.get(LAUNCHER, Outcome()).engine_stderr))
    return int(found[0]) - 256 if len(found) == 1 else None


def _status(outcome: Outcome) -> int | None:
    """How the first rank to die ended: torchrun reports its own status as 1 and the rank's in its table."""
    if table := _table(outcome):
        return next(iter(table.values()))
    return None if outcome.rc is None else _signalled(outcome.rc)


# --- ranks that hang ------------------------------------------------------------------------------

# The innermost frame of a rank that waits for others: in a collective, or for a device on which one may be running.
# Frames of the workloads count as well: nothing else in them takes long without another frame.
_WAITING = ("torch/distributed/", "torch/cuda/", "torch/autograd/", "deepspeed/comm/", "runner/workloads/")
# Where ranks wait for each other only, or for a program that does: while one does, another that waits for its device,
# or whose program stands still, waits for no other rank.
_MEETING = ("runner/workloads/gpu/meeting.py", "runner/workloads/nccl/computing.py")
_STATES = {"T": "is stopped", "t": "is stopped by a debugger", "D": "waits in the kernel", "Z": "is dead"}


def hang_error(kind: str, reason: str, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The error of a cell that was stopped for `reason` while its ranks were alive, from their stacks.

    Ranks that wait for others are victims. A rank that cannot run, or that is elsewhere while others wait, is a
    suspect; if all suspects are on one host, a rank hung there. Otherwise the error is of `kind`.
    """
    stuck: list[tuple[str, str, list[str]]] = []
    busy: list[tuple[str, str, list[str]]] = []
    waiting: list[str] = []
    innermost = [rank.frames[0] for outcome in outcomes.values() for rank in outcome.stacks.values() if rank.frames]
    waits: tuple[str, ...] = _MEETING if any(frame.startswith(_MEETING) for frame in innermost) else _WAITING
    for host, outcome in outcomes.items():
        for name, rank in outcome.stacks.items():
            frames = list(rank.frames)
            if rank.state in _STATES:
                stuck.append((host, f"{name} {_STATES[rank.state]}", frames))
            elif not frames:
                stuck.append((host, f"{name} is alive but gives no stack", frames))
            elif frames[0].startswith(waits):
                waiting.append(f"{name} in {frames[0]}")
            else:
                busy.append((host, f"{name} is in {frames[0]}", frames))
    suspects = stuck + (busy if waiting else [])
    if len({host for host, _, _ in suspects}) != 1:
        return error(kind, reason)
    host, first, frames = suspects[0]
    wait = "waits" if len(waiting) == 1 else "wait"
    others = f", while {len(waiting)} {wait} for others (first: {waiting[0]})" if waiting else ""
    return error("rank_hung", f"{reason}: {first}{others}", host, frames)
