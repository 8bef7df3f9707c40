"""From records to summary.json: rates, scaling, verdicts and findings. Pure.

A summary says for each number what it depends on, and for each verdict why. Three rules hold everywhere:
what was not measured is absent, never zero; a speed that would be meaningless is `not_judged` with its
reason; noise that could turn a verdict over makes it `inconclusive`, with the repeats that would settle it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from runner import findings, metrics
from runner.cluster import limits
from runner.findings import Facts
from runner.results.records import Record
from runner.results.statistics import quantile
from runner.workloads.collectives import metrics as collective_metrics
from runner.workloads.sft import metrics as sft_metrics

Telemetry = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # cell id -> host -> samples

SCHEMA = 1
MIN_REPEATS = 3  # below this the spread between repeats is not known, whatever the spread inside one
MIN_PARAMETERS = 100_000_000  # below this a step is launch overhead and latency, whatever the hardware
RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_REPEATS_NEEDED = 100


def summarise(
    plan: Mapping[str, Any],
    status: Mapping[str, Any],
    records: Iterable[Record],
    facts: Facts,
    telemetry: Telemetry | None = None,
) -> dict[str, Any]:
    """The contents of summary.json (docs/metrics.md names every metric, unit and formula).

    `telemetry` rows are runner.telemetry's samples; utilisation is taken from those within measured steps.
    """
    by_cell: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_cell[record.cell].append(record)
    cells = [
        metrics.summarise_cell(plan, cell, status, by_cell.get(cell["id"], []), (telemetry or {}).get(cell["id"], {}))
        for cell in plan["cells"]
    ]
    models = plan.get("models", {})
    unfair = {
        cell["id"]: not_judged_reason(cell, facts.get(cell["id"], {}), models.get(cell.get("model")))
        for cell in plan["cells"]
    }
    scaling = _scaling(plan, cells, by_cell, unfair)
    targets = _targets(plan, cells, scaling, by_cell, unfair)
    faults = findings.find(cells, status, by_cell, facts)
    verdict, reason = _overall(targets, faults, unfair, cells)
    return {
        "schema": SCHEMA,
        "run_id": plan["run_id"],
        "state": _state(status, cells),
        "verdict": verdict,
        "reason": reason,
        "cells": cells,
        "scaling": scaling,
        "targets": targets,
        "findings": faults,
        "replaced": list(status.get("replaced", ())),
        "attempts": {
            cell: entry["attempt"] for cell, entry in status.get("cells", {}).items() if entry.get("attempt", 1) > 1
        },
    }


# --- verdicts ---------------------------------------------------------------------------------------------


def not_judged_reason(
    cell: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any] | None = None
) -> str | None:
    """Why the speed of this cell says nothing about a cluster, or None where it does."""
    hosts = list(cell["hosts"])
    boots = {host: facts.get(host, {}).get("boot_id") for host in hosts}
    shared = max(Counter(boot for boot in boots.values() if boot).values(), default=0)
    if shared > 1:
        return f"{shared} nodes share one kernel (same boot id): speeds prove that the system works, not how fast it is"
    if cell["device"] == "cpu":
        return "ranks ran on the CPU: targets are for GPUs"
    if model and limits.parameters(model).total < MIN_PARAMETERS:
        return f"model {model['name']} is too small to load a GPU: it proves that the system works, not how fast it is"
    unseen = [host for host, boot in boots.items() if not boot]
    if unseen and len(hosts) > 1:
        return f"no facts from {', '.join(unseen)}: cannot tell whether nodes share a kernel"
    return None


@dataclass(frozen=True)
class Judgement:
    verdict: str
    reason: str
    repeats_needed: int | None = None


def judge(
    value: float, ci: tuple[float, float], repeats: int, target: float, direction: str, unit: str = ""
) -> Judgement:
    """`pass` or `fail` only where the whole confidence interval lies on one side of the target.

    `direction` is `min` (at least the target) or `max` (at most). The repeats needed follow from the interval's
    width shrinking with the square root of their number.
    """
    low, high = ci
    unit = f" {unit}" if unit else ""
    text = f"{_number(value)}{unit} (95 % CI {_number(low)} – {_number(high)})"
    if repeats < MIN_REPEATS:
        reason = f"{text}; {repeats} of at least {MIN_REPEATS} repeats: their spread is not known"
        return Judgement("inconclusive", reason, MIN_REPEATS)
    sign = 1 if direction == "min" else -1
    worst, best = (low, high) if direction == "min" else (high, low)
    word = "at least" if direction == "min" else "at most"
    if sign * (worst - target) >= 0:
        return Judgement("pass", f"{text}, wanted {word} {_number(target)}{unit}")
    if sign * (best - target) < 0:
        return Judgement("fail", f"{text}, wanted {word} {_number(target)}{unit}")
    gap, half = abs(value - target), (high - low) / 2
    needed = MAX_REPEATS_NEEDED if gap == 0 else math.ceil(repeats * (half / gap) ** 2)
    needed = min(max(needed, repeats + 1), MAX_REPEATS_NEEDED)
    about = "more than " if needed == MAX_REPEATS_NEEDED else "about "
    reason = f"{text} straddles {_number(target)}{unit}; {about}{needed} repeats would settle it"
    return Judgement("inconclusive", reason, needed)


def bootstrap(
    samples: Sequence[Sequence[tuple[float, float]]],
    base: Sequence[Sequence[tuple[float, float]]] | None,
    seed: str,
) -> tuple[float, float, float]:
    """(median, low, high) of a rate, or of its ratio to a base's rate, with a 95 % percentile interval.

    `samples` is one list per repeat of (amount, seconds) per step; a repeat's rate is Σ amount ÷ Σ seconds and
    the value is the median over repeats. Each of the 1000 resamples draws repeats with replacement and, within
    each drawn repeat, steps with replacement (a two-level bootstrap: steps of one repeat share its luck).
    """

    def rate(repeats: Sequence[Sequence[tuple[float, float]]]) -> float:
        return statistics.median(sum(a for a, _ in r) / sum(s for _, s in r) for r in repeats)

    def drawn(repeats: Sequence[Sequence[tuple[float, float]]]) -> float:
        return rate([random.choices(r, k=len(r)) for r in random.choices(repeats, k=len(repeats))])

    random = Random(seed)
    draws = [drawn(samples) / (drawn(base) if base else 1.0) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    value = rate(samples) / (rate(base) if base else 1.0)
    return value, quantile(draws, tail), quantile(draws, 1 - tail)


def _scaling(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    by_cell: Mapping[str, Sequence[Record]],
    unfair: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    """Efficiency of tokens/s per GPU at each node count against the smallest one, per model.

    Weak scaling: per-GPU rate ÷ base's per-GPU rate. Strong scaling: speedup ÷ ideal speedup, which is the same
    quotient; only weak scaling has targets.
    """
    mode = plan.get("scaling", "weak")
    targets = {
        t["num_nodes"]: t
        for t in plan.get("targets", [])
        if t["metric"] == "scaling_efficiency_pct" and t.get("scaling", "weak") == mode
    }
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells if cell["test"] == "sft"):
        sizes: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for cell in cells:
            if (cell["test"], cell["model"], cell["state"]) == ("sft", model, "complete"):
                sizes[cell["num_nodes"]].append(cell)
        samples = {size: _per_gpu_samples(sizes[size], by_cell) for size in sorted(sizes)}
        samples = {size: repeats for size, repeats in samples.items() if repeats}
        if not samples:
            continue
        base = min(samples)
        for size, repeats in samples.items():
            seed = f"{plan.get('seed', 0)}/{model}/{size}"
            rate, rate_low, rate_high = bootstrap(repeats, None, seed)
            is_base = size == base
            value, low, high = (1.0, 1.0, 1.0) if is_base else bootstrap(repeats, samples[base], seed)
            target = None if is_base else targets.get(size)
            count = min(len(repeats), len(samples[base]))
            why = next(
                (unfair[c["id"]] for c in [*sizes[size], *sizes[base]] if unfair[c["id"]]),
                None,
            )
            if is_base:
                judged = Judgement("not_judged", why or "the base that larger node counts are compared with")
            elif why:
                judged = Judgement("not_judged", why)
            elif target is None:
                judged = Judgement("not_judged", f"no target for {mode} scaling on {size} nodes")
            else:
                judged = judge(100 * value, (100 * low, 100 * high), count, target["value"], "min", "%")
            rows.append(
                {
                    "test": "sft",
                    "model": model,
                    "num_nodes": size,
                    "world_size": sizes[size][0]["world_size"],
                    "base_nodes": base,
                    "mode": mode,
                    "efficiency": value,
                    "ci": [low, high],
                    "target": target["value"] / 100 if target else None,
                    "verdict": judged.verdict,
                    "reason": judged.reason,
                    "repeats": len(repeats),
                    "repeats_needed": judged.repeats_needed,
                    "tokens_per_s_per_gpu": rate,
                    "tokens_per_s_per_gpu_ci": [rate_low, rate_high],
                }
            )
    return rows


def _per_gpu_samples(
    cells: Sequence[Mapping[str, Any]], by_cell: Mapping[str, Sequence[Record]]
) -> list[list[tuple[float, float]]]:
    repeats = []
    for cell in cells:
        world = cell["world_size"]
        measured = [s for s in sft_metrics.steps(by_cell.get(cell["id"], []), world) if s.measured]
        if sum(step.loss_tokens for step in measured):
            repeats.append([(step.loss_tokens / world, step.time_s) for step in measured])
    return repeats


def _targets(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    scaling: Sequence[Mapping[str, Any]],
    by_cell: Mapping[str, Sequence[Record]],
    unfair: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    rows = []
    for target in plan.get("targets", []):
        if target["metric"] == "scaling_efficiency_pct":
            rows += _scaling_target(target, scaling, plan.get("scaling", "weak"))
            continue
        groups: dict[tuple[str | None, int], list[tuple[Mapping[str, Any], float]]] = defaultdict(list)
        for cell in cells:
            fits = cell["test"] == target["test"] and target.get("num_nodes") in (None, cell["num_nodes"])
            value = _observed(target, cell, by_cell) if fits and cell["state"] == "complete" else None
            if value is not None:
                groups[cell["model"], cell["num_nodes"]].append((cell, value))
        if not groups:
            rows.append(_target_row(target, Judgement("not_judged", _not_measured(target))))
        for (model, num_nodes), found in groups.items():
            values = [value for _, value in found]
            seed = f"{plan.get('seed', 0)}/{target['name']}/{model}/{num_nodes}"
            value, low, high = bootstrap([[(v, 1.0)] for v in values], None, seed)
            why = next((unfair[cell["id"]] for cell, _ in found if unfair[cell["id"]]), None)
            if why:
                judged = Judgement("not_judged", why)
            else:
                wanted, name = target["value"], target["metric"]
                judged = judge(value, (low, high), len(values), wanted, target["direction"], metrics.unit(name))
            slowest = [cell["slowest_gpu"] for cell, _ in found if "slowest_gpu" in cell]
            if slowest and target["metric"] == "gpu_util_pct_mean":
                gpu = min(slowest, key=lambda gpu: gpu["gpu_util_pct"])
                note = f"; slowest: {gpu['host']} GPU {gpu['gpu']}, {gpu['gpu_util_pct']:.1f} %"
                judged = replace(judged, reason=judged.reason + note)
            measured = {"measured": value, "ci": [low, high], "repeats": len(values)}
            rows.append(_target_row(target, judged, model=model, num_nodes=num_nodes, **measured))
    return rows


def _target_row(target: Mapping[str, Any], judged: Judgement, **measured: Any) -> dict[str, Any]:
    return {
        **target,
        "model": None,
        "measured": None,
        "ci": None,
        "repeats": 0,
        **measured,
        "verdict": judged.verdict,
        "reason": judged.reason,
        "repeats_needed": judged.repeats_needed,
    }


def _scaling_target(target: Mapping[str, Any], scaling: Sequence[Mapping[str, Any]], mode: str) -> list[dict[str, Any]]:
    if target.get("scaling", "weak") != mode:
        reason = f"this run measured {mode} scaling; the target is for {target.get('scaling', 'weak')} scaling"
        return [_target_row(target, Judgement("not_judged", reason))]
    rows = [
        _target_row(
            target,
            Judgement(row["verdict"], row["reason"], row["repeats_needed"]),
            model=row["model"],
            measured=100 * row["efficiency"],
            ci=[100 * edge for edge in row["ci"]],
            repeats=row["repeats"],
        )
        for row in scaling
        if row["num_nodes"] == target["num_nodes"] and row["num_nodes"] != row["base_nodes"]
    ]
    return rows or [_target_row(target, Judgement("not_judged", _not_measured(target)))]


def _not_measured(target: Mapping[str, Any]) -> str:
    where = f" on {target['num_nodes']} nodes" if target.get("num_nodes") else ""
    size = f" at {target['min_bytes'] / 2**30:g} GiB or more" if (target.get("min_bytes") or 0) >= 2**30 else ""
    if target["metric"] == "scaling_efficiency_pct":
        return f"not measured in this run: needs complete {target['test']} cells{where} and on fewer"
    return f"not measured in this run: no {target['metric']}{size}{where}"


def _observed(
    target: Mapping[str, Any], cell: Mapping[str, Any], by_cell: Mapping[str, Sequence[Record]]
) -> float | None:
    """What the cell says about the target's metric; of several sizes the best one."""
    collective = target.get("collective")
    if not collective:
        return cell["metrics"].get(target["metric"])
    # Every GPU of a node sends to the other node and receives from it at busbw: both directions, in bits.
    name, factor = target["metric"], 1.0
    if name == "bidirectional_gbit_per_s":
        name, factor = "busbw_gb_per_s", 2 * 8.0 * cell["world_size"] / cell["num_nodes"]
    low, high = target.get("min_bytes") or 0, target.get("max_bytes") or math.inf
    found = [
        value * factor
        for size, value in collective_metrics.by_size(by_cell.get(cell["id"], []), collective, name).items()
        if low <= size <= high
    ]
    best = max if target["direction"] == "min" else min
    return best(found, default=None)


