"""Placing the labels of a chart: next to their points, clear of lines and dots, never over each other. Pure.

Lengths are in units of the drawing, y grows downwards. The width of a text depends on the reader's fonts: that of
DejaVu Sans is assumed, the widest in the page's font list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# Advance widths of DejaVu Sans Bold, in em; letters on the average.
_EM = {**dict.fromkeys("0123456789", 0.70), **dict.fromkeys(",.:", 0.40), " ": 0.35, "–": 0.50, "-": 0.42, "%": 1.0}
_LETTER_EM, _REGULAR = 0.70, 0.92
ASCENT_EM, DESCENT_EM = 0.78, 0.16  # of digits and commas
_SAME = 2.0  # what is nearer than this to a point is drawn through it
# Distances of a label from its point, the nearest first.
_GAPS = (5.0, 10.0, 16.0, 24.0, 34.0)
# Cost of covering a line (plus the covered length), of covering a dot, of a line between label and point, which makes
# it the label of that line, and of each unit of distance from the point.
_ON_LINE, _ON_DOT, _ACROSS, _AWAY = 12.0, 16.0, 9.0, 0.3


@dataclass(frozen=True)
class Box:
    """A rectangle whose edges are parallel to the axes; `top` < `bottom`."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two boxes overlap in more than an edge."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, frame: Box) -> Box | None:
        """This box moved by as little as possible so that it is inside `frame`; None if it is larger than `frame`."""
        if self.right - self.left > frame.right - frame.left or self.bottom - self.top > frame.bottom - frame.top:
            return None
        x = max(frame.left - self.left, 0.0) + min(frame.right - self.right, 0.0)
        y = max(frame.top - self.top, 0.0) + min(frame.bottom - self.bottom, 0.0)
        return Box(self.left + x, self.top + y, self.right + x, self.bottom + y)


@dataclass(frozen=True)
class Segment:
    """A straight line from (x1, y1) to (x2, y2)."""

    x1: float
    y1: float
    x2: float
    y2: float

    def within(self, box: Box) -> float | None:
        """The length of the part inside `box`; None if they do not meet (Liang–Barsky clipping)."""
        dx, dy = self.x2 - self.x1, self.y2 - self.y1
        begin, end = 0.0, 1.0
        for step, room in (
            (-dx, self.x1 - box.left),
            (dx, box.right - self.x1),
            (-dy, self.y1 - box.top),
            (dy, box.bottom - self.y1),
        ):
            if step == 0:
                if room < 0:
                    return None
            elif step < 0:
                begin = max(begin, room / step)
            else:
                end = min(end, room / step)
        return (end - begin) * (dx * dx + dy * dy) ** 0.5 if begin <= end else None

    def crosses(self, other: Segment) -> bool:
        """Whether the two cross away from the end of this one, where others may begin."""
        dx, dy, ex, ey = self.x2 - self.x1, self.y2 - self.y1, other.x2 - other.x1, other.y2 - other.y1
        turn = dx * ey - dy * ex
        if turn == 0:
            return False
        along = ((other.x1 - self.x1) * ey - (other.y1 - self.y1) * ex) / turn
        beside = ((other.x1 - self.x1) * dy - (other.y1 - self.y1) * dx) / turn
        near = (1 - along) * (dx * dx + dy * dy) ** 0.5 < _SAME
        return 0 <= along <= 1 and 0 <= beside <= 1 and not near


@dataclass(frozen=True)
class Label:
    """A text for what is drawn at `x` from `top` to `bottom`: a point with its interval."""

    text: str
    x: float
    top: float
    bottom: float


def width(text: str, size: float, bold: bool = True) -> float:
    """The largest width of a text at font size `size`."""
    return sum(_EM.get(char, _LETTER_EM) for char in text) * size * (1.0 if bold else _REGULAR)


def place(
    labels: Sequence[Label], lines: Sequence[Segment], dots: Sequence[Box], frame: Box, size: float
) -> list[Box | None]:
    """For each label, in order, a box inside `frame` that overlaps no other label; None where there is no room.

    `size` is the font size. Of the positions around a point, the one that covers least of `lines` and `dots` is taken,
    then the nearest.
    """
    placed: list[Box | None] = []
    for label in labels:
        taken = [box for box in placed if box]
        free = [
            (cost, box) for cost, box in _places(label, frame, size) if not any(box.meets(other) for other in taken)
        ]
        best = min(free, key=lambda place: place[0] + _covered(place[1], label, lines, dots), default=None)
        placed.append(best[1] if best else None)
    return placed


def _places(label: Label, frame: Box, size: float) -> Iterator[tuple[float, Box]]:
    """(cost of the distance, box) for each position around a label's point, the nearest first."""
    wide, high = width(label.text, size), (ASCENT_EM + DESCENT_EM) * size
    middle = (label.top + label.bottom) / 2
    for gap in _GAPS:
        slant = 0.6 * gap
        lefts = {"centre": label.x - wide / 2, "left": label.x - gap - wide, "right": label.x + gap}
        lefts |= {"near left": label.x - slant - wide, "near right": label.x + slant}
        above, below = label.top - high, label.bottom
        corners = (
            (lefts["centre"], above - gap),
            (lefts["centre"], below + gap),
            (lefts["near left"], above - slant),
            (lefts["near right"], above - slant),
            (lefts["near right"], below + slant),
            (lefts["near left"], below + slant),
            (lefts["right"], middle - high / 2),
            (lefts["left"], middle - high / 2),
        )
        for rank, (left, top) in enumerate(corners):
            box = Box(left, top, left + wide, top + high)
            if moved := box.inside(frame):
                cost = _AWAY * (gap + abs(moved.left - left) + abs(moved.top - top)) + 0.2 * rank
                yield cost, moved


def _covered(box: Box, label: Label, lines: Iterable[Segment], dots: Iterable[Box]) -> float:
    """The cost of what the label in `box` would lie on, and of what would lie between it and its point."""
    cost = _ON_DOT * sum(box.meets(dot) for dot in dots)
    middle = (label.top + label.bottom) / 2  # the point of an interval
    nearest = min(max(label.x, box.left), box.right), min(max(middle, box.top), box.bottom)
    link = Segment(*nearest, label.x, middle)
    for line in lines:
        length = line.within(box)
        if length is not None:
            cost += _ON_LINE + length
        elif link.crosses(line):
            cost += _ACROSS
    return cost
