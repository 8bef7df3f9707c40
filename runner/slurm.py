"""Slurm in words: jobs rendered, its answers about them read. Text in, values out.

Written for Slurm 20.11 and later. Answers are asked for as text with a separator of our own: the JSON of
those versions is missing, or differs from one to the next. The agent on the nodes imports this module, so
it stays small.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runner.cluster.slurm import WORD, Settings, clock, placeholder
from runner.errors import InfrastructureError, UsageError
from runner.system.nodeset import expand, fold

# --- settings -------------------------------------------------------------------------------------


_UNBREAKABLE = re.compile(r"[^\x00-\x1f\x7f\"'\\`$#]*")  # stays one value between double quotes


# --- one job --------------------------------------------------------------------------------------

STARTUP_S = 120  # allowed to every cell beside its own limit: imports from a cold file system, gathering
# So long before its time limit, or up to a minute earlier, every process of a job's tasks gets SIGUSR1 and SIGCONT,
# sessions of their own included: one that does not catch or ignore it dies of it. After the limit: SIGTERM, KillWait.
NOTICE_S = 60


@dataclass(frozen=True)
class Step:
    """One cell in a job. `hosts` are Slurm names in rank order; none: Slurm places.

    srun starts tasks in Slurm's own order of nodes whatever the order of `hosts`, so an agent whose request
    says in which order ranks are must follow that, and `placement` where it says nothing.
    """

    cell: str
    num_nodes: int
    request: Mapping[str, Any]
    hosts: tuple[str, ...] = ()
    timeout_s: float = 3600


@dataclass(frozen=True)
class Job:
    """One sbatch file: one cell, or several: one after the other in one allocation, or each a task of an `array`.

    `name` is unique, so that a job can be found again by it. `python` is the agent's interpreter on the nodes,
    `log` the path of the job's output in a folder that exists on the batch host; `secrets` are names of
    environment variables to hand on, never values.
    """

    name: str
    steps: tuple[Step, ...]
    python: str
    log: str
    gpus_per_node: int
    device: str
    secrets: tuple[str, ...] = ()
    array: bool = False


def limit_s(job: Job, settings: Settings) -> int:
    """The time limit that `job` is submitted with: the one set, or what its cells may take; whole minutes."""
    limits = [step.timeout_s + STARTUP_S for step in job.steps]
    limit = settings.time_limit_s or (max(limits) if job.array else sum(limits))
    return math.ceil(limit / 60) * 60


def wanted_gres(gpus_per_node: int, device: str, settings: Settings) -> str | None:
    """What each node must have, such as `gpu:h200:8`; None: nothing."""
    return settings.gres or (f"gpu:{gpus_per_node}" if device == "cuda" else None)


def cells_of(script: str) -> list[str]:
    """The cells of an sbatch file that `render` made, in the order of their steps."""
    return re.findall(r"^srun --job-name=(\S+) ", script, re.MULTILINE)


def render(job: Job, settings: Settings) -> str:
    """The job as one sbatch file. Nothing in it is expanded by the batch shell but exit statuses.

    Raises UsageError for a value that would break a line or hide an option, and for a placeholder.
    """
    hosts = tuple(dict.fromkeys(host for step in job.steps for host in step.hosts))
    options = {
        "job-name": job.name,
        # One at a time: side by side they would measure each other's traffic.
        "array": f"0-{len(job.steps) - 1}%1" if job.array else None,
        "output": job.log.replace("%", "%%") + (".%a" if job.array else ""),  # sbatch has patterns such as %j
        "open-mode": "append",
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "nodes": max(len(hosts), *(step.num_nodes for step in job.steps)),
        "ntasks-per-node": 1,
        "exclusive": "",
        "mem": 0,
        "gres": wanted_gres(job.gpus_per_node, job.device, settings),
        "constraint": settings.constraint,
        "nodelist": ",".join(hosts) or None,
        "exclude": ",".join(settings.exclude) or None,
        "time": clock(limit_s(job, settings)),
        "signal": f"USR1@{NOTICE_S}",
        "no-requeue": "",
        "export": ",".join(job.secrets) or "NIL",
    }
    needs = f"# It hands on {', '.join(job.secrets)} from the environment of sbatch." if job.secrets else None
    lines = [
        "#!/bin/bash",
        f"# {job.name}: Shakedown's agent on every node of each cell, one cell after the other"
        + (", each a task of an array." if job.array else "."),
        *(f"#   {_told(step)}" for step in job.steps),
        "# By hand: `sbatch THIS_FILE`, with no SBATCH_* variable set, since those win over the lines below.",
        *([needs] if needs else []),
        *(_directive(name, value) for name, value in _unbroken(options)),
        *(f"#SBATCH {option}" for option in settings.extra),
        "",
        "# Rank, node list and master address come from Slurm inside each task, not from this shell. A cell that",
        "# fails does not stop the next one; the job ends with the first status that is not 0.",
        "status=0",
        *(_choice(job) if job.array else (line for step in job.steps for line in _srun(job, step))),
        "",
        'exit "$status"',
        "",
    ]
    text = "\n".join(lines)
    if found := placeholder(text):
        raise UsageError(f"job {job.name}: {found!r} is a placeholder; replace it, nothing was submitted")
    return text


def _told(step: Step) -> str:
    where = f"on {fold(step.hosts)}" if step.hosts else "placed by Slurm"
    return f"cell {step.cell}: {step.num_nodes} node{'s'[: step.num_nodes > 1]} {where}, at most {step.timeout_s:g} s"


def _choice(job: Job) -> list[str]:
    """The lines of all cells, of which a task of the array runs one."""
    cases = [[f"{number})", *_srun(job, step)[1:], ";;"] for number, step in enumerate(job.steps)]
    return ["", 'case "$SLURM_ARRAY_TASK_ID" in', *(line for case in cases for line in case), "esac"]


def _srun(job: Job, step: Step) -> list[str]:
    """The lines of one cell. srun copies its stdin, the request, to every task."""
    together = len(job.steps) > 1 and not job.array
    request = json.dumps(step.request, indent=1, sort_keys=True)
    delimiter = next(word for n in itertools.count() if (word := f"REQUEST{n or ''}") not in request)
    options = {
        "job-name": step.cell,
        "nodes": step.num_nodes,
        "ntasks": step.num_nodes,
        "ntasks-per-node": 1,
        "nodelist": ",".join(step.hosts) or None,
        # The first nodes of the allocation, which the controller counts on.
        "relative": 0 if together and not step.hosts else None,
        # A cell that hangs must not use up the time of the others; alone, it has the job's own limit.
        "time": clock(math.ceil((step.timeout_s + STARTUP_S) / 60) * 60) if together else None,
    }
    words = [shlex.quote(f"--{name}={value}") for name, value in _unbroken(options)]
    ((_, python),) = _unbroken({"python": job.python})
    return [
        "",
        f"# {_told(step)}",
        f"srun {' '.join(words)} \\",
        # export: all that the job's own --export let in; without it, that one would hold here as well.
        "  --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --input=all --export=ALL \\",
        f"  {shlex.quote(python)} -P -u -m runner.node <<'{delimiter}'",
        request,
        delimiter,
        'result=$?; [ "$status" -ne 0 ] || status=$result',
    ]


def _unbroken(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The options that are set, as texts; raises UsageError for one that would not stay one value."""
    texts = [(name, str(value)) for name, value in options.items() if value is not None]
    for name, text in texts:
        if not _UNBREAKABLE.fullmatch(text):
            raise UsageError(f"{name} {text!r} has characters that an sbatch file cannot hold; rename it without them")
    return texts


