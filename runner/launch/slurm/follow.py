"""Follows a job to its end: waits while it is in the queue, then reads its agents' messages.

Slurm is queried in threads with growing pauses, so that nothing blocks. Messages are read from the files that agents
write, so that a controller which starts later receives all of them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar

from runner.cluster.inventory import Node
from runner.errors import InfrastructureError
from runner.failures import Problem
from runner.launch import copy
from runner.launch.slurm import answers, job_log
from runner.launch.slurm.answers import JobInfo
from runner.launch.slurm.commands import NotStarted, SlurmClient, SlurmUnreachable, forgotten, gone, intervals
from runner.launch.slurm.waiting import Wait, judge
from runner.launch.talk import AgentSession
from runner.node.protocol import POLL_S, SILENCE_S, Alive, Message, Outcome, Placed, Word, read_message, slurm_signal
from runner.results.celldir import CellDir
from runner.system import process
from runner.system.files import write_text_atomic

FIRST_MESSAGE_S = 120.0  # Python on a cold file system, and directories that NFS caches for a minute
END_S = 20.0  # from the agents' outcomes, or scancel, to the job's end
ENDING_S = 40.0  # Slurm's KillWait is 30 s: what ends for longer waits for a node that does not answer
FIRST_END_S = 10.0  # where no agent has sent a message: srun has ended by then, since the job's script has
LAG_S = 3.0  # until the last message written on a node is visible through NFS
FETCH_S = 60.0
FETCH_LONGEST_S = 10.0  # between copies: an agent without messages for SILENCE_S counts as lost
SILENT_PAUSE_S = 2.0
READ_S = 0.002  # per agent's file: five hundred files are read once a second, not ten times
AT_ONCE = 4 << 20
LOG_LINES = 20
LOG_READ_LINES = 2000
LOG_S = 1.0  # between two looks at the job's output
CANCEL = "cancel"  # sent to Slurm only, after the words to the agents
T = TypeVar("T")


class _Repeated(Generic[T]):
    """Calls `action` in a thread repeatedly, with growing pauses up to `longest_s`, so that nothing blocks."""

    def __init__(self, pool: ThreadPoolExecutor, action: Callable[[], T], longest_s: float = 15.0) -> None:
        self._pool, self._action, self._longest_s = pool, action, longest_s
        self._future: Future[T] | None = None
        self.soon()

    def soon(self) -> None:
        """Call it again now, and restart the pauses."""
        self._pauses, self._due = intervals(longest_s=self._longest_s), 0.0

    def take(self) -> T | None:
        """The newest result, once; None in between. Raises what the action raised."""
        if self._future is None:
            if time.monotonic() >= self._due:
                self._future = self._pool.submit(self._action)
            return None
        if not self._future.done():
            return None
        future, self._future = self._future, None
        self._due = time.monotonic() + next(self._pauses)
        return future.result()

    def once_more(self) -> T:
        """The result of a new call; blocks until it returns."""
        if self._future is not None:
            wait_for([self._future])
        return self._action()


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for commands; however the context ends, no command is left running."""
    pool = ThreadPoolExecutor(2)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        process.stop_running()
        pool.shutdown()


def wait(
    commands: SlurmClient, job_id: str, on_wait: Callable[[JobInfo], None], stopped: Callable[[], bool] = lambda: False
) -> JobInfo:
    """Wait until the job runs, or has ended, or Slurm has forgotten it; `on_wait` receives each state
    meanwhile.

    Once `stopped` returns True, it cancels the job (the whole array of a task) and returns its state then. Raises
    NotStarted, with the reason, for a job that it cancelled: one that can never start, at once; one that waits for
    somebody to act, after settings.stuck_s; any, after settings.wait_s. Raises SlurmUnreachable.
    """
    settings = commands.settings
    several = "," in (settings.partition or "")

    def ask() -> tuple[JobInfo, Wait, str | None]:
        info = commands.poll([job_id])[job_id]
        if info.state != "waiting":
            return info, Wait.TIME, None
        wait, why = judge(info.reason, several=several)
        stays = False
        with suppress(SlurmUnreachable):
            info = replace(info, position=commands.position(job_id))
            if wait is Wait.OWN:
                stays = not commands.others_run(job_id)
            elif wait is Wait.NODES:
                stays = bool(commands.out_of_service(job_id))
        if wait in (Wait.OWN, Wait.NODES):
            wait, why = (Wait.SOMEBODY, why) if stays else (Wait.TIME, None)
        bound = f"; cancelled after {settings.stuck_s:g} s of this (slurm.stuck_s)" if wait is Wait.SOMEBODY else ""
        return replace(info, advice=why and f"{why}{bound}"), wait, why

    began = answered = time.monotonic()
    stuck, before, given_up = None, None, None
    with cancelled_on_interrupt(commands, job_id), _threads() as pool:
        look = _Repeated(pool, ask)
        while not stopped():
            time.sleep(POLL_S)
            now = time.monotonic()
            try:
                answer = look.take()
            except SlurmUnreachable:
                if now - answered > commands.patience_s:
                    raise
                continue
            if answer is None:
                continue
            info, wait, why = answer
            if info.state in ("running", "ending") or gone(info):
                return info
            answered = now
            on_wait(info)
            if (info.raw, info.reason) != before:
                before = (info.raw, info.reason)
                look.soon()
            if wait is Wait.TIME:
                stuck = None
            elif stuck is None:  # slurmctld may say so for a moment: it is asked once more in any case
                stuck = now
            elif wait is Wait.NEVER or now - stuck >= settings.stuck_s:
                given_up = why
            if given_up is None and settings.wait_s and now - began >= settings.wait_s:
                given_up = f"its reason is {info.reason or 'not given'}; allow it longer with slurm.wait_s"
            if given_up:
                break
        commands.cancel(job_id if given_up else answers.whole(job_id))
    if given_up:
        waited_s = time.monotonic() - began
        raise NotStarted(f"job {job_id} waited {waited_s:.0f} s and was cancelled: {given_up}")
    return commands.poll([job_id])[job_id]


