"""Metrics of a `gpu` cell from its records. Pure; docs/metrics.md has the formulas."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from runner.results.records import Record
from runner.workloads.gpu import compare

MATMUL = "matmul_tflop_per_s"
RATES = ("hbm_copy_gb_per_s", "host_to_device_gb_per_s", "device_to_host_gb_per_s", "peer_gb_per_s")
# What the hardware file calls the peak of a rate, by its key in `compare.RATES`.
PEAKS = {"bf16": "bf16_peak_tflop_per_s", "fp8": "fp8_peak_tflop_per_s", "hbm": "hbm_gb_per_s"}
REMOTE = "remote"  # of a copy: the buffer is not on the GPU's NUMA node


def summarise(
    plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """(metric -> value, {}) of one cell: medians over its GPUs of each one's median, and the lowest of a GPU.

    Shares are in %: `…_min_pct_of_median` of the lowest GPU to the median, `…_pct_of_peak` of the median to the
    hardware file's peak, absent on CPUs.
    """
    metrics: dict[str, float] = {}
    by_metric: dict[str, dict[tuple[str | None, Any], list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if name := _name(record):
            by_metric[name][record.host, _which(record)].append(record.value)
    for name, values in by_metric.items():
        each = [statistics.median(found) for found in values.values()]
        metrics[name] = compare.middle(each)
        if len(each) > 1:
            metrics[f"{name}_min"] = min(each)
            metrics[f"{name}_min_pct_of_median"] = 100 * min(each) / metrics[name]
    for key, peak in peaks(plan, cell).items():
        name = "hbm_copy_gb_per_s" if key == "hbm" else f"matmul_{key}_tflop_per_s"
        if name in metrics:
            metrics[f"{name}_pct_of_peak"] = 100 * metrics[name] / peak
    drifts = [record.value for record in records if record.metric == "matmul_drift_pct"]
    if drifts:
        metrics["matmul_drift_pct_min"] = min(drifts)
    for metric, name in (("temperature_c", "temperature_c_max"), ("power_w", "power_w_max")):
        if found := [r.value for r in records if r.metric == metric and r.context.get("statistic") == "max"]:
            metrics[name] = max(found)
    wrong = [record.value for record in records if record.metric == "wrong_values"]
    if wrong:
        metrics["wrong_values"] = sum(wrong)
    return metrics, {}


def peaks(plan: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, float]:
    """Key of `compare.RATES` -> the hardware file's peak in its unit; empty on CPUs and for unknown hardware."""
    hardware = plan.get("hardware", {}) if cell["device"] != "cpu" else {}
    return {key: hardware[name] for key, name in PEAKS.items() if hardware.get(name)}


def _name(record: Record) -> str | None:
    """The metric that a record counts for; None for those that are no rates."""
    if record.metric == MATMUL:
        return f"matmul_{record.context.get('precision')}_tflop_per_s"
    if record.metric not in RATES:
        return None
    return f"{REMOTE}_{record.metric}" if record.context.get("local") is False else record.metric


def _which(record: Record) -> Any:
    """The GPU of a record, or the pair of GPUs."""
    context = record.context
    return (context.get("source"), context.get("target")) if "source" in context else context.get("gpu", record.rank)


def target_value(target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> float | None:
    """What the cell has for the target's metric."""
    return cell["metrics"].get(target["metric"])
