"""Scaling: the rate per GPU at each node count against the smallest one. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from runner.judge.verdict import Judgement, bootstrap, judge
from runner.plan import speed
from runner.results.records import Record
from runner.system.wording import counted
from runner.workloads.registry import TESTS, trains


def judge_scaling(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    by_cell: Mapping[str, Sequence[Record]],
    unfair: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    """The rows of `scaling` in summary.json: efficiency of tokens/s per GPU at each node count, per model.

    Efficiency is a ratio to the smallest node count, the base. Weak scaling: per-GPU rate ÷ the base's per-GPU rate.
    Strong scaling: speedup ÷ ideal speedup, which is the same quotient. `unfair` maps cell ids to the reason why
    their speed is not judged, or to None. `possible` is the efficiency (0…1) that the plan predicted, and `bound` what
    it says of that, None where it predicted nothing.
    """
    expected = {cell["id"]: cell.get("expected") for cell in plan["cells"]}
    mode = plan.get("scaling", "weak")
    targets = [
        target
        for target in plan.get("targets", [])
        if target["metric"] == "scaling_efficiency_pct" and target.get("scaling", "weak") == mode
    ]
    rows = []
    for test, model in dict.fromkeys((cell["test"], cell["model"]) for cell in cells if trains(cell["test"])):
        sizes: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for cell in cells:
            if (cell["test"], cell["model"], cell["state"]) == (test, model, "complete"):
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
            target = None if is_base else _target(targets, size)
            why = next((unfair[c["id"]] for c in [*sizes[size], *sizes[base]] if unfair[c["id"]]), None)
            if is_base:
                why = why or "the base that larger node counts are compared with"
            elif target is None:
                why = why or f"no target for {mode} scaling on {counted(size, 'node')}"
            limit = _limit(expected[sizes[size][0]["id"]], expected[sizes[base][0]["id"]], base)
            if why or target is None:
                judged = Judgement("not_judged", str(why))
            else:
                judged = judge_efficiency(value, (low, high), min(len(repeats), len(samples[base])), target, limit)
            rows.append(
                {
                    "test": test,
                    "model": model,
                    "num_nodes": size,
                    "world_size": sizes[size][0]["world_size"],
                    "base_nodes": base,
                    "mode": mode,
                    "efficiency": value,
                    "ci": [low, high],
                    **limit,
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


def _target(targets: Sequence[Mapping[str, Any]], num_nodes: int) -> Mapping[str, Any] | None:
    """The target for this node count, else the one for every node count, else None."""
    fitting = [target for target in targets if target.get("num_nodes") in (None, num_nodes)]
    return min(fitting, key=lambda target: target.get("num_nodes") is None, default=None)


def _limit(expected: Mapping[str, Any] | None, of_base: Mapping[str, Any] | None, base: int) -> dict[str, Any]:
    """{"possible", "bound"}: the efficiency that the plan predicted against the count that is the base now."""
    if not expected or not of_base or expected["efficiency"] is None:
        return {"possible": None, "bound": None}
    possible = min(1.0, expected["positions_per_s_per_gpu"] / of_base["positions_per_s_per_gpu"])
    return {
        "possible": possible,
        "bound": speed.explained({**expected, "efficiency": possible, "base_nodes": base}),
    }


def judge_efficiency(
    efficiency: float,
    interval: tuple[float, float],
    repeats: int,
    target: Mapping[str, Any],
    limit: Mapping[str, Any],
) -> Judgement:
    """Judge an efficiency and its interval (ratios) against a target in percent.

    `repeats` is the smaller number of repeats of the two node counts. Where the plan predicted that the configuration
    cannot reach the target (`limit` has `possible` and `bound`), the reason of a failure says so.
    """
    low, high = interval
    judged = judge(100 * efficiency, (100 * low, 100 * high), repeats, target["value"], "min", "%")
    possible = limit.get("possible")
    if judged.verdict == "fail" and possible is not None and 100 * possible < target["value"]:
        return replace(judged, reason=f"{judged.reason}; {limit['bound']}")
    return judged


def _per_gpu_samples(
    cells: Sequence[Mapping[str, Any]], by_cell: Mapping[str, Sequence[Record]]
) -> list[list[tuple[float, float]]]:
    """The rates per GPU of each cell that has some, step by step."""
    repeats = (TESTS[cell["test"]].load_training_metrics().rates(cell, by_cell.get(cell["id"], [])) for cell in cells)
    return [steps for steps in repeats if sum(amount for amount, _ in steps)]
