"""Layers that are compiled, recomputed or in 8 bits, under each stage of ZeRO, on two ranks over gloo.

All arms run in the same two processes, which takes some 40 s: they import torch, DeepSpeed and torchao once.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import model_probe
import ranks

pytestmark = pytest.mark.local
with_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")

FEW, MANY = {"num_layers": 1}, {"num_layers": 9}  # torch gives up when it has compiled the same code 8 times
ARMS = {
    **{f"stage {stage}": {**FEW, "stage": stage} for stage in (0, 1, 2, 3)},
    **{f"fp8 stage {stage}": {**FEW, "stage": stage, "recipe": "tensorwise"} for stage in (0, 1, 2, 3)},
    "fp8 rowwise": {**FEW, "stage": 3, "recipe": "rowwise"},
    "fp8 compiled": {**FEW, "stage": 3, "recipe": "tensorwise", "compiled": True},
    "hpz": {**FEW, "stage": 3, "zero_hpz_partition_size": 2},
    "plain": {**MANY, "stage": 3},
    "selective": {**MANY, "stage": 3, "recomputed": "selective"},
    "full": {**MANY, "stage": 3, "recomputed": "full"},
    "compiled": {**MANY, "stage": 3, "compiled": True},
    "compiled selective": {**MANY, "stage": 3, "compiled": True, "recomputed": "selective"},
    "compiled full": {**MANY, "stage": 3, "compiled": True, "recomputed": "full"},
    "compiled stage 0": {**MANY, "stage": 0, "compiled": True},
    "compiled stage 1": {**MANY, "stage": 1, "compiled": True},
}
if importlib.util.find_spec("torchao") is None:
    ARMS = {name: arm for name, arm in ARMS.items() if "recipe" not in arm}
COMPILED = [name for name, arm in ARMS.items() if arm.get("compiled")]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("layers")
    (folder / "arms.json").write_text(json.dumps(list(ARMS.values())))
    probe = str(Path(ranks.__file__).parent / "layers_probe.py")
    ended = ranks.start(folder, ranks.job("sft", 2, {}), program=[probe], timeout_s=400)
    assert ended.outcome.rc == 0, ended.outcome.stderr
    return dict(zip(ARMS, json.loads((folder / "found.json").read_text()), strict=True))


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_serves_all_layers_and_all_batches(found, name):
    """Nine layers, more than torch compiles before it gives up (8), and batches of one to six samples.

    Recomputed in full, a layer runs without gradients first: that is the second graph.
    """
    expected = 2 if name == "compiled full" else 1
    assert (found[name]["graphs"], found[name]["frames"], found[name]["breaks"]) == (expected, expected, {})


@pytest.mark.parametrize("name", ["selective", "full", "compiled", "compiled selective", "compiled full"])
def test_what_is_compiled_or_recomputed_computes_the_same(found, name):
    """As a graph rounds to bfloat16 at other places, not to the last bit."""
    plain = found["plain"]["losses"]
    assert plain[-1] < plain[0] - 0.1
    assert found[name]["losses"] == pytest.approx(plain, rel=2e-3)


@with_torchao
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_in_8_bits_follows_that_in_16(found, stage):
    """3 bits of mantissa are off by at most 6 %, a sum over 64 products by less than 1 %, and so is the loss."""
    fp8, bf16 = (found[f"{kind}stage {stage}"]["losses"] for kind in ("fp8 ", ""))
    assert fp8 == pytest.approx(bf16, rel=0.005)
    assert fp8 != bf16


@with_torchao
@pytest.mark.parametrize("name", ["fp8 rowwise", "fp8 compiled"])
def test_every_recipe_follows_compiled_or_not(found, name):
    assert found[name]["losses"] == pytest.approx(found["stage 3"]["losses"], rel=0.005)


def test_a_compiled_layer_releases_the_weights_that_zero_3_gathered(found):
    """torchao keeps a view of each until the backward pass where nothing is compiled: that is why fp8 is compiled."""
    for name in ("stage 3", "plain", "selective", *(name for name in COMPILED if ARMS[name]["stage"] == 3)):
        assert found[name]["gathered"] == 0, name
    if "fp8 stage 3" in ARMS:
        assert found["fp8 stage 3"]["gathered"] > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_kernel_updates_all_weights_under_every_stage(found, stage):
    assert found[f"stage {stage}"]["optimizer"] == "AdamW fused"


def test_a_second_copy_of_the_weights_in_a_group_changes_no_loss(found):
    assert found["hpz"]["losses"] == pytest.approx(found["stage 3"]["losses"], rel=1e-6)


# ---- on a GPU: torch.compile writes kernels, products are in 8 bits, attention is one operation ----

ON_GPU = {
    "plain": {"recompute": "none"},
    "selective": {"recompute": "selective"},
    "compiled": {"recompute": "none", "compile": True},
    "fp8": {"recompute": "none", "precision": "fp8"},
}


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory) -> dict[str, ranks.Ended]:
    """Each arm in a process of its own, some 20 s each."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    folder = tmp_path_factory.mktemp("gpu")
    data = ranks.write_packed_data(folder / "data")
    settings = {"steps": 6, "warmup_steps": 2, "lr": 1e-3, "attention": "auto", "liger": "auto"}
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    }
    model = {**model_probe.MODEL, **MANY}
    return {
        name: ranks.start(
            folder / name,
            ranks.job("sft", 1, {**settings, **given}, model=model, deepspeed=config, data=str(data), device="cuda"),
        )
        for name, given in ON_GPU.items()
    }


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "apart"), [("selective", 0.01), ("compiled", 0.01), ("fp8", 0.02)])
def test_on_a_gpu_the_losses_are_those_of_plain_layers(on_gpu, name, apart):
    """A layer that is compiled for each batch would end the run."""
    import torch

    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        assert "needs a GPU of compute capability 8.9" in on_gpu[name].outcome.stderr
        return
    assert on_gpu[name].outcome.rc == 0, on_gpu[name].outcome.stderr
    plain = on_gpu["plain"].values("loss")
    assert plain[-1] < plain[0] - 0.1
    assert on_gpu[name].values("loss") == pytest.approx(plain, rel=apart)
    (used,) = [event for event in on_gpu[name].ranks[0] if event["event"] == "used"]
    assert used["compile"] is (name in ("compiled", "fp8"))
    assert used["precision"] == ("fp8 tensorwise" if name == "fp8" else "bf16")
    assert used["optimizer"] == "AdamW fused" and used["liger"] in ("loss", "none")
