"""What the agent passes on to its controller: messages, lines of growing files, pipes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAST_LINES = 20


def say(kind: str, /, **fields: Any) -> None:
    # A torn pipe means that the controller is gone; the leash tells that, this write need not. Under Slurm
    # this is a file, whose full disk the outcome tells.
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(json.dumps({"message": kind, **fields}).encode() + b"\n")
        sys.stdout.buffer.flush()


class Tail:
    """New whole lines of the files that match a pattern in one folder, as they grow."""

    def __init__(self, folder: Path, patterns: tuple[str, ...]) -> None:
        self._folder, self._patterns = folder, patterns
        self._offsets: dict[Path, int] = {}

    def lines(self, last: bool = False) -> Iterator[tuple[str, str]]:
        """(file name, line) pairs; an unfinished line waits for its end, unless this is the `last` call."""
        for pattern in self._patterns:
            for path in sorted(self._folder.glob(pattern)):
                with open(path, "rb") as file:
                    file.seek(self._offsets.get(path, 0))
                    data = file.read()
                whole = data if last else data[: data.rfind(b"\n") + 1]
                self._offsets[path] = self._offsets.get(path, 0) + len(whole)
                for line in whole.decode(errors="replace").splitlines():
                    yield path.name, line


def copy(pipe: Any, file: Any) -> bool:
    """Move what the pipe holds to the file and the controller; False at its end."""
    try:
        data = pipe.read(65536)
    except BlockingIOError:
        return True
    if data is None:
        return True
    if not data:
        return False
    file.write(data)
    name = Path(file.name).name
    for line in data.decode(errors="replace").splitlines():
        say("line", file=name, line=line)
    return True


def drain(child: subprocess.Popen[bytes], out: Any, err: Any) -> None:
    for pipe, file in ((child.stdout, out), (child.stderr, err)):
        if pipe is not None:
            while pipe.readable() and (data := pipe.read(65536)):
                file.write(data)


def last_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        return []
