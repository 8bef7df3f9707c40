"""Signals by which the user stops a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from runner.node.protocol import POLL_S
from runner.report.progress import Display
from runner.system import process


@contextmanager
def deferred() -> Iterator[None]:
    """Delay signals until the body, which must be short, has finished; then raise KeyboardInterrupt if one arrived."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    came: list[int] = []
    with process.handling(process.STOPS, lambda number, _frame: came.append(number)):
        yield
    if came:
        raise KeyboardInterrupt


class Stop:
    """The user's wish to stop. The first signal ends the run gracefully, the second raises KeyboardInterrupt."""

    def __init__(self, display: Display) -> None:
        self.asked = False
        self._display = display

    def listening(self) -> AbstractContextManager[None]:
        """Handle the signals while the context lasts."""
        return process.handling(process.STOPS, self._received)

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until the first signal."""
        deadline = time.monotonic() + seconds
        while not self.asked and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _received(self, number: int, _frame: object) -> None:
        again, self.asked = self.asked, True
        if again:
            raise KeyboardInterrupt
        self._display.note("stopping the ranks and gathering what was measured; interrupt again to exit at once")
