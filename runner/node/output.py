"""What the agent sends to its controller: messages, lines of growing files, contents of pipes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.node import lastwords
from runner.node.protocol import Line, Message

_BLOCK = 65536
_END = 1 << 18  # bytes at the end of a file in which its writer told how it ended


def send_message(message: Message) -> None:
    """Send one message to the controller, as one line on stdout."""
    # A broken pipe means that the controller is gone, which the leash notices. Under Slurm this is a file; the
    # outcome reports its full disk.
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(json.dumps(message.to_json()).encode() + b"\n")
        sys.stdout.buffer.flush()


class Tail:
    """New whole lines of the files that match a pattern in one folder, as they grow."""

    def __init__(self, folder: Path, patterns: tuple[str, ...]) -> None:
        self._folder, self._patterns = folder, patterns
        self._offsets: dict[Path, int] = {}

    def pass_on(self, last: bool = False) -> None:
        """Send the controller all new lines; an unfinished line waits for its end, unless this is the `last` call."""
        for name, line in self.lines(last):
            send_message(Line(name, line))

    def lines(self, last: bool = False) -> Iterator[tuple[str, str]]:
        """The new lines as (file name, line); an unfinished one only in the `last` call."""
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
    """Copy what the pipe holds to the file and the controller; returns False at the pipe's end."""
    try:
        data = pipe.read(_BLOCK)
    except BlockingIOError:
        return True
    if data is None:
        return True
    if not data:
        return False
    file.write(data)
    name = Path(file.name).name
    for line in data.decode(errors="replace").splitlines():
        send_message(Line(name, line))
    return True


def drain(pipe: Any, file: Any) -> None:
    """Copy the rest of the pipe to the file."""
    while pipe.readable() and (data := pipe.read(_BLOCK)):
        file.write(data)


def last_lines(path: Path, warned: Path | None = None) -> list[str]:
    """The lines at the end of a file that tell how its writer ended (`lastwords.keep`); none if it cannot be read.

    Before them come those in `warned` that may explain it, where NCCL writes its warnings to stdout.
    """
    before = lastwords.warnings(end_of(warned)) if warned else []
    return lastwords.keep([*before, *end_of(path)])


def end_of(path: Path) -> list[str]:
    """The lines at the end of a file in which its writer told how it ended; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
