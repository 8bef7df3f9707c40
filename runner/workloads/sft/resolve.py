"""Resolving the settings of test `sft` on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import UsageError
from runner.system.wording import counted
from runner.workloads.deepspeed_config import unresolved
from runner.workloads.job import RankJob


@dataclass(frozen=True)
class Settings:
    """A job's settings without `auto` values, validated for its device. `micro_batch` is in sequences."""

    steps: int
    warmup_steps: int
    micro_batch: int
    gradient_accumulation: int
    attention: str  # as it was asked for: what `auto` is depends on the GPU
    plain: bool  # DeepSpeed and Transformers alone
    liger: bool
    dtype: str  # a name in torch
    deepspeed: Mapping[str, Any]


def resolve(job: RankJob) -> Settings:
    """The settings of `job`. Raises UsageError for those that do not fit its device or DeepSpeed configuration."""
    params, config = job.params, job.deepspeed
    if job.model is None or config is None or job.data is None:
        raise UsageError("test sft needs a model, a DeepSpeed configuration and prepared data")
    if left := list(unresolved(config)):
        raise UsageError(f'DeepSpeed configuration: {", ".join(left)} is still "auto"; give a value')
    try:
        micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        total = config["train_batch_size"]
    except KeyError as error:
        raise UsageError(f"DeepSpeed configuration: {error.args[0]} is missing") from None
    if micro * accumulation * job.world_size != total:
        raise UsageError(
            f"DeepSpeed configuration: train_batch_size {total} is not micro-batch {micro} × accumulation "
            f"{accumulation} × {counted(job.world_size, 'rank')} = {micro * accumulation * job.world_size}"
        )
    if params.get("lr") is not None and "optimizer" in config:
        optimizer = config["optimizer"]
        config = {**config, "optimizer": {**optimizer, "params": {**optimizer.get("params", {}), "lr": params["lr"]}}}
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    return Settings(
        steps=params["steps"],
        warmup_steps=params["warmup_steps"],
        micro_batch=micro,
        gradient_accumulation=accumulation,
        attention=params.get("attention", "auto"),
        plain=(plain := params.get("trainer", "fast") == "reference"),
        liger=not plain and _liger(str(params.get("liger", "auto")).lower(), job.device),
        dtype=next((dtypes[key] for key in dtypes if config.get(key, {}).get("enabled")), "float32"),
        deepspeed=config,
    )


def _liger(requested: str, device: str) -> bool:
    installed = importlib.util.find_spec("liger_kernel") is not None
    if requested == "true" and not (device == "cuda" and installed):
        need = "the package liger-kernel, which is not installed" if device == "cuda" else "a GPU"
        raise UsageError(f"sft.liger=true needs {need}; leave it on auto")
    return requested != "false" and device == "cuda" and installed
