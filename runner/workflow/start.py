"""A workflow planned and carried out: what it needs is found, and its stages are the cells of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from runner.cluster import profiles
from runner.cluster import slurm as slurm_settings
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Inventory
from runner.cluster.ssh import rendered
from runner.errors import UsageError
from runner.launch import blame, carry
from runner.launch import prepare as launch_prepare
from runner.launch import resume as launch_resume
from runner.launch import start as launch_start
from runner.launch.carry import Dependencies, RunResult, new_id
from runner.launch.prepare import Selected
from runner.launch.supply import Data
from runner.plan import config
from runner.plan.plan import Cell, Plan, changed_inputs
from runner.plan.request import Request
from runner.report import conclude
from runner.report.progress import Display
from runner.results.rundir import RunDir
from runner.results.status import cell_status
from runner.system import manifest
from runner.system.places import cache_dir
from runner.workflow import prepare, publish, verl
from runner.workflow.asked import TRAINERS, Options, profile, refuse_unused, settings, strategy, translated
from runner.workflow.links import Maker, checkpoint_folder, model_folder
from runner.workflow.prepare import Files
from runner.workflow.progress import shown
from runner.workflow.record import Stages
from runner.workflow.stages import (
    RL_DATA,
    SFT_DATA,
    Action,
    Former,
    Program,
    Stage,
    Step,
    chosen,
    stages_of,
    steps,
)

Read = Callable[[str | None], Inventory]

_NEWEST = "latest_checkpointed_iteration.txt"  # verl's
_UNREAD = "a question of the data"  # in a dry run, where they are not here
_NOT_YET = prepare.Prepared(Path(), {SFT_DATA: Files(Path()), RL_DATA: Files(Path())}, {}, "", 0)


@dataclass(frozen=True)
class Planned:
    """A workflow on nodes that were not contacted: its stages and what becomes of each, what was found for it, and the
    run that carries out those on nodes. `inputs` are those of every stage (`stages.inputs`), and `work` a folder that
    all nodes see. `translated` says what became of each line of the user's document.
    """

    options: Options
    work: Path
    stages: tuple[Stage, ...]
    steps: tuple[Step, ...]
    profile: str
    found: prepare.Prepared
    inputs: Mapping[str, Mapping[str, str]]
    run: launch_prepare.Prepared
    translated: tuple[str, ...] = ()


def planned(options: Options, read: Read, display: Display | None = None, run: RunDir | None = None) -> Planned:
    """Check and plan a workflow, or what is left of it in `run`.

    With a `display`, what it needs is found and fetched. Without one, nothing is contacted or written, and a checksum
    that only this can tell is left open. Raises UsageError for what cannot be planned, before anything is fetched, and
    what `prepare.prepare` raises.
    """
    if options.publish is not None:
        publish.check(options.publish)
    elif Program.PUBLISH in options.stages:
        raise UsageError("--stages publish: say where to with --publish dir:PATH, hf:OWNER/NAME or rsync:HOST:PATH")
    refuse_unused(options)
    given = settings(options.settings, options.workflow, strategy(options))
    selected = launch_prepare.selected(options.run, read, {"slurm": given.slurm} if given.slurm else {})
    before = Plan.from_dict(run.read_plan()) if run else None
    if before is not None:
        selected = _as_before(selected, before)
    work = work_of(options, selected)
    _require_folder("--results", options.run.results)
    if options.work:
        _require_folder("--work", work)
    former = _former(options, run, before, work / run.run_id) if run and before else {}
    left = {name for stage in stages_of(options.workflow) if _stands(former, stage) for name in stage.leaves}
    stages = chosen(options.workflow, options.stages, left)
    if options.publish is None:
        stages = tuple(stage for stage in stages if stage.program is not Program.PUBLISH)
    if display is not None:
        selected = _observed(options, selected, work)
    elif (selected.slurm or {}).get("shared") is not None:  # else what only the nodes can tell
        _require_seen(options, work, selected.slurm)
    name = profile(options, selected.device)
    maker = Maker(options, given, selected, name, _NOT_YET)
    # Refuses what cannot work, before anything is fetched.
    told = {stage.program: maker.overrides(stage) for stage in stages if stage.program in TRAINERS}
    lines = translated(options, selected, verl.PROFILES[name], given.verl.get(Program.PPO, {}))
    asked = replace(_asked(options, selected, name, work), max_tokens=_longest(told.get(Program.SFT, {})))
    if display is None:
        found = prepare.preview(asked)
    else:
        with shown(display) as progress:
            found = prepare.prepare(asked, progress)
    maker = replace(maker, found=found if found.question else replace(found, question=_UNREAD))
    if all(found.checksums.values()):  # in a dry run one may be open
        needing = [stage for stage in stages if stage.program is not Program.PUBLISH or not _asks_as(options, run)]
        _require_made_of(maker.inputs(), needing, stages_of(options.workflow), former)
    decided = steps(stages, maker.inputs(), former)

    def located(request: Request) -> Request:
        kept = [*stages, *(stage for stage in stages_of(options.workflow) if _stands(former, stage))]
        return replace(request, chain=maker.links(kept, work / request.run_id))

    request = launch_prepare.requested(options.run, selected, {}, {}, run.run_id if run else new_id())
    targets = config.load_targets("workflow", given.targets)
    request = located(replace(request, profile=name, shared=str(work), targets=targets))
    asked_of_run = launch_prepare.of_chain(options.run, selected, request, located, found.notes)
    return Planned(options, work, stages, decided, name, found, maker.inputs(), asked_of_run, lines)


def work_of(options: Options, selected: Selected) -> Path:
    """The folder that all nodes see, in which each run has its own for checkpoints and models."""
    return Path(options.work or selected.nodes[0].shared or options.run.results).absolute()


def _require_folder(option: str, folder: Path) -> None:
    """Raise UsageError where a folder cannot be made at this place, since a file is there or above it."""
    there = next((one for one in (folder.absolute(), *folder.absolute().parents) if one.exists()), None)
    if there is not None and not there.is_dir():
        raise UsageError(f"{option} {folder}: {there} is a file: give a folder")


def _asked(options: Options, selected: Selected, name: str, work: Path) -> prepare.Asked:
    local = not BACKENDS[selected.nodes[0].backend].remote
    return prepare.Asked(
        workflow=options.workflow,
        profile=name,
        lock=profiles.lock(profiles.LOCKS[name][0]),
        work=work,
        cache=cache_dir(),
        model=options.model,
        data=options.data,
        rl_data=options.rl_data,
        reward=Path(options.reward) if options.reward else None,
        publish=options.publish,
        seen=(Path("/"),) if local else (work,),
        seed=options.run.seed,
        saves=verl.KEEP,
    )


def _longest(told: Mapping[str, Any]) -> int | None:
    """The tokens of a sample at which the trainer would stop, by what it is told; None: it cuts, or is not there."""
    return told["data.max_length"] if told.get("data.truncation") == "error" else None


def _observed(options: Options, selected: Selected, work: Path) -> Selected:
    """With what Slurm's settings leave to be seen. Raises UsageError where the nodes do not see the work folder."""
    if selected.slurm is None:
        return selected
    with rendered(selected.inventory) if BACKENDS[selected.nodes[0].backend].remote else nullcontext() as ssh_config:
        slurm = carry.observed(selected.slurm, selected.inventory, ssh_config, options.run.results)
    _require_seen(options, work, slurm)
    return replace(selected, slurm=slurm)


