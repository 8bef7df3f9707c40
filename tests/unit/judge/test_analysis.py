"""What a summary says and refuses to say. The runs are synthetic (report_fixture)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report_fixture
import yaml
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import NAMES, Fixture

from runner import failures
from runner.judge import analysis, findings, metrics
from runner.judge import verdict as verdicts
from runner.plan import config
from runner.report import words
from runner.results import statistics

TARGETS = Path(__file__).parents[3] / "configs" / "targets" / "default.yaml"


def summary_of(fixture: Fixture) -> dict[str, Any]:
    return analysis.summarise(*fixture.arguments)


@pytest.fixture(scope="module")
def healthy() -> Fixture:
    return report_fixture.healthy()


@pytest.fixture(scope="module")
def healthy_summary(healthy: Fixture) -> dict[str, Any]:
    return summary_of(healthy)


def cell(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in summary["cells"] if c["id"] == name)


def scaling(summary: dict[str, Any], nodes: int) -> dict[str, Any]:
    return next(row for row in summary["scaling"] if row["num_nodes"] == nodes)


def target(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in summary["targets"] if row["name"] == name)


def step_records(fixture: Fixture, times: dict[tuple[int, int], float]) -> list:
    """Two ranks on two nodes; times[step, rank] in seconds, 100 tokens a rank and step, 60 in the loss."""
    c = next(c for c in fixture.plan["cells"] if c["test"] == "sft" and c["num_nodes"] == 2)
    made = []
    for (step, rank), seconds in times.items():
        context = {"step": step, "measured": step > 0}
        for metric, value in {"step_time_s": seconds, "tokens": 100, "loss_tokens": 60, "positions": 128}.items():
            made.append(report_fixture._record(fixture.plan, c, metric, value, rank, **context))
    return made


# --- a cell -----------------------------------------------------------------------------------------------


def test_a_step_lasts_as_long_as_its_slowest_rank_and_warm_up_counts_for_nothing() -> None:
    fixture = report_fixture.testbed((2,))
    times = {(0, 0): 9.0, (0, 1): 9.0, (1, 0): 1.0, (1, 1): 2.0, (2, 0): 3.0, (2, 1): 2.0}
    fixture.records = step_records(fixture, times)
    m = cell(summary_of(fixture), "sft-tiny-2n-r1")["metrics"]
    assert m["steps_measured"] == 2
    assert m["tokens_per_s"] == pytest.approx(2 * 2 * 60 / 5.0)
    assert m["tokens_per_s_per_gpu"] == pytest.approx(2 * 60 / 5.0)
    assert m["processed_tokens_per_s"] == pytest.approx(2 * 2 * 100 / 5.0)
    assert m["step_time_s_p50"] == 2.5
    assert m["step_time_s_p95"] == pytest.approx(2.95)
    assert m["step_time_s_mad"] == 0.5


def test_a_step_without_all_its_ranks_is_no_step() -> None:
    fixture = report_fixture.testbed((2,))
    fixture.records = step_records(fixture, {(1, 0): 1.0, (1, 1): 1.0, (2, 0): 1.0})
    assert cell(summary_of(fixture), "sft-tiny-2n-r1")["metrics"]["steps_measured"] == 1


def test_what_was_not_measured_is_absent_and_a_silent_cell_is_a_finding() -> None:
    fixture = report_fixture.testbed((2,))
    fixture.records = [r for r in fixture.records if r.test == "torch"]
    summary = summary_of(fixture)
    assert cell(summary, "sft-tiny-2n-r1")["metrics"] == {}
    assert [(f["kind"], f["where"]) for f in summary["findings"]] == [("no_records", "sft-tiny-2n-r1")]
    assert summary["verdict"] == "fail"


def test_metrics_of_a_gpu_cell(healthy_summary: dict[str, Any]) -> None:
    m = cell(healthy_summary, "sft-llama-2-7b-8n-r1")["metrics"]
    # Planted: 11,400 real tokens/s per GPU at an efficiency of 0.941, of which 62 % count in the loss.
    assert m["processed_tokens_per_s_per_gpu"] == pytest.approx(11_400 * 0.941, rel=0.01)
    assert m["tokens_per_s_per_gpu"] == pytest.approx(11_400 * 0.941 * 0.62, rel=0.01)
    # Attention counts as nothing where ranks do not say how long samples are: 6N alone.
    assert m["mfu"] == pytest.approx(11_400 * 0.941 * 6 * 6_607_343_616 / 989e12, rel=0.01)
    assert m["loss_first"] > m["loss_last"]
    assert m["gpu_util_pct_mean"] == pytest.approx(94, abs=0.5)
    assert m["gpu_util_pct_min"] <= m["gpu_util_pct_mean"]


def with_matmul_rates(fixture: report_fixture.Fixture, name: str, rates: dict[int, float]) -> dict[str, Any]:
    """The metrics of the cell with these rates of matrix products by rank, and samples of 250 tokens."""
    planned = next(c for c in fixture.plan["cells"] if c["id"] == name)
    mine = ("matmul_tflop_per_s", "sample_tokens_mean")
    fixture.records = [record for record in fixture.records if record.metric not in mine]
    for rank, rate in rates.items():
        fixture.records.append(report_fixture._record(fixture.plan, planned, "matmul_tflop_per_s", rate, rank))
    fixture.records.append(report_fixture._record(fixture.plan, planned, "sample_tokens_mean", 250.0, 0))
    metrics: dict[str, Any] = cell(summary_of(fixture), name)["metrics"]
    return metrics


def test_mfu_is_related_to_the_data_sheet_and_to_what_the_same_gpus_multiply() -> None:
    """The median over ranks: one slow GPU does not make the others' use of theirs look better."""
    m = with_matmul_rates(report_fixture.healthy(), "sft-llama-2-7b-8n-r1", {0: 720.0, 1: 730.0, 2: 390.0})
    n, attention = 6_607_343_616, 32 * 4096 * 250
    assert m["matmul_tflop_per_s"] == 720
    assert m["tflop_per_s_per_gpu"] == pytest.approx(
        m["processed_tokens_per_s_per_gpu"] * (6 * n + 6 * attention) / 1e12
    )
    assert m["mfu_of_matmul"] == pytest.approx(m["tflop_per_s_per_gpu"] / 720)
    assert m["mfu"] == pytest.approx(m["processed_tokens_per_s_per_gpu"] * (6 * n + 12 * attention) / 989e12)


