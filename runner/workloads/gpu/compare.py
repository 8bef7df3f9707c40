"""How the GPUs of a run compare: each against the median of its node and of the cluster, with an interval. Pure.

Blocks of all GPUs run side by side, so that a block is compared with the others' of the same number: what slows all of
them alike cancels out.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from runner.results.records import Record
from runner.results.statistics import student_quantile

ENOUGH = 3  # of fewer, a median does not show which is the odd one
CONFIDENCE = 0.95  # that of all comparisons of a kind nobody is outside of its interval
OUTLIER = 4  # standard deviations below its own median, from where on a single block is a hiccup

LEAST = 1e-9  # in any rate's unit: what has no rate at all is the slowest, and has a logarithm

Unit = TypeVar("Unit", bound=Hashable)
Block = tuple[str, int]  # cell id and the block's number
Series = Mapping[Block, float]


class Gpu(NamedTuple):
    """A GPU: its node, its number there, and its UUID (None for a rank on a CPU)."""

    host: str
    number: int
    uuid: str | None = None

    def __str__(self) -> str:
        return f"GPU {self.number}, {self.uuid}" if self.uuid else f"rank {self.number}"


class Pair(NamedTuple):
    """Two GPUs of a node by their numbers: `source` is read, `target` written."""

    host: str
    source: int
    target: int

    def __str__(self) -> str:
        return f"GPU {self.source} to GPU {self.target}"


@dataclass(frozen=True)
class Measure:
    """A rate by which GPUs are compared, in `unit`: the values of `metric` with this `context`."""

    key: str
    metric: str
    name: str
    unit: str
    context: Mapping[str, Any]


RATES = (
    Measure("bf16", "matmul_tflop_per_s", "bf16 matmul", "TFLOP/s", {"precision": "bf16"}),
    Measure("fp8", "matmul_tflop_per_s", "fp8 matmul", "TFLOP/s", {"precision": "fp8"}),
    Measure("float32", "matmul_tflop_per_s", "float32 matmul", "TFLOP/s", {"precision": "float32"}),
    Measure("hbm", "hbm_copy_gb_per_s", "memory copy", "GB/s", {}),
)
LINKS = (
    Measure("to_gpu", "host_to_device_gb_per_s", "host to GPU", "GB/s", {}),
    Measure("to_host", "device_to_host_gb_per_s", "GPU to host", "GB/s", {}),
)


def gpu_of(record: Record) -> Gpu:
    """The GPU that a record is of; its rank where it does not say."""
    return Gpu(str(record.host), int(record.context.get("gpu", record.rank or 0)), record.context.get("uuid"))


def pair_of(record: Record) -> Pair | None:
    """The two GPUs that a record is of; None for one that is of a single GPU."""
    if "source" not in record.context or "target" not in record.context:
        return None
    return Pair(str(record.host), int(record.context["source"]), int(record.context["target"]))


def by_gpu(records: Iterable[Record], measure: Measure) -> dict[Gpu, dict[Block, float]]:
    """GPU -> block -> value. Copies over the host count where the buffer was nearest to the GPU."""
    near: dict[tuple[Gpu, Block], tuple[bool, float]] = {}
    for record in records:
        context = record.context
        if record.metric == measure.metric and all(context.get(k) == v for k, v in measure.context.items()):
            key = gpu_of(record), (record.cell, int(context.get("block", 0)))
            is_near = context.get("local") is not False
            if not math.isnan(record.value) and (key not in near or is_near > near[key][0]):
                near[key] = is_near, max(record.value, LEAST)
    found: dict[Gpu, dict[Block, float]] = defaultdict(dict)
    for (gpu, block), (_, value) in near.items():
        found[gpu][block] = value
    return dict(found)


def by_pair(records: Iterable[Record]) -> dict[Pair, dict[Block, float]]:
    """Pair of GPUs -> block -> GB/s."""
    found: dict[Pair, dict[Block, float]] = defaultdict(dict)
    for record in records:
        if record.metric == "peer_gb_per_s" and (pair := pair_of(record)) and not math.isnan(record.value):
            found[pair][record.cell, int(record.context.get("block", 0))] = max(record.value, LEAST)
    return dict(found)


@dataclass(frozen=True)
class Distance:
    """How far a value is from a median: `share` of it (-0.12: 12 % under), with the interval `low` to `high`.

    `value` and `reference` are medians over blocks, in the measure's unit. Without enough blocks the interval is
    everything.
    """

    share: float
    low: float
    high: float
    value: float
    reference: float

    def under(self, threshold: float) -> bool:
        """Whether it is more than `threshold` under, by its value alone."""
        return self.share < -threshold

    def surely_under(self, threshold: float) -> bool:
        """Whether the whole interval is more than `threshold` under."""
        return self.high < -threshold


def middle(values: Iterable[float]) -> float:
    """The median of at least one value; of an even number the higher of the two in the middle: hardware is slower than
    it should be, not faster, so that half of the units are found as well.
    """
    return statistics.median_high(values)


def distances(values: Mapping[Unit, Series], comparisons: int) -> dict[Unit, Distance]:
    """Each unit's distance from the `middle` of all, by block.

    `comparisons` is the number of all that are made beside each other: intervals are wide enough for all of them
    together. Noise is that of all units (the median of their standard deviations), or of the unit itself where that is
    larger, so that five blocks that agree by luck prove nothing.
    """
    reference = _per_block(values)
    logs = {
        unit: [math.log(value / reference[block]) for block, value in series.items() if value > 0]
        for unit, series in values.items()
    }
    logs = {unit: each for unit, each in logs.items() if each}
    noise, degrees = _noise([(statistics.stdev(each), len(each) - 1) for each in logs.values() if len(each) > 1])
    found = {}
    for unit, each in logs.items():
        # A block far below the unit's others is a hiccup: it says nothing about the others, in either direction.
        floor = statistics.median(each) - OUTLIER * noise
        kept = [max(one, floor) for one in each]
        own = statistics.stdev(kept) if len(kept) >= ENOUGH else math.inf
        half = _half(own, len(kept) - 1, noise, degrees, comparisons) / math.sqrt(len(kept))
        value = statistics.median(values[unit].values())
        base = statistics.median(reference[block] for block in values[unit])
        found[unit] = _distance(statistics.fmean(kept), half, value, base)
    return found


def _noise(deviations: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The usual standard deviation of units, from each one's own with its degrees of freedom; and its own degrees.

    The median withstands units that are noisier than the others. That of sample deviations is below the true one, by
    Wilson and Hilferty's approximation of chi-squared. Half of the degrees pay for the median's lower efficiency.
    """
    if not deviations:
        return 0.0, 0.0
    degrees = statistics.median(freedom for _, freedom in deviations)
    typical = statistics.median(deviation for deviation, _ in deviations)
    return typical / (1 - 2 / (9 * degrees)) ** 1.5, max(degrees, len(deviations) * degrees / 2)