def _require_seen(options: Options, work: Path, slurm: Mapping[str, Any] | None) -> None:
    """Raise UsageError where Slurm's nodes do not see the work folder, as far as its settings tell."""
    if work == options.run.results.absolute() and not slurm_settings.Settings(**(slurm or {})).sees_files:
        raise UsageError(
            f"the nodes do not see {work}, where checkpoints and models are: give a folder that they and this "
            "machine see with --work DIR, or runner_shared in the inventory"
        )


def _as_before(selected: Selected, before: Plan) -> Selected:
    """The nodes of a run that goes on, as the inventory has them today."""
    names = [node.name for node in before.nodes]
    nodes = tuple(node for node in selected.nodes if node.name in names)
    count = max(cell.num_nodes for cell in before.cells)
    if len(nodes) < count:
        gone = sorted({*names} - {node.name for node in nodes})
        raise UsageError(
            f"run {before.run_id} needs {', '.join(gone)}, which the inventory {selected.inventory.source} does not "
            "have: give the inventory that it was started with (-i)"
        )
    return replace(selected, nodes=nodes, counts=(count,), slurm=before.slurm)


# --- what a former run has left ---------------------------------------------------------------------------


def _former(options: Options, run: RunDir, before: Plan, folder: Path) -> dict[str, Former]:
    """What `run` recorded of each stage, and what is there of it now in its `folder`."""
    status = run.read_status()
    found = {}
    for stage in stages_of(options.workflow):
        if (cell := next((cell for cell in before.cells if cell.id == stage.name), None)) is not None:
            entry, made_from = status["cells"][cell.id], _made_from(status, cell)
            if stage.program is Program.MERGE:
                there = manifest.complete(Path(model_folder(folder, stage, made_from))) is not None
                found[stage.name] = Former(entry["state"], made_from, there)
            else:
                step = _newest(Path(checkpoint_folder(folder, stage, made_from)))
                found[stage.name] = Former(entry["state"], made_from, step is not None, step)
        elif (noted := Stages(run).entries().get(stage.name)) is not None:
            found[stage.name] = Former(noted["state"], noted["inputs"], True)
    return {name: one for name, one in found.items() if one.state != "planned"}


