"""Who may end a cell: the controller at the other end of stdin, or Slurm's job."""

from __future__ import annotations

import os
import time

from runner.node.protocol import STACKS_S, CellRequest, Stopped, Word


class Leash:
    """The controller's end of stdin: why to end the cell, if at all, and what else it asks for."""

    stdin = True

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._heard = time.monotonic()
        self._buffer = b""
        self.reason: str | None = None  # the first reason to end the cell counts
        self.go = False
        self.stacks = False

    @classmethod
    def of(cls, request: CellRequest) -> Leash:
        """What holds this cell."""
        return Leash(request.heartbeat_timeout_s) if request.timeout_s is None else JobLeash(request.timeout_s)

    def read(self) -> bool:
        """Take in what has come on stdin; False at its end."""
        data = os.read(0, 65536)
        self._heard = time.monotonic()
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
        """Do as a controller's word, or a signal, asks; what is no other word ends the cell."""
        if word == Word.GO:
            self.go = True
        elif word == Word.STACKS:
            self.stacks = True
        else:
            self.end(word)

    def end(self, reason: str) -> None:
        """End the cell for that reason, unless there is one already."""
        self.reason = self.reason or reason

    def tick(self) -> None:
        """Notice what has not come in time."""
        if time.monotonic() - self._heard > self._silence_s:
            self.end(f"no word from the controller for {self._silence_s:g} s")


class JobLeash(Leash):
    """Under Slurm nobody holds stdin: a cell runs until it ends, is signalled, or has had its time."""

    stdin = False

    def tick(self) -> None:
        ran_s = time.monotonic() - self._heard
        self.stacks = self.stacks or ran_s > self._silence_s - STACKS_S
        if ran_s > self._silence_s:
            self.end(Stopped.TIMED_OUT)
