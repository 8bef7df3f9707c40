"""The interface through which cells run on nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from runner.cluster.inventory import Node
from runner.failures import Problem
from runner.launch.slurm.ledger import Ledger
from runner.launch.stores import Part
from runner.launch.watch import CellContext, CellRun
from runner.plan.plan import Cell, Plan


class Transport(Protocol):
    """Runs cells on nodes and fetches their artefacts. A method does nothing if the transport has no such step.

    `ssh_config` is a path, None without ssh. `shared`: nodes see this machine's run directory, so nothing is fetched.
    """

    ssh_config: str | None
    shared: bool

    def refuse(self, plan: Plan, cells: Sequence[Cell]) -> None:
        """Raise, with every reason, for cells that could never start, before anything is started.

        UsageError for a wrong request, InfrastructureError where only nodes that are down prevent it.
        """

    def data_on_nodes(self, plan: Plan, data: str) -> str:
        """The path on the nodes of the prepared data that is in the folder `data` here."""

    def send(self, plan: Plan, nodes: Sequence[Node], data: str, stopped: Callable[[], bool]) -> dict[str, Problem]:
        """Copy prepared data to `nodes`, until `stopped` returns True; returns failures by node.

        Raises InfrastructureError where what fails is no node.
        """

    def store(
        self,
        plan: Plan,
        nodes: Sequence[Node],
        part: Part,
        note: Callable[[str], object],
        stopped: Callable[[], bool],
    ) -> dict[str, Problem]:
        """See that `nodes` have a folder of the user whole, until `stopped` returns True; returns failures by node.

        `note` is told what is sent. Raises InfrastructureError where what fails is no node.
        """

    def together(self, plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
        """Those of `cells` that are started together with the first one."""

    def converse(
        self, plan: Plan, cell: Cell, watch: CellRun, data: str | None, context: CellContext
    ) -> dict[str, Any] | None:
        """Run a cell to its end, with `watch` receiving its messages and deciding what agents are sent.

        Returns an error whose cause is outside its ranks and agents, or None.
        """

    def gather(self, plan: Plan, cell: Cell) -> dict[str, Problem]:
        """Copy the artefacts of a cell into the run directory; returns failures by node."""

    def clean(self, plan: Plan, nodes: Sequence[Node]) -> None:
        """Remove the gathered artefacts from `nodes`."""

    def exclude(self, plan: Plan, host: str) -> Plan:
        """The plan with `host` among the nodes that a scheduler may not choose."""

    def adopt(self, plan: Plan, cell: Cell, entry: Mapping[str, Any], ledger: Ledger) -> bool | None:
        """Whether the cell has a job; None where that cannot be determined now. A job whose id was never received is
        searched for and recorded in `ledger`. `entry` is the cell's entry in status.json.
        """

    def cancel(self, plan: Plan, job_ids: set[str] | None, *, patient: bool) -> bool:
        """Cancel these jobs of the run, or all (None); returns whether the scheduler answered.

        `patient`: retry while the scheduler does not answer.
        """
