"""What a configuration can reach and what binds it: held against what was measured, and chosen where a user leaves it open."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from plans import request

from runner.errors import UsageError
from runner.plan import build, config, describe, fit, memory, speed
from runner.plan.plan import Batch, Plan
from runner.plan.speed import Rate, Shape, predict
from runner.system import nodeset

H200 = {"name": "h200-sxm", **config.load_hardware("h200-sxm").model_dump()}
SEVEN = config.load_model("llama-2-7b").model_dump()
ONE = config.load_model("llama-3.2-1b").model_dump()
EIGHT_LAYERS = {**SEVEN, "num_layers": 8}
ZERO3 = config.load_deepspeed("ds_config_7b", {})
HGX = Shape(8, 100.0)  # 2 × 400 Gbit/s
LITERAL = "sft.gradient_accumulation=16"


def zero(stage, **more):
    return {"zero_optimization": {"stage": stage, "overlap_comm": True, **more}}


def params(**changes):
    return {"seq_len": 4096, "recompute": "none", "attention": "auto", **changes}


# --- against what one H200 measured -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "stage", "settings", "micro", "accumulation", "measured"),
    [
        (EIGHT_LAYERS, 3, {"attention": "sdpa", "recompute": "full"}, 1, 4, 19_907),
        (EIGHT_LAYERS, 0, {"attention": "sdpa", "recompute": "full"}, 4, 1, 34_207),
        (EIGHT_LAYERS, 0, {"recompute": "full"}, 4, 1, 44_414),
        (EIGHT_LAYERS, 0, {}, 4, 1, 54_629),
        (EIGHT_LAYERS, 3, {}, 1, 4, 35_422),
        (EIGHT_LAYERS, 3, {}, 4, 4, 51_914),
        (EIGHT_LAYERS, 3, {}, 8, 2, 52_959),
        (EIGHT_LAYERS, 1, {}, 4, 4, 52_795),
        (EIGHT_LAYERS, 0, {"compile": True}, 4, 1, 52_742),
        (EIGHT_LAYERS, 0, {"compile": True, "precision": "fp8"}, 4, 1, 66_887),
        (SEVEN, 3, {"recompute": "full"}, 1, 16, 6_259),
        (SEVEN, 3, {"recompute": "full"}, 2, 8, 9_478),
        (ONE, 0, {"attention": "sdpa", "recompute": "full"}, 4, 1, 39_206),
        (ONE, 0, {"recompute": "full"}, 4, 1, 57_617),
        (ONE, 0, {}, 4, 1, 69_145),
    ],
)
def test_one_h200_measured_this(model, stage, settings, micro, accumulation, measured):
    """Positions/s of 7B's width with 8 layers, of all of it, and of a 1B's shape; stage 0 stands for no DeepSpeed."""
    batch = Batch(micro * accumulation, micro, accumulation)
    found = predict(model, H200, Shape(1, None), zero(stage), params(**settings), batch, 1)
    assert measured / 1.15 <= found.positions_per_s_per_gpu <= measured * 1.15
    assert found.nic_s == found.nvlink_s == 0


def test_one_sequence_is_bound_by_the_host_under_zero_3_and_four_are_not():
    for model, settings in ((EIGHT_LAYERS, {}), (SEVEN, {}), (SEVEN, {"recompute": "full"})):
        found = [
            predict(model, H200, Shape(1, None), zero(3), params(**settings), Batch(4, n, 4 // n), 1) for n in (1, 4)
        ]
        assert [each.binds for each in found] == ["host", "GPU"]


def test_what_is_computed_again_costs_time_in_the_order_of_what_it_saves():
    found = [
        predict(model, H200, Shape(8, None), zero(3), params(recompute=recompute), Batch(128, 4, 4), 1).step_s
        for model in (SEVEN, ONE)
        for recompute in ("none", "selective", "full")
    ]
    assert found[:3] == sorted(found[:3]) and found[3:] == sorted(found[3:]) and len(set(found)) == 6


# --- 7B, 1,024 sequences, on 8 nodes of 2 × 400 Gbit/s ------------------------------------------------


def of_7b(seconds, batch=(1, 16), deepspeed=ZERO3, **settings):
    """The prediction on 64 GPUs where one sequence takes a GPU these seconds."""
    rate = Rate(batch[0], "none", 3, 4096 / seconds, "measured")
    return predict(SEVEN, H200, HGX, deepspeed, params(**settings), Batch(1024, *batch), 8, rate)


def test_a_micro_step_moves_three_times_the_weights():
    found = of_7b(0.30)
    assert found.nic_s / 16 == pytest.approx(3 * 13.5 / 91, rel=0.02) and found.nic_s / 16 == pytest.approx(0.44, 0.01)


@pytest.mark.parametrize(("seconds", "possible", "binds"), [(0.30, 0.68, "network"), (0.40, 0.90, "network")])
def test_one_sequence_a_micro_step_cannot_hide_that_at_the_rate_of_the_gpu(seconds, possible, binds):
    found = of_7b(seconds)
    assert found.efficiency == pytest.approx(possible, abs=0.02) and found.binds == binds
    assert found.rate_source == "measured"


@pytest.mark.parametrize("seconds", [0.44, 0.65])
def test_at_the_rate_that_one_sequence_gave_it_hides(seconds):
    found = of_7b(seconds)
    assert found.efficiency > 0.99 and found.binds == "host"


@pytest.mark.parametrize(
    "other",
    [
        {"batch": (4, 4)},
        {"batch": (2, 8)},
        {"deepspeed": zero(1)},
        {"deepspeed": zero(3, zero_hpz_partition_size=8)},
        {"deepspeed": zero(3, zero_hpz_partition_size=8, zero_quantized_weights=True)},
    ],
)
def test_more_sequences_zero_1_and_hpz_hide_it(other):
    found = of_7b(0.30, **other)
    assert found.efficiency > 0.95 and found.binds == "GPU"


def test_what_each_stage_moves():
    """In weights of 2 bytes over the wire of a ring, which carries (n-1)/n of a size; an all-reduce counts twice."""
    wire = 2 * 6.738e9 * 63 / 64 / (0.91 * 100e9)
    ways = {
        (3, ()): 16 * 3,
        (3, (("zero_hpz_partition_size", 8),)): 16 + 1,
        (3, (("zero_quantized_weights", True),)): 16 * 2,
        (3, (("zero_quantized_weights", True), ("zero_quantized_gradients", True))): 16 * 1.25,
    }
    for (stage, more), weights in ways.items():
        assert of_7b(0.3, deepspeed=zero(stage, **dict(more))).nic_s == pytest.approx(weights * wire, rel=1e-3)
    nics = [of_7b(0.3, deepspeed=zero(stage)).nic_s / wire for stage in (0, 1, 2)]
    assert (
        1.5 < nics[0] <= 2
        and nics[1] == pytest.approx(nics[0] + 1, rel=1e-3)
        and nics[2] == pytest.approx(16 * nics[0] + 1, rel=1e-3)
    )


def test_without_overlap_nothing_is_hidden():
    both = [of_7b(0.30, deepspeed=zero(3, overlap_comm=on)) for on in (True, False)]
    assert both[1].hidden_s == pytest.approx(0, abs=1e-9) and both[0].hidden_s > 4
    assert both[1].step_s == pytest.approx(both[0].step_s + both[0].hidden_s)


@pytest.mark.parametrize(
    ("hardware", "deepspeed"),
    [
        (config.load_hardware("unknown").model_dump(), ZERO3),
        (config.load_hardware("cpu").model_dump(), ZERO3),
        (H200, {"zero_optimization": {"stage": "auto"}}),
        (H200, {**ZERO3, "tensor_parallel": {"autotp_size": 8}}),
        (H200, {"zero_optimization": {"cpu_offload": True}}),
    ],
)
def test_what_is_not_known_is_not_predicted(hardware, deepspeed):
    assert predict(SEVEN, hardware, HGX, deepspeed, params(), Batch(64, 1, 1), 8) is None


def test_nics_of_an_unknown_rate_leave_the_efficiency_open():
    found = predict(SEVEN, H200, Shape(8, None), ZERO3, params(), Batch(64, 1, 1), 8)
    assert found.nic_s is None and found.efficiency is None and found.step_s > 0


# --- what holds for all of them -----------------------------------------------------------------------

ANY_BATCH = st.builds(lambda m, a: Batch(m * a, m, a), st.integers(1, 8), st.integers(1, 16))
ANY_ZERO = st.builds(
    lambda stage, overlap, hpz, weights, device: zero(
        stage, overlap_comm=overlap, zero_hpz_partition_size=hpz, zero_quantized_weights=weights,
        offload_optimizer={"device": device},
    ),
    st.integers(0, 3), st.sampled_from([True, False, None]), st.sampled_from([1, 4, 8]), st.booleans(),
    st.sampled_from(["none", "cpu"]),
)  # fmt: skip
ANY_MODEL = st.sampled_from([SEVEN, ONE, EIGHT_LAYERS, config.load_model("llama-2-70b").model_dump()])
ANY_RECOMPUTE = st.sampled_from(["none", "selective", "full"])


@given(ANY_MODEL, ANY_ZERO, ANY_BATCH, ANY_RECOMPUTE, st.integers(1, 64), st.floats(1, 1000), st.floats(1, 10))
def test_faster_nics_are_never_slower(model, deepspeed, batch, recompute, nodes, nic, faster):
    slow, fast = (
        predict(model, H200, Shape(8, rate), deepspeed, params(recompute=recompute), batch, nodes)
        for rate in (nic, nic * faster)
    )
    assert fast.step_s <= slow.step_s * (1 + 1e-9) and fast.efficiency >= slow.efficiency - 1e-9


@given(ANY_MODEL, ANY_ZERO, ANY_BATCH, st.integers(1, 64), st.integers(1, 64), st.floats(1, 1000))
def test_more_nodes_never_move_less_nor_scale_better(model, deepspeed, batch, nodes, more, nic):
    """Under ZeRO more nodes divide the update: only without it is a step never shorter."""
    few, many = (predict(model, H200, Shape(8, nic), deepspeed, params(), batch, n) for n in (nodes, nodes + more))
    assert few.nic_s <= many.nic_s * (1 + 1e-9) and 0 < many.efficiency <= 1
    undivided = [
        predict(model, H200, Shape(8, nic), zero(0), params(), batch, count).efficiency
        for count in (nodes, nodes + more)
    ]
    assert undivided[1] <= undivided[0] + 1e-9


@given(ANY_MODEL, ANY_ZERO, ANY_BATCH, ANY_RECOMPUTE, st.integers(1, 64), st.floats(1, 1000))
def test_a_step_is_no_shorter_than_what_it_needs_of_each(model, deepspeed, batch, recompute, nodes, nic):
    found = predict(model, H200, Shape(8, nic), deepspeed, params(recompute=recompute), batch, nodes)
    assert found.step_s >= max(found.compute_s, found.host_s) * (1 - 1e-9)
    assert found.hidden_s >= 0 and found.binds in ("GPU", "host", "NVLink", "network")
    positions = batch.micro_batch * batch.gradient_accumulation * 4096
    assert found.positions_per_s_per_gpu * found.step_s == pytest.approx(positions)


@given(ANY_MODEL, ANY_ZERO, ANY_BATCH, st.integers(1, 16), st.floats(100, 1e6))
def test_a_measured_rate_replaces_the_assumption(model, deepspeed, batch, nodes, rate):
    assume(deepspeed["zero_optimization"]["offload_optimizer"]["device"] == "none")
    measured = Rate(batch.micro_batch, "none", 3, rate, "runner tune")
    found = predict(model, H200, Shape(8, 1e9), deepspeed, params(), batch, nodes, measured)
    positions = batch.micro_batch * batch.gradient_accumulation * 4096
    assert found.step_s >= positions / rate * (1 - 1e-9) and found.rate_source == "runner tune"


# --- what the planner chooses -------------------------------------------------------------------------


def cells(cluster, **changes):
    return build.build(request(cluster, **changes), cluster.nodes).cells


@pytest.mark.parametrize(
    ("model", "counts", "batch", "recompute"),
    [
        ("llama-2-7b", (8,), Batch(1024, 4, 4), "none"),
        ("llama-2-7b", (1,), Batch(1024, 4, 32), "none"),
        ("llama-3.2-1b", (1,), Batch(128, 8, 2), "none"),
        ("llama-2-13b", (8,), Batch(512, 2, 4), "none"),
        ("llama-2-70b", (8,), Batch(256, 2, 2), "full"),
    ],
)
def test_the_shipped_models_have_the_batch_that_memory_and_speed_give(cluster, model, counts, batch, recompute):
    cell = cells(cluster, model=model, node_counts=counts)[0]
    assert (cell.batch, cell.params["recompute"]) == (batch, recompute) and "fastest" in cell.chosen
    assert cell.expected.binds == "GPU" and cell.expected.ways == ()


def test_seven_b_on_one_gpu_has_what_its_memory_allows(cluster):
    cell = cells(cluster, model="llama-2-7b", node_counts=(1,), gpus_per_node=1, settings=["sft.global_batch=16"])[0]
    assert cell.params["recompute"] == "full" and cell.batch.micro_batch in (2, 4)


@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        ([LITERAL], (1, 16)),
        (["sft.micro_batch=2"], (2, 8)),
        (["sft.micro_batch=8", "sft.gradient_accumulation=2"], (8, 2)),
        (["deepspeed.gradient_accumulation_steps=8"], (2, 8)),
        (["deepspeed.train_micro_batch_size_per_gpu=1"], (1, 16)),
        (["sft.global_batch=64"], (1, 1)),
    ],
)
def test_a_number_that_is_given_is_kept(cluster, settings, batch):
    cell = cells(cluster, model="llama-2-7b", settings=settings)[0]
    assert (cell.batch.micro_batch, cell.batch.gradient_accumulation) == batch


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_recompute_that_is_given_is_kept(cluster, recompute):
    assert cells(cluster, model="llama-2-7b", settings=[f"sft.recompute={recompute}"])[0].params["recompute"] == (
        recompute
    )


def test_what_was_measured_is_chosen_from_where_something_was(cluster):
    """Micro-batch 4 is the fastest by the assumption; here 2 was measured to be as fast, and 1 to be slow."""
    rates = tuple(Rate(micro, "none", 3, rate, "runner tune") for micro, rate in ((1, 6000.0), (2, 11_000.0)))
    cell = cells(cluster, model="llama-2-7b", rates=rates)[0]
    assert cell.batch.micro_batch == 2 and cell.expected.rate_source == "runner tune"
    assert cells(cluster, model="llama-2-7b", rates=rates, settings=["sft.micro_batch=8"])[0].batch.micro_batch == 8


def test_every_cell_of_a_sweep_does_the_same_work_on_a_gpu(cluster):
    """Chosen so that it fits on the fewest nodes, where each GPU has the most of the model's states."""
    small = {"hardware": {**H200, "gpu_memory_gib": 100.0}, "settings": ["sft.recompute=none"]}
    alone = [cells(cluster, model="llama-2-7b", node_counts=(n,), **small)[0] for n in (1, 8)]
    assert alone[0].batch.micro_batch < alone[1].batch.micro_batch
    sweep = cells(cluster, model="llama-2-7b", node_counts=(1, 2, 4, 8), **small)
    assert len({(c.batch.micro_batch, c.batch.gradient_accumulation, c.params["recompute"]) for c in sweep}) == 1
    assert sweep[0].batch.micro_batch == alone[0].batch.micro_batch
    assert [c.expected.base_nodes for c in sweep] == [1, 1, 1, 1]