@contextmanager
def cancelled_on_interrupt(commands: SlurmClient, job_id: str) -> Iterator[None]:
    """Cancel the job if KeyboardInterrupt leaves the context and Slurm answers; for an exit without waiting."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(InfrastructureError):
            commands.cancel(answers.whole(job_id), patient=False)
        raise


# --- while it runs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Follow:
    """One cell of a job that is to be followed.

    `folders` are the cell's folders here, by host (the sessions' names), `names` Slurm's names of these hosts. `source`
    is its folder on each of `nodes` if those do not see this machine's files (None: they do). `step` is the cell's
    number in a job of several, `cell` its id. `log` is the job's output here; if that must be fetched, `log_on` has
    the node on which it is, and its path there.
    """

    slurm: SlurmClient
    job_id: str
    folders: Mapping[str, CellDir]
    step: int | None = None
    cell: str = ""
    source: str | None = None
    nodes: Sequence[Node] = ()
    ssh_config: str | None = None
    log: Path | None = None
    log_on: tuple[Node, str] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    on_job: Callable[[JobInfo], None] = lambda info: None
    lag_s: float = LAG_S

    def look(self) -> tuple[JobInfo, set[int]]:
        """The job's state, and its running steps if the cell is one of several. Raises SlurmUnreachable."""
        info = self.slurm.poll([self.job_id])[self.job_id]
        running = self.step is not None and info.state == "running"
        return info, self.slurm.steps(self.job_id) if running else set()

    def fetch(self) -> dict[str, Problem]:
        """Copy the cell's files from the nodes; returns failures by node, which are no error here."""
        targets = {name: str(folder.path) for name, folder in self.folders.items()}
        self.fetch_log()
        return copy.gather(self.nodes, str(self.ssh_config), str(self.source), targets, timeout_s=FETCH_S)

    def fetch_log(self) -> None:
        """Copy the end of the job's output here, if it is on a node and can be had."""
        if self.log is None or self.log_on is None:
            return
        node, path = self.log_on
        with suppress(InfrastructureError, OSError):
            command = ["ssh", "-F", str(self.ssh_config), node.name, shlex.join(["tail", "--bytes=1M", path])]
            outcome = process.run(command, timeout_s=20)
            if outcome.rc == 0:
                write_text_atomic(self.log, outcome.stdout)


class _MessageReader:
    """Reads the messages of one agent, while its file grows or is replaced by a longer copy."""

    def __init__(self, path: Path, job_id: str) -> None:
        self._path, self._job_id, self._offset = path, job_id, 0

    def messages(self) -> list[Message]:
        """The new messages; none of an earlier job in the same folder."""
        try:
            with open(self._path, "rb") as file:
                first = read_message(file.readline())
                if not (isinstance(first, Placed) and first.job == self._job_id):
                    return []
                file.seek(self._offset)
                data = file.read(AT_ONCE)
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        # A node that dies leaves blocks of zeros in its last line.
        return [message for line in whole.splitlines() if (message := read_message(line))]


