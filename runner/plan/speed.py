"""How fast a configuration can be, and what binds it: host, GPU, NVLink or network. Pure.

A step is `accumulation` micro-steps and an update. A micro-step needs:

- **GPU**: matrix products, 6N + 6·L·H·S FLOP a token (S: a sample; and 2N of the layers to recompute them), at the rate
  of products of this size, and the other kernels, which pass over memory.
- **host**: launching a layer's kernels takes as long whatever their size. Under ZeRO-3 it also gathers each layer's
  weights, and so one sequence a micro-step can be too little to keep a GPU busy.
- **NVLink, network**: ZeRO-3 gathers the weights for the forward pass and again for the backward pass, and scatters the
  gradients: three times the weights, 2 bytes each, in every micro-step. ZeRO-2 all-reduces the gradients in every
  micro-step (DeepSpeed's `allreduce_and_scatter`), ZeRO-1 and 0 in a step's last one; 1 and 2 gather the weights once a
  step. With hpZ only a step's first gather leaves the group that shares a copy, until the update makes it invalid.

With `overlap_comm` communication is hidden behind computation as far as that lasts, which is the best possible case.
The constants were measured on one H200 with torch 2.11 and DeepSpeed 0.19.8 (a test holds them against every arm), the
rates of collectives are published ones. They are an assumption on any other machine, which a measured `Rate` replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from runner.cluster import limits
from runner.plan.plan import Batch, Prediction
from runner.plan.zero import Zero, zero_of
from runner.system.wording import counted

# Matrix products reached 730 TFLOP/s on random data, weighted over a 7B's shapes, of 989 on the data sheet.
MATMUL_OF_PEAK = 0.738
FP8_SPEEDUP = 1.30  # of the matrix products, tensorwise: 66,887 positions/s where bf16 gave 52,742
# Of the data sheet's rate: attention over the whole sequence in the kernel that takes a mask.
MASKED_OF_PEAK = 0.324
SAMPLE_TOKENS = 180  # of a sample: attention stops there
# What is no matrix product passes these bytes a token, layer and unit of width, at the data sheet's rate of the memory.
PASSED_BYTES = 566
UPDATE_BYTES = 33  # a parameter: the fused AdamW, gradient clipping and the weights in bf16
# Seconds of the host for one layer in a micro-step.
HOST_S = 0.003  # assumed: about 80 kernels, forward and backward
HOST_ZERO3_S = 0.0119
HOST_RECOMPUTED = 1.56  # times that where a layer's forward pass is run again
# GPU and host work beside each other, though not perfectly: t = (gpu^p + host^p)^(1/p).
BESIDE = 2.6
# The share that is computed again of the FLOP of the layers' forward pass, and of what is no product, of which that
# pass has a third. With "full" no more of the latter was measured; "selective" is assumed.
RECOMPUTED = {"none": (0.0, 0.0), "selective": (0.0, 1 / 3), "full": (1.0, 0.0)}
NIC_OF_WIRE = 0.91  # 91 of 100 GB/s of 2 × 400 Gbit/s
GATHER_OF_NVLINK = 0.75  # all-gather 361 and reduce-scatter 363 where all-reduce gives 480 GB/s
HOST_LINK_GB_PER_S = 50  # of one GPU: 52–55 measured
HOST_MEMORY_GB_PER_S = 200  # assumed: of one node, for the optimizer on the CPU
HOST_UPDATE_BYTES = 30  # a parameter
GPU, HOST, NVLINK, NETWORK = "GPU", "host", "NVLink", "network"
ASSUMED = "assumed from one H200, not measured here"


@dataclass(frozen=True)
class Shape:
    """A node: its GPUs, and the one-way rate of all its NICs in GB/s, None where it is unknown."""

    gpus_per_node: int
    nic_gb_per_s: float | None


@dataclass(frozen=True)
class Rate:
    """Positions per second and GPU that a micro-batch (in sequences) gave on one node; `source` says when and where."""

    micro_batch: int
    recompute: str
    stage: int
    positions_per_s_per_gpu: float
    source: str


@dataclass(frozen=True)
class _Move:
    """The seconds of one collective on each way that it takes, and in how many of a step's micro-steps it occurs."""

    nic_s: float
    nvlink_s: float
    when: str  # "each", "first" and "last" micro-step, or "after" them


