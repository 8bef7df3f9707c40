"""Where a rank waits while its program computes, as every one does that waits for its GPU or for its peers.

The stacks of ranks tell by it which of them hangs: where some wait here, one that waits elsewhere has a program that
stands still.
"""

from __future__ import annotations

import select
import time

from runner.system import process

LOOK_S = 1.0  # between two looks at the program's processor time
SHARE = 0.2  # of a processor: who polls takes a whole one, who is stuck none


class Program:
    """The process `pid`, and whether it computes: so it is assumed until LOOK_S have passed."""

    def __init__(self, pid: int) -> None:
        self._pid, self._used_s, self._looked = pid, process.cpu_s(pid), time.monotonic()
        self._computes = True

    def computes(self) -> bool:
        """Whether it has used processor time lately."""
        passed = time.monotonic() - self._looked
        if passed >= LOOK_S:
            used_s = process.cpu_s(self._pid)
            self._computes = used_s - self._used_s >= SHARE * passed
            self._used_s, self._looked = used_s, self._looked + passed
        return self._computes


def wait(poller: select.poll) -> list[tuple[int, int]]:
    """The events of `poller` while the program computes; empty where LOOK_S brought none."""
    return poller.poll(LOOK_S * 1000)
