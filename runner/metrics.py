"""From the records of one cell to its metrics. Pure; docs/metrics.md names every metric, unit and formula.

What was not measured is absent, never zero: a step without all its ranks is no step.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.cluster import limits
from runner.results.records import Record
from runner.results.statistics import quantile, spread

LATENCY_BYTES = 8
GPU_UTILISATION = re.compile(r"gpu(\d+)_util_pct")
ONCE_METRICS = (  # reported once, by rank 0
    "setup_time_s",
    "time_to_first_step_s",
    "packing_utilisation_pct",
    "model_parameters",
    "model_parameters_non_embedding",
)
# The unit that a metric's name carries, by the part of the name that says so.
UNITS = (
    ("tokens_per_s", "tokens/s"),
    ("gb_per_s", "GB/s"),
    ("gbit_per_s", "Gbit/s"),
    ("_pct", "%"),
    ("_gib", "GiB"),
    ("_us", "µs"),
    ("_s", "s"),
)


@dataclass(frozen=True)
class Step:
    """One optimizer step of an sft cell. `time_s` is of the slowest rank: all wait for it.

    `tokens`, `loss_tokens` and `positions` are sums over ranks; `host_time_s` is each host's slowest rank.
    """

    index: int
    measured: bool
    time_s: float
    tokens: float
    loss_tokens: float
    positions: float
    loss: float | None = None
    host_time_s: Mapping[str, float] = field(default_factory=dict)


def steps(records: Iterable[Record], world_size: int) -> list[Step]:
    """The complete steps of one sft cell in order. A step that lacks a rank's time is left out, not guessed."""
    found: dict[int, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if "step" in record.context and record.rank is not None:
            found[record.context["step"]][record.metric][record.rank] = record
    result = []
    for index, metrics in sorted(found.items()):
        times = metrics["step_time_s"]
        if len(times) != world_size:
            continue
        host_time: dict[str, float] = {}
        for record in times.values():
            host = record.host or "?"
            host_time[host] = max(record.value, host_time.get(host, 0.0))
        losses = [record.value for record in metrics["loss"].values()]
        result.append(
            Step(
                index=index,
                measured=all(record.context.get("measured", True) for record in times.values()),
                time_s=max(host_time.values()),
                tokens=sum(record.value for record in metrics["tokens"].values()),
                loss_tokens=sum(record.value for record in metrics["loss_tokens"].values()),
                positions=sum(record.value for record in metrics["positions"].values()),
                loss=losses[0] if losses else None,
                host_time_s=dict(sorted(host_time.items())),
            )
        )
    return result


def unit(metric: str) -> str:
    """The unit in a metric's name, as people write it; empty for a count or a ratio."""
    return next((text for part, text in UNITS if part in metric), "")


def summarise_cell(
    plan: Mapping[str, Any],
    cell: Mapping[str, Any],
    status: Mapping[str, Any],
    records: Sequence[Record],
    telemetry: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    state = status.get("cells", {}).get(cell["id"], {}).get("state", "incomplete")
    result: dict[str, Any] = {
        "id": cell["id"],
        "test": cell["test"],
        "model": cell.get("model"),
        "num_nodes": cell["num_nodes"],
        "world_size": cell["world_size"],
        "repeat": cell["repeat"],
        "hosts": list(cell["hosts"]),
        "device": cell["device"],
        "state": state,
        "metrics": {},
        "limits": {},
    }
    if cell["test"] == "sft":
        result["metrics"] = _sft_metrics(plan, cell, records)
    elif cell["test"] == "torch":
        result["limits"] = cell_limits(plan, cell)
        result["metrics"] = _torch_metrics(records, cell["world_size"], result["limits"])
    _add_utilisation(result, records, telemetry)
    return result


def _sft_metrics(plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    every = steps(records, cell["world_size"])
    measured = [step for step in every if step.measured]
    if measured:
        times = [step.time_s for step in measured]
        total_s = sum(times)
        processed = sum(step.tokens for step in measured) / total_s
        metrics["tokens_per_s"] = sum(step.loss_tokens for step in measured) / total_s
        metrics["tokens_per_s_per_gpu"] = metrics["tokens_per_s"] / cell["world_size"]
        metrics["processed_tokens_per_s"] = processed
        metrics["processed_tokens_per_s_per_gpu"] = processed / cell["world_size"]
        metrics["step_time_s_p50"] = statistics.median(times)
        metrics["step_time_s_p95"] = quantile(times, 0.95)
        metrics["step_time_s_mad"] = spread(times)
        metrics["steps_measured"] = len(measured)
    losses = [step.loss for step in every if step.loss is not None]
    if losses:
        metrics["loss_first"], metrics["loss_last"] = losses[0], losses[-1]
    for name in ONCE_METRICS:
        values = [record.value for record in records if record.metric == name]
        if values:
            metrics[name] = max(values)
    memory = [record.value for record in records if record.metric == "peak_memory_gib"]
    if memory:
        metrics["peak_memory_gib"] = max(memory)
    peak = plan.get("hardware", {}).get("bf16_peak_tflop_per_s")
    model = plan.get("models", {}).get(cell.get("model"))
    if peak and model and measured and cell["device"] != "cpu":
        # Attention does not cross samples: its length is a sample's, not the packed sequence's. Where ranks
        # do not report it, attention counts as nothing, so that the figure is never flattered.
        lengths = [record.value for record in records if record.metric == "sample_tokens_mean"]
        flop = limits.flops_per_token(model, round(lengths[0]) if lengths else 0)
        metrics["mfu"] = limits.mfu(metrics["processed_tokens_per_s"], flop, cell["world_size"], peak)
    return metrics


def _torch_metrics(
    records: Sequence[Record], world_size: int, ceilings: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
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
            # Where every rank has a share, the smallest operation has one element a rank: more than 8 bytes.
            smallest = min(latency, default=math.inf)
            if smallest <= LATENCY_BYTES * world_size:
                metrics[f"{collective}_{name}"] = latency[int(smallest)]
    if wrong:
        metrics["wrong_values"] = sum(wrong)
    return metrics


def by_size(records: Iterable[Record], collective: str, metric: str) -> dict[int, float]:
    """size in bytes -> value, of one collective's metric."""
    return {
        int(record.context["size_bytes"]): record.value
        for record in records
        if record.metric == metric and record.context.get("collective") == collective
    }


def cell_limits(plan: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """collective -> {"busbw_gb_per_s", "binds"} on the cell's nodes; empty where their rates are unknown."""
    if cell["device"] == "cpu":
        return {}
    nodes = [node for node in plan["nodes"] if node["name"] in set(cell["hosts"])]
    rates = [limits.nic_gb_per_s(node.get("nics") or 0, node.get("nic_gbit_per_s") or 0) for node in nodes]
    nvlink = plan.get("hardware", {}).get("nvlink_busbw_gb_per_s")
    found = {}
    for collective in limits.COLLECTIVES:
        limit = limits.busbw_ceiling(
            collective, cell["num_nodes"], cell["gpus_per_node"], min(rates, default=None), nvlink
        )
        if limit:
            found[collective] = {"busbw_gb_per_s": limit.gb_per_s, "binds": limit.binds}
    return found


def _add_utilisation(
    cell: dict[str, Any], records: Sequence[Record], telemetry: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Mean utilisation of the cell's GPUs while its measured steps ran, and the least used GPU by name.

    The window is each host's own, from `started_s` (its clock) of its measured steps: loading and warming up
    say nothing about training. Without a window nothing is said.
    """
    windows: dict[str, tuple[float, float]] = {}
    for record in records:
        context = record.context
        if record.metric == "step_time_s" and context.get("measured") and "started_s" in context and record.host:
            begin, end = windows.get(record.host, (math.inf, 0.0))
            start = float(context["started_s"])
            windows[record.host] = min(begin, start), max(end, start + record.value)
    samples: dict[tuple[str, int], list[float]] = defaultdict(list)
    for host, rows in telemetry.items():
        begin, end = windows.get(host, (math.inf, 0.0))
        for row in rows:
            if begin <= (row.get("time_s") or 0.0) <= end:
                for name, value in row.items():
                    if found := GPU_UTILISATION.fullmatch(name):
                        samples[host, int(found[1])].append(float(value))
    if not samples:
        return
    means = {key: statistics.fmean(values) for key, values in samples.items()}
    (host, gpu), lowest = min(means.items(), key=lambda item: item[1])
    cell["metrics"]["gpu_util_pct_mean"] = statistics.fmean(means.values())
    cell["metrics"]["gpu_util_pct_min"] = lowest
    cell["slowest_gpu"] = {"host": host, "gpu": gpu, "gpu_util_pct": lowest}
