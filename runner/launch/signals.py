"""What the user's signals ask of a run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from runner.node.protocol import POLL_S
from runner.report.progress import Display

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferred() -> Iterator[None]:
    """Finish what is done inside, which takes no time to speak of; a signal that arrives meanwhile interrupts later."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda got, _frame: came.append(got)) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


class Stop:
    """What the user's signals ask for. The first asks for an orderly end, the second leaves at once."""

    def __init__(self, display: Display) -> None:
        self.asked = False
        self._display = display

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._heard) for number in NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self, seconds: float) -> None:
        """Sleep, but not past the user's wish to stop."""
        deadline = time.monotonic() + seconds
        while not self.asked and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _heard(self, number: int, _frame: object) -> None:
        again, self.asked = self.asked, True
        if again:
            raise KeyboardInterrupt
        self._display.note("stopping the ranks and gathering what was measured; once more to leave at once")
