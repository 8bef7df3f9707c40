"""Test `torch`: collectives over torch.distributed, the same code on NCCL and gloo.

Each collective is measured at sizes from `min_bytes` to `max_bytes`. The time of one operation is the
slowest rank's, iteration by iteration; its median gives the bandwidths. Sizes and bandwidths follow
nccl-tests (PERFORMANCE.md): algbw = size ÷ time, size being the larger of the two buffers, and busbw
scales it by what the wires carry. Results are compared with exact integers; each rank contributes different data.

A single rank has no peer and sends nothing: it measures copies of its device instead (`copies`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from runner.cluster.limits import busbw_factor
from runner.results.statistics import quantile
from runner.workloads.collectives import copies
from runner.workloads.collectives.operation import Operation, timed
from runner.workloads.job import Events, RankJob

if TYPE_CHECKING:
    import torch

# Longer than any operation takes, shorter than a person waits for a job that hangs.
PATIENCE = timedelta(minutes=10)
# Integers up to this are exact in the type, so sums do not depend on the order of the ranks.
_EXACT = {"float32": 1 << 24, "bfloat16": 1 << 8, "float16": 1 << 11}
# Odd moduli: a block that is off by a power of two elements is detected as wrong.
_MODULI = (251, 127, 61, 31, 13, 7, 5, 3)


@dataclass(frozen=True)
class World:
    """This rank among the others, and the device and type of its tensors."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    far_rank: int  # first rank of the second node, or rank 1 where there is one node


def run(job: RankJob, events: Events) -> None:
    """Measure every collective in `job.params` at every size, or the device's copies if this is the only rank.

    Rank 0 writes the values to `events`. Raises what torch.distributed raises, such as a timeout after 10 minutes.
    """
    import torch
    import torch.distributed as dist

    on_gpu = job.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if job.world_size == 1:
        copies.run(job, events, device)
        return
    # With a device, NCCL's communicator is made now rather than in the first collective.
    dist.init_process_group(job.comm_backend, timeout=PATIENCE, device_id=device if on_gpu else None)
    params = job.params
    world = World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        dtype=getattr(torch, params["dtype"]),
        far_rank=job.gpus_per_node if job.num_nodes > 1 else 1,
    )
    sizes = message_sizes(params["min_bytes"], params["max_bytes"], params["factor"])
    todo = schedule(params["collectives"], sizes, world)
    for done, (name, share) in enumerate(todo):
        events.progress(done, len(todo), name)
        operation = _BUILDERS[name](world, share)
        times_us, wrong = measure(operation, params["warmup"], params["iters"], world)
        if world.rank == 0:
            emit(events, operation, times_us, wrong, world.size, params["dtype"])
        del operation  # frees its buffers before those of the next are allocated
    events.progress(len(todo), len(todo), "done")
    if on_gpu:
        # Only after success: it would wait for an operation outstanding on some rank. Not gloo's: torch 2.3 holds
        # Python's lock while it waits for a thread that may wait for that lock. The process ends now anyway.
        dist.destroy_process_group()


def message_sizes(min_bytes: int, max_bytes: int, factor: int) -> list[int]:
    """Message sizes in bytes: `min_bytes`, each `factor` times the previous one, and `max_bytes` as the last."""
    sizes = []
    size = min_bytes
    while size < max_bytes:
        sizes.append(size)
        size *= factor
    return [*sizes, max_bytes]


