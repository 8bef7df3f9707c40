"""Jobs: the acting half of the Slurm backend. Slurm's commands are run, a job is waited for, its agents are heard.

What is said to Slurm and how its answers read is in `slurm`; here is when, where and how often.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from runner import backends, process, slurm
from runner.backends import Talk
from runner.cluster import NODES, PARTITIONS, Partition, SlurmNode, parse_nodes, parse_partitions
from runner.errors import InfrastructureError, UsageError
from runner.inventory import Node
from runner.node import MESSAGES
from runner.slurm import JobInfo

ENDED = ("complete", "failed", "cancelled", "time_limit", "node_failed", "out_of_memory", "preempted")
COMMAND_S = 60.0  # Slurm's own commands give up sooner
PATIENCE_S = 60.0  # a slurmctld that is restarted answers again after some seconds
FIRST_WORD_S = 120.0  # Python on a cold file system, and directories that NFS caches for a minute
END_S = 20.0  # from the agents' outcomes, or scancel, to the job's end
ENDING_S = 40.0  # Slurm's KillWait is 30 s: what ends for longer waits for a node that does not answer
FIRST_END_S = 10.0  # where no agent has said a word: srun has ended by then, since the job's script has
LAG_S = 3.0  # until the last words written on a node are seen through NFS
FETCH_S = 60.0
FETCH_LONGEST_S = 10.0  # between copies: an agent that is not heard for backends.SILENCE_S counts as lost
SILENT_PAUSE_S = 2.0
HEAR_S = 0.002  # spent on each agent's file: five hundred are asked once a second, not ten times
AT_ONCE = 4 << 20
LOG_LINES = 20
SIGNALS = {"stop": "USR2", "stacks": process.STACKS.name.removeprefix("SIG"), "cancel": None}  # as node.SLURM_WORDS
T = TypeVar("T")

_SILENT = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Connection timed out",
           "backup controller", "Zero Bytes were transmitted", "gave no result within", "Connection closed",
           "No route to host")  # fmt: skip
# What a profile of the login node may set: it would win over a job's lines, or change formats.
_CLEAN = (
    "unset $(env | sed -nE 's/^((SBATCH|SQUEUE|SACCT|SINFO|SCANCEL|SCONTROL|SLURM_TIME)_[A-Z0-9_]*)=.*/\\1/p') LINES"
)
_OVER = ("Invalid job id", "already comp")
_GONE = ("Invalid job id", "Invalid job array id")


class NotStarted(InfrastructureError):
    """A job was given up before it ran."""


class Silent(InfrastructureError):
    """Slurm's controller does not answer."""

    kind = "slurm_unreachable"