def _half(own: float, freedom: int, noise: float, degrees: float, comparisons: int) -> float:
    """Half of an interval, in which a unit's `own` deviation counts where it is far above the usual `noise`."""
    if math.isinf(own):
        return math.inf
    by = degrees if own <= 2 * noise else freedom
    return student_quantile(1 - (1 - CONFIDENCE) / 2 / max(1, comparisons), by) * max(own, noise)


def _distance(mean: float, half: float, value: float, reference: float) -> Distance:
    """From logarithms."""
    high = math.inf if math.isinf(half) else math.expm1(mean + half)
    return Distance(math.expm1(mean), math.expm1(mean - half), high, value, reference)


def _per_block(values: Mapping[Unit, Series]) -> dict[Block, float]:
    blocks: dict[Block, list[float]] = defaultdict(list)
    for series in values.values():
        for block, value in series.items():
            blocks[block].append(value)
    return {block: middle(each) or 1.0 for block, each in blocks.items()}


def node_series(values: Mapping[Gpu, Series]) -> dict[str, dict[Block, float]]:
    """Node -> block -> the median of its GPUs."""
    nodes: dict[str, dict[Gpu, Series]] = defaultdict(dict)
    for gpu, series in values.items():
        nodes[gpu.host][gpu] = series
    return {host: _per_block(own) for host, own in nodes.items()}


def slowed(values: Mapping[Gpu, Series], comparisons: int) -> dict[Gpu, Distance]:
    """How much each GPU changed from the first to the last block, beside what the others changed by.

    It is the slope of a straight line through the blocks of each cell. `value` and `reference` are the GPU's own
    medians of the last and of the first fifth. Empty for fewer than five blocks.
    """
    reference = _per_block(values)
    slopes: dict[Gpu, tuple[float, float, float, int]] = {}
    ends: dict[Gpu, tuple[float, float]] = {}
    for gpu, series in values.items():
        cells: dict[str, list[Block]] = defaultdict(list)
        for block in sorted(series):
            if series[block] > 0:
                cells[block[0]].append(block)
        points: list[tuple[float, float]] = []  # (place in the cell, -0.5 to 0.5; how far from the cell's mean)
        first, last = [], []
        for blocks in (blocks for blocks in cells.values() if len(blocks) >= 5):
            logs = [math.log(series[block] / reference[block]) for block in blocks]
            mean = statistics.fmean(logs)
            points += [(i / (len(logs) - 1) - 0.5, one - mean) for i, one in enumerate(logs)]
            fifth = len(blocks) // 5
            first += [series[block] for block in blocks[:fifth]]
            last += [series[block] for block in blocks[-fifth:]]
        if points:
            lever = sum(x * x for x, _ in points)
            slope = sum(x * y for x, y in points) / lever
            freedom = max(1, len(points) - 1 - len(cells))
            own = math.sqrt(sum((y - slope * x) ** 2 for x, y in points) / freedom)
            slopes[gpu] = slope, lever, own, freedom
            ends[gpu] = statistics.median(last), statistics.median(first)
    noise, degrees = _noise([(own, freedom) for _, _, own, freedom in slopes.values()])
    return {
        gpu: _distance(slope, _half(own, freedom, noise, degrees, comparisons) / math.sqrt(lever), *ends[gpu])
        for gpu, (slope, lever, own, freedom) in slopes.items()
    }
