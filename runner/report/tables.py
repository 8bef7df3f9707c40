"""What the tables of all tests share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report.figures import number


@dataclass(frozen=True)
class Table:
    """A table of a test's cells: `rows` are texts by column, whose names have their units.

    `columns` are those that a terminal shows as well, with their shorter names there. `terms` are the columns that the
    glossary explains, as (term, text); `remark` follows them. A `note` stands above the table. In the columns
    `faults`, anything but 0 is marked.
    """

    rows: Sequence[Mapping[str, str]]
    columns: Mapping[str, str]
    terms: Sequence[tuple[str, str]] = ()
    remark: str = ""
    note: str = ""
    faults: Sequence[str] = ()


def plus_minus(value: float, spread: float) -> str:
    """A value with as many decimals as its spread has meaning."""
    decimals = max(0, 1 - math.floor(math.log10(spread))) if spread > 0 else 3
    return f"{value:.{min(decimals, 3)}f} ± {spread:.{min(decimals, 3)}f}"


def median(cells: Iterable[Mapping[str, Any]], metric: str) -> float | None:
    values = [cell["metrics"][metric] for cell in cells if metric in cell["metrics"]]
    return statistics.median(values) if values else None


def state(cell: Mapping[str, Any]) -> str:
    return "" if cell["state"] == "complete" else cell["state"]


def cell_number(values: Mapping[str, float], metric: str) -> str:
    return number(values[metric]) if metric in values else ""


def without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    used = {key for row in rows for key, value in row.items() if value}
    return [{key: value for key, value in row.items() if key in used} for row in rows]