class Slurm:
    """Slurm's commands, on this machine or over ssh on a login node.

    A slurmctld that does not answer is asked again for `patience_s` before a call raises Silent.
    """

    def __init__(
        self,
        settings: slurm.Settings,
        login: Node | None = None,
        ssh_config: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        run: Callable[..., process.Outcome] = process.run,
    ) -> None:
        self.settings = settings
        self.patience_s = patience_s
        self._login, self._ssh_config, self._execute = login, ssh_config, run
        self._known: dict[str, JobInfo] = {}
        self._silent_since: float | None = None

    def _run(self, argv: Sequence[str], input: str = "", secrets: Mapping[str, str] | None = None) -> process.Outcome:
        """Raises Silent where no slurmctld, or no login node, answered."""
        secrets = secrets or {}
        try:
            if self._login is None:
                env = {**slurm.environment(os.environ), **secrets}
                outcome = self._execute(argv, timeout_s=COMMAND_S, input=input, env=env, cwd="/")
            else:
                # The far shell reads secrets from its stdin, so that no command line ever shows one.
                reads = [f"IFS= read -r {name}; export {name}" for name in secrets]
                script = "; ".join([_CLEAN, "cd /", *reads, f"exec {shlex.join(argv)}"])
                command = ["ssh", "-F", str(self._ssh_config), self._login.name]
                command.append(shlex.join(["exec", "sh", "-c", script]))
                values = "".join(f"{value}\n" for value in secrets.values())
                outcome = self._execute(command, timeout_s=COMMAND_S, input=values + input)
        except InfrastructureError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _lacking("this machine", argv[0]) from None
            raise Silent(str(error)) from None
        if self._login is not None and outcome.rc == 255:
            reason = backends.explain(self._login, 255, outcome.stderr.splitlines())
            raise Silent(f"login node {self._login.name}: {reason}")
        if self._login is not None and outcome.rc == 127:
            raise _lacking(f"login node {self._login.name}", argv[0])
        if outcome.rc != 0 and any(word in outcome.stderr for word in _SILENT):
            raise Silent(f"{argv[0]}: {_reason(outcome)}")
        return outcome

    def _patiently(self, ask: Callable[[], T]) -> T:
        deadline, pauses = time.monotonic() + self.patience_s, intervals()
        while True:
            try:
                return ask()
            except Silent:
                pause = next(pauses)
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)

    def submit(self, script: str, secrets: Mapping[str, str] | None = None) -> str:
        """Submit the sbatch file and return the job's id.

        Raises InfrastructureError with sbatch's own reason.
        """
        for key, value in (secrets or {}).items():
            if "\n" in value or not key.isidentifier():
                raise UsageError(f"{key} has a line break in it, which cannot be handed to a job: set it without")
        name = next(line.partition("=")[2] for line in script.splitlines() if line.startswith("#SBATCH --job-name="))
        tries = itertools.count()

        def attempt() -> str:
            # An answer that was lost on its way back is no reason for a second job.
            if next(tries) and (found := self.find(name)):
                return found
            outcome = self._run(["sbatch", "--parsable"], script, secrets)
            if outcome.rc != 0:
                raise InfrastructureError(f"sbatch refuses {name}: {_reason(outcome)}")
            return slurm.submitted_id(outcome.stdout)

        try:
            return self._patiently(attempt)
        except KeyboardInterrupt:  # whoever leaves at once must not leave a job whose id nobody knows
            with suppress(InfrastructureError):
                if found := self.find(name):
                    self.cancel(found, patient=False)
            raise

    def named(self, beginning: str) -> list[str]:
        """The ids of the jobs that wait or run, and whose name begins so."""
        rows = (line.split(maxsplit=1) for line in self._jobs(["squeue", "--noheader", "--format=%A %j"]).splitlines())
        return sorted({row[0] for row in rows if len(row) == 2 and row[1].startswith(beginning)})

    def test_only(self, script: str) -> str | None:
        """Why Slurm would refuse the sbatch file, or None."""
        outcome = self._run(["sbatch", "--test-only"], script)
        return None if outcome.rc == 0 else _reason(outcome)

    def poll(self, job_ids: Sequence[str]) -> dict[str, JobInfo]:
        """What became of the jobs, by id; "unknown" for one that Slurm has forgotten.

        While slurmctld does not answer, what was last known is given, for `patience_s`. Raises Silent after that,
        and where nothing was known.
        """
        try:
            found = self._ask(job_ids)
        except Silent as error:
            self._silent_since = self._silent_since or time.monotonic()
            silent_s = time.monotonic() - self._silent_since
            if silent_s > self.patience_s or not all(job_id in self._known for job_id in job_ids):
                raise Silent(f"Slurm has not answered for {silent_s:.0f} s: {error}") from None
        else:
            self._silent_since = None
            self._known |= {job_id: found.get(job_id, _unknown(job_id)) for job_id in job_ids}
        return {job_id: self._known[job_id] for job_id in job_ids}

    def _ask(self, job_ids: Sequence[str]) -> dict[str, JobInfo]:
        found = slurm.parse_squeue(self._jobs(slurm.squeue_argv(job_ids)))
        if missing := [job_id for job_id in job_ids if job_id not in found]:
            with suppress(InfrastructureError):  # no sacct, or its daemon is down
                found |= slurm.parse_sacct(self._run(slurm.sacct_argv(missing)).stdout)
        for job_id in job_ids:
            if job_id not in found and (info := slurm.parse_scontrol_job(self._jobs(slurm.scontrol_argv(job_id)))):
                found[job_id] = info
        return {job_id: info for job_id, info in found.items() if job_id in job_ids}

    def _jobs(self, argv: Sequence[str]) -> str:
        """What a query prints; nothing where Slurm has forgotten the job."""
        outcome = self._run(argv)
        if outcome.rc != 0 and not any(word in outcome.stderr for word in _GONE):
            raise Silent(f"{argv[0]}: {_reason(outcome)}")  # whatever it is, a query that worked may work again
        return outcome.stdout

    def find(self, name: str) -> str | None:
        """The id of the newest job of that name, or None: for a controller that died before it noted the id."""
        queued = self._jobs(["squeue", "--noheader", "--states=all", f"--name={name}", "--format=%A"]).split()
        if not queued:
            with suppress(InfrastructureError):
                argv = ["sacct", "--allocations", "--noheader", "--parsable2", f"--name={name}", "--format=JobIDRaw"]
                queued = self._run([*argv, "--starttime=now-7days"]).stdout.split()
        return max((job_id for job_id in queued if job_id.isdigit()), key=int, default=None)

    def cancel(self, job_id: str, signal: str | None = None, step: int | None = None, *, patient: bool = True) -> None:
        """End a job or one of its steps; with `signal` ("USR2") only its tasks are told. One that is over is no error.

        Raises Silent at once where Slurm does not answer, unless `patient`.
        """
        target = job_id if step is None else f"{job_id}.{step}"
        argv = ["scancel", *([f"--signal={signal}"] if signal else []), target]
        outcome = self._patiently(partial(self._run, argv)) if patient else self._run(argv)
        if outcome.rc != 0 and not any(word in outcome.stderr for word in _OVER):
            raise InfrastructureError(f"cannot cancel job {target}: {_reason(outcome)}")

    def position(self, job_id: str) -> int | None:
        """The job's place among those that wait in its partition, from 1."""
        return slurm.position(self._jobs(slurm.queue_argv(self.settings.partition)), job_id)

    def steps(self, job_id: str) -> set[int]:
        """The numbers of the job's steps that run now."""
        argv = ["squeue", "--steps", "--noheader", "--format=%i", f"--jobs={job_id}"]
        numbers = (line.strip().partition(".")[2] for line in self._jobs(argv).splitlines())
        return {int(number) for number in numbers if number.isdigit()}

    def look(self) -> tuple[list[Partition], list[SlurmNode]]:
        """The cluster's partitions and nodes, for `cluster.refusals`."""
        partitions, nodes = (self._patiently(partial(self._jobs, argv)) for argv in (PARTITIONS, NODES))
        return list(parse_partitions(partitions).values()), list(parse_nodes(nodes).values())


