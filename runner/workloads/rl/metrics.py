"""Metrics of the stages of a workflow from their records. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runner.results.records import Record

ONCE_METRICS = ("merge_s", "answer_s")  # written once, by the rank that merges


def summarise(
    plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """(metric -> value, {}) of one cell."""
    return {record.metric: record.value for record in records if record.metric in ONCE_METRICS}, {}


def target_value(target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> float | None:
    """What a cell of summary.json has for the target's metric, in its unit; None where it was not measured."""
    value: float | None = cell["metrics"].get(target["metric"])
    return value