def test_the_rate_of_a_cpu_is_no_ceiling() -> None:
    m = with_matmul_rates(report_fixture.testbed((2,)), "sft-tiny-2n-r1", {0: 0.1})
    assert m["matmul_tflop_per_s"] == 0.1 and m["tflop_per_s_per_gpu"] > 0
    assert "mfu_of_matmul" not in m


def test_what_the_ranks_have_chosen_is_beside_the_results() -> None:
    fixture = report_fixture.healthy()
    fixture.status["cells"]["sft-llama-2-7b-8n-r1"]["used"] = {"attention": "varlen", "compile": False}
    summary = summary_of(fixture)
    assert cell(summary, "sft-llama-2-7b-8n-r1")["used"] == {"attention": "varlen", "compile": False}
    assert cell(summary, "torch-8n-r1")["used"] == {}


def test_a_cpu_has_no_mfu_and_no_ceiling() -> None:
    summary = summary_of(report_fixture.testbed((2,)))
    assert "mfu" not in cell(summary, "sft-tiny-2n-r1")["metrics"]
    assert cell(summary, "torch-2n-r1")["limits"] == {}


def test_collectives_are_related_to_the_ceiling_that_binds(healthy_summary: dict[str, Any]) -> None:
    two = cell(healthy_summary, "torch-2n-r1")
    assert two["limits"]["all_reduce"] == {"busbw_gb_per_s": 187.5, "binds": "NICs of a node"}
    assert two["metrics"]["all_reduce_busbw_gb_per_s_max"] == pytest.approx(171, rel=0.01)
    assert two["metrics"]["all_reduce_busbw_pct_of_limit"] == pytest.approx(100 * 171 / 187.5, rel=0.01)
    assert two["metrics"]["ping_pong_latency_us_p50"] == pytest.approx(16, rel=0.06)
    assert two["metrics"]["barrier_latency_us_p50"] > 0
    assert two["metrics"]["wrong_values"] == 0
    assert cell(healthy_summary, "torch-1n-r1")["limits"]["all_reduce"]["binds"] == "NVLink inside a node"