@dataclass(frozen=True)
class _Step:
    """The parts of one step: seconds of a micro-step but for the updates."""

    gpu_s: float
    host_s: float
    moves: tuple[_Move, ...]
    update_s: float
    host_update_s: float
    accumulation: int
    overlaps: bool

    def moved_s(self, when: str) -> float:
        """NICs and NVLink carry a collective at the same time."""
        return sum(max(move.nic_s, move.nvlink_s) for move in self.moves if move.when == when)

    def total(self, of: str) -> float:
        """Seconds of a step that one way is used: `nic_s` or `nvlink_s`."""
        times = {"each": self.accumulation}
        return sum(float(getattr(move, of)) * times.get(move.when, 1) for move in self.moves)

    @property
    def computed_s(self) -> float:
        """Seconds of a micro-step without communication."""
        return float((self.gpu_s**BESIDE + self.host_s**BESIDE) ** (1 / BESIDE))

    @property
    def step_s(self) -> float:
        """Seconds: what is moved in a micro-step hides behind it, the last gradients behind the backward pass."""
        each, first, last = (self.moved_s(when) for when in ("each", "first", "last"))
        compute = self.computed_s
        if self.overlaps:
            micro = (self.accumulation - 1) * max(compute, each) + max(compute, each + first)
            reduced = max(0.0, last - compute * 2 / 3)
        else:
            micro = self.accumulation * (compute + each) + first
            reduced = last
        return micro + reduced + self.moved_s("after") + self.update_s + self.host_update_s

    def without(self, resource: str) -> _Step:
        """The same step if a resource cost nothing."""
        if resource == HOST:
            return replace(self, host_s=0.0, host_update_s=0.0)
        if resource == GPU:
            return replace(self, gpu_s=0.0, update_s=0.0)
        if resource == NVLINK:
            return replace(self, moves=tuple(replace(move, nvlink_s=0.0) for move in self.moves))
        return replace(self, moves=tuple(replace(move, nic_s=0.0) for move in self.moves))


def predict(
    model: Mapping[str, Any],
    hardware: Mapping[str, Any],
    shape: Shape,
    deepspeed: Mapping[str, Any],
    params: Mapping[str, Any],
    batch: Batch,
    num_nodes: int,
    rate: Rate | None = None,
    base: tuple[int, Batch] | None = None,
) -> Prediction | None:
    """What a step of `batch` on `num_nodes` nodes takes at best, and what binds it.

    `params` are the settings of the test with `recompute` decided and `seq_len` in tokens; `hardware` has the peaks of
    its file. `rate` replaces the assumptions on GPU and host. The efficiency relates to `base`, (nodes, their batch),
    or to one node with the same work per GPU. None where the GPU's peaks are unknown, or the kind of configuration is.
    """
    zero = zero_of(deepspeed)
    if zero is None or not hardware.get("bf16_peak_tflop_per_s") or not hardware.get("hbm_gb_per_s"):
        return None
    step = _step(model, hardware, shape, zero, params, batch, num_nodes, rate)
    base_nodes, base_batch = base or (1, batch)
    based = _step(model, hardware, shape, zero, params, base_batch, base_nodes, rate)
    known = num_nodes == 1 or bool(shape.nic_gb_per_s)
    positions = batch.micro_batch * batch.gradient_accumulation * params["seq_len"]
    base_positions = base_batch.micro_batch * base_batch.gradient_accumulation * params["seq_len"]
    ratio = (positions / step.step_s) / (base_positions / based.step_s)
    nic_s, nvlink_s = step.total("nic_s"), step.total("nvlink_s")
    moved = batch.gradient_accumulation * step.moved_s("each") + sum(
        step.moved_s(when) for when in ("first", "last", "after")
    )
    computed = batch.gradient_accumulation * step.computed_s + step.update_s + step.host_update_s
    return Prediction(
        compute_s=batch.gradient_accumulation * step.gpu_s + step.update_s,
        host_s=batch.gradient_accumulation * step.host_s + step.host_update_s,
        nvlink_s=nvlink_s,
        nic_s=nic_s if known else None,
        hidden_s=max(0.0, computed + moved - step.step_s),
        step_s=step.step_s,
        positions_per_s_per_gpu=positions / step.step_s,
        binds=_binds(step),
        # More nodes divide the update, which is no merit of theirs.
        efficiency=min(1.0, ratio) if known else None,
        base_nodes=base_nodes,
        rate_source=rate.source if rate else ASSUMED,
    )


