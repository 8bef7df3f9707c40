"""A job followed to its end: waited for while it is in the queue, heard while it runs.

Slurm is asked in threads and ever more seldom, so that nobody waits for it. What agents say is read from the files that
they write, so that a controller which comes later hears all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar

from runner.cluster.inventory import Node
from runner.errors import InfrastructureError
from runner.launch import copy
from runner.launch.slurm import answers
from runner.launch.slurm.answers import JobInfo
from runner.launch.slurm.commands import NotStarted, Silent, SlurmClient, forgotten, gone, intervals
from runner.launch.talk import Talk
from runner.node.protocol import POLL_S, SILENCE_S, Alive, Message, Outcome, Placed, Word, read_message, slurm_signal
from runner.results.celldir import CellDir
from runner.system import process

FIRST_WORD_S = 120.0  # Python on a cold file system, and directories that NFS caches for a minute
END_S = 20.0  # from the agents' outcomes, or scancel, to the job's end
ENDING_S = 40.0  # Slurm's KillWait is 30 s: what ends for longer waits for a node that does not answer
FIRST_END_S = 10.0  # where no agent has said a word: srun has ended by then, since the job's script has
LAG_S = 3.0  # until the last words written on a node are seen through NFS
FETCH_S = 60.0
FETCH_LONGEST_S = 10.0  # between copies: an agent that is not heard for SILENCE_S counts as lost
SILENT_PAUSE_S = 2.0
HEAR_S = 0.002  # spent on each agent's file: five hundred are asked once a second, not ten times
AT_ONCE = 4 << 20
LOG_LINES = 20
CANCEL = "cancel"  # what is told to Slurm alone, after the words to the agents
T = TypeVar("T")


class _Repeated(Generic[T]):
    """Calls `action` in a thread, again and again with growing pauses, so that nobody waits for Slurm."""

    def __init__(self, pool: ThreadPoolExecutor, action: Callable[[], T], longest_s: float = 15.0) -> None:
        self._pool, self._action, self._longest_s = pool, action, longest_s
        self._future: Future[T] | None = None
        self.soon()

    def soon(self) -> None:
        """Ask again now, and often at first."""
        self._pauses, self._due = intervals(longest_s=self._longest_s), 0.0

    def take(self) -> T | None:
        """The newest answer, once; None in between. Raises what the action raised."""
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
        """The answer to a question that is asked now; waits for it."""
        if self._future is not None:
            wait_for([self._future])
        return self._action()


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for commands; however this is left, no command stays behind."""
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
    """Wait until the job runs, or has ended, or Slurm has forgotten it; `on_wait` hears each answer meanwhile.

    Once `stopped`, it cancels the job, of a task the whole array, and returns what it then is. Raises NotStarted for a
    job that it gave up (settings.wait_s, settings.stuck_s), and cancelled, saying why.
    """

    def ask() -> JobInfo:
        info = commands.poll([job_id])[job_id]
        with suppress(Silent):
            return replace(info, position=commands.position(job_id)) if info.state == "waiting" else info
        return info

    settings = commands.settings
    began = answered = time.monotonic()
    stuck, before, given_up = None, None, None
    with left_at_once(commands, job_id), _threads() as pool:
        look = _Repeated(pool, ask)
        while not stopped():
            time.sleep(POLL_S)
            now = time.monotonic()
            try:
                info = look.take()
            except Silent:
                if now - answered > commands.patience_s:
                    raise
                continue
            if info is None:
                continue
            if info.state in ("running", "ending") or gone(info):
                return info
            answered = now
            on_wait(info)
            if (info.raw, info.reason) != before:
                before = (info.raw, info.reason)
                look.soon()
            why = answers.why_stuck(info.reason)
            stuck = (stuck or now) if why else None
            if stuck and now - stuck >= settings.stuck_s:
                given_up = why
            elif settings.wait_s and now - began >= settings.wait_s:
                given_up = f"its reason is {info.reason or 'not given'}; allow it longer with slurm.wait_s"
            if given_up:
                break
        commands.cancel(job_id if given_up else answers.whole(job_id))
    if given_up:
        waited_s = time.monotonic() - began
        raise NotStarted(f"job {job_id} waited {waited_s:.0f} s and was cancelled: {given_up}")
    return commands.poll([job_id])[job_id]


