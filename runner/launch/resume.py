"""Resumes a run: `prepared` determines what is left of it, `resume` carries that out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Inventory
from runner.cluster.ssh import rendered
from runner.errors import UsageError
from runner.launch import carry, drift, preflight
from runner.launch.carry import Dependencies, RunResult
from runner.launch.run import Policy
from runner.plan.plan import Cell, Plan, rank_programs
from runner.report.progress import Display
from runner.results.rundir import RunDir
from runner.system.wording import are, counted

# What is asked of a run now in place of its plan, and the status that goes with it.
Replanned = Callable[[Plan, Mapping[str, Any]], tuple[Plan, dict[str, Any]]]


@dataclass(frozen=True)
class Options:
    """The options of `runner bench --resume`.

    `inventory` is a path, or None for the one that the run was started with. With `accept_drift`, cells that were
    measured in another environment run again. `replanned` changes the plan before anything else is done with it.
    """

    run: RunDir
    inventory: str | None = None
    retries: int = 0
    replace_bad_nodes: bool = False
    accept_drift: bool = False
    replanned: Replanned = lambda plan, status: (plan, dict(status))


@dataclass(frozen=True)
class Remaining:
    """What is left of a run: its plan with the current addresses of nodes, its status, and its cells still to run.

    `problems` are those of nodes, `before` the environments in which complete cells were measured.
    """

    plan: Plan
    inventory: Inventory
    status: Mapping[str, Any]
    pending: tuple[Cell, ...]
    access: preflight.NodeAccess
    problems: preflight.Problems
    before: Mapping[str, drift.Environments]


@contextmanager
def prepared(
    options: Options,
    read: Callable[[str | None], Inventory],
    display: Display,
    dependencies: Dependencies | None = None,
) -> Iterator[Remaining]:
    """What is left of a run that no controller carries out, valid while the context lasts; nothing is written.

    Nodes are checked now; `read` returns the inventory at a path. Raises UsageError for a run that is running, whose
    environment has changed, or whose nodes are missing from the inventory.
    """
    drift.refuse_running(options.run, display.note)
    with _left(options, read, display, dependencies or Dependencies()) as left:
        yield left


def resume(
    options: Options,
    read: Callable[[str | None], Inventory],
    display: Display,
    dependencies: Dependencies | None = None,
) -> RunResult:
    """Run the cells of a run that are not complete, and write the report.

    A run that cannot be resumed is left unchanged. Afterwards its directory says what ended the run in every case.

    Raises what `prepared` raises, InfrastructureError for bad nodes, and Interrupted on a signal.
    """
    dependencies, run = dependencies or Dependencies(), options.run
    drift.refuse_running(run, display.note)
    # Locked before anything is read that another controller may change.
    with run.alive(), _left(options, read, display, dependencies) as left:
        plan = left.plan
        needed = {host for cell in left.pending for host in cell.hosts}
        bad = {host: found for host, found in left.problems.items() if host in needed}
        if bad and not options.replace_bad_nodes:
            what = f"{counted(len(bad), 'node')} {are(len(bad))} bad"
            hint = f"fix {'it' if len(bad) == 1 else 'them'}, or use spares with --replace-bad-nodes"
            raise preflight.refusal(f"{what}; {hint}", preflight.bad_nodes(plan.nodes, bad))
        if options.replace_bad_nodes:
            plan = replace(plan, spares=drift.spares(plan, left.inventory))
        carry.require_launcher(plan)
        with dependencies.hold(dependencies.state, carry.endpoints(plan), plan.run_id), carry.failures_recorded(run):
            run.write_plan(plan.to_dict())
            run.write_status(left.status)
            data = dependencies.data(plan, left.pending, display)
            expected = {} if options.accept_drift else drift.common(left.before)
            transport = left.access.transport(run, plan.nodes[0], expected)
            policy = Policy(options.retries, options.replace_bad_nodes, options.accept_drift)
            return RunResult(run, carry.carry_out(plan, run, transport, display, data, policy, left.access, bad))


@contextmanager
def _left(
    options: Options, read: Callable[[str | None], Inventory], display: Display, dependencies: Dependencies
) -> Iterator[Remaining]:
    run = options.run
    plan, status = options.replanned(drift.load(run), run.read_status())
    inventory = read(options.inventory if options.inventory is not None else plan.inventory)
    aliases = {node.name: node.alias for node in plan.nodes}
    with ExitStack() as stack:
        remote = BACKENDS[plan.backend].remote
        ssh_config = stack.enter_context(rendered(inventory) if remote else nullcontext())
        plan = drift.renew(plan, inventory, run, ssh_config, status)
        status.pop("error", None)  # what ended the last execution
        tests = tuple(dict.fromkeys(cell.test for cell in plan.cells))
        slurm = carry.cluster(plan.slurm, inventory, ssh_config)
        device = plan.cells[0].device
        made = (plan.backend, device, plan.engine, tests, ssh_config, slurm)
        access = dependencies.access(
            *made,
            own=run.run_id,
            nccl_root=plan.nccl_root,
            nccl_tests=rank_programs(plan.cells),
            profile=plan.cells[0].profile,
            shared=plan.shared,
        )
        answers = access.ask(plan.nodes) if slurm is None else preflight.Answers({}, {})
        before = drift.measured(run, plan, status)
        changed = drift.drift(before, answers.environments)
        again = drift.reopen(plan, status, changed)
        if changed and not options.accept_drift:
            anew = f"{counted(len(changed), 'complete cell')} {are(len(changed))} then measured again"
            raise UsageError(
                f"the environment has changed since {run.run_id} was measured: {drift.describe(changed, aliases)}; "
                f"restore it, or add --accept-drift: {anew}"
            )
        for cell_id in again:
            display.note(f"{cell_id} runs again: {status['cells'][cell_id]['error']['message']}")
        pending = tuple(cell for cell in plan.cells if status["cells"][cell.id]["state"] != "complete")
        display.note(f"{run.run_id}: {len(plan.cells) - len(pending)} of {counted(len(plan.cells), 'cell')} complete")
        yield Remaining(plan, inventory, status, pending, access, answers.problems, before)