def converse(
    follow: Follow,
    sessions: Sequence[AgentSession],
    on_message: Callable[[AgentSession, Message], None],
    next_word: Callable[[AgentSession], str | None] = lambda session: None,
    patience_s: float = 20.0,
) -> JobInfo:
    """Receive messages of a cell's agents until all have ended or its job has; returns the job's last known state.

    As `talk.converse`: `next_word(session)` is called every POLL_S. The first "stop" is sent to all agents as a signal
    of Slurm; after another `patience_s` the job (or step) is cancelled. A session's `rc` is 0 or 1 by the agent's
    outcome, -1 without one, with the end of the job's log as its `stderr`. Raises SlurmUnreachable if neither Slurm nor
    any agent answers any more.
    """
    for folder in follow.folders.values():
        folder.create()
    with cancelled_on_interrupt(follow.slurm, follow.job_id), _threads() as pool:
        return _Following(follow, sessions, on_message, next_word, patience_s).run(pool)


class _Job(Enum):
    """The state of the job, or of the cell's step in it."""

    OPEN = "it waits or runs"
    ENDING = "Slurm is ending it"
    OVER = "it has ended"


class _Agents(Enum):
    RUNNING = "at least one has not sent its outcome"
    ENDED = "all have"


class _Stop(Enum):
    NOT_ASKED = "the cell continues"
    ASKED = "its agents were asked to end"


class _Since(Generic[T]):
    """A state, and the monotonic time in s at which it began."""

    def __init__(self, state: T) -> None:
        self.state, self.since = state, time.monotonic()

    def enter(self, state: T, now: float) -> None:
        if state is not self.state:
            self.state, self.since = state, now

    def seconds(self, state: T, now: float) -> float | None:
        """How long it has been in this state, in s; None if it is in another."""
        return now - self.since if self.state is state else None


