"""What may end a cell: the controller at the other end of stdin, or the Slurm job."""

from __future__ import annotations

import os
import time

from runner.node.protocol import STACKS_S, Stopped, Word
from runner.node.requests import CellRequest


class Leash:
    """The connection to the controller over stdin: the reason to end the cell, if any, and the other words received.

    `silence_s`: the time without input after which the controller counts as gone.
    """

    stdin = True

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._received = time.monotonic()
        self._buffer = b""
        self.reason: str | None = None  # the first reason to end the cell counts
        self.go = False
        self.stacks = False

    @classmethod
    def of(cls, request: CellRequest) -> Leash:
        """The leash of this cell: stdin, or under Slurm the job."""
        return Leash(request.heartbeat_timeout_s) if request.timeout_s is None else JobLeash(request.timeout_s)

    def read(self) -> bool:
        """Read from stdin; returns False at its end."""
        data = os.read(0, 65536)
        self._received = time.monotonic()
        if not data:
            self.end(Stopped.CONTROLLER_GONE)
        self.receive(data)
        return bool(data)

    def receive(self, data: bytes) -> None:
        """Do as the words ask whose lines `data` completes."""
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if word := line.decode(errors="replace").strip():  # an empty line is a heartbeat
                self.take(word)

    def take(self, word: str) -> None:
        """Act on a controller's word or a signal; any unknown word ends the cell."""
        if word == Word.GO:
            self.go = True
        elif word == Word.STACKS:
            self.stacks = True
        else:
            self.end(word)

    def end(self, reason: str) -> None:
        """End the cell for `reason`; the first reason counts."""
        self.reason = self.reason or reason

    def tick(self) -> None:
        """End the cell if nothing was received for `silence_s`."""
        if time.monotonic() - self._received > self._silence_s:
            self.end(f"no message from the controller for {self._silence_s:g} s")


class JobLeash(Leash):
    """Under Slurm no controller is connected: a cell runs until it ends, is signalled, or reaches its time limit."""

    stdin = False

    def tick(self) -> None:
        """Read the stacks shortly before the time limit, and end the cell at the limit."""
        ran_s = time.monotonic() - self._received
        self.stacks = self.stacks or ran_s > self._silence_s - STACKS_S
        if ran_s > self._silence_s:
            self.end(Stopped.TIMED_OUT)