def _directive(name: str, value: str) -> str:
    """sbatch splits these lines at blanks, as a shell would, but expands nothing."""
    if not value:
        return f"#SBATCH --{name}"
    return f"#SBATCH --{name}={value}" if WORD.fullmatch(value) else f'#SBATCH --{name}="{value}"'


# --- inside a step --------------------------------------------------------------------------------


def whole(job_id: str) -> str:
    """The id of all of a job: of the array that it is a task of."""
    return job_id.partition("_")[0]


# --- what became of jobs --------------------------------------------------------------------------

_WORDS = {
    "waiting": "PENDING PD CONFIGURING CF REQUEUED RQ REQUEUE_HOLD RH REQUEUE_FED RF RESV_DEL_HOLD RD SPECIAL_EXIT SE",
    "running": "RUNNING R RESIZING RS SIGNALING SI STOPPED ST SUSPENDED S",
    "ending": "COMPLETING CG STAGE_OUT SO",
    "complete": "COMPLETED CD",
    "failed": "FAILED F",
    "cancelled": "CANCELLED CA REVOKED RV",
    "time_limit": "TIMEOUT TO DEADLINE DL",
    "node_failed": "NODE_FAIL NF BOOT_FAIL BF LAUNCH_FAILED RECONFIG_FAIL",
    "out_of_memory": "OUT_OF_MEMORY OOM",
    "preempted": "PREEMPTED PR",
}
STATES: Mapping[str, str] = {word: ours for ours, words in _WORDS.items() for word in words.split()}


