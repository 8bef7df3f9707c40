"""What does not fit into the GPUs is refused, with what would fit; what ran is not refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from plans import request

from runner.errors import UsageError
from runner.plan import build, config, describe, fit, memory
from runner.plan.plan import Batch
from runner.system import nodeset

H200 = {"name": "h200-sxm", **config.load_hardware("h200-sxm").model_dump()}
SEVEN = config.load_model("llama-2-7b").model_dump()
SEVENTY = config.load_model("llama-2-70b").model_dump()
NO_OFFLOAD = [f"deepspeed.zero_optimization.offload_{what}.device=none" for what in ("optimizer", "param")]
LITERAL = "sft.gradient_accumulation=16"
ZERO3 = config.load_deepspeed("ds_config_7b", {})
EVERY_FILE = config.deepspeed_files({})


def params(**changes):
    return {**config.load_test("sft", {}).model_dump(), "seq_len": 4096, **changes}


def changed(overrides):
    return config.load_deepspeed("ds_config_7b", overrides)


def with_layers(number):
    return {**SEVEN, "num_layers": number}


# --- the estimate against what was measured -----------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "micro_batch", "recompute", "measured"),
    [
        (SEVEN, 1, "full", 106.5),
        (SEVEN, 2, "full", 106.5),
        (with_layers(8), 1, "full", 34),
        (with_layers(8), 1, "none", 34),
        (with_layers(8), 8, "none", 62),
    ],
)
def test_one_h200_measured_this(model, micro_batch, recompute, measured):
    """ZeRO-3, Liger, 4,096 tokens, peaks of the allocator on one GPU."""
    found = memory.estimate(model, H200, ZERO3, params(recompute=recompute), 1, micro_batch)
    assert measured / 1.15 <= found.needed <= measured * 1.15 and found.fits


def test_a_7b_and_a_1b_that_ran_on_one_h200_still_plan(cluster):
    for model, settings in (
        ("llama-2-7b", ["sft.global_batch=16"]),  # docs/sft.md
        ("llama-2-7b", ["sft.global_batch=16", "sft.micro_batch=2", "sft.gradient_accumulation=8"]),
        ("llama-3.2-1b", []),
        ("llama-3.2-1b", ["sft.recompute=none"]),
    ):
        asked = request(cluster, model=model, settings=settings, node_counts=(1,), gpus_per_node=1)
        assert build.build(asked, cluster.nodes).cells


def test_the_least_that_docs_sft_md_names_plans(cluster):
    for model, gpus, settings in (
        ("llama-2-13b", 2, ["sft.global_batch=32"]),
        ("llama-2-7b", 8, []),
        ("llama-2-13b", 8, []),
        ("llama-2-70b", 8, []),
    ):
        asked = request(cluster, model=model, settings=settings, node_counts=(1,), gpus_per_node=gpus)
        built = build.build(asked, cluster.nodes)
        assert memory.of_cell(built, built.cells[0]).fits


# --- what is refused ----------------------------------------------------------------------------------


def refusal(cluster, **changes):
    with pytest.raises(UsageError) as error:
        build.build(request(cluster, **{"model": "llama-2-70b", "node_counts": (1,), **changes}), cluster.nodes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_70b_without_offload_is_refused_on_one_node_with_the_sizes_and_what_fits(cluster):
    assert refusal(cluster, settings=NO_OFFLOAD) == (
        "model llama-2-70b on 1 node (8 ranks, micro-batch 1 × 4096 tokens) needs about 156 GiB per GPU "
        "(model states 144.5, activations 6.1, working 5.7), h200-sxm has 141 GiB; what fits: --nodes 2"
    )
    assert build.build(
        request(cluster, model="llama-2-70b", node_counts=(2,), settings=NO_OFFLOAD), cluster.nodes
    ).cells


def test_a_sweep_is_to_start_where_it_fits(cluster):
    said = refusal(
        cluster, node_counts=(1, 2, 4), settings=[*NO_OFFLOAD, "sft.global_batch=512", "sft.gradient_accumulation=8"]
    )
    assert said.endswith("what fits: --sweep 2,4")


def test_a_smaller_micro_batch_keeps_the_global_batch(cluster):
    said = refusal(cluster, model="llama-2-7b", settings=["sft.global_batch=16384", LITERAL])
    assert said.endswith("--nodes 2; or --set sft.micro_batch=64 --set sft.gradient_accumulation=32")


def test_a_shorter_sequence_is_named_where_one_sequence_is_too_much(cluster):
    small = {**H200, "gpu_memory_gib": 40.0}
    said = refusal(cluster, model="llama-2-7b", settings=["sft.recompute=none", LITERAL], hardware=small)
    assert "--set sft.micro_batch=" in said and "sft.seq_len" not in said
    one = ["sft.global_batch=8", "sft.gradient_accumulation=1", "sft.recompute=none"]
    said = refusal(cluster, model="llama-2-7b", settings=one, hardware={**H200, "gpu_memory_gib": 26.0})
    assert "--set sft.seq_len=2048" in said and "sft.micro_batch" not in said


def test_zero_3_and_a_file_that_offloads_are_named_where_they_help(cluster):
    undivided = ["deepspeed.zero_optimization.stage=1"]
    said = refusal(cluster, model="llama-2-13b", settings=undivided, hardware={**H200, "gpu_memory_gib": 64.0})
    assert "--set deepspeed.zero_optimization.stage=3" in said
    said = refusal(cluster, deepspeed=config.load_deepspeed("ds_config_13b", {}), deepspeed_files=EVERY_FILE)
    assert "deepspeed: ds_config_70b, which offloads to the host, in configs/models/llama-2-70b.yaml" in said


def test_where_nothing_helps_that_is_said(cluster):
    said = refusal(cluster, hardware={**H200, "gpu_memory_gib": 2.0})
    assert said.endswith("has 2 GiB; no number of nodes and no smaller batch fits")


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cpu"},
        {"hardware": {**H200, "gpu_memory_gib": 0}},
        {"settings": []},  # the shipped file offloads
        {"settings": [*NO_OFFLOAD, "deepspeed.optimizer.type=SGD"]},
        {"settings": [*NO_OFFLOAD, "deepspeed.bf16.bf16_master_weights_and_grads=true"]},
        {"settings": [*NO_OFFLOAD, "deepspeed.zero_optimization=3"]},
        {"settings": [*NO_OFFLOAD, "deepspeed.zero_optimization.cpu_offload=true"]},
        {"settings": [*NO_OFFLOAD, "deepspeed.zero_optimization.stage=auto"]},
    ],
)
def test_what_is_not_known_is_not_refused(cluster, changes):
    changes = {"settings": NO_OFFLOAD, "model": "llama-2-70b", "node_counts": (1,), **changes}
    assert build.build(request(cluster, **changes), cluster.nodes).cells


def test_the_estimate_is_refused_only_beyond_its_own_error(cluster):
    """155 GB of states and the rest on 141 GiB is 11 % too much; the estimate was 10 % too high where it was measured."""
    asked = request(cluster, model="llama-2-70b", settings=NO_OFFLOAD, node_counts=(1,))
    needed = memory.estimate(SEVENTY, H200, asked.deepspeed, params(recompute="full"), 8, 1).needed
    for gib, refused in ((needed / fit.MARGIN + 0.01, False), (needed / fit.MARGIN - 0.01, True)):
        tight = replace(asked, hardware={**H200, "gpu_memory_gib": gib})
        if refused:
            with pytest.raises(UsageError, match="what fits: --nodes 2"):
                build.build(tight, cluster.nodes)
        else:
            assert build.build(tight, cluster.nodes).cells


def test_a_dry_run_shows_the_estimate_of_what_trains_on_gpus_and_of_nothing_else(cluster, machine):
    asked = request(cluster, model="llama-2-7b", settings=[LITERAL, "sft.recompute=full"])
    text = describe.describe(build.build(asked, cluster.nodes), nodeset.fold)
    assert "  memory about 6 of 141 GiB per GPU: working 3.0, model states 1.8, activations 1.5\n" in text
    on_cpu = request(machine, node_counts=(1,))
    assert "memory about" not in describe.describe(build.build(on_cpu, machine.nodes), nodeset.fold)


# --- for every model ----------------------------------------------------------------------------------

ANY_MODEL = st.builds(
    lambda heads, width, layers, vocab, tied: {
        **SEVEN,
        "hidden_size": heads * 64,
        "intermediate_size": heads * 64 * width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "vocab_size": vocab,
        "tie_embeddings": tied,
    },
    st.integers(4, 128), st.integers(2, 5), st.integers(1, 100), st.sampled_from([2048, 32000, 128256]), st.booleans(),
)  # fmt: skip
ANY_ZERO = st.builds(
    lambda stage, optimizer, param: changed({
        "zero_optimization.stage": stage,
        "zero_optimization.offload_optimizer.device": optimizer,
        "zero_optimization.offload_param.device": param,
    }),
    st.integers(0, 3), *[st.sampled_from(["none", "cpu", "nvme"])] * 2,
)  # fmt: skip


@given(
    ANY_MODEL, ANY_ZERO, st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.sampled_from(["full", "none"])
)
def test_more_nodes_never_need_more_memory_per_gpu(model, deepspeed, nodes, more, micro_batch, recompute):
    few, many = (
        memory.estimate(model, H200, deepspeed, params(recompute=recompute), 8 * count, micro_batch)
        for count in (nodes, nodes + more)
    )
    assert 0 <= many.needed <= few.needed


# The fixture is frozen: nothing is left in it from one example to the next.
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ANY_MODEL, ANY_ZERO, st.sampled_from([16.0, 40.0, 80.0, 141.0]), st.sampled_from([(1,), (2,), (1, 2, 4), (1, 3)]),
    st.sampled_from([48, 192, 768, 6144]), st.sampled_from(["weak", "strong"]),
    st.sampled_from(["full", "none", "auto"]), st.sampled_from([None, 2]),
)  # fmt: skip
def test_every_way_that_a_refusal_names_is_planned(
    cluster, model, deepspeed, gib, counts, global_batch, scaling, recompute, accumulation
):
    settings = {"global_batch": global_batch, "recompute": recompute, "gradient_accumulation": accumulation}
    asked = request(
        cluster, node_counts=counts, scaling=scaling, deepspeed=deepspeed, deepspeed_files=EVERY_FILE,
        tests={"sft": params(**settings)}, hardware={**H200, "gpu_memory_gib": gib}, gpus_per_node=4,
    )  # fmt: skip
    asked = replace(asked, model=model)
    nodes = tuple(replace(cluster.nodes[0], name=f"n{i:04d}") for i in range(fit.MOST_NODES))
    try:
        build.build(asked, nodes)
    except UsageError as error:
        _, found, ways = str(error).partition("what fits: ")
        assume(found)
    else:
        return
    for way in ways.split("; or "):
        if match := re.fullmatch(r"--(?:nodes|sweep) ([\d,]+)", way):
            other = replace(asked, node_counts=tuple(int(n) for n in match[1].split(",")))
        elif way.startswith("--set sft."):
            given_ = {key: int(value) for key, value in re.findall(r"sft\.(\w+)=(\d+)", way)}
            other = replace(asked, tests={"sft": {**asked.tests["sft"], **given_}})
        elif way.startswith("--set deepspeed."):
            zero = {**deepspeed["zero_optimization"], "stage": 3}
            other = replace(asked, deepspeed={**deepspeed, "zero_optimization": zero})
        else:
            other = replace(asked, deepspeed=EVERY_FILE[re.match(r"deepspeed: (\w+),", way)[1]])
        for cell in build.build(other, nodes).cells:
            assert memory.of_cell(build.build(other, nodes), cell).fits


def test_one_cell_is_judged_by_its_own_batch(cluster):
    """The batch that is refused is the one that the plan would have."""
    asked = request(cluster, model="llama-2-7b")
    given_, shape = params(recompute="full"), fit.shape_of(cluster.nodes, 8)
    fit.refuse(asked, given_, given_, shape, 1, Batch(128, 1, 16))
    with pytest.raises(UsageError, match="micro-batch 128"):
        fit.refuse(asked, given_, given_, shape, 1, Batch(16384, 128, 16))
