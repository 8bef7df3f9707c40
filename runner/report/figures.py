"""The report's charts, drawn from a summary and its records. Pure.

Only complete cells are drawn. Curves are medians over repeats; strips show every value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report import chart
from runner.system.wording import counted


@dataclass(frozen=True)
class Figure:
    """A chart as SVG with the texts around it.

    `about` is the caption, `legend` pairs of (colour number, name), `stamp` a label in the corner, and `ceilings` one
    text per ceiling that is drawn.
    """

    title: str
    svg: str
    about: str = ""
    legend: Sequence[tuple[int, str]] = ()
    stamp: str = ""
    ceilings: Sequence[str] = ()


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits and separated thousands; `–` for None.

    Powers of ten appear only below 0.001.
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.2g}"


def short_number(value: float) -> str:
    """A number for a chart, where long ones leave no room: as `number`, but `14.8 M` from a million on."""
    return f"{value / 1e6:#.3g} M".replace(". M", " M") if abs(value) >= 1e6 else number(value)


def nodes_text(count: int) -> str:
    """A node count as text: `1 node`, `8 nodes`."""
    return counted(count, "node")


Row = Mapping[str, Any]  # an entry of summary.json's lists


def per_rank(cells: Iterable[Row]) -> str:
    """What rates are divided by, `GPU` or, where cells ran on CPUs, `rank`."""
    return "rank" if any(cell["device"] == "cpu" for cell in cells) else "GPU"


def curves(rows: Sequence[Row]) -> list[Row]:
    """The rows of `scaling` of models that were measured on two node counts or more: one alone has no efficiency."""
    counts: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        counts[row["model"]].add(row["num_nodes"])
    return [row for row in rows if len(counts[row["model"]]) > 1]


def complete_cells(cells: Iterable[Row], test: str) -> dict[tuple[str | None, int], list[Row]]:
    """(model, num_nodes) -> the test's complete cells, by model name and then from the smallest node count up."""
    groups: dict[tuple[str | None, int], list[Row]] = defaultdict(list)
    for cell in cells:
        if cell["test"] == test and cell["state"] == "complete":
            groups[cell["model"], cell["num_nodes"]].append(cell)
    return dict(sorted(groups.items(), key=lambda item: (str(item[0][0]), item[0][1])))


def scaling(summary: Mapping[str, Any]) -> list[Figure]:
    """Three charts over node counts: efficiency in %, total tokens/s with the ideal line, tokens/s per GPU.

    Empty for a single node count.
    """
    rows = curves(summary["scaling"])
    counts = sorted({row["num_nodes"] for row in rows})
    if not rows:
        return []
    gpu = per_rank(summary["cells"])
    models = list(dict.fromkeys(row["model"] for row in rows))
    stamp = "not judged" if all(row["verdict"] == "not_judged" for row in rows) else ""
    x = chart.nodes_axis(counts)

    def drawn(unit: str, value: str, interval: str, factor: Callable[[Row], float]) -> list[chart.Series]:
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
        more = {"value_text": short_number, "name_ends": False, **more}
        svg = chart.lines(lines, x, y, f"{title} against nodes", **more)
        return Figure(title, svg, about, [(line.colour, line.name) for line in lines if not line.dashed], stamp)

    def edges(lines: Sequence[chart.Series]) -> list[float]:
        return [edge for line in lines for p in line.points for edge in (p.y, p.low, p.high) if edge is not None]

    efficiency = drawn("%", "efficiency", "ci", lambda row: 100)
    targets = {row["num_nodes"]: 100 * row["target"] for row in rows if row["target"] is not None}
    rules = [chart.Rule(y, f"target on {nodes_text(n)}: {y:g} %", x=n) for n, y in targets.items()]
    low = min(edges(efficiency))
    y = chart.linear("", [*edges(efficiency), *targets.values(), 100.0], from_zero=low < 50, pad=0.15)
    per_gpu = drawn(f"tokens/s per {gpu}", "tokens_per_s_per_gpu", "tokens_per_s_per_gpu_ci", lambda row: 1)
    total = drawn("tokens/s", "tokens_per_s_per_gpu", "tokens_per_s_per_gpu_ci", lambda row: row["world_size"])
    ideal = []
    for line in total:
        base = line.points[0]
        points = [chart.Point(n, base.y * n / base.x) for n in counts if n >= base.x]
        ideal.append(chart.Series(f"ideal, {line.name}", points, line.colour, dashed=True))
    mode, smallest = rows[0]["mode"], nodes_text(rows[0]["base_nodes"])
    about = f"{mode.capitalize()} scaling: rate per {gpu} against {smallest}. Dashes: targets. Bars: 95 % interval."
    from_zero = [chart.linear("", edges(lines), from_zero=True, pad=0.15) for lines in ([*total, *ideal], per_gpu)]
    return [
        draw("Scaling efficiency, %", about, efficiency, y, value_text=lambda v: f"{v:.1f}", rules=rules),
        draw(
            f"Tokens/s, all {gpu}s", f"Tokens in the loss. Dashed: {smallest} times N.", [*total, *ideal], from_zero[0]
        ),
        draw(f"Tokens/s per {gpu}", f"Tokens in the loss, per {gpu}. Flat is perfect.", per_gpu, from_zero[1]),
    ]


def node_colours(summary: Row) -> dict[int, int]:
    """Node count -> colour number, the same in every figure."""
    return {n: index for index, n in enumerate(sorted({cell["num_nodes"] for cell in summary["cells"]}))}
