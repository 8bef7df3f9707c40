"""The training data of a run's cells, and what is done for it while the first of them already starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.cluster.inventory import Node
from runner.failures import Problem
from runner.node.protocol import POLL_S
from runner.plan.plan import Plan
from runner.workloads.registry import trains

if TYPE_CHECKING:  # which imports this module
    from runner.launch.transport import Transport


class Data:
    """The folder of the cells' data on this machine. `later(stopped)` prepares it, until `stopped` returns True; None:
    it is ready. `what` it is to the user.
    """

    what = "the data"

    def __init__(self, folder: str, later: Callable[[Callable[[], bool]], None] | None = None) -> None:
        self.folder, self._later = folder, later

    @property
    def ready(self) -> bool:
        """Whether the folder is complete."""
        return self._later is None

    def needed(self, test: str) -> bool:
        """Whether a cell of `test` cannot begin without it."""
        return trains(test)

    def on_nodes(self, transport: Transport, plan: Plan) -> str | None:
        """The path on nodes that cells are told; None: they are told none."""
        return transport.data_on_nodes(plan, self.folder)

    def send(
        self, transport: Transport, plan: Plan, nodes: Sequence[Node], stopped: Callable[[], bool]
    ) -> dict[str, Problem]:
        """Send it to `nodes`, until `stopped`; returns failures by node. Raises what `Transport.send` raises."""
        return transport.send(plan, nodes, self.folder, stopped)

    def complete(self, stopped: Callable[[], bool]) -> None:
        """Prepare what is not ready. Raises UsageError and InfrastructureError as `data.prepare.prepare`."""
        if self._later is not None:
            self._later(stopped)
            self._later = None


class Supply:
    """Supplies the data of one cell in a thread of its own, while the cell's ranks import what they need.

    `work(stopped)` returns the error of an attempt at the cell that cannot go on without the data, or None. It ends
    early once its `stopped` returns True: as the argument of that name does, or since the supply was abandoned.
    """

    def __init__(
        self, work: Callable[[Callable[[], bool]], Mapping[str, Any] | None], stopped: Callable[[], bool]
    ) -> None:
        self._work, self._stopped = work, stopped
        self._abandoned = False
        self._fault: Mapping[str, Any] | None = None
        self._error: BaseException | None = None
        self.done = False
        # The process may end before it: what a preparation leaves is removed by the next one.
        threading.Thread(target=self._carry_out, daemon=True).start()

    def _carry_out(self) -> None:
        try:
            self._fault = self._work(lambda: self._abandoned or self._stopped())
        except BaseException as error:
            self._error = error
        self.done = True

    @property
    def failed(self) -> bool:
        """Whether it has ended without the data on every node that needs it."""
        return self.done and (self._fault is not None or self._error is not None)

    def abandon(self) -> None:
        """Nobody waits for the data any more: the attempt at the cell is over, whatever has ended it."""
        self._abandoned = True

    def result(self) -> dict[str, Any] | None:
        """Wait for its end, but not once stopped; returns what `work` has returned, and raises what it raised."""
        while not self.done and not self._stopped():
            time.sleep(POLL_S)
        if self._stopped():
            return None
        if self._error is not None:
            raise self._error
        return dict(self._fault) if self._fault is not None else None
