"""What a person sees while a command works: progress with an ETA on stderr, plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLAIN_INTERVAL_S = 10.0


class Display:
    """Notes and one progress bar over a number of steps; `quiet` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live: Any = None
        self._task: Any = None
        self._shown = 0.0
        self._started = 0.0

    def note(self, text: str) -> None:
        """One line that stays."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """Show a bar from 0 to `total`, moved by `at`."""
        self._started = self._shown = time.monotonic()
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as self._live:
            self._task = self._live.add_task("", total=total)
            try:
                yield
            finally:
                self._live = None

    def at(self, done: float, total: float, text: str) -> None:
        """The bar's position and what is being done."""
        if self._live is not None:
            self._live.update(self._task, completed=done, description=text)
        elif not self.quiet and time.monotonic() - self._shown > PLAIN_INTERVAL_S:
            self._shown = time.monotonic()
            elapsed = self._shown - self._started
            eta = f", ETA {elapsed * (total - done) / done:.0f} s" if done > 0 else ""
            print(f"{text}: {100 * done / total:.0f} %{eta}", file=sys.stderr, flush=True)
