"""What the tables of all tests share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from runner.report.figures import number


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
