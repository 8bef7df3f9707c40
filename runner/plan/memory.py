"""The memory that training needs on one GPU. Pure.

Where the need depends on what the nodes have installed (fused kernels, for example), the smaller need is assumed. An
unknown kind of configuration has no estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runner.cluster.limits import GIB, MemoryEstimate, memory_estimate, parameters
from runner.plan.plan import Cell, Plan
from runner.plan.zero import zero_of
from runner.workloads.deepspeed_config import section

_ADAM = ("adam", "adamw")


def estimate(
    model: Mapping[str, Any],
    hardware: Mapping[str, Any],
    deepspeed: Mapping[str, Any],
    params: Mapping[str, Any],
    world_size: int,
    micro_batch: int,
) -> MemoryEstimate | None:
    """The memory in GiB that one GPU needs to train `model`; None for an unknown kind of DeepSpeed configuration.

    `params` are the settings of the test, including `seq_len` in tokens; `hardware` has `gpu_memory_gib` (0: unknown);
    `micro_batch` is in sequences.
    """
    zero = zero_of(deepspeed)
    kind = str(section(deepspeed, "optimizer").get("type")).lower()
    halved = any(  # master weights, and so the optimizer's states, in 16 bits
        value is True and "master_weights" in key
        for dtype in ("bf16", "fp16")
        for key, value in section(deepspeed, dtype).items()
    )
    if zero is None or kind not in _ADAM or halved:
        return None
    recompute = params.get("recompute", "auto")  # plans of earlier versions left that to the ranks
    accumulated = section(deepspeed, "data_types").get("grad_accum_dtype")
    found = memory_estimate(
        model,
        world_size,
        params["seq_len"],
        micro_batch,
        hardware["gpu_memory_gib"],
        zero.stage,
        recompute="full" if recompute == "auto" else recompute,
        inputs_offloaded=bool(section(deepspeed, "activation_checkpointing").get("cpu_checkpointing")),
        fused_loss=str(params["liger"]).lower() != "false",
        # DeepSpeed accumulates in bf16 unless it is given fp32. ZeRO-3's step adds fp32 copies, a group at a time.
        gradient=4 if zero.stage == 3 or accumulated == "fp32" else 2,
        optimizer_offloaded=zero.optimizer_offloaded,
        weights_offloaded=zero.weights_offloaded,
    )
    second = 2 * parameters(model).total / zero.hpz if zero.hpz > 1 else 0  # hpZ: a copy for every group of ranks
    return replace(found, states=found.states + second / GIB)


def of_cell(plan: Plan, cell: Cell) -> MemoryEstimate | None:
    """The estimate for a cell of `plan`; None where the cell does not train on a GPU."""
    if cell.batch is None or cell.model is None or cell.deepspeed is None or cell.device != "cuda":
        return None
    model = plan.models[cell.model]
    return estimate(model, plan.hardware, cell.deepspeed, cell.params, cell.world_size, cell.batch.micro_batch)


def causes(found: MemoryEstimate) -> str:
    """The parts of an estimate as text, largest first, in GiB: `model states 14.1, working 3.4`."""
    parts = {
        "model states": found.states,
        "activations": found.activations,
        "logits": found.logits,
        "working": found.working,
    }
    return ", ".join(f"{name} {gib:.1f}" for name, gib in sorted(parts.items(), key=lambda p: -p[1]) if gib >= 0.05)