def schedule(collectives: Sequence[str], sizes: Sequence[int], world: World) -> list[tuple[str, int]]:
    """(collective, number of elements in one rank's share) in the order of measuring; `sizes` are in bytes.

    A size is rounded down to whole elements, the same number for each rank where ranks have shares, but at least
    one: with 8 ranks of float32, 8 bytes become 32. Operation.size_bytes is the actual size.
    """
    todo = []
    for name in collectives:
        if name == "barrier":
            todo.append((name, 0))
            continue
        ranks = world.size if name in ("all_gather", "reduce_scatter", "all_to_all") else 1
        shares = [max(1, size // (ranks * world.dtype.itemsize)) for size in sizes]
        todo += [(name, share) for share in dict.fromkeys(shares)]
    return todo


def pattern(world: World, rank: int, start: int, count: int) -> torch.Tensor:
    """Elements [start, start + count) of the data that `rank` contributes, as a tensor [count] of `world.dtype`.

    They are integers that differ by rank and position, small enough that their sum over all ranks is exact.
    """
    import torch

    exact = _EXACT[str(world.dtype).removeprefix("torch.")]
    modulus = next((m for m in _MODULI if (m - 1) * world.size <= exact), 2)
    # 17 is no multiple of any modulus: neighbouring ranks always differ.
    period = torch.arange(modulus, device=world.device).add_(start + 17 * rank).remainder_(modulus)
    return period.to(world.dtype).repeat(-(-count // modulus))[:count]


def _all_reduce(world: World, share: int) -> Operation:
    import torch.distributed as dist

    source = pattern(world, world.rank, 0, share)
    expected = sum((pattern(world, rank, 0, share) for rank in range(1, world.size)), pattern(world, 0, 0, share))
    buffer = source.clone()
    return Operation(
        "all_reduce",
        buffer.nbytes,
        reset=lambda: buffer.copy_(source),
        run=lambda: dist.all_reduce(buffer),
        output=buffer,
        expected=expected,
    )


def _all_gather(world: World, share: int) -> Operation:
    import torch
    import torch.distributed as dist

    # torch 2.13 renamed it and warns about the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    source = pattern(world, world.rank, 0, share)
    output = torch.empty(share * world.size, dtype=world.dtype, device=world.device)
    return Operation(
        "all_gather",
        output.nbytes,
        reset=lambda: output.fill_(-1),
        run=lambda: all_gather(output, source),
        output=output,
        expected=torch.cat([pattern(world, rank, 0, share) for rank in range(world.size)]),
    )


def _reduce_scatter(world: World, share: int) -> Operation:
    import torch
    import torch.distributed as dist

    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    source = pattern(world, world.rank, 0, share * world.size)
    output = torch.empty(share, dtype=world.dtype, device=world.device)
    mine = world.rank * share
    expected = sum((pattern(world, rank, mine, share) for rank in range(1, world.size)), pattern(world, 0, mine, share))
    return Operation(
        "reduce_scatter",
        source.nbytes,
        reset=lambda: output.fill_(-1),
        run=lambda: reduce_scatter(output, source),
        output=output,
        expected=expected,
    )


def _all_to_all(world: World, share: int) -> Operation:
    import torch
    import torch.distributed as dist

    source = pattern(world, world.rank, 0, share * world.size)
    output = torch.empty_like(source)
    mine = world.rank * share
    return Operation(
        "all_to_all",
        source.nbytes,
        reset=lambda: output.fill_(-1),
        run=lambda: dist.all_to_all_single(output, source),
        output=output,
        expected=torch.cat([pattern(world, rank, mine, share) for rank in range(world.size)]),
    )


def _broadcast(world: World, share: int) -> Operation:
    import torch.distributed as dist

    expected = pattern(world, 0, 0, share)
    buffer = expected.clone()
    return Operation(
        "broadcast",
        buffer.nbytes,
        reset=lambda: None if world.rank == 0 else buffer.fill_(-1),
        run=lambda: dist.broadcast(buffer, src=0),
        output=buffer,
        expected=expected,
    )


def _send_recv(world: World, share: int) -> Operation:
    """Every GPU sends to the same GPU of the next node and receives from that of the previous node.

    Between nodes this loads all NICs in both directions at once; a ring over neighbouring ranks, as in
    nccl-tests, crosses each node's boundary with one flow, which one NIC carries. Inside one node it is
    that ring.
    """
    import torch
    import torch.distributed as dist

    after, before = (world.rank + world.far_rank) % world.size, (world.rank - world.far_rank) % world.size
    source = pattern(world, world.rank, 0, share)
    output = torch.empty_like(source)

    def exchange() -> None:
        pair = [dist.P2POp(dist.isend, source, after), dist.P2POp(dist.irecv, output, before)]
        for request in dist.batch_isend_irecv(pair):
            request.wait()

    return Operation(
        "send_recv",
        source.nbytes,
        reset=lambda: output.fill_(-1),
        run=exchange,
        output=output,
        expected=pattern(world, before, 0, share),
    )


def _ping_pong(world: World, share: int) -> Operation:
    """Rank 0 sends to one rank on another node, which then sends its data back; other ranks do nothing."""
    import torch
    import torch.distributed as dist

    ends = (0, world.far_rank)
    mine = pattern(world, world.rank, 0, share)
    theirs = torch.empty_like(mine)

    def there_and_back() -> None:
        if world.rank == ends[0]:
            dist.send(mine, ends[1])
            dist.recv(theirs, ends[1])
        elif world.rank == ends[1]:
            dist.recv(theirs, ends[0])
            dist.send(mine, ends[0])

    takes_part = world.rank in ends
    return Operation(
        "ping_pong",
        mine.nbytes,
        reset=lambda: theirs.fill_(-1),
        run=there_and_back,
        output=theirs if takes_part else None,
        expected=pattern(world, ends[1] if world.rank == ends[0] else ends[0], 0, share) if takes_part else None,
        round_trips=True,
    )


def _barrier(world: World, share: int) -> Operation:
    import torch.distributed as dist

    return Operation("barrier", 0, reset=lambda: None, run=dist.barrier)


_BUILDERS: dict[str, Callable[[World, int], Operation]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send_recv": _send_recv,
    "ping_pong": _ping_pong,
    "barrier": _barrier,
}


def measure(operation: Operation, warmup: int, iters: int, world: World) -> tuple[list[float], int]:
    """(time of each iteration in µs on its slowest rank, wrong elements over all ranks); the same on every rank.

    A round trip counts half its time. The result is checked before and after timing, to find faults of the first
    operation as well as those that appear under load.
    """
    import torch
    import torch.distributed as dist

    operation.reset()
    operation.run()
    wrong = operation.wrong_values()
    for _ in range(warmup):
        operation.reset()
        operation.run()
    dist.barrier()
    on_gpu = world.device.type == "cuda" and operation.collective != "barrier"  # a barrier ends on the host
    times_us = timed(operation, iters, on_gpu)
    wrong += operation.wrong_values()
    # Exchanged only after timing, so that nothing but the operation itself runs between two iterations.
    slowest = torch.tensor(times_us, dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    wrong_everywhere = torch.tensor(wrong, dtype=torch.int64, device=world.device)
    dist.all_reduce(wrong_everywhere)
    legs = 2 if operation.round_trips else 1
    return [us / legs for us in slowest.tolist()], int(wrong_everywhere)


def emit(
    events: Events, operation: Operation, times_us: Sequence[float], wrong: int, world_size: int, dtype: str
) -> None:
    """Write one operation's latencies (µs), bandwidths (GB/s, by the median time) and number of wrong elements.

    A barrier has only latencies. algbw = size ÷ time; busbw = algbw × `busbw_factor`.
    """
    context = {
        "collective": operation.collective,
        "size_bytes": operation.size_bytes,
        "iters": len(times_us),
        "dtype": dtype,
    }
    median = quantile(times_us, 0.5)
    events.value("latency_us_p50", median, **context)
    events.value("latency_us_p99", quantile(times_us, 0.99), **context)
    if operation.collective == "barrier":
        return
    algbw = operation.size_bytes / (median * 1e3)  # B per ns is GB/s
    events.value("algbw_gb_per_s", algbw, **context)
    events.value("busbw_gb_per_s", algbw * busbw_factor(operation.collective, world_size), **context)
    events.value("wrong_values", wrong, **context)
