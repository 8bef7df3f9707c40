"""Progress of what is found, fetched, copied and published."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runner.report.progress import Display
from runner.system import manifest

# Called with (what is done, how much is done, how much there is).
Progress = Callable[[str, float, float], None]

_ETA_S = 2.0  # from which on the time left is shown


@contextmanager
def shown(display: Display) -> Iterator[Progress]:
    """Progress on a display, with the time left once it is known and more than two seconds have passed."""
    began: dict[str, float] = {}

    def at(what: str, done: float, total: float) -> None:
        passed = time.monotonic() - began.setdefault(what, time.monotonic())
        left = passed / done * (total - done) if passed > _ETA_S and done else None
        display.at(done, total or 1.0, what, left_s=left)

    with display.progress(1.0):
        yield at


def told(progress: Progress | None, what: str) -> manifest.Progress:
    """Progress of one thing, called with (how much is done, how much there is)."""
    return lambda done, total: progress(what, done, total) if progress is not None else None