def _reason(outcome: process.Outcome) -> str:
    """Slurm's own words, without `sbatch: error:`."""
    said = [line.partition("error: ")[2] or line for line in outcome.stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(line.strip() for line in said)) or f"status {outcome.rc} and no word"


def _lacking(where: str, program: str) -> InfrastructureError:
    return InfrastructureError(f"{where} has no {program}: name a host that has Slurm's commands with slurm.login")


def _unknown(job_id: str) -> JobInfo:
    return JobInfo(job_id, "", "unknown", "", "", (), None)


def _gone(info: JobInfo) -> bool:
    """Whether a job has ended or is forgotten. A state that only a newer Slurm knows is neither."""
    return info.state in ENDED or not info.raw


def intervals(first_s: float = 1.0, longest_s: float = 15.0) -> Iterator[float]:
    """Seconds to wait between questions, ever longer; begun anew when something changes."""
    while True:
        yield first_s
        first_s = min(longest_s, first_s * 1.5)


# --- waiting --------------------------------------------------------------------------------------


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
    commands: Slurm, job_id: str, on_wait: Callable[[JobInfo], None], stopped: Callable[[], bool] = lambda: False
) -> JobInfo:
    """Wait until the job runs, or has ended, or Slurm has forgotten it; `on_wait` hears each answer meanwhile.

    Once `stopped`, it cancels the job and returns what it then is. Raises NotStarted for a job that it gave up
    (settings.wait_s, settings.stuck_s), and cancelled, saying why.
    """

    def ask() -> JobInfo:
        info = commands.poll([job_id])[job_id]
        with suppress(Silent):
            return replace(info, position=commands.position(job_id)) if info.state == "waiting" else info
        return info

    settings = commands.settings
    began = answered = time.monotonic()
    stuck, before, given_up = None, None, None
    with _left_at_once(commands, job_id), _threads() as pool:
        look = _Repeated(pool, ask)
        while not stopped():
            time.sleep(backends.POLL_S)
            now = time.monotonic()
            try:
                info = look.take()
            except Silent:
                if now - answered > commands.patience_s:
                    raise
                continue
            if info is None:
                continue
            if info.state in ("running", "ending") or _gone(info):
                return info
            answered = now
            on_wait(info)
            if (info.raw, info.reason) != before:
                before = (info.raw, info.reason)
                look.soon()
            why = slurm.why_stuck(info.reason)
            stuck = (stuck or now) if why else None
            if stuck and now - stuck >= settings.stuck_s:
                given_up = why
            elif settings.wait_s and now - began >= settings.wait_s:
                given_up = f"its reason is {info.reason or 'not given'}; allow it longer with slurm.wait_s"
            if given_up:
                break
    commands.cancel(job_id)
    if given_up:
        waited_s = time.monotonic() - began
        raise NotStarted(f"job {job_id} waited {waited_s:.0f} s and was cancelled: {given_up}")
    return commands.poll([job_id])[job_id]


