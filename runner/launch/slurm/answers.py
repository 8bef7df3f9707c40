"""Parses Slurm's output: states, reasons and jobs in our terms. Text in, values out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runner.errors import InfrastructureError
from runner.system.nodeset import expand


def whole(job_id: str) -> str:
    """The id of the whole job: for a task of an array ("12_3") that of the array ("12")."""
    return job_id.partition("_")[0]


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


ENDED = ("complete", "failed", "cancelled", "time_limit", "node_failed", "out_of_memory", "preempted")
STATES: Mapping[str, str] = {word: ours for ours, words in _WORDS.items() for word in words.split()}


def state(word: str) -> str:
    """Our state for one of Slurm's ("CANCELLED by 1000", "CANCELLED+", "cg"); "unknown" for any other."""
    found = re.match(r"\s*(\w+)", word)
    return STATES.get(found[1].upper(), "unknown") if found else "unknown"


def over(state: str | None) -> bool:
    """Whether a job in this state of ours has ended or is forgotten; False for None (no job)."""
    return state in (*ENDED, "unknown")


@dataclass(frozen=True)
class JobInfo:
    """One job as Slurm reports it. `start` is ISO time, the expected one while it waits; `position` counts from 1.

    `advice` is what to do where waiting alone may not end the wait.
    """

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
    advice: str | None = None


def as_status(info: JobInfo) -> dict[str, Any]:
    """The job as a JSON object for status.json."""
    kept = asdict(info)
    return {"id": kept["job_id"], **{key: kept[key] for key in ("state", "raw", "reason", "position", "start")}}


_ID = re.compile(r"\d+(_\d+)?", re.ASCII)


SEPARATOR = "|#"  # reasons contain blanks, commas, brackets, and free text of administrators


# Ids are 123, or 123_4 in an array: such a task also has its own number, but only once it runs.
_FORMAT = SEPARATOR.join(("%i", "%T", "%S", "%N", "%j", "%r"))


SQUEUE = ("squeue", "--noheader", "--array", "--states=all", f"--format={_FORMAT}")


_COLUMNS = ("JobID", "JobName", "State", "Reason", "NodeList", "Start", "ExitCode")


SACCT = ("sacct", "--parsable2", f"--delimiter={SEPARATOR}", "--allocations", f"--format={','.join(_COLUMNS)}")


def squeue_argv(ids: Iterable[str]) -> list[str]:
    """The command whose output `parse_squeue` reads, for the jobs `ids`."""
    return [*SQUEUE, f"--jobs={','.join(ids)}"]


def sacct_argv(ids: Iterable[str]) -> list[str]:
    """The command whose output `parse_sacct` reads, for the jobs `ids`."""
    return [*SACCT, f"--jobs={','.join(ids)}"]


def scontrol_argv(job_id: str) -> list[str]:
    """The command whose output `parse_scontrol_job` reads."""
    return ["scontrol", "--oneliner", "show", "job", job_id]


def queue_argv(partition: str | None) -> list[str]:
    """The command whose output `position` reads: the waiting jobs of a partition (None: of all) in order of start."""
    only = [f"--partition={partition}"] if partition else []
    return ["squeue", "--noheader", "--states=PENDING", "--sort=-p,i", "--format=%F", *only]


def client_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for Slurm's commands, without the variables that override a job's lines, change formats, or
    come from a job in which Shakedown itself was started.
    """
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    ours = re.compile(r"(SBATCH|SQUEUE|SACCT|SINFO|SCANCEL|SCONTROL|SLURM|SALLOC|SRUN)_")
    return {key: value for key, value in environ.items() if key in kept or not ours.match(key)}


def submitted_id(stdout: str) -> str:
    """The job id in the output of `sbatch --parsable`: "123", or "123;cluster".

    Raises InfrastructureError for output without an id.
    """
    match = re.search(r"^(\d+)(;\S+)?\s*\Z", stdout, re.MULTILINE)
    if not match:
        raise InfrastructureError(f"sbatch answered {stdout.strip()!r}, no job id; see whether it was submitted")
    return match[1]


def position(text: str, job_id: str) -> int | None:
    """The place of a job, or of its array, in the output of `queue_argv`, from 1; None: it does not wait."""
    waiting, job_id = list(dict.fromkeys(text.split())), whole(job_id)
    return waiting.index(job_id) + 1 if job_id in waiting else None


def parse_squeue(text: str) -> dict[str, JobInfo]:
    """Jobs by id, from the output of `squeue_argv`; incomplete lines are skipped."""
    rows = (line.split(SEPARATOR, 5) for line in text.splitlines())
    return {
        row[0]: _job(row[0], name=row[4], raw=row[1], reason=row[5], nodes=row[3], start=row[2])
        for row in rows
        if len(row) == 6 and _ID.fullmatch(row[0])
    }


def parse_sacct(text: str, separator: str = SEPARATOR) -> dict[str, JobInfo]:
    """Jobs by id, from the output of `sacct_argv` with its header. Steps and incomplete lines are skipped; of
    several lines of one job, which a requeue causes, the last one counts.
    """
    header, *lines = [line.split(separator) for line in text.splitlines()] or [[]]
    jobs = {}
    for words in lines:
        row = dict(zip(header, words, strict=False))
        job_id = row.get("JobID", "")
        if len(words) == len(header) and _ID.fullmatch(job_id):
            jobs[job_id] = _job(job_id, *(row.get(column, "") for column in _COLUMNS[1:]))
    return jobs


def parse_scontrol_job(text: str) -> JobInfo | None:
    """The job in the output of `scontrol show job`, on one line or many; None if there is no job."""
    row = pairs(text)
    columns = ("JobName", "JobState", "Reason", "NodeList", "StartTime", "ExitCode")
    return _job(row["JobId"], *(row.get(column, "") for column in columns)) if "JobId" in row else None


def pairs(text: str) -> dict[str, str]:
    """The pairs of scontrol's `Key=value Key=value`; values may contain blanks, the first one of each key counts."""
    found = re.findall(r"(?<!\S)([A-Z][\w:/]*)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*\Z)", text, re.DOTALL)
    return dict(reversed(found))


def _job(job_id: str, name: str, raw: str, reason: str, nodes: str, start: str, exit_code: str = "") -> JobInfo:
    word = state(raw)
    codes = re.fullmatch(r"(\d+):(\d+)", exit_code)
    over = codes and word not in ("waiting", "running", "ending", "unknown")  # until then Slurm says 0:0
    return JobInfo(
        job_id=job_id,
        name=name,
        state=word,
        raw=raw.strip(),
        reason=null_to_empty(reason),
        nodes=node_names(nodes),
        start=start if start[:4].isdigit() else None,
        exit_code=int(codes[1]) if codes and over else None,
        signal=int(codes[2]) if codes and over else None,
    )


def node_names(text: str) -> tuple[str, ...]:
    """The names in a column with a node list; none where it is cut off, or has an unknown word for no nodes."""
    try:
        return expand(text) if null_to_empty(text) else ()
    except ValueError:
        return ()


def null_to_empty(text: str) -> str:
    """`text` without surrounding blanks; empty for Slurm's words for no value ("(null)", "N/A" …)."""
    return "" if text.strip().lower() in ("(null)", "none", "n/a", "none assigned") else text.strip()
