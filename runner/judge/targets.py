"""Targets: measured values compared with required values. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from runner.judge import metrics
from runner.judge.scaling import judge_efficiency
from runner.judge.verdict import MIN_REPEATS, Judgement, bootstrap, judge
from runner.plan.speed import HOST, explained
from runner.results.records import Record
from runner.system.wording import counted
from runner.workloads.registry import TESTS


def judge_targets(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    scaling: Sequence[Mapping[str, Any]],
    by_cell: Mapping[str, Sequence[Record]],
    unfair: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    """The rows of `targets` in summary.json: each target with what was measured and its verdict.

    A target gives one row per (model, node count) that it applies to, and one `not_judged` row where nothing was
    measured; a run without any test that has targets gives none. `scaling` are the rows of `judge_scaling`; `unfair`
    maps cell ids to the reason why their speed is not judged, or to None. Values are in the unit of the target's
    metric.
    """
    expected = {cell["id"]: cell.get("expected") or {} for cell in plan["cells"]}
    rows = []
    planned = {cell["test"] for cell in plan["cells"]}
    if not planned & {target["test"] for target in plan.get("targets", [])}:
        return []
    for target in plan.get("targets", []):
        if target["test"] not in planned:
            reason = f"not measured in this run, which is without test {target['test']}"
            rows.append(_target_row(target, Judgement("not_judged", reason)))
            continue
        if target["metric"] == "scaling_efficiency_pct":
            rows += _scaling_target(target, scaling, plan.get("scaling", "weak"))
            continue
        groups: dict[tuple[str | None, int], list[tuple[Mapping[str, Any], float]]] = defaultdict(list)
        for cell in cells:
            fits = cell["test"] == target["test"] and target.get("num_nodes") in (None, cell["num_nodes"])
            if fits and cell["state"] == "complete":
                for value in _values(target, cell, by_cell):
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
                required, name = target["value"], target["metric"]
                least = target.get("repeats") or MIN_REPEATS
                unit, direction = metrics.unit(name), target["direction"]
                judged = judge(value, (low, high), len(values), required, direction, unit, least)
            slowest = [cell["slowest_gpu"] for cell, _ in found if "slowest_gpu" in cell]
            if slowest and target["metric"] == "gpu_util_pct_mean":
                gpu = min(slowest, key=lambda gpu: gpu["gpu_util_pct"])
                note = f"; slowest: {gpu['host']} GPU {gpu['gpu']}, {gpu['gpu_util_pct']:.1f} %"
                judged = replace(judged, reason=judged.reason + note)
            predicted = expected[found[0][0]["id"]]
            if judged.verdict == "fail" and target["metric"] == "gpu_util_pct_mean" and predicted.get("binds") == HOST:
                judged = replace(judged, reason=f"{judged.reason}; {explained(predicted)}")
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
            _judged_efficiency(target, row, scaling),
            model=row["model"],
            num_nodes=row["num_nodes"],
            measured=100 * row["efficiency"],
            ci=[100 * edge for edge in row["ci"]],
            repeats=row["repeats"],
        )
        for row in scaling
        if target.get("num_nodes") in (None, row["num_nodes"]) and row["num_nodes"] != row["base_nodes"]
    ]
    return rows or [_target_row(target, Judgement("not_judged", _not_measured(target)))]


def _judged_efficiency(
    target: Mapping[str, Any], row: Mapping[str, Any], scaling: Sequence[Mapping[str, Any]]
) -> Judgement:
    """Judge a scaling row against `target`, which may differ from the target that the row itself was judged by."""
    if row["verdict"] == "not_judged":
        return Judgement("not_judged", row["reason"])
    compared = (row["num_nodes"], row["base_nodes"])
    of_model = [other for other in scaling if other["model"] == row["model"]]
    repeats = min(other["repeats"] for other in of_model if other["num_nodes"] in compared)
    low, high = row["ci"]
    return judge_efficiency(row["efficiency"], (low, high), repeats, target, row)


def _not_measured(target: Mapping[str, Any]) -> str:
    where = f" on {counted(target['num_nodes'], 'node')}" if target.get("num_nodes") else ""
    size = f" at {target['min_bytes'] / 2**30:g} GiB or more" if (target.get("min_bytes") or 0) >= 2**30 else ""
    if target["metric"] == "scaling_efficiency_pct":
        needed = f"{where} and on fewer" if where else " on two node counts"
        return f"not measured in this run: needs complete {target['test']} cells{needed}"
    return f"not measured in this run: no {target['metric']}{size}{where}"


def _values(
    target: Mapping[str, Any], cell: Mapping[str, Any], by_cell: Mapping[str, Sequence[Record]]
) -> Sequence[float]:
    """What the cell has for the target's metric, one value or as many as repeat within it; none for a test that only
    another version has.
    """
    test, records = TESTS.get(cell["test"]), by_cell.get(cell["id"], [])
    if test is None:
        return ()
    if samples := test.load_samples():
        return samples(target, cell, records)
    value = test.load_metrics().target_value(target, cell, records)
    return () if value is None else (value,)
