"""The stages of a workflow in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runner.report.figures import Row
from runner.report.sections import Charts, Measured, Tile
from runner.report.tables import Table, cell_number, state, took, without_empty

TITLE, ANCHOR = "Workflow", "workflow"

GLOSSARY: Mapping[str, str] = {}

COLUMNS = {"stage": "stage", "state": "state", "took": "took", "answer, s": "answer, s"}


def tables(cells: Sequence[Row]) -> list[Table]:
    """A row for each stage."""
    rows = [
        {
            "stage": cell["id"],
            "state": state(cell),
            "took": took(cell),
            "merge, s": cell_number(cell["metrics"], "merge_s"),
            "answer, s": cell_number(cell["metrics"], "answer_s"),
        }
        for cell in cells
    ]
    return [Table(without_empty(rows), COLUMNS)]


def tiles(run: Measured) -> list[Tile]:
    """None."""
    return []


def charts(run: Measured) -> Charts:
    """None."""
    return Charts()
