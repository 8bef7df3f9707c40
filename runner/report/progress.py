"""Output while a command runs: progress on stderr, with an ETA if one is known, plain lines without a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLAIN_INTERVAL_S = 10.0


class Display:
    """Notes and one progress bar on stderr; `quiet` prints nothing. Errors of a closed terminal are ignored."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live: Any = None
        self._task: Any = None
        self._total = 1.0
        self._left: tuple[float, float] | None = None  # seconds left, and since when (monotonic)
        self._shown = time.monotonic()

    def note(self, text: str) -> None:
        """Print one line that remains after the progress bar is gone."""
        if self.quiet:
            return
        with contextlib.suppress(OSError):  # the terminal was closed, or the reader of a pipe has ended
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """Show a bar from 0 to `total` inside the `with` block; `at` moves it."""
        self._shown = time.monotonic()
        self._total = total
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
        from rich.table import Column
        from rich.text import Text

        display = self

        class Eta(ProgressColumn):
            """What is known of the rest: rich's own follows the most recent rate, and cells finish in bursts."""

            def render(self, task: Task) -> Text:
                left = display._left_s()
                return Text(f"ETA {left // 60}:{left % 60:02}" if left is not None else "ETA –")

        # In a narrow terminal the text is cut, never the numbers.
        shrinks = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("{task.description}", markup=False, table_column=shrinks),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            Eta(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as self._live:
            self._task = self._live.add_task("", total=total)
            try:
                yield
            finally:
                self._live = None

    def _left_s(self) -> int | None:
        """Whole seconds left now; None if that is not known, or was less than it took."""
        if self._left is None:
            return None
        left = round(self._left[0] - (time.monotonic() - self._left[1]))
        return left if left > 0 else None

    def at(self, done: float, total: float, text: str, *, left_s: float | None = None) -> None:
        """Set the bar to `done` of `total` (in any unit) and its text; without a terminal print it every 10 s.

        `left_s`: the seconds that the rest takes. A rate so far says nothing of them: None where nothing else is known.
        """
        self._left = None if left_s is None else (left_s, time.monotonic())
        if self._live is not None:
            # In units of the bar, whatever `total` counts.
            self._live.update(self._task, completed=done * self._total / total, description=text)
        elif not self.quiet and time.monotonic() - self._shown > PLAIN_INTERVAL_S:
            self._shown = time.monotonic()
            left = self._left_s()
            end = f", ETA {left} s" if left is not None else ""
            with contextlib.suppress(OSError):
                print(f"{text}: {100 * done / total:.0f} %{end}", file=sys.stderr, flush=True)
