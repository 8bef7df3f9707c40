"""The rate of matrix products on this GPU, in the shapes of a model: what training cannot exceed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from runner.workloads.gpu.products import ON_CPU, ON_GPU, Product, Shape, weights

SAMPLES = 5
SAMPLE_S = 0.004  # of one sample on a GPU: much longer than it takes to start a kernel


def seconds_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """The time of one product of this shape."""
    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    product = Product(shape, dtype, device, seed=0)  # which loads the kernel

    def sample(repeats: int) -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            product.run()
        synchronize()
        return (time.perf_counter() - started) / repeats

    sample(2 if on_gpu else 1)
    repeats = max(1, round(SAMPLE_S / sample(1))) if on_gpu else 1
    return statistics.median(sample(repeats) for _ in range(SAMPLES))


def tflop_per_s(
    model: Mapping[str, Any],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    measure: Callable[[Shape, torch.device, torch.dtype], float] = seconds_of,
) -> float:
    """TFLOP/s of this GPU over the products of a forward pass of `tokens` tokens, on random numbers of `dtype`.

    The median of some samples for each shape; a shape counts by its share of the arithmetic. It takes some tenths of a
    second, and its memory is free again. On a CPU the shapes are cut, and the rate is no ceiling of anything.
    """
    on_gpu = device.type == "cuda"
    total_flop = total_s = 0.0
    for inputs, outputs, number in weights(model):
        # At most 2 GiB of results of 16 bits.
        rows = min(tokens, ON_GPU, max(1, (1 << 30) // outputs))
        if not on_gpu:
            rows, inputs, outputs = (min(size, ON_CPU) for size in (rows, inputs, outputs))
        shape = Shape(rows, inputs, outputs, number)
        # Of one row, since not every product has as many.
        total_flop += shape.flop / rows * number
        total_s += measure(shape, device, dtype) / rows * number
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return total_flop / total_s / 1e12
