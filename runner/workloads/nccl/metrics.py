"""Metrics, ceilings and verdicts of a `nccl` cell from its records. Pure; docs/metrics.md has the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.cluster import limits
from runner.results.records import Record
from runner.workloads.collectives.metrics import best_of

# Below so many times the latency of the smallest size, the time of an operation is not that of its bytes: not judged.
BYTES_COUNT = 100
LOW = 0.65  # of the ceiling; healthy fabrics reach 75 to 98 % of theirs
ABOVE = 1.05  # of the ceiling: rates of hardware are rounded

# The ceiling in `limits` that holds for an algorithm of NCCL, across nodes. Inside one node all are
# limited by NVLink.
_CEILINGS = {
    "RING": "ring",
    "PAT": "ring",
    "TREE": "tree",
    "NVLSTREE": "tree",
    "NVLS": "collnet",  # across nodes it combines in the switches
    "COLLNETDIRECT": "collnet",
    "COLLNETCHAIN": "collnet",
}
# One GPU sends or receives everything, some send more to other nodes than others, or busbw is no rate of a link: no
# ceiling is known.
_UNLIMITED = ("gather", "scatter", "hypercube", "all_to_all_v")
# One flow crosses each boundary of nodes: it cannot exceed its node's NICs, and need not use all of them.
_ONE_FLOW = ("send_recv",)


@dataclass(frozen=True)
class Row:
    """One size of a cell, in place or out of place: what was measured, and its verdict.

    `time_us` is of one operation; `algorithm` and `protocol` are NCCL's, None where it did not say. `limit` is the
    ceiling for that algorithm, or the highest of all where it is unknown; None without a rate of the hardware. `share`
    is busbw ÷ `limit`. `verdict` is `good`, `low`, `above` (which is suspicious itself) or `not_judged`, and `reason`
    says why.
    """

    size_bytes: int
    in_place: bool
    time_us: float
    algbw_gb_per_s: float
    busbw_gb_per_s: float
    wrong: float | None
    algorithm: str | None
    protocol: str | None
    limit: limits.Limit | None
    share: float | None
    verdict: str
    reason: str


def rows(plan: Mapping[str, Any], cell: Mapping[str, Any], records: Iterable[Record]) -> list[Row]:
    """The sizes of a cell in ascending order, out of place before in place; `cell` is its entry in plan.json.

    A verdict is of one size alone: an average over sizes says nothing of any of them.
    """
    records = list(records)
    values: dict[tuple[int, bool], dict[str, float]] = {}
    for record in records:
        if "size_bytes" in record.context:
            place = int(record.context["size_bytes"]), bool(record.context.get("in_place"))
            values.setdefault(place, {})[record.metric] = record.value
    whole = {place: found for place, found in sorted(values.items()) if {*_MEASURED} <= found.keys()}
    fastest = min((found["latency_us_mean"] for found in whole.values()), default=math.inf)
    used = algorithms(cell, records)
    return [_row(plan, cell, place, found, fastest, used.get(place[0])) for place, found in whole.items()]


_MEASURED = ("latency_us_mean", "algbw_gb_per_s", "busbw_gb_per_s")


def _row(
    plan: Mapping[str, Any],
    cell: Mapping[str, Any],
    place: tuple[int, bool],
    found: Mapping[str, float],
    fastest: float,
    used: tuple[str, str] | None,
) -> Row:
    algorithm, protocol = used or (None, None)
    limit = limit_of(plan, cell, algorithm)
    busbw, time = found["busbw_gb_per_s"], found["latency_us_mean"]
    share = busbw / limit.gb_per_s if limit and busbw else None
    verdict, reason = _verdict(cell, limit, share, time, fastest)
    return Row(
        *place, time, found["algbw_gb_per_s"], busbw, found.get("wrong_values"), algorithm, protocol,
        limit, share, verdict, reason,
    )  # fmt: skip


def _verdict(
    cell: Mapping[str, Any], limit: limits.Limit | None, share: float | None, time_us: float, fastest_us: float
) -> tuple[str, str]:
    params = cell["params"]
    if limit is None or share is None:
        return "not_judged", "no ceiling is known"
    of = f"{100 * share:.0f} % of {limit.gb_per_s:.4g} GB/s ({limit.binds})"
    if share > ABOVE and params["split"] != "rail":  # a rail has more than its share while others wait
        return "above", f"{of}: the rates in the inventory or the hardware file are too low, or the time is wrong"
    if time_us < BYTES_COUNT * fastest_us:
        return "not_judged", f"{of}: latency counts, not bytes"
    if params["collective"] in _ONE_FLOW:
        return "not_judged", f"{of}: one flow need not use every NIC"
    return ("good", of) if share >= LOW else ("low", f"{of}, less than {100 * LOW:.0f} %")


def limit_of(plan: Mapping[str, Any], cell: Mapping[str, Any], algorithm: str | None) -> limits.Limit | None:
    """The ceiling of a cell's collective by an algorithm of NCCL, in GB/s of busbw; the highest of all for None.

    None on CPUs, and where the rate of what would limit it is unknown. A rail has its share of the node's NICs, since
    all rails are measured at the same time.
    """
    params = cell["params"]
    if cell["device"] == "cpu" or params["collective"] in _UNLIMITED:
        return None
    num_nodes, gpus = cell["num_nodes"], cell["gpus_per_node"]
    nic, nvlink = limits.lowest_nic_gb_per_s(plan, cell["hosts"]), plan.get("hardware", {}).get("nvlink_busbw_gb_per_s")
    if params["split"] == "node":
        num_nodes = 1
    elif params["split"] == "rail":
        nic, gpus = nic / gpus, 1
    collective = "broadcast" if params["collective"] in _ONE_FLOW else params["collective"]
    ceilings = limits.busbw_ceilings(collective, num_nodes, gpus, nic, nvlink)
    if num_nodes == 1:
        return ceilings.get("nvlink")
    kind = _CEILINGS.get(plain(algorithm)) if algorithm else None
    if kind == "collnet" and collective == "all_reduce":
        return limits.collnet_ceiling(num_nodes, gpus, nic, nvlink)
    if kind == "collnet":
        kind = "tree"  # each node's share must enter or leave it in any case
    if kind in ceilings:
        return ceilings[kind]
    return limits.busbw_ceiling(collective, num_nodes, gpus, nic, nvlink)


def plain(algorithm: str) -> str:
    """An algorithm's name in one spelling: NVLS_TREE and NVLSTree are the same."""
    return algorithm.replace("_", "").upper()


