"""Test `torch` in the report: its numbers, its tables and its charts."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from runner.cluster import limits
from runner.report import bandwidth
from runner.report.figures import Figure, Row, node_colours, nodes_text, number
from runner.report.sections import Charts, Measured, Tile
from runner.report.tables import Table, cell_number, median, state, took, without_empty
from runner.system.wording import size_text

TITLE, ANCHOR = "Collectives", "collectives"

GLOSSARY = {
    "busbw_gb_per_s": "Bus bandwidth: message size ÷ time, scaled by what the wires carry, so that collectives and "
    "sizes compare with a link's rate. 1 GB = 10⁹ B.",
    "latency_us": "Time of one operation at the smallest size (8 bytes, or one element a rank), the slowest rank's. "
    "For ping_pong half of a round trip.",
    "ceiling": "The highest bus bandwidth that the node's NICs or NVLink allow for any algorithm.",
    "wrong_values": "Elements of a collective's result that differ from the exact answer.",
    "copy_gb_per_s": "Bytes that the device copies from one of its buffers to another, per second: each is read and "
    "written, so each counts twice. A buffer that fits into a cache measures the cache.",
    "host_to_device_gb_per_s": "Bytes copied from pinned memory of the host to the GPU, per second.",
    "device_to_host_gb_per_s": "Bytes copied from the GPU to pinned memory of the host, per second.",
}

FIRST = {"cell": "cell", "state": "state"}
COLUMNS = {
    **FIRST,
    "all-reduce, GB/s (of ceiling)": "all-reduce, GB/s",
    "send/recv, GB/s": "send/recv, GB/s",
    "ping-pong p50 / p99, µs": "ping-pong, µs",
    "wrong values": "wrong",
}
TERMS = (
    ("busbw_gb_per_s", "GB/s"),
    ("ceiling", "ceiling"),
    ("latency_us", "latency"),
    ("wrong_values", "wrong values"),
)
REMARK = "the highest over all sizes, latency at the smallest."

COPY_COLUMNS = {
    **FIRST,
    "copy, GB/s (of memory's rate)": "copy, GB/s",
    "buffer": "buffer",
    "host to GPU, GB/s": "to GPU, GB/s",
    "GPU to host, GB/s": "to host, GB/s",
    "wrong values": "wrong",
}
ALONE = "Collectives need two ranks: with one, only the device's own copies are measured."


def tables(cells: Sequence[Row]) -> list[Table]:
    """One row per cell, without columns that are empty in every cell. Cells of one rank are in a second table."""
    together = [cell for cell in cells if cell["world_size"] > 1]
    alone = [cell for cell in cells if cell["world_size"] == 1]
    found = []
    if together:
        found.append(Table(_rows(together), COLUMNS, TERMS, REMARK, faults=("wrong values",)))
    if alone:
        terms = [("copy_gb_per_s", "copy")]
        if any(cell["device"] != "cpu" for cell in alone):
            terms += [("host_to_device_gb_per_s", "host to GPU"), ("device_to_host_gb_per_s", "GPU to host")]
        remark = "each byte of a copy counts twice: it is read and written."
        found.append(Table(_copy_rows(alone), COPY_COLUMNS, terms, remark, ALONE, faults=("wrong values",)))
    return found


def _copy_rows(cells: Sequence[Row]) -> list[dict[str, str]]:
    rows = []
    for cell in cells:
        m = cell["metrics"]
        share = f" ({m['copy_pct_of_limit']:.0f} %)" if "copy_pct_of_limit" in m else ""
        rows.append(
            {
                "cell": cell["id"],
                "state": state(cell),
                "copy, GB/s (of memory's rate)": cell_number(m, "copy_gb_per_s") + share,
                "buffer": size_text(m["copy_bytes"]) if "copy_bytes" in m else "",
                "host to GPU, GB/s": cell_number(m, "host_to_device_gb_per_s"),
                "GPU to host, GB/s": cell_number(m, "device_to_host_gb_per_s"),
                "wrong values": f"{m['wrong_values']:,.0f}" if m.get("wrong_values") else "",
                "took": took(cell),
            }
        )
    return without_empty(rows)


def _rows(cells: Sequence[Row]) -> list[dict[str, str]]:
    rows = []
    for cell in cells:
        m = cell["metrics"]
        share = f" ({m['all_reduce_busbw_pct_of_limit']:.0f} %)" if "all_reduce_busbw_pct_of_limit" in m else ""
        latency = cell_number(m, "ping_pong_latency_us_p50")
        rows.append(
            {
                "cell": cell["id"],
                "state": state(cell),
                "all-reduce, GB/s (of ceiling)": cell_number(m, "all_reduce_busbw_gb_per_s_max") + share,
                "all-gather, GB/s": cell_number(m, "all_gather_busbw_gb_per_s_max"),
                "all-to-all, GB/s": cell_number(m, "all_to_all_busbw_gb_per_s_max"),
                "send/recv, GB/s": cell_number(m, "send_recv_busbw_gb_per_s_max"),
                "ping-pong p50 / p99, µs": latency and f"{latency} / {cell_number(m, 'ping_pong_latency_us_p99')}",
                "all-reduce p50, µs": cell_number(m, "all_reduce_latency_us_p50"),
                "barrier p50, µs": cell_number(m, "barrier_latency_us_p50"),
                "wrong values": f"{m['wrong_values']:,.0f}" if "wrong_values" in m else "",
                "took": took(cell),
            }
        )
    return without_empty(rows)


def tiles(run: Measured) -> list[Tile]:
    """Bandwidth on the largest node count and latency between nodes; for a single rank the rate of its copies."""
    tiles: list[Tile] = []
    measured = run.groups()
    if not measured:
        return tiles
    (_, nodes), cells = max(measured.items(), key=lambda item: item[0][1])
    if (busbw := median(cells, "all_reduce_busbw_gb_per_s_max")) is not None:
        share = median(cells, "all_reduce_busbw_pct_of_limit")
        note = f"{nodes_text(nodes)}" + (f", {share:.0f} % of the ceiling" if share is not None else "")
        tiles.append(Tile("all-reduce busbw", f"{number(busbw)} GB/s", note))
    across = [(n, group) for (_, n), group in measured.items() if n > 1] or [(nodes, cells)]
    if (latency := median(across[0][1], "ping_pong_latency_us_p50")) is not None:
        tiles.append(Tile("one-way latency", f"{number(latency)} µs", f"8 B, {nodes_text(across[0][0])}"))
    if not tiles and (copy := median(cells, "copy_gb_per_s")) is not None:
        tiles.append(Tile("copy within the device", f"{number(copy)} GB/s", "read and written"))
    return tiles


def charts(run: Measured) -> Charts:
    """busbw against message size; `note` gives the reason where no ceiling is drawn."""
    figures = _busbw(run)
    if not figures:
        return Charts()
    note = "" if any(figure.ceilings for figure in figures) else bandwidth.no_ceiling(run.plan)
    return Charts(figures, "bus bandwidth against message size", note)


def _busbw(run: Measured) -> list[Figure]:
    """busbw in GB/s against message size in bytes (median over repeats)."""
    curves = []
    for (_, nodes), cells in run.groups().items():
        values: dict[tuple[str, int], list[float]] = defaultdict(list)
        for cell in cells:
            for record in run.by_cell[cell["id"]]:
                if record.metric == "busbw_gb_per_s" and cell["world_size"] > 1:
                    values[record.context["collective"], int(record.context["size_bytes"])].append(record.value)
        for collective in dict.fromkeys(name for name, _ in values):
            busbw = {size: statistics.median(found) for (name, size), found in values.items() if name == collective}
            limit = cells[0]["limits"].get(collective)
            ceilings = [bandwidth.Ceiling(limit["busbw_gb_per_s"], limit["binds"])] if limit else []
            curves.append(bandwidth.Curve(collective, nodes, busbw, ceilings=ceilings))
    return bandwidth.figures(curves, node_colours(run.summary), limits.COLLECTIVES)