def _made_from(status: Mapping[str, Any], cell: Cell) -> Mapping[str, str]:
    """What a stage was made from, or is: a stage that is planned anew keeps what it was made from until it runs."""
    return status["cells"][cell.id].get("inputs") or cell.inputs


def _newest(folder: Path) -> str | None:
    try:
        return f"global_step_{int((folder / _NEWEST).read_text())}"
    except (OSError, ValueError):
        return None


def _require_made_of(
    now: Mapping[str, Mapping[str, str]], stages: Sequence[Stage], every: Sequence[Stage], former: Mapping[str, Former]
) -> None:
    """Raise UsageError where one of `stages` would take from another, which does not run, what that has not made: it
    was made from other inputs than `now`.
    """
    changed = {
        stage.name: changed_inputs(now[stage.name], former[stage.name].inputs)
        for stage in every
        if stage not in stages and stage.program is not Program.PREPARE and stage.name in former
    }
    again = [name for name, inputs in changed.items() if inputs]
    for stage in stages:
        for need in stage.needs:
            source = next(each.name for each in every if need in each.leaves)
            if source in again:
                raise UsageError(
                    f"stage {stage.name} needs {need}, which the run has of other inputs (stage {source}, changed "
                    f"since: {', '.join(changed[source])}): run {', '.join(again[: again.index(source) + 1])} again as "
                    "well, or leave out what changes them"
                )


def _asks_as(options: Options, run: RunDir | None) -> bool:
    """Whether a run was asked for the same model: what its stages are made from may still be another by now, since the
    product or a lock is another. Publishing it does not make it again.
    """
    found = Stages(run).asked() if run else None
    if found is None:
        return False
    before = from_json(found[1])
    return options == replace(before, run=options.run, stages=options.stages, publish=options.publish)


def _stands(former: Mapping[str, Former], stage: Stage) -> bool:
    one = former.get(stage.name)
    return one is not None and one.state == "complete" and one.artefact


# --- carried out ------------------------------------------------------------------------------------------


def start(options: Options, read: Read, display: Display, dependencies: Dependencies | None = None) -> RunResult:
    """Carry out a workflow: find what it needs, run its stages, publish the model.

    Raises what `planned`, `launch.start.start` and `publish.publish` raise.
    """
    made = planned(options, read, display)
    for note in (*made.translated, *made.found.notes):
        display.note(note)
    ended = launch_start.start(made.run, display, _recorded(made, dependencies))
    return _published(made, ended, display)


def resume(
    options: Options,
    again: launch_resume.Options,
    read: Read,
    display: Display,
    dependencies: Dependencies | None = None,
) -> RunResult:
    """Carry out what is left of a run, as `options` ask for it now: what stands is kept."""
    made = planned(options, read, display, again.run)
    for step in made.steps:
        display.note(f"{step.stage.name}: {step.action} ({step.reason})")
    left = [step for step in made.steps if step.stage.name in cells_of(made) and step.action is not Action.KEEP]
    if left:
        again = replace(again, replanned=lambda plan, status: replanned(made, plan, status))
        ended = launch_resume.resume(again, read, display, _recorded(made, dependencies))
    else:
        ended = RunResult(again.run, conclude.judge(again.run))
    return _published(made, ended, display)


