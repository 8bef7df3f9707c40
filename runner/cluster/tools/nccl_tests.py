"""What nccl-tests and rccl-tests print, read back: devices, rows of the table, footer and failures. Pure.

Every layout since 2018 is read, by its header where there is one: with and without root and redop, `error` or `#wrong`,
per-iteration columns and timestamps (`-I`, `-S`), in place only, behind the labels of srun, mpirun or a collector of
logs. Other lines may stand between the rows or inside them.

A row counts only as a whole, and where its own numbers agree: time, size and bandwidth, count and size, the widths of
its two halves. What was torn is counted in `Output.torn` and is never a measurement.

Standard library and Python 3.9 only: plugins/module_utils has a link to this file, by which Ansible takes it to nodes.
"""

from __future__ import annotations

import json
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


COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "alltoallv",
    "alltoall",
    "broadcast",
    "reduce",
    "sendrecv",
    "gather",
    "scatter",
    "hypercube",
)

# Bytes of an element by the names that the tests print: what else a column may have is a piece of one of these.
_ELEMENT_BYTES = {
    **dict.fromkeys(("int8", "uint8", "char", "f8e4m3", "f8e5m2", "fp8_e4m3", "fp8_e5m2"), 1),
    **dict.fromkeys(("half", "bfloat16", "float16"), 2),
    **dict.fromkeys(("int32", "uint32", "int", "float", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "double", "float64"), 8),
}
_REDOPS = ("sum", "prod", "max", "min", "avg", "mulsum", "premulsum", "none")

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# Open MPI's --tag-output, old and new, stands wherever a process began to write, in the middle of a line too.
_TAG = re.compile(
    r"(?:<?[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d [\d:]{8} \d{4}>? ?(?=\[|<))?"  # of --timestamp-output
    r"((?:\[\d+,\d+\])?<std(?:out|err)>:|\[[\w.-]{1,253}@\d+,\d+\](?:\[[^\]\s]*\])?<std(?:out|err)>: ?)"
)
# A line as a string of JSON: a list of lines that Ansible prints, and the log of a container.
_QUOTED = re.compile(r'\s*(?:\{"log": ?)?("(?:[^"\\]|\\.)*")(?:,|,.*\})?\s*$')
_SRUN_LABEL = re.compile(r"^ *(\d+): ")
# A message of NCCL or RCCL, which takes the rest of its line and its end.
MESSAGE = re.compile(
    r"(?:\[\d{4}-\d\d-\d\d[ T][\d:.]+\] )?(?P<host>\b\w[\w.-]{0,252}):\d+:\d+ "
    r"(?:\[\d+\] )?(?:\d+\.\d+ )?(?:\S+:\d+ )?(?:\(\w+\) )?N?R?CCL (?:INFO|WARN|TRACE|CALL)"
)
# What a row may end with before a message that interrupts it, without a blank: "-1node1:12:34 [0] NCCL INFO".
_BEFORE_HOST = re.compile(rf"(?:\d+|A|{'|'.join((*_ELEMENT_BYTES, *_REDOPS))})(?=[A-Za-z])")

_NUMBER = re.compile(r"\d+(?:\.\d{1,3})?(?:e[+-]\d{2,})?$")
_ERRORS = re.compile(r"(?:\d+(?:\.\d+)?(?:e[+-]\d{2,})?\*?|N/A|-?nan|inf)$")
_COUNT = re.compile(r"\d+(?:\.\d+)?(?:e\+\d{2,})?$")
_TOKEN = re.compile(r"\S+")
_ROW = re.compile(rf"(?<![\w.+,/-])(\d+)[ \t]+(\d+)[ \t]+({'|'.join(_ELEMENT_BYTES)})(?=\s|$)")

_HEADER = re.compile(r"#\s+((?:size|bytes)\s+(?:count|N)\s+type\s.*)")
_PLACES = re.compile(r"#\s+((?:out-of-place|in-place)\b.*)")
_PARAMETERS = re.compile(r"nThreads?:? \d+ nGpus:? \d+ ")
_VERSION = re.compile(r"# nccl-tests version (\S+)(?: .*nccl-library=(\d+))?")
_RCCL_VERSION = re.compile(r"rccl-tests: Version (\S+)")
_STARTING = re.compile(r"# Collective test starting: (\w+?)(?:_perf)?\s*$")
_BINARY = re.compile(rf"\b({'|'.join(COLLECTIVES)})_perf\b")
NCCL_VERSION = re.compile(r"\b[NR]CCL version(?: ?:)? (\d+\.\d+\S*)")
_DEVICE = re.compile(
    r"#\s+Rank\s+(\d+)(?:\s+Group\s+(\d+))?(?:\s+Pid\s+(\d+))?\s+on\s+(\S+)\s+device\s+(\d+)\s+\[([^\]]+)\]\s*(.*?)\s*$"
)
_BOUNDS = re.compile(r"Out of bounds values\s*:\s*(\d+)\s+(OK|FAILED)\b")
_AVERAGE = re.compile(r"Avg bus bandwidth\s*:\s*(\d+(?:\.\d+)?(?:e[+-]\d+)?)(?=\s|$)")

