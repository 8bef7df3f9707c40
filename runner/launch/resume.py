"""A run finished: `prepared` says what is left of it, `resume` carries that out."""

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
from runner.launch.carry import Ended, Means
from runner.launch.run import Policy
from runner.plan.plan import Cell, Plan
from runner.report.progress import Display
from runner.results.rundir import RunDir


@dataclass(frozen=True)
class Asked:
    """What a user asks of `runner bench --resume`.

    `inventory` is a path, or None for the one that the run was started with. `accept_drift` lets cells that were
    measured in another environment run again.
    """

    run: RunDir
    inventory: str | None = None
    retries: int = 0
    replace_bad_nodes: bool = False
    accept_drift: bool = False


@dataclass(frozen=True)
class Left:
    """What is left of a run: its plan on the nodes as they are reached today, its states, its cells still to run.

    `problems` are those of nodes, `before` the environments that complete cells were measured in.
    """

    plan: Plan
    inventory: Inventory
    status: Mapping[str, Any]
    pending: tuple[Cell, ...]
    reach: preflight.Reach
    problems: preflight.Problems
    before: Mapping[str, drift.Environments]


@contextmanager
def prepared(
    asked: Asked, read: Callable[[str | None], Inventory], display: Display, means: Means | None = None
) -> Iterator[Left]:
    """What is left of a run that nobody carries out, for as long as the context lasts; nothing is written.

    Nodes are asked what they are now. Raises UsageError for a run that is running, whose environment has changed, or
    whose nodes are gone from the inventory.
    """
    drift.refuse_running(asked.run, display.note)
    with _left(asked, read, display, means or Means()) as left:
        yield left


def resume(
    asked: Asked, read: Callable[[str | None], Inventory], display: Display, means: Means | None = None
) -> Ended:
    """Run what of a run is not complete, to the report.

    What refuses it changes nothing in its directory. From then on the directory says what ended the run.

    Raises what `prepared` raises, InfrastructureError for bad nodes, and Interrupted on a signal.
    """
    means, run = means or Means(), asked.run
    drift.refuse_running(run, display.note)
    # Held before anything is read that another controller may change.
    with run.alive(), _left(asked, read, display, means) as left:
        plan = left.plan
        needed = {host for cell in left.pending for host in cell.hosts}
        bad = {host: found for host, found in left.problems.items() if host in needed}
        if bad and not asked.replace_bad_nodes:
            what = f"{len(bad)} nodes are bad; fix them, or use spares with --replace-bad-nodes"
            raise preflight.refusal(what, preflight.bad_nodes(plan.nodes, bad))
        if asked.replace_bad_nodes:
            plan = replace(plan, spares=drift.spares(plan, left.inventory))
        carry.require_launcher(plan)
        with means.hold(means.state, carry.endpoints(plan), plan.run_id), carry.recorded(run):
            data = means.data(plan, left.pending, display)
            run.write_plan(plan.to_dict())
            run.write_status(left.status)
            expected = {} if asked.accept_drift else drift.common(left.before)
            transport = left.reach.transport(run, plan.nodes[0], expected)
            policy = Policy(asked.retries, asked.replace_bad_nodes, asked.accept_drift)
            return Ended(run, carry.carry_out(plan, run, transport, display, data, policy, left.reach, bad))


@contextmanager
def _left(asked: Asked, read: Callable[[str | None], Inventory], display: Display, means: Means) -> Iterator[Left]:
    run = asked.run
    plan = drift.load(run)
    inventory = read(asked.inventory if asked.inventory is not None else plan.inventory)
    aliases = {node.name: node.alias for node in plan.nodes}
    with ExitStack() as stack:
        remote = BACKENDS[plan.backend].remote
        ssh_config = stack.enter_context(rendered(inventory) if remote else nullcontext())
        plan = drift.renew(plan, inventory, run, ssh_config)
        status = run.read_status()
        status.pop("error", None)  # what ended the last execution
        tests = tuple(dict.fromkeys(cell.test for cell in plan.cells))
        slurm = carry.cluster(plan.slurm, inventory, ssh_config)
        device = plan.cells[0].device
        reach = means.reach(plan.backend, device, plan.engine, tests, ssh_config, slurm, own=run.run_id)
        answers = reach.ask(plan.nodes) if slurm is None else preflight.Answers({}, {})
        before = drift.measured(run, plan, status)
        changed = drift.drift(before, answers.environments)
        again = drift.reopen(plan, status, changed)
        if changed and not asked.accept_drift:
            raise UsageError(
                f"the environment has changed since {run.run_id} was measured: {drift.describe(changed, aliases)}; "
                f"put it back, or add --accept-drift: {len(changed)} complete cells are then measured again"
            )
        for cell_id in again:
            display.note(f"{cell_id} runs again: {status['cells'][cell_id]['error']['message']}")
        pending = tuple(cell for cell in plan.cells if status["cells"][cell.id]["state"] != "complete")
        display.note(f"{run.run_id}: {len(plan.cells) - len(pending)} of {len(plan.cells)} cells are complete")
        yield Left(plan, inventory, status, pending, reach, answers.problems, before)
