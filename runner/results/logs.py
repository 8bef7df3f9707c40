"""benchmark.log for people: parsing lines, folding those of several nodes and ranks, following a growing log."""

from __future__ import annotations

import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from runner.results.celldir import LAUNCHER

WINDOW_S = 2.0  # equal lines of several nodes within this time are folded into one
PAUSE_S = 0.5  # between two reads of a growing log

# What differs between the same line of two ranks. Clock times and memory addresses carry no information; a decimal
# number is a measurement and is kept, so that two lines with different ones are not folded.
# How Ray begins what a worker prints, which its driver's output has as well; only of other nodes with an address.
_WORKER = r"\((?P<name>\w+) pid=\d+(?:, ip=[^\s)]+)?\)"
_TOKENS = re.compile(
    rf"(?P<worker>{_WORKER})"
    r"|(?P<passing>\d{1,2}:\d\d:\d\d(?:[.,]\d+)?|\b0x[0-9a-f]+)"
    r"|(?P<address>\d+(?:\.\d+){3})|(?P<kept>\d+\.\d+)|(?P<number>\d+)"
)
_LINE = re.compile(r"(?P<cell>\S+) (?P<host>\S+) (?P<file>\S+): (?P<text>.*)", re.DOTALL)
_SPEAKER = re.compile(r"(?:\S+: )+")
_RAY_SPEAKER = re.compile(_WORKER)
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_SET_WIDTH = 24
_BLOCK = 1 << 20


def printable(text: str) -> str:
    """`text` without terminal escape sequences and control characters; tabs become spaces."""
    if text.isprintable():
        return text
    text = _ESCAPES.sub("", text).expandtabs()
    return "".join(char for char in text if char == "\n" or char.isprintable())


@dataclass(frozen=True)
class Line:
    """One line of benchmark.log. `moment` in Unix seconds, 0 if the line has no time; `cell` None: the controller's."""

    moment: float
    text: str
    cell: str | None = None
    host: str = ""
    file: str = ""


def parse_line(raw: bytes, cells: Collection[str]) -> Line:
    """Parse a line of the log: `ISO cell alias file: text` of a rank, or `ISO text` of the controller.

    `cells` are the ids of the run's cells. Never raises: other text becomes a Line with moment 0.
    """
    text = printable(raw.decode(errors="replace"))
    stamp, _, rest = text.partition(" ")
    try:
        moment = datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return Line(0.0, text)
    match = _LINE.fullmatch(rest)
    if match and match["cell"] in cells:
        return Line(moment, match["text"], match["cell"], match["host"], match["file"])
    return Line(moment, rest)


def matches(line: Line, cell: str | None, hosts: Collection[str] | None) -> bool:
    """Whether `line` belongs to `cell` and to one of `hosts` (aliases); None matches any."""
    if line.cell is None:
        return hosts is None and (cell is None or line.text.startswith(f"{cell}: "))
    return (cell is None or line.cell == cell) and (hosts is None or line.host in hosts)


@dataclass
class _Group:
    """Equal lines of several sources, shown as one line."""

    line: Line
    moment: float
    key: tuple[str | None, str, str]
    hosts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        from runner.system.nodeset import fold

        clock = datetime.fromtimestamp(self.moment, UTC).strftime("%H:%M:%S ") if self.moment else ""
        if self.line.cell is None:
            return clock + self.line.text
        return f"{clock}{self.line.cell} {fold(self.hosts)} {_merged(self.files)}: {_merged(self.texts)}"


@dataclass
class _Same:
    """The open groups of equal lines. A line that a source repeats belongs to the next group."""

    groups: deque[_Group] = field(default_factory=deque)
    gone: int = 0
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # of lines by source


class Folding:
    """Folds equal lines of several nodes and ranks as they arrive; a group is complete WINDOW_S after its first line.

    Lines are equal if they differ only in whole numbers, IP addresses, memory addresses, clock times, and in which of
    Ray's workers of one name they come from. The first two are shown as sets, workers by their number, else the first.
    """

    def __init__(self) -> None:
        self._open: deque[_Group] = deque()
        self._same: dict[tuple[str | None, str, str], _Same] = {}
        self._latest = 0.0

    def add(self, line: Line) -> list[_Group]:
        """Add one line; returns the groups that were complete before it, in the order of their first lines."""
        self._latest = max(self._latest, line.moment)
        over = []
        while self._open and self._open[0].moment + WINDOW_S < self._latest:
            over.append(self._first())
        self._take(line)
        return over

    def rest(self) -> list[_Group]:
        """Complete and return all open groups, in the order of their first lines."""
        return [self._first() for _ in range(len(self._open))]

    def _take(self, line: Line) -> None:
        if line.cell is None:
            self._open.append(_Group(line, line.moment or self._latest, (None, "", "")))
            return
        key = (line.cell, _skeleton(line.file), _skeleton(line.text))
        # A launcher forwards the nodes' output, each line prefixed with the node's name.
        # So does Ray, to the rank that its job is.
        speaker = _SPEAKER.match(line.text) if line.host == LAUNCHER else _RAY_SPEAKER.match(line.text)
        source = (line.host, line.file, speaker[0] if speaker else "")
        same = self._same.setdefault(key, _Same())
        turn = max(same.counts[source], same.gone)
        same.counts[source] = turn + 1
        if turn - same.gone == len(same.groups):
            group = _Group(line, line.moment, key)
            same.groups.append(group)
            self._open.append(group)
        group = same.groups[turn - same.gone]
        group.hosts.append(line.host)
        group.files.append(line.file)
        group.texts.append(line.text)

    def _first(self) -> _Group:
        group = self._open.popleft()
        if same := self._same.get(group.key):
            same.groups.popleft()
            same.gone += 1
            if not same.groups:
                del self._same[group.key]
        return group