def test_utilisation_counts_only_samples_within_measured_steps(healthy: Fixture) -> None:
    idle = copy.deepcopy(healthy.telemetry)
    for hosts in idle.values():
        for rows in hosts.values():
            rows += [{"time_s": 1.0 + i, "gpu0_util_pct": 0} for i in range(500)]  # while the model was loading
    with_idle = analysis.summarise(healthy.plan, healthy.status, healthy.records, healthy.facts, idle)
    name = "sft-llama-2-7b-2n-r1"
    expected = cell(summary_of(healthy), name)["metrics"]["gpu_util_pct_mean"]
    assert cell(with_idle, name)["metrics"]["gpu_util_pct_mean"] == expected


def test_units_are_read_from_names() -> None:
    names = ("tokens_per_s_per_gpu", "step_time_s_p50", "busbw_gb_per_s", "latency_us_p50", "peak_memory_gib", "mfu")
    assert [metrics.unit(name) for name in names] == ["tokens/s", "s", "GB/s", "µs", "GiB", ""]


# --- scaling and verdicts ---------------------------------------------------------------------------------


def test_a_healthy_cluster_passes(healthy_summary: dict[str, Any]) -> None:
    assert (healthy_summary["state"], healthy_summary["verdict"]) == ("complete", "pass")
    assert healthy_summary["findings"] == []
    for nodes, planted in report_fixture.EFFICIENCY.items():
        row = scaling(healthy_summary, nodes)
        assert row["efficiency"] == pytest.approx(planted, abs=0.005)
        assert row["ci"][0] <= row["efficiency"] <= row["ci"][1]
    verdicts = [row["verdict"] for row in healthy_summary["targets"] if row["test"] in ("sft", "torch")]
    assert {*verdicts} == {"pass"}
    assert healthy_summary["reason"] == f"{len(verdicts)} targets met, 3 not judged"
    assert target(healthy_summary, "all-reduce")["reason"] == "not measured in this run, which is without test nccl"
    assert target(healthy_summary, "bandwidth")["measured"] == pytest.approx(934, abs=1)
    assert "slowest: fukushimadc" in target(healthy_summary, "gpu-utilisation")["reason"]


def test_a_summary_is_plain_json_and_the_same_every_time(healthy: Fixture, healthy_summary: dict[str, Any]) -> None:
    assert json.loads(json.dumps(healthy_summary, allow_nan=False)) == healthy_summary
    assert summary_of(healthy) == healthy_summary


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_healthy_fabric_passes_by_its_all_reduce_of_which_one_repeat_is_enough(repeats) -> None:
    summary = summary_of(report_fixture.nccl((2,), repeats=repeats))
    row = target(summary, "all-reduce")
    assert (row["repeats"], row["verdict"], summary["verdict"]) == (repeats, "pass", "pass"), "splits are no repeats"
    assert ("95 % CI" in row["reason"]) == (repeats > 1), "one repeat has no interval"


def test_a_target_that_needs_more_repeats_says_how_to_get_them() -> None:
    row = target(summary_of(report_fixture.healthy((1, 2), repeats=1)), "bandwidth")
    assert row["verdict"] == "inconclusive" and row["reason"].endswith("; add --repeats 3")


def test_a_fabric_on_sockets_misses_its_target() -> None:
    summary = summary_of(report_fixture.nccl((2,), repeats=3, sockets=True))
    assert target(summary, "all-reduce")["verdict"] == "fail"


def test_one_missed_target_fails_the_run_and_leaves_the_others() -> None:
    summary = summary_of(report_fixture.healthy((1, 2, 8), efficiency={1: 1.0, 2: 0.99, 8: 0.7}))
    assert scaling(summary, 8)["verdict"] == "fail"
    assert scaling(summary, 2)["verdict"] == "pass"
    assert summary["verdict"] == "fail"
    assert summary["reason"].startswith("scaling-8n: 7")


EXPECTED = {
    "compute_s": 4.6, "host_s": 2.0, "nvlink_s": 1.8, "nic_s": 7.0, "hidden_s": 4.6, "step_s": 7.0,
    "positions_per_s_per_gpu": 9300.0, "binds": "network", "efficiency": 0.7, "base_nodes": 1, "rate_source": "assumed",
    "ways": ["--set sft.micro_batch=4 --set sft.gradient_accumulation=4"],
}  # fmt: skip


