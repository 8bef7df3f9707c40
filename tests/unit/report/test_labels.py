"""Where a chart's labels go: in the drawing, never on each other, and off what is drawn where there is room."""

from __future__ import annotations

import re
from itertools import combinations, pairwise

import pytest
import report_fixture
from hypothesis import given
from hypothesis import strategies as st

from runner.judge import analysis
from runner.report import chart, figures, labels

FRAME = labels.Box(40, 2, 390, 190)
SIZE = 13.5
places = st.tuples(st.floats(-50, 450), st.floats(-50, 250))
some_labels = st.lists(
    st.builds(
        lambda text, at, height: labels.Label(text, at[0], at[1], at[1] + height),
        st.text("0123456789,.% ", min_size=1, max_size=12),
        places,
        st.floats(0, 60),
    ),
    max_size=12,
)
some_lines = st.lists(st.builds(lambda a, b: labels.Segment(*a, *b), places, places), max_size=6)


def dots(wanted: list[labels.Label]) -> list[labels.Box]:
    return [labels.Box(one.x - 3, one.top - 3, one.x + 3, one.top + 3) for one in wanted]


@given(some_labels, some_lines)
def test_no_label_meets_another_or_leaves_the_drawing(wanted: list[labels.Label], lines: list[labels.Segment]) -> None:
    found = labels.place(wanted, lines, dots(wanted), FRAME, SIZE)
    assert len(found) == len(wanted)
    boxes = [box for box in found if box]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].meets(pair[1])]
    for box in boxes:
        assert FRAME.left - 1e-6 <= box.left and box.right <= FRAME.right + 1e-6
        assert FRAME.top - 1e-6 <= box.top and box.bottom <= FRAME.bottom + 1e-6


@given(some_labels.filter(bool), some_lines)
def test_the_first_label_always_has_room(wanted: list[labels.Label], lines: list[labels.Segment]) -> None:
    assert labels.place(wanted, lines, dots(wanted), FRAME, SIZE)[0] is not None


def test_a_label_is_above_its_point_unless_a_line_is_there() -> None:
    one = labels.Label("48.0", 200, 100, 100)
    (free,) = labels.place([one], [], [], FRAME, SIZE)
    assert free is not None and free.bottom < 100 and free.left < 200 < free.right
    above = labels.Segment(100, 88, 300, 88)
    (moved,) = labels.place([one], [above], [], FRAME, SIZE)
    assert moved is not None and above.within(moved) is None


def test_a_text_larger_than_the_drawing_is_left_out() -> None:
    assert labels.place([labels.Label("1" * 60, 100, 50, 50)], [], [], FRAME, SIZE) == [None]


@pytest.mark.parametrize(
    ("segment", "length"),
    [
        ((0, 5, 20, 5), 10.0),  # through
        ((2, 2, 5, 6), 5.0),  # within
        ((0, 30, 20, 30), None),
        ((-5, 0, 0, 30), None),
        ((4, 4, 4, 4), 0.0),  # a point
    ],
)
def test_how_much_of_a_line_a_box_covers(segment: tuple[float, ...], length: float | None) -> None:
    assert labels.Segment(*segment).within(labels.Box(0, 0, 10, 10)) == length


# --- in the report's charts -------------------------------------------------------------------------------


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def values(svg: str) -> dict[str, labels.Box]:
    """Where each value is written."""
    found = {}
    for x, y, text in re.findall(r'<text class="value" x="([^"]+)" y="([^"]+)" text-anchor="middle">([^<]+)<', svg):
        half, bottom = labels.width(text, chart.TEXT) / 2, float(y) + labels.DESCENT_EM * chart.TEXT
        top = bottom - (labels.ASCENT_EM + labels.DESCENT_EM) * chart.TEXT
        found[text] = labels.Box(float(x) - half, top, float(x) + half, bottom)
    return found


def drawn(svg: str) -> list[labels.Segment]:
    """Curves, ideals, targets and intervals."""
    found = []
    for points in re.findall(r'<polyline class="[^"]+" points="([^"]+)"', svg):
        spots = [tuple(numbers(spot)) for spot in points.split()]
        found += [labels.Segment(*begin, *end) for begin, end in pairwise(spots)]
    for line in re.findall(r'<line class="(?:rule|interval)[^"]*" ([^>]+?)(?:/>|>)', svg):
        found.append(labels.Segment(*(float(value) for value in re.findall(r'"([^"]+)"', line))))
    return found


@pytest.mark.parametrize("name", ["healthy", "testbed", "broken"])
@pytest.mark.parametrize("index", range(3))
def test_every_value_of_a_scaling_chart_lies_off_every_line(name: str, index: int) -> None:
    """In `testbed` 1,725 of 2 nodes lay on the ideal, and in `broken` 87.0 on the curve."""
    figure = figures.scaling(analysis.summarise(*getattr(report_fixture, name)().arguments))[index]
    written = values(figure.svg)
    assert len(written) == 4
    on = [text for text, box in written.items() for line in drawn(figure.svg) if (line.within(box) or 0) > 0.5]
    assert on == []