def _skeleton(text: str) -> str:
    def kind(match: re.Match[str]) -> str:
        return match[0] if match.lastgroup == "kept" else f"\0{match.lastgroup}{match['name'] or ''}"

    return _TOKENS.sub(kind, text)


def _merged(texts: Sequence[str]) -> str:
    """Texts of one skeleton as one text: `rank[0-2].stderr`."""
    if len(set(texts)) == 1:
        return texts[0]
    columns = iter(list(zip(*([m[0] for m in _TOKENS.finditer(text)] for text in texts), strict=True)))

    def column(match: re.Match[str]) -> str:
        return _set(next(columns), match.lastgroup or "")

    return _TOKENS.sub(column, texts[0])


def _set(values: Sequence[str], kind: str) -> str:
    from runner.system.nodeset import fold

    distinct = set(values)
    if len(distinct) == 1 or kind == "passing":
        return values[0]
    if kind == "worker":
        return f"{values[0].partition(' ')[0]} ×{len(distinct)})"
    text = fold(sorted(distinct))
    if len(text) > _SET_WIDTH and kind == "number":
        return f"[{min(distinct, key=int)}…{max(distinct, key=int)}]"
    return text


def fold_lines(lines: Iterable[Line]) -> Iterator[_Group]:
    """The groups of equal lines of `lines`, in the order of their first lines; `str()` of a group is its text."""
    folding = Folding()
    for line in lines:
        yield from folding.add(line)
    yield from folding.rest()


def last_lines(file: BinaryIO, count: int, parse: Callable[[bytes], Line | None]) -> tuple[list[str], int]:
    """The last `count` folded lines, read from the end, and the byte offset at which to continue reading.

    An incomplete last line is left for later. `parse` returns None for a line to skip.
    """
    end = file.seek(0, os.SEEK_END)
    newest_first: list[Line] = []
    groups: list[_Group] = []
    end, raws = _backwards(file, end)
    enough = 4 * count
    for raw in raws if count else ():
        line = parse(raw)
        if line is None:
            continue
        newest_first.append(line)
        if len(newest_first) >= enough and line.moment:
            # Lines before this one may belong to the first groups: those do not count.
            groups = [g for g in fold_lines(reversed(newest_first)) if g.moment > line.moment + WINDOW_S]
            if len(groups) >= count:
                break
            enough *= 2
    else:
        groups = list(fold_lines(reversed(newest_first)))
    return [str(group) for group in groups[len(groups) - min(count, len(groups)) :]], end


def _backwards(file: BinaryIO, end: int) -> tuple[int, Iterator[bytes]]:
    """The byte offset at which the last complete line ends, and the complete lines, last one first."""
    while end > 0:  # usually one step: the writer writes complete lines
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start

    def lines() -> Iterator[bytes]:
        position, rest = end, b""
        while position > 0:
            start = max(0, position - _BLOCK)
            file.seek(start)
            first, *whole = (file.read(position - start) + rest).split(b"\n")
            yield from reversed(whole[:-1] if position == end else whole)
            position, rest = start, first
        if end:
            yield rest

    return end, lines()


def follow(log: Path, position: int, parse: Callable[[bytes], Line | None], over: Callable[[], bool]) -> Iterator[str]:
    """Folded lines of `log` from byte offset `position` on, until its run is `over`; blocks while it waits.

    `parse` returns None for a line to skip.
    """
    folding, rest, last_output = Folding(), b"", time.monotonic()
    while True:
        ended = over()  # before reading, so that all output until then is read
        block = b""
        if log.exists():
            with open(log, "rb") as file:
                file.seek(position)
                block = file.read(_BLOCK)
        position += len(block)
        *lines, rest = (rest + block).split(b"\n")
        for raw in lines:
            if line := parse(raw):
                yield from map(str, folding.add(line))
        if block:
            last_output = time.monotonic()
        read = ended and not block
        if read or time.monotonic() - last_output > WINDOW_S:
            yield from map(str, folding.rest())
        if read:
            return
        if len(block) < _BLOCK:
            time.sleep(PAUSE_S)
