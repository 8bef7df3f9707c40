"""What the planner needs to know of a DeepSpeed configuration: how it divides a model's states. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.workloads.deepspeed_config import section

_SPLIT = {"tensor_parallel", "sequence_parallel_size"}  # sections that divide a model or a sequence in other ways


@dataclass(frozen=True)
class Zero:
    """`zero_optimization` as DeepSpeed reads it. `hpz`: the number of ranks that share a second copy of the weights."""

    stage: int
    overlaps: bool  # communication with computation
    hpz: int
    quantized_weights: bool
    quantized_gradients: bool
    optimizer_offloaded: bool
    weights_offloaded: bool


def zero_of(deepspeed: Mapping[str, Any]) -> Zero | None:
    """The states' division by a DeepSpeed configuration; None for one of an unknown kind."""
    zero = section(deepspeed, "zero_optimization")
    stage, hpz = zero.get("stage", 0), zero.get("zero_hpz_partition_size", 1)
    readable = isinstance(deepspeed.get("zero_optimization", {}), Mapping) and stage in (0, 1, 2, 3)
    readable = readable and isinstance(hpz, int) and not _SPLIT & deepspeed.keys()
    if not readable or any(key.startswith("cpu_offload") for key in zero):  # DeepSpeed's former names
        return None
    overlaps = zero.get("overlap_comm")
    return Zero(
        stage=stage,
        overlaps=stage == 3 if overlaps is None else bool(overlaps),
        hpz=max(hpz, 1) if stage == 3 else 1,
        quantized_weights=stage == 3 and bool(zero.get("zero_quantized_weights")),
        quantized_gradients=stage == 3 and bool(zero.get("zero_quantized_gradients")),
        optimizer_offloaded=stage > 0 and offloads(zero, "offload_optimizer"),
        weights_offloaded=stage == 3 and offloads(zero, "offload_param"),
    )


def offloads(zero: Mapping[str, Any], name: str) -> bool:
    """Whether this section of `zero_optimization` keeps something in host memory or on a disk."""
    return section(zero, name).get("device", "none") not in (None, "none")