def scaled(efficiency: dict[int, float], targets: dict[int, float], rate: float, half: float = 0.0) -> dict:
    """What a summary says of scaling: the efficiency and its interval of each node count, and targets."""
    base = min(efficiency)
    rows = [
        {
            "test": "sft",
            "model": "m",
            "num_nodes": n,
            "world_size": 8 * n,
            "base_nodes": base,
            "mode": "weak",
            "efficiency": value,
            "ci": [value - half * (n > base), value + half * (n > base)],
            "target": targets.get(n),
            "verdict": "pass",
            "reason": "",
            "tokens_per_s_per_gpu": rate * value,
            "tokens_per_s_per_gpu_ci": [rate * (value - half), rate * (value + half)],
        }
        for n, value in efficiency.items()
    ]
    return {"scaling": rows, "cells": [{"device": "cuda", "num_nodes": n} for n in efficiency]}


def links(svg: str, counts: list[int]) -> list[tuple[str, labels.Segment]]:
    """From each value to the point of its curve."""
    points = re.findall(r'<circle class="dot c0" cx="([^"]+)" cy="([^"]+)"', svg)
    found = []
    for (text, box), (x, y) in zip(values(svg).items(), points, strict=True):
        at, height = float(x), float(y)
        nearest = min(max(at, box.left), box.right), min(max(height, box.top), box.bottom)
        found.append((text, labels.Segment(*nearest, at, height)))
    return found


@pytest.mark.parametrize(
    ("efficiency", "targets", "rate", "half"),
    [
        ({1: 1.0, 8: 0.381}, {8: 0.40}, 1000, 0.05),  # a value stood above the dash of a target that it missed
        ({1: 1.0, 2: 0.974, 4: 0.94}, {2: 0.98, 4: 0.95}, 7000, 0.004),
        ({1: 1.0, 2: 0.97, 4: 0.93, 8: 0.90}, {2: 0.98, 4: 0.95, 8: 0.90}, 7000, 0.001),
        ({1: 1.0, 2: 0.64, 4: 0.32, 8: 0.30, 16: 0.29}, {}, 770_000, 0.01),
        ({1: 1.0, 2: 0.999}, {2: 0.98}, 9188, 0.0),
        ({2: 1.0, 4: 0.98}, {4: 0.95}, 61_982, 0.0),
        ({1: 1.0, 8: 1.022}, {8: 0.95}, 1276, 0.01),
        ({1: 1.0, 2: 0.5, 4: 0.25, 8: 0.125}, {8: 0.13}, 225, 0.0),  # all nodes are as fast as one
        ({1: 1.0, 2: 0.93, 4: 0.79}, {}, 0.9, 0.05),
    ],
)
def test_no_line_lies_on_a_value_or_between_it_and_its_point(efficiency, targets, rate, half) -> None:
    for figure in figures.scaling(scaled(efficiency, targets, rate, half)):
        boxes, lines = values(figure.svg), drawn(figure.svg)
        assert len(re.findall('class="value"', figure.svg)) == len(efficiency)
        assert [text for text, box in boxes.items() for line in lines if (line.within(box) or 0) > 0.5] == []
        if len(boxes) == len(efficiency):
            assert [
                text for text, link in links(figure.svg, list(efficiency)) for line in lines if link.crosses(line)
            ] == []


def test_long_values_of_the_y_axis_stay_in_the_drawing() -> None:
    points = [chart.Point(1, 1e6), chart.Point(64, 12e6)]
    svg = chart.lines([chart.Series("a", points)], chart.nodes_axis([1, 64]), chart.linear("", [0, 12e6]), "rates")
    ends = re.findall(r'<text x="([^"]+)" y="[^"]+" text-anchor="end">([^<]+)<', svg)
    assert "10,000,000" in [text for _, text in ends]
    assert all(float(x) - labels.width(text, chart.TEXT, bold=False) >= 0 for x, text in ends)


@given(st.sets(st.integers(1, 64), min_size=1, max_size=20))
def test_values_of_the_x_axis_do_not_touch(counts: set[int]) -> None:
    axis = chart.nodes_axis(sorted(counts))
    plot = chart._Plot(axis, chart.linear("", [0, 1]), chart.RIGHT)
    written = chart._spaced(axis.ticks, plot.px)
    halves = [labels.width(text, chart.TEXT, bold=False) / 2 for _, text in written]
    assert written[0][1] == str(min(counts))
    for (left, right), (a, b) in zip(pairwise(written), pairwise(halves), strict=True):
        assert left[0] + a < right[0] - b


@given(st.lists(st.floats(chart.TOP, chart.HEIGHT - chart.BOTTOM), min_size=1, max_size=7))
def test_names_at_the_ends_of_lines_do_not_touch(heights: list[float]) -> None:
    found = [at for at, _ in chart._apart([(height, None) for height in heights], chart.TEXT)]
    assert all(below - above >= chart.TEXT - 1e-6 for above, below in pairwise(found))
    assert found[0] >= chart.TOP - 1e-6 and found[-1] <= chart.HEIGHT - chart.BOTTOM + 1e-6
