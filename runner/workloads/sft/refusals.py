"""Settings of test `sft` that cannot work together on a model and its nodes: refused before a node is used. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.errors import UsageError
from runner.system.wording import counted
from runner.workloads.deepspeed_config import section, split
from runner.workloads.sft import float8

# What the trainer `reference` does not have, by setting.
FAST_ONLY = {
    "attention": ("varlen", "flash_attention_3", "flash_attention_4"),
    "recompute": ("selective",),
    "precision": ("fp8",),
    "liger": ("true",),
    "compile": (True,),
}
# What is done to each layer by itself, by setting.
_OF_LAYERS = {"compile": True, "precision": "fp8", "recompute": "selective"}
QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients")


def refuse(
    params: Mapping[str, Any],
    model: Mapping[str, Any],
    deepspeed: Mapping[str, Any],
    *,
    device: str,
    gpus_per_node: int,
    world_size: int,
) -> None:
    """Raise UsageError of one line for the first of `params` and of `deepspeed` that cannot work.

    `model` has the fields of configs/models/, `deepspeed` is a DeepSpeed configuration, which may leave its batch open.
    """
    parts = split(deepspeed)
    if params.get("precision") == "fp8":
        float8.refuse_shapes(model, params["seq_len"])
    if reason := by_reference(params):
        raise UsageError(f"sft: {reason}")
    if device != "cuda" and params.get("compile") and params.get("recompute") == "selective":
        raise UsageError(
            "sft.compile=true compiles nothing on CPUs with sft.recompute=selective, since their attention is not one "
            "operation: set sft.recompute=none or full"
        )
    faults = [*_tensor_parallel(params, model, deepspeed, parts, gpus_per_node)] if parts > 1 else []
    faults += [*_zero_plus_plus(deepspeed, device, gpus_per_node, world_size)]
    faults += [*_deepcompile(params, deepspeed, device, parts)]
    if faults:
        raise UsageError(faults[0])


def by_reference(params: Mapping[str, Any]) -> str | None:
    """Why the trainer that `params` ask for cannot have the rest of them; None where it can."""
    for name, values in FAST_ONLY.items():
        value = params.get(name)
        if params.get("trainer") == "reference" and value in values:
            return f"trainer reference has no {name} {str(value).lower()}: leave it out, or take fast"
    return None


def with_split(deepspeed: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration in which `parts` ranks share each layer.

    Each has the whole output head: the loss is computed from all logits, and a tied table would be split with it.
    """
    if parts == 1:
        return dict(deepspeed)
    divided = {**section(deepspeed, "tensor_parallel"), "autotp_size": parts, "vocab_parallel_lm_head": False}
    return {**deepspeed, "tensor_parallel": divided}


def deepcompiles(deepspeed: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed is to compile the model itself, communication included."""
    return bool(section(deepspeed, "compile").get("deepcompile"))


def _of_layers(params: Mapping[str, Any]) -> Iterator[str]:
    """The settings of `params` that change each layer by itself, as they are typed."""
    return (f"sft.{name}={str(value).lower()}" for name, value in _OF_LAYERS.items() if params.get(name) == value)


def _tensor_parallel(
    params: Mapping[str, Any], model: Mapping[str, Any], deepspeed: Mapping[str, Any], parts: int, gpus_per_node: int
) -> Iterator[str]:
    divided = {name: model[name] for name in ("num_heads", "num_kv_heads", "intermediate_size")}
    wrong = [f"{name} {size}" for name, size in divided.items() if size % parts]
    if wrong:
        fits = [
            n for n in range(2, gpus_per_node + 1) if not any(size % n for size in (*divided.values(), gpus_per_node))
        ]
        can = f"{', '.join(map(str, fits))} can" if fits else "leave it at 1"
        yield f"sft.tensor_parallel={parts} does not divide {', '.join(wrong)} of model {model['name']}: {can}"
    if gpus_per_node % parts:
        of_node = counted(gpus_per_node, "GPU")
        yield f"sft.tensor_parallel={parts} does not divide the {of_node} of a node, in which it has to stay"
    if not section(deepspeed, "zero_optimization").get("stage", 0):
        yield (
            "sft.tensor_parallel needs ZeRO stage 1, 2 or 3, since DeepSpeed clips gradients by a wrong norm without: "
            "--set deepspeed.zero_optimization.stage=1"
        )
    if section(deepspeed, "tensor_parallel").get("vocab_parallel_lm_head"):
        yield "deepspeed.tensor_parallel.vocab_parallel_lm_head: the loss needs all logits of a token: leave it out"
    for setting in _of_layers(params):
        yield f"sft.tensor_parallel does not go with {setting}: its layers communicate in their midst"


def _zero_plus_plus(deepspeed: Mapping[str, Any], device: str, gpus_per_node: int, world_size: int) -> Iterator[str]:
    zero = section(deepspeed, "zero_optimization")
    stage, group = zero.get("stage", 0), zero.get("zero_hpz_partition_size", 1)
    name = "deepspeed.zero_optimization"
    if isinstance(group, int) and group > 1:
        if stage != 3:
            yield f"{name}.zero_hpz_partition_size needs {name}.stage=3, it is {stage}"
        if gpus_per_node % group or world_size % group:
            yield (
                f"{name}.zero_hpz_partition_size={group} does not divide the {counted(gpus_per_node, 'GPU')} of a "
                f"node, which are to share a copy of the weights: set {gpus_per_node}"
            )
    for key in QUANTIZED:
        if zero.get(key):
            if stage != 3:
                yield f"{name}.{key} needs {name}.stage=3, it is {stage}"
            if device != "cuda":
                yield f"{name}.{key} needs GPUs: DeepSpeed quantises by a CUDA kernel"


def _deepcompile(params: Mapping[str, Any], deepspeed: Mapping[str, Any], device: str, parts: int) -> Iterator[str]:
    if not deepcompiles(deepspeed):
        return
    if device != "cuda":
        yield "deepspeed.compile.deepcompile needs GPUs: it adds DeepSpeed's CUDA operations to the graph"
    if section(deepspeed, "zero_optimization").get("stage", 0) not in (1, 2, 3):
        yield "deepspeed.compile.deepcompile needs deepspeed.zero_optimization.stage 1, 2 or 3"
    for setting in _of_layers(params):
        yield f"deepspeed.compile.deepcompile compiles the whole model, {setting} each layer: set one of them"
    if parts > 1:
        yield "deepspeed.compile.deepcompile does not go with sft.tensor_parallel: set one of them"