def _overall(
    targets: Sequence[Mapping[str, Any]],
    faults: Sequence[Mapping[str, Any]],
    unfair: Mapping[str, str | None],
    cells: Sequence[Mapping[str, Any]],
) -> tuple[str, str]:
    by_verdict: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for target in targets:
        by_verdict[target["verdict"]].append(target)
    if faults:
        first = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        who = f"{first['host']}: " if first["host"] else ""
        return "fail", f"{who}{first['evidence']}{more}"
    for verdict in ("fail", "inconclusive"):
        if by_verdict[verdict]:
            first = by_verdict[verdict][0]
            more = f" (and {len(by_verdict[verdict]) - 1} more)" if len(by_verdict[verdict]) > 1 else ""
            return verdict, f"{first['name']}: {first['reason']}{more}"
    if by_verdict["pass"]:
        open_ = len(by_verdict["not_judged"])
        met = len(by_verdict["pass"])
        return "pass", f"{met} targets met, {open_} not judged" if open_ else f"all {met} targets met"
    # The reason that covers most nodes says most.
    for cell in sorted(cells, key=lambda cell: -cell["num_nodes"]):
        if unfair[cell["id"]]:
            return "not_judged", str(unfair[cell["id"]])
    return "not_judged", "no target was measured in this run"


def _state(status: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    states = {cell["state"] for cell in cells}
    if status.get("state") == "cancelled":
        return "cancelled"
    if "failed" in states or status.get("state") == "failed":
        return "failed"
    return "complete" if states <= {"complete"} else "incomplete"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
