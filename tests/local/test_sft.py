"""Test `sft` on real ranks with DeepSpeed ZeRO-3 in bf16 over gloo: it learns, and what it reports is so."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model_probe
import oldest
import ranks
from runner.cluster import limits
from runner.system import process
from runner.workloads.sft.data import PackedData
from runner.workloads.sft.model import build_model, inputs, labels, token_loss

pytestmark = pytest.mark.local

MODEL = {**model_probe.MODEL, "rope_theta": 10000.0}
PARAMS = {"steps": 12, "warmup_steps": 2, "lr": 1e-2, "attention": "auto", "liger": "auto", "compile": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return ranks.write_packed_data(tmp_path_factory.mktemp("data") / "packed")


def deepspeed(world_size: int, micro: int, accumulation: int) -> dict:
    return {
        "train_batch_size": world_size * micro * accumulation,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95], "torch_adam": True, "fused": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    }


def job(data: Path, world_size: int, micro: int, accumulation: int, **more) -> dict:
    params = {**PARAMS, **more.pop("params", {})}
    config = deepspeed(world_size, micro, accumulation)
    return ranks.job("sft", world_size, params, model=MODEL, deepspeed=config, data=str(data), **more)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, data) -> ranks.Ended:
    ended = ranks.start(tmp_path_factory.mktemp("two"), job(data, 2, micro=2, accumulation=2))
    assert ended.outcome.rc == 0, ended.outcome.stderr
    return ended


def test_the_loss_starts_at_chance_and_falls(two_ranks):
    loss = two_ranks.values("loss")
    assert loss[0] == pytest.approx(math.log(ranks.VOCAB_SIZE), rel=0.02)
    assert loss[-1] < loss[0] - 2
    assert len(loss) == 14 and two_ranks.values("loss", rank=1) == []


def test_every_rank_reports_every_step_and_warm_up_is_told_apart(two_ranks):
    for rank in (0, 1):
        for metric in ("step_time_s", "tokens", "loss_tokens", "positions"):
            expected = [{"step": step, "measured": step >= 2} for step in range(14)]
            found = [{**context} for context in two_ranks.contexts(metric, rank)]
            begun = [context.pop("started_s") for context in found if "started_s" in context]
            assert found == expected, metric
            assert metric != "step_time_s" or (len(begun) == 14 and begun == sorted(begun))
        assert min(two_ranks.values("step_time_s", rank)) > 0
        assert two_ranks.values("peak_memory_gib", rank)[0] == pytest.approx(0.5, abs=0.4)
        assert two_ranks.ranks[rank][-1]["event"] == "end"


def test_only_real_tokens_are_counted(two_ranks, data):
    """8 steps of 8 sequences are one epoch of the 64."""
    real, labels = np.load(data / "n_tokens.npy"), np.load(data / "labels.npy")
    over_ranks = {
        m: np.add(two_ranks.values(m, 0), two_ranks.values(m, 1)) for m in ("tokens", "loss_tokens", "positions")
    }
    assert over_ranks["tokens"][:8].sum() == real.sum()
    assert over_ranks["loss_tokens"][:8].sum() == (labels != -100).sum()
    assert set(over_ranks["positions"]) == {8 * ranks.SEQ_LEN}
    assert (over_ranks["loss_tokens"] < over_ranks["tokens"]).all()
    assert (over_ranks["tokens"] < over_ranks["positions"]).all()


def test_what_belongs_to_the_whole_cell_is_reported_once(two_ranks):
    count = limits.parameters(MODEL)
    assert two_ranks.values("model_parameters") == [count.total]
    assert two_ranks.values("model_parameters_non_embedding") == [count.non_embedding]
    assert two_ranks.values("packing_utilisation_pct")[0] == pytest.approx(96.5, abs=1)
    (setup,), (first) = two_ranks.values("setup_time_s"), two_ranks.values("time_to_first_step_s")
    assert first == [pytest.approx(setup + two_ranks.values("step_time_s")[0], abs=0.05)]
    assert 20 < two_ranks.values("sample_tokens_mean")[0] < ranks.SEQ_LEN
    assert two_ranks.values("model_parameters", rank=1) == []


def test_rank_0_says_what_it_chose_before_its_first_step(two_ranks):
    names = [event.get("metric", event["event"]) for event in two_ranks.ranks[0] if event["event"] != "progress"]
    assert names[:6] == ["start", "import_time_s", "matmul_tflop_per_s", "used", "build_time_s", "step_time_s"]
    (used,) = (event for event in two_ranks.ranks[0] if event["event"] == "used")
    assert {name: value for name, value in used.items() if name not in ("event", "rank", "time_s")} == {
        "trainer": "fast", "attention": "sdpa", "attention_detail": "scaled_dot_product_attention of each sample",
        "precision": "bf16", "recompute": "full", "compile": False, "liger": "none", "optimizer": "AdamW fused",
        "zero_stage": 3, "micro_batch": 2, "gradient_accumulation": 2,
    }  # fmt: skip
    assert all(event["event"] != "used" for event in two_ranks.ranks[1])


def test_every_rank_measures_what_its_device_can_multiply(two_ranks):
    for rank in (0, 1):
        (rate,) = two_ranks.values("matmul_tflop_per_s", rank)
        assert 1e-4 < rate < 10
    (imported,), (built,), (setup,) = (two_ranks.values(f"{name}_time_s") for name in ("import", "build", "setup"))
    assert min(imported, built) > 0 and imported + built < setup


def test_the_output_of_the_ranks_has_no_noise(two_ranks):
    assert two_ranks.outcome.stdout == ""
    assert "Warning" not in two_ranks.outcome.stderr


def test_the_split_into_ranks_and_micro_batches_does_not_change_the_training(tmp_path, data):
    """The same global batch on 2 ranks, on one, and on 2 that share layers, with and without checkpoints: the same losses.

    A loss that averaged averages would differ, since micro-batches hold different numbers of loss tokens. In float32.
    """
    losses = []
    tokens = []
    for world_size, parts, micro, recompute in ((2, 1, 2, "full"), (1, 1, 4, "none"), (2, 2, 4, "full")):
        cell = job(data, world_size, micro, 2, params={"steps": 4, "recompute": recompute})
        cell["deepspeed"].pop("bf16")
        cell["deepspeed"] |= {"train_batch_size": 8, "tensor_parallel": {"autotp_size": parts}}
        ended = ranks.start(tmp_path / f"{world_size}-{parts}", cell)
        assert ended.outcome.rc == 0, ended.outcome.stderr
        losses.append(ended.values("loss"))
        tokens.append(sum(sum(ended.values("tokens", rank)) for rank in range(world_size)))
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert tokens[0] == tokens[1] == tokens[2]


def test_the_fast_trainer_learns_as_the_reference_does(tmp_path, data):
    """Rows without a mask, against a mask between samples: the losses of every step, at most 0.5 % apart."""
    losses = {}
    for trainer in ("fast", "reference"):
        cell = job(data, 1, micro=2, accumulation=2, params={"steps": 10, "lr": 3e-3, "trainer": trainer})
        ended = ranks.start(tmp_path / trainer, cell)
        assert ended.outcome.rc == 0, ended.outcome.stderr
        losses[trainer] = ended.values("loss")
        (used,) = (event for event in ended.ranks[0] if event["event"] == "used")
        assert used["trainer"] == trainer
        assert ("mask" in used["attention_detail"]) == (trainer == "reference")
    assert losses["fast"][-1] < losses["fast"][0] - 1
    assert losses["fast"] == pytest.approx(losses["reference"], rel=0.005)


def test_weights_of_a_checkpoint_are_loaded_under_zero_3(tmp_path, data):
    import torch

    model = build_model(MODEL, attention="sdpa", dtype=torch.float32)
    with torch.no_grad():  # this one always says token 7: its loss is not that of chance
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "weights")
    ended = ranks.start(tmp_path / "cell", job(data, 2, 2, 2, weights=str(tmp_path / "weights"), params={"steps": 1}))
    assert ended.outcome.rc == 0, ended.outcome.stderr
    assert ended.values("loss")[0] == pytest.approx(math.log(ranks.VOCAB_SIZE), rel=1e-5)


def test_a_training_that_diverges_ends_every_rank_with_one_line(tmp_path, data):
    ended = ranks.start(tmp_path, job(data, 2, 2, 2, params={"lr": 1e38}))
    assert ended.outcome.rc != 0
    # Every rank knows; whether the launcher ends the second before it says so is a race.
    line = r"^rank [01]: the loss of step 1 is (nan|inf): training diverged; lower sft.lr$"
    assert re.search(line, ended.outcome.stderr, re.MULTILINE)
    assert "workloads/sft.py" not in ended.outcome.stderr  # no traceback of ours
    assert all(events[-1]["event"] != "end" for events in ended.ranks)


# ---- with the oldest transformers of a lock: this Python has the newest ----


@pytest.fixture(scope="module")
def old_transformers() -> dict[str, str]:
    """The environment in which it is imported."""
    try:
        folder = oldest.transformers()
    except LookupError as error:
        pytest.skip(str(error))
    return {"PYTHONPATH": f"{folder}:{Path(ranks.__file__).parent}"}


@pytest.fixture(scope="module")
def probes(tmp_path_factory, data, old_transformers) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `model_probe` finds with the newest transformers, and with the oldest."""
    import torch

    folder = tmp_path_factory.mktemp("probe")
    for name, model in model_probe.MODELS.items():
        built = build_model(model, attention="sdpa", dtype=torch.float32, seed=7)
        built.save_pretrained(folder / "checkpoints" / name)
    argv = [sys.executable, model_probe.__file__, str(folder / "checkpoints"), str(data), str(folder / "old.npz")]
    outcome = process.run(argv, timeout_s=180, env={**os.environ, **old_transformers})
    assert outcome.rc == 0, outcome.stderr
    found = outcome.stdout.split()[-1]
    assert found == oldest.lock().pins["transformers"] != importlib.metadata.version("transformers")
    return model_probe.probe(folder / "checkpoints", data), dict(np.load(folder / "old.npz"))