def state(word: str) -> str:
    """Our word for one of Slurm's ("CANCELLED by 1000", "CANCELLED+", "cg"); "unknown" for what is new."""
    found = re.match(r"\s*(\w+)", word)
    return STATES.get(found[1].upper(), "unknown") if found else "unknown"


@dataclass(frozen=True)
class JobInfo:
    """One job as Slurm tells it. `start` is ISO time, expected while it waits; `position` counts from 1."""

    job_id: str
    name: str
    state: str
    raw: str
    reason: str
    nodes: tuple[str, ...]
    start: str | None
    exit_code: int | None = None
    signal: int | None = None
    position: int | None = None


_ID = re.compile(r"\d+(_\d+)?", re.ASCII)
SEPARATOR = "|#"  # reasons hold blanks, commas, brackets, and whatever an administrator typed
# Ids are 123, or 123_4 in an array: such a task has a number of its own as well, but only once it runs.
_FORMAT = SEPARATOR.join(("%i", "%T", "%S", "%N", "%j", "%r"))
SQUEUE = ("squeue", "--noheader", "--array", "--states=all", f"--format={_FORMAT}")
_COLUMNS = ("JobID", "JobName", "State", "Reason", "NodeList", "Start", "ExitCode")
SACCT = ("sacct", "--parsable2", f"--delimiter={SEPARATOR}", "--allocations", f"--format={','.join(_COLUMNS)}")


def squeue_argv(ids: Iterable[str]) -> list[str]:
    return [*SQUEUE, f"--jobs={','.join(ids)}"]


def sacct_argv(ids: Iterable[str]) -> list[str]:
    return [*SACCT, f"--jobs={','.join(ids)}"]


def scontrol_argv(job_id: str) -> list[str]:
    return ["scontrol", "--oneliner", "show", "job", job_id]


def queue_argv(partition: str | None) -> list[str]:
    """What `position` reads: the waiting jobs of a partition (None: of all), the next to start first; an array once."""
    only = [f"--partition={partition}"] if partition else []
    return ["squeue", "--noheader", "--states=PENDING", "--sort=-p,i", "--format=%F", *only]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for Slurm's commands, without the variables that win over a job's lines, change formats, or
    come from a job in which Shakedown itself was started."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    ours = re.compile(r"(SBATCH|SQUEUE|SACCT|SINFO|SCANCEL|SCONTROL|SLURM|SALLOC|SRUN)_")
    return {key: value for key, value in environ.items() if key in kept or not ours.match(key)}


def submitted_id(stdout: str) -> str:
    """The job id that `sbatch --parsable` answered: "123", or "123;cluster"."""
    match = re.search(r"^(\d+)(;\S+)?\s*\Z", stdout, re.MULTILINE)
    if not match:
        raise InfrastructureError(f"sbatch answered {stdout.strip()!r}, no job id; see whether it was submitted")
    return match[1]


def position(text: str, job_id: str) -> int | None:
    """The place of a job, or of its array, in the answer to `queue_argv`, from 1; None: it does not wait."""
    waiting, job_id = list(dict.fromkeys(text.split())), whole(job_id)
    return waiting.index(job_id) + 1 if job_id in waiting else None


def parse_squeue(text: str) -> dict[str, JobInfo]:
    """Jobs by id, from the answer to `squeue_argv`; lines that are not whole are left out."""
    rows = (line.split(SEPARATOR, 5) for line in text.splitlines())
    return {
        row[0]: _job(row[0], name=row[4], raw=row[1], reason=row[5], nodes=row[3], start=row[2])
        for row in rows
        if len(row) == 6 and _ID.fullmatch(row[0])
    }


