"""Summary statistics of the values of several steps or repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share `q`, 0 to 1, of at least one value lies: interpolated linearly between order
    statistics, as numpy's default.

    `statistics.quantiles(method="inclusive")` gives the same values, but only n equal cuts at a time, neither 0 nor 1,
    and nothing for a single value.
    """
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(values: Sequence[float]) -> float:
    """The median absolute deviation of at least one value, in the values' unit; robust against outliers."""
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)


@lru_cache(maxsize=256)
def student_quantile(p: float, degrees: float) -> float:
    """The quantile of Student's t distribution with at least one degree of freedom, for 0.5 <= p < 1.

    With t = √degrees · tan θ the density is cos^(degrees - 1) θ on 0 to π/2, which Simpson's rule integrates exactly
    enough; the quantile is found by halving. Of 200 degrees and more it is the normal distribution's, to 1 %.
    """
    if degrees >= 200:
        return statistics.NormalDist().inv_cdf(p)

    def area(end: float, parts: int = 100) -> float:
        step = end / parts
        heights = [max(0.0, math.cos(step * i)) ** (degrees - 1) for i in range(parts + 1)]
        return step / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))

    wanted = (2 * p - 1) * area(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < wanted else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
