"""What a run of nccl-tests or rccl-tests has printed, and the rows of its table, each by itself. Pure.

A row counts only as a whole, and where its own numbers agree: time, size and bandwidth, count and size, the widths of
its two halves. `nccl_tests` finds the lines, and documents what is read.

Standard library and Python 3.9 only: plugins/module_utils has a link to this file, by which Ansible takes it to nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Measurement:
    """One half of a row: a size, in place or out of place. 1 GB is 10⁹ bytes, `time_us` is of one operation.

    `redop` and `root` are None where the layout has no such column or a value that means none. `wrong` is the number of
    wrong values, None if they were not counted.
    """

    size_bytes: int
    dtype: str
    redop: str | None
    root: int | None
    in_place: bool
    time_us: float
    algbw_gb_per_s: float
    busbw_gb_per_s: float
    wrong: int | None


@dataclass(frozen=True)
class Device:
    """One line of the list of ranks: `bus_id` as it is printed, `group` of NCCL_TESTS_SPLIT where it is told."""

    rank: int
    host: str
    device: int
    bus_id: str
    name: str
    group: int | None
    pid: int | None


@dataclass(frozen=True)
class Output:
    """What a run of one of the tests printed.

    `collective` is such as "all_reduce"; `version` that of the tests, `nccl_version` as NCCL prints it.
    `average_busbw_gb_per_s` is the footer's average over all sizes, for the record: never a measure of anything.
    `out_of_bounds` says whether the footer counted wrong values, None without it. `complete` means that
    there are measurements and the footer was reached. `problems` are the failures that were printed, `torn` the number
    of rows that were torn and left out.
    """

    collective: str | None
    version: str | None
    nccl_version: str | None
    devices: tuple[Device, ...]
    measurements: tuple[Measurement, ...]
    average_busbw_gb_per_s: float | None
    out_of_bounds: bool | None
    complete: bool
    problems: tuple[str, ...]
    torn: int


# Bytes of an element by the names that the tests print: what else a column may have is a piece of one of these.
ELEMENT_BYTES = {
    **dict.fromkeys(("int8", "uint8", "char", "f8e4m3", "f8e5m2", "fp8_e4m3", "fp8_e5m2"), 1),
    **dict.fromkeys(("half", "bfloat16", "float16"), 2),
    **dict.fromkeys(("int32", "uint32", "int", "float", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "double", "float64"), 8),
}
REDOPS = ("sum", "prod", "max", "min", "avg", "mulsum", "premulsum", "none")

_NUMBER = re.compile(r"\d+(?:\.\d{1,3})?(?:e[+-]\d{2,})?$")
_ERRORS = re.compile(r"(?:\d+(?:\.\d+)?(?:e[+-]\d{2,})?\*?|N/A|-?nan|inf)$")
_COUNT = re.compile(r"\d+(?:\.\d+)?(?:e\+\d{2,})?$")
_TOKEN = re.compile(r"\S+")
ROW = re.compile(rf"(?<![\w.+,/-])(\d+)[ \t]+(\d+)[ \t]+({'|'.join(ELEMENT_BYTES)})(?=\s|$)")


@dataclass(frozen=True)
class Layout:
    """The columns of a row after `type`: whether redop and root, the names of a half's columns, and which halves."""

    redop: bool
    root: bool
    half: tuple[str, ...]
    in_place: tuple[bool, ...]
    timestamp: bool = False
    milliseconds: bool = False


_HALF = ("time", "algbw", "busbw", "wrong")
_NAMES = {"bytes": "size", "N": "count", "op": "redop", "#wrong": "wrong", "cputime": "cputime", "res/error": "error"}


def layout_of(header: str, places: str | None) -> Layout | None:
    """The layout that a line of column names describes, or None for one that is torn."""
    names = [_NAMES.get(name, name) for name in header.split()]
    starts = [i for i, name in enumerate(names) if name in ("time", "cputime")]
    if not starts:
        return None
    timestamp = names[-1] == "timestamp"
    body = names[starts[0] : len(names) - timestamp]
    width = starts[1] - starts[0] if len(starts) == 2 else len(body)
    halves = [tuple(body[i : i + width]) for i in range(0, len(body), width)]
    told = [place == "in-place" for place in re.findall(r"out-of-place|in-place", places or "")]
    in_place = (False, True) if len(starts) == 2 else tuple(told)
    whole = {"algbw", "busbw"} <= set(halves[0]) and not {"wrong", "error"}.isdisjoint(halves[0])
    if not whole or len(set(halves)) != 1 or len(halves) != len(starts) or len(in_place) != len(halves):
        return None
    before = names[3 : starts[0]]
    return Layout("redop" in before, "root" in before, halves[0], in_place, timestamp, header.startswith("bytes"))


