"""Bus bandwidth against message size, as every test that measures collectives draws it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.report import chart
from runner.report.figures import Figure, nodes_text, number
from runner.system.wording import size_text

DIFFERENT = 0.05  # a second curve of the same is drawn where it is further away than this


@dataclass(frozen=True)
class Ceiling:
    """A ceiling of busbw in GB/s, the resource that binds, and the algorithm that it is of; empty: any."""

    gb_per_s: float
    binds: str
    algorithm: str = ""

    @property
    def why(self) -> str:
        """What binds, and for which algorithm: `NICs of a node` or `ring: NICs of a node`."""
        return f"{self.algorithm}: {self.binds}" if self.algorithm else self.binds


@dataclass(frozen=True)
class Curve:
    """One collective on one number of nodes: size in bytes -> busbw in GB/s, in place as well where that was measured.

    `said` are words on a size for its point's title.
    """

    collective: str
    nodes: int
    busbw: Mapping[int, float]
    in_place: Mapping[int, float] = field(default_factory=dict)
    ceilings: Sequence[Ceiling] = ()
    said: Mapping[int, str] = field(default_factory=dict)

    @property
    def differs(self) -> bool:
        """Whether it is another speed in place, at a size of which the time is not latency."""
        largest = max(self.busbw.values(), default=0.0)
        both = ((value, self.in_place[size]) for size, value in self.busbw.items() if size in self.in_place)
        return any(abs(there - here) > DIFFERENT * here for here, there in both if here > largest / 2)


def label(collective: str) -> str:
    """A collective's name for people: `all-reduce`."""
    return collective.replace("_", "-")


def no_ceiling(plan: Mapping[str, Any]) -> str:
    """Why no ceiling is drawn."""
    if any(cell["device"] == "cpu" for cell in plan["cells"]):
        return "No ceiling is drawn: ranks ran on the CPU, and what carries their messages has no rated speed."
    return "No ceiling is drawn: the inventory gives no NIC rate and the hardware file no NVLink rate for these nodes."


def figures(curves: Sequence[Curve], colours: Mapping[int, int], order: Sequence[str]) -> list[Figure]:
    """Charts of busbw: collectives inside one node together, and each across nodes with a line for every node count.

    Links inside a node are so much faster that they would flatten the other lines. `colours` is node count -> colour,
    `order` the collectives as they are shown.
    """
    place = {name: index for index, name in enumerate(order)}
    ordered = sorted(curves, key=lambda curve: (place[curve.collective], curve.nodes))
    inside = [curve for curve in ordered if curve.nodes == 1]
    drawn = []
    each = math.ceil(len(inside) / max(1, math.ceil(len(inside) / chart.COLOURS)))  # lines that colours tell apart
    for several in (inside[begin : begin + each] for begin in range(0, len(inside), each or 1)):
        lines = [(label(curve.collective), index, curve) for index, curve in enumerate(several)]
        title = "Inside one node, GB/s"
        if len(inside) > each:
            title = (
                f"Inside one node: {lines[0][0]} to {lines[-1][0]}, GB/s"
                if len(lines) > 1
                else f"{title}: {lines[0][0]}"
            )
        drawn.append(_figure(title, lines, by_nodes=False))
    across: dict[str, list[Curve]] = defaultdict(list)
    for curve in ordered:
        if curve.nodes > 1:
            across[curve.collective].append(curve)
    for collective, several in across.items():
        lines = [(f"{curve.nodes}n", colours[curve.nodes], curve) for curve in several]
        drawn.append(_figure(f"{label(collective).capitalize()} across nodes, GB/s", lines, by_nodes=True))
    return drawn


def _figure(title: str, lines: Sequence[tuple[str, int, Curve]], by_nodes: bool) -> Figure:
    series, pale, rules = [], [], []
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)  # (ceiling, what binds) -> node counts
    for name, colour, curve in lines:
        series.append(chart.Series(name, _points(curve, curve.busbw), colour))
        if curve.differs:
            pale.append(chart.Series(f"{name} in place", _points(curve, curve.in_place), colour, pale=True))
        for limit in curve.ceilings:
            value = number(limit.gb_per_s)
            if curve.nodes not in alike[value, limit.why]:
                alike[value, limit.why].append(curve.nodes)
                words = f"ceiling of {nodes_text(curve.nodes)}: {value} GB/s ({limit.why})"
                rules.append(chart.Rule(limit.gb_per_s, words, colour if by_nodes else None))
    notes = [
        f"{', '.join(map(str, sorted(counts)))} {'node' if counts == [1] else 'nodes'} {value} ({why})"
        for (value, why), counts in alike.items()
    ]
    points = [point for line in [*series, *pale] for point in line.points]
    x_axis = chart.bytes_axis("message size", [point.x for point in points])
    y_axis = chart.linear("", [*(point.y for point in points), *(rule.y for rule in rules)], from_zero=True)
    svg = chart.lines([*pale, *series], x_axis, y_axis, f"{title} against message size", rules, name_ends=by_nodes)
    legend = [
        (line.colour, nodes_text(curve.nodes) if by_nodes else line.name)
        for line, (_, _, curve) in zip(series, lines, strict=True)
    ]
    about = f"Pale: in place, where it differs by more than {100 * DIFFERENT:.0f} %." if pale else ""
    return Figure(title, svg, about, legend, ceilings=notes)


def _points(curve: Curve, busbw: Mapping[int, float]) -> list[chart.Point]:
    found = []
    for size, value in sorted(busbw.items()):
        said = f" ({curve.said[size]})" if size in curve.said else ""
        where = f"{label(curve.collective)}, {nodes_text(curve.nodes)}, {size_text(size)}"
        found.append(chart.Point(size, value, f"{where}: {number(value)} GB/s{said}"))
    return found
