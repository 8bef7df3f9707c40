"""Settings of `sft` that cannot work together are one line before a node is used."""

from __future__ import annotations

import pytest

from runner.errors import UsageError
from runner.plan import config
from runner.workloads.sft import refusals

ZERO = "deepspeed.zero_optimization"


def refuse(model: str = "llama-2-7b", device: str = "cuda", gpus: int = 8, nodes: int = 2, **more) -> None:
    params = config.load_test("sft", more.pop("sft", {})).model_dump()
    known = config.load_model(model).model_dump()
    deepspeed = config.load_deepspeed(known["deepspeed"], more.pop("deepspeed", {}))
    deepspeed = refusals.with_split(deepspeed, params["tensor_parallel"])
    params = {**params, "seq_len": params["seq_len"] or known["seq_len"]}
    refusals.refuse(params, known, deepspeed, device=device, gpus_per_node=gpus, world_size=gpus * nodes)


def zero(**settings) -> dict:
    return {"deepspeed": {f"zero_optimization.{key}": value for key, value in settings.items()}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sft": {"precision": "fp8", "fp8_recipe": "rowwise", "compile": True}},
        {"model": "llama-2-70b", "sft": {"tensor_parallel": 8}},
        {"model": "llama-3.2-1b", "sft": {"tensor_parallel": 4, "recompute": "full"}},
        zero(zero_hpz_partition_size=8),
        zero(zero_hpz_partition_size=4, zero_quantized_weights=True, zero_quantized_gradients=True),
        {"deepspeed": {"compile.deepcompile": True}},
        {"sft": {"recompute": "selective", "compile": True}},
    ],
    ids=str,
)
def test_what_works_together_is_planned(settings):
    refuse(**settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"device": "cpu", "sft": {"compile": True, "recompute": "selective"}}, "compiles nothing on CPUs"),
        (
            {"sft": {"precision": "fp8", "seq_len": 1000}},
            "sft.precision=fp8 needs multiples of 16: sft.seq_len is 1000",
        ),
        (
            {"sft": {"tensor_parallel": 3}},
            "sft.tensor_parallel=3 does not divide num_heads 32, num_kv_heads 32, intermediate_size 11008 of model llama-2-7b: 2, 4, 8 can",
        ),
        (
            {"model": "llama-3.2-1b", "sft": {"tensor_parallel": 16}, "gpus": 16},
            "does not divide num_kv_heads 8 of model llama-3.2-1b: 2, 4, 8 can",
        ),
        ({"sft": {"tensor_parallel": 8}, "gpus": 4}, "does not divide the 4 GPUs of a node"),
        ({"sft": {"tensor_parallel": 2}, **zero(stage=0)}, "needs ZeRO stage 1, 2 or 3"),
        ({"sft": {"tensor_parallel": 2, "compile": True}}, "sft.tensor_parallel does not go with sft.compile=true"),
        ({"sft": {"tensor_parallel": 2, "precision": "fp8"}}, "sft.tensor_parallel does not go with sft.precision=fp8"),
        ({"sft": {"tensor_parallel": 2, "recompute": "selective"}}, "does not go with sft.recompute=selective"),
        (zero(zero_hpz_partition_size=3), f"{ZERO}.zero_hpz_partition_size=3 does not divide the 8 GPUs of a node"),
        (zero(zero_hpz_partition_size=16), f"{ZERO}.zero_hpz_partition_size=16 does not divide the 8 GPUs of a node"),
        (zero(zero_hpz_partition_size=8, stage=2), f"zero_hpz_partition_size needs {ZERO}.stage=3, it is 2"),
        (zero(zero_quantized_weights=True, stage=1), f"zero_quantized_weights needs {ZERO}.stage=3, it is 1"),
        ({"device": "cpu", **zero(zero_quantized_gradients=True)}, "zero_quantized_gradients needs GPUs"),
        ({"device": "cpu", "deepspeed": {"compile.deepcompile": True}}, "deepspeed.compile.deepcompile needs GPUs"),
        (
            {"sft": {"compile": True}, "deepspeed": {"compile.deepcompile": True}},
            "compiles the whole model, sft.compile=true each layer",
        ),
        ({"deepspeed": {"compile.deepcompile": True, "zero_optimization.stage": 0}}, f"needs {ZERO}.stage 1, 2 or 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_together_is_refused(settings, line):
    with pytest.raises(UsageError) as error:
        refuse(**settings)
    assert line in str(error.value) and "\n" not in str(error.value)