# The collectives that NCCL's own messages call by the bytes of one rank's share, not of the whole.
_BY_SHARE = ("all_gather", "reduce_scatter")


def algorithms(cell: Mapping[str, Any], records: Iterable[Record]) -> dict[int, tuple[str, str]]:
    """Size in bytes -> (algorithm, protocol) that NCCL says it used for the cell's collective."""
    params = cell["params"]
    ranks = {"none": cell["world_size"], "node": cell["gpus_per_node"], "rail": cell["num_nodes"]}[params["split"]]
    share = ranks if params["collective"] in _BY_SHARE else 1
    return {
        int(record.value) * share: (str(record.context["algorithm"]), str(record.context["protocol"]))
        for record in records
        if record.metric == "algorithm"
    }


def summarise(
    plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """(metric -> value, collective -> ceiling) of one cell: the highest busbw over all sizes, and the latency.

    Bandwidths are in GB/s, times in µs, shares in %. The ceiling is that of the size with the highest busbw.
    """
    found = rows(plan, cell, records)
    collective = cell["params"]["collective"]
    metrics: dict[str, float] = {}
    ceilings: dict[str, dict[str, Any]] = {}
    if found:
        metrics[f"{collective}_latency_us_mean"] = found[0].time_us
        best = max(found, key=lambda row: row.busbw_gb_per_s)
        if best.busbw_gb_per_s > 0:
            metrics[f"{collective}_busbw_gb_per_s_max"] = best.busbw_gb_per_s
        if best.limit and best.share:
            metrics[f"{collective}_busbw_pct_of_limit"] = 100 * best.share
            ceilings[collective] = {"busbw_gb_per_s": best.limit.gb_per_s, "binds": best.limit.binds}
    wrong = [row.wrong for row in found if row.wrong is not None]
    if wrong:
        metrics["wrong_values"] = sum(wrong)
    return metrics, ceilings


def target_value(target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> float | None:
    """What the cell has for the target's metric; of several sizes the best one. Splits have no targets."""
    collective = target.get("collective")
    if cell.get("details", {}).get("split", "none") != "none":
        return None
    if not collective:
        return cell["metrics"].get(target["metric"])
    whole = (
        (int(record.context["size_bytes"]), record.value)
        for record in records
        if record.metric == target["metric"]
        and record.context.get("collective") == collective
        and record.context.get("split") == "none"
    )
    return best_of(target, whole)
