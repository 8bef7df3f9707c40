"""Where ranks stand: their Python stacks, asked for by a signal."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from runner.system import process


class Stacks:
    """Where each rank of this node stands, asked of all at once and read `ANSWER_S` later."""

    ANSWER_S = 1.0
    FRAMES = 10

    def __init__(self, folder: Path, marker: str) -> None:
        alive = set(process.marked(marker))
        self._asked: dict[Path, tuple[int, int]] = {}  # a rank's events: its process, what it had said on stderr
        for path in sorted(folder.glob("rank*.jsonl")):
            with open(path, "rb") as file:
                pid = json.loads(file.readline() or b"{}").get("pid")
            if pid in alive:  # neither ended, nor torchrun's own agent, nor somebody who got an old number
                stderr = path.with_suffix(".stderr")
                self._asked[path] = (pid, stderr.stat().st_size if stderr.exists() else 0)
        process.signal_all([pid for pid, _ in self._asked.values()], process.STACKS)
        self._due = time.monotonic() + self.ANSWER_S

    def due(self) -> bool:
        return time.monotonic() >= self._due

    def read(self) -> dict[str, dict[str, Any]]:
        """By rank: the kernel's state of it, seconds since its last event, its innermost frames, innermost first."""
        standing = {}
        for path, (pid, said) in self._asked.items():
            try:
                with open(path.with_suffix(".stderr"), "rb") as file:
                    file.seek(said)
                    text = file.read().decode(errors="replace")
            except OSError:
                text = ""
            standing[path.stem] = {
                "state": process.state(pid),
                "age_s": round(time.time() - path.stat().st_mtime, 1),
                "frames": frames(text)[: self.FRAMES],
            }
        return standing


_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


_ROOT = re.compile(r".*/(?:site-packages/|(?=runner/workloads/))")


def frames(text: str) -> list[str]:
    """The frames in what faulthandler wrote, such as `torch/cuda/__init__.py:1083 synchronize`."""
    return [f"{_ROOT.sub('', path)}:{line} {function}" for path, line, function in _FRAME.findall(text)]
