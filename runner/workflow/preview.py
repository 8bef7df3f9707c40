"""What a planned workflow would do, for `--dry-run`: the words, commands and sbatch files that the run would have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.cluster.backends import BACKENDS
from runner.launch.slurm import allocations
from runner.plan.engines import ray
from runner.plan.engines.ranks import Ranks
from runner.plan.engines.registry import ENGINES
from runner.plan.plan import Cell, Plan
from runner.system.process import cell_marker
from runner.workflow import describe, verl_settings
from runner.workflow.asked import TRAINERS
from runner.workflow.describe import Work
from runner.workflow.stages import Action, Program, Step, submissions
from runner.workflow.start import Planned, cells_of

EPHEMERAL = range(32768, 61000)  # Linux's own; a node's may differ, which it sees for itself
_FIRST, _OTHER, _CORES = "FIRST_NODE", "OTHER_NODE", "CORES"  # in place of what only a node, or Slurm, knows


def text(made: Planned) -> str:
    """The dry run as text."""
    plan = made.run.plan
    running = _running(made)
    scheduled = BACKENDS[plan.backend].scheduled
    scripts = allocations.preview(plan, running) if scheduled and running else []
    jobs = submissions(made.steps, plan.one_allocation) if scheduled else ()
    named = dict(script.split(":\n", 1) for script in scripts)
    shown = describe.dry_run(made.options.workflow, made.steps, works(made), jobs, named, EPHEMERAL)
    lines = [f"{made.options.document_name}, line by line:", *made.translated, ""] if made.translated else []
    return "\n".join([*lines, shown.rstrip(), *(f"\n{note}" for note in made.found.notes)])


def as_dict(made: Planned) -> dict[str, Any]:
    """The dry run as JSON: what becomes of each stage, the commands of each, and the plan."""
    work = works(made)
    return {
        "workflow": made.options.workflow,
        "profile": made.profile,
        "translated": list(made.translated),
        "stages": [
            {
                "name": step.stage.name,
                "action": step.action,
                "reason": step.reason,
                "inputs": dict(made.inputs[step.stage.name]),
                "commands": [
                    {"on": who, "command": list(words)} for who, words in work.get(step.stage.name, Work()).commands
                ],
            }
            for step in made.steps
        ],
        "plan": made.run.plan.to_dict(),
    }


def _running(made: Planned) -> list[Cell]:
    """The cells that would run."""
    kept = {step.stage.name for step in made.steps if step.action is Action.KEEP}
    named = {step.stage.name for step in made.steps}
    return [cell for name, cell in cells_of(made).items() if name in named - kept]


def works(made: Planned) -> Mapping[str, Work]:
    """What each stage would do, by its name."""
    found = {}
    for step in made.steps:
        if (cell := cells_of(made).get(step.stage.name)) is not None:
            found[step.stage.name] = _work(made.run.plan, cell, step)
        elif step.stage.program is Program.PREPARE:
            found[step.stage.name] = Work(notes=tuple(_needs(made)))
        else:
            found[step.stage.name] = Work(notes=(f"publish to {made.options.publish}",))
    return found


def _needs(made: Planned) -> list[str]:
    data = [f"{name} {files.train}" for name, files in made.found.data.items()]
    reward = [f"reward {made.found.reward}"] if made.found.reward else []
    return [f"environment {made.profile}", f"model {made.found.model}", *data, *reward]


def _work(plan: Plan, cell: Cell, step: Step) -> Work:
    aliases = {node.name: node.alias for node in plan.nodes}
    hosts = tuple(aliases[host] for host in cell.hosts)
    python = plan.nodes[0].of_profile(cell.profile).python
    commands = _launch(plan, cell)
    on_ray = ENGINES[cell.engine].on_ray
    if on_ray:
        commands += _ray(plan, cell, python)
    commands.append((_ranks(cell, on_ray), _program(cell, step.stage.program, python)))
    placed = bool(cell.hosts) and not BACKENDS[plan.backend].scheduled
    job = cell_marker(plan.run_id, cell.id) if placed else None
    return Work(hosts, tuple(commands), on_ray, job)


def _ranks(cell: Cell, on_ray: bool) -> str:
    if on_ray:
        return "once, on the head"
    return "each rank" if cell.world_size > 1 else "the only rank"


def _launch(plan: Plan, cell: Cell) -> list[tuple[str, tuple[str, ...]]]:
    """The command of each node that starts its ranks; under Slurm that of the first node, and of one of the others."""
    if any(cell.launch.argv):
        aliases = {node.name: node.alias for node in plan.nodes}
        started = zip(cell.hosts, cell.launch.argv, strict=True)
        return [(aliases[host], tuple(argv)) for host, argv in started if argv]
    nodes = [
        replace(plan.nodes[0].of_profile(cell.profile), name=name, alias=name, address=name) for name in _names(cell)
    ]
    shared = allocations.settings_of(plan).sees_files

    def argv(index: int) -> tuple[str, ...]:
        """As on this node, which has a folder of its own in one that all share."""
        folder = str(Path(cell.cell_dir, nodes[index].name, cell.id)) if shared else cell.cell_dir
        ranks = Ranks(
            nodes=nodes,
            gpus_per_node=cell.gpus_per_node,
            master_address=_FIRST,
            master_port=cell.master_port,
            cell_dir=folder,
            launcher_dir=folder,
            ssh_config=None,
            marker=cell_marker(plan.run_id, cell.id),
        )
        return tuple(ENGINES[cell.engine].launch(ranks).argv[index] or ())

    return [(node.name, words) for index, node in enumerate(nodes) if (words := argv(index))]


def _names(cell: Cell) -> tuple[str, ...]:
    return (_FIRST,) if cell.num_nodes == 1 else (_FIRST, _OTHER)


def _ray(plan: Plan, cell: Cell, python: str) -> list[tuple[str, tuple[str, ...]]]:
    """What supervisors start: Ray on each node."""
    marker = cell_marker(plan.run_id, cell.id)
    ports, store = ray.in_order(marker, EPHEMERAL)[0], ray.store_bytes(cell.device)
    placed = bool(cell.hosts) and not BACKENDS[plan.backend].scheduled
    nodes = [(plan.node(host).alias, plan.node(host).address) for host in cell.hosts] if placed else [
        (name, name) for name in _names(cell)
    ]  # fmt: skip
    grant = ray.Grant(0, cell.gpus_per_node)
    (first, head), *others = nodes
    started = [(first, ray.head(python, head, ports, grant, marker, store))]
    at = ray.endpoint(head, ports["gcs"])
    started += [(name, ray.worker(python, address, ports, grant, at, store)) for name, address in others]
    unknown, shown = f"--num-cpus={ray.slots(grant)}", f"--num-cpus={_CORES}"
    return [(name, tuple(shown if word == unknown else word for word in words)) for name, words in started]


def _program(cell: Cell, program: Program, python: str) -> tuple[str, ...]:
    """What a rank runs in itself, as a command: the words are those that it gets."""
    if program in TRAINERS:
        return (python, "-m", verl_settings.trainer(TRAINERS[program]).module, *cell.params["words"])
    folders = ("--local_dir", cell.params["checkpoint"], "--target_dir", cell.params["target"])
    return (python, "-m", "verl.model_merger", "merge", "--backend", cell.params["backend"], *folders)
