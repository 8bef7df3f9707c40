"""Whether a model fits into the memory of the GPUs that are to train it. Pure.

Only what certainly needs too much is refused. Where the need depends on what the nodes have installed (fused kernels,
for example), the smaller need is assumed, and an unknown kind of configuration is not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from runner.cluster.limits import MemoryEstimate, memory_estimate
from runner.errors import UsageError
from runner.plan.batch import batch_of
from runner.plan.plan import Batch, Cell, Plan
from runner.plan.request import Request
from runner.system.wording import counted

# The ratio of needed to available memory above which a cell is refused. The estimate was too high by this factor where
# it was compared with a measurement (7B on one H200: 117 GiB estimated, 106.5 measured): of the 18 B per parameter
# that it counts under ZeRO-3, DeepSpeed holds 16 permanently. A wider margin would let a 70B start on 8 H200 (111 %).
MARGIN = 1.1
MOST_NODES = 1024  # the largest number of nodes that is tried as one that fits
_ADAM = ("adam", "adamw")
_SPLIT = {"tensor_parallel", "sequence_parallel_size"}  # sections that divide a model or a sequence in other ways


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
    zero = _section(deepspeed, "zero_optimization")
    stage = zero.get("stage", 0)
    kind = str(_section(deepspeed, "optimizer").get("type")).lower()
    halved = any(  # master weights, and so the optimizer's states, in 16 bits
        value is True and "master_weights" in key
        for dtype in ("bf16", "fp16")
        for key, value in _section(deepspeed, dtype).items()
    )
    readable = isinstance(deepspeed.get("zero_optimization", {}), Mapping) and stage in (0, 1, 2, 3)
    readable = readable and not any(key.startswith("cpu_offload") for key in zero)  # DeepSpeed's former names
    if not readable or kind not in _ADAM or halved or _SPLIT & deepspeed.keys():
        return None
    accumulated = _section(deepspeed, "data_types").get("grad_accum_dtype")
    return memory_estimate(
        model,
        world_size,
        params["seq_len"],
        micro_batch,
        hardware["gpu_memory_gib"],
        stage,
        recompute=params["recompute"] != "none",
        inputs_offloaded=bool(_section(deepspeed, "activation_checkpointing").get("cpu_checkpointing")),
        fused_loss=str(params["liger"]).lower() != "false",
        # DeepSpeed accumulates in bf16 unless it is given fp32. ZeRO-3's step adds fp32 copies, a group at a time.
        gradient=4 if stage == 3 or accumulated == "fp32" else 2,
        optimizer_offloaded=stage > 0 and _offloads(zero, "offload_optimizer"),
        weights_offloaded=stage == 3 and _offloads(zero, "offload_param"),
    )


def of_cell(plan: Plan, cell: Cell) -> MemoryEstimate | None:
    """The estimate for a cell of `plan`; None where the cell does not train on a GPU."""
    if cell.batch is None or cell.model is None or cell.deepspeed is None or cell.device != "cuda":
        return None
    model = plan.models[cell.model]
    return estimate(model, plan.hardware, cell.deepspeed, cell.params, cell.world_size, cell.batch.micro_batch)


def refuse(request: Request, params: Mapping[str, Any], num_nodes: int, batch: Batch) -> None:
    """Raise UsageError where a cell of `request` on `num_nodes` nodes needs more memory than its GPUs have.

    The error gives the need in GiB by cause and the options that would fit. Nothing is refused without a GPU or where
    its memory is unknown.
    """
    found = _estimate(request, params, num_nodes, batch)
    if found is None or not found.available or found.needed <= MARGIN * found.available:
        return
    nodes, ranks = counted(num_nodes, "node"), counted(num_nodes * request.gpus_per_node, "rank")
    ways = list(_ways(request, params, num_nodes, batch))
    raise UsageError(
        f"model {request.model['name']} on {nodes} ({ranks}, micro-batch "
        f"{batch.micro_batch} × {params['seq_len']} tokens) needs about {found.needed:.0f} GiB per GPU "
        f"({causes(found)}), {request.hardware['name']} has {found.available:g} GiB; "
        + (f"what fits: {'; or '.join(ways)}" if ways else "no number of nodes and no smaller batch fits")
    )


def causes(found: MemoryEstimate) -> str:
    """The parts of an estimate as text, largest first, in GiB: `model states 14.1, working 3.4`."""
    parts = {
        "model states": found.states,
        "activations": found.activations,
        "logits": found.logits,
        "working": found.working,
    }
    return ", ".join(f"{name} {gib:.1f}" for name, gib in sorted(parts.items(), key=lambda p: -p[1]) if gib >= 0.05)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    """Whether this section of `zero_optimization` keeps something in host memory or on a disk."""
    return _section(zero, name).get("device", "none") not in (None, "none")


def _estimate(request: Request, params: Mapping[str, Any], num_nodes: int, batch: Batch) -> MemoryEstimate | None:
    if request.device != "cuda":
        return None
    world_size = num_nodes * request.gpus_per_node
    return estimate(request.model, request.hardware, request.deepspeed, params, world_size, batch.micro_batch)


def _fits(request: Request, params: Mapping[str, Any]) -> bool:
    """Whether every node count of `request` has a batch and fits by the estimate, without a margin."""
    for num_nodes in request.node_counts:
        try:
            batch = batch_of(request, params, num_nodes, num_nodes * request.gpus_per_node)
        except UsageError:
            return False
        found = _estimate(request, params, num_nodes, batch)
        if found is None or not found.fits:
            return False
    return True


def _ways(request: Request, params: Mapping[str, Any], num_nodes: int, batch: Batch) -> Iterator[str]:
    """Options that change the request so that it fits; each one suffices alone."""
    if counts := _counts_that_fit(request, params, num_nodes):
        yield f"--sweep {','.join(map(str, counts))}" if len(counts) > 1 else f"--nodes {counts[0]}"
    sequences = batch.micro_batch * batch.gradient_accumulation
    for micro in (n for n in range(batch.micro_batch - 1, 0, -1) if sequences % n == 0):
        smaller = {**params, "micro_batch": micro, "gradient_accumulation": sequences // micro}
        if _fits(request, smaller):
            yield f"--set sft.micro_batch={micro} --set sft.gradient_accumulation={sequences // micro}"
            break
    else:
        shorter = (params["seq_len"] // part for part in (2, 4, 8, 16))
        if length := next((n for n in shorter if n >= 128 and _fits(request, {**params, "seq_len": n})), None):
            yield f"--set sft.seq_len={length}"
    zero = _section(request.deepspeed, "zero_optimization")
    divided = {**request.deepspeed, "zero_optimization": {**zero, "stage": 3}}
    if zero.get("stage", 0) != 3 and _fits(replace(request, deepspeed=divided), params):
        yield "--set deepspeed.zero_optimization.stage=3"
    for name, config in request.deepspeed_files.items():
        offloads = _offloads(_section(config, "zero_optimization"), "offload_optimizer")
        if offloads and _fits(replace(request, deepspeed=config), params):
            yield f"deepspeed: {name}, which offloads to the host, in configs/models/{request.model['name']}.yaml"
            break


def _counts_that_fit(request: Request, params: Mapping[str, Any], num_nodes: int) -> tuple[int, ...]:
    """The node counts of the sweep from the first that fits; else the smallest single count that fits; else ()."""
    larger = [count for count in request.node_counts if count > num_nodes]
    sweeps = [tuple(larger[first:]) for first in range(len(larger))]
    most = max(request.node_counts)
    for counts in (*sweeps, *((count,) for count in range(most + 1, MOST_NODES + 1))):
        if _fits(replace(request, node_counts=counts), params):
            return counts
    return ()