def as_expected(fixture: Fixture, **changes: Any) -> dict[str, Any]:
    """The summary of a run whose plan predicted EXPECTED on all node counts but one, where nothing binds but the GPU."""
    for each in fixture.plan["cells"]:
        if each["test"] == "sft":
            alone = {"positions_per_s_per_gpu": 13300.0, "binds": "GPU", "efficiency": 1.0, "ways": []}
            each["expected"] = {**EXPECTED, **(alone if each["num_nodes"] == 1 else {}), **changes}
    return summary_of(fixture)


def test_a_failed_target_that_the_configuration_cannot_reach_does_not_blame_the_cluster() -> None:
    summary = as_expected(report_fixture.healthy((1, 8), efficiency={1: 1.0, 8: 0.68}))
    said = (
        "; bound by network in this configuration, not by this cluster: at most 70 % of the rate on 1 node is possible; "
        "bound by GPU with --set sft.micro_batch=4 --set sft.gradient_accumulation=4"
    )
    row = scaling(summary, 8)
    assert row["verdict"] == "fail" and row["reason"].endswith(said)
    assert row["possible"] == pytest.approx(0.7, abs=0.01)
    assert target(summary, "scaling-8n")["reason"].endswith(said) and said in summary["reason"]
    assert summary["findings"] == []


def test_what_is_possible_relates_to_the_base_that_was_measured() -> None:
    row = scaling(as_expected(report_fixture.healthy((2, 8), efficiency={2: 1.0, 8: 0.68})), 8)
    assert (row["base_nodes"], row["possible"]) == (2, 1.0)
    assert row["verdict"] == "fail" and "not by this cluster" not in row["reason"]


@pytest.mark.parametrize(
    ("efficiency", "changes"),
    [
        (0.68, {"positions_per_s_per_gpu": 13300.0}),  # the plan promised all of it: the cluster's fault
        (0.68, {"efficiency": None}),  # the rate of the NICs is unknown
        (0.99, {}),  # passed
    ],
)
def test_nothing_else_is_excused(efficiency: float, changes: dict[str, Any]) -> None:
    summary = as_expected(report_fixture.healthy((1, 8), efficiency={1: 1.0, 8: efficiency}), **changes)
    assert "bound by" not in scaling(summary, 8)["reason"] + target(summary, "scaling-8n")["reason"]


@pytest.mark.parametrize(("binds", "said"), [("host", True), ("GPU", False), ("network", False)])
def test_a_gpu_that_waits_for_its_host_by_the_plan_says_so(binds: str, said: bool) -> None:
    fixture = report_fixture.healthy((1, 8))
    for rows in (rows for hosts in fixture.telemetry.values() for rows in hosts.values()):
        for sample in rows:
            sample.update({name: 60.0 for name in sample if metrics.GPU_UTILISATION.fullmatch(name)})
    summary = as_expected(fixture, binds=binds)
    found = [row for row in summary["targets"] if row["name"] == "gpu-utilisation"]
    assert {row["verdict"] for row in found} == {"fail"}
    assert {"bound by host in this configuration" in row["reason"] for row in found if row["num_nodes"] == 8} == {said}


def test_a_difference_smaller_than_the_noise_is_inconclusive_and_says_what_would_settle_it() -> None:
    summary = summary_of(report_fixture.healthy((1, 2), efficiency={1: 1.0, 2: 0.9815}))
    row = scaling(summary, 2)
    assert row["ci"][0] < 0.98 < row["ci"][1]
    assert row["verdict"] == "inconclusive"
    assert row["repeats_needed"] > 3
    assert summary["verdict"] == "inconclusive"


@pytest.mark.parametrize("repeats", [1, 2])
def test_too_few_repeats_are_inconclusive_however_good(repeats: int) -> None:
    row = scaling(summary_of(report_fixture.healthy((1, 2), repeats=repeats)), 2)
    assert (row["verdict"], row["repeats_needed"]) == ("inconclusive", 3)


def test_nodes_that_share_a_kernel_are_not_judged() -> None:
    summary = summary_of(report_fixture.testbed())
    assert summary["verdict"] == "not_judged"
    assert summary["reason"] == (
        "8 nodes share one kernel (same boot id): speeds prove that the system works, not how fast it is"
    )
    assert {row["verdict"] for row in summary["scaling"]} == {"not_judged"}
    assert scaling(summary, 8)["efficiency"] < 0.2  # reported all the same