def parse_sacct(text: str, separator: str = SEPARATOR) -> dict[str, JobInfo]:
    """Jobs by id, from the answer to `sacct_argv` with its header. Steps and broken lines are left out; of
    several lines of one job, which a requeue makes, the last one counts."""
    header, *lines = [line.split(separator) for line in text.splitlines()] or [[]]
    jobs = {}
    for words in lines:
        row = dict(zip(header, words, strict=False))
        job_id = row.get("JobID", "")
        if len(words) == len(header) and _ID.fullmatch(job_id):
            jobs[job_id] = _job(job_id, *(row.get(column, "") for column in _COLUMNS[1:]))
    return jobs


def parse_scontrol_job(text: str) -> JobInfo | None:
    """The job of `scontrol show job`, on one line or many; None: no job."""
    row = pairs(text)
    columns = ("JobName", "JobState", "Reason", "NodeList", "StartTime", "ExitCode")
    return _job(row["JobId"], *(row.get(column, "") for column in columns)) if "JobId" in row else None


def pairs(text: str) -> dict[str, str]:
    """scontrol's `Key=value Key=value`, where values may hold blanks; the first of each key."""
    found = re.findall(r"(?<!\S)([A-Z][\w:/]*)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*\Z)", text, re.DOTALL)
    return dict(reversed(found))


def _job(job_id: str, name: str, raw: str, reason: str, nodes: str, start: str, exit_code: str = "") -> JobInfo:
    word = state(raw)
    codes = re.fullmatch(r"(\d+):(\d+)", exit_code)
    over = codes and word not in ("waiting", "running", "ending", "unknown")  # until then Slurm says 0:0
    try:
        hosts = expand(nodes) if said(nodes) else ()
    except ValueError:  # cut off, or a word for none that is new
        hosts = ()
    return JobInfo(
        job_id=job_id,
        name=name,
        state=word,
        raw=raw.strip(),
        reason=said(reason),
        nodes=hosts,
        start=start if start[:4].isdigit() else None,
        exit_code=int(codes[1]) if codes and over else None,
        signal=int(codes[2]) if codes and over else None,
    )


def said(text: str) -> str:
    """Slurm has several words for nothing."""
    return "" if text.strip().lower() in ("(null)", "none", "n/a", "none assigned") else text.strip()


_STUCK = {
    r"ReqNodeNotAvail.*Unavailable\w*:[ (]*\w|Nodes required for job are DOWN|NodeDown": (
        "nodes it needs are down, drained or kept for others; see `sinfo -R`, or name other nodes"
    ),
    r"PartitionDown|PartitionInactive": "the partition starts no jobs; mend slurm.partition",
    r"PartitionNodeLimit": "the partition does not allow that many nodes; ask for another number",
    r"(Partition|QOS|Association)TimeLimit": "its time limit is above the allowed one; lower slurm.time_limit_s",
    r"BadConstraints|PartitionConfig": "no node may give what it asks for; mend slurm.constraint or slurm.gres",
    r"InvalidAccount|AccountNotAllowed": "the account cannot be used here; mend slurm.account",
    r"InvalidQOS|QOSNotAllowed": "the QoS cannot be used here; mend slurm.qos",
    r"(Assoc|QOS)\w*(PerJob|PerNode|Wall|Min(Cpu|GRES|Memory|Node))": (
        "one job may not have that much or that little; ask for another size or time, or another account or QoS"
    ),
    r"(Assoc|QOS)\w*Minutes": "the time granted to the account or QoS is spent; ask for another",
    r"JobHeldUser": "it is held; `scontrol release` it",
    r"JobHeldAdmin": "an administrator holds it; ask them",
    r"JobHoldMaxRequeue|.*requeued ?held|.*requeued in held state": (
        "it could not be started on its nodes; see slurmd's log there, then `scontrol release` it"
    ),
    r"DependencyNeverSatisfied": "what it depends on has failed; cancel it",
    r"Reserv\w*(Deleted|Invalid)|Invalid ?Reservation": "its reservation is gone; mend slurm.extra",
}


def why_stuck(reason: str) -> str | None:
    """Why waiting will not end what a job waits for, and what to do; None for what ends by itself.

    Limits that other jobs fill (AssocGrp…, …PerUser) end with those jobs; what one job may have does not change.
    """
    plain = reason.strip().lstrip("(").replace("_", " ")
    words = next((words for pattern, words in _STUCK.items() if re.match(pattern, plain, re.IGNORECASE)), None)
    return f"{plain.rstrip(')')}: {words}" if words else None
