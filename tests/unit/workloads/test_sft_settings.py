"""What `sft` decides before torch is imported, and the configurations that are shipped for it."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UsageError
from runner.plan import config
from runner.workloads.job import RankJob
from runner.workloads.sft import data, resolve

MODELS = ["tiny", "llama-3.2-1b", "llama-2-7b", "llama-2-13b", "llama-2-70b"]
DEEPSPEED = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "eps": 1e-8}},
}
PARAMS = {"steps": 8, "warmup_steps": 2, "lr": None, "attention": "auto", "liger": "auto", "seq_len": None}


def job(device: str = "cpu", deepspeed: dict | None = None, **params) -> RankJob:
    return RankJob(
        run_id="run", cell="cell", test="sft", num_nodes=1, gpus_per_node=2, world_size=2, device=device, seed=0,
        params={**PARAMS, **params}, model={"name": "m", "vocab_size": 66, "max_seq_len": 64},
        deepspeed={**DEEPSPEED, **(deepspeed or {})}, data="/data",
    )  # fmt: skip


def test_settings_come_from_the_deepspeed_configuration_and_the_learning_rate_may_be_set():
    settings = resolve.resolve(job())
    assert (settings.micro_batch, settings.gradient_accumulation, settings.dtype) == (2, 4, "bfloat16")
    assert settings.deepspeed["optimizer"]["params"] == {"lr": 1e-5, "eps": 1e-8}
    assert resolve.resolve(job(lr=3e-4)).deepspeed["optimizer"]["params"] == {"lr": 3e-4, "eps": 1e-8}
    assert DEEPSPEED["optimizer"]["params"]["lr"] == 1e-5


def test_an_auto_that_nobody_resolved_is_named():
    left = {"train_batch_size": "auto", "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    with pytest.raises(UsageError, match=r'train_batch_size, zero_optimization\.reduce_bucket_size is still "auto"'):
        resolve.resolve(job(deepspeed=left))


def test_a_batch_that_does_not_multiply_is_refused():
    with pytest.raises(UsageError, match="train_batch_size 20 is not micro-batch 2 × accumulation 4 × 2 ranks = 16"):
        resolve.resolve(job(deepspeed={"train_batch_size": 20}))


def test_what_needs_a_gpu_is_refused_without_one():
    assert resolve.resolve(job()).liger == "none"
    with pytest.raises(UsageError, match=r"sft\.precision=fp8 needs a GPU"):
        resolve.resolve(job(precision="fp8"))
    with pytest.raises(UsageError, match="liger=true needs a GPU"):
        resolve.resolve(job(liger="true"))


@pytest.mark.parametrize(
    "setting",
    ["attention=varlen", "attention=flash_attention_3", "attention=flash_attention_4", "liger=true", "compile=true"],
)
def test_the_reference_refuses_what_only_the_fast_trainer_has(setting):
    name, value = setting.split("=")
    settings = {"trainer": "reference", name: True if name == "compile" else value}
    with pytest.raises(
        UsageError, match=f"trainer reference has no {name} {value}: leave it out, or take fast$"
    ) as raised:
        config.load_test("sft", settings)
    assert "\n" not in str(raised.value)
    assert config.load_test("sft", {**settings, "trainer": "fast"})


def test_the_reference_refuses_what_was_chosen_for_it_as_well():
    """A planner or a tuner that chooses settings does not pass them through the file's schema."""
    with pytest.raises(
        UsageError, match=r"^sft: trainer reference has no recompute selective: leave it out, or take fast$"
    ):
        resolve.resolve(job(trainer="reference", recompute="selective"))


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager", "flash_attention_2"])
def test_the_reference_has_the_attention_of_transformers(name):
    settings = config.load_test("sft", {"trainer": "reference", "attention": name}).model_dump()
    resolved = resolve.resolve(job(device="cuda", **settings))
    assert (resolved.plain, resolved.liger) == (True, "none")


@given(count=st.integers(1, 300), seed=st.integers(0, 10), start=st.integers(0, 1000), micro=st.integers(1, 5))
def test_each_epoch_holds_every_sequence_once_in_an_order_of_its_own(count, seed, start, micro):
    epoch = start % 4
    order = [data.place(epoch * count + i, count, seed) for i in range(count)]
    assert sorted(order) == list(range(count))
    if count > 20:
        assert order != [data.place((epoch + 1) * count + i, count, seed) for i in range(count)]
        assert order != [data.place(epoch * count + i, count, seed + 1) for i in range(count)]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_order_does_not_undo_the_shuffle_of_the_data(seed):
    """The data places sequence i at permutation[i] of numpy's generator of the same seed."""
    packed_at = np.random.default_rng(seed).permutation(1000)
    was = np.argsort(packed_at)
    order = was[[data.place(i, 1000, seed) for i in range(1000)]]
    assert (np.diff(order) == 1).sum() < 10