def _binds(step: _Step) -> str:
    """The way without which a step gains more than without host or GPU; else which of these takes longer."""
    left = {resource: step.without(resource).step_s for resource in (GPU, HOST, NVLINK, NETWORK)}
    way = min((NVLINK, NETWORK), key=lambda resource: left[resource])
    if left[way] < min(left[GPU], left[HOST]):
        return way
    host_s = step.accumulation * step.host_s + step.host_update_s
    return HOST if host_s > step.accumulation * step.gpu_s + step.update_s else GPU


def _step(
    model: Mapping[str, Any],
    hardware: Mapping[str, Any],
    shape: Shape,
    zero: Zero,
    params: Mapping[str, Any],
    batch: Batch,
    num_nodes: int,
    rate: Rate | None,
) -> _Step:
    count, world = limits.parameters(model), num_nodes * shape.gpus_per_node
    tokens = batch.micro_batch * params["seq_len"]
    gpu_s = tokens * _gpu_s_per_token(model, hardware, params)
    host_s = _host_s(model, zero, params["recompute"])
    if rate:  # which of the two it shows, the GPU's own rate tells
        measured = tokens / rate.positions_per_s_per_gpu
        gpu_s = min(gpu_s, measured)
        host_s = max(0.0, measured**BESIDE - gpu_s**BESIDE) ** (1 / BESIDE)
    weights = 2 * count.total
    if zero.weights_offloaded:  # its share to the GPU for each pass
        host_s += 2 * weights / world / (HOST_LINK_GB_PER_S * 1e9)
    if zero.optimizer_offloaded:
        host_s += weights / world / (HOST_LINK_GB_PER_S * 1e9)
    held = count.total / (world if zero.stage else 1)
    offloaded = zero.optimizer_offloaded
    return _Step(
        gpu_s=gpu_s,
        host_s=host_s,
        moves=tuple(_moves(zero, shape, num_nodes, weights, hardware.get("nvlink_busbw_gb_per_s"))),
        update_s=0.0 if offloaded else held * UPDATE_BYTES / (hardware["hbm_gb_per_s"] * 1e9),
        host_update_s=(
            held * shape.gpus_per_node * HOST_UPDATE_BYTES / (HOST_MEMORY_GB_PER_S * 1e9) if offloaded else 0.0
        ),
        accumulation=batch.gradient_accumulation,
        overlaps=zero.overlaps,
    )


def _gpu_s_per_token(model: Mapping[str, Any], hardware: Mapping[str, Any], params: Mapping[str, Any]) -> float:
    peak, memory = hardware["bf16_peak_tflop_per_s"] * 1e12, hardware["hbm_gb_per_s"] * 1e9
    count, (again, passed_again) = limits.parameters(model), RECOMPUTED[params["recompute"]]
    in_layers = count.total - count.embedding - count.head
    masked = params.get("attention") in ("sdpa", "eager")
    length = 0 if masked else min(SAMPLE_TOKENS, params["seq_len"])
    flop = limits.flops_per_token(model, length, causal=True) + 2 * in_layers * again
    matmul = MATMUL_OF_PEAK * peak * (FP8_SPEEDUP if params.get("precision") == "fp8" else 1.0)
    passed = PASSED_BYTES * (1 + passed_again) * model["num_layers"] * model["hidden_size"]
    whole = 12 * model["num_layers"] * model["hidden_size"] * params["seq_len"] * (1 + again / 3) if masked else 0.0
    return flop / matmul + passed / memory + whole / (MASKED_OF_PEAK * peak)