def cells_of(made: Planned) -> Mapping[str, Cell]:
    """The cells of a planned workflow by the name of their stage."""
    return {cell.id: cell for cell in made.run.plan.cells}


def replanned(made: Planned, plan: Plan, status: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """The plan and the status of a run with the stages that are asked for now; those that stand are as they were.

    A stage that goes on does so where it was: its job may continue. One that is made from something else does not, and
    the job that it has is of no use.
    """
    becomes = {step.stage.name: step for step in made.steps}
    before = {cell.id: cell for cell in plan.cells}
    entries = dict(status["cells"])
    cells = []
    for cell in made.run.plan.cells:
        step = becomes.get(cell.id)
        old = before.get(cell.id)
        if old is not None and (step is None or step.action is Action.KEEP):
            cells.append(replace(old, after=cell.after))
            continue
        if old is not None:
            cell = replace(cell, attempt=old.attempt, master_port=old.master_port, hosts=old.hosts)
        cells.append(cell)
        entry = entries.setdefault(cell.id, cell_status(1))
        has_job = old is not None and cell.id in status.get("allocation", {}) and cell.inputs != old.inputs
        if step is not None and (entry["state"] == "complete" or has_job):
            entries[cell.id] = {**entry, "state": "incomplete", "error": blame.error("plan_changed", step.reason)}
    kept = {cell.id for cell in cells}
    return replace(plan, cells=tuple(cells)), {
        **status,
        "cells": {name: entry for name, entry in entries.items() if name in kept},
    }


def _recorded(made: Planned, dependencies: Dependencies | None) -> Dependencies:
    """Dependencies that record in the run's directory what was asked for and found, before its first cell runs."""
    dependencies = dependencies or Dependencies()

    def data(plan: Plan, cells: Sequence[Cell], display: Display) -> Data | None:
        record = Stages(RunDir(Path(plan.run_dir)))
        record.ask(made.options.workflow, to_json(made.options))
        with record.running(Program.PREPARE, made.inputs[Program.PREPARE]) as left:
            left |= {"model": str(made.found.model), "checksums": dict(made.found.checksums)}
            left |= {"data": {name: str(files.train) for name, files in made.found.data.items()}}
        return dependencies.data(plan, cells, display)

    return replace(dependencies, data=data)


def _published(made: Planned, ended: RunResult, display: Display) -> RunResult:
    """The run with its model published, where that is asked for and every stage before it is complete."""
    step = next((step for step in made.steps if step.stage.program is Program.PUBLISH), None)
    states = {cell["state"] for cell in ended.summary["cells"]}
    if step is None or made.options.publish is None or step.action is Action.KEEP or states != {"complete"}:
        return ended
    (model,) = step.stage.needs
    merge = next(stage for stage in stages_of(made.options.workflow) if model in stage.leaves)
    plan = Plan.from_dict(ended.run.read_plan())
    made_from = _made_from(ended.run.read_status(), next(cell for cell in plan.cells if cell.id == merge.name))
    folder = model_folder(made.work / ended.run.run_id, merge, made_from)
    with ended.run.alive(), Stages(ended.run).running(step.stage.name, made.inputs[step.stage.name]) as left:
        with shown(display) as progress:
            found = publish.publish(Path(folder), made.options.publish, progress)
        left |= {"where": found.where, "bytes": found.bytes, "digest": found.digest}
    display.note(f"published: {found.where}")
    return replace(ended, summary=conclude.judge(ended.run))  # where it is now is in the report as well


# --- options, kept with the run ---------------------------------------------------------------------------


def to_json(options: Options) -> dict[str, Any]:
    """Options as JSON."""
    values = asdict(options)
    values["run"]["results"] = str(options.run.results)
    return values


def from_json(values: Mapping[str, Any]) -> Options:
    """The options in a run's status.json; what this version does not know is passed over.

    Raises UsageError for what is none.
    """

    def known(kind: Any, found: Mapping[str, Any]) -> dict[str, Any]:
        names = {each.name for each in fields(kind)}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key in names}

    try:
        run = launch_prepare.Options(
            **{**known(launch_prepare.Options, values["run"]), "results": Path(values["run"]["results"])}
        )
        return Options(**{**known(Options, values), "run": run})
    except (KeyError, TypeError, AttributeError):
        raise UsageError("status.json does not have what the workflow was asked for: start another run") from None
