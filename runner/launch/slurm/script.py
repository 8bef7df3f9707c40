"""Renders jobs as sbatch files. Values in, text out.

Written for Slurm 20.11 and later.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.cluster.slurm import WORD, Settings, clock, placeholder
from runner.errors import UsageError
from runner.launch.slurm.job_log import heading
from runner.node.protocol import Stopped, slurm_signal
from runner.system.nodeset import fold
from runner.system.wording import counted

# --- settings -------------------------------------------------------------------------------------


_UNBREAKABLE = re.compile(r"[^\x00-\x1f\x7f\"'\\`$#]*")  # remains one value between double quotes


# --- one job --------------------------------------------------------------------------------------

STARTUP_S = 120  # added to the time limit of every cell: imports from a cold file system, gathering
# At this time before its limit, or up to a minute earlier, every process of a job's tasks gets SIGUSR1 and SIGCONT,
# including those in other sessions; one that does not catch or ignore it dies. After the limit: SIGTERM, KillWait.
NOTICE_S = 60


@dataclass(frozen=True)
class Step:
    """One cell in a job. `hosts` are Slurm names in rank order; none: Slurm places.

    srun starts tasks in Slurm's own order of nodes whatever the order of `hosts`, so an agent takes the rank order
    from its request, or without one from `slurm_step.placement`. `inner` is the command by which the first node's agent
    starts the ranks of all nodes; None: each agent starts those of its own.
    """

    cell: str
    num_nodes: int
    request: Mapping[str, Any]
    hosts: tuple[str, ...] = ()
    timeout_s: float = 3600
    inner: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BatchJob:
    """One sbatch file: one cell, or several: one after the other in one allocation, or each a task of an `array`.

    `name` is unique, so that a job can be found again by it. `python` is the agent's interpreter on the nodes,
    `log` the path of the job's output in a folder that exists on the batch host; `secrets` are names of
    environment variables to pass on, never values. Of a `chain` no cell runs after one that failed, and the job itself
    only once the job with the id `after` has ended well (None: it waits for none); else Slurm cancels it.
    """

    name: str
    steps: tuple[Step, ...]
    python: str
    log: str
    gpus_per_node: int
    device: str
    secrets: tuple[str, ...] = ()
    array: bool = False
    chain: bool = False
    after: str | None = None


def limit_s(job: BatchJob, settings: Settings) -> int:
    """The time limit of `job` in s: the one set, or what its cells may take; rounded up to whole minutes."""
    limits = [step.timeout_s + STARTUP_S for step in job.steps]
    limit = settings.time_limit_s or (max(limits) if job.array else sum(limits))
    return math.ceil(limit / 60) * 60


def requested_gres(gpus_per_node: int, device: str, settings: Settings) -> str | None:
    """The GRES of each node, such as `gpu:h200:8`; None: none is requested."""
    return settings.gres or (f"gpu:{gpus_per_node}" if device == "cuda" else None)


def cells_of(script: str) -> list[str]:
    """The cells of an sbatch file that `render` made, in the order of their steps."""
    return re.findall(r"^srun --job-name=(\S+) ", script, re.MULTILINE)


def render(job: BatchJob, settings: Settings) -> str:
    """The text of the job's sbatch file. The batch shell expands nothing in it except exit statuses.

    Raises UsageError for a value that would break a line or hide an option, and for a placeholder.
    """
    hosts = tuple(dict.fromkeys(host for step in job.steps for host in step.hosts))
    options = {
        "job-name": job.name,
        # One at a time: side by side they would measure each other's traffic.
        "array": f"0-{len(job.steps) - 1}%1" if job.array else None,
        "dependency": f"afterok:{job.after}" if job.after else None,
        "kill-on-invalid-dep": "yes" if job.after else None,
        "output": job.log.replace("%", "%%") + (".%a" if job.array else ""),  # sbatch has patterns such as %j
        "open-mode": "append",
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "nodes": max(len(hosts), *(step.num_nodes for step in job.steps)),
        "ntasks-per-node": 1,
        "exclusive": "",
        "mem": settings.mem or 0,
        "gres": requested_gres(job.gpus_per_node, job.device, settings),
        "constraint": settings.constraint,
        "reservation": settings.reservation,
        "nodelist": ",".join(hosts) or None,
        "exclude": ",".join(settings.exclude) or None,
        "time": clock(limit_s(job, settings)),
        "signal": f"{slurm_signal(Stopped.TIME_LIMIT)}@{NOTICE_S}",
        "no-requeue": "",
        "export": ",".join(job.secrets) or "NIL",
    }
    needs = f"# It hands on {', '.join(job.secrets)} from the environment of sbatch." if job.secrets else None
    lines = [
        "#!/bin/bash",
        f"# {job.name}: Shakedown's agent on every node of each cell, one cell after the other"
        + (", each a task of an array." if job.array else "."),
        *(f"#   {_summary(step)}" for step in job.steps),
        "# By hand: `sbatch THIS_FILE`, with no SBATCH_* variable set, since those win over the lines below.",
        *([needs] if needs else []),
        *(_directive(name, value) for name, value in _unbroken(options)),
        # What the user's jobs are to wait for, the first job of the chain has waited for.
        *(f"#SBATCH {option}" for option in settings.extra if not (job.after and option.startswith("--dep"))),
        "",
        "# Rank, node list and master address come from Slurm inside each task, not from this shell. A cell that",
        "# fails ends the job: the next one needs what it leaves."
        if job.chain
        else "# fails does not stop the next one; the job ends with the first status that is not 0.",
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


def _summary(step: Step) -> str:
    where = f"on {fold(step.hosts)}" if step.hosts else "placed by Slurm"
    return f"cell {step.cell}: {counted(step.num_nodes, 'node')} {where}, at most {step.timeout_s:g} s"


def _choice(job: BatchJob) -> list[str]:
    """The lines of all cells, of which a task of the array runs one."""
    cases = [[f"{number})", *_srun(job, step)[1:], ";;"] for number, step in enumerate(job.steps)]
    return ["", 'case "$SLURM_ARRAY_TASK_ID" in', *(line for case in cases for line in case), "esac"]


def _srun(job: BatchJob, step: Step) -> list[str]:
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
        # The first nodes of the allocation, as the controller expects.
        "relative": 0 if together and not step.hosts else None,
        # A cell that hangs must not use up the time of the others; alone, it has the job's own limit.
        "time": clock(math.ceil((step.timeout_s + STARTUP_S) / 60) * 60) if together else None,
    }
    # Without the first agent no rank goes on: nor do the agents that watch them. A minute later, at the latest.
    bad_exit, wait_s = (1, 60) if step.inner else (0, 0)
    words = [shlex.quote(f"--{name}={value}") for name, value in _unbroken(options)]
    ((_, python),) = _unbroken({"python": job.python})
    return [
        "",
        f"# {_summary(step)}",
        *([f"# The agent of its first node starts all ranks: {shlex.join(step.inner)}"] if step.inner else []),
        *([f"echo {shlex.quote(heading(step.cell))}"] if together else []),
        f"srun {' '.join(words)} \\",
        # export: everything that the job's own --export allowed; without it, that option would apply here as well.
        f"  --cpu-bind=none --kill-on-bad-exit={bad_exit} --wait={wait_s} --input=all --export=ALL \\",
        f"  {shlex.quote(python)} -P -u -m runner.node <<'{delimiter}'",
        request,
        delimiter,
        'result=$?; [ "$status" -ne 0 ] || status=$result',
        *(['[ "$status" -eq 0 ] || exit "$status"'] if job.chain else []),
    ]


def _unbroken(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The options that are set, as texts; raises UsageError for one that would not remain one value."""
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
