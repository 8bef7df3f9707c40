"""Test `torch` in the report: its table and its charts."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from runner.cluster import limits
from runner.report import chart
from runner.report.figures import Figure, complete_cells, node_colours, nodes_text, number
from runner.report.tables import cell_number, state, without_empty
from runner.results.records import Record


def rows(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for cell in cells:
        if cell["test"] != "torch":
            continue
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
            }
        )
    return without_empty(rows)


def busbw(summary: Mapping[str, Any], by_cell: Mapping[str, Sequence[Record]]) -> list[Figure]:
    """busbw against message size (median over repeats): per collective one line for each node count, and one
    figure for all collectives inside one node, whose links are so much faster that they would flatten the rest."""
    curves: dict[str, dict[int, chart.Series]] = defaultdict(dict)
    ceilings: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    groups = {nodes: cells for (_, nodes), cells in complete_cells(summary["cells"], "torch").items()}
    colours = node_colours(summary)
    for nodes, cells in groups.items():
        values: dict[tuple[str, int], list[float]] = defaultdict(list)
        for cell in cells:
            for record in by_cell[cell["id"]]:
                if record.metric == "busbw_gb_per_s" and cell["world_size"] > 1:
                    values[record.context["collective"], int(record.context["size_bytes"])].append(record.value)
        for place, collective in enumerate(limits.COLLECTIVES):
            points = [
                chart.Point(
                    size, y, f"{_spoken(collective)}, {nodes_text(nodes)}, {chart.size_text(size)}: {number(y)} GB/s"
                )
                for (name, size), found in sorted(values.items())
                if name == collective and (y := statistics.median(found)) is not None
            ]
            if points:
                inside = nodes == 1
                name, colour = (_spoken(collective), place) if inside else (f"{nodes}n", colours[nodes])
                curves["" if inside else collective][place if inside else nodes] = chart.Series(name, points, colour)
                if collective in cells[0]["limits"]:
                    ceilings["" if inside else collective][nodes] = cells[0]["limits"][collective]
    figures = []
    for collective in ("", *limits.COLLECTIVES):
        lines = list(curves[collective].values())
        if not lines:
            continue
        rules = []
        alike: dict[tuple[str, str], list[int]] = defaultdict(list)  # (ceiling, what binds) -> node counts
        for nodes, limit in sorted(ceilings[collective].items()):
            value = number(limit["busbw_gb_per_s"])
            alike[value, limit["binds"]].append(nodes)
            title = f"ceiling of {nodes_text(nodes)}: {value} GB/s ({limit['binds']})"
            rules.append(chart.Rule(limit["busbw_gb_per_s"], title, colours[nodes] if collective else None))
        notes = [
            f"{', '.join(map(str, counts))} {'node' if counts == [1] else 'nodes'} {value} ({binds})"
            for (value, binds), counts in alike.items()
        ]
        title = f"{_spoken(collective).capitalize()} across nodes, GB/s" if collective else "Inside one node, GB/s"
        x_axis = chart.bytes_axis("message size", [p.x for line in lines for p in line.points])
        y_axis = chart.linear("", [p.y for line in lines for p in line.points] + [r.y for r in rules], from_zero=True)
        svg = chart.lines(lines, x_axis, y_axis, f"{title} against message size", rules, name_ends=bool(collective))
        legend = [(line.colour, nodes_text(int(line.name[:-1])) if collective else line.name) for line in lines]
        figures.append(Figure(title, svg, legend=legend, ceilings=notes))
    return figures


def _spoken(collective: str) -> str:
    return collective.replace("_", "-")


def no_ceiling(plan: Mapping[str, Any]) -> str:
    """Why no ceiling is drawn."""
    if any(cell["device"] == "cpu" for cell in plan["cells"]):
        return "No ceiling is drawn: ranks ran on the CPU, and what carries their messages has no rated speed."
    return "No ceiling is drawn: the inventory gives no NIC rate and the hardware file no NVLink rate for these nodes."
