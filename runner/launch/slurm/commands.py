"""Runs Slurm's commands, here or on a login node, with retries while slurmctld does not answer.

Arguments and parsers of the commands are in `answers` and `capacity`; how a job is followed is in `follow`.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from runner.cluster import modules, reasons, slurm_names
from runner.cluster import slurm as slurm_settings
from runner.cluster.inventory import Node
from runner.errors import InfrastructureError, UsageError
from runner.launch.slurm import answers, capacity
from runner.launch.slurm.answers import JobInfo
from runner.launch.slurm.capacity import Partition, SlurmNode
from runner.system import process

COMMAND_S = 60.0  # Slurm's own commands give up sooner
PATIENCE_S = 60.0  # a slurmctld that is restarted answers again after some seconds
T = TypeVar("T")

_SILENT = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Connection timed out",
           "backup controller", "Zero Bytes were transmitted", "gave no result within", "Connection closed",
           "No route to host")  # fmt: skip
# Variables that a profile of the login node may set: they would override a job's lines, or change formats.
_CLEAN = (
    "unset $(env | sed -nE 's/^((SBATCH|SQUEUE|SACCT|SINFO|SCANCEL|SCONTROL|SLURM_TIME)_[A-Z0-9_]*)=.*/\\1/p') LINES"
)
_HAVE_NODES = "CONFIGURING,RUNNING,SUSPENDED,STOPPED,SIGNALING,COMPLETING"
_OVER = ("Invalid job id", "already comp")
_ALREADY_DONE = 2021 & 0xFF  # ESLURM_ALREADY_DONE: for an ended array task scancel sets only this status
_GONE = re.compile(r"Invalid job (array )?id|^Job \S+ not found$", re.MULTILINE)


class NotStarted(InfrastructureError):
    """A job was given up before it ran."""


class SlurmUnreachable(InfrastructureError):
    """Slurm's controller does not answer."""

    kind = "slurm_unreachable"


