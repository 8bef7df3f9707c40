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
from collections.abc import Iterable
from dataclasses import dataclass

# By this name it is there on nodes, too.
from .nccl_rows import (
    ELEMENT_BYTES,
    REDOPS,
    ROW,
    Device,
    Measurement,
    Output,
    Run,
    is_cell,
    layout_of,
    row,
)

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
_BEFORE_HOST = re.compile(rf"(?:\d+|A|{'|'.join((*ELEMENT_BYTES, *REDOPS))})(?=[A-Za-z])")

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
        self._runs = [Run()]
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
            if stream.interrupted and not ROW.search(line):
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
        if ended and ROW.search(line) and _is_beginning(line):
            stream.partial = line
            return
        self._note(line)

    def _rows(self, line: str, ended: bool) -> bool:
        """Read the rows that stand on `line`; whether there was at least one. Others that begin there are torn."""
        run = self._runs[-1]
        begins = list(ROW.finditer(line))
        found, torn = False, 0
        for begin, end in zip(begins, [*(each.start() for each in begins[1:]), len(line)]):
            measured = row(run, line, begin, end, ended or end < len(line))
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
            run.layout, run.places, run.begun = layout_of(header[1], run.places), None, 4
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
        elif ROW.search(line) or (run.in_table and _is_remainder(line)):
            run.torn += 1
        if run.collective is None and (binary := _BINARY.search(line)):
            run.collective = binary[1]

    def _begin(self, step: int) -> Run:
        """The run that a line of its beginning belongs to: a new one, if the last is that far already."""
        if self._runs[-1].begun >= step:
            self._runs.append(Run())
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
    *whole, _ = line[list(ROW.finditer(line))[-1].end() :].split() or [""]
    return all(is_cell(token) for token in whole)


def _is_remainder(line: str) -> bool:
    """Whether a line has only what rows have, and several of it."""
    tokens = line.split()
    return len(tokens) > 3 and all(is_cell(token) or token in ELEMENT_BYTES for token in tokens)


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
