"""Metrics and ceilings of a `torch` cell from its records. Pure; docs/metrics.md has the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runner.cluster import limits
from runner.results.records import Record

LATENCY_BYTES = 8


COPIES = ("copy_gb_per_s", "host_to_device_gb_per_s", "device_to_host_gb_per_s")  # measured by a single rank


def summarise(
    plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """(metric -> value, collective -> ceiling) of one cell; for a single rank only the rates of its copies.

    Bandwidths are in GB/s, the highest over all sizes; latencies in µs, at the smallest size; shares of a limit in %.
    """
    ceilings = cell_limits(plan, cell)
    metrics: dict[str, float] = {}
    wrong = [record.value for record in records if record.metric == "wrong_values"]
    for collective in sorted({str(r.context["collective"]) for r in records if "collective" in r.context}):
        busbw = by_size(records, collective, "busbw_gb_per_s")
        if busbw and max(busbw.values()) > 0:
            metrics[f"{collective}_busbw_gb_per_s_max"] = max(busbw.values())
            if collective in ceilings:
                share = max(busbw.values()) / ceilings[collective]["busbw_gb_per_s"]
                metrics[f"{collective}_busbw_pct_of_limit"] = 100 * share
        for name in ("latency_us_p50", "latency_us_p99"):
            latency = by_size(records, collective, name)
            # Where every rank has a share, the smallest operation has one element per rank: more than 8 bytes.
            smallest = min(latency, default=math.inf)
            if smallest <= LATENCY_BYTES * cell["world_size"]:
                metrics[f"{collective}_{name}"] = latency[int(smallest)]
    metrics |= _copies(plan, cell, records)
    if wrong:
        metrics["wrong_values"] = sum(wrong)
    return metrics, ceilings


def target_value(target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> float | None:
    """What the cell has for the target's metric; of several message sizes the best one."""
    collective = target.get("collective")
    if not collective:
        return cell["metrics"].get(target["metric"])
    # Every GPU of a node sends to the other node and receives from it at busbw: both directions, in bits.
    name, factor = target["metric"], 1.0
    if name == "bidirectional_gbit_per_s":
        name, factor = "busbw_gb_per_s", 2 * 8.0 * cell["world_size"] / cell["num_nodes"]
    return best_of(target, ((size, value * factor) for size, value in by_size(records, collective, name).items()))


def best_of(target: Mapping[str, Any], values: Iterable[tuple[int, float]]) -> float | None:
    """The best of (size in bytes, value) for a target, of its sizes; None where none of them was measured."""
    low, high = target.get("min_bytes") or 0, target.get("max_bytes") or math.inf
    better = max if target["direction"] == "min" else min
    return better((value for size, value in values if low <= size <= high), default=None)


def _copies(plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> dict[str, float]:
    """Rates of a single rank's copies (GB/s), and of the copy within the device its size (B) and share of the limit."""
    found = {record.metric: record for record in records if record.metric in COPIES}
    metrics = {name: found[name].value for name in COPIES if name in found}
    if copy := found.get("copy_gb_per_s"):
        metrics["copy_bytes"] = copy.context["size_bytes"]
        limit = plan.get("hardware", {}).get("hbm_gb_per_s")
        if limit and cell["device"] != "cpu":
            metrics["copy_pct_of_limit"] = 100 * copy.value / limit
    return metrics


def by_size(records: Iterable[Record], collective: str, metric: str) -> dict[int, float]:
    """Size in bytes -> value of one collective's metric, in the metric's unit."""
    return {
        int(record.context["size_bytes"]): record.value
        for record in records
        if record.metric == metric and record.context.get("collective") == collective
    }


def cell_limits(plan: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Collective -> {"busbw_gb_per_s", "binds"}, its ceiling on the cell's nodes; empty where rates are unknown."""
    if cell["device"] == "cpu":
        return {}
    nic = limits.lowest_nic_gb_per_s(plan, cell["hosts"])
    nvlink = plan.get("hardware", {}).get("nvlink_busbw_gb_per_s")
    found = {}
    for collective in limits.COLLECTIVES:
        limit = limits.busbw_ceiling(collective, cell["num_nodes"], cell["gpus_per_node"], nic, nvlink)
        if limit:
            found[collective] = {"busbw_gb_per_s": limit.gb_per_s, "binds": limit.binds}
    return found
