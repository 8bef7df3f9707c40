"""Summary statistics of the values of several steps or repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def quantile(values: Sequence[float], q: float) -> float:
    """The quantile `q` (0 to 1) of at least one value, by linear interpolation, as numpy's default."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(values: Sequence[float]) -> float:
    """The median absolute deviation of at least one value, in the values' unit; robust against outliers."""
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)