def packed(folder, seq_len: int = 32, vocab_size: int = 66) -> data.PackedData:
    for name, shape in {
        "input_ids": (4, seq_len),
        "labels": (4, seq_len),
        "position_ids": (4, seq_len),
        "n_tokens": 4,
    }.items():
        np.save(folder / f"{name}.npy", np.zeros(shape, np.int32))
    (folder / "manifest.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return data.PackedData(folder)


def test_data_that_does_not_fit_the_model_is_refused(tmp_path):
    packed(tmp_path).check(job(seq_len=32))
    with pytest.raises(UsageError, match="packed to 32 tokens, the job expects 64"):
        packed(tmp_path).check(job(seq_len=64))
    with pytest.raises(UsageError, match="sequences of 128 tokens, but m takes 64"):
        packed(tmp_path, seq_len=128).check(job())
    with pytest.raises(UsageError, match="tokenizer has 67 tokens, m embeds 66"):
        packed(tmp_path, vocab_size=67).check(job())
    with pytest.raises(UsageError, match=r"no prepared data in .*; make it with `runner data prepare`"):
        data.PackedData(tmp_path / "none")


def test_the_bound_of_samples_is_that_of_all_data_or_of_what_fits_where_it_is_large(tmp_path, monkeypatch):
    found = packed(tmp_path)
    assert found.longest == found.read(0, 2, seed=0).longest == 1  # every position is 0
    monkeypatch.setattr(data, "LOOKED_THROUGH", 8)
    assert packed(tmp_path).longest == 32


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_model_trains_with_its_deepspeed_configuration(name):
    model = config.load_model(name)
    values = config.load_deepspeed(model.deepspeed, {})
    assert set(resolve.unresolved(values)) <= {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    }
    assert values["zero_optimization"]["stage"] == 3
    assert values["bf16"] == {"enabled": True}
    assert values["zero_optimization"]["overlap_comm"] is True
    assert model.seq_len <= model.max_seq_len
    assert model.hidden_size % model.num_heads == 0 and model.num_heads % model.num_kv_heads == 0


@pytest.mark.parametrize(("size", "global_batch"), [("7b", 1024), ("13b", 512), ("70b", 256)])
def test_the_large_configurations_are_those_of_the_cluster(size, global_batch):
    values = config.load_deepspeed(f"ds_config_{size}", {})
    assert (values["train_batch_size"], values["gradient_accumulation_steps"]) == (global_batch, "auto")
    offloads = {"offload_optimizer", "offload_param"} & set(values["zero_optimization"])
    assert bool(offloads) == (size == "70b")
    # An optimizer on the CPU is DeepSpeed's own kernel; on GPUs torch's needs nothing compiled.
    assert values["optimizer"]["params"].get("torch_adam", False) == (size != "70b")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("tiny", 0.001), ("llama-3.2-1b", 1.236), ("llama-2-7b", 6.738), ("llama-2-13b", 13.016), ("llama-2-70b", 68.977)],
)
def test_architectures_have_the_published_number_of_parameters(name, billions):
    from runner.cluster import limits

    assert limits.parameters(config.load_model(name).model_dump()).total / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "kernels"),
    [
        ({}, "all"),
        ({"recompute": "none"}, "all"),
        ({"recompute": "full"}, "all"),
        ({"recompute": "selective"}, "loss"),
        ({"compile": True, "recompute": "none"}, "loss"),
        ({"precision": "fp8"}, "loss"),
        ({"liger": "false"}, "none"),
        ({"trainer": "reference"}, "none"),
    ],
    ids=str,
)
def test_liger_replaces_what_works_with_the_other_settings(monkeypatch, given, kernels):
    """Its kernels for rotary embeddings write into what selective recompute keeps; inside a graph they do not compile."""
    installed = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name in ("liger_kernel", "torchao") or installed(name)
    )
    resolved = resolve.resolve(job(device="cuda", **given))
    assert resolved.liger == kernels
    assert resolved.compile is bool(given.get("compile") or given.get("precision"))