def test_gpu_nodes_that_share_a_kernel_are_not_judged_either(healthy: Fixture) -> None:
    facts = report_fixture.facts(healthy.plan, one_kernel=True)
    summary = analysis.summarise(healthy.plan, healthy.status, healthy.records, facts, healthy.telemetry)
    assert scaling(summary, 4)["reason"].startswith("4 nodes share one kernel")
    assert target(summary, "latency")["verdict"] == "not_judged"


def test_without_facts_a_shared_kernel_cannot_be_excluded(healthy: Fixture) -> None:
    facts = copy.deepcopy(healthy.facts)
    for per_host in facts.values():
        per_host.pop(NAMES[1], None)
    summary = analysis.summarise(healthy.plan, healthy.status, healthy.records, facts, healthy.telemetry)
    assert scaling(summary, 2)["verdict"] == "not_judged"
    assert NAMES[1] in scaling(summary, 2)["reason"]


def test_a_model_too_small_to_load_a_gpu_is_not_judged() -> None:
    """`make bench` on a GPU runs the tiny model: it must say that it works, not that the GPU idles."""
    cell = {"hosts": ["a"], "device": "cuda"}
    facts = {"a": {"boot_id": "x"}}
    tiny, seven_b = (config.load_model(name).model_dump() for name in ("tiny", "llama-2-7b"))
    assert "too small to load a GPU" in str(verdicts.not_judged_reason(cell, facts, tiny))
    assert verdicts.not_judged_reason(cell, facts, seven_b) is None


def test_the_cpu_is_not_judged() -> None:
    fixture = report_fixture.testbed((1,))
    summary = summary_of(fixture)
    assert (summary["verdict"], summary["reason"]) == ("not_judged", "ranks ran on the CPU: targets are for GPUs")


def test_strong_scaling_is_reported_never_judged(healthy: Fixture) -> None:
    plan = {**healthy.plan, "scaling": "strong"}
    summary = analysis.summarise(plan, healthy.status, healthy.records, healthy.facts, healthy.telemetry)
    assert {row["verdict"] for row in summary["scaling"]} == {"not_judged"}
    assert "weak" in target(summary, "scaling-8n")["reason"]
    assert scaling(summary, 8)["efficiency"] == pytest.approx(0.941, abs=0.005)


def test_the_smallest_node_count_is_the_base_and_meets_no_target() -> None:
    summary = summary_of(report_fixture.healthy((2, 4)))
    assert scaling(summary, 2)["target"] is None
    assert "not measured" in target(summary, "scaling-2n")["reason"]
    assert scaling(summary, 4)["efficiency"] == pytest.approx(0.974 / 0.993, abs=0.006)


def every_count(healthy: Fixture, value: float, *more: dict[str, Any]) -> dict[str, Any]:
    """The summary with a target for every node count, beside others."""
    wanted = {**yaml.safe_load(TARGETS.read_text())["targets"][0], "name": "every", "num_nodes": None, "value": value}
    plan = {**healthy.plan, "targets": [wanted, *more]}
    return analysis.summarise(plan, healthy.status, healthy.records, healthy.facts, healthy.telemetry)


def test_a_scaling_target_without_a_node_count_is_judged_at_each_one_but_the_base(healthy: Fixture) -> None:
    summary = every_count(healthy, 96.0)
    found = {row["num_nodes"]: (row["verdict"], round(row["measured"])) for row in summary["targets"]}
    assert found == {2: ("pass", 99), 4: ("pass", 97), 8: ("fail", 94)}
    assert {row["num_nodes"]: row["target"] for row in summary["scaling"]} == {1: None, 2: 0.96, 4: 0.96, 8: 0.96}
    assert summary["verdict"] == "fail"


def test_a_target_for_one_node_count_and_one_for_every_are_both_judged(healthy: Fixture) -> None:
    eight = yaml.safe_load(TARGETS.read_text())["targets"][2]
    summary = every_count(healthy, 96.0, eight)
    found = {(row["name"], row["num_nodes"]): row["verdict"] for row in summary["targets"]}
    assert (found["every", 8], found["scaling-8n", 8]) == ("fail", "pass")
    assert scaling(summary, 8)["target"] == 0.9  # the curve shows the one for its node count


