"""Who may end a cell: the controller at the other end of stdin, or Slurm's job."""

from __future__ import annotations

import os
import time

from runner.node.stacks import Stacks


class Leash:
    """The controller's end of stdin: says when to stop and why."""

    stdin = True

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._heard = time.monotonic()
        self._buffer = b""
        self.reason: str | None = None
        self.go = False
        self.stacks = False

    def read(self) -> None:
        data = os.read(0, 65536)
        self._heard = time.monotonic()
        if not data:
            self.reason = self.reason or "controller gone"
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if line.strip() == b"go":
                self.go = True
            elif line.strip() == b"stacks":
                self.stacks = True
            elif line.strip():  # an empty line is a heartbeat
                self.reason = self.reason or line.decode(errors="replace").strip()

    def tick(self) -> None:
        if time.monotonic() - self._heard > self._silence_s:
            self.reason = self.reason or f"no word from the controller for {self._silence_s:g} s"


class JobLeash(Leash):
    """Under Slurm nobody holds stdin: a cell runs until it ends, is signalled, or has had its time."""

    stdin = False

    def tick(self) -> None:
        ran_s = time.monotonic() - self._heard
        self.stacks = self.stacks or ran_s > self._silence_s - 2 * Stacks.ANSWER_S
        if ran_s > self._silence_s:
            self.reason = self.reason or "timed out"
