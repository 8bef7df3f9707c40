"""Resuming a run: which of its cells remain valid, and what has changed since they were measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from runner.cluster import facts
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Inventory, Node
from runner.errors import UsageError
from runner.launch import blame
from runner.plan.build import place
from runner.plan.plan import Cell, Plan, changed_inputs, fingerprint
from runner.results.rundir import PULSES_S, RunDir
from runner.system.nodeset import fold

Environments = Mapping[str, Mapping[str, str]]  # host -> property -> value


def refuse_running(run: RunDir, note: Callable[[str], None]) -> None:
    """Raise UsageError for a run that another controller carries out; `note` is called if the check takes some seconds.

    Call it before the run is locked: a controller that holds the lock shows signs of life itself.
    """
    if (pid := run.controller()) is not None:
        raise UsageError(f"run {run.run_id} is running (process {pid}): `runner runs show {run.run_id}` shows it")
    if other := run.elsewhere():
        note(f"checking for {PULSES_S:g} s whether {other} still carries out run {run.run_id}")
        if run.beats():
            raise UsageError(f"run {run.run_id} is carried out on {other}: `runner runs stop` stops it there")


def load(run: RunDir) -> Plan:
    """The plan in a run's plan.json. Raises UsageError if that is missing or damaged."""
    return Plan.from_dict(run.read_plan())


def renew(plan: Plan, inventory: Inventory, run: RunDir, ssh_config: str | None, status: Mapping[str, Any]) -> Plan:
    """The plan with its nodes' data from the current `inventory`, and its cells placed again on the same nodes.

    Raises UsageError for a node that is missing from the inventory and has work left.
    """
    today = {node.name: node for node in inventory.nodes}
    states = status["cells"]
    needed = {host for cell in plan.cells if states[cell.id]["state"] != "complete" for host in cell.hosts}
    gone = [name for name in sorted(needed) if name not in today and not BACKENDS[plan.backend].scheduled]
    if gone:
        raise UsageError(
            f"run {plan.run_id} needs {', '.join(gone)}, which the inventory {inventory.source} does not have: "
            "give the inventory that it was started with (-i)"
        )
    nodes = tuple(replace(today.get(node.name, node), backend=plan.backend) for node in plan.nodes)
    spares = tuple(replace(today[node.name], backend=plan.backend) for node in plan.spares if node.name in today)
    # The run may have been moved together with its folder of results.
    plan = replace(plan, nodes=nodes, spares=spares, run_dir=str(run.path), inventory=inventory.source)
    cells = tuple(
        place(cell, [plan.node(host) for host in cell.hosts], plan, ssh_config) if cell.hosts else cell
        for cell in plan.cells
    )
    return replace(plan, cells=cells)


def measured(run: RunDir, plan: Plan, status: Mapping[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """The environment that each complete cell was measured in: cell -> host -> property -> value.

    A cell of a chain is not among them: what it leaves is good wherever it was made, from inputs that are known.
    """
    chained = {cell.id for cell in plan.cells if cell.inputs}
    complete = {cell for cell, entry in status["cells"].items() if entry["state"] == "complete"} - chained
    seen = run.read_facts(plan.to_dict())
    return {
        cell: {host: facts.comparable(observed) for host, observed in hosts.items()}
        for cell, hosts in seen.items()
        if cell in complete
    }


def common(before: Mapping[str, Environments]) -> dict[str, str | None]:
    """The properties that were equal wherever the complete cells ran, which a new cell must find; None: it differed."""
    seen = [environment for hosts in before.values() for environment in hosts.values()]
    values = {name: {environment.get(name) for environment in seen} for environment in seen for name in environment}
    return {name: found.pop() if len(found) == 1 else None for name, found in values.items()}


def drift(before: Mapping[str, Environments], now: Environments) -> dict[str, dict[str, list[str]]]:
    """What has changed since each cell was measured: cell -> host -> changes; cells without any are left out."""
    changed: dict[str, dict[str, list[str]]] = {}
    for cell, hosts in before.items():
        for host, environment in hosts.items():
            if host in now and (lines := facts.changes(environment, now[host])):
                changed.setdefault(cell, {})[host] = lines
    return changed


def outdated(before: Mapping[str, Environments], now: Environments) -> dict[str, dict[str, list[str]]]:
    """As `drift`, but `now` is what a newer cell found on its nodes, which may not be those of the older cells."""
    same = common(before)
    found = {host: lines for host, environment in now.items() if (lines := facts.changes(same, environment))}
    return (dict.fromkeys(before, found) if found else {}) | drift(before, now)


class Comparison:
    """Compares the environments of complete cells with those that newer cells find on their nodes."""

    def __init__(self, run: RunDir, plan: Plan, status: Mapping[str, Any]) -> None:
        self._run, self._before = run, measured(run, plan, status)

    def reopened_by(self, plan: Plan, cell: Cell, status: dict[str, Any], own: bool) -> list[str]:
        """The ids of cells that are no longer valid now that `cell` is complete, marked so in `status`; each once.

        `own`: this controller has measured `cell`. An earlier controller's job may have the older environment.
        """
        found = measured(self._run, replace(plan, cells=(cell,)), status).get(cell.id, {})
        opened = reopen(plan, status, outdated(self._before, found))
        for each in opened:
            del self._before[each]
        if not own:
            self._before[cell.id] = found
        return opened


def describe(changed: Mapping[str, Mapping[str, list[str]]], aliases: Mapping[str, str]) -> str:
    """Changes by cell and host as text: `torch 2.13.0 -> 2.12.1 on node[001-003]; ...`."""
    where: dict[str, set[str]] = defaultdict(set)
    for hosts in changed.values():
        for host, lines in hosts.items():
            for line in lines:
                where[line].add(aliases.get(host, host))
    return "; ".join(f"{line} on {fold(sorted(hosts))}" for line, hosts in where.items())


def reopen(plan: Plan, status: dict[str, Any], changed: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """Mark in `status` the complete cells that are not valid any more: another plan or environment measured them, or
    what they were made from has changed.

    Returns their ids.
    """
    opened: list[str] = []
    for cell in plan.cells:
        entry = status["cells"][cell.id]
        if entry["state"] != "complete":
            continue
        if cell.after in opened:
            error = blame.error("plan_changed", f"made from what {cell.after} had left, which runs again")
        elif cell.inputs:
            if not (names := changed_inputs(cell.inputs, entry.get("inputs") or {})):
                continue
            error = blame.error("plan_changed", f"made from another {', '.join(names)}")
        elif entry.get("plan_hash") != fingerprint(plan, cell):
            error = blame.error("plan_changed", "measured by another plan than plan.json holds now")
        elif cell.id in changed:
            lines = describe({cell.id: changed[cell.id]}, {node.name: node.alias for node in plan.nodes})
            error = blame.error("drift", f"measured in another environment: {lines}")
        else:
            continue
        entry.update(state="incomplete", error=error)
        opened.append(cell.id)
    return opened


def spares(plan: Plan, inventory: Inventory) -> tuple[Node, ...]:
    """The spares that the run was started with, or if it has none, the nodes of the inventory that it does not use."""
    used = {node.name for node in plan.nodes}
    return plan.spares or tuple(
        replace(node, backend=plan.backend) for node in inventory.nodes if node.name not in used
    )
