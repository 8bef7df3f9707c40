"""Physical ceilings ("speed of light") and the arithmetic behind every rate. Pure, standard library only.

Every bandwidth is in GB/s (1 GB = 1e9 B), every memory in GiB, every rate of arithmetic in TFLOP/s.
A ceiling names the resource that binds it, so that a report can say *what* is at its limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send_recv",
    "ping_pong",
)


def busbw_factor(collective: str, world_size: int) -> float:
    """busbw ÷ algbw, where algbw = size_bytes ÷ time. One rank moves nothing: 0 but for 1-factor operations.

    Source: nccl-tests, PERFORMANCE.md. `size_bytes` is the larger of an operation's two buffers.
    Raises ValueError for a collective that has no bandwidth (`barrier`) or is not known.
    """
    if collective == "all_reduce":
        return 2 * (world_size - 1) / world_size
    if collective in ("all_gather", "reduce_scatter", "all_to_all"):
        return (world_size - 1) / world_size
    if collective in ("broadcast", "send_recv", "ping_pong"):
        return 1.0
    raise ValueError(f"no bus bandwidth is defined for {collective!r}; known: {', '.join(COLLECTIVES)}")


@dataclass(frozen=True)
class Limit:
    """A ceiling in GB/s of bus bandwidth and the resource that sets it."""

    gb_per_s: float
    binds: str


def nic_gb_per_s(nics: int, gbit_per_s: float) -> float:
    """One-way wire rate of all NICs of a node, GB/s. Headers and congestion control take 4–8 % of it."""
    return nics * gbit_per_s / 8


def busbw_ceilings(
    collective: str,
    num_nodes: int,
    gpus_per_node: int,
    nic_gb_per_s: float | None,
    nvlink_busbw_gb_per_s: float | None,
) -> dict[str, Limit]:
    """The ceilings of a collective's busbw by algorithm: `ring`, `tree` (or hierarchical), `nvlink`.

    `nic_gb_per_s` is the one-way rate of all NICs of one node. An unknown rate (None or 0) gives no entry.

    With k nodes, n GPUs and B GB/s a node:
    - ring: each byte of busbw crosses every node boundary once, so busbw ≤ B;
    - tree: a node sends only what its GPUs have already combined, so its NICs carry 2·S·(k−1)/k for an
      all-reduce of S bytes and busbw ≤ B·k(n−1)/(n(k−1)); the same factor holds for all-gather and
      reduce-scatter, where S·(k−1)/k must enter or leave each node. NVLink caps it.
    - all-to-all has one ceiling, called `ring` here too: every GPU of a node has its own S·(k−1)/k to send, so
      busbw ≤ B·k(n−1)/(n(k−1)) ÷ GPUs of the node;
    - send_recv, from every GPU to the same GPU of the next node: busbw ≤ B ÷ GPUs of the node.
    """
    n = num_nodes * gpus_per_node
    ceilings: dict[str, Limit] = {}
    if n < 2:
        return ceilings
    nvlink = nvlink_busbw_gb_per_s if gpus_per_node > 1 and nvlink_busbw_gb_per_s else None
    if nvlink:
        ceilings["nvlink"] = Limit(nvlink, "NVLink inside a node")
    if num_nodes < 2 or not nic_gb_per_s:
        return ceilings
    shared = num_nodes * (n - 1) / (n * (num_nodes - 1))
    if collective == "send_recv":  # every GPU of a node sends to the next node at the same time
        ceilings["ring"] = _capped(nic_gb_per_s / gpus_per_node, nvlink)
        return ceilings
    if collective == "all_to_all":
        ceilings["ring"] = _capped(nic_gb_per_s * shared / gpus_per_node, nvlink)
        return ceilings
    ceilings["ring"] = _capped(nic_gb_per_s, nvlink)
    if collective in ("all_reduce", "all_gather", "reduce_scatter") and gpus_per_node > 1:
        ceilings["tree"] = _capped(nic_gb_per_s * shared, nvlink)
    return ceilings


def busbw_ceiling(
    collective: str,
    num_nodes: int,
    gpus_per_node: int,
    nic_gb_per_s: float | None,
    nvlink_busbw_gb_per_s: float | None,
) -> Limit | None:
    """The highest busbw that any algorithm can reach, or None where the hardware's rates are unknown."""
    found = busbw_ceilings(collective, num_nodes, gpus_per_node, nic_gb_per_s, nvlink_busbw_gb_per_s)
    if num_nodes > 1:  # NVLink alone is no ceiling of an operation that leaves the node
        found.pop("nvlink", None)
    return max(found.values(), key=lambda limit: limit.gb_per_s, default=None)