@contextmanager
def left_at_once(commands: SlurmClient, job_id: str) -> Iterator[None]:
    """Whoever leaves without waiting for an orderly end leaves no job behind, if Slurm answers."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(InfrastructureError):
            commands.cancel(answers.whole(job_id), patient=False)
        raise


# --- listening ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Follow:
    """One cell of a job, as a controller follows it.

    `folders` are the cell's folders here, by host (the talks' names). `source` is its folder on each of
    `nodes` where those do not see this machine's files (None: they do). `step` is the cell's number in a job
    of several. `log` is the job's output, if it can be read here.
    """

    slurm: SlurmClient
    job_id: str
    folders: Mapping[str, CellDir]
    step: int | None = None
    source: str | None = None
    nodes: Sequence[Node] = ()
    ssh_config: str | None = None
    log: Path | None = None
    on_job: Callable[[JobInfo], None] = lambda info: None
    lag_s: float = LAG_S

    def look(self) -> tuple[JobInfo, set[int]]:
        info = self.slurm.poll([self.job_id])[self.job_id]
        running = self.step is not None and info.state == "running"
        return info, self.slurm.steps(self.job_id) if running else set()

    def fetch(self) -> dict[str, str]:
        """Copy what the nodes have by now; one that cannot be reached is merely not heard."""
        targets = {name: str(folder.path) for name, folder in self.folders.items()}
        return copy.gather(self.nodes, str(self.ssh_config), str(self.source), targets, timeout_s=FETCH_S)


class _Ear:
    """Reads what one agent has said, while its file grows or is replaced by a longer copy."""

    def __init__(self, path: Path, job_id: str) -> None:
        self._path, self._job_id, self._offset = path, job_id, 0

    def messages(self) -> list[Message]:
        """What is new; nothing of an earlier job in the same folder."""
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
    talks: Sequence[Talk],
    on_message: Callable[[Talk, Message], None],
    word: Callable[[Talk], str | None] = lambda talk: None,
    patience_s: float = 20.0,
) -> JobInfo:
    """Listen to the agents of one cell until all have ended or its job has; returns what Slurm last said of the job.

    As `backends.converse`: `word(talk)` is asked ten times a second, and the first "stop" is told to all agents
    by Slurm; after `patience_s` more, the job (or step) is cancelled. A talk's `rc` is 0 or 1 by the agent's
    outcome, -1 where there is none, with the end of the job's log as its `stderr`. Raises Silent when neither
    Slurm nor any agent is heard any more.
    """
    for folder in follow.folders.values():
        folder.create()
    with left_at_once(follow.slurm, follow.job_id), _threads() as pool:
        return _Following(follow, talks, on_message, word, patience_s).run(pool)


class _Job(Enum):
    """The job, or the cell's step in it, as Slurm describes it."""

    OPEN = "it waits or runs"
    ENDING = "Slurm is ending it"
    OVER = "it has ended"


class _Agents(Enum):
    SPEAKING = "at least one has not sent its outcome"
    ENDED = "all have"


class _Stop(Enum):
    NOT_ASKED = "the cell is to go on"
    ASKED = "its agents are to end"


class _Since(Generic[T]):
    """A state, and the monotonic time since when it holds."""

    def __init__(self, state: T) -> None:
        self.state, self.since = state, time.monotonic()

    def enter(self, state: T, now: float) -> None:
        if state is not self.state:
            self.state, self.since = state, now

    def seconds(self, state: T, now: float) -> float | None:
        """How long it has been in this state; None where it is in another."""
        return now - self.since if self.state is state else None