class SlurmClient:
    """Slurm's commands, on this machine or over ssh on a login node.

    A command is retried for `patience_s` while slurmctld does not answer; then the call raises SlurmUnreachable.
    """

    def __init__(
        self,
        settings: slurm_settings.Settings,
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
        """Run a command once. Raises SlurmUnreachable if slurmctld or the login node did not answer."""
        secrets = secrets or {}
        try:
            if self._login is None:
                env = {**answers.client_environment(os.environ), **secrets}
                outcome = self._execute(argv, timeout_s=COMMAND_S, input=input, env=env, cwd="/")
            else:
                # The remote shell reads secrets from its stdin, so that no command line shows one.
                reads = [f"IFS= read -r {name}; export {name}" for name in secrets]
                script = "; ".join([_CLEAN, "cd /", *reads, f"exec {shlex.join(argv)}"])
                command = ["ssh", "-F", str(self._ssh_config), self._login.name]
                command.append(shlex.join(["exec", "sh", "-c", script]))
                values = "".join(f"{value}\n" for value in secrets.values())
                outcome = self._execute(command, timeout_s=COMMAND_S, input=values + input)
        except InfrastructureError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _lacking("this machine", argv[0]) from None
            raise SlurmUnreachable(str(error)) from None
        if self._login is not None and outcome.rc == 255:
            reason = reasons.explain(self._login, 255, outcome.stderr.splitlines())
            raise SlurmUnreachable(f"login node {self._login.name}: {reason}")
        if self._login is not None and outcome.rc == 127:
            raise _lacking(f"login node {self._login.name}", argv[0])
        if outcome.rc != 0 and any(word in outcome.stderr for word in _SILENT):
            raise SlurmUnreachable(f"{argv[0]}: {_reason(outcome)}")
        return outcome

    def _patiently(self, ask: Callable[[], T]) -> T:
        deadline, pauses = time.monotonic() + self.patience_s, intervals()
        while True:
            try:
                return ask()
            except SlurmUnreachable:
                pause = next(pauses)
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)

    def submit(self, script: str, secrets: Mapping[str, str] | None = None) -> str:
        """Submit the text of an sbatch file, with `secrets` in its environment; returns the job's id.

        Raises InfrastructureError with sbatch's own reason, UsageError for a secret with a line break.
        """
        for key, value in (secrets or {}).items():
            if "\n" in value or not key.isidentifier():
                raise UsageError(f"{key} contains a line break and cannot be passed to a job: set it without")
        name = next(line.partition("=")[2] for line in script.splitlines() if line.startswith("#SBATCH --job-name="))
        tries = itertools.count()

        def attempt() -> str:
            # An answer that was lost on its way back is no reason for a second job.
            if next(tries) and (found := self.find(name)):
                return found
            outcome = self._run(["sbatch", "--parsable"], script, secrets)
            if outcome.rc != 0:
                raise InfrastructureError(f"sbatch refuses {name}: {_reason(outcome)}")
            return answers.submitted_id(outcome.stdout)

        try:
            return self._patiently(attempt)
        except KeyboardInterrupt:  # a controller that exits at once must not leave a job whose id is unknown
            with suppress(InfrastructureError):
                if found := self.find(name):
                    self.cancel(found, patient=False)
            raise

    def of_run(self, run_id: str) -> list[str]:
        """The ids of the run's jobs and arrays that wait or run, by their names, which no other run has."""
        rows = (line.split(maxsplit=1) for line in self._jobs(["squeue", "--noheader", "--format=%F %j"]).splitlines())
        found = {row[0] for row in rows if len(row) == 2 and row[1].startswith(f"{slurm_names.NAME}-{run_id}-")}
        return sorted(found, key=int)

    def test_only(self, script: str) -> str | None:
        """The reason why Slurm would refuse the sbatch file, None if it would accept it."""
        outcome = self._run(["sbatch", "--test-only"], script)
        return None if outcome.rc == 0 else _reason(outcome)

    def poll(self, job_ids: Sequence[str]) -> dict[str, JobInfo]:
        """The state of the jobs, by id; "unknown" for one that Slurm has forgotten.

        While slurmctld does not answer, the last known state is returned, for `patience_s`. Raises SlurmUnreachable
        after that, and if no state is known.
        """
        try:
            found = self._ask(job_ids)
        except SlurmUnreachable as error:
            self._silent_since = self._silent_since or time.monotonic()
            silent_s = time.monotonic() - self._silent_since
            if silent_s > self.patience_s or not all(job_id in self._known for job_id in job_ids):
                raise SlurmUnreachable(f"Slurm has not answered for {silent_s:.0f} s: {error}") from None
        else:
            self._silent_since = None
            self._known |= {job_id: found.get(job_id, forgotten(job_id)) for job_id in job_ids}
        return {job_id: self._known[job_id] for job_id in job_ids}

    def _ask(self, job_ids: Sequence[str]) -> dict[str, JobInfo]:
        found = answers.parse_squeue(self._jobs(answers.squeue_argv(job_ids)))
        if missing := [job_id for job_id in job_ids if job_id not in found]:
            with suppress(InfrastructureError):  # no sacct, or its daemon is down
                found |= answers.parse_sacct(self._run(answers.sacct_argv(missing)).stdout)
        for job_id in job_ids:
            if job_id not in found and (info := answers.parse_scontrol_job(self._jobs(answers.scontrol_argv(job_id)))):
                found[job_id] = replace(info, job_id=job_id)  # scontrol shows another id for a task of an array
        return {job_id: info for job_id, info in found.items() if job_id in job_ids}

    def _jobs(self, argv: Sequence[str]) -> str:
        """The output of a query; empty if Slurm has forgotten the job."""
        outcome = self._run(argv)
        if outcome.rc == 0:
            return outcome.stdout
        if _GONE.search(outcome.stdout) or _GONE.search(outcome.stderr):
            return ""
        raise SlurmUnreachable(
            f"{argv[0]}: {_reason(outcome)}"
        )  # whatever the cause, a query that worked before may work again

    def find(self, name: str) -> str | None:
        """The id of the newest job or array of that name, None if there is none: it finds a job whose id was lost."""
        queued = self._jobs(["squeue", "--noheader", "--states=all", f"--name={name}", "--format=%F"]).split()
        if not queued:
            with suppress(InfrastructureError):
                argv = ["sacct", "--allocations", "--noheader", "--parsable2", f"--name={name}", "--format=JobID"]
                rows = self._run([*argv, "--starttime=now-7days"]).stdout.split()
                queued = [answers.whole(row) for row in rows]
        return max((job_id for job_id in queued if job_id.isdigit()), key=int, default=None)

    def cancel(self, job_id: str, signal: str | None = None, step: int | None = None, *, patient: bool = True) -> None:
        """Cancel a job or one of its steps, or with `signal` ("USR2") only send that signal to its tasks.

        A job that has ended is no error. Raises SlurmUnreachable if Slurm does not answer, at once unless `patient`;
        InfrastructureError for any other failure.
        """
        target = job_id if step is None else f"{job_id}.{step}"
        argv = ["scancel", *([f"--signal={signal}"] if signal else []), target]
        outcome = self._patiently(partial(self._run, argv)) if patient else self._run(argv)
        if outcome.rc not in (0, _ALREADY_DONE) and not any(word in outcome.stderr for word in _OVER):
            raise InfrastructureError(f"cannot cancel job {target}: {_reason(outcome)}")

    def position(self, job_id: str) -> int | None:
        """The job's place among those that wait in its partition, from 1; None if it does not wait."""
        return answers.position(self._jobs(answers.queue_argv(self.settings.partition)), job_id)

    def others_run(self, job_id: str) -> bool:
        """Whether the same user has another job that has nodes."""
        rows = self._jobs(["squeue", "--noheader", "--me", "--array", f"--states={_HAVE_NODES}", "--format=%i"])
        return any(other != job_id for other in rows.split())

    def out_of_service(self, job_id: str) -> list[SlurmNode]:
        """The nodes that the job names and that start no jobs until somebody acts: drained, down, not answering."""
        argv = ["squeue", "--noheader", "--array", "--states=all", "--format=%n", f"--jobs={job_id}"]
        named = answers.node_names(self._jobs(argv))
        known = capacity.parse_nodes(self._jobs(capacity.NODES), named) if named else {}  # what is reserved may end
        return [known[name] for name in named if name in known and not known[name].usable]

    def steps(self, job_id: str) -> set[int]:
        """The numbers of the job's steps that run now."""
        argv = ["squeue", "--steps", "--noheader", "--format=%i", f"--jobs={job_id}"]
        numbers = (line.strip().partition(".")[2] for line in self._jobs(argv).splitlines())
        return {int(number) for number in numbers if number.isdigit()}

    def sees(self, folder: Path) -> bool:
        """Whether the login host may write into `folder`, as this machine may; True without a login host.

        A folder of a new name is made there for a moment: no cache knows it. Raises SlurmUnreachable.
        """
        if self._login is None:
            return True
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        try:
            with TemporaryDirectory(prefix=".shakedown-", dir=existing) as probe:
                return self._patiently(partial(self._run, ["test", "-w", probe])).rc == 0
        except OSError:  # not writable: whoever writes results there says so
            return False

    def require_modules(self, names: Sequence[str]) -> None:
        """Raise UsageError for modules that cannot be loaded where Slurm's commands run: a site has one set of them.

        A job finds out again, on its own nodes.
        """
        outcome = self._run(modules.argv(names))
        try:
            modules.read(names, outcome)
        except InfrastructureError as error:
            where = self._login.alias if self._login else "this machine"
            raise UsageError(f"{where} {error}; see `module avail` there, and runner_modules", error.kind) from None

    def look(self) -> tuple[list[Partition], list[SlurmNode]]:
        """The cluster's partitions and nodes. Raises SlurmUnreachable if Slurm does not answer."""
        ask = [capacity.PARTITIONS, capacity.NODES, capacity.CONFIG]
        name = self.settings.reservation
        answered = [self._patiently(partial(self._jobs, argv)) for argv in ask]
        reserved = self._patiently(partial(self._jobs, capacity.RESERVATIONS)) if name else ""
        partitions, nodes, config = answered
        within = capacity.nodes_of_reservation(reserved, name) if name else None
        if name and within is None:  # it does not bind jobs to nodes
            within = tuple(capacity.parse_nodes(nodes))
        return (
            list(capacity.parse_partitions(partitions, config).values()),
            list(capacity.parse_nodes(nodes, within).values()),
        )


def _reason(outcome: process.Outcome) -> str:
    """Slurm's own message, without `sbatch: error:`."""
    lines = [line.partition("error: ")[2] or line for line in outcome.stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(line.strip() for line in lines)) or f"status {outcome.rc} and no output"


def _lacking(where: str, program: str) -> InfrastructureError:
    return InfrastructureError(f"{where} has no {program}: name a host that has Slurm's commands with slurm.login")


def forgotten(job_id: str) -> JobInfo:
    """The state of a job that Slurm does not know any more: "unknown", everything else empty."""
    return JobInfo(job_id, "", "unknown", "", "", (), None)


def gone(info: JobInfo) -> bool:
    """Whether a job has ended or Slurm has forgotten it; False for the unknown state of a newer Slurm."""
    return info.state in answers.ENDED or not info.raw


def intervals(first_s: float = 1.0, longest_s: float = 15.0) -> Iterator[float]:
    """The pauses between queries in s: each half as long again as the one before, up to `longest_s`."""
    while True:
        yield first_s
        first_s = min(longest_s, first_s * 1.5)
