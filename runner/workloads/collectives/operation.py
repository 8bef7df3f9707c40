"""A timed operation (a collective or a copy), and the measurement of its iterations."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Operation:
    """One collective, or one copy, at one size.

    `reset` restores the buffers (the output to invalid values), `run` is what is timed, and afterwards `output` must
    equal `expected`. With `round_trips`, one `run` sends in both directions, one after the other.
    """

    collective: str
    size_bytes: int
    reset: Callable[[], object]
    run: Callable[[], object]
    output: torch.Tensor | None = None
    expected: torch.Tensor | None = None
    round_trips: bool = False

    def wrong_values(self) -> int:
        """The number of elements of this rank's output that differ from the expected ones. NaN is wrong."""
        if self.output is None or self.expected is None:
            return 0
        return int((self.output != self.expected).sum())


def timed(operation: Operation, iters: int, on_gpu: bool) -> Sequence[float]:
    """The time in µs of each of `iters` iterations on this rank, by the GPU's clock if `on_gpu`."""
    return (_times_on_gpu if on_gpu else _times_on_host)(operation, iters)


def _times_on_host(operation: Operation, iters: int) -> Sequence[float]:
    elapsed_us = array("d")  # a long measurement has millions of times
    for _ in range(iters):
        operation.reset()
        started = time.perf_counter()
        operation.run()
        elapsed_us.append((time.perf_counter() - started) * 1e6)
    return elapsed_us


def _times_on_gpu(operation: Operation, iters: int) -> Sequence[float]:
    """Times by CUDA events on the stream: the host runs ahead, so that launching does not add to them."""
    import torch

    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iters)]
    for before, after in pairs:
        operation.reset()
        before.record()
        operation.run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e3 for before, after in pairs]
