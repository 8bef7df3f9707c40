"""Resolving the settings of test `sft` on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import UsageError
from runner.system.wording import counted
from runner.workloads.deepspeed_config import split, unresolved
from runner.workloads.job import RankJob
from runner.workloads.sft import refusals


@dataclass(frozen=True)
class Settings:
    """A job's settings without `auto` values, validated for its device. `micro_batch` is in sequences."""

    steps: int
    warmup_steps: int
    micro_batch: int
    gradient_accumulation: int
    attention: str  # as it was asked for: what `auto` is depends on the GPU
    plain: bool  # DeepSpeed and Transformers alone
    liger: str  # "all", "loss" or "none"
    recompute: str  # "none", "selective" or "full"
    compile: bool  # each layer
    deepcompile: bool  # the whole model, by DeepSpeed
    fp8_recipe: str | None  # None: no products in 8 bits
    tensor_parallel: int  # ranks that share each layer and their data
    dtype: str  # a name in torch
    deepspeed: Mapping[str, Any]


def resolve(job: RankJob) -> Settings:
    """The settings of `job`. Raises UsageError for those that do not fit its device or DeepSpeed configuration."""
    params, config = job.params, job.deepspeed
    if job.model is None or config is None or job.data is None:
        raise UsageError("test sft needs a model, a DeepSpeed configuration and prepared data")
    if reason := refusals.by_reference(params):
        raise UsageError(f"sft: {reason}")
    if left := list(unresolved(config)):
        raise UsageError(f'DeepSpeed configuration: {", ".join(left)} is still "auto"; give a value')
    try:
        micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        total = config["train_batch_size"]
    except KeyError as error:
        raise UsageError(f"DeepSpeed configuration: {error.args[0]} is missing") from None
    parts = split(config)
    shares = job.world_size // parts
    if micro * accumulation * shares != total:
        raise UsageError(
            f"DeepSpeed configuration: train_batch_size {total} is not micro-batch {micro} × accumulation "
            f"{accumulation} × {counted(shares, 'rank' if parts == 1 else 'group')} = {micro * accumulation * shares}"
        )
    if params.get("lr") is not None and "optimizer" in config:
        optimizer = config["optimizer"]
        config = {**config, "optimizer": {**optimizer, "params": {**optimizer.get("params", {}), "lr": params["lr"]}}}
    fp8_recipe = _fp8_recipe(params, job.device)
    # Layers in 8 bits are slow unless they are compiled, and keep weights that ZeRO-3 has released.
    compiled = bool(params.get("compile", False)) or fp8_recipe is not None
    plain = params.get("trainer", "fast") == "reference"
    recompute = params.get("recompute", "full")
    # torch.compile fuses what Liger does inside layers, and fails to compile Liger's kernels there. Its rotary
    # embeddings write into the output of a matrix product, which selective recompute has kept to begin with it again.
    alone = compiled or recompute == "selective"
    # Liger's loss would read the weights of a head that AutoTP has replaced.
    without_liger = plain or parts > 1
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    return Settings(
        steps=params["steps"],
        warmup_steps=params["warmup_steps"],
        micro_batch=micro,
        gradient_accumulation=accumulation,
        attention=params.get("attention", "auto"),
        plain=plain,
        liger="none" if without_liger else _liger(str(params.get("liger", "auto")).lower(), job.device, alone),
        recompute=recompute,
        compile=compiled,
        deepcompile=refusals.deepcompiles(config),
        fp8_recipe=fp8_recipe,
        tensor_parallel=parts,
        dtype=next((dtypes[key] for key in dtypes if config.get(key, {}).get("enabled")), "float32"),
        deepspeed=config,
    )


def _liger(requested: str, device: str, loss_alone: bool) -> str:
    installed = importlib.util.find_spec("liger_kernel") is not None
    if requested == "true" and not (device == "cuda" and installed):
        need = "the package liger-kernel, which is not installed" if device == "cuda" else "a GPU"
        raise UsageError(f"sft.liger=true needs {need}; leave it on auto")
    if requested == "false" or device != "cuda" or not installed:
        return "none"
    return "loss" if loss_alone else "all"


def _fp8_recipe(params: Mapping[str, Any], device: str) -> str | None:
    if params.get("precision", "auto") != "fp8":
        return None
    if device != "cuda":
        raise UsageError("sft.precision=fp8 needs a GPU; leave it on auto")
    if importlib.util.find_spec("torchao") is None:
        raise UsageError("sft.precision=fp8 needs the package torchao, which is not installed; leave it on auto")
    return str(params.get("fp8_recipe", "tensorwise"))
