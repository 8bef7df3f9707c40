"""The model of a job inside DeepSpeed's engine, which `rank` then trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.llama import modeling_llama  # noqa: F401  # seconds, which are not those of building a model

from runner.errors import UsageError
from runner.workloads.job import RankJob
from runner.workloads.sft import float8, layers, refusals, versions
from runner.workloads.sft.attention import Attention
from runner.workloads.sft.model import build_model
from runner.workloads.sft.resolve import Settings

PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Built:
    """A model in DeepSpeed's `engine`. `flat` is how `model.inputs` are made for it.

    `counts` is metric -> number of parameters, and `used` what was chosen for it, for the record.
    """

    engine: Any
    flat: bool
    counts: Mapping[str, int]
    used: Mapping[str, Any]


def build(job: RankJob, settings: Settings, attention: Attention) -> Built:
    """The model of `job` with `attention` and its optimizer in DeepSpeed's engine; the process group exists already.

    Raises UsageError for weights that cannot be read or are of another architecture.
    """
    torch.manual_seed(job.seed)
    config = optimizer_for(settings.deepspeed, versions.has_fused_adamw(job.device))
    if settings.tensor_parallel > 1:  # DeepSpeed's own arithmetic takes every rank for one with data of its own
        config = refusals.with_split(config, settings.tensor_parallel)
        config["train_batch_size"] = settings.micro_batch * settings.gradient_accumulation * job.world_size
    _require_operations(config)
    alive = HfDeepSpeedConfig(config)  # transformers finds it by a weak reference, to build under ZeRO-3
    _use_liger(settings.liger)
    model = build_model(
        job.model or {},
        attention=attention.register(),
        dtype=getattr(torch, settings.dtype),
        weights=job.weights,
        seed=job.seed,
    )
    del alive
    if settings.fp8_recipe:
        float8.require_gpu(settings.fp8_recipe)
        float8.convert(model, settings.fp8_recipe)
    layers.arrange(
        model, recomputed=settings.recompute, compiled=settings.compile, checkpoint=versions.checkpoint(config)
    )
    model.train()
    size = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    total = sum(size.values())
    tied = model.config.tie_word_embeddings
    embedding = model.get_input_embeddings().weight
    counts = {
        "model_parameters": total,
        # A tied table is the output projection too, a matrix product like any other.
        "model_parameters_non_embedding": total - (0 if tied else getattr(embedding, "ds_numel", embedding.numel())),
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if settings.deepcompile:
        engine.compile()
    used = {
        "trainer": "reference" if settings.plain else "fast",
        "attention": attention.name,
        "attention_detail": attention.detail,
        "precision": f"fp8 {settings.fp8_recipe}" if settings.fp8_recipe else PRECISIONS[settings.dtype],
        "recompute": settings.recompute,
        "zero_stage": engine.zero_optimization_stage(),
        "micro_batch": settings.micro_batch,
        "gradient_accumulation": settings.gradient_accumulation,
        "compile": settings.compile,
        "liger": settings.liger,
        "optimizer": optimizer_name(engine),
    }
    return Built(engine, attention.flat, counts, used)


def optimizer_name(engine: Any) -> str:
    """The class that updates the weights of a DeepSpeed engine, below what ZeRO puts around it: `AdamW fused`."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    fused = any(group.get("fused") for group in getattr(optimizer, "param_groups", ()))
    return type(optimizer).__name__ + (" fused" if fused else "")


def _require_operations(config: Mapping[str, Any]) -> None:
    """Raise UsageError where DeepSpeed would have to build CUDA operations of its own, and cannot on this node."""
    zero = config.get("zero_optimization") or {}
    needed = [
        (f"deepspeed.zero_optimization.{key}", "quantizer", "QUANTIZER") for key in refusals.QUANTIZED if zero.get(key)
    ]
    if refusals.deepcompiles(config):
        needed.append(("deepspeed.compile.deepcompile", "dc", "DEEP_COMPILE"))
    for setting, operation, build in needed:
        from deepspeed.git_version_info import installed_ops
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None and not installed_ops.get(operation):
            raise UsageError(
                f"{setting} needs an operation that DeepSpeed builds with nvcc: install the CUDA toolkit on every "
                f"node, or DeepSpeed with DS_BUILD_{build}=1"
            )


def _use_liger(kernels: str) -> None:
    """Replace functions of transformers by Liger's kernels: `all`, only the `loss` with its projection, or `none`."""
    if kernels == "none":
        return
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    if kernels == "all":
        apply_liger_kernel_to_llama()
    else:
        apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False)


def optimizer_for(config: Mapping[str, Any], fused: bool) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration that asks for torch's fused optimizer only where there is one (`fused`)."""
    optimizer = config.get("optimizer", {})
    if fused or not optimizer.get("params", {}).get("fused"):
        return dict(config)
    return {**config, "optimizer": {**optimizer, "params": {**optimizer["params"], "fused": False}}}
