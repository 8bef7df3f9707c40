"""What a cell of test `gpu` says of each of its GPUs: the rows of the report. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from runner.results.records import Record
from runner.workloads.gpu import compare, condition, metrics
from runner.workloads.gpu.compare import Gpu

PEERS = "peer"


def details(plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """{"gpus": one entry a GPU, by host and number}; what was not measured or read is absent.

    Of an entry, `rates` are medians over blocks by the keys of `compare.RATES` and `LINKS`, in their units, and as
    `peer` the median over its pairs; `distance_pct` is how far each is from the cell's `compare.middle`, and
    `peak_pct` its share of the hardware file's peak, where that has one. `far` are the rates over the host's memory on
    the NUMA node that is not the GPU's. `throttled` is reason -> % of the time.
    """
    gpus: dict[Gpu, dict[str, Any]] = defaultdict(lambda: {"rates": {}, "distance_pct": {}, "peak_pct": {}, "far": {}})
    peaks = metrics.peaks(plan, cell)
    medians = {
        measure.key: {gpu: statistics.median(own.values()) for gpu, own in compare.by_gpu(records, measure).items()}
        for measure in (*compare.RATES, *compare.LINKS)
    }
    medians[PEERS] = _with_peers(records)
    for key, values in medians.items():
        middle = compare.middle(values.values()) if values else 0.0
        for gpu, value in values.items():
            gpus[gpu]["rates"][key] = value
            if len(values) > 1 and middle:
                gpus[gpu]["distance_pct"][key] = 100 * (value / middle - 1)
            if key in peaks:
                gpus[gpu]["peak_pct"][key] = 100 * value / peaks[key]
    far: dict[tuple[Gpu, str], list[float]] = defaultdict(list)
    for record in records:
        gpu = compare.gpu_of(record)
        for link in compare.LINKS:
            if record.metric == link.metric and record.context.get("local") is False:
                far[gpu, link.key].append(record.value)
        if record.metric == "matmul_drift_pct":
            gpus[gpu]["drift_pct"] = min(record.value, gpus[gpu].get("drift_pct", record.value))
        if record.metric == "wrong_values":
            gpus[gpu]["wrong_values"] = gpus[gpu].get("wrong_values", 0) + record.value
    for (gpu, key), found in far.items():
        gpus[gpu]["far"][key] = statistics.median(found)
    for gpu, state in condition.conditions(records).items():
        for name, metric, which in (
            ("clock_mhz", "sm_clock_mhz", "mean"),
            ("temperature_c", "temperature_c", "max"),
        ):
            if (read := state.get(metric, which)) is not None:
                gpus[gpu][name] = read
        shares = {reason: value for (metric, reason), value in state.values.items() if metric == "throttle_share_pct"}
        if shares:
            gpus[gpu]["throttled"] = {reason: value for reason, value in shares.items() if value > 0}
    return {
        "gpus": [
            {"host": gpu.host, "gpu": gpu.number, "uuid": gpu.uuid, **entry}
            for gpu, entry in sorted(gpus.items(), key=lambda item: (item[0].host, item[0].number))
            if entry["rates"]
        ]
    }


def _with_peers(records: Sequence[Record]) -> dict[Gpu, float]:
    """GPU -> GB/s, the median of all pairs of its node that it is one of."""
    names = {(gpu.host, gpu.number): gpu for gpu in map(compare.gpu_of, records)}
    found: dict[Gpu, list[float]] = defaultdict(list)
    for pair, series in compare.by_pair(records).items():
        for end in (pair.source, pair.target):
            found[names.get((pair.host, end), Gpu(pair.host, end))].append(statistics.median(series.values()))
    return {gpu: statistics.median(rates) for gpu, rates in found.items()}
