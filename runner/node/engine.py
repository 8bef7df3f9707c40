"""What runs the ranks of a cell on this node: the engine's process started here, or another launcher's ranks."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

from runner.node import environment, output, ranks
from runner.node.protocol import Word
from runner.node.requests import CellRequest
from runner.results.celldir import CellDir
from runner.system import process

LOOK_S = 0.5  # between two scans of every process's environment, which cost milliseconds


class Engine(Protocol):
    """Runs ranks. `pid` is that of its process, None if it was not started here."""

    pid: int | None

    def streams(self) -> Sequence[tuple[Any, BinaryIO]]:
        """Its pipes, each with the file in which its contents are kept."""
        ...

    def ended(self) -> bool:
        """Whether the ranks have ended by themselves."""
        ...

    def stop(self) -> None:
        """End the engine's process after all processes with the cell's marker have ended."""
        ...

    def status(self, stopped: str | None) -> int | None:
        """The exit status after the end, None if it is not known.

        `stopped`: why the agent ended the ranks; None if they ended by themselves.
        """
        ...


@contextlib.contextmanager
def started(request: CellRequest, folder: CellDir) -> Iterator[Engine]:
    """Start the engine of `request`; raises InfrastructureError if its program is not found."""
    child = _spawn(request, folder) if request.argv else None
    with open(folder.engine_stdout, "ab", buffering=0) as out, open(folder.engine_stderr, "ab", buffering=0) as err:
        yield OwnProcess(child, out, err, request.grace_s) if child else OthersRanks(request.marker, folder)


class OwnProcess:
    """The engine's process, started here, such as torchrun."""

    def __init__(self, child: subprocess.Popen[bytes], out: BinaryIO, err: BinaryIO, grace_s: float) -> None:
        self._child, self._grace_s = child, grace_s
        self._streams = [(pipe, file) for pipe, file in ((child.stdout, out), (child.stderr, err)) if pipe]
        self.pid: int | None = child.pid
        for pipe, _ in self._streams:
            os.set_blocking(pipe.fileno(), False)

    def streams(self) -> Sequence[tuple[Any, BinaryIO]]:
        """stdout and stderr, each with the file in which it is kept."""
        return self._streams

    def ended(self) -> bool:
        """Whether the process has exited."""
        return self._child.poll() is not None

    def stop(self) -> None:
        """End the process group by INT, TERM and KILL."""
        process.stop_group(self._child, self._grace_s)

    def status(self, stopped: str | None) -> int | None:
        """Keep the rest of the output; returns the exit status, negative after a signal."""
        for pipe, file in self._streams:
            output.drain(pipe, file)
        return self._child.returncode


class OthersRanks:
    """Ranks that a launcher elsewhere starts here (over pdsh, mpirun's daemon, Slurm's), found by the cell's marker."""

    def __init__(self, marker: str, folder: CellDir) -> None:
        self._marker, self._folder = marker, folder
        self._next = 0.0
        self.pid: int | None = None

    def streams(self) -> Sequence[tuple[Any, BinaryIO]]:
        """None: the launcher has the ranks' output."""
        return ()

    def ended(self) -> bool:
        """Whether ranks have begun and none runs any more; processes are scanned every LOOK_S."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + LOOK_S
        begun = bool(self._folder.all_events())
        return begun and not process.marked(self._marker)

    def stop(self) -> None:
        """Does nothing: every process of the ranks carries the marker."""

    def status(self, stopped: str | None) -> int | None:
        """0 if all ranks have ended by themselves, else None."""
        return 0 if stopped in (None, Word.DONE) and ranks.all_ended(self._folder) else None


def _spawn(request: CellRequest, folder: CellDir) -> subprocess.Popen[bytes]:
    assert request.argv
    env = environment.of_engine(request)
    # What is ignored here, a child ignores too, unless it asks for the signal.
    with process.handling((signal.SIGUSR1, signal.SIGUSR2), signal.SIG_IGN):
        child = process.spawn(request.argv, env=env, cwd="/" if request.isolated else str(folder.path))
    if child.stdin:
        child.stdin.close()
    return child


def register(engine: Engine, selector: selectors.BaseSelector) -> None:
    """Have `selector` watch the engine's pipes, each with its file as data."""
    for pipe, file in engine.streams():
        selector.register(pipe, selectors.EVENT_READ, file)