@pytest.mark.parametrize("attention", model_probe.ATTENTION)
def test_with_every_transformers_attention_stops_at_samples(probes, attention):
    for found in probes:
        np.testing.assert_allclose(found[attention], found["alone"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [*model_probe.ATTENTION, *(f"{name}-loss" for name in model_probe.ATTENTION), "plain", "scaled"]
)
def test_every_transformers_computes_the_same(probes, name):
    """From the same seed, and with the same checkpoint, with the base and the scaling of its rotary embeddings."""
    new, old = (found[name] for found in probes)
    np.testing.assert_allclose(old, new, atol=1e-5, rtol=1e-4)


def test_the_checkpoints_differ_so_that_the_comparison_can_fail(probes):
    assert np.abs(probes[0]["plain"] - probes[0]["scaled"]).max() > 1e-3


def test_with_every_transformers_training_has_the_same_loss(tmp_path, data, two_ranks, old_transformers):
    """Under ZeRO-3 in bfloat16, from random weights: some 10 s, for two ranks that import it all."""
    ended = ranks.start(tmp_path, job(data, 2, micro=2, accumulation=2), env=old_transformers)
    assert ended.outcome.rc == 0, ended.outcome.stderr
    assert ended.values("loss") == pytest.approx(two_ranks.values("loss"), rel=0.005)
    assert ended.values("model_parameters") == two_ranks.values("model_parameters")


# ---- without ranks ----


def kinds(device: str) -> list[Any]:
    """Every kind of attention for `device`, skipped with the reason where this machine cannot compute it."""
    import torch

    from runner.workloads.sft import attention

    if device == "cuda" and not torch.cuda.is_available():
        return [pytest.param(kind, marks=pytest.mark.skip("no GPU"), id=kind.name) for kind in attention.KINDS]
    return [pytest.param(kind, id=f"{kind.name}-{kind.device}") for kind in attention.KINDS]


def packed_and_alone(kind: Any, device: str, data: Path) -> None:
    """Compare logits and gradients of the loss of packed samples with those of each sample alone, under a causal mask."""
    import torch

    from runner.workloads.sft import attention

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tolerance = {"atol": 0.02, "rtol": 0.05} if device == "cuda" else {"atol": 1e-5, "rtol": 1e-4}
    place = torch.device(device)
    batch = PackedData(data).read(0, 3, seed=0)
    try:
        kernel = kind.kernel(place, attention.shape(MODEL, dtype, ranks.SEQ_LEN))
    except attention.Unusable as reason:
        pytest.skip(f"{kind.name} {reason}")
    chosen = attention.Attention(kind.name, kind.detail, kernel)
    divisor = torch.tensor(float(batch.loss_tokens), device=place)

    model = build_model(MODEL, attention=chosen.register(), dtype=dtype).to(place)
    logits = model(**inputs(batch, flat=chosen.flat, device=place, dtype=dtype)).logits.reshape(-1, ranks.VOCAB_SIZE)
    token_loss(logits[None], labels(batch, flat=True, device=place), divisor).backward()

    alone = build_model(MODEL, attention="sdpa", dtype=torch.float32).to(place)
    ids, targets = (torch.from_numpy(x).to(place, torch.int64).reshape(-1) for x in (batch.input_ids, batch.labels))
    for begin, end in itertools.pairwise(batch.bounds):
        apart = alone(input_ids=ids[begin:end][None], use_cache=False).logits
        torch.testing.assert_close(logits[begin:end].float(), apart[0], **tolerance)
        token_loss(apart, targets[begin:end][None], divisor).backward()
    for (name, weight), right in zip(model.named_parameters(), alone.parameters(), strict=True):
        off = (weight.grad.float() - right.grad).norm() / right.grad.norm()
        assert off < (0.05 if device == "cuda" else 1e-4), name

    crossing = alone(input_ids=ids.reshape(batch.input_ids.shape), use_cache=False).logits.reshape(-1, ranks.VOCAB_SIZE)
    second = batch.bounds[1]
    assert (crossing[second] - logits[second]).abs().max() > 1e-2  # that the comparison can fail


@pytest.mark.parametrize("kind", kinds("cpu"))
def test_attention_does_not_cross_the_samples_of_a_sequence(kind, data):
    packed_and_alone(kind, "cpu", data)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", kinds("cuda"))
def test_on_a_gpu_attention_does_not_cross_the_samples_of_a_sequence(kind, data):
    packed_and_alone(kind, "cuda", data)


def test_a_kernel_gets_one_row_its_boundaries_and_a_bound_that_no_batch_changes(data):
    """A STAND-IN for a GPU's kernel notes what each layer hands it; key and value heads are not repeated."""
    import torch

    from runner.workloads.sft import attention

    seen = []

    def kernel(q, k, v, bounds, longest):
        seen.append((q.shape, k.shape, v.shape, bounds, longest, q.stride(-1), q.dtype))
        return attention.by_sample(q, k, v, bounds, longest)

    chosen = attention.Attention("varlen", "a stand-in", kernel)
    model = build_model(MODEL, attention=chosen.register(), dtype=torch.bfloat16)
    cpu, size = torch.device("cpu"), 3 * ranks.SEQ_LEN
    packed = PackedData(data)
    batches = [packed.read(first, 3, seed=0) for first in (0, 3)]
    lengths = [np.diff(packed.read(0, packed.count, seed=0).bounds).max(), *(np.diff(b.bounds).max() for b in batches)]
    assert packed.longest == lengths[0] < ranks.SEQ_LEN and len({*lengths}) > 1
    for batch in batches:
        arguments = inputs(batch, flat=True, device=cpu, dtype=torch.bfloat16)
        assert arguments["input_ids"].shape == arguments["position_ids"].shape == (1, size)
        assert labels(batch, flat=True, device=cpu).shape == (1, size)
        model(**arguments)
    heads, pairs = (size, 4, 16), (size, 2, 16)
    assert [call[:3] for call in seen] == [(heads, pairs, pairs)] * 4  # two layers of two batches
    assert {call[4:] for call in seen} == {(packed.longest, 1, torch.bfloat16)}
    for call, batch in zip(seen[::2], batches, strict=True):
        starts = [place for place in range(size) if batch.position_ids.reshape(-1)[place] == 0]
        assert call[3].dtype == torch.int32 and call[3].tolist() == [*starts, size]
    assert seen[0][3].tolist() != seen[2][3].tolist()


@pytest.mark.gpu
@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="no GPU")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 64), (32, 32, 128), (64, 8, 128)])
def test_on_a_gpu_auto_needs_no_mask_and_products_have_a_rate(heads, kv_heads, head_dim):
    """The heads of 1B, 7B and 70B."""
    import torch

    from runner.workloads.sft import attention, matmul

    gpu = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(gpu)[0] < 8:
        pytest.skip("compute capability below 8.0")
    pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10")
    chosen = attention.choose("auto", gpu, attention.Shape(heads, kv_heads, head_dim, torch.bfloat16, 4096))
    assert chosen.flat and ";" not in chosen.detail  # nothing that is installed is broken
    model = {**MODEL, "hidden_size": heads * head_dim, "num_heads": heads, "num_kv_heads": kv_heads}
    model |= {"intermediate_size": 3 * heads * head_dim, "num_layers": 8, "vocab_size": 32000}
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    rate = matmul.tflop_per_s(model, 16384, gpu, torch.bfloat16)
    assert 50 < rate < 5000
    assert torch.cuda.memory_reserved() <= before + (256 << 20)  # the workspace of the library stays


