"""The rate of matrix products on this GPU, in the shapes of a model: what training cannot exceed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

SAMPLES = 5
SAMPLE_S = 0.004  # of one sample on a GPU: much longer than it takes to start a kernel
ON_GPU = 16384  # the most rows of a product: more are no faster
ON_CPU = 256  # the most in any direction, where the rate is only to be of the right magnitude


def shapes(model: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(inputs, outputs, number) of the matrices of `model`, which has the fields of configs/models/."""
    hidden, inner, layers = model["hidden_size"], model["intermediate_size"], model["num_layers"]
    yield hidden, hidden, 2 * layers  # queries, output of attention
    yield hidden, hidden * model["num_kv_heads"] // model["num_heads"], 2 * layers  # keys, values
    yield hidden, inner, 2 * layers  # gate, up
    yield inner, hidden, layers  # down
    yield hidden, model["vocab_size"], 1  # the head


def seconds_of(rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> float:
    """The time of one product [rows, inputs] · [outputs, inputs]ᵀ, as a layer computes it."""
    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    draw = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, generator=draw, device=device, dtype=torch.float32).to(dtype)
        for size in ((rows, inputs), (outputs, inputs))
    )
    result = torch.empty((rows, outputs), device=device, dtype=dtype)

    def sample(repeats: int) -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right.T, out=result)
        synchronize()
        return (time.perf_counter() - started) / repeats

    sample(3 if on_gpu else 1)  # loads the kernel
    repeats = max(1, round(SAMPLE_S / sample(1))) if on_gpu else 1
    return statistics.median(sample(repeats) for _ in range(SAMPLES))


def tflop_per_s(
    model: Mapping[str, Any],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    measure: Callable[[int, int, int, torch.device, torch.dtype], float] = seconds_of,
) -> float:
    """TFLOP/s of this GPU over the products of a forward pass of `tokens` tokens, on random numbers of `dtype`.

    The median of some samples for each shape; a shape counts by its share of the arithmetic. It takes some tenths of a
    second, and its memory is free again. On a CPU the shapes are cut, and the rate is no ceiling of anything.
    """
    on_gpu = device.type == "cuda"
    total_flop = total_s = 0.0
    for inputs, outputs, number in shapes(model):
        # At most 2 GiB of results of 16 bits.
        rows = min(tokens, ON_GPU, max(1, (1 << 30) // outputs))
        if not on_gpu:
            rows, inputs, outputs = (min(size, ON_CPU) for size in (rows, inputs, outputs))
        # Of one row, since not every product has as many.
        total_flop += 2 * inputs * outputs * number
        total_s += measure(rows, inputs, outputs, device, dtype) / rows * number
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return total_flop / total_s / 1e12