class _Following:
    """Follows one cell of a job until its agents and its job have ended."""

    def __init__(
        self,
        follow: Follow,
        sessions: Sequence[AgentSession],
        on_message: Callable[[AgentSession, Message], None],
        next_word: Callable[[AgentSession], str | None],
        patience_s: float,
    ) -> None:
        self.follow, self.sessions, self.on_message, self.next_word = follow, sessions, on_message, next_word
        self.patience_s = patience_s
        self.readers = [
            (session, _MessageReader(follow.folders[session.name].messages, follow.job_id)) for session in sessions
        ]
        self.info = forgotten(follow.job_id)
        self.step_seen = False  # running, in Slurm's list of steps
        self.job, self.agents, self.stop = _Since(_Job.OPEN), _Since(_Agents.RUNNING), _Since(_Stop.NOT_ASKED)
        self.sent = ""  # the last word sent through Slurm
        self.began = self.last_message = time.monotonic()
        self.send_from = self.read_from = self.log_from = 0.0  # nothing is sent, no file read, before these times
        self.unstarted: dict[str, float] = {}  # when the job's output was first seen to say so

    def run(self, pool: ThreadPoolExecutor) -> JobInfo:
        follow = self.follow
        look = _Repeated(pool, follow.look)
        fetch = _Repeated(pool, follow.fetch, longest_s=FETCH_LONGEST_S) if follow.source else None
        while True:
            time.sleep(POLL_S)
            now = time.monotonic()
            if fetch:
                fetch.take()
            if now >= self.read_from:
                self._read(now)
            self._unstarted(now)
            self._look(look, now)
            if self.job.state is _Job.OVER and fetch:  # their last messages are not here yet
                fetch.once_more()
                while self._read(now):
                    pass
            alive = [session for session in self.sessions if session.alive]
            if self._all_received(now, alive, fetched=fetch is not None):
                return self._end(alive)
            if alive:
                self._send(alive, now)
            elif follow.step is not None:  # the job continues without this cell
                return self.info
            elif self.agents.state is _Agents.RUNNING:
                self.agents.enter(_Agents.ENDED, now)
                look.soon()
            if self.sent == CANCEL and self._unresponsive(alive, now):  # Slurm continues to end it
                return self._end(alive)
            if self._overdue(now):
                self._end(alive)
                try:
                    self._cancel()
                except SlurmUnreachable:
                    if alive:  # they were not notified, so they continue
                        raise
                return self.info

    def _all_received(self, now: float, alive: Sequence[AgentSession], fetched: bool) -> bool:
        """Whether the job has ended and no message can arrive any more, not even late through NFS."""
        if self.job.state is not _Job.OVER:
            return False
        return not alive or fetched or now - max(self.job.since, self.last_message) > self.follow.lag_s

    def _overdue(self, now: float) -> bool:
        """Whether agents have not ended in time, or the job has not after them."""
        asked_s, ended_s = self.stop.seconds(_Stop.ASKED, now), self.agents.seconds(_Agents.ENDED, now)
        given_up = asked_s is not None and asked_s > self.patience_s + END_S
        return given_up or (ended_s is not None and ended_s > END_S)

    def _read(self, now: float) -> bool:
        """Pass on new messages; returns whether there were any."""
        self.read_from, received = now + READ_S * len(self.readers), False
        for session, reader in self.readers:
            for message in reader.messages() if session.alive else []:
                session.answered, session.last_output, self.last_message, received = True, now, now, True
                if isinstance(message, Outcome):
                    session.rc = 0 if message.ended_well else 1
                if not isinstance(message, Alive):
                    self.on_message(session, message)
            if not session.answered and now - self.began < FIRST_MESSAGE_S:
                session.last_output = now
        return received

    def _unstarted(self, now: float) -> None:
        """Give up agents that could not be started, as the job's output says, some seconds after it does.

        Otherwise only their silence would tell, two minutes later, and the other nodes would wait for them.
        """
        waits = [session for session in self.sessions if session.alive and not session.answered]
        if not waits or now < self.log_from:
            return
        self.log_from = now + LOG_S
        lines = last_lines(self.follow.log)
        found = job_log.unstarted(lines if self.follow.step is None else job_log.of_cell(lines, self.follow.cell))
        for session in waits:
            unstarted = found.get(self.follow.names.get(session.name, session.name))
            if unstarted and now - self.unstarted.setdefault(session.name, now) > self.follow.lag_s:
                session.rc = -1
                session.stderr.append(unstarted.why)

    def _look(self, look: _Repeated[tuple[JobInfo, set[int]]], now: float) -> None:
        """Process Slurm's newest answer, if any. Raises SlurmUnreachable if neither Slurm nor any agent answers."""
        try:
            seen = look.take()
        except SlurmUnreachable:
            if now - self.last_message > SILENCE_S:
                raise
            return
        if seen is None:
            return
        info, steps = seen
        if info != self.info:
            self.info = info
            self.follow.on_job(info)
            look.soon()
        step = self.follow.step
        self.step_seen = self.step_seen or step in steps
        passed = step is not None and (any(other > step for other in steps) or (self.step_seen and step not in steps))
        if self.job.state is not _Job.OVER:
            self.job.enter(_Job.ENDING if info.state == "ending" else _Job.OPEN, now)
            ending_s = self.job.seconds(_Job.ENDING, now)
            patience_s = ENDING_S if any(session.answered for session in self.sessions) else FIRST_END_S
            # Its start has failed, and Slurm has put it back into the queue, where it is held.
            held = info.state == "waiting" and judge(info.reason)[0] in (Wait.NEVER, Wait.SOMEBODY)
            if passed or held or gone(info) or (ending_s is not None and ending_s > patience_s):
                self.job.enter(_Job.OVER, now)

    def _send(self, alive: Sequence[AgentSession], now: float) -> None:
        """Send the next word. Slurm's signals reach all agents of a step, so a word for one is sent to all."""
        for session in alive:
            session.last_word = self.next_word(session) or session.last_word
        words = {session.last_word for session in alive}
        if Word.STOP in words:
            self.stop.enter(_Stop.ASKED, now)
        asked_s = self.stop.seconds(_Stop.ASKED, now)
        if asked_s is not None:
            next_sent = CANCEL if asked_s > self.patience_s or self._unresponsive(alive, now) else Word.STOP
        else:
            next_sent = Word.STACKS if Word.STACKS in words else ""
        if next_sent and next_sent != self.sent and now >= self.send_from:
            try:
                self._cancel(None if next_sent == CANCEL else slurm_signal(Word(next_sent)))
                self.sent = next_sent
            except SlurmUnreachable:
                self.send_from = now + SILENT_PAUSE_S

    def _unresponsive(self, alive: Sequence[AgentSession], now: float) -> bool:
        """Whether all agents left have sent nothing for SILENCE_S: waiting for them is useless."""
        return bool(alive) and all(now - session.last_output > SILENCE_S for session in alive)

    def _cancel(self, signal: str | None = None) -> None:
        self.follow.slurm.cancel(self.follow.job_id, signal, self.follow.step, patient=False)

    def _end(self, alive: Sequence[AgentSession]) -> JobInfo:
        """Mark the remaining agents as lost; the end of the job's log may say why. A job that is held is cancelled."""
        last = last_lines(self.follow.log)
        for session in alive:
            session.rc = -1
            session.stderr += last[-LOG_LINES:]
        if self.info.state == "waiting":
            with suppress(InfrastructureError):
                self._cancel()
        return self.info


def last_lines(log: Path | None) -> list[str]:
    """The last lines of a job's output, in which srun and Slurm report why a step did not start."""
    if log is None:
        return []
    with suppress(OSError):
        return log.read_text(errors="replace").splitlines()[-LOG_READ_LINES:]
    return []
