"""The plan as it is by now: what its execution decides is written back into it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runner.plan.plan import Cell, Plan
from runner.results.rundir import RunDir


class CurrentPlan:
    """A plan that changes while it is carried out: cells are placed and moved, nodes replaced, ports changed.

    Whoever needs a cell as it is planned now asks for it by its id.
    """

    def __init__(self, plan: Plan, run: RunDir) -> None:
        self.plan, self._run = plan, run

    @property
    def cells(self) -> tuple[Cell, ...]:
        return self.plan.cells

    def cell(self, cell_id: str) -> Cell:
        """The cell as it is planned now. Raises KeyError for an id that is none."""
        for cell in self.plan.cells:
            if cell.id == cell_id:
                return cell
        raise KeyError(cell_id)

    def alias(self, host: str) -> str:
        """What people call a node; the name of what is none, such as a launcher."""
        return next((node.alias for node in self.plan.nodes if node.name == host), host)

    def change(self, **changes: Any) -> None:
        """Change the plan's own fields. plan.json has them with the next cell that is amended."""
        self.plan = replace(self.plan, **changes)

    def amend(self, cell: Cell, **changes: Any) -> None:
        """Plan `cell` in the place of the one with its id, and write plan.json: it always says what ran where."""
        cells = tuple(cell if each.id == cell.id else each for each in self.plan.cells)
        self.plan = replace(self.plan, cells=cells, **changes)
        self._run.write_plan(self.plan.to_dict())