def test_a_scaling_target_for_every_node_count_needs_two(healthy: Fixture) -> None:
    one = report_fixture.healthy((2,))
    (row,) = every_count(one, 96.0)["targets"]
    assert (row["verdict"], row["num_nodes"]) == ("not_judged", None)
    assert row["reason"] == "not measured in this run: needs complete sft cells on two node counts"


def test_a_bandwidth_target_needs_its_message_size(healthy: Fixture) -> None:
    small = [r for r in healthy.records if r.context.get("size_bytes", 0) < 2**30]
    summary = analysis.summarise(healthy.plan, healthy.status, small, healthy.facts, healthy.telemetry)
    row = target(summary, "bandwidth")
    assert (row["verdict"], row["measured"]) == ("not_judged", None)
    assert "1 GiB" in row["reason"]


@pytest.mark.parametrize(
    ("value", "ci", "direction", "verdict"),
    [
        (98.5, (98.0, 99.0), "min", "pass"),
        (97.0, (96.0, 97.9), "min", "fail"),
        (98.1, (97.5, 98.6), "min", "inconclusive"),
        (40.0, (39.0, 50.0), "max", "pass"),
        (60.0, (50.1, 61.0), "max", "fail"),
        (50.0, (49.0, 51.0), "max", "inconclusive"),
    ],
)
def test_the_whole_interval_decides(value: float, ci: tuple[float, float], direction: str, verdict: str) -> None:
    wanted = 98.0 if direction == "min" else 50.0
    assert verdicts.judge(value, ci, 3, wanted, direction).verdict == verdict


@given(st.floats(1, 1e6), st.floats(0, 0.5), st.integers(3, 50), st.floats(1, 1e6))
def test_repeats_needed_exceed_those_made(value: float, width: float, repeats: int, wanted: float) -> None:
    judged = verdicts.judge(value, (value * (1 - width), value * (1 + width)), repeats, wanted, "min")
    if judged.verdict == "inconclusive":
        assert judged.repeats_needed is not None and repeats < judged.repeats_needed <= 100
    else:
        assert judged.repeats_needed is None


def test_the_bootstrap_sees_the_spread_between_repeats_not_only_within() -> None:
    """Repeats that are steady inside but differ from each other: the interval spans them."""
    repeats = [[(100.0, 1.0)] * 10, [(110.0, 1.0)] * 10, [(105.0, 1.0)] * 10]
    value, low, high = verdicts.bootstrap(repeats, None, "seed")
    assert (value, low, high) == (105.0, 100.0, 110.0)
    value, low, high = verdicts.bootstrap(repeats, repeats, "seed")
    assert value == 1.0 and low < 0.96 and high > 1.04


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], q: float) -> None:
    import numpy as np

    assert statistics.quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-6)


# --- states and findings ----------------------------------------------------------------------------------


def test_a_dead_rank_is_a_finding_with_host_fault_advice_and_last_words() -> None:
    fixture = report_fixture.broken()
    (failed_cell,) = [entry for entry in fixture.status["cells"].values() if entry["error"]]
    failed_cell["error"]["kind"] = "cuda_out_of_memory"
    summary = summary_of(fixture)
    found = next(f for f in summary["findings"] if f["kind"] == "cuda_out_of_memory")
    assert (found["host"], found["fault"], found["where"]) == (NAMES[2], "user", "sft-llama-2-7b-8n-r3")
    assert found["evidence"].endswith(f"; {failures.KINDS['cuda_out_of_memory'].advice}")
    assert "CUDA out of memory" in found["stderr"][-1]
    assert (summary["state"], summary["verdict"]) == ("failed", "fail")


def failed(error: dict[str, Any] | None, state: str = "failed") -> dict[str, Any]:
    fixture = report_fixture.testbed((1, 2))
    fixture.status["cells"]["sft-tiny-2n-r1"].update(state=state, error=error)
    return summary_of(fixture)


@pytest.mark.parametrize(("kind", "known"), failures.KINDS.items())
def test_a_failed_cells_kind_says_whose_fault_it_is_and_what_to_do(kind: str, known: failures.Kind) -> None:
    (found,) = failed({"kind": kind, "message": "it broke", "host": NAMES[1], "stderr": ["last"]})["findings"]
    assert (found["kind"], found["fault"], found["host"]) == (kind, known.fault, NAMES[1])
    assert found["evidence"] == (f"it broke; {known.advice}" if known.advice else "it broke")
    assert found["confidence"] == ("not identifiable" if known.fault == "not identifiable" else "high")


