"""Summary statistics of the values of several steps or repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


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
