"""Ceilings and arithmetic, against the published and derived values of REFERENCE.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runner.cluster import limits

MODELS = Path(__file__).parents[3] / "configs" / "models"


def model(name: str) -> dict:
    return yaml.safe_load((MODELS / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("collective", "factor"),
    [
        ("all_reduce", 1.75),
        ("all_gather", 0.875),
        ("reduce_scatter", 0.875),
        ("all_to_all", 0.875),
        ("broadcast", 1.0),
        ("send_recv", 1.0),
        ("ping_pong", 1.0),
    ],
)
def test_busbw_factor_of_eight_ranks_is_nccl_tests(collective: str, factor: float) -> None:
    assert limits.busbw_factor(collective, 8) == factor


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_one_rank_moves_nothing(collective: str) -> None:
    assert limits.busbw_factor(collective, 1) == 0


def test_a_barrier_has_no_bandwidth() -> None:
    with pytest.raises(ValueError, match="barrier"):
        limits.busbw_factor("barrier", 8)


@pytest.mark.parametrize(("nodes", "tree"), [(2, 187.5), (4, 129.2), (8, 112.5)])
def test_all_reduce_ceilings_of_two_400g_nics(nodes: int, tree: float) -> None:
    found = limits.busbw_ceilings("all_reduce", nodes, 8, limits.nic_gb_per_s(2, 400), 480)
    assert found["ring"] == limits.Limit(100, "NICs of a node")
    assert found["tree"].gb_per_s == pytest.approx(tree, abs=0.05)


def test_nvlink_binds_inside_a_node_and_caps_fast_fabrics() -> None:
    assert limits.busbw_ceiling("all_reduce", 1, 8, 100, 480) == limits.Limit(480, "NVLink inside a node")
    assert limits.busbw_ceiling("all_reduce", 2, 8, 400, 480) == limits.Limit(480, "NVLink inside a node")


def test_one_gpu_a_node_gains_nothing_from_a_hierarchy() -> None:
    assert limits.busbw_ceiling("all_reduce", 8, 1, 50, 480) == limits.Limit(50, "NICs of a node")


def test_all_to_all_shares_the_nics_among_the_gpus() -> None:
    """Each of 8 GPUs sends half of its data off a node of two: 8 · S/2 bytes over 100 GB/s."""
    ceiling = limits.busbw_ceiling("all_to_all", 2, 8, 100, 480)
    assert ceiling is not None
    seconds = 8 * 0.5 / 100
    assert ceiling.gb_per_s == pytest.approx(1 / seconds * 15 / 16)


@pytest.mark.parametrize("unknown", [None, 0])
def test_unknown_rates_give_no_ceiling(unknown: float | None) -> None:
    assert limits.busbw_ceiling("all_reduce", 8, 1, unknown, None) is None
    assert limits.busbw_ceiling("all_reduce", 8, 8, unknown, 480) is None  # NVLink does not bind across nodes
    assert limits.busbw_ceiling("all_reduce", 1, 1, 100, 480) is None


@given(
    st.sampled_from([c for c in limits.COLLECTIVES]),
    st.integers(2, 64),
    st.integers(1, 16),
    st.floats(1, 1000),
    st.floats(1, 1000),
)
def test_no_ceiling_exceeds_nvlink_or_twice_the_nics(
    collective: str, nodes: int, gpus: int, nic: float, nvlink: float
) -> None:
    """A node's NICs carry at least half of what a hierarchy makes of them; more nodes never make it faster."""
    ceiling = limits.busbw_ceiling(collective, nodes, gpus, nic, nvlink)
    more = limits.busbw_ceiling(collective, nodes + 1, gpus, nic, nvlink)
    assert ceiling is not None and more is not None
    assert ceiling.gb_per_s <= 2 * nic * (1 + 1e-9)
    assert gpus == 1 or ceiling.gb_per_s <= nvlink * (1 + 1e-9)
    assert more.gb_per_s <= ceiling.gb_per_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "total"),
    [("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192)],
)
def test_parameter_counts_are_those_of_the_published_models(name: str, total: int) -> None:
    assert limits.parameters(model(name)).total == total


def test_a_tied_output_head_is_stored_once_but_still_multiplies() -> None:
    tied = limits.parameters(model("llama-3.2-1b"))
    assert tied.total == 1_235_814_400
    assert tied.non_embedding == tied.total
    untied = limits.parameters({**model("llama-3.2-1b"), "tie_embeddings": False})
    assert untied.total == tied.total + tied.embedding
    assert untied.non_embedding == tied.non_embedding


def test_flops_are_6n_and_attention() -> None:
    seven = model("llama-2-7b")
    n = 6_738_415_616 - 32_000 * 4096
    attention = 12 * 32 * 4096 * 2048
    assert limits.flops_per_token(seven, 2048) == 6 * n + attention
    assert limits.flops_per_token(seven, 2048, causal=True) == 6 * n + attention / 2
    assert limits.flops_per_token(seven, 2048, recompute=True) == 8 * n + attention


def test_mfu_of_the_published_fsdp_run_is_about_what_was_published() -> None:
    """PyTorch FSDP, Llama-2 7B, 96 H100: 7,500 tokens/s per GPU is given as 37 % MFU."""
    flop = limits.flops_per_token(model("llama-2-7b"), 4096)
    assert limits.mfu(96 * 7500, flop, 96, 989) == pytest.approx(0.37, abs=0.03)


def test_zero_stages_divide_what_they_say() -> None:
    billion = 10**9
    gib = limits.GIB
    assert limits.model_state_gib(billion, 8, 0) == pytest.approx(18e9 / gib)
    assert limits.model_state_gib(billion, 8, 1) == pytest.approx((6e9 + 12e9 / 8) / gib)
    assert limits.model_state_gib(billion, 8, 2) == pytest.approx((2e9 + 16e9 / 8) / gib)
    assert limits.model_state_gib(billion, 8, 3) == pytest.approx(18e9 / 8 / gib)


def test_what_is_in_host_memory_is_not_counted() -> None:
    seventy = model("llama-2-70b")
    everything = limits.memory_estimate(seventy, 8, 4096, 1, 140.4, optimizer_offloaded=True, weights_offloaded=True)
    assert everything.states == 0 and everything.fits is True
    optimizer = limits.memory_estimate(seventy, 8, 4096, 1, 140.4, optimizer_offloaded=True)
    assert optimizer.states * limits.GIB == pytest.approx(2 * 68_976_648_192 / 8)


def test_without_checkpointing_every_layer_keeps_its_inside() -> None:
    """7B's width, 8 layers, 4 × 4,096 tokens: 30 and 20 GiB were measured, where all states are in bf16."""
    eight = {**model("llama-2-7b"), "num_layers": 8}
    sizes = {"gradient": 2, "weights_offloaded": False, "fused_loss": True}
    for recompute, measured in (("none", 30), ("full", 20)):
        found = limits.memory_estimate(eight, 1, 4096, 4, 140.4, 0, recompute=recompute, **sizes)
        states = 8 * limits.parameters(eight).total / limits.GIB
        assert states + found.activations + found.working == pytest.approx(measured, rel=0.15) and found.logits == 0


def test_what_a_layer_keeps_grows_with_every_width_that_it_has() -> None:
    for name in ("llama-2-7b", "llama-2-70b", "llama-3.2-1b"):
        kept = [limits.kept_bytes(model(name), recompute) for recompute in ("full", "selective", "none")]
        assert kept == sorted(kept) and kept[0] == 2 * model(name)["hidden_size"]
        wider = {**model(name), "intermediate_size": 2 * model(name)["intermediate_size"]}
        assert limits.kept_bytes(wider, "none") > kept[2] and limits.kept_bytes(wider, "full") == kept[0]


def test_70b_does_not_fit_on_one_node_of_h200_and_does_on_two() -> None:
    seventy = model("llama-2-70b")
    assert limits.model_state_gib(68_976_648_192, 8) * limits.GIB == pytest.approx(155e9, rel=0.01)
    assert limits.memory_estimate(seventy, 8, 4096, 1, 140.4).fits is False
    assert limits.memory_estimate(seventy, 16, 4096, 1, 140.4).fits is True
    assert limits.memory_estimate(seventy, 16, 4096, 1, 0).fits is None


def test_an_exchange_between_nodes_shares_the_nics_among_the_gpus_of_a_node():
    """8 GPUs behind 2 × 400 Gb/s: 12.5 GB/s each one way, 1600 Gb/s in both directions together."""
    ceiling = limits.busbw_ceiling("send_recv", 2, 8, limits.nic_gb_per_s(2, 400), 480)
    assert ceiling == limits.Limit(12.5, "NICs of a node")
    assert ceiling.gb_per_s * 8 * 2 * 8 == 1600
