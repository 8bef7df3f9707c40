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