def test_a_nodes_fault_without_a_node_to_name_is_nobodys() -> None:
    (found,) = failed({"kind": "hung", "message": "two are silent", "host": None, "stderr": []})["findings"]
    assert (found["kind"], found["fault"], found["confidence"]) == ("hung", "not identifiable", "not identifiable")


@pytest.mark.parametrize(
    "error",
    [
        {"message": "rank1 died: No space left on device", "host": NAMES[1], "stderr": []},
        {"kind": "from the future", "message": "x", "host": NAMES[1], "stderr": []},
        None,
    ],
)
def test_a_run_that_recorded_no_kind_is_read_without_guessing_one(error: dict[str, Any] | None) -> None:
    (found,) = failed(error)["findings"]
    assert (found["kind"], found["fault"]) == ("unknown", "not identifiable")


@pytest.mark.parametrize("kind", ["plan_changed", "drift"])
def test_a_cell_that_did_not_remain_valid_is_called_by_what_changed(kind: str) -> None:
    error = {"kind": kind, "message": "measured by another plan", "host": None, "stderr": []}
    (found,) = failed(error, "incomplete")["findings"]
    assert found["kind"] == kind and "benchmark.log" not in found["evidence"]
    assert "has changed since a cell was measured" in words.title(kind)


@pytest.mark.parametrize(("former", "kind"), [("rank_died", "rank_crashed"), ("node_unreachable", "hung")])
def test_kinds_of_earlier_versions_are_read_as_those_that_replaced_them(former: str, kind: str) -> None:
    (found,) = failed({"kind": former, "message": "it broke", "host": NAMES[1], "stderr": []})["findings"]
    assert (found["kind"], found["fault"]) == (kind, failures.KINDS[kind].fault)
    assert words.title(former) == failures.KINDS[kind].title


def test_every_finding_takes_its_fault_and_advice_from_the_one_table() -> None:
    quiet = report_fixture.testbed((2,))
    quiet.records = []
    runs = [report_fixture.broken(), quiet]
    found = [finding for run in runs for finding in summary_of(run)["findings"]]
    assert {"wrong_values", "environment", "no_records", "cuda_out_of_memory", "hung"} == {one["kind"] for one in found}
    for one in found:
        assert one["fault"] == failures.KINDS[one["kind"]].fault
        assert one["evidence"].endswith(f"; {failures.KINDS[one['kind']].advice}")


def test_several_kinds_of_findings_are_counted_in_the_headline() -> None:
    summary = {"cells": [{"state": "complete"}], "state": "complete", "verdict": "fail"}
    assert words.headline({**summary, "findings": [{"kind": "environment"}]}) == "Nodes are not set up the same"
    assert (
        words.headline({**summary, "findings": [{"kind": "drift"}, {"kind": "hung"}]}) == "The cluster has 2 problems"
    )
    assert words.headline({**summary, "state": "failed", "cells": [{"state": "failed"}]}).endswith(
        "1 of 1 cell did not finish"
    )


def test_another_try_is_for_infrastructure_alone() -> None:
    assert {known.fault for known in failures.KINDS.values() if known.retry} <= {"node", "not identifiable"}
    assert {known.fault for known in failures.KINDS.values()} <= {
        "node",
        "configuration",
        "user",
        "tool",
        "not identifiable",
    }


def test_a_cell_out_of_time_is_a_finding_and_a_cancelled_one_is_not() -> None:
    error = {"kind": "timed_out", "message": "not finished within its limit of 10 s", "host": None, "stderr": []}
    (found,) = failed(error, "incomplete")["findings"]
    assert found["kind"] == "timed_out"
    cancelled = failed(None, "cancelled")
    assert (cancelled["findings"], cancelled["state"]) == ([], "incomplete")


def test_wrong_values_fail_the_run_and_blame_nobody() -> None:
    summary = summary_of(report_fixture.broken())
    (found,) = [f for f in summary["findings"] if f["kind"] == "wrong_values"]
    assert (found["host"], found["fault"]) == (None, "not identifiable")
    assert found["where"] == "torch-2n-r2: all_to_all, 2,097,152 B"
    assert cell(summary, "torch-2n-r2")["metrics"]["wrong_values"] == 4096


