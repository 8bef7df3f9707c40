"""Metrics of an `sft` cell from its records. Pure; docs/metrics.md has the formulas."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.cluster import limits
from runner.results.records import Record
from runner.results.statistics import quantile, spread

ONCE_METRICS = (  # reported once, by rank 0
    "import_time_s",
    "build_time_s",
    "setup_time_s",
    "time_to_first_step_s",
    "packing_utilisation_pct",
    "model_parameters",
    "model_parameters_non_embedding",
)


@dataclass(frozen=True)
class Step:
    """One optimizer step of an sft cell. `time_s` is that of the slowest rank, for which all others wait.

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
    """The complete steps of one sft cell in order. A step without the time of all `world_size` ranks is left out."""
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


def summarise(
    plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """(metric -> value, {}) of one cell: it has no ceilings, since `mfu` and `mfu_of_matmul` relate to two already.

    Rates are Σ tokens ÷ Σ seconds over measured steps. Both are 0…1, absent on CPUs: `mfu` relates FLOP by convention
    to the hardware file's peak, `mfu_of_matmul` the necessary ones to the rate that was measured on the same GPUs.
    """
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
        metrics["positions_per_s_per_gpu"] = sum(step.positions for step in measured) / total_s / cell["world_size"]
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
    rates = [record.value for record in records if record.metric == "matmul_tflop_per_s"]
    if rates:
        metrics["matmul_tflop_per_s"] = statistics.median(rates)
    model = plan.get("models", {}).get(cell.get("model"))
    if model and measured:
        # Attention does not cross samples: its length is that of a sample, not of the packed sequence. Where ranks
        # do not report it, attention is not counted, so that MFU is never overstated.
        lengths = [record.value for record in records if record.metric == "sample_tokens_mean"]
        length = round(lengths[0]) if lengths else 0
        useful = limits.flops_per_token(model, length, causal=True)
        metrics["tflop_per_s_per_gpu"] = metrics["processed_tokens_per_s_per_gpu"] * useful / 1e12
        if cell["device"] != "cpu":
            if rates:
                metrics["mfu_of_matmul"] = metrics["tflop_per_s_per_gpu"] / metrics["matmul_tflop_per_s"]
            if peak := plan.get("hardware", {}).get("bf16_peak_tflop_per_s"):
                flop = limits.flops_per_token(model, length)
                metrics["mfu"] = limits.mfu(metrics["processed_tokens_per_s"], flop, cell["world_size"], peak)
    return metrics, {}


def target_value(target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> float | None:
    """What the cell has for the target's metric."""
    return cell["metrics"].get(target["metric"])


def rates(cell: Mapping[str, Any], records: Sequence[Record]) -> list[tuple[float, float]]:
    """(tokens in the loss per GPU, seconds) of each measured step."""
    world = cell["world_size"]
    return [(step.loss_tokens / world, step.time_s) for step in steps(records, world) if step.measured]
