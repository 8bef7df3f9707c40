"""The report's charts, drawn from a summary and its records. Pure.

Only complete cells are drawn. Curves are medians over repeats; strips show every value.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner import chart
from runner.cluster import limits
from runner.results.records import Record
from runner.workloads.sft import metrics as sft_metrics


@dataclass(frozen=True)
class Figure:
    """A chart with what stands around it. `legend` is (colour number, name)."""

    title: str
    svg: str
    about: str = ""
    legend: Sequence[tuple[int, str]] = ()
    stamp: str = ""
    ceilings: Sequence[str] = ()


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, thousands separated, never a power of ten for what people measure."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.2g}"


def nodes_text(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


Row = Mapping[str, Any]  # an entry of summary.json's lists


def complete_cells(cells: Iterable[Row], test: str) -> dict[tuple[str | None, int], list[Row]]:
    """(model, num_nodes) -> complete cells of a test, smallest first."""
    groups: dict[tuple[str | None, int], list[Row]] = defaultdict(list)
    for cell in cells:
        if cell["test"] == test and cell["state"] == "complete":
            groups[cell["model"], cell["num_nodes"]].append(cell)
    return dict(sorted(groups.items(), key=lambda item: (str(item[0][0]), item[0][1])))


def scaling(summary: Mapping[str, Any]) -> list[Figure]:
    """Efficiency, total rate against the ideal, and rate per GPU, over node counts; none for a single count."""
    rows = summary["scaling"]
    counts = sorted({row["num_nodes"] for row in rows})
    if len(counts) < 2:
        return []
    gpu = "GPU" if all(cell["device"] != "cpu" for cell in summary["cells"]) else "rank"
    models = list(dict.fromkeys(row["model"] for row in rows))
    stamp = "not judged" if all(row["verdict"] == "not_judged" for row in rows) else ""
    x = chart.nodes_axis(counts)

    def curves(unit: str, value: str, interval: str, factor: Callable[[Row], float]) -> list[chart.Series]:
        found = []
        for index, model in enumerate(models):
            points = []
            for row in (row for row in rows if row["model"] == model):
                y, low, high = (factor(row) * v for v in (row[value], *row[interval]))
                text = f"{number(y, 4)} {unit} (95 % CI {number(low, 4)} – {number(high, 4)})"
                title = f"{model}, {nodes_text(row['num_nodes'])}: {text}"
                points.append(chart.Point(row["num_nodes"], y, title, low, high))
            found.append(chart.Series(model, points, index))
        return found

    def draw(title: str, about: str, lines: list[chart.Series], y: chart.Axis, **more: Any) -> Figure:
        more = {"value_text": number, "name_ends": False, **more}
        svg = chart.lines(lines, x, y, f"{title} against nodes", **more)
        return Figure(title, svg, about, [(line.colour, line.name) for line in lines if not line.dashed], stamp)

    def edges(lines: Sequence[chart.Series]) -> list[float]:
        return [edge for line in lines for p in line.points for edge in (p.y, p.low, p.high) if edge is not None]

    efficiency = curves("%", "efficiency", "ci", lambda row: 100)
    targets = {row["num_nodes"]: 100 * row["target"] for row in rows if row["target"] is not None}
    rules = [chart.Rule(y, f"target on {nodes_text(n)}: {y:g} %", x=n) for n, y in targets.items()]
    low = min(edges(efficiency))
    y = chart.linear("", [*edges(efficiency), *targets.values(), 100.0], from_zero=low < 50)
    per_gpu = curves(f"tokens/s per {gpu}", "tokens_per_s_per_gpu", "tokens_per_s_per_gpu_ci", lambda row: 1)
    total = curves("tokens/s", "tokens_per_s_per_gpu", "tokens_per_s_per_gpu_ci", lambda row: row["world_size"])
    ideal = []
    for line in total:
        base = line.points[0]
        points = [chart.Point(n, base.y * n / base.x) for n in counts if n >= base.x]
        ideal.append(chart.Series(f"ideal, {line.name}", points, line.colour, dashed=True))
    mode, smallest = rows[0]["mode"], nodes_text(rows[0]["base_nodes"])
    about = f"{mode.capitalize()} scaling: rate per {gpu} against {smallest}. Dashes: targets. Bars: 95 % interval."
    from_zero = [chart.linear("", edges(lines), from_zero=True) for lines in ([*total, *ideal], per_gpu)]
    return [
        draw("Scaling efficiency, %", about, efficiency, y, value_text=lambda v: f"{v:.1f}", rules=rules),
        draw(
            f"Tokens/s, all {gpu}s", f"Tokens in the loss. Dashed: {smallest} times N.", [*total, *ideal], from_zero[0]
        ),
        draw(f"Tokens/s per {gpu}", f"Tokens in the loss, per {gpu}. Flat is perfect.", per_gpu, from_zero[1]),
    ]


def busbw(summary: Mapping[str, Any], by_cell: Mapping[str, Sequence[Record]]) -> list[Figure]:
    """busbw against message size (median over repeats): per collective one line for each node count, and one
    figure for all collectives inside one node, whose links are so much faster that they would flatten the rest."""
    curves: dict[str, dict[int, chart.Series]] = defaultdict(dict)
    ceilings: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    groups = {nodes: cells for (_, nodes), cells in complete_cells(summary["cells"], "torch").items()}
    colours = _colours(summary)
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


def _colours(summary: Row) -> dict[int, int]:
    """One colour a node count, the same in every figure."""
    return {n: index for index, n in enumerate(sorted({cell["num_nodes"] for cell in summary["cells"]}))}


def _spoken(collective: str) -> str:
    return collective.replace("_", "-")


def no_ceiling(plan: Mapping[str, Any]) -> str:
    """Why no ceiling is drawn."""
    if any(cell["device"] == "cpu" for cell in plan["cells"]):
        return "No ceiling is drawn: ranks ran on the CPU, and what carries their messages has no rated speed."
    return "No ceiling is drawn: the inventory gives no NIC rate and the hardware file no NVLink rate for these nodes."


def training(
    plan: Mapping[str, Any],
    summary: Mapping[str, Any],
    by_cell: Mapping[str, Sequence[Record]],
    short: Callable[[str], str],
) -> list[Figure]:
    """Step times and memory per node on the largest node count, and the loss of every node count."""
    groups = complete_cells(summary["cells"], "sft")
    if not groups:
        return []
    (model, nodes), cells = max(groups.items(), key=lambda item: item[0][1])
    times: dict[str, list[chart.Point]] = {host: [] for host in cells[0]["hosts"]}
    memory: dict[str, list[chart.Point]] = {host: [] for host in cells[0]["hosts"]}
    for cell in cells:
        for step in sft_metrics.steps(by_cell[cell["id"]], cell["world_size"]):
            for host, seconds in step.host_time_s.items() if step.measured else ():
                title = f"{short(host)}, repeat {cell['repeat']}, step {step.index}: {number(seconds, 4)} s"
                times.setdefault(host, []).append(chart.Point(seconds, 0, title))
        for record in by_cell[cell["id"]]:
            if record.metric == "peak_memory_gib":
                title = f"{short(str(record.host))}, rank {record.rank}: {number(record.value)} GiB"
                memory.setdefault(str(record.host), []).append(chart.Point(record.value, 0, title))
    where = f"{model}, {nodes_text(nodes)}"
    figures = []
    if any(times.values()):
        axis = chart.linear("seconds", [p.x for points in times.values() for p in points])
        svg = chart.strips([(short(h), points) for h, points in times.items()], axis, f"step times, {where}")
        about = (
            f"{where}: every measured step of every repeat, each node's slowest rank. "
            "Ranks wait for each other, so one slow node moves all."
        )
        figures.append(Figure("Step time per node, s", svg, about))
    curves = []
    colours = _colours(summary)
    for (name, n), group in groups.items():
        points = [
            chart.Point(step.index, step.loss, f"{name}, {nodes_text(n)}, step {step.index}: {step.loss:.3f}")
            for step in sft_metrics.steps(by_cell[group[0]["id"]], group[0]["world_size"])
            if step.loss is not None
        ]
        if points:
            curves.append(chart.Series(f"{n}n", points, colours[n]))
    if curves:
        last = max(p.x for curve in curves for p in curve.points)
        x = chart.linear("optimizer step", [0, last], pad=0.02)
        y = chart.linear("", [p.y for curve in curves for p in curve.points])
        svg = chart.lines(curves, x, y, "loss against optimizer step")
        legend = [(curve.colour, nodes_text(int(curve.name[:-1]))) for curve in curves]
        figures.append(
            Figure("Loss", svg, "Mean over the loss tokens of all ranks; first repeat, warm-up included.", legend)
        )
    if any(memory.values()):
        limit = plan.get("hardware", {}).get("gpu_memory_gib") if cells[0]["device"] != "cpu" else None
        values = [p.x for points in memory.values() for p in points]
        axis = chart.linear("GiB", [*values, *([limit] if limit else [])], from_zero=True)
        rule = chart.Rule(limit, f"GPU memory: {limit} GiB") if limit else None
        svg = chart.strips([(short(h), points) for h, points in memory.items()], axis, f"peak memory, {where}", rule)
        about = f"{where}: each rank's peak." + (
            f" Dashed: the GPU's {limit} GiB." if limit else " Resident memory of CPU ranks."
        )
        figures.append(Figure("Peak memory per node, GiB", svg, about))
    return figures
