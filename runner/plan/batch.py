"""Batch sizes: global batch = micro-batch × accumulation × ranks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.errors import UsageError
from runner.plan.plan import Batch
from runner.plan.request import Request
from runner.system.wording import counted


def batch_of(request: Request, params: Mapping[str, Any], num_nodes: int, world_size: int) -> Batch:
    """The batch of one cell, in sequences, from the test's settings `params` or else the DeepSpeed configuration.

    Weak scaling keeps the work per GPU: the configured global batch applies to the sweep's largest node count and
    shrinks with the number of nodes. Strong scaling keeps the global batch. Raises UsageError, with values that work,
    where the batch does not divide.
    """
    configured = request.deepspeed
    global_batch = params["global_batch"] or _number(configured, "train_batch_size")
    micro_batch = params["micro_batch"] or _number(configured, "train_micro_batch_size_per_gpu")
    accumulation = params["gradient_accumulation"] or _number(configured, "gradient_accumulation_steps") or 1
    most = max(request.node_counts)
    if global_batch and request.scaling == "weak" and num_nodes != most:
        if global_batch * num_nodes % most:
            raise UsageError(
                f"weak scaling to {num_nodes} of {counted(most, 'node')}: a global batch of {global_batch} does not "
                f"divide; use a multiple of {most}, such as "
                f"--set sft.global_batch={_nearest_multiple(global_batch, most)}"
            )
        global_batch = global_batch * num_nodes // most
    return resolve_batch(global_batch, micro_batch, accumulation, world_size)


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None or value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f'DeepSpeed configuration: {key} = {value!r} is neither a whole number above 0 nor "auto"')
    return value


def resolve_batch(global_batch: int | None, micro_batch: int | None, accumulation: int, world_size: int) -> Batch:
    """The batch that satisfies micro-batch × accumulation × world size = global batch, in sequences.

    A None is derived from the other sizes (the micro-batch is 1 where both are None). Raises UsageError, with the
    nearest values that work, where the sizes contradict each other.
    """
    if global_batch is None:
        micro_batch = micro_batch or 1
        return Batch(micro_batch * accumulation * world_size, micro_batch, accumulation)
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
