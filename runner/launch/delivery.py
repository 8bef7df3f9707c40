"""The data of the cells of a run, delivered to the nodes that may need it: `launch.supply` has what, and when."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.failures import Problem
from runner.launch import blame
from runner.launch.current import CurrentPlan
from runner.launch.journal import Journal
from runner.launch.supply import Data, Supply
from runner.launch.transport import Transport
from runner.plan.plan import Cell
from runner.results.status import joined


class Delivery:
    """Knows which nodes have the data. `source` None: no cell needs any; `stopped`: whether the user stops the run."""

    def __init__(
        self,
        source: Data | None,
        current: CurrentPlan,
        journal: Journal,
        transport: Transport,
        stopped: Callable[[], bool],
    ) -> None:
        self.source, self.current, self.journal, self.transport = source, current, journal, transport
        self.stopped = stopped
        self.on_nodes = source.on_nodes(transport, current.plan) if source else None
        # The nodes that the data was sent to, and those where that has failed, by name.
        self.has_data, self.has_not = set[str](), set[str]()

    def onto(self, node: Node) -> list[Problem]:
        """Send the data to one more node; returns what has failed."""
        return list(self._copy([node], self.stopped).values())

    def send(
        self,
        cell: Cell,
        sharing: Sequence[Cell],
        bad: Collection[str],
        on_begin: Callable[[], object],
        stopped: Callable[[], bool],
    ) -> dict[str, Any] | None:
        """Copy the data to all nodes that may need it, before the first cell; where that fails, again before a cell on
        these nodes. Returns the error of an attempt at `cell` that cannot begin without.

        `sharing` are the cells that share the job of `cell`, and `bad` the names of nodes that are not used any more.
        """
        if self.source is None:
            return None
        here = set(cell.hosts)
        nodes = [node for node in self._needed(bad) if not here or node.name in here or node.name not in self.has_not]
        if nodes:
            on_begin()
        failures = self._copy(nodes, stopped)
        if stopped():
            return None
        if not self.current.plan.named and len(failures) < len(nodes):
            for host, problem in failures.items():  # the scheduler can choose others
                alias = self.current.alias(host)
                self.journal.note(f"{alias} is not used, {self.source.what} cannot be sent to it: {problem.message}")
                self.current.plan = self.transport.exclude(self.current.plan, host)
            return None
        needed = any(self.source.needed(each.test) for each in (cell, *sharing))
        failed = []
        for host, problem in failures.items():
            what = f"{self.source.what} cannot be sent to it: {problem.message}"
            if needed and (not here or host in here):
                failed.append(blame.error(problem.kind, what, host))
            else:
                self.journal.note(f"{self.current.alias(host)}: {what}; it is tried again before a cell that needs it")
        return joined(failed) if failed else None

    def supply(self, cell: Cell, send: Callable[[Callable[[], bool]], dict[str, Any] | None]) -> Supply | None:
        """Begin to prepare and `send` the data while the ranks of `cell` import; None where that is no gain: it is
        ready, the cell does not train, or a scheduler will start it.
        """
        source = self.source
        scheduled = BACKENDS[self.current.plan.backend].scheduled
        if source is None or source.ready or not source.needed(cell.test) or scheduled:
            return None

        def work(stopped: Callable[[], bool]) -> dict[str, Any] | None:
            source.complete(stopped)
            return None if stopped() else send(stopped)

        return Supply(work, self.stopped)

    def _needed(self, bad: Collection[str]) -> list[Node]:
        """The nodes that may still need the data; one that was replaced may not even answer."""
        left = [cell for cell in self.current.cells if not self.journal.complete(cell)]
        hosts = {host for cell in left for host in cell.hosts}
        anywhere = not all(cell.hosts for cell in left)
        without = self.has_data | set(bad)
        return [node for node in self.current.plan.nodes
                if node.name not in without and (anywhere or node.name in hosts)]  # fmt: skip

    def _copy(self, nodes: Sequence[Node], stopped: Callable[[], bool]) -> dict[str, Problem]:
        """Copy the data to `nodes`, until `stopped`; returns failures by node."""
        if self.source is None or not nodes:
            return {}
        self.source.complete(stopped)
        failures = self.source.send(self.transport, self.current.plan, nodes, stopped)
        self.has_data |= {node.name for node in nodes} - failures.keys()
        self.has_not |= failures.keys()
        return failures