def test_random_weights_are_given_by_the_seed_alone():
    import torch

    def weights(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return list(build_model(MODEL, attention="sdpa", dtype=dtype, seed=seed).parameters())

    first = weights(3)
    assert all(map(torch.equal, first, weights(3)))
    assert all(map(torch.equal, [weight.bfloat16() for weight in first], weights(3, torch.bfloat16)))
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.05) for weight in first if weight.dim() > 1)
    others = [other for seed in (0, 4) for other in weights(seed)]
    for weight in first:
        assert weight.dim() == 1 or not any(
            torch.equal(weight, other) for other in others if other.shape == weight.shape
        )


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_shares_the_weights_of_the_embedding_where_the_model_says_so(tied):
    import torch

    model = build_model({**MODEL, "tie_embeddings": tied}, attention="sdpa", dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert (
        sum(weight.numel() for weight in model.parameters())
        == limits.parameters({**MODEL, "tie_embeddings": tied}).total
    )


def test_weights_of_another_architecture_are_refused(tmp_path):
    import torch

    from runner.errors import UsageError

    build_model(MODEL, attention="sdpa", dtype=torch.float32).save_pretrained(tmp_path)
    other = {**MODEL, "num_layers": 3}
    with pytest.raises(UsageError, match="num_hidden_layers 2, model test has 3"):
        build_model(other, attention="sdpa", dtype=torch.float32, weights=str(tmp_path))
    with pytest.raises(UsageError, match="cannot read weights"):
        build_model(other, attention="sdpa", dtype=torch.float32, weights=str(tmp_path / "none"))
