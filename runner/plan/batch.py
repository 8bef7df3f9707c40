"""Batch sizes: global batch = micro-batch × accumulation × ranks that do not share their data. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.errors import UsageError
from runner.plan.plan import Batch
from runner.plan.request import Request
from runner.system.wording import counted
from runner.workloads.deepspeed_config import split

SEQUENCES_PER_GPU = 16  # in a step, where neither settings nor the DeepSpeed file say


def batch_of(request: Request, params: Mapping[str, Any], num_nodes: int, world_size: int) -> Batch:
    """The batch of one cell, in sequences, from the test's settings `params` or else the DeepSpeed configuration.

    Weak scaling keeps the work per GPU: the configured global batch applies to the sweep's largest node count and
    shrinks with the number of nodes. Strong scaling keeps the global batch. Raises UsageError, with values that work,
    where the batch does not divide.
    """
    global_batch, micro_batch, accumulation = asked(request, params)
    most, parts = max(request.node_counts), split(request.deepspeed)
    if global_batch and request.scaling == "weak" and num_nodes != most:
        if global_batch * num_nodes % most:
            raise UsageError(
                f"weak scaling to {num_nodes} of {counted(most, 'node')}: a global batch of {global_batch} does not "
                f"divide; use a multiple of {most}, such as "
                f"--set sft.global_batch={_nearest_multiple(global_batch, most)}"
            )
        global_batch = global_batch * num_nodes // most
    if global_batch is None and request.scaling == "strong" and accumulation is None:
        global_batch = resolve_batch(None, micro_batch, None, most * request.gpus_per_node // parts).global_batch
    return resolve_batch(global_batch, micro_batch, accumulation, world_size // parts)


def asked(request: Request, params: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """(global batch, micro-batch, accumulation) of the test's settings or else of the DeepSpeed configuration.

    None is what both leave open.
    """
    file = request.deepspeed
    return (
        params["global_batch"] or _number(file, "train_batch_size"),
        params["micro_batch"] or _number(file, "train_micro_batch_size_per_gpu"),
        params["gradient_accumulation"] or _number(file, "gradient_accumulation_steps"),
    )


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None or value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f'DeepSpeed configuration: {key} = {value!r} is neither a whole number above 0 nor "auto"')
    return value


def resolve_batch(
    global_batch: int | None, micro_batch: int | None, accumulation: int | None, world_size: int
) -> Batch:
    """The batch that satisfies micro-batch × accumulation × world size = global batch, in sequences.

    A None is derived from the other sizes: the global batch from SEQUENCES_PER_GPU, and the micro-batch is 1 where the
    accumulation is open too. Raises UsageError, with the nearest values that work, where the sizes contradict each
    other.
    """
    if global_batch is None:
        if accumulation is None:
            micro_batch = micro_batch or 1
            accumulation = max(1, SEQUENCES_PER_GPU // micro_batch)
        micro_batch = micro_batch or max(1, SEQUENCES_PER_GPU // accumulation)
        return Batch(micro_batch * accumulation * world_size, micro_batch, accumulation)
    if accumulation is None:
        micro_batch = micro_batch or 1
        if global_batch % (micro_batch * world_size) == 0:
            return Batch(global_batch, micro_batch, global_batch // (micro_batch * world_size))
        raise UsageError(
            f"global batch {global_batch} is not {counted(micro_batch, 'sequence')} × a whole accumulation × "
            f"{counted(world_size, 'GPU')}; "
            f"nearest that works: --set sft.global_batch={_nearest_multiple(global_batch, micro_batch * world_size)}"
        )
    if micro_batch is None and global_batch % (accumulation * world_size) == 0:
        return Batch(global_batch, global_batch // (accumulation * world_size), accumulation)
    if micro_batch and micro_batch * accumulation * world_size == global_batch:
        return Batch(global_batch, micro_batch, accumulation)
    step = (micro_batch or 1) * world_size
    options = []
    if global_batch % step == 0:
        whole = global_batch // step  # accumulation × micro-batch, or accumulation alone where that is given
        near = whole if micro_batch else min(_divisors(whole), key=lambda n: (abs(n - accumulation), -n))
        options.append(f"sft.gradient_accumulation={near}")
    product = step * accumulation
    options.append(f"sft.global_batch={product if micro_batch else _nearest_multiple(global_batch, product)}")
    micro = micro_batch or "a whole micro-batch"
    raise UsageError(
        f"global batch {global_batch} is not {micro} × accumulation {accumulation} × {counted(world_size, 'GPU')}; "
        f"nearest that work: {' or '.join(f'--set {option}' for option in options)}"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest_multiple(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def with_batch(config: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration with the three batch sizes set."""
    return {
        **config,
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.gradient_accumulation,
    }