def _host_s(model: Mapping[str, Any], zero: Zero, recompute: str) -> float:
    layer = HOST_ZERO3_S if zero.stage == 3 else HOST_S
    return float(model["num_layers"] * layer * (HOST_RECOMPUTED if recompute != "none" else 1.0))


def _moves(zero: Zero, shape: Shape, num_nodes: int, weights: int, nvlink: float | None) -> Iterator[_Move]:
    """The collectives of a step; `weights` are those of the whole model, in bytes of 16 bits each."""

    def move(collective: str, size: float, when: str, within: bool = False) -> _Move:
        gpus, nodes = shape.gpus_per_node, 1 if within else num_nodes
        ranks = min(zero.hpz, gpus) if within else nodes * gpus
        moved = size * limits.busbw_factor(collective, ranks)
        inside = (nvlink or 0.0) * 1e9 * (1.0 if collective == "all_reduce" else GATHER_OF_NVLINK)
        ways = limits.busbw_ceilings(collective, nodes, gpus, shape.nic_gb_per_s, None)
        # NCCL has trees for all-reduce, and only rings over nodes for the others.
        wire = max((ways[way].gb_per_s for way in ways if collective == "all_reduce" or way == "ring"), default=0.0)
        return _Move(
            nic_s=moved / (NIC_OF_WIRE * wire * 1e9) if wire else 0.0,
            nvlink_s=moved / inside if inside and gpus > 1 else 0.0,
            when=when,
        )

    gathered = weights / (2 if zero.quantized_weights else 1)
    reduced = weights / (4 if zero.quantized_gradients else 1)
    if zero.stage == 3:
        if 1 < zero.hpz <= shape.gpus_per_node < num_nodes * shape.gpus_per_node:
            across, inside = move("all_gather", gathered, "first"), move("all_gather", gathered, "each", within=True)
            yield replace(across, nvlink_s=max(0.0, across.nvlink_s - inside.nvlink_s))  # instead of one of the two
            yield from (inside, inside)
        else:
            yield from [move("all_gather", gathered, "each")] * 2
        yield move("reduce_scatter", reduced, "each")
    else:
        yield move("all_reduce", reduced, "each" if zero.stage == 2 else "last")
        if zero.stage:
            yield move("all_gather", gathered, "after")


def bound_by(expected: Mapping[str, Any]) -> str:
    """What binds a cell, from its `expected` in plan.json, in one sentence without the settings that would not."""
    binds, efficiency = expected["binds"], expected["efficiency"]
    if binds == GPU:
        text, most = f"bound by {binds}", "; "
    elif expected["ways"]:
        text, most = f"bound by {binds} in this configuration, not by this cluster", ": at most "
    else:
        text, most = f"bound by {binds}, and no other split of this batch avoids it", ": at most "
    if expected["nic_s"] is None:
        unknown = (
            "the network counts for nothing, as runner_nics_per_node and runner_nic_gbit_per_s do not say its rate"
        )
        return f"{text}, as far as is known: {unknown}"
    if efficiency is None:
        return text
    return f"{text}{most}{100 * efficiency:.0f} % of the rate on {counted(expected['base_nodes'], 'node')} is possible"


def explained(expected: Mapping[str, Any]) -> str:
    """`bound_by` with the settings under which the GPUs bind, on one line."""
    ways = " or ".join(expected["ways"])
    return bound_by(expected) + (f"; bound by {GPU} with {ways}" if ways else "")
