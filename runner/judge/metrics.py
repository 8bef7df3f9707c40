"""From the records of one cell to its metrics. Pure; docs/metrics.md names every metric, unit and formula.

What was not measured is absent, never zero: a step that lacks a rank's values is not counted.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from runner.results.records import Record
from runner.results.status import queued_s, took_s
from runner.workloads.registry import TESTS

GPU_UTILISATION = re.compile(r"gpu(\d+)_util_pct")
# The unit of a metric by the part of its name that gives it.
UNITS = (
    ("_pct", "%"),  # of a rate, whose name has that of its unit
    ("tokens_per_s", "tokens/s"),
    ("gb_per_s", "GB/s"),
    ("gbit_per_s", "Gbit/s"),
    ("tflop_per_s", "TFLOP/s"),
    ("_gib", "GiB"),
    ("_us", "µs"),
    ("_s", "s"),
)


def unit(metric: str) -> str:
    """The unit in a metric's name, as people write it (`GB/s`, `µs`); empty for a count or a ratio."""
    return next((text for part, text in UNITS if part in metric), "")


def summarise_cell(
    plan: Mapping[str, Any],
    cell: Mapping[str, Any],
    status: Mapping[str, Any],
    records: Sequence[Record],
    telemetry: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """The entry of one cell in summary.json.

    `plan` and `cell` are the contents of plan.json and its entry, `records` those of the cell, and `telemetry` is
    host -> samples. `metrics`, `limits` and `details` are empty for a test that this version does not have.
    """
    entry = status.get("cells", {}).get(cell["id"], {})
    result: dict[str, Any] = {
        "id": cell["id"],
        "test": cell["test"],
        "model": cell.get("model"),
        "num_nodes": cell["num_nodes"],
        "world_size": cell["world_size"],
        "repeat": cell["repeat"],
        "hosts": list(cell["hosts"]),
        "device": cell["device"],
        "state": entry.get("state", "incomplete"),
        "took_s": took_s(entry),
        "used": dict(entry.get("used", {})),
        "chosen": cell.get("chosen", ""),
        "queued_s": queued_s(entry),
        "metrics": {},
        "limits": {},
        "details": {},
    }
    if test := TESTS.get(cell["test"]):
        result["metrics"], result["limits"] = test.load_metrics().summarise(plan, cell, records)
        if module := test.load_details():
            result["details"] = module.details(plan, cell, records)
    _add_utilisation(result, records, telemetry)
    return result


def _add_utilisation(
    cell: dict[str, Any], records: Sequence[Record], telemetry: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Mean utilisation of the cell's GPUs while its measured steps ran, and the least used GPU by name.

    The window of each host runs from its first to its last measured step, by `started_s` on its clock: loading and
    warm-up are not training. A host whose ranks tell no steps, since one rank tells those of all, has the others'
    window. Without a window nothing is added.
    """
    windows: dict[str, tuple[float, float]] = {}
    for record in records:
        context = record.context
        if record.metric == "step_time_s" and context.get("measured") and "started_s" in context and record.host:
            begin, end = windows.get(record.host, (math.inf, 0.0))
            start = float(context["started_s"])
            windows[record.host] = min(begin, start), max(end, start + record.value)
    samples: dict[tuple[str, int], list[float]] = defaultdict(list)
    first = min((begin for begin, _ in windows.values()), default=math.inf)
    last = max((end for _, end in windows.values()), default=0.0)
    for host, rows in telemetry.items():
        begin, end = windows.get(host, (first, last))
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
