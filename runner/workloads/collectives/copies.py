"""The measurement of a single rank: copies within its device, and between a GPU and its host.

Each copy is made at one size, the largest that is configured, since smaller ones measure the cost of starting a copy.
The median time gives the rate. The copied bytes are compared with the expected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from runner.results.statistics import quantile
from runner.workloads.collectives.operation import Operation, timed
from runner.workloads.job import Events, RankJob

if TYPE_CHECKING:
    import torch

# A larger copy between host and GPU is no faster, and its host memory is pinned: not available to others on the node.
HOST_COPY_BYTES = 256 << 20
# How often the rate counts each byte of a copy: within a device each byte is both read and written.
COUNTED = {"copy": 2, "host_to_device": 1, "device_to_host": 1}


def run(job: RankJob, events: Events, device: torch.device) -> None:
    """Measure each copy that `device` can make, and write its rate in GB/s and number of wrong bytes to `events`."""
    import torch

    params = job.params
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    todo = sizes(params["max_bytes"], free_bytes)
    for done, (name, size_bytes) in enumerate(todo.items()):
        events.progress(done, len(todo), name)
        operation = _operation(name, size_bytes, device)
        times_us, wrong = measure(operation, params["warmup"], params["iters"], device)
        emit(events, name, size_bytes, times_us, wrong)
        del operation  # frees its buffers before those of the next are allocated
    events.progress(len(todo), len(todo), "done")


def sizes(max_bytes: int, free_bytes: int | None) -> dict[str, int]:
    """Copy name -> its size in bytes: `max_bytes`, halved until source, target and their comparison fit on the GPU.

    `free_bytes` is the GPU's free memory, None on a CPU.
    """
    if free_bytes is None:
        return {"copy": max_bytes}
    size_bytes = max_bytes
    while 4 * size_bytes > free_bytes:
        size_bytes //= 2
    host_bytes = min(size_bytes, HOST_COPY_BYTES)
    return {"copy": size_bytes, "host_to_device": host_bytes, "device_to_host": host_bytes}


def _operation(name: str, size_bytes: int, device: torch.device) -> Operation:
    """The copy of this name. Its target is filled with a byte value that the source does not contain."""
    import torch

    def buffer(on_host: bool) -> torch.Tensor:
        where = torch.device("cpu") if on_host else device
        pinned = on_host and device.type == "cuda"  # from pageable memory, CUDA would copy to a pinned buffer first
        return torch.full((size_bytes,), 255, dtype=torch.uint8, device=where, pin_memory=pinned)

    source, target = buffer(name == "host_to_device"), buffer(name == "device_to_host")
    period = torch.arange(251, dtype=torch.uint8, device=source.device)
    source.copy_(period.repeat(-(-size_bytes // 251))[:size_bytes])
    return Operation(
        name,
        size_bytes,
        reset=lambda: None,  # nothing but the copy itself shares the memory's bandwidth
        run=lambda: target.copy_(source, non_blocking=True),
        output=target,
        expected=source,
    )


def measure(operation: Operation, warmup: int, iters: int, device: torch.device) -> tuple[Sequence[float], int]:
    """(time of each iteration in µs, number of wrong bytes). The result is checked before and after timing."""
    on_gpu = device.type == "cuda"
    operation.run()
    wrong = _wrong_bytes(operation, on_gpu)
    for _ in range(warmup):
        operation.run()
    times_us = timed(operation, iters, on_gpu)
    return times_us, wrong + _wrong_bytes(operation, on_gpu)


def _wrong_bytes(operation: Operation, on_gpu: bool) -> int:
    import torch

    assert operation.output is not None and operation.expected is not None
    if on_gpu:
        torch.cuda.synchronize()
    return int((operation.output != operation.expected.to(operation.output.device)).sum())


def emit(events: Events, name: str, size_bytes: int, times_us: Sequence[float], wrong: int) -> None:
    """Write one copy's rate in GB/s, by the median of `times_us`, and its number of wrong bytes.

    `wrong_values` has the copy's name as `collective`, so that a finding can name it.
    """
    context = {"size_bytes": size_bytes, "iters": len(times_us)}
    nanoseconds = quantile(times_us, 0.5) * 1e3  # B per ns is GB/s
    events.value(f"{name}_gb_per_s", COUNTED[name] * size_bytes / nanoseconds, **context)
    events.value("wrong_values", wrong, collective=name, **context)
