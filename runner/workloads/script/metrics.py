"""Metrics of test `script` from its records. Pure; docs/metrics.md has the formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runner.results.records import Record


def summarise(
    plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """`script_s`, the seconds of the rank whose program ran longest; nothing is limited."""
    seconds = [record.value for record in records if record.metric == "script_s"]
    return ({"script_s": max(seconds)} if seconds else {}), {}


def target_value(target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> float | None:
    """The cell's own metric of that name."""
    value = cell["metrics"].get(target["metric"])
    return None if value is None else float(value)