@contextmanager
def _left_at_once(commands: Slurm, job_id: str) -> Iterator[None]:
    """Whoever leaves without waiting for an orderly end leaves no job behind, if Slurm answers."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(InfrastructureError):
            commands.cancel(job_id, patient=False)
        raise


# --- listening ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Follow:
    """One cell of a job, as a controller follows it.

    `folders` are the cell's folders here, by host (the talks' names). `source` is its folder on each of
    `nodes` where those do not see this machine's files (None: they do). `step` is the cell's number in a job
    of several. `log` is the job's output, if it can be read here.
    """

    slurm: Slurm
    job_id: str
    folders: Mapping[str, Path]
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
        targets = {name: str(folder) for name, folder in self.folders.items()}
        return backends.gather(self.nodes, str(self.ssh_config), str(self.source), targets, timeout_s=FETCH_S)


class _Ear:
    """Reads what one agent has said, while its file grows or is replaced by a longer copy."""

    def __init__(self, path: Path, job_id: str) -> None:
        self._path, self._job_id, self._offset = path, job_id, 0

    def messages(self) -> list[dict[str, Any]]:
        """What is new; nothing of an earlier job in the same folder."""
        try:
            with open(self._path, "rb") as file:
                if not any(message.get("job") == self._job_id for message in _parsed(file.readline())):
                    return []
                file.seek(self._offset)
                data = file.read(AT_ONCE)
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return _parsed(whole)


def _parsed(lines: bytes) -> list[dict[str, Any]]:
    """The messages of whole lines; a node that dies leaves blocks of zeros in its last one."""
    messages = []
    for line in lines.splitlines():
        with suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict) and "message" in message:
                messages.append(message)
    return messages


def converse(
    follow: Follow,
    talks: Sequence[Talk],
    on_message: Callable[[Talk, dict[str, Any]], None],
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
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _left_at_once(follow.slurm, follow.job_id), _threads() as pool:
        return _Conversation(follow, talks, on_message, word, patience_s).run(pool)


@dataclass
class _Conversation:
    follow: Follow
    talks: Sequence[Talk]
    on_message: Callable[[Talk, dict[str, Any]], None]
    word: Callable[[Talk], str | None]
    patience_s: float

    def __post_init__(self) -> None:
        self.ears = [(talk, _Ear(self.follow.folders[talk.name] / MESSAGES, self.follow.job_id)) for talk in self.talks]
        self.info = _unknown(self.follow.job_id)
        self.began = self.heard = time.monotonic()
        self.begun = False  # the step was seen running
        self.ending: float | None = None  # since when the job is said to be completing
        self.over: float | None = None  # since when the job, or step, is known to have ended
        self.all_ended: float | None = None
        self.stop_asked: float | None = None
        self.told = ""  # the last word that Slurm passed on
        self.next_told = self.next_heard = 0.0

    def run(self, pool: ThreadPoolExecutor) -> JobInfo:
        follow = self.follow
        look = _Repeated(pool, follow.look)
        fetch = _Repeated(pool, follow.fetch, longest_s=FETCH_LONGEST_S) if follow.source else None
        while True:
            time.sleep(backends.POLL_S)
            now = time.monotonic()
            if fetch:
                fetch.take()
            if now >= self.next_heard:
                self._hear(now)
            self._look(look, now)
            if self.over and fetch:  # what they said last is not here yet
                fetch.once_more()
                while self._hear(now):
                    pass
            alive = [talk for talk in self.talks if talk.alive]
            if self.over and (not alive or fetch or now - max(self.over, self.heard) > follow.lag_s):
                return self._end(alive)
            if alive:
                self._tell(alive, now)
            elif follow.step is not None:
                return self.info
            elif self.all_ended is None:
                self.all_ended = now
                look.soon()
            if self.told == "cancel" and self._mute(alive, now):  # Slurm goes on ending it
                return self._end(alive)
            if now > min(self._given_up_at(), (self.all_ended or now) + END_S):
                self._end(alive)
                try:
                    self._cancel()
                except Silent:
                    if alive:  # nobody could tell them, so they go on
                        raise
                return self.info

    def _hear(self, now: float) -> bool:
        """Pass on what is new; False when nothing was."""
        self.next_heard, heard = now + HEAR_S * len(self.ears), False
        for talk, ear in self.ears:
            for message in ear.messages() if talk.alive else []:
                talk.answered, talk.heard, self.heard, heard = True, now, now, True
                if message["message"] == "outcome":
                    talk.rc = 0 if message.get("rc") == 0 and not message.get("error") else 1
                if message["message"] != "alive":
                    self.on_message(talk, message)
            if not talk.answered and now - self.began < FIRST_WORD_S:
                talk.heard = now
        return heard

    def _look(self, look: _Repeated[tuple[JobInfo, set[int]]], now: float) -> None:
        try:
            seen = look.take()
        except Silent:
            if now - self.heard > backends.SILENCE_S:
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
        self.begun = self.begun or step in steps
        passed = step is not None and (any(other > step for other in steps) or (self.begun and step not in steps))
        self.ending = (self.ending or now) if info.state == "ending" else None
        patience_s = ENDING_S if any(talk.answered for talk in self.talks) else FIRST_END_S
        stuck = self.ending is not None and now - self.ending > patience_s
        if self.over is None and (passed or stuck or _gone(info)):
            self.over = now

    def _tell(self, alive: Sequence[Talk], now: float) -> None:
        """Slurm's signals reach all agents of a step at once, so what one is to be told, all are."""
        for talk in alive:
            talk.told = self.word(talk) or talk.told
        words = {talk.told for talk in alive}
        if "stop" in words and self.stop_asked is None:
            self.stop_asked = now
        if self.stop_asked is not None:
            wanted = "cancel" if now - self.stop_asked > self.patience_s or self._mute(alive, now) else "stop"
        else:
            wanted = "stacks" if "stacks" in words else ""
        if wanted and wanted != self.told and now >= self.next_told:
            try:
                self._cancel(SIGNALS[wanted])
                self.told = wanted
            except Silent:
                self.next_told = now + SILENT_PAUSE_S

    def _mute(self, alive: Sequence[Talk], now: float) -> bool:
        """Whether only agents are left that do not answer: they will not by being waited for."""
        return bool(alive) and all(now - talk.heard > backends.SILENCE_S for talk in alive)

    def _cancel(self, signal: str | None = None) -> None:
        self.follow.slurm.cancel(self.follow.job_id, signal, self.follow.step, patient=False)

    def _given_up_at(self) -> float:
        return float("inf") if self.stop_asked is None else self.stop_asked + self.patience_s + END_S

    def _end(self, alive: Sequence[Talk]) -> JobInfo:
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
