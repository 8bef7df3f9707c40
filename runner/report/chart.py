"""Static SVG charts for the report: lines with intervals, strips of points, and bars. Pure: they return SVG text.

A chart is drawn for a column of 340 to 600 px: its text stays at least 11 px high on a phone. Colours are CSS
classes (`c0` … `c6`, `ink`, `grid`) of the page, so that one drawing serves light and dark. Every point
has a hover title. Legends belong to the page, where they wrap; a line is also labelled at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from runner.report import labels
from runner.system.wording import size_text

WIDTH, HEIGHT = 400.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 16.0, 44.0
TEXT = 13.5  # 11.2 px where the chart is 334 px wide: the column of a 390 px phone
COLOURS = 7
DOT = 3.4  # radius of a point on a line
TOUCH = 0.5  # a line may reach this far into a text: the text's box is larger than its letters


@dataclass(frozen=True)
class Point:
    """A point in data coordinates. `low` and `high` draw an interval on y; `title` is shown on hover.

    On a strip a `label` is written beside the point, which is drawn in full colour.
    """

    x: float
    y: float
    title: str = ""
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Series:
    """A named line through `points`, in colour number `colour` of the page (modulo COLOURS)."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False  # without points: an ideal, not a measurement
    pale: bool = False  # thin, without points or a name at its end: beside another line of the same colour


@dataclass(frozen=True)
class Rule:
    """A dashed horizontal line at `y`: across the chart, or only around `x`."""

    y: float
    title: str
    colour: int | None = None
    x: float | None = None


@dataclass(frozen=True)
class Bar:
    """A bar from 0 to `value`, which is written as `text`; `marks` are dashed lines across it, such as a ceiling."""

    name: str
    value: float
    text: str
    colour: int = 0
    marks: Sequence[Rule] = ()


