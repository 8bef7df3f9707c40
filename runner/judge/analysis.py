"""From records to summary.json: rates, scaling, verdicts and findings. Pure.

A summary gives for each number what it depends on, and for each verdict the reason. Three rules apply everywhere:
what was not measured is absent, never zero; a speed that would be meaningless is `not_judged` with its
reason; noise that could reverse a verdict makes it `inconclusive`, with the number of repeats that would decide.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runner.judge import findings, metrics
from runner.judge.findings import Facts
from runner.judge.scaling import judge_scaling
from runner.judge.targets import judge_targets
from runner.judge.verdict import not_judged_reason
from runner.results.records import Record
from runner.results.status import took_s
from runner.system.wording import counted
from runner.workloads.registry import trains

Telemetry = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # cell id -> host -> samples

SCHEMA = 1


def summarise(
    plan: Mapping[str, Any],
    status: Mapping[str, Any],
    records: Iterable[Record],
    facts: Facts,
    telemetry: Telemetry | None = None,
) -> dict[str, Any]:
    """The contents of summary.json (docs/metrics.md names every metric, unit and formula).

    `plan` and `status` are the contents of their JSON files, `facts` is cell id -> host -> facts.json. `telemetry`
    rows are the nodes' samples; utilisation is computed from those taken during measured steps.
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
        cell["id"]: not_judged_reason(
            cell, facts.get(cell["id"], {}), models.get(cell.get("model")) if trains(cell["test"]) else None
        )
        for cell in plan["cells"]
    }
    scaling = judge_scaling(plan, cells, by_cell, unfair)
    targets = judge_targets(plan, cells, scaling, by_cell, unfair)
    for cell in cells:
        cell["not_judged"] = unfair[cell["id"]]
    suspects = findings.suspects(plan, cells, by_cell, facts)
    faults = findings.find(cells, status, suspects, facts)
    verdict, reason = _overall(targets, faults, unfair, cells, status)
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
        "observations": findings.observations(suspects),
        "stages": _stages(plan, status, cells),
        "replaced": list(status.get("replaced", ())),
        "attempts": {
            cell: entry["attempt"] for cell, entry in status.get("cells", {}).items() if entry.get("attempt", 1) > 1
        },
    }


# --- verdicts ---------------------------------------------------------------------------------------------


def _overall(
    targets: Sequence[Mapping[str, Any]],
    faults: Sequence[Mapping[str, Any]],
    unfair: Mapping[str, str | None],
    cells: Sequence[Mapping[str, Any]],
    status: Mapping[str, Any],
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
        if open_:
            return "pass", f"{counted(met, 'target')} met, {open_} not judged"
        return "pass", f"all {met} targets met" if met > 1 else "the target is met"
    if ended_by := status.get("error"):
        return "not_judged", f"ended by: {ended_by['message']}"
    # The reason of the cell with the most nodes is the most informative.
    for cell in sorted(cells, key=lambda cell: -cell["num_nodes"]):
        if unfair[cell["id"]]:
            return "not_judged", str(unfair[cell["id"]])
    return "not_judged", "no target was measured in this run"


def _stages(
    plan: Mapping[str, Any], status: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The stages of a workflow in order, those on nodes and those on the controller; empty for another run.

    `left` says what a stage leaves, by name; a path inside the run's directory begins there.
    """
    inside = f"{plan['run_dir']}/" if plan.get("run_dir") else ""
    controller = status.get("stages", {})
    if not controller:
        return []
    own = [
        {
            "stage": name,
            "state": entry["state"],
            "num_nodes": 0,
            "took_s": took_s(entry),
            "queued_s": 0.0,
            "left": dict(entry.get("left") or {}),
            "message": (entry.get("error") or {}).get("message", ""),
        }
        for name, entry in controller.items()
    ]
    errors = {name: entry.get("error") or {} for name, entry in status.get("cells", {}).items()}
    on_nodes = [
        {
            "stage": cell["id"],
            **{key: cell[key] for key in ("state", "num_nodes", "took_s", "queued_s")},
            "left": {"folder": left.removeprefix(inside)}
            if (left := cell["details"].get("left")) and cell["state"] == "complete"
            else {},
            "message": errors.get(cell["id"], {}).get("message", ""),
        }
        for cell in cells
    ]
    # A workflow's first stage is always one on the controller, which finds what it needs; others there come last.
    return [*own[:1], *on_nodes, *own[1:]]


def _state(status: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    states = {cell["state"] for cell in cells}
    if status.get("state") == "cancelled":
        return "cancelled"
    if "failed" in states or status.get("state") == "failed":
        return "failed"
    return "complete" if states <= {"complete"} else "incomplete"