@dataclass(frozen=True)
class _Range:
    """The numbers that are printed as `text`: it and half a unit of its last place to both sides."""

    low: float
    high: float

    @classmethod
    def of(cls, text: str) -> _Range:
        mantissa, _, exponent = text.partition("e")
        half = 0.5000001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        return cls(max(0.0, float(text) - half), float(text) + half)

    def meets(self, low: float, high: float) -> bool:
        return self.low <= high * (1 + 1e-9) and low <= self.high * (1 + 1e-9)


class Run:
    """One run of a test while it is read."""

    def __init__(self) -> None:
        self.collective: str | None = None
        self.version: str | None = None
        self.nccl_version: str | None = None
        self.library: str | None = None
        self.devices: dict[int, Device] = {}
        self.measurements: list[Measurement] = []
        self.average: float | None = None
        self.out_of_bounds: bool | None = None
        self.failures: dict[str, None] = {}
        self.relays: dict[str, None] = {}
        self.torn = 0
        self.places: str | None = None
        self.layout: Layout | None = None
        self.ratio: int | None = None  # bytes of a row by the bytes of its count: the number of ranks for all_gather
        self.begun = 0  # how far it is: the steps of _BEGINNING, then 4 for everything after these

    def ranks(self) -> int | None:
        """How many ranks take part, where the list of devices says so."""
        groups = {device.group for device in self.devices.values()}
        return max(self.devices) + 1 if self.devices and len(groups) == 1 else None

    @property
    def in_table(self) -> bool:
        """Whether its table has begun, and not ended."""
        return self.out_of_bounds is None and (self.layout is not None or bool(self.measurements))

    def output(self) -> Output:
        """All that it printed."""
        problems = [*self.failures, *(self.relays if not self.failures and not self.out_of_bounds else ())]
        return Output(
            self.collective,
            self.version,
            self.nccl_version or self.library,
            tuple(self.devices[rank] for rank in sorted(self.devices)),
            tuple(self.measurements),
            self.average,
            self.out_of_bounds,
            self.out_of_bounds is not None and bool(self.measurements),
            tuple(problems),
            self.torn,
        )


def is_cell(token: str) -> bool:
    """Whether a row may have this after its type."""
    return bool(_NUMBER.match(token) or _ERRORS.match(token)) or token in REDOPS or token == "-1"


def row(run: Run, line: str, begin: re.Match[str], end: int, ended: bool) -> tuple[Measurement, ...]:
    """The measurements of the row at `begin`, or none if it is not whole or disagrees with itself."""
    tokens = list(_TOKEN.finditer(line, begin.end(), end))
    texts = [token[0] for token in tokens]
    layout = run.layout or _guess(texts)
    if layout is None:
        return ()
    blank = 0  # room of a column that is left out
    if layout.redop and _unnamed(begin, tokens):
        layout, blank = replace(layout, redop=False), 8
    redop = root = None
    at = 0
    if layout.redop:
        if not texts or texts[0] not in REDOPS:
            return ()
        redop, at = texts[0], 1
    if layout.root:
        if len(texts) <= at or not re.match(r"-?\d+$", texts[at]):
            return ()
        root, at = int(texts[at]), at + 1
    width = len(layout.half)
    halves = [tokens[at + i * width : at + (i + 1) * width] for i in range(len(layout.in_place))]
    after = texts[at + width * len(halves) :]
    if any(len(half) < width for half in halves) or (after and (is_cell(after[0]) or after[0] in ELEMENT_BYTES)):
        return ()
    last = halves[-1][-1]
    if not ended and last.end() == len(line) and last[0] not in ("0", "N/A"):
        return ()  # cut there, who knows after which digit
    cells = [dict(zip(layout.half, (token[0] for token in half))) for half in halves]
    if not all(_printed(name, text, layout) for half in cells for name, text in half.items()):
        return ()
    before = tokens[at - 1].end() if at else begin.end() + blank
    if (
        not _aligned(line, begin, halves, before)
        or not _sized(run, line, begin)
        or not _timed(run, begin, cells, layout)
    ):
        return ()
    return tuple(
        Measurement(
            int(begin[1]),
            begin[3],
            redop if redop != "none" else None,
            root if root is not None and root >= 0 else None,
            in_place,
            float(half.get("time") or half["cputime"]) * (1000 if layout.milliseconds else 1),
            float(half["algbw"]),
            float(half["busbw"]),
            _wrong(half),
        )
        for in_place, half in zip(layout.in_place, cells)
    )


def _unnamed(begin: re.Match[str], tokens: Sequence[re.Match[str]]) -> bool:
    """Whether the column of redop is blank, as hypercube and old versions of alltoall print it: what is next follows
    after as much room as both take, or somebody has squeezed the blanks.
    """
    if not tokens or tokens[0][0] in REDOPS:
        return False
    return tokens[0].end() - begin.end() >= 16 or tokens[0].start() - begin.end() == 1