_FAILURE = re.compile(r"(\S{1,253}): Test (CUDA|HIP|NCCL) failure \S+ '(.*)'")
_RELAY = re.compile(r"\.\. (\S+) pid \d+: Test failure ")
# Failures of the tests themselves and of what starts them, one line each, told as they stand.
_FAILED = re.compile(
    "|".join(
        (
            r"Test timeout \(",
            r"Invalid number of GPUs",
            r"number of requested GPUs \(",
            r"invalid size(?:s)? (?:specified )?for '",
            r"Incompatible NCCL versions",
            r"Device implementation .* (?:not supported|requires)",
            r"There are not enough slots",
            r"error while loading shared libraries",
            r"\bsrun: error: ",
            r"\bslurmstepd: error: ",
            r"(?:orted|prted|prterun|mpirun)\S*: (?:command not found|No such file)",
            r"unable to (?:launch|find|start|execute|locate)\b",
            r"exited on signal",
        )
    )
)


@dataclass(frozen=True)
class _Layout:
    """The columns of a row after `type`: whether redop and root, the names of a half's columns, and which halves."""

    redop: bool
    root: bool
    half: tuple[str, ...]
    in_place: tuple[bool, ...]
    timestamp: bool = False
    milliseconds: bool = False


_HALF = ("time", "algbw", "busbw", "wrong")
_NAMES = {"bytes": "size", "N": "count", "op": "redop", "#wrong": "wrong", "cputime": "cputime", "res/error": "error"}


def _layout(header: str, places: str | None) -> _Layout | None:
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
    return _Layout("redop" in before, "root" in before, halves[0], in_place, timestamp, header.startswith("bytes"))


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


class _Run:
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
        self.layout: _Layout | None = None
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


@dataclass
class _Stream:
    """What one writer has begun: `open` has not ended its line, `partial` has, but may go on after others' messages."""

    open: str = ""
    partial: str = ""
    interrupted: bool = False


