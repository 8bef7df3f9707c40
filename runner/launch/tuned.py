"""A request with what `runner tune` has found for it, where that is used; and in a line each, why it is or is not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.cluster.inventory import Node
from runner.errors import UsageError
from runner.plan import build, tuned
from runner.plan.plan import Plan
from runner.plan.request import Request
from runner.plan.speed import Rate
from runner.results import tuned as results
from runner.workloads.registry import trains

_NOT_KNOWN = ("cpu", "unknown")  # names of hardware that say nothing of a GPU


@dataclass(frozen=True)
class Asked:
    """Where results of tuning are (`folder`: that of runs), and what decides settings already (`plan.tuned.held`).

    `command` is what tunes for the request, as it is typed. Without `use`, what was found is not looked at.
    """

    folder: Path
    command: str
    held: Mapping[str, str] = field(default_factory=dict)
    use: bool = True


@dataclass(frozen=True)
class Settled:
    """A request with what tuning found, or as it was; its plan; and lines that say what is not obvious from that."""

    request: Request
    plan: Plan
    notes: tuple[str, ...] = ()


def settle(request: Request, nodes: tuple[Node, ...], asked: Asked, versions: Mapping[str, str]) -> Settled:
    """Apply what tuning found for `request` on `nodes`, if it was found with the nodes' `versions` (empty: not known).

    Raises UsageError where the request cannot be planned; with what was found alone it can fail without an error.
    """
    subject = tuned.subject(request)
    if subject is None or not asked.use:
        return Settled(request, build.build(request, nodes))
    request = replace(request, rates=_rates(request, subject, asked.folder, versions))
    plan = build.build(request, nodes)
    try:
        found = results.find(asked.folder, subject)
    except UsageError as error:
        return Settled(request, plan, (f"not tuned: {error}; this writes it again: {asked.command}",))
    if found is None:
        return Settled(request, plan, tuple(_hint(request, subject, asked)))
    if outdated := found.outdated(versions):
        what = f"what was tuned on {found.date} is not used: it was tuned with {'; '.join(outdated)}"
        return Settled(request, plan, (f"{what}; tune again: {asked.command}",))
    batch = next(c.batch for c in plan.cells if trains(c.test) and c.num_nodes == subject.num_nodes)
    assert batch is not None
    try:
        changed = tuned.apply(request, found, asked.held, batch)
        changed = replace(changed, rates=_rates(changed, subject, asked.folder, versions))
        return Settled(changed, build.build(changed, nodes))
    except UsageError as error:
        return Settled(request, plan, (f"what was tuned on {found.date} is not used: {error}",))


def _rates(request: Request, subject: results.Subject, folder: Path, versions: Mapping[str, str]) -> tuple[Rate, ...]:
    """What was measured on one node: how fast GPUs and hosts are, whatever the network between nodes."""
    one = replace(subject, num_nodes=1, world_size=request.gpus_per_node)
    with suppress(UsageError):  # a damaged file of the request's own subject is told
        found = results.find(folder, one)
        if found is not None and not found.outdated(versions):
            return tuned.rates(found, request)
    return ()


def _hint(request: Request, subject: results.Subject, asked: Asked) -> list[str]:
    """That settings are not tuned, on GPUs; on CPUs only to who has tuned something similar there."""
    near = results.nearest(asked.folder, subject)
    if request.device == "cpu":
        if near is None or near.subject.device != subject.device:
            return []
    elif subject.hardware in _NOT_KNOWN:
        return []
    other = f" (what was tuned on {near.date} has {', '.join(near.subject.differs(subject))})" if near else ""
    return [f"not tuned for {subject.text()}{other}: {asked.command}"]
