"""Physical ceilings ("speed of light") and the arithmetic behind every rate. Pure, standard library only.

Every bandwidth is in GB/s (1 GB = 1e9 B), every memory in GiB, every rate of arithmetic in TFLOP/s.
A ceiling names the resource that sets it, so that a report can show *what* is at its limit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    """The ratio busbw ÷ algbw of a collective, where algbw = size_bytes ÷ time.

    `size_bytes` is the larger of an operation's two buffers. For one rank it is 0, except where the factor is always 1.
    Raises ValueError for a collective without a bandwidth (`barrier`) and for an unknown one.
    Source: nccl-tests, PERFORMANCE.md.
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
    """One-way wire rate in GB/s of a node's `nics` NICs of `gbit_per_s` Gbit/s each.

    Headers and congestion control take 4–8 % of it.
    """
    return nics * gbit_per_s / 8


def lowest_nic_gb_per_s(plan: Mapping[str, Any], hosts: Collection[str]) -> float:
    """The lowest `nic_gb_per_s` of the nodes named `hosts` in the contents of plan.json; 0 where it is unknown."""
    nodes = (node for node in plan["nodes"] if node["name"] in hosts)
    return min((nic_gb_per_s(node.get("nics") or 0, node.get("nic_gbit_per_s") or 0) for node in nodes), default=0.0)


def busbw_ceilings(
    collective: str,
    num_nodes: int,
    gpus_per_node: int,
    nic_gb_per_s: float | None,
    nvlink_busbw_gb_per_s: float | None,
) -> dict[str, Limit]:
    """The ceilings of a collective's busbw in GB/s by algorithm: `ring`, `tree` (or hierarchical), `nvlink`.

    `nic_gb_per_s` is the one-way rate of all NICs of one node. An unknown rate (None or 0) gives no entry. One rank
    has no ceilings.

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


def collnet_ceiling(
    num_nodes: int, gpus_per_node: int, nic_gb_per_s: float | None, nvlink_busbw_gb_per_s: float | None
) -> Limit | None:
    """The ceiling in GB/s of the busbw of an all-reduce that the switches combine (SHARP); None where it is unknown.

    A node sends S and receives S for an all-reduce of S bytes, however many nodes there are: busbw ≤ 2·B·(n−1)/n. Few
    fabrics have it, so that `busbw_ceiling` leaves it out. The arguments are those of `busbw_ceilings`.
    """
    if num_nodes < 2 or not nic_gb_per_s:
        return None
    nvlink = nvlink_busbw_gb_per_s if gpus_per_node > 1 and nvlink_busbw_gb_per_s else None
    return _capped(nic_gb_per_s * busbw_factor("all_reduce", num_nodes * gpus_per_node), nvlink)


def busbw_ceiling(
    collective: str,
    num_nodes: int,
    gpus_per_node: int,
    nic_gb_per_s: float | None,
    nvlink_busbw_gb_per_s: float | None,
) -> Limit | None:
    """The highest busbw that any algorithm can reach, in GB/s; None where the hardware's rates are unknown.

    The arguments are those of `busbw_ceilings`.
    """
    found = busbw_ceilings(collective, num_nodes, gpus_per_node, nic_gb_per_s, nvlink_busbw_gb_per_s)
    if num_nodes > 1:  # NVLink alone does not limit an operation across nodes
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
        """N of the FLOP formula: all parameters of matrix products, including those of the output head."""
        return self.total - self.embedding if self.head else self.total


def parameters(model: Mapping[str, Any]) -> Parameters:
    """Parameter counts from the fields of configs/models/<model>.yaml: Llama without biases, SwiGLU, RMSNorm."""
    hidden, layers, vocab = model["hidden_size"], model["num_layers"], model["vocab_size"]
    kv = hidden * model["num_kv_heads"] // model["num_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * kv
    layer = attention + 3 * hidden * model["intermediate_size"] + 2 * hidden
    table = vocab * hidden
    head = 0 if model["tie_embeddings"] else table
    return Parameters(total=layers * layer + hidden + table + head, embedding=table, head=head)


def flops_per_token(model: Mapping[str, Any], seq_len: int, recompute: bool = False, causal: bool = False) -> float:
    """Training FLOP of one token: 6N + 12·L·H·S, with N parameters without the input embedding, L layers of width H.

    `seq_len` S is the length over which attention is computed, in tokens. `causal` counts only the half of attention
    that a causal mask leaves (flash kernels compute no more); `recompute` adds 2N for a second forward pass. MFU uses
    neither, by convention, so that wasted work does not raise it. Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    n = parameters(model).non_embedding
    attention = 12 * model["num_layers"] * model["hidden_size"] * seq_len
    return (8 if recompute else 6) * n + attention * (0.5 if causal else 1.0)