def test_where_neither_memory_nor_speed_are_known_the_least_is_chosen(cluster, machine):
    unknown = {"name": "unknown", **config.load_hardware("unknown").model_dump()}
    cell = cells(cluster, model="llama-2-7b", hardware=unknown)[0]
    assert (cell.batch.micro_batch, cell.params["recompute"], cell.expected) == (1, "full", None)
    assert "not known" in cell.chosen
    tiny = build.build(request(machine, node_counts=(1,)), machine.nodes).cells[0]
    assert (tiny.batch, tiny.params["recompute"]) == (Batch(8, 2, 2), "full") and not tiny.expected


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["llama-2-7b", "llama-2-13b", "llama-3.2-1b"]), st.sampled_from([40.0, 80.0, 141.0]),
    st.sampled_from([(1,), (8,), (2, 4), (1, 2, 4, 8)]), st.sampled_from(["weak", "strong"]),
    st.sampled_from([None, 64, 512, 768, 1024]), st.sampled_from(["auto", "none", "full"]), st.integers(0, 3),
)  # fmt: skip
def test_what_is_chosen_keeps_the_global_batch_and_fits(cluster, model, gib, counts, scaling, total, recompute, stage):
    settings = [f"sft.global_batch={total or 'null'}", f"sft.recompute={recompute}",
                f"deepspeed.zero_optimization.stage={stage}"]  # fmt: skip
    hardware = {**H200, "gpu_memory_gib": gib}
    asked = request(cluster, model=model, node_counts=counts, scaling=scaling, settings=settings, hardware=hardware)
    try:
        built = build.build(asked, cluster.nodes)
    except UsageError as error:
        assume("sft.global_batch" not in str(error))
        assert "GiB" in str(error)
        return
    largest = max(counts)
    whole = total or asked.deepspeed["train_batch_size"]
    whole = 16 * 8 * largest if whole == "auto" else whole
    assert len({cell.batch.micro_batch for cell in built.cells}) == 1
    for cell in built.cells:
        b = cell.batch
        assert b.global_batch == (whole * cell.num_nodes // largest if scaling == "weak" else whole)
        assert b.micro_batch * b.gradient_accumulation * cell.world_size == b.global_batch
        assert cell.params["recompute"] in ("none", "full")
        if "fastest" in cell.chosen:
            assert memory.of_cell(built, cell).needed <= fit.FILL * gib


# --- what is said -------------------------------------------------------------------------------------


def test_a_dry_run_says_what_binds_and_what_would_not(cluster):
    asked = request(cluster, model="llama-2-7b", settings=[LITERAL], node_counts=(8,))
    text = describe.describe(build.build(asked, cluster.nodes), nodeset.fold)
    assert "bound by host in this configuration, not by this cluster" in text
    ways = re.findall(r"bound by GPU with (--set .*)", text)
    assert "--set sft.micro_batch=4 --set sft.gradient_accumulation=4" in ways
    for way in ways:
        settings = re.findall(r"--set (\S+)", way)
        settings = [*settings, *([] if any("accumulation" in s for s in settings) else [LITERAL])]
        cell = cells(cluster, model="llama-2-7b", settings=settings)[0]
        assert cell.expected.binds == "GPU" and cell.batch.global_batch == 1024


def test_a_network_that_binds_a_fast_gpu_is_said_with_hpz_among_the_ways_out(cluster):
    rates = (Rate(1, "none", 3, 4096 / 0.30, "runner tune"),)
    asked = request(cluster, model="llama-2-7b", settings=[LITERAL], rates=rates)
    built = build.build(asked, cluster.nodes)
    text = describe.describe(built, nodeset.fold)
    said = re.sub(r"\s+", " ", text)
    assert "bound by network in this configuration, not by this cluster: at most 69 % of the rate on 1 node" in said
    assert "(runner tune)" in text
    line = speed.explained(asdict(built.cells[0].expected))
    assert line.startswith("bound by network") and "\n" not in line
    for way in ("sft.micro_batch=4", "zero_optimization.stage=1", "zero_hpz_partition_size=8"):
        assert way in line


def test_the_cluster_is_not_cleared_where_no_setting_helps(cluster):
    slow = tuple(replace(node, nics=1, nic_gbit_per_s=10.0) for node in cluster.nodes)
    cell = build.build(request(cluster, model="llama-2-7b"), slow).cells[0]
    assert cell.expected.binds == "network" and not cell.expected.ways
    assert "not by this cluster" not in speed.bound_by(asdict(cell.expected))


@pytest.mark.parametrize("lacks", ["nics", "nic_gbit_per_s"])
@pytest.mark.parametrize("settings", [[], [LITERAL]])
def test_what_binds_several_nodes_is_said_with_a_reserve_where_the_network_is_not_known(cluster, lacks, settings):
    unknown = tuple(replace(node, **{lacks: 0 if lacks == "nics" else None}) for node in cluster.nodes)
    asked = request(cluster, model="llama-2-7b", settings=settings, node_counts=(1, 8))
    one, eight = (speed.bound_by(asdict(cell.expected)) for cell in build.build(asked, unknown).cells)
    assert "as far as is known" in eight and "runner_nic_gbit_per_s" in eight
    assert "as far as is known" not in one
    assert "as far" not in speed.bound_by(asdict(build.build(asked, cluster.nodes).cells[1].expected))


@pytest.mark.parametrize(
    ("scaling", "said"), [("weak", "sft.gradient_accumulation=16"), ("strong", "sft.micro_batch=1")]
)
def test_the_settings_that_are_named_for_one_sequence_do_that_on_every_node_count(cluster, scaling, said):
    asked = request(cluster, model="llama-2-7b", node_counts=(1, 8), scaling=scaling)
    hints = {re.findall(r"--set (\S+) makes", cell.chosen)[0] for cell in build.build(asked, cluster.nodes).cells}
    assert hints == {said}
    literal = request(cluster, model="llama-2-7b", node_counts=(1, 8), scaling=scaling, settings=[said])
    assert {cell.batch.micro_batch for cell in build.build(literal, cluster.nodes).cells} == {1}


def test_long_steps_are_said_without_powers_of_ten(cluster):
    asked = request(cluster, model="llama-2-70b", node_counts=(1,), settings=["sft.global_batch=8192"])
    text = describe.describe(build.build(asked, cluster.nodes), nodeset.fold)
    assert re.search(r"[1-9],\d{3} s a step", text) and not re.search(r"\de\+\d", text)


def test_how_many_choices_there_were_is_said_of_what_was_compared(cluster):
    measured = (Rate(2, "none", 3, 6400.0, "measured by runner tune on 2026-01-31"),)
    asked = request(cluster, model="llama-2-7b", rates=measured)
    assert (
        "micro-batch 2, recompute none: fastest of what was measured"
        in build.build(asked, cluster.nodes).cells[0].chosen
    )
    held = request(cluster, model="llama-2-7b", settings=["sft.recompute=none", "sft.global_batch=832"])
    assert "recompute none: the only choice that fits" in build.build(held, cluster.nodes).cells[0].chosen
    only = request(cluster, model="llama-2-70b", settings=["sft.micro_batch=4", "sft.global_batch=256"])
    assert "recompute full: the only choice that fits" in build.build(only, cluster.nodes).cells[0].chosen


def test_lines_of_a_prediction_fit_a_terminal(cluster):
    text = describe.describe(
        build.build(request(cluster, model="llama-2-7b", settings=[LITERAL]), cluster.nodes), nodeset.fold
    )
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  speed"))
    said = [line for line in lines[first : first + 7] if "--set" not in line]
    assert all(len(line) <= 80 for line in said)


def test_plans_carry_the_prediction_and_older_ones_load_without(cluster):
    built = build.build(request(cluster, model="llama-2-7b", settings=[LITERAL]), cluster.nodes)
    data = json.loads(json.dumps(built.to_dict()))
    assert Plan.from_dict(data).cells[0].expected == built.cells[0].expected is not None
    for cell in data["cells"]:
        del cell["expected"], cell["chosen"]
        cell["params"]["recompute"] = "auto"
    older = Plan.from_dict(data)
    assert older.cells[0].expected is None and memory.of_cell(older, older.cells[0]).fits
    assert "speed" not in describe.describe(older, nodeset.fold)


def test_the_example_of_the_docs_is_what_a_dry_run_says(cluster):
    docs = (Path(__file__).parents[3] / "docs" / "sft.md").read_text()
    (example,) = re.findall(r"```\n(  speed .*?)```", docs, re.DOTALL)
    asked = request(cluster, model="llama-2-7b", settings=[LITERAL], node_counts=(8,))
    assert example in describe.describe(build.build(asked, cluster.nodes), nodeset.fold)
