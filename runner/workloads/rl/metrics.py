"""Metrics of the stages of a workflow from their records. Pure; docs/metrics.md has the formulas."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.cluster.tools.verl_metrics import IDLE, PHASES
from runner.results.records import Record
from runner.results.statistics import quantile

ONCE_METRICS = ("merge_s", "answer_s")  # written once, by the rank that merges
CURVES = (  # values of a step, in the order of the report's charts
    "reward_mean",
    "validation_reward",
    "loss",
    "validation_loss",
    "kl",
    "kl_of_update",
    "response_tokens_mean",
    "response_tokens_max",
    "response_clipped_share",
    "grad_norm",
)
ENDS = ("reward_mean", "validation_reward", "loss", "validation_loss", "kl", "response_tokens_mean")
END = 0.2  # the share of all steps whose mean is the value at the beginning, and at the end


@dataclass
class Step:
    """One step of a stage that trains, as its attempts recorded it; times in seconds, phases in the order of a step.

    `measured`: it counts in rates and shares, as all but the first step of an attempt. `seconds` is None where no time
    is known. `rates` are tokens/s by phase, `curves` values by their name in CURVES, `other_s` verl's timers that are
    in no phase, `spreads` maximum ÷ mean by what it is of, `not_numbers` the metrics that were NaN or infinite.
    """

    number: int
    measured: bool = False
    seconds: float | None = None
    tokens: float | None = None
    phases_s: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    curves: dict[str, float] = field(default_factory=dict)
    other_s: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    not_numbers: tuple[str, ...] = ()

    @property
    def idle_share(self) -> float:
        """The share of the step that is in none of its phases, 0…1."""
        return self.phases_s.get(IDLE, 0.0) / self.seconds if self.seconds else 0.0


_BY_KEY = {
    "phase_s": ("phases_s", "phase"),
    "phase_tokens_per_s": ("rates", "phase"),
    "other_s": ("other_s", "timer"),
    "spread": ("spreads", "of"),
}


def steps(records: Iterable[Record]) -> list[Step]:
    """The steps of a cell in order, each once: what was recorded of one later replaces what was recorded before."""
    found: dict[int, Step] = {}
    for record in records:
        context = record.context
        if "step" not in context:
            continue
        step = found.setdefault(int(context["step"]), Step(int(context["step"])))
        if record.metric == "step_time_s":
            step.seconds, step.measured = record.value, bool(context.get("measured"))
        elif record.metric == "tokens":
            step.tokens = record.value
        elif record.metric in _BY_KEY:
            name, key = _BY_KEY[record.metric]
            getattr(step, name)[str(context[key])] = record.value
        elif record.metric in CURVES:
            step.curves[record.metric] = record.value
        elif record.metric == "not_a_number":
            step.not_numbers = tuple(context.get("names", ()))
    order = (*PHASES, IDLE)
    for step in found.values():
        step.phases_s = {phase: step.phases_s[phase] for phase in order if phase in step.phases_s}
    return [step for _, step in sorted(found.items())]


def trained(found: Iterable[Step]) -> list[Step]:
    """The steps without those in which the model was only validated, before the first."""
    return [step for step in found if step.tokens is not None or step.seconds is not None or step.phases_s]


def ends(found: Sequence[Step], curve: str) -> tuple[float, float] | None:
    """A curve at its beginning and at its end: means over the first and the last fifth of its values."""
    values = [step.curves[curve] for step in found if curve in step.curves]
    if not values:
        return None
    count = max(1, round(END * len(values)))
    return statistics.fmean(values[:count]), statistics.fmean(values[-count:])


def summarise(
    plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """(metric -> value, {}) of one cell: it has no ceilings."""
    metrics = {record.metric: record.value for record in records if record.metric in ONCE_METRICS}
    if done := trained(steps(records)):
        metrics["steps"] = float(len(done))
        metrics["steps_measured"] = float(sum(step.measured for step in done))
        metrics |= _rates(done, cell["num_nodes"] * cell["gpus_per_node"])
        metrics |= _shares([step for step in done if step.measured and step.phases_s])
    for curve in ENDS:
        if found := ends(steps(records), curve):
            metrics[f"{curve}_first"], metrics[f"{curve}_last"] = found
    clipped = [step.curves["response_clipped_share"] for step in done if "response_clipped_share" in step.curves]
    if clipped:
        metrics["response_clipped_pct"] = 100 * statistics.fmean(clipped)
    return metrics, {}


def _rates(done: Sequence[Step], gpus: int) -> dict[str, float]:
    """Durations and rates over measured steps."""
    found: dict[str, float] = {}
    times = [step.seconds for step in done if step.measured and step.seconds]
    if times:
        found["step_time_s_p50"], found["step_time_s_p95"] = statistics.median(times), quantile(times, 0.95)
        found["step_time_s_mean"] = statistics.fmean(times)
    counted = [(step.tokens, step.seconds) for step in done if step.measured and step.tokens and step.seconds]
    if counted:
        rate = sum(tokens for tokens, _ in counted) / sum(seconds for _, seconds in counted)
        found |= {"tokens_per_s": rate, "tokens_per_s_per_gpu": rate / gpus}
    for phase in PHASES:
        spent = [
            (step.rates[phase], step.phases_s[phase])
            for step in done
            if step.measured and phase in step.rates and step.phases_s.get(phase)
        ]
        if spent:
            taken = sum(rate * seconds for rate, seconds in spent)
            found[f"{phase}_tokens_per_s"] = taken / sum(seconds for _, seconds in spent)
    return found


def _shares(measured: Sequence[Step]) -> dict[str, float]:
    """The share of each phase in the time of all measured steps, in %."""
    total = sum(step.seconds or 0.0 for step in measured)
    if not total:
        return {}
    phases = dict.fromkeys(phase for step in measured for phase in step.phases_s)
    return {
        f"{phase}_share_pct": 100 * sum(step.phases_s.get(phase, 0.0) for step in measured) / total for phase in phases
    }


def samples(target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> list[float]:
    """The values of the target's metric in each measured step, or in each that an end of a curve is the mean of; the
    cell's own value of what no step has by itself.
    """
    metric, found = target["metric"], trained(steps(records))
    timed = [(step, step.seconds) for step in found if step.measured and step.seconds]
    phase = next((phase for phase in (*PHASES, IDLE) if metric.startswith(f"{phase}_")), None)
    if metric in ("step_time_s_p50", "step_time_s_mean"):
        return [seconds for _, seconds in timed]
    if metric in ("tokens_per_s", "tokens_per_s_per_gpu"):
        per = cell["metrics"]["tokens_per_s"] / cell["metrics"][metric] if metric in cell["metrics"] else 1.0
        return [step.tokens / seconds / per for step, seconds in timed if step.tokens]
    if phase and metric == f"{phase}_share_pct":
        return [100 * step.phases_s.get(phase, 0.0) / seconds for step, seconds in timed if step.phases_s]
    if phase and metric == f"{phase}_tokens_per_s":
        return [step.rates[phase] for step, _ in timed if phase in step.rates]
    for curve in ENDS:
        values = [step.curves[curve] for step in found if curve in step.curves]
        if values and metric in (f"{curve}_first", f"{curve}_last"):
            count = max(1, round(END * len(values)))
            return values[:count] if metric.endswith("_first") else values[-count:]
    value = target_value(target, cell, records)
    return [] if value is None else [value]


def target_value(target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> float | None:
    """What a cell of summary.json has for the target's metric, in its unit; None where it was not measured."""
    value: float | None = cell["metrics"].get(target["metric"])
    return value