def _capped(nic: float, nvlink: float | None) -> Limit:
    if nvlink and nvlink < nic:
        return Limit(nvlink, "NVLink inside a node")
    return Limit(nic, "NICs of a node")


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a Llama architecture. `total` counts a tied output head once."""

    total: int
    embedding: int  # the input table alone
    head: int  # the output projection: a matrix product even where it shares the table's memory

    @property
    def non_embedding(self) -> int:
        """N of the FLOP formula: all that takes part in a matrix product, which the output head does."""
        return self.total - self.embedding if self.head else self.total


def parameters(model: Mapping[str, Any]) -> Parameters:
    """Counts from the fields of configs/models/<model>.yaml: Llama without biases, SwiGLU, RMSNorm."""
    hidden, layers, vocab = model["hidden_size"], model["num_layers"], model["vocab_size"]
    kv = hidden * model["num_kv_heads"] // model["num_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * kv
    layer = attention + 3 * hidden * model["intermediate_size"] + 2 * hidden
    table = vocab * hidden
    head = 0 if model["tie_embeddings"] else table
    return Parameters(total=layers * layer + hidden + table + head, embedding=table, head=head)


def flops_per_token(model: Mapping[str, Any], seq_len: int, recompute: bool = False, causal: bool = False) -> float:
    """Training FLOP of one token: 6N + 12·L·H·S, N without the input embedding.

    `causal` counts only the half of attention that a causal mask leaves (the flash kernels do no more);
    `recompute` adds 2N for a second forward pass. MFU uses neither, by convention (PaLM, appendix B), so that
    a figure does not rise because more work was wasted. `seq_len` is the length that attention sees.
    """
    n = parameters(model).non_embedding
    attention = 12 * model["num_layers"] * model["hidden_size"] * seq_len
    return (8 if recompute else 6) * n + attention * (0.5 if causal else 1.0)


def mfu(tokens_per_s: float, flop_per_token: float, world_size: int, peak_tflop_per_s: float) -> float:
    """Model FLOP utilisation, 0…1: useful arithmetic ÷ what all GPUs could do. `peak` is of one GPU, dense."""
    return tokens_per_s * flop_per_token / (world_size * peak_tflop_per_s * 1e12)


def model_state_gib(num_parameters: int, world_size: int, zero_stage: int = 3) -> float:
    """Memory of weights, gradients and optimizer on one GPU, GiB.

    18 B a parameter with Adam in mixed precision: 2 (bf16 weight) + 4 (fp32 gradient) + 12 (fp32 weight and two
    moments). ZeRO-1 divides the optimizer's 12 by the world, ZeRO-2 the gradients' 4 too, ZeRO-3 all.
    Source: Rajbhandari et al. 2020, "ZeRO", §3, with fp32 gradient accumulation as DeepSpeed does in bf16.
    """
    shared = {0: 0, 1: 12, 2: 16, 3: 18}[zero_stage]
    return num_parameters * (18 - shared + shared / world_size) / GIB


@dataclass(frozen=True)
class MemoryEstimate:
    """What one GPU would hold, GiB, by cause. `fits` is None where the GPU's memory is unknown."""

    states: float
    activations: float
    logits: float
    working: float
    available: float | None

    @property
    def needed(self) -> float:
        return self.states + self.activations + self.logits + self.working

    @property
    def fits(self) -> bool | None:
        return None if not self.available else self.needed <= self.available


def memory_estimate(
    model: Mapping[str, Any],
    world_size: int,
    seq_len: int,
    micro_batch: int,
    gpu_memory_gib: float | None,
    zero_stage: int = 3,
) -> MemoryEstimate:
    """Memory of SFT with full activation checkpointing on one GPU; an estimate, good to about 15 %.

    activations: one bf16 input a layer is kept (2·T·H·L), plus one layer's inside while it is recomputed
    (about 34·T·H without attention scores; Korthikanti et al. 2022, §4); logits: T·V in bf16 and fp32 (6 B);
    working: two gathered layers and the gathered input table in bf16, and 2 GiB for NCCL, CUDA and fragmentation.
    """
    tokens = micro_batch * seq_len
    hidden, layers = model["hidden_size"], model["num_layers"]
    count = parameters(model)
    layer = (count.total - count.embedding - count.head) / layers
    gathered = 2 * (2 * layer + max(count.embedding, count.head)) if zero_stage == 3 and world_size > 1 else 0
    return MemoryEstimate(
        states=model_state_gib(count.total, world_size, zero_stage),
        activations=tokens * hidden * (2 * layers + 34) / GIB,
        logits=6 * tokens * model["vocab_size"] / GIB,
        working=gathered / GIB + 2,
        available=gpu_memory_gib or None,
    )
