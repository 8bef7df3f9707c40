"""Copies within a GPU, between it and its host, and between GPUs of a node: rates in GB/s, and every word compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from runner.workloads.gpu import numa
from runner.workloads.gpu.device import Device, Gpu, HostBuffer, Pair, Waits, seconds

BLOCK_S = 0.01  # of a block of copies: much longer than it takes to start one
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # so that each word differs from its neighbours in about half of its bits


def pattern(size_bytes: int, seed: int, device: torch.device) -> torch.Tensor:
    """`size_bytes` of 64-bit words that any device computes alike, and that differ with the seed."""
    return torch.arange(size_bytes // 8, device=device).add_(seed).mul_(ODD)


def rates(on: Waits, copy: Callable[[], object], size_bytes: int, blocks: int) -> list[float]:
    """The rates of `blocks` blocks of copies of `size_bytes`, in GB/s."""
    seconds(on, copy, 1)
    repeats = max(1, round(BLOCK_S / seconds(on, copy, 1)))
    return [size_bytes * repeats / seconds(on, copy, repeats) / 1e9 for _ in range(blocks)]


def within(device: Device, size_bytes: int, blocks: int, seed: int) -> tuple[list[float], int]:
    """(Rates in GB/s of a copy within the device's memory, in which each byte is read and written; wrong words)."""
    source = pattern(size_bytes, seed, device.place)
    target = torch.zeros_like(source)
    found = rates(device, partial(target.copy_, source), 2 * size_bytes, blocks)
    return found, int((target != source).sum())


@dataclass
class HostCopies:
    """Copies between a GPU and pinned buffers of its host, of which one is near the GPU and one far from it.

    Buffers are made and compared outside of `measure`, which has the host for itself for as long as it takes.
    """

    device: Gpu
    size_bytes: int
    seed: int
    local: int | None  # the GPU's node

    def __post_init__(self) -> None:
        known = numa.nodes()
        places = numa.near_and_far(self.local, known)
        self._buffers = [HostBuffer(self.size_bytes, node, known[node]) for node in places]
        self._is_only = len(known) == 1
        self._words = pattern(self.size_bytes, self.seed, torch.device("cpu"))
        self._there = [torch.zeros(len(self._words), dtype=torch.int64, device=self.device.place) for _ in places]
        for buffer in self._buffers:
            buffer.words.copy_(self._words)

    def measure(self, blocks: int) -> Iterator[tuple[str, Mapping[str, Any], list[float]]]:
        """(Metric, where its host buffer is, rates in GB/s) of each direction and buffer."""
        for buffer, there in zip(self._buffers, self._there, strict=True):
            place = {"numa": buffer.node, "local": self._is_local(buffer.node)}
            up = rates(self.device, partial(there.copy_, buffer.words, non_blocking=True), self.size_bytes, blocks)
            yield "host_to_device_gb_per_s", place, up
            buffer.words.zero_()
            down = rates(self.device, partial(buffer.words.copy_, there, non_blocking=True), self.size_bytes, blocks)
            yield "device_to_host_gb_per_s", place, down

    def _is_local(self, node: int) -> bool | None:
        """None where it is not known which node the GPU is at, unless there is one only."""
        if self._is_only:
            return True
        return None if self.local is None else node == self.local

    def wrong(self) -> Iterator[tuple[str, int]]:
        """(Direction, wrong words) of each, after `measure`; then the buffers are gone."""
        expected = pattern(self.size_bytes, self.seed, self.device.place)
        for buffer, there in zip(self._buffers, self._there, strict=True):
            yield "host to device", int((there != expected).sum())
            yield "device to host", int((buffer.words != self._words).sum())
            buffer.free()
        self._buffers, self._there = [], []


def between(
    device: Gpu, gpus: Sequence[int], size_bytes: int, blocks: int, seed: int
) -> Iterator[tuple[Pair, list[float], int]]:
    """(Pair, rates in GB/s, wrong words) of each pair of a node's GPUs, which `gpus` names by CUDA's numbers."""
    for source in gpus:
        with device.named(f"asking GPU {source} of its node"):
            words = pattern(size_bytes, seed + source, torch.device("cuda", source))
        for target in (gpu for gpu in gpus if gpu != source):
            pair = Pair(source, target)
            with device.named(f"copying from GPU {source} to GPU {target} of its node"):
                there = torch.zeros_like(words, device=torch.device("cuda", target))
                found = rates(pair, partial(there.copy_, words, non_blocking=True), size_bytes, blocks)
                expected = pattern(size_bytes, seed + source, there.device)
                yield pair, found, int((there != expected).sum())
