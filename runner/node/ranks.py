"""The files of this node's ranks: how each rank ended, and where a running one is."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from runner.node.output import last_lines
from runner.node.protocol import STACKS_ANSWER_S, RankEnd, RankStack
from runner.results.celldir import CellDir, stderr_of, stdout_of
from runner.results.records import parse_jsonl
from runner.system import process

FRAMES = 10


def ends(folder: CellDir) -> dict[str, RankEnd]:
    """By rank: whether it started and ended, and if not, the last lines of its stderr."""
    found = {}
    for path in folder.all_events():
        with path.open(errors="replace") as lines:
            events = {line.partition('"event": "')[2].partition('"')[0]: line for line in lines}
        ended = "end" in events
        program = next(parse_jsonl(events.get("exit", "")), {})
        found[path.stem] = RankEnd(
            "start" in events,
            ended,
            [] if ended else last_lines(stderr_of(path), stdout_of(path)),
            program.get("code"),
            program.get("time_s", 0.0),
        )
    return found


def nccl_versions(folder: CellDir) -> list[str]:
    """The versions of NCCL that this node's ranks have loaded, as they said: one, unless something is wrong."""
    found = set()
    for path in folder.all_events():
        for line in path.read_text(errors="replace").splitlines():
            if '"event": "nccl"' in line:
                found |= {version or "unknown" for version in json.loads(line)["libraries"].values()}
    return sorted(found)


def all_ended(folder: CellDir) -> bool:
    """Whether there are ranks and all of them have ended."""
    found = ends(folder)
    return bool(found) and all(rank.ended for rank in found.values())


class Stacks:
    """The stacks of this node's ranks: requested from all at once by a signal, read STACKS_ANSWER_S later."""

    def __init__(self, folder: CellDir, marker: str) -> None:
        alive = set(process.marked(marker))
        self._asked: dict[Path, tuple[int, int]] = {}  # a rank's events: its process, the size of its stderr before
        for path in folder.all_events():
            with open(path, "rb") as file:
                pid = json.loads(file.readline() or b"{}").get("pid")
            if pid in alive:  # neither ended, nor torchrun's own agent, nor another process with a reused id
                stderr = stderr_of(path)
                self._asked[path] = (pid, stderr.stat().st_size if stderr.exists() else 0)
        process.signal_all([pid for pid, _ in self._asked.values()], process.STACKS)
        self._due = time.monotonic() + STACKS_ANSWER_S

    def due(self) -> bool:
        """Whether STACKS_ANSWER_S have passed since the signal."""
        return time.monotonic() >= self._due

    def read(self) -> dict[str, RankStack]:
        """The stacks by rank; a rank that wrote nothing has no frames."""
        found = {}
        for path, (pid, size) in self._asked.items():
            try:
                with open(stderr_of(path), "rb") as file:
                    file.seek(size)
                    text = file.read().decode(errors="replace")
            except OSError:
                text = ""
            age_s = round(time.time() - path.stat().st_mtime, 1)
            found[path.stem] = RankStack(process.state_with_children(pid), age_s, frames(text)[:FRAMES])
        return found


_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_ROOT = re.compile(r".*/(?:site-packages/|(?=runner/workloads/))")


def frames(text: str) -> list[str]:
    """The frames in the output of faulthandler, innermost first, such as `torch/cuda/__init__.py:1083 synchronize`."""
    return [f"{_ROOT.sub('', path)}:{line} {function}" for path, line, function in _FRAME.findall(text)]
