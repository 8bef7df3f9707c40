"""The current plan: decisions made during its execution are written back into it; and where each of its cells is."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from runner.plan.plan import Cell, Plan
from runner.results.rundir import RunDir


class CurrentPlan:
    """A plan that changes while it is carried out: cells are placed and moved, nodes replaced, ports changed.

    Callers get the current version of a cell by its id.
    """

    def __init__(self, plan: Plan, run: RunDir) -> None:
        self.plan, self._run = plan, run

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells as they are planned now."""
        return self.plan.cells

    def cell(self, cell_id: str) -> Cell:
        """The cell as it is planned now. Raises KeyError for an unknown id."""
        for cell in self.plan.cells:
            if cell.id == cell_id:
                return cell
        raise KeyError(cell_id)

    def alias(self, host: str) -> str:
        """The alias of a node; `host` itself if it is not a node, such as a launcher."""
        return next((node.alias for node in self.plan.nodes if node.name == host), host)

    def change(self, **changes: Any) -> None:
        """Change the plan's own fields. They are written to plan.json when the next cell is amended."""
        self.plan = replace(self.plan, **changes)

    def amend(self, cell: Cell, **changes: Any) -> None:
        """Replace the cell with the same id by `cell`, and write plan.json, which always shows what ran where."""
        cells = tuple(cell if each.id == cell.id else each for each in self.plan.cells)
        self.plan = replace(self.plan, cells=cells, **changes)
        self._run.write_plan(self.plan.to_dict())


class Turn(Enum):
    """Where a cell is in this execution of the plan."""

    AHEAD = "it has not run yet"
    TAKEN = "it runs now, is complete, or was given up"


@dataclass
class Progress:
    """What this execution has done for one cell. `since`: the monotonic time at which `turn` began, in s.

    `reopened`: it was complete when the execution began, and is measured again after all others.
    """

    turn: Turn = Turn.AHEAD
    since: float = 0.0
    retries: int = 0
    reopened: bool = False

    def enter(self, turn: Turn) -> None:
        """Change `turn`, from now on."""
        self.turn, self.since = turn, time.monotonic()
