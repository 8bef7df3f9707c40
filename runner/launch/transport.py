"""What carries cells to their nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from runner.cluster.inventory import Node
from runner.launch.slurm.ledger import Ledger
from runner.launch.watch import CellRun, Course
from runner.plan.plan import Cell, Plan


class Transport(Protocol):
    """The way of a cell to its nodes and back. Where a transport has no such step, the method does nothing.

    `shared`: nodes see this machine's run directory, so that nothing needs to be fetched.
    """

    ssh_config: str | None
    shared: bool

    def refuse(self, plan: Plan, cells: Sequence[Cell]) -> None:
        """Raise for what could never start, with every reason, before anything does.

        UsageError for a request that is wrong, InfrastructureError for one that only nodes which are down prevent.
        """

    def data_on_nodes(self, plan: Plan, data: str) -> str:
        """Where ranks find the prepared data that is in the folder `data` here."""

    def send(self, plan: Plan, nodes: Sequence[Node], data: str, stopped: Callable[[], bool]) -> dict[str, str]:
        """Bring prepared data to `nodes`, until `stopped`; returns failures by node."""

    def together(self, plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
        """Which of `cells` are started together with the first of them."""

    def converse(
        self, plan: Plan, cell: Cell, watch: CellRun, data: str | None, course: Course
    ) -> dict[str, Any] | None:
        """Run a cell to its end, with `watch` receiving its messages and deciding what agents are sent.

        Returns the error of what went wrong outside its ranks and agents, or None.
        """

    def gather(self, plan: Plan, cell: Cell) -> dict[str, str]:
        """Bring the artefacts of a cell into the run directory; returns failures by node."""

    def clean(self, plan: Plan, nodes: Sequence[Node]) -> None:
        """Remove from `nodes` what was gathered."""

    def exclude(self, plan: Plan, host: str) -> Plan:
        """The plan with `host` among the nodes that a scheduler may not choose."""

    def adopt(self, plan: Plan, cell: Cell, entry: Mapping[str, Any], ledger: Ledger) -> bool | None:
        """Whether the cell has a job. One whose id was never received is looked for, and what is found is noted in
        `ledger`; None where that cannot be known now. `entry` is the cell's in status.json.
        """

    def cancel(self, plan: Plan, job_ids: set[str] | None, *, patient: bool) -> bool:
        """End these jobs of the run, or all (None); returns whether that was received."""