def _printed(name: str, text: str, layout: Layout) -> bool:
    """Whether a cell is as it is printed: with two decimals, and fewer only where the number is too wide for them."""
    if name in ("wrong", "error"):
        return bool(_ERRORS.match(text))
    if not _NUMBER.match(text):
        return False
    if name not in ("time", "algbw", "busbw") or layout.milliseconds or "e" in text:
        return True
    decimals, value = len(text.partition(".")[2]), float(text)
    widest = 100 if name == "time" else 1000  # of values that always have both
    return decimals == 2 or (decimals < 2 and value >= widest and (name != "time" or decimals == 1 or value >= 10000))


def _guess(texts: Sequence[str]) -> Layout | None:
    """The layout of a row without a header, by how many numbers it has: two halves, with or without redop and root."""
    redop = bool(texts) and texts[0] in REDOPS
    numbers = 0
    for text in texts[redop:]:
        if not is_cell(text):
            break
        numbers += 1
    for root in (False, True):
        for half in (_HALF, (*_HALF, "i_min", "i_max", "i_p99", "i_cv%")):
            if numbers == 2 * len(half) + root:
                return Layout(redop, root, half, (False, True))
    return None


def _wrong(half: dict[str, str]) -> int | None:
    """The number of wrong values, of a large one its first six digits (1.34218e+08). The layouts with `error` print the
    largest difference instead, which is no number.
    """
    text = half.get("wrong")
    if text is None or not _COUNT.match(text) or text.startswith("0e") or not float(text).is_integer():
        return None
    return int(float(text))


def _aligned(line: str, begin: re.Match[str], halves: Sequence[Sequence[re.Match[str]]], before: int) -> bool:
    """Whether the two halves, printed alike, are equally wide: not if something is missing inside one of them."""
    if len(halves) < 2:
        return True
    widths: list[list[tuple[int, int]]] = []
    for half in halves:
        ends = [before, *(token.end() for token in half)]
        widths.append([(token.end() - end, token.start() - end) for token, end in zip(half, ends)])
        before = ends[-1]
    if all(gap == 1 for half in widths[1:] for _, gap in half):
        return True  # somebody has squeezed the blanks
    # Where only one half is checked, "N/A" stands for the number, a blank narrower.
    unchecked = [[token[0] == "N/A" for token in half] for half in halves]
    return all(
        a == b or (gap if a > b else other) <= 2 or (one != another and abs(a - b) == 1)
        for (a, gap), (b, other), one, another in zip(*widths, *unchecked)
    )


def _sized(run: Run, line: str, begin: re.Match[str]) -> bool:
    """Whether size and count agree: the size is that of the count, or of as many counts as there are ranks."""
    size, count, element = int(begin[1]), int(begin[2]), ELEMENT_BYTES[begin[3]]
    if any(len(text) > 1 and text[0] == "0" for text in begin.group(1, 2)):
        return False
    if not size or not count:
        return size == count
    if run.collective == "alltoallv":
        return size >= count * element
    ratio, rest = divmod(size, count * element)
    if rest or ratio < 2:
        return not rest and ratio == 1
    padded = len(line[: begin.end(1)]) - len(line[: begin.start(1)].rstrip(" ")) >= 12
    padded = padded and begin.end(2) - begin.end(1) >= 14
    known = run.ratio or run.ranks()
    if padded and run.ratio is None:
        run.ratio = ratio
    return padded or known is None or ratio == known


def _timed(run: Run, begin: re.Match[str], cells: Iterable[dict[str, str]], layout: Layout) -> bool:
    """Whether time, size and the bandwidths of each half agree, and both halves with each other."""
    factors = []
    for half in cells:
        algbw, busbw = _Range.of(half["algbw"]), _Range.of(half["busbw"])
        if busbw.low > 2 * algbw.high:
            return False
        if algbw.low > 0:
            factors.append((busbw.low / algbw.high, busbw.high / algbw.low))
        if "time" in half:
            time = _Range.of(half["time"])
            if float(half["time"]) <= 0:
                return False
            size = int(begin[1]) / (1e6 if layout.milliseconds else 1e3)  # GB/s by µs
            low, high = size / time.high, size / time.low if time.low else float("inf")
            ranks = run.ratio or run.ranks()
            shares = (
                (1.0, 1 - 1 / ranks) if ranks else (1.0,)
            )  # of hypercube, and of all_gather before 2020, less by its own part
            if not any(algbw.meets(low * share, high * share) for share in shares):
                return False
    return len(factors) < 2 or (factors[0][0] <= factors[1][1] and factors[1][0] <= factors[0][1])