@dataclass(frozen=True)
class Column:
    """A column of `parts` from below: (height, colour, hover title). `name` is below it, where there is room."""

    name: str
    parts: Sequence[tuple[float, int, str]]


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`. `ticks` are (value, text); a logarithmic axis needs positive values."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """The relative position of a value: 0 at the low end, 1 at the high end, 0.5 on an axis without extent."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = math.log(value) if self.log else value
        return (value - low) / (high - low) if high > low else 0.5


def linear(label: str, values: Sequence[float], from_zero: bool = False, pad: float = 0.08) -> Axis:
    """An axis around `values` with ticks at round numbers, extended by the fraction `pad` of its length at each end.

    `from_zero` starts it at 0 (or at the lowest negative value).
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if from_zero:
        low = min(low, 0.0)
    margin = (high - low) * pad or abs(high) * pad or 1.0
    low, high = (low if from_zero and low == 0 else low - margin), high + margin
    step = _nice((high - low) / 5)
    first = math.ceil(low / step - 1e-9)
    ticks = [step * i for i in range(first, int(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(label, low, high, [(tick, f"{tick:,.{digits}f}") for tick in ticks])


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= step * (1 - 1e-9))


def nodes_axis(counts: Sequence[int]) -> Axis:
    """A logarithmic axis of node counts: each doubling takes the same length. `counts` must not be empty."""
    low, high = min(counts), max(counts)
    return Axis("nodes", low / 1.25, high * 1.25, [(n, str(n)) for n in counts], log=True)


def bytes_axis(label: str, sizes: Sequence[float]) -> Axis:
    """A logarithmic axis of message sizes in bytes, labelled B, KiB, MiB, GiB; about five labels."""
    low, high = min(sizes), max(sizes)
    exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    every = next(n for n in (1, 2, 5, 10) if len(exponents) / n <= 6 or n == 10)
    ticks = [(2.0**e, size_text(2**e)) for e in exponents if e % every == 0]
    return Axis(label, low / 1.3, high * 1.3, ticks or [(low, size_text(low))], log=True)


def lines(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    description: str,
    rules: Sequence[Rule] = (),
    value_text: Callable[[float], str] | None = None,
    name_ends: bool = True,
) -> str:
    """A line chart as an SVG element. `description` is its accessible name.

    `value_text` formats the value that is written next to each point of the first series where there is room;
    `name_ends` labels each line at its end where there are several.
    """
    ended = [one for one in series if not one.pale]
    named = name_ends and len(ended) > 1
    plot = _Plot(x, y, RIGHT + (max(len(s.name) for s in ended) * 7.2 + 4 if named else 0))
    parts = [*_frame(plot)]
    for rule in rules:
        name = "rule" if rule.colour is None else f"rule c{rule.colour % COLOURS}"
        at = plot.rule(rule)
        parts.append(_line(at.x1, at.y1, at.x2, at.y2, name, rule.title))
    for one in series:
        parts += _curve(one, plot)
    if value_text and series:
        parts += _values(series, rules, plot, value_text)
    if named:
        ends = [(plot.py(s.points[-1].y), s) for s in ended if s.points]
        for height, one in _apart(ends, TEXT):
            parts.append(_text(plot.right + 6, height + 4, one.name, "start", f"name c{one.colour % COLOURS}"))
    return _svg(parts, HEIGHT, description)


@dataclass(frozen=True)
class _Plot:
    """The rectangle of a chart in which lines are drawn, and the position of values in it, in SVG units."""

    x: Axis
    y: Axis
    margin: float  # right of it

    @property
    def left(self) -> float:
        """The left edge, to the right of the longest tick text of the y axis."""
        return max(LEFT, 11 + max((labels.width(text, TEXT, bold=False) for _, text in self.y.ticks), default=0.0))

    @property
    def right(self) -> float:
        return WIDTH - self.margin

    @property
    def bottom(self) -> float:
        return HEIGHT - BOTTOM

    def px(self, value: float) -> float:
        return self.left + (self.right - self.left) * self.x.place(value)

    def py(self, value: float) -> float:
        return self.bottom - (self.bottom - TOP) * self.y.place(value)

    def rule(self, rule: Rule) -> labels.Segment:
        begin, end = (self.left, self.right) if rule.x is None else (self.px(rule.x) - 20, self.px(rule.x) + 20)
        return labels.Segment(begin, self.py(rule.y), end, self.py(rule.y))

    def interval(self, point: Point) -> labels.Segment:
        """The segment from a point's high end to its low end; the point itself if it has no interval."""
        high = point.y if point.high is None else point.high
        low = point.y if point.low is None else point.low
        return labels.Segment(self.px(point.x), self.py(high), self.px(point.x), self.py(low))


def _curve(one: Series, plot: _Plot) -> list[str]:
    """The SVG of a series: its intervals, its line, and its points unless it is dashed or pale."""
    colour = f"c{one.colour % COLOURS}"
    parts = []
    for point in one.points:
        if point.low is not None and point.high is not None:
            bar = plot.interval(point)
            parts.append(_line(bar.x1, bar.y1, bar.x2, bar.y2, f"interval {colour}"))
    path = " ".join(f"{plot.px(p.x):.1f},{plot.py(p.y):.1f}" for p in one.points)
    manner = " dashed" if one.dashed else " pale" if one.pale else ""
    parts.append(
        f'<polyline class="line {colour}{manner}" points="{path}"><title>{escape(one.name)}</title></polyline>'
    )
    if not (one.dashed or one.pale):
        parts += [_dot(plot.px(p.x), plot.py(p.y), DOT, colour, p.title or f"{one.name}: {p.y:g}") for p in one.points]
    return parts


def _values(
    series: Sequence[Series], rules: Sequence[Rule], plot: _Plot, value_text: Callable[[float], str]
) -> list[str]:
    """The values of the first series, placed clear of lines and dots where possible.

    A value without room is only in its point's hover title.
    """
    drawn = [plot.rule(rule) for rule in rules]
    drawn.append(labels.Segment(plot.left, plot.bottom, plot.right, plot.bottom))
    dots = []
    for one in series:
        spots = [(plot.px(p.x), plot.py(p.y)) for p in one.points]
        drawn += [labels.Segment(*begin, *end) for begin, end in pairwise(spots)]
        if not one.dashed:
            drawn += [plot.interval(p) for p in one.points]
            dots += [labels.Box(at - DOT, height - DOT, at + DOT, height + DOT) for at, height in spots]
    texts = []
    for p in series[0].points:
        bar = plot.interval(p)
        texts.append(labels.Label(value_text(p.y), bar.x1, bar.y1, bar.y2))
    frame = labels.Box(plot.left + 1, 1.0, plot.right + min(plot.margin, RIGHT) - 1, plot.bottom - 2)
    return [
        _text((box.left + box.right) / 2, box.bottom - labels.DESCENT_EM * TEXT, label.text, "middle", "value")
        for label, box in zip(texts, labels.place(texts, drawn, dots, frame, TEXT), strict=True)
        if box and not any((line.within(box) or 0.0) > TOUCH for line in drawn)
    ]


def strips(
    rows: Sequence[tuple[str, Sequence[Point]]],
    x: Axis,
    description: str,
    limit: Rule | None = None,
) -> str:
    """A strip chart as an SVG element: one row of points per name, with the row's median as a bar.

    A point's `x` is its value; `limit` draws a dashed vertical line at its `y`.
    """
    left = min(LEFT + 90, 16 + 7.4 * max((len(name) for name, _ in rows), default=0))
    height = TOP + BOTTOM + 22 * max(len(rows), 2)
    width = WIDTH - left - RIGHT

    def px(value: float) -> float:
        return left + width * x.place(value)

    bottom = height - BOTTOM
    parts = []
    parts += [_line(px(value), TOP, px(value), bottom, "grid") for value, _ in x.ticks]
    parts += [_text(at, bottom + 17, text, "middle") for at, text in _spaced(x.ticks, px)]
    parts.append(_text(left + width / 2, height - 6, x.label, "middle"))
    if limit:
        parts.append(_line(px(limit.y), TOP, px(limit.y), bottom, "rule", limit.title))
    for index, (name, points) in enumerate(rows):
        at = TOP + 22 * index + 11
        parts.append(_text(left - 8, at + 4.5, name, "end"))
        for p in points:
            parts.append(_dot(px(p.x), at, 3.2, "c1" if p.label else "c0 faint", p.title or f"{name}: {p.x:g}"))
            if p.label:
                parts.append(_text(px(p.x) + 7, at + 4.5, p.label, "start", "value"))
        if points:
            ordered = sorted(p.x for p in points)
            middle = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
            parts.append(_line(px(middle), at - 8, px(middle), at + 8, "median", f"{name}: median {middle:.4g}"))
    return _svg(parts, height, description)


def bars(rows: Sequence[Bar], x: Axis, description: str) -> str:
    """A bar chart as an SVG element: one horizontal bar per row, its value written inside it, or beside a short one.

    The axis must begin at 0. A mark is a vertical line at its `y`, in its own colour.
    """
    longest = max((labels.width(row.name, TEXT, bold=False) for row in rows), default=0.0)
    left = 16 + longest
    pitch, thick = 34, 20
    height = TOP + BOTTOM + pitch * max(len(rows), 2)
    width, bottom = WIDTH - left - RIGHT, height - BOTTOM

    def px(value: float) -> float:
        return left + width * x.place(value)

    parts = [_line(px(value), TOP, px(value), bottom, "grid") for value, _ in x.ticks]
    parts += [_text(at, bottom + 17, text, "middle") for at, text in _spaced(x.ticks, px)]
    parts.append(_text(left + width / 2, height - 6, x.label, "middle"))
    for index, row in enumerate(rows):
        top = TOP + pitch * index + (pitch - thick) / 2
        end, base = px(row.value), top + thick / 2 + 4.5
        parts.append(_text(left - 8, base, row.name, "end"))
        parts.append(
            f'<rect class="bar c{row.colour % COLOURS}" x="{left:.1f}" y="{top:.1f}" width="{end - left:.1f}" '
            f'height="{thick}"><title>{escape(f"{row.name}: {row.text}")}</title></rect>'
        )
        inside = end - left > labels.width(row.text, TEXT) + 14
        at, anchor = (left + 7, "start") if inside else (end + 7, "start")
        for mark in row.marks:
            name = "rule" if mark.colour is None else f"rule c{mark.colour % COLOURS}"
            parts.append(_line(px(mark.y), top - 5, px(mark.y), top + thick + 5, name, mark.title))
        parts.append(_text(at, base, row.text, anchor, "within" if inside else "value"))
    return _svg(parts, height, description)


def columns(stacks: Sequence[Column], x_label: str, y: Axis, description: str) -> str:
    """A chart of stacked columns as an SVG element, from left to right. The axis must begin at 0.

    A column that is higher than the axis is cut off at its end, and its height is written there. Colour number COLOURS
    is that of what is nothing: a rest.
    """
    plot = _Plot(Axis(x_label, 0, max(1, len(stacks)), []), y, RIGHT)
    parts = _frame(plot)
    pitch = (plot.right - plot.left) / max(1, len(stacks))
    wide = pitch * (0.8 if pitch > 6 else 1)
    ticks = []
    for index, stack in enumerate(stacks):
        middle, below = plot.left + pitch * (index + 0.5), 0.0
        ticks += [(float(index), stack.name)] if stack.name else []
        for height, colour, title in stack.parts:
            bottom, top = plot.py(min(below, y.high)), plot.py(min(below + height, y.high))
            below += height
            if bottom - top >= 0.05:
                parts.append(
                    f'<rect class="bar c{colour}" x="{middle - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" '
                    f'height="{bottom - top:.1f}"><title>{escape(title)}</title></rect>'
                )
        if below > y.high:
            text = f"{below:.3g} ↑"
            half = labels.width(text, TEXT) / 2
            at = min(max(middle, plot.left + half), plot.right - half)
            parts.append(_text(at, TOP - 4, text, "middle", "value"))
    spots = _spaced(ticks, lambda index: plot.left + pitch * (index + 0.5))
    parts += [_text(at, plot.bottom + 18, text, "middle") for at, text in spots]
    return _svg(parts, HEIGHT, description)


def heat(values: Mapping[tuple[int, int], float], reference: float, description: str) -> str:
    """A table of numbers as an SVG element, (row, column) -> value: the further below `reference`, the deeper its
    colour, up to 30 % below. Of more than 10 columns the values are in hover titles only.
    """
    rows, columns = sorted({row for row, _ in values}), sorted({column for _, column in values})
    left, size = 34.0, (WIDTH - 34.0 - RIGHT) / max(len(columns), 2)
    tall = min(size, 30.0)
    parts = [_text(left + size * (i + 0.5), TOP + 2, str(column), "middle") for i, column in enumerate(columns)]
    for i, row in enumerate(rows):
        top = TOP + 8 + tall * i
        parts.append(_text(left - 8, top + tall / 2 + 4.5, str(row), "end"))
        for j, column in enumerate(columns):
            if (value := values.get((row, column))) is None:
                continue
            depth = min(1.0, max(0.0, (1 - value / reference) / 0.3)) if reference else 0.0
            at = left + size * j
            parts.append(
                f'<rect class="bar c1" fill-opacity="{depth:.2f}" x="{at + 1:.1f}" y="{top + 1:.1f}" '
                f'width="{size - 2:.1f}" height="{tall - 2:.1f}"><title>{row} to {column}: {value:,.0f}</title></rect>'
            )
            if len(columns) <= 10:
                parts.append(_text(at + size / 2, top + tall / 2 + 4.5, f"{value:,.0f}", "middle", "value"))
    return _svg(parts, TOP + 14 + tall * len(rows), description)


def _frame(plot: _Plot) -> list[str]:
    bottom, end = plot.bottom, plot.right
    parts = []
    for value, text in plot.y.ticks:
        at = plot.py(value)
        parts += [_line(plot.left, at, end, at, "grid"), _text(plot.left - 7, at + 4.5, text, "end")]
    parts += [_line(plot.px(value), bottom, plot.px(value), bottom + 4, "axis") for value, _ in plot.x.ticks]
    parts += [_text(at, bottom + 18, text, "middle") for at, text in _spaced(plot.x.ticks, plot.px)]
    parts.append(_line(plot.left, bottom, end, bottom, "axis"))
    parts.append(_text((plot.left + end) / 2, HEIGHT - 6, plot.x.label, "middle"))
    return parts


def _spaced(ticks: Sequence[tuple[float, str]], px: Callable[[float], float]) -> list[tuple[float, str]]:
    """(position, text) of the tick labels of an x axis, without those that would touch the previous one."""
    written: list[tuple[float, str]] = []
    edge = -math.inf
    for value, text in sorted(ticks):
        at, half = px(value), labels.width(text, TEXT, bold=False) / 2
        if at - half > edge:
            written.append((at, text))
            edge = at + half + 4
    return written


def _apart(items: Sequence[tuple[float, Any]], gap: float) -> list[tuple[float, Any]]:
    """The items in order of height, moved down where they overlap, and up again where they cross the axis."""
    placed: list[tuple[float, Any]] = []
    for at, item in sorted(items, key=lambda pair: pair[0]):
        placed.append((max(at, placed[-1][0] + gap) if placed else at, item))
    over = placed[-1][0] - (HEIGHT - BOTTOM) if placed else 0.0
    ceiling = HEIGHT - BOTTOM
    for index in range(len(placed) - 1, -1, -1):
        if over <= 0 or placed[index][0] <= ceiling:
            break
        placed[index] = (ceiling, placed[index][1])
        ceiling -= gap
    return placed


def _line(x1: float, y1: float, x2: float, y2: float, name: str, title: str = "") -> str:
    body = f"><title>{escape(title)}</title></line>" if title else "/>"
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{body}'


def _dot(x: float, y: float, radius: float, name: str, title: str) -> str:
    return f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str, name: str = "") -> str:
    css = f' class="{name}"' if name else ""
    return f'<text{css} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, description: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(description, quote=True)}" '
        f'font-size="{TEXT}">\n{body}\n</svg>'
    )
