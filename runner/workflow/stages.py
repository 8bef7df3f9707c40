"""The workflows, their stages, and which of them are still to run. Pure.

A stage needs artefacts and leaves others. What `prepare` leaves is known by its checksum, and what another stage leaves
by the hash of what it was made from: so a change anywhere is a change of everything behind it, before anything has run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from runner.errors import UsageError, unknown
from runner.plan.plan import changed_inputs


class Where(StrEnum):
    """Where a stage runs."""

    CONTROLLER = "this machine"
    NODES = "all nodes"
    ONE_NODE = "the first node"


class Program(StrEnum):
    """What a stage runs."""

    PREPARE = "prepare"
    SFT = "sft"
    MERGE = "merge"
    PPO = "ppo"
    GRPO = "grpo"
    PUBLISH = "publish"


@dataclass(frozen=True)
class Stage:
    """One stage of a workflow. `needs` and `leaves` are names of artefacts."""

    name: str
    program: Program
    summary: str
    where: Where
    needs: tuple[str, ...]
    leaves: tuple[str, ...]

    @property
    def resumes(self) -> bool:
        """Whether a stage that was interrupted goes on from a checkpoint of its own."""
        return self.program in (Program.SFT, Program.PPO, Program.GRPO)


ENVIRONMENT, MODEL, SFT_DATA, RL_DATA, PUBLISHED = "environment", "model", "sft-data", "rl-data", "published"
_DATA = {Program.SFT: SFT_DATA, Program.PPO: RL_DATA, Program.GRPO: RL_DATA}


def _prepare(*data: str) -> Stage:
    leaves = (ENVIRONMENT, MODEL, *data)
    return Stage("prepare", Program.PREPARE, "found or fetched, with checksums", Where.CONTROLLER, (), leaves)


def _trained(program: Program, summary: str, start: str) -> tuple[Stage, Stage]:
    """A stage that trains the model `start`, and the merge of its last checkpoint."""
    checkpoint, model = f"{program}-checkpoint", f"{program}-model"
    merged = "its last checkpoint as one Hugging Face folder, loaded and asked a question"
    needs = (ENVIRONMENT, start, _DATA[program])
    return (
        Stage(program.value, program, summary, Where.NODES, needs, (checkpoint,)),
        Stage(f"merge-{program}", Program.MERGE, merged, Where.ONE_NODE, (ENVIRONMENT, checkpoint), (model,)),
    )


def _publish(model: str) -> Stage:
    summary = "to a folder, to the hub or by rsync, and read back"
    return Stage("publish", Program.PUBLISH, summary, Where.CONTROLLER, (model,), (PUBLISHED,))


_SFT = "fine-tuning on question and answer, torchrun"
_PPO = "PPO with critic and reference on Ray"
_GRPO = "GRPO, groups of answers without a critic, on Ray"

WORKFLOWS: Mapping[str, tuple[Stage, ...]] = {
    "sft-ppo": (
        _prepare(SFT_DATA, RL_DATA),
        *_trained(Program.SFT, _SFT, MODEL),
        *_trained(Program.PPO, _PPO, "sft-model"),
        _publish("ppo-model"),
    ),
    "sft": (_prepare(SFT_DATA), *_trained(Program.SFT, _SFT, MODEL), _publish("sft-model")),
    "ppo": (_prepare(RL_DATA), *_trained(Program.PPO, _PPO, MODEL), _publish("ppo-model")),
    "grpo": (_prepare(RL_DATA), *_trained(Program.GRPO, _GRPO, MODEL), _publish("grpo-model")),
}


def stages_of(workflow: str) -> tuple[Stage, ...]:
    """The stages of a workflow in order. Raises UsageError for a name that is none."""
    if workflow not in WORKFLOWS:
        raise unknown("workflow", workflow, WORKFLOWS)
    return WORKFLOWS[workflow]


def chosen(workflow: str, names: Iterable[str], available: Iterable[str] = ()) -> tuple[Stage, ...]:
    """The stages of a workflow that `--stages` names, in the workflow's order; without names, all of it.

    A name is a stage's, or that of a program (`merge`: every merge). `prepare` is always among them: what it finds
    again costs nothing. `available` are the artefacts that a former run has.

    Raises UsageError for an unknown name, and for a stage whose input nothing leaves.
    """
    stages = stages_of(workflow)
    known = {name: stage for stage in stages for name in (stage.program.value, stage.name)}
    names = list(names)
    for name in names:
        if name not in known:
            raise unknown("stage", name, known, f"workflow {workflow}")
    taken = [
        stage
        for stage in stages
        if not names or {stage.name, stage.program.value} & set(names) or stage.program is Program.PREPARE
    ]
    have = set(available)
    for stage in taken:
        for need in stage.needs:
            if need not in have:
                source = next(each.name for each in stages if need in each.leaves)
                raise UsageError(
                    f"stage {stage.name} needs {need}, which stage {source} leaves: add it (--stages "
                    f"{','.join([source, *names])}), or go on with a run that has it (--resume RUN)"
                )
        have.update(stage.leaves)
    return tuple(taken)


# --- inputs ------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 over a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def inputs(
    workflow: str, settings: Mapping[str, Mapping[str, Any]], prepared: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """By stage, what it is made from: a digest for each of its settings and for each artefact that it needs.

    `settings` are by stage; `prepared` has the checksum of each artefact that `prepare` leaves. On which nodes a stage
    runs is no input: others make the same.
    """
    found: dict[str, dict[str, str]] = {}
    left: dict[str, str] = {}
    for stage in stages_of(workflow):
        own = {f"setting {name}": digest(value) for name, value in settings.get(stage.name, {}).items()}
        if stage.program is Program.PREPARE:
            own |= {name: prepared[name] for name in stage.leaves}
        found[stage.name] = {"program": stage.program.value, **own, **{need: left[need] for need in stage.needs}}
        made = digest(found[stage.name])
        left |= {name: prepared.get(name, made) for name in stage.leaves}
    return found


# --- states ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Former:
    """What a former run recorded of a stage: its state (`results/status`), what it was made from, and whether what it
    left, or a checkpoint within it, is still there.
    """

    state: str
    inputs: Mapping[str, str]
    artefact: bool = False
    checkpoint: str | None = None


class Action(StrEnum):
    """What becomes of a stage."""

    KEEP = "keep"
    CONTINUE = "continue"
    RUN = "run"


@dataclass(frozen=True)
class Step:
    """One stage of a run to come: what becomes of it, and why; `checkpoint` is the one from which it continues."""

    stage: Stage
    action: Action
    reason: str
    checkpoint: str | None = None


def steps(
    stages: Sequence[Stage], now: Mapping[str, Mapping[str, str]], former: Mapping[str, Former]
) -> tuple[Step, ...]:
    """What becomes of each stage: what is complete and was made from the same is kept, what was interrupted continues
    from its checkpoint, and the rest runs, with all that needs what it leaves.
    """
    anew: set[str] = set()  # artefacts
    decided = []
    for stage in stages:
        step = _step(stage, now[stage.name], former.get(stage.name), anew)
        if step.action is not Action.KEEP and stage.program is not Program.PREPARE:  # what that finds, checksums tell
            anew.update(stage.leaves)
        decided.append(step)
    return tuple(decided)


def _step(stage: Stage, now: Mapping[str, str], former: Former | None, anew: set[str]) -> Step:
    if former is None:
        return Step(stage, Action.RUN, "it has not run")
    if changed := changed_inputs(now, former.inputs):
        return Step(stage, Action.RUN, f"changed since: {', '.join(changed)}")
    if renewed := [need for need in stage.needs if need in anew]:
        return Step(stage, Action.RUN, f"made anew: {', '.join(renewed)}")
    if former.state == "complete" and former.artefact:
        return Step(stage, Action.KEEP, "complete, and nothing has changed")
    if stage.resumes and former.checkpoint:
        return Step(stage, Action.CONTINUE, f"{former.state}, from {former.checkpoint}", former.checkpoint)
    if former.state == "complete":
        return Step(stage, Action.RUN, f"no longer there: {', '.join(stage.leaves)}")
    return Step(stage, Action.RUN, f"{former.state}, without a checkpoint" if stage.resumes else former.state)


# --- jobs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """One job of Slurm: its stages, one after the other, and the index of the submission that must end well before."""

    stages: tuple[Stage, ...]
    after: int | None = None


def submissions(steps: Sequence[Step], one_allocation: bool) -> tuple[Submission, ...]:
    """The jobs of the steps that run on nodes, in order: one a stage, each after the one before, or one for all."""
    running = [
        step.stage for step in steps if step.action is not Action.KEEP and step.stage.where is not Where.CONTROLLER
    ]
    if one_allocation:
        return (Submission(tuple(running)),) if running else ()
    return tuple(Submission((stage,), index - 1 if index else None) for index, stage in enumerate(running))
