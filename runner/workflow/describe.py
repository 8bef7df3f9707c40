"""What a person reads of workflows: the list of them, and what a dry run would do. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runner.plan.engines.ray import BLOCK, Ports, blocks, in_order
from runner.system.nodeset import fold
from runner.system.wording import counted
from runner.workflow.stages import WORKFLOWS, Action, Stage, Step, Submission, Where


def listing() -> str:
    """All workflows with their stages: where each runs, what it needs, and what it leaves."""
    lines = []
    for name, stages in WORKFLOWS.items():
        lines += [f"{name}:", *(f"  {line}" for stage in stages for line in _stage(stage)), ""]
    return "\n".join(lines)


def as_dict() -> dict[str, list[dict[str, Any]]]:
    """What `listing` says as JSON holds it: the stages of each workflow."""
    return {name: [asdict(stage) for stage in stages] for name, stages in WORKFLOWS.items()}


def _stage(stage: Stage) -> list[str]:
    needs = ", ".join(stage.needs) or "nothing"
    return [
        f"{stage.name}: {stage.summary}",
        f"  on {stage.where}; needs {needs}; leaves {', '.join(stage.leaves)}",
    ]  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one stage would do: its hosts, the commands with the hosts that run each, and, if it is on Ray, the name by
    which it chooses its ports (None: Slurm's id of the job, which is not known yet).
    """

    hosts: tuple[str, ...] = ()
    commands: tuple[tuple[str, tuple[str, ...]], ...] = ()
    on_ray: bool = False
    ports_of: str | None = None
    notes: tuple[str, ...] = field(default=())


def dry_run(
    workflow: str,
    steps: Sequence[Step],
    work: Mapping[str, Work],
    submissions: Sequence[Submission],
    scripts: Mapping[str, str],
    ephemeral: range,
) -> str:
    """What a run would do, stage by stage.

    `work` is by stage, `scripts` are the sbatch files by name, `ephemeral` as in `engines.ray.blocks`.
    """
    lines = [f"workflow {workflow}: {counted(len(steps), 'stage')}; nothing is contacted", ""]
    for number, step in enumerate(steps, start=1):
        lines += [*_step(number, step, work.get(step.stage.name, Work()), ephemeral), ""]
    if submissions:
        lines += ["jobs of Slurm:", *(f"  {line}" for line in _jobs(submissions)), ""]
    for name, script in scripts.items():
        lines += [f"--- {name}", script.rstrip("\n"), ""]
    return "\n".join(lines)


def _step(number: int, step: Step, work: Work, ephemeral: range) -> list[str]:
    stage = step.stage
    lines = [f"{number}. {stage.name}: {step.action} ({step.reason})"]
    if step.action is Action.KEEP:
        return lines
    where = fold(work.hosts) or (str(stage.where) if stage.where is Where.CONTROLLER else "nodes that Slurm chooses")
    lines.append(f"   on {where}; needs {', '.join(stage.needs) or 'nothing'}; leaves {', '.join(stage.leaves)}")
    lines += [f"   {note}" for note in work.notes]
    if work.on_ray:
        lines.append(f"   Ray: {_ports(work.ports_of, ephemeral)}")
    for who, words in work.commands:
        lines.append(f"   {who}: {_command(words)}")
    return lines


def _ports(job: str | None, ephemeral: range) -> str:
    if job is None:
        spans = " and ".join(f"{first}-{last}" for first, last in _spans(blocks(ephemeral)))
        return f"{BLOCK} ports of {spans}, chosen by the job's id once Slurm has given one"
    return f"ports {in_order(job, ephemeral)[0].described()}, the next block where one is in use"


def _spans(every: Sequence[Ports]) -> list[tuple[int, int]]:
    """First and last port of each stretch of adjacent blocks."""
    spans: list[tuple[int, int]] = []
    for ports in every:
        if spans and spans[-1][1] + 1 == ports.first:
            spans[-1] = (spans[-1][0], ports.all[-1])
        else:
            spans.append((ports.first, ports.all[-1]))
    return spans


def _command(words: Sequence[str]) -> str:
    """The command as a shell takes it, overrides one a line."""
    head = [word for word in words if "=" not in word or word.startswith("-")]
    overrides = [word for word in words if word not in head]
    lines = [shlex.join(head), *(shlex.quote(word) for word in overrides)]
    return " \\\n        ".join(lines) if overrides else lines[0]


def _jobs(submissions: Sequence[Submission]) -> list[str]:
    return [
        f"{number}: {', '.join(stage.name for stage in job.stages)}"
        + (f", --dependency=afterok of {job.after + 1}" if job.after is not None else "")
        for number, job in enumerate(submissions, start=1)
    ]