class _Following:
    """One cell of a job, followed until its agents and its job have ended."""

    def __init__(
        self,
        follow: Follow,
        talks: Sequence[Talk],
        on_message: Callable[[Talk, Message], None],
        word: Callable[[Talk], str | None],
        patience_s: float,
    ) -> None:
        self.follow, self.talks, self.on_message, self.word = follow, talks, on_message, word
        self.patience_s = patience_s
        self.ears = [(talk, _Ear(follow.folders[talk.name].messages, follow.job_id)) for talk in talks]
        self.info = forgotten(follow.job_id)
        self.step_seen = False  # running, in Slurm's list of steps
        self.job, self.agents, self.stop = _Since(_Job.OPEN), _Since(_Agents.SPEAKING), _Since(_Stop.NOT_ASKED)
        self.sent = ""  # the last word that Slurm passed on
        self.began = self.heard = time.monotonic()
        self.send_from = self.read_from = 0.0  # no word is sent, no file read, before these times

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
            self._look(look, now)
            if self.job.state is _Job.OVER and fetch:  # what they said last is not here yet
                fetch.once_more()
                while self._read(now):
                    pass
            alive = [talk for talk in self.talks if talk.alive]
            if self._all_said(now, alive, fetched=fetch is not None):
                return self._end(alive)
            if alive:
                self._send(alive, now)
            elif follow.step is not None:  # the job goes on without this cell
                return self.info
            elif self.agents.state is _Agents.SPEAKING:
                self.agents.enter(_Agents.ENDED, now)
                look.soon()
            if self.sent == CANCEL and self._mute(alive, now):  # Slurm goes on ending it
                return self._end(alive)
            if self._overdue(now):
                self._end(alive)
                try:
                    self._cancel()
                except Silent:
                    if alive:  # nobody could tell them, so they go on
                        raise
                return self.info

    def _all_said(self, now: float, alive: Sequence[Talk], fetched: bool) -> bool:
        """Whether the job has ended and nothing more can come: not even what NFS shows late."""
        if self.job.state is not _Job.OVER:
            return False
        return not alive or fetched or now - max(self.job.since, self.heard) > self.follow.lag_s

    def _overdue(self, now: float) -> bool:
        """Whether agents that are to end have not, or the job has not after them."""
        asked_s, ended_s = self.stop.seconds(_Stop.ASKED, now), self.agents.seconds(_Agents.ENDED, now)
        given_up = asked_s is not None and asked_s > self.patience_s + END_S
        return given_up or (ended_s is not None and ended_s > END_S)

    def _read(self, now: float) -> bool:
        """Pass on what is new; False when nothing was."""
        self.read_from, heard = now + HEAR_S * len(self.ears), False
        for talk, ear in self.ears:
            for message in ear.messages() if talk.alive else []:
                talk.answered, talk.heard, self.heard, heard = True, now, now, True
                if isinstance(message, Outcome):
                    talk.rc = 0 if message.ended_well else 1
                if not isinstance(message, Alive):
                    self.on_message(talk, message)
            if not talk.answered and now - self.began < FIRST_WORD_S:
                talk.heard = now
        return heard

    def _look(self, look: _Repeated[tuple[JobInfo, set[int]]], now: float) -> None:
        """Take Slurm's newest answer, if there is one. Raises Silent when neither it nor any agent is heard."""
        try:
            seen = look.take()
        except Silent:
            if now - self.heard > SILENCE_S:
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
            patience_s = ENDING_S if any(talk.answered for talk in self.talks) else FIRST_END_S
            if passed or gone(info) or (ending_s is not None and ending_s > patience_s):
                self.job.enter(_Job.OVER, now)

    def _send(self, alive: Sequence[Talk], now: float) -> None:
        """Slurm's signals reach all agents of a step at once, so what one is to be sent, all are."""
        for talk in alive:
            talk.told = self.word(talk) or talk.told
        words = {talk.told for talk in alive}
        if Word.STOP in words:
            self.stop.enter(_Stop.ASKED, now)
        asked_s = self.stop.seconds(_Stop.ASKED, now)
        if asked_s is not None:
            wanted = CANCEL if asked_s > self.patience_s or self._mute(alive, now) else Word.STOP
        else:
            wanted = Word.STACKS if Word.STACKS in words else ""
        if wanted and wanted != self.sent and now >= self.send_from:
            try:
                self._cancel(None if wanted == CANCEL else slurm_signal(Word(wanted)))
                self.sent = wanted
            except Silent:
                self.send_from = now + SILENT_PAUSE_S

    def _mute(self, alive: Sequence[Talk], now: float) -> bool:
        """Whether only agents are left that do not answer: they will not by being waited for."""
        return bool(alive) and all(now - talk.heard > SILENCE_S for talk in alive)

    def _cancel(self, signal: str | None = None) -> None:
        self.follow.slurm.cancel(self.follow.job_id, signal, self.follow.step, patient=False)

    def _end(self, alive: Sequence[Talk]) -> JobInfo:
        """Agents that are left have no outcome; the end of the job's log may say why."""
        last = _last_lines(self.follow.log)
        for talk in alive:
            talk.rc = -1
            talk.stderr += last
        return self.info


def _last_lines(log: Path | None) -> list[str]:
    """The end of a job's output, where srun and Slurm say why a step did not start."""
    if log is None:
        return []
    with suppress(OSError):
        return log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return []
