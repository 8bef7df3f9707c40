"""What fits into the GPUs, and the fastest of it: decides what a user leaves open, and refuses what does not fit. Pure.

Only what certainly needs too much is refused. What is chosen has some memory to spare, as the estimate has an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from runner.cluster import limits
from runner.cluster.inventory import Node
from runner.cluster.limits import MemoryEstimate
from runner.errors import UsageError
from runner.plan import memory, speed
from runner.plan.batch import asked, batch_of
from runner.plan.plan import Batch, Prediction
from runner.plan.request import Request
from runner.plan.speed import Rate, Shape
from runner.plan.zero import offloads
from runner.system.wording import counted
from runner.workloads.deepspeed_config import section

# The ratio of needed to available memory above which a cell is refused. The estimate was too high by this factor where
# it was compared with a measurement (7B on one H200: 117 GiB estimated, 106.5 measured): of the 18 B per parameter
# that it counts under ZeRO-3, DeepSpeed holds 16 permanently. A wider margin would let a 70B start on 8 H200 (111 %).
MARGIN = 1.1
FILL = 0.9  # the share of the memory that is filled by what the planner chooses itself
ERROR = 0.15  # of the estimate, which is added there to what grows with the batch
MOST_NODES = 1024  # the largest number of nodes that is tried as one that fits
MICRO_BATCHES = range(1, 9)  # sequences: more gain less than the prediction's error
TIE = 0.98  # of the best rate: no difference; then what needs less memory is chosen
RECOMPUTE = ("none", "full")  # in the order in which they cost time; what "selective" costs, tuning measures


def shape_of(nodes: Sequence[Node], gpus_per_node: int) -> Shape:
    """The shape of nodes that work together: the slowest NICs count, and an unknown rate makes it unknown."""
    rates = [limits.nic_gb_per_s(node.nics, node.nic_gbit_per_s or 0.0) for node in nodes]
    return Shape(gpus_per_node, min(rates) or None)


def settle(request: Request, params: Mapping[str, Any], shape: Shape) -> tuple[dict[str, Any], str]:
    """(`params` with micro-batch and recompute decided, how they were chosen): the same for every cell of a sweep.

    Of what keeps the global batch and fits on every node count, the fastest by the prediction for the largest one. A
    number that is given is kept. Where memory or speed of the GPUs are unknown, what needs least memory. The text is
    empty where nothing was open. Raises UsageError where a global batch does not divide.
    """
    _, micro, accumulation = asked(request, params)
    open_batch = micro is None and accumulation is None
    open_recompute = params["recompute"] == "auto"
    least = _least(params)
    batches = {count: batch_of(request, least, count, count * request.gpus_per_node) for count in request.node_counts}
    if not (open_batch or open_recompute):
        return least, ""
    sequences = [batch.micro_batch * batch.gradient_accumulation for batch in batches.values()]
    micros = [m for m in MICRO_BATCHES if all(s % m == 0 for s in sequences)] if open_batch else [micro]
    found: list[tuple[Prediction, float, dict[str, Any]]] = []
    fitting = 0
    for recompute in RECOMPUTE if open_recompute else [params["recompute"]]:
        for each in micros:
            tried = {**params, "micro_batch": each, "recompute": recompute}
            need = _most_needed(request, tried)
            if need is None:
                continue
            fitting += need <= FILL
            predicted = _predicted(request, tried, shape, max(request.node_counts)) if need <= FILL else None
            if predicted is not None:
                found.append((predicted, need, tried))
    # What was measured is not compared with assumptions.
    found = [each for each in found if each[0].rate_source != speed.ASSUMED] or found
    if found:
        best = max(each.positions_per_s_per_gpu for each, _, _ in found)
        as_fast = [each for each in found if each[0].positions_per_s_per_gpu >= TIE * best]
        _, _, chosen = min(as_fast, key=lambda each: each[1])
        if found[0][0].rate_source != speed.ASSUMED:
            why = "fastest of what was measured"
        elif len(found) == 1:
            why = "the only choice that fits"
        else:
            why = f"fastest by prediction of {len(found)} choices that fit"
    else:
        chosen, why = {**least, "micro_batch": 1} if open_batch else least, "needs least memory"
        if fitting or _most_needed(request, least) is None:
            why += "; what this needs here of memory or time is not known"
    if request.device != "cuda" and not open_batch:  # nobody asks that of a CPU
        return chosen, ""
    text = f"recompute {chosen['recompute']}: {why}"
    if open_batch:
        literal = f"--set sft.gradient_accumulation={sequences[-1]} makes it 1 × {sequences[-1]}"
        if len(set(sequences)) > 1:  # strong scaling: no accumulation is that of all node counts
            literal = "--set sft.micro_batch=1 makes it 1"
        text = f"micro-batch {chosen['micro_batch']}, {text}" + (f"; {literal}" if chosen["micro_batch"] > 1 else "")
    return chosen, text


def _least(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with what needs least memory; the batch that is open is then one sequence."""
    return {**params, "recompute": "full" if params["recompute"] == "auto" else params["recompute"]}


