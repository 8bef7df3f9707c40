"""A program of the user's in the report: how it ended, and how long it ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runner.report.figures import Row, nodes_text
from runner.report.sections import Charts, Measured, Tile
from runner.report.tables import Table, cell_number, state, took, without_empty

TITLE, ANCHOR = "Your program", "program"

GLOSSARY: Mapping[str, str] = {}
COLUMNS = {"cell": "cell", "on": "on", "ranks": "ranks", "program, s": "program, s", "took": "took"}


def tables(cells: Sequence[Row]) -> list[Table]:
    """How each cell ended, where, and the seconds of its program."""
    rows = [
        {
            "cell": cell["id"],
            "state": state(cell),
            "on": nodes_text(cell["num_nodes"]),
            "ranks": str(cell["world_size"]),
            "program, s": cell_number(cell["metrics"], "script_s"),
            "took": took(cell),
        }
        for cell in cells
    ]
    return [Table(without_empty(rows), COLUMNS)]


def tiles(run: Measured) -> list[Tile]:
    """None: what a program measures, it tells itself."""
    return []


def charts(run: Measured) -> Charts:
    """None."""
    return Charts()