def with_driver(*versions: str | None) -> dict[str, dict[str, Any]]:
    return {"cell": {f"n{i}": {"driver": version, "kernel": "6.8"} for i, version in enumerate(versions, start=1)}}


def test_what_an_image_sets_and_nccl_does_not_read_is_no_difference() -> None:
    facts = {"cell": {"n1": {"env": {"NCCL_VERSION": "2.19.3-1"}}, "n2": {"env": {}}, "n3": {"env": {}}}}
    assert (findings.properties(facts), findings.find([], {}, [], facts)) == ([], [])


def test_the_odd_one_out_is_named() -> None:
    (found,) = findings.find([], {}, [], with_driver("570", "550", "570", "570"))
    assert (found["host"], found["where"], found["confidence"]) == ("n2", "driver", "high")
    assert found["evidence"] == "driver is 550 here, 570 on 3 other nodes; make it the same on all nodes"
    assert found["fault"] == "configuration"


def test_a_missing_version_is_a_difference() -> None:
    (found,) = findings.find([], {}, [], with_driver("570", None, "570"))
    assert (found["host"], found["confidence"]) == ("n2", "medium")
    assert "absent here" in found["evidence"]


def test_without_a_majority_nobody_is_blamed() -> None:
    (found,) = findings.find([], {}, [], with_driver("570", "550"))
    assert (found["host"], found["confidence"]) == (None, "not identifiable")
    assert "570 on n1; 550 on n2" in found["evidence"]


def test_other_differences_are_marked_but_are_no_finding() -> None:
    facts = {"cell": {f"n{i}": {"kernel": "6.8" if i else "6.5"} for i in range(3)}}
    (row,) = findings.properties(facts)
    assert row == {
        "property": "kernel",
        "values": {"n0": "6.5", "n1": "6.8", "n2": "6.8"},
        "differs": True,
        "majority": "6.8",
        "minority": ["n0"],
    }
    assert findings.find([], {}, [], facts) == []


def test_what_must_be_unique_is_not_compared(healthy: Fixture) -> None:
    rows = findings.properties(healthy.facts)
    assert not [row for row in rows if row["differs"]]
    assert {"driver", "kernel", "packages.torch", "nic ens1f0np0", "env.NCCL_IB_HCA", "gpus"} <= {
        row["property"] for row in rows
    }


def test_a_record_of_an_unknown_cell_changes_nothing(healthy: Fixture, healthy_summary: dict[str, Any]) -> None:
    foreign = replace(healthy.records[0], cell="another-run")
    records = [*healthy.records, foreign]
    again = analysis.summarise(healthy.plan, healthy.status, records, healthy.facts, healthy.telemetry)
    assert again == healthy_summary


def test_every_shipped_target_can_be_judged(healthy_summary: dict[str, Any]) -> None:
    """Names, metrics and sizes of the file fit what runs record: none is left unmeasured by a sweep of its test."""
    nccl, gpus = summary_of(report_fixture.nccl((2,))), summary_of(report_fixture.gpus())
    shipped = yaml.safe_load(TARGETS.read_text())["targets"]
    fields = {"name", "test", "metric", "num_nodes", "direction", "value", "source"}
    optional = {"scaling", "collective", "min_bytes", "max_bytes", "repeats"}
    for one in shipped:
        assert fields <= set(one) <= fields | optional, one["name"]
        assert one["direction"] in ("min", "max")
        summary = {"nccl": nccl, "gpu": gpus}.get(one["test"], healthy_summary)
        assert target(summary, one["name"])["measured"] is not None


def test_a_run_that_ended_before_its_first_cell_says_what_ended_it() -> None:
    fixture = report_fixture.testbed((2,))
    for entry in fixture.status["cells"].values():
        entry["state"] = "planned"
    fixture.status |= {"state": "failed", "error": {"kind": None, "message": "no data set /nope", "at": "now"}}
    fixture.records = []
    summary = summary_of(fixture)
    assert (summary["verdict"], summary["reason"]) == ("not_judged", "ended by: no data set /nope")


def test_a_run_without_any_test_that_has_targets_lists_none(healthy: Fixture) -> None:
    fixture = replace(
        healthy, plan=healthy.plan | {"targets": [{**t, "test": "gone"} for t in healthy.plan["targets"]]}
    )
    assert summary_of(fixture)["targets"] == []