def mfu(tokens_per_s: float, flop_per_token: float, world_size: int, peak_tflop_per_s: float) -> float:
    """Model FLOP utilisation, 0…1: useful FLOP/s ÷ the peak of all GPUs.

    `flop_per_token` is from `flops_per_token`; `peak_tflop_per_s` is the dense peak of one GPU in TFLOP/s.
    """
    return tokens_per_s * flop_per_token / (world_size * peak_tflop_per_s * 1e12)


def model_state_gib(
    num_parameters: int,
    world_size: int,
    zero_stage: int = 3,
    *,
    weight: int = 2,
    gradient: int = 4,
    optimizer: int = 12,
) -> float:
    """Memory of weights, gradients and optimizer states on one GPU, in GiB.

    `weight`, `gradient` and `optimizer` are bytes per parameter, 0 for what is in host memory. Adam in mixed precision
    has 18: 2 (bf16 weight) + 4 (fp32 gradient) + 12 (fp32 weight and two moments). ZeRO-1 divides the optimizer states
    by the world size, ZeRO-2 the gradients too, ZeRO-3 all. Source: Rajbhandari et al. 2020, "ZeRO", §3, with gradients
    accumulated in fp32.
    """
    shares = ((optimizer, 1), (gradient, 2), (weight, 3))
    held = sum(size / world_size if zero_stage >= stage else size for size, stage in shares)
    return num_parameters * held / GIB


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory need of one GPU by cause, and its `available` memory (None: unknown), in GiB."""

    states: float
    activations: float
    logits: float
    working: float
    available: float | None

    @property
    def needed(self) -> float:
        """The total need in GiB."""
        return self.states + self.activations + self.logits + self.working

    @property
    def fits(self) -> bool | None:
        """Whether the need is at most the available memory; None where that is unknown."""
        return None if not self.available else self.needed <= self.available


def kept_bytes(model: Mapping[str, Any], recompute: str) -> int:
    """Bytes that a decoder layer keeps per token for its backward pass: in 16 bits, with fused kernels and attention.

    H, K and I are the widths of the layer, of keys or values, and of the MLP. "none": the inputs of all products,
    2·(7H + 2K + 3I); "selective": the outputs of products and attention, 2·(5H + 2K + 2I); "full": its input, 2·H.
    """
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    kv = hidden * model["num_kv_heads"] // model["num_heads"]
    kept = {"none": 7 * hidden + 2 * kv + 3 * inner, "selective": 5 * hidden + 2 * kv + 2 * inner, "full": hidden}
    return int(2 * kept[recompute])


def memory_estimate(
    model: Mapping[str, Any],
    world_size: int,
    seq_len: int,
    micro_batch: int,
    gpu_memory_gib: float | None,
    zero_stage: int = 3,
    *,
    recompute: str = "full",
    inputs_offloaded: bool = False,
    fused_loss: bool = False,
    gradient: int = 4,
    optimizer_offloaded: bool = False,
    weights_offloaded: bool = False,
) -> MemoryEstimate:
    """The memory that SFT needs on one GPU, accurate to about 15 %.

    T = `micro_batch` (sequences) × `seq_len` (tokens), H hidden size, L layers, V vocabulary; the terms below in bytes.
    states: `model_state_gib` with `gradient` bytes per parameter; an offloaded optimizer offloads its gradients too.
    activations: what every layer keeps (`kept_bytes`; with `recompute` "full" in host memory where `inputs_offloaded`),
    and with "full" those of one layer during its recomputation (about 34·T·H without attention scores;
    Korthikanti et al. 2022, §4). logits: T·V in bf16 and fp32 (6 B), none where the loss is fused with the projection
    (Liger).
    working: two gathered layers and the gathered input table in bf16, and 2 GiB for NCCL, CUDA and fragmentation.
    """
    tokens = micro_batch * seq_len
    hidden, layers = model["hidden_size"], model["num_layers"]
    count = parameters(model)
    layer = (count.total - count.embedding - count.head) / layers
    gathers = zero_stage == 3 and (world_size > 1 or weights_offloaded)
    gathered = 2 * (2 * layer + max(count.embedding, count.head)) if gathers else 0
    kept = 0 if inputs_offloaded and recompute == "full" else layers * kept_bytes(model, recompute)
    again = 34 * hidden if recompute == "full" else 0
    return MemoryEstimate(
        states=model_state_gib(
            count.total,
            world_size,
            zero_stage,
            weight=0 if weights_offloaded else 2,
            gradient=0 if optimizer_offloaded else gradient,
            optimizer=0 if optimizer_offloaded else 12,
        ),
        activations=tokens * (kept + again) / GIB,
        logits=0 if fused_loss else 6 * tokens * model["vocab_size"] / GIB,
        working=gathered / GIB + 2,
        available=gpu_memory_gib or None,
    )