class Reader:
    """Reads output as it grows: `feed` what came, `close` when nothing more comes, `outputs` at any time."""

    def __init__(self) -> None:
        self._rest = ""
        self._runs = [_Run()]
        self._streams: dict[str, _Stream] = {}
        self._hosts: set[str] = set()  # of messages that begin a line
        self._new: list[Measurement] = []

    def feed(self, text: str) -> tuple[Measurement, ...]:
        """The measurements that `text` completes. Lines may be cut anywhere: what is unfinished is kept."""
        *lines, self._rest = re.split(r"\r*\n|\r(?!\r*\n|$)", self._rest + text)
        for line in lines:
            self._physical(line)
        return self._taken()

    def close(self) -> tuple[Measurement, ...]:
        """The measurements in a last line that has no end."""
        rest, self._rest = self._rest.rstrip("\r"), ""
        if rest.strip():
            self._physical(rest, ended=False)
        for stream in self._streams.values():
            self._give_up(stream)
        return self._taken()

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What was read so far, by run: a file may have several. At least one, which may be empty."""
        return tuple(run.output() for run in self._runs)

    def _taken(self) -> tuple[Measurement, ...]:
        taken, self._new = tuple(self._new), []
        return taken

    def _physical(self, line: str, ended: bool = True) -> None:
        """Share a line among those who wrote it, and read what each has finished."""
        line = _ANSI.sub("", _unquoted(line)).replace("\u00a0", " ")
        tags = list(_TAG.finditer(line))
        if tags:
            pieces = [("", line[: tags[0].start()])] if line[: tags[0].start()].strip() else []
            ends = [*(tag.start() for tag in tags[1:]), len(line)]
            pieces += [(tag[1].strip(), line[tag.end() : end]) for tag, end in zip(tags, ends)]
        elif label := _SRUN_LABEL.match(line):
            pieces = [(label[1], line[label.end() :])]
        else:
            pieces = [("", line)]
        for i, (writer, piece) in enumerate(pieces):
            stream = self._streams.setdefault(writer, _Stream())
            message = MESSAGE.search(piece) if "CCL " in piece else None
            if message:
                stream.interrupted = True
                if piece[: self._start(piece, message)].strip():
                    stream.open += piece[: self._start(piece, message)]
            elif i < len(pieces) - 1:
                stream.open += piece
            else:
                whole, stream.open = stream.open + piece, ""
                self._logical(stream, whole, ended)

    def _start(self, piece: str, message: re.Match[str]) -> int:
        """Where a message starts: after the end of a row that its host follows without a blank."""
        host = message["host"]
        if not piece[: message.start()] or (not piece[: message.start()].strip() and not host[0].isdigit()):
            self._hosts.add(host)
        if message.start() < message.start("host") or host in self._hosts:
            return message.start()
        known = max((each for each in self._hosts if host.endswith(each)), key=len, default=None)
        glued = _BEFORE_HOST.match(host)
        if known:
            return message.end("host") - len(known)
        return message.start() + (len(glued[0]) if glued and piece[: message.start()].strip() else 0)

    def _give_up(self, stream: _Stream) -> None:
        """What was begun in `stream` did not go on."""
        if stream.partial:
            self._runs[-1].torn += 1
        stream.partial, stream.interrupted = "", False

    def _logical(self, stream: _Stream, line: str, ended: bool) -> None:
        """Read a line of one writer. A row that stops within its columns may go on after a message."""
        if not line.strip():
            return
        if stream.partial:
            joined = stream.partial + line
            if stream.interrupted and not _ROW.search(line):
                stream.interrupted = False
                if self._rows(joined, ended):
                    stream.partial = ""
                    return
                if ended and _is_beginning(joined):
                    stream.partial = joined
                    return
            self._give_up(stream)
        stream.interrupted = False
        if self._rows(line, ended):
            return
        if ended and _ROW.search(line) and _is_beginning(line):
            stream.partial = line
            return
        self._note(line)

    def _rows(self, line: str, ended: bool) -> bool:
        """Read the rows that stand on `line`; whether there was at least one. Others that begin there are torn."""
        run = self._runs[-1]
        begins = list(_ROW.finditer(line))
        found, torn = False, 0
        for begin, end in zip(begins, [*(each.start() for each in begins[1:]), len(line)]):
            measured = _row(run, line, begin, end, ended or end < len(line))
            if measured:
                found = True
                run.begun = 4
                run.measurements += measured
                self._new += measured
            else:
                torn += 1
        if found:
            run.torn += torn
        return found

    def _note(self, line: str) -> None:
        """Read a line that is no row: header, device, footer, failure, or nothing of ours."""
        run = self._runs[-1]
        if version := _VERSION.search(line):
            run = self._begin(1)
            run.version = version[1]
            if version[2]:
                run.library = _of_code(int(version[2]))
        elif version := _RCCL_VERSION.search(line):
            run.version = version[1]
        elif starting := _STARTING.search(line):
            run = self._begin(2)
            run.collective = starting[1]
        elif _PARAMETERS.search(line):
            self._begin(3)
        elif device := _DEVICE.search(line):
            rank, group, pid, host, index, bus_id, name = device.groups()
            run.begun = max(run.begun, 3)
            run.devices[int(rank)] = Device(
                int(rank),
                host,
                int(index),
                bus_id,
                name,
                int(group) if group is not None else None,
                int(pid) if pid is not None else None,
            )
        elif places := _PLACES.search(line):
            run.places = places[1]
        elif header := _HEADER.search(line):
            if run.out_of_bounds is not None:  # a table after a footer: the lines above it were left out
                places_told, run = run.places, self._begin(4)
                run.places = places_told
            run.layout, run.places, run.begun = _layout(header[1], run.places), None, 4
        elif bounds := _BOUNDS.search(line):
            run.out_of_bounds, run.begun = bounds[2] == "FAILED" or int(bounds[1]) > 0, 4
        elif average := _AVERAGE.search(line):
            run.average = float(average[1])
        elif version := NCCL_VERSION.search(line):
            run.nccl_version = version[1]
        elif " failure " in line and (failure := _FAILURE.search(line)):
            run.failures[f"{failure[1]}: {failure[2]} failure: {failure[3].strip(' /')}"] = None
        elif relay := _RELAY.search(line):
            run.relays[f"{relay[1]}: the test failed"] = None
        elif _FAILED.search(line):
            run.failures[line.strip()] = None
        elif _ROW.search(line) or (run.in_table and _is_remainder(line)):
            run.torn += 1
        if run.collective is None and (binary := _BINARY.search(line)):
            run.collective = binary[1]

    def _begin(self, step: int) -> _Run:
        """The run that a line of its beginning belongs to: a new one, if the last is that far already."""
        if self._runs[-1].begun >= step:
            self._runs.append(_Run())
        self._runs[-1].begun = step
        return self._runs[-1]


def _unquoted(line: str) -> str:
    """What a line says that a collector of logs has made a string of JSON; any other as it is."""
    quoted = _QUOTED.match(line) if '"' in line else None
    try:
        return str(json.loads(quoted[1])).rstrip("\n") if quoted else line
    except ValueError:
        return line


def _of_code(code: int) -> str:
    """NCCL_VERSION_CODE as a version: 23007 is 2.30.7, and 2708 is 2.7.8."""
    step = 10000 if code >= 10000 else 1000
    return f"{code // step}.{code % step // 100}.{code % 100}"


def _is_beginning(line: str) -> bool:
    """Whether a line ends inside the columns of its last row."""
    *whole, _ = line[list(_ROW.finditer(line))[-1].end() :].split() or [""]
    return all(_is_cell(token) for token in whole)


def _is_remainder(line: str) -> bool:
    """Whether a line has only what rows have, and several of it."""
    tokens = line.split()
    return len(tokens) > 3 and all(_is_cell(token) or token in _ELEMENT_BYTES for token in tokens)


def _is_cell(token: str) -> bool:
    """Whether a row may have this after its type."""
    return bool(_NUMBER.match(token) or _ERRORS.match(token)) or token in _REDOPS or token == "-1"


def _row(run: _Run, line: str, begin: re.Match[str], end: int, ended: bool) -> tuple[Measurement, ...]:
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
        if not texts or texts[0] not in _REDOPS:
            return ()
        redop, at = texts[0], 1
    if layout.root:
        if len(texts) <= at or not re.match(r"-?\d+$", texts[at]):
            return ()
        root, at = int(texts[at]), at + 1
    width = len(layout.half)
    halves = [tokens[at + i * width : at + (i + 1) * width] for i in range(len(layout.in_place))]
    after = texts[at + width * len(halves) :]
    if any(len(half) < width for half in halves) or (after and (_is_cell(after[0]) or after[0] in _ELEMENT_BYTES)):
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
    if not tokens or tokens[0][0] in _REDOPS:
        return False
    return tokens[0].end() - begin.end() >= 16 or tokens[0].start() - begin.end() == 1


def _printed(name: str, text: str, layout: _Layout) -> bool:
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


def _guess(texts: Sequence[str]) -> _Layout | None:
    """The layout of a row without a header, by how many numbers it has: two halves, with or without redop and root."""
    redop = bool(texts) and texts[0] in _REDOPS
    numbers = 0
    for text in texts[redop:]:
        if not _is_cell(text):
            break
        numbers += 1
    for root in (False, True):
        for half in (_HALF, (*_HALF, "i_min", "i_max", "i_p99", "i_cv%")):
            if numbers == 2 * len(half) + root:
                return _Layout(redop, root, half, (False, True))
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


def _sized(run: _Run, line: str, begin: re.Match[str]) -> bool:
    """Whether size and count agree: the size is that of the count, or of as many counts as there are ranks."""
    size, count, element = int(begin[1]), int(begin[2]), _ELEMENT_BYTES[begin[3]]
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


def _timed(run: _Run, begin: re.Match[str], cells: Iterable[dict[str, str]], layout: _Layout) -> bool:
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


def parse_all(text: str) -> tuple[Output, ...]:
    """What each run of a test in `text` printed, in their order; at least one, which may be empty."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader.outputs


def parse(text: str) -> Output:
    """What `text` has, as one: several runs count as complete if all are, and have no common average."""
    outputs = parse_all(text)
    if len(outputs) == 1:
        return outputs[0]
    bounds = [each.out_of_bounds for each in outputs if each.out_of_bounds is not None]
    return Output(
        _common(each.collective for each in outputs),
        _common(each.version for each in outputs),
        _common(each.nccl_version for each in outputs),
        tuple(dict.fromkeys(device for each in outputs for device in each.devices)),
        tuple(measurement for each in outputs for measurement in each.measurements),
        None,
        any(bounds) if bounds else None,
        all(each.complete for each in outputs),
        tuple(dict.fromkeys(problem for each in outputs for problem in each.problems)),
        sum(each.torn for each in outputs),
    )


def _common(values: Iterable[str | None]) -> str | None:
    """The one value that all have who say one."""
    told = {value for value in values if value is not None}
    return told.pop() if len(told) == 1 else None
