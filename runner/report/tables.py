"""The table type and the cell texts that all tests' tables share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report.figures import number
from runner.system.wording import took_text


@dataclass(frozen=True)
class Table:
    """A table of a test's cells: `rows` are texts by column name, which includes the unit.

    `columns` maps the columns that a terminal shows too to their shorter names there; without any it shows no table.
    `terms` are (glossary term, text) of the columns that the glossary explains; `remark` follows them. `note` is
    printed above the table. In the columns `faults`, any value but 0 is highlighted, and anywhere a value that begins
    with ✕. The columns `words` have sentences, which wrap. Where `shown` is not 0, the rows after as many are folded
    away, and `rest` says of them what matters.
    """

    rows: Sequence[Mapping[str, str]]
    columns: Mapping[str, str]
    terms: Sequence[tuple[str, str]] = ()
    remark: str = ""
    note: str = ""
    faults: Sequence[str] = ()
    words: Sequence[str] = ()
    shown: int = 0
    rest: str = ""


def plus_minus(value: float, spread: float) -> str:
    """`value ± spread`, with as many decimals as the spread's two leading digits need, at most three."""
    decimals = max(0, 1 - math.floor(math.log10(spread))) if spread > 0 else 3
    return f"{value:.{min(decimals, 3)}f} ± {spread:.{min(decimals, 3)}f}"


def median(cells: Iterable[Mapping[str, Any]], metric: str) -> float | None:
    """The median of a metric over the cells that have it, in the metric's unit; None where none has it."""
    values = [cell["metrics"][metric] for cell in cells if metric in cell["metrics"]]
    return statistics.median(values) if values else None


def state(cell: Mapping[str, Any]) -> str:
    """The cell's state; empty for `complete`, so that only other states need a column."""
    return "" if cell["state"] == "complete" else cell["state"]


def took(cell: Mapping[str, Any]) -> str:
    """The time that the cell took, from its start to the end of its gathering, and beside it the time that its job was
    in a queue; empty where that is not known.
    """
    return took_text(cell.get("took_s"), cell.get("queued_s") or 0.0)


def cell_number(values: Mapping[str, float], metric: str) -> str:
    """A metric as text with three significant digits; empty where it was not measured."""
    return number(values[metric]) if metric in values else ""


def without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows without the columns that are empty in every row."""
    used = {key for row in rows for key, value in row.items() if value}
    return [{key: value for key, value in row.items() if key in used} for row in rows]