def expect(
    request: Request, params: Mapping[str, Any], shape: Shape, num_nodes: int, batch: Batch
) -> Prediction | None:
    """The prediction for a cell on `num_nodes` nodes, with the settings under which what binds it does not.

    `params` are settled. None where nothing is known of the GPUs.
    """
    found = _predicted(request, params, shape, num_nodes, batch)
    if found is None or found.binds == speed.GPU:
        return found
    return replace(found, ways=tuple(_unbound(request, params, shape, num_nodes, batch, found)))


def _unbound(
    request: Request, params: Mapping[str, Any], shape: Shape, num_nodes: int, batch: Batch, bound: Prediction
) -> Iterator[str]:
    """The settings, each of which suffices alone, that keep the global batch, fit, and are bound by the GPU alone."""

    def better(other: Request, settings: Mapping[str, Any], new: Batch) -> float | None:
        expected = _predicted(other, settings, shape, num_nodes, new)
        share = _share(_need(other, settings, num_nodes, new.micro_batch))
        if expected is None or share is None or share > FILL or expected.binds != speed.GPU:
            return None
        gained = expected.positions_per_s_per_gpu / bound.positions_per_s_per_gpu
        return gained if gained * TIE >= 1 else None

    sequences = batch.micro_batch * batch.gradient_accumulation
    splits = [Batch(batch.global_batch, m, sequences // m) for m in MICRO_BATCHES if sequences % m == 0]
    gains = {split: gain for split in splits if (gain := better(request, params, split)) is not None}
    if gains:  # the smallest of those that are as good as the best
        best = max(gains.values())
        split = next(split for split in splits if gains.get(split, 0.0) >= TIE * best)
        yield f"--set sft.micro_batch={split.micro_batch} --set sft.gradient_accumulation={split.gradient_accumulation}"
    zero = section(request.deepspeed, "zero_optimization")
    for key, value in (("stage", 1), ("zero_hpz_partition_size", shape.gpus_per_node)):
        other = replace(request, deepspeed={**request.deepspeed, "zero_optimization": {**zero, key: value}})
        if zero.get("stage") == 3 and better(other, params, batch) is not None:
            yield f"--set deepspeed.zero_optimization.{key}={value}"


def _predicted(
    request: Request, params: Mapping[str, Any], shape: Shape, num_nodes: int, batch: Batch | None = None
) -> Prediction | None:
    if request.device != "cuda":
        return None
    gpus, least = request.gpus_per_node, min(request.node_counts)
    batch = batch or batch_of(request, params, num_nodes, num_nodes * gpus)
    base = (least, batch_of(request, params, least, least * gpus)) if len(request.node_counts) > 1 else None
    if base and batch.micro_batch != base[1].micro_batch:  # another split of the same batch
        sequences = base[1].micro_batch * base[1].gradient_accumulation
        base = (least, Batch(base[1].global_batch, batch.micro_batch, max(1, sequences // batch.micro_batch)))
    stage = section(request.deepspeed, "zero_optimization").get("stage", 0)
    rate = next((r for r in request.rates if _measures(r, batch.micro_batch, params["recompute"], stage)), None)
    return speed.predict(
        request.model, request.hardware, shape, request.deepspeed, params, batch, num_nodes, rate, base
    )


def _measures(rate: Rate, micro_batch: int, recompute: str, stage: Any) -> bool:
    return (rate.micro_batch, rate.recompute, rate.stage) == (micro_batch, recompute, stage)


def _most_needed(request: Request, params: Mapping[str, Any]) -> float | None:
    """The largest share of a GPU's memory that a node count of `request` needs; None where it is not known."""
    shares = []
    for num_nodes in request.node_counts:
        batch = batch_of(request, params, num_nodes, num_nodes * request.gpus_per_node)
        share = _share(_need(request, params, num_nodes, batch.micro_batch))
        if share is None:
            return None
        shares.append(share)
    return max(shares)


def _share(found: MemoryEstimate | None) -> float | None:
    """The share of the memory that is surely enough; None where it is not known."""
    if found is None or not found.available:
        return None
    return (found.needed + ERROR * (found.activations + found.logits)) / found.available


def _need(request: Request, params: Mapping[str, Any], num_nodes: int, micro_batch: int) -> MemoryEstimate | None:
    if request.device != "cuda":
        return None
    world_size = num_nodes * request.gpus_per_node
    return memory.estimate(request.model, request.hardware, request.deepspeed, params, world_size, micro_batch)


def refuse(
    request: Request, params: Mapping[str, Any], settled: Mapping[str, Any], shape: Shape, num_nodes: int, batch: Batch
) -> None:
    """Raise UsageError where a cell of `request` on `num_nodes` nodes needs more memory than its GPUs have.

    `params` are the settings as they were asked for, `settled` those that the plan made of them. The error gives the
    need in GiB by cause and the options that would fit. Without a GPU, or where its memory is unknown, nothing is
    refused.
    """
    found = _need(request, settled, num_nodes, batch.micro_batch)
    if found is None or not found.available or found.needed <= MARGIN * found.available:
        return
    nodes, ranks = counted(num_nodes, "node"), counted(num_nodes * request.gpus_per_node, "rank")
    ways = list(_ways(request, params, shape, num_nodes, batch))
    raise UsageError(
        f"model {request.model['name']} on {nodes} ({ranks}, micro-batch "
        f"{batch.micro_batch} × {params['seq_len']} tokens) needs about {found.needed:.0f} GiB per GPU "
        f"({memory.causes(found)}), {request.hardware['name']} has {found.available:g} GiB; "
        + (f"what fits: {'; or '.join(ways)}" if ways else "no number of nodes and no smaller batch fits")
    )


def _fits(request: Request, params: Mapping[str, Any], shape: Shape) -> bool:
    """Whether every node count of `request` has a batch and fits by the estimate, without a margin."""
    try:
        settled = _least(params)
        if not _all_fit(request, settled):
            settled, _ = settle(request, params, shape)
    except UsageError:
        return False
    return _all_fit(request, settled)


def _all_fit(request: Request, settled: Mapping[str, Any]) -> bool:
    for num_nodes in request.node_counts:
        batch = batch_of(request, settled, num_nodes, num_nodes * request.gpus_per_node)
        found = _need(request, settled, num_nodes, batch.micro_batch)
        if found is None or not found.fits:
            return False
    return True


def _ways(request: Request, params: Mapping[str, Any], shape: Shape, num_nodes: int, batch: Batch) -> Iterator[str]:
    """Options that change the request so that it fits; each one suffices alone."""
    if counts := _counts_that_fit(request, params, shape, num_nodes):
        yield f"--sweep {','.join(map(str, counts))}" if len(counts) > 1 else f"--nodes {counts[0]}"
    sequences = batch.micro_batch * batch.gradient_accumulation
    for micro in (n for n in range(batch.micro_batch - 1, 0, -1) if sequences % n == 0):
        smaller = {**params, "micro_batch": micro, "gradient_accumulation": sequences // micro}
        if _fits(request, smaller, shape):
            yield f"--set sft.micro_batch={micro} --set sft.gradient_accumulation={sequences // micro}"
            break
    else:
        shorter = (params["seq_len"] // part for part in (2, 4, 8, 16))
        if length := next((n for n in shorter if n >= 128 and _fits(request, {**params, "seq_len": n}, shape)), None):
            yield f"--set sft.seq_len={length}"
    zero = section(request.deepspeed, "zero_optimization")
    divided = {**request.deepspeed, "zero_optimization": {**zero, "stage": 3}}
    if zero.get("stage", 0) != 3 and _fits(replace(request, deepspeed=divided), params, shape):
        yield "--set deepspeed.zero_optimization.stage=3"
    for name, config in request.deepspeed_files.items():
        offloaded = offloads(section(config, "zero_optimization"), "offload_optimizer")
        if offloaded and _fits(replace(request, deepspeed=config), params, shape):
            yield f"deepspeed: {name}, which offloads to the host, in configs/models/{request.model['name']}.yaml"
            break


def _counts_that_fit(request: Request, params: Mapping[str, Any], shape: Shape, num_nodes: int) -> tuple[int, ...]:
    """The node counts of the sweep from the first that fits; else the smallest single count that fits; else ()."""
    larger = [count for count in request.node_counts if count > num_nodes]
    sweeps = [tuple(larger[first:]) for first in range(len(larger))]
    most = max(request.node_counts)
    for counts in (*sweeps, *((count,) for count in range(most + 1, MOST_NODES + 1))):
        if _fits(replace(request, node_counts=counts), params, shape):
            return counts
    return ()
