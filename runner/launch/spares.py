"""Which nodes a run may still use: nodes that were given up, and the spares that replace them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runner.cluster.inventory import Node
from runner.failures import Problem
from runner.launch import blame
from runner.launch.current import CurrentPlan
from runner.launch.journal import Journal
from runner.launch.preflight import NodeAccess
from runner.launch.transport import Transport
from runner.plan.build import place
from runner.plan.plan import Cell
from runner.system.wording import are, counted


class Roster:
    """The nodes of a run. `send_data` copies the data to a node and returns why that fails; empty if it does not."""

    def __init__(
        self,
        current: CurrentPlan,
        journal: Journal,
        transport: Transport,
        access: NodeAccess,
        send_data: Callable[[Node], Sequence[Problem]],
    ) -> None:
        self._current, self._journal, self._transport = current, journal, transport
        self._access, self._send_data = access, send_data
        self.bad: set[str] = set()  # by name

    def good(self) -> list[Node]:
        """The nodes of the plan that were not given up."""
        return [node for node in self._current.plan.nodes if node.name not in self.bad]

    def give_up(self, host: str, cell: Cell, error: Mapping[str, Any]) -> None:
        """Stop using a node that failed in `cell`. A spare replaces it, or another node where Slurm chooses nodes.

        `error` is the cell's error in status.json.
        """
        self.bad.add(host)
        plan = self._current.plan
        spare = self._good_spare()
        if spare:
            spares = tuple(node for node in self._current.plan.spares if node is not spare)
            self._current.change(nodes=(*self._current.plan.nodes, spare), spares=spares)
        count = len(self.good())
        left = f"{counted(count, 'node')} {are(count)} good"
        by = f"{spare.alias} takes its place" if spare else f"no spare is left, {left}"
        if not plan.named:
            self._current.plan = self._transport.exclude(self._current.plan, host)
            by = f"Slurm is to choose among others, {left}"
        self._journal.note(f"{plan.node(host).alias} ({host}) is given up: {error['message']}; {by}")
        self._journal.replaced(host, spare.name if spare else None, cell, error)

    def move(self, cell: Cell) -> bool:
        """Place a cell on good nodes only; returns False, with the cell unchanged, if there are not enough."""
        if not self.bad & set(cell.hosts):
            return True
        plan = self._current.plan
        keep = [plan.node(host) for host in cell.hosts if host not in self.bad]
        others = [node for node in reversed(self.good()) if node not in keep]
        nodes = [*keep, *others[: cell.num_nodes - len(keep)]]
        if len(nodes) == cell.num_nodes:
            self._current.amend(place(cell, nodes, plan, self._transport.ssh_config))
        return len(nodes) == cell.num_nodes

    def _good_spare(self) -> Node | None:
        """The first spare that passes its checks and received the data; those before it are removed from the spares."""
        for spare in self._current.plan.spares:
            problems = self._access.ask([spare]).problems.get(spare.name) or self._send_data(spare)
            if not problems:
                return spare
            why = blame.unusable(spare.name, problems)["message"]
            self._journal.note(f"spare {spare.alias} is not usable: {why}")
            left = tuple(node for node in self._current.plan.spares if node is not spare)
            self._current.change(spares=left)
        return None
