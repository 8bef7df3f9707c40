"""What test `gpu` blames, and what it does not: faults planted into invented records with noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gpu_cells
import pytest
from gpu_cells import Plant

from runner.failures import KINDS, NOBODY, Suspect
from runner.results.statistics import student_quantile
from runner.workloads.gpu import findings
from runner.workloads.gpu.details import details

SLOW = Plant({"bf16": 0.88, "fp8": 0.89})
SEEDS = range(2)


def found(nodes: int, plants: dict[tuple[str, int], Plant], **more: Any) -> list[Suspect]:
    """The suspects of a run on so many nodes."""
    shape = {key: more.pop(key) for key in ("gpus", "repeats", "device", "names") if key in more}
    hardware = more.pop("hardware", {})
    plan, cells, facts = gpu_cells.plan(nodes, **shape)
    plan["hardware"] |= hardware
    by_cell = {cell["id"]: gpu_cells.records(plan, cell, plants, **more) for cell in cells}
    return list(findings.find(plan, cells, by_cell, facts))


def faults(suspects: list[Suspect]) -> list[tuple[str, str | None, str]]:
    """(kind, host, what) of the suspects that are findings."""
    return [(s.kind, s.host, s.where.partition(": ")[2]) for s in suspects if not s.observation]


def gpu(node: int, number: int) -> str:
    return f"GPU {number}, {gpu_cells.uuid(f'node{node}', number)}"


# --- who is blamed ----------------------------------------------------------------------------------------

PLANTED = {
    "a slow GPU": (8, {("node3", 5): SLOW}, [("slow_gpu", "node3", gpu(3, 5))]),
    "a slow GPU of one node": (1, {("node1", 2): SLOW}, [("slow_gpu", "node1", gpu(1, 2))]),
    "two slow GPUs of a node": (
        4,
        {("node2", 0): SLOW, ("node2", 7): SLOW},
        [("slow_gpu", "node2", gpu(2, 0)), ("slow_gpu", "node2", gpu(2, 7))],
    ),
    "two slow GPUs of two nodes": (
        2,
        {("node1", 1): SLOW, ("node2", 4): SLOW},
        [("slow_gpu", "node1", gpu(1, 1)), ("slow_gpu", "node2", gpu(2, 4))],
    ),
    "half of the only node": (
        1,
        {("node1", n): SLOW for n in range(4)},
        [("slow_gpu", "node1", gpu(1, n)) for n in range(4)],
    ),
    "slow memory": (2, {("node2", 3): Plant({"hbm": 0.85})}, [("slow_gpu", "node2", gpu(2, 3))]),
    "a slow node": (
        4,
        {("node4", n): SLOW for n in range(8)},
        [("slow_node", "node4", "all 8 GPUs")],
    ),
    "a slow node of two": (2, {("node2", n): SLOW for n in range(8)}, [("slow_node", "node2", "all 8 GPUs")]),
    "a slow node with a GPU that is slower still": (
        4,
        {("node4", n): Plant({"bf16": 0.88 if n else 0.7}) for n in range(8)},
        [("slow_node", "node4", "all 8 GPUs"), ("slow_gpu", "node4", gpu(4, 0))],
    ),
    "a hot GPU": (
        2,
        {("node1", 6): Plant({"bf16": 0.9}, clock_mhz=1430, temperature_c=89, throttle={"hw_thermal_slowdown": 41.0})},
        [("throttled", "node1", gpu(1, 6))],
    ),
    "a node without cooling": (
        4,
        {("node2", n): Plant({"bf16": 0.85}, clock_mhz=1300, throttle={"sw_thermal_slowdown": 90.0}) for n in range(8)},
        [("throttled", "node2", "all 8 GPUs")],
    ),
    "a lower power limit": (
        2,
        {("node1", 0): Plant({"bf16": 0.8}, values={"power_limit_w": (500.0, {"default_w": 700.0})})},
        [("throttled", "node1", gpu(1, 0))],
    ),
    "wrong values": (2, {("node2", 4): Plant(wrong=3)}, [("gpu_wrong_values", "node2", gpu(2, 4))]),
    "wrong values on the way": (
        1,
        {("node1", 2): Plant(wrong_to=5)},
        [("gpu_wrong_values", "node1", "GPU 2 to GPU 5")],
    ),
    "uncorrected errors of memory": (
        2,
        {("node2", 1): Plant(values={"ecc_uncorrected": (2, {"before": 0})})},
        [("gpu_memory_errors", "node2", gpu(2, 1))],
    ),
    "memory that cannot be remapped, and slow": (
        2,
        {("node2", 1): Plant({"hbm": 0.9}, values={"remap_failed": (1, {"before": 1})})},
        [("gpu_memory_errors", "node2", gpu(2, 1))],
    ),
    "an Xid": (2, {("node1", 1): Plant(values={"xid": (79, {})})}, [("gpu_failed", "node1", gpu(1, 1))]),
    "half of the lanes of PCIe": (
        2,
        {("node1", 3): Plant({"to_gpu": 0.5, "to_host": 0.5}, values={"pcie_width": (8, {"max": 16})})},
        [("slow_pcie", "node1", gpu(1, 3))],
    ),
    "a slow way to the host": (
        2,
        {("node1", 3): Plant({"to_gpu": 0.8})},
        [("slow_pcie", "node1", gpu(1, 3))],
    ),
    "slow ways to the host of a node": (
        4,
        {("node1", n): Plant({"to_gpu": 0.6, "to_host": 0.6}) for n in range(8)},
        [("slow_pcie", "node1", "all 8 GPUs")],
    ),
    "a GPU without some of its NVLinks": (
        1,
        {("node1", 6): Plant({"peer": 0.7}, values={"nvlinks_active": (12, {"links": 18})})},
        [("slow_peer", "node1", gpu(1, 6))],
    ),
    "two GPUs of a node without some of their NVLinks": (
        1,
        {("node1", n): Plant({"peer": 0.6}) for n in (2, 5)},
        [("slow_peer", "node1", gpu(1, 2)), ("slow_peer", "node1", gpu(1, 5))],
    ),
    "three GPUs of a node without some of their NVLinks": (
        2,
        {("node1", n): Plant({"peer": 0.6}) for n in (0, 2, 5)},
        [("slow_peer", "node1", gpu(1, n)) for n in (0, 2, 5)],
    ),
    "slow NVLinks of a whole node": (
        3,
        {("node2", n): Plant({"peer": 0.5}) for n in range(8)},
        [("slow_peer", "node2", "all 8 GPUs")],
    ),
    "slow NVLinks of a whole node of two": (
        2,
        {("node2", n): Plant({"peer": 0.5}) for n in range(8)},
        [("slow_peer", "node2", "all 8 GPUs")],
    ),
    "a GPU that does nothing": (2, {("node2", 1): Plant({"bf16": 0.0})}, [("slow_gpu", "node2", gpu(2, 1))]),
    "a slow pair": (1, {("node1", 2): Plant(lonely=5)}, [("slow_peer", "node1", "GPU 2 to GPU 5")]),
    "a GPU that becomes slower": (2, {("node1", 2): Plant(drift=0.25)}, [("gpu_drift", "node1", gpu(1, 2))]),
    "a GPU that becomes a little slower": (
        1,
        {("node1", 2): Plant(drift=0.1)},
        [("gpu_drift", "node1", gpu(1, 2))],
    ),
    "a busy GPU": (
        2,
        {
            ("node2", 0): Plant(
                {"bf16": 0.55, "fp8": 0.6},
                values={"other_processes": (1, {"pids": [4711]}), "util_before_pct": (97, {})},
            )
        },
        [("busy_gpu", "node2", gpu(2, 0))],
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", PLANTED)
def test_what_was_planted_is_blamed_and_nothing_else(case: str, seed: int) -> None:
    nodes, plants, expected = PLANTED[case]
    assert sorted(faults(found(nodes, plants, seed=seed))) == sorted(expected)


def test_the_evidence_has_value_distance_and_reason() -> None:
    (suspect,) = [s for s in found(2, PLANTED["a hot GPU"][1]) if not s.observation]
    for words in ("bf16 matmul 65", "% under the median of its node", "interval", "hw_thermal_slowdown in 41 %", "°C"):
        assert words in suspect.evidence
    assert suspect.confidence == "high"


def test_tables_have_the_distances_of_the_findings_where_half_of_all_are_slow() -> None:
    plan, cells, _ = gpu_cells.plan(1)
    entries = details(plan, cells[0], gpu_cells.records(plan, cells[0], PLANTED["half of the only node"][1]))["gpus"]
    slow = [entry["gpu"] for entry in entries if entry["distance_pct"]["bf16"] < -10]
    assert slow == [0, 1, 2, 3] and max(entry["distance_pct"]["bf16"] for entry in entries) < 2


def test_wrong_values_have_their_seed() -> None:
    (suspect,) = found(2, {("node2", 4): Plant(wrong=3)})
    assert "repeated product bf16: 3 wrong elements with seed 17" in suspect.evidence


@pytest.mark.parametrize(("gpus", "odd", "blamed"), [(8, [5], "node1"), (2, [0, 1], None)])
def test_the_gpu_whose_result_is_not_that_of_most_is_blamed_and_of_two_none(gpus, odd, blamed) -> None:
    plan, cells, facts = gpu_cells.plan(1, gpus)
    records = gpu_cells.records(plan, cells[0])
    context = {"check": "same product on all", "precision": "bf16", "seed": 17, "compared": gpus, "majority": gpus > 2}
    for number in range(gpus):
        (like,) = [r for r in records if r.metric == "pcie_width" and r.context["gpu"] == number]
        records.append(replace(like, metric="wrong_values", value=number in odd, context={**like.context, **context}))
    (suspect,) = findings.find(plan, cells, {cells[0]["id"]: records}, facts)
    assert (suspect.kind, suspect.host, suspect.observation) == ("gpu_wrong_values", blamed, False)
    assert "with seed 17" in suspect.evidence and (blamed is None) == (suspect.confidence == NOBODY)


def test_who_used_a_busy_gpu_is_named() -> None:
    (suspect,) = [s for s in found(2, PLANTED["a busy GPU"][1]) if not s.observation]
    assert "1 other process (pid 4711) used it before the test" in suspect.evidence


# --- who is not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.03, 0.06])
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (3, 1), (8, 8), (2, 1), (1, 3)])
def test_healthy_gpus_are_not_blamed_however_noisy_they_are(nodes: int, gpus: int, noise: float) -> None:
    rounds = 3 if nodes * gpus > 8 else 20
    blamed = [faults(found(nodes, {}, gpus=gpus, noise=noise, seed=seed)) for seed in range(rounds)]
    assert sum(map(bool, blamed)) <= 0.05 * rounds, blamed


def test_a_gpu_a_little_under_the_median_is_an_observation() -> None:
    suspects = found(2, {("node1", 4): Plant({"hbm": 0.94})}, noise=0.012, seed=1)
    assert faults(suspects) == []
    (one,) = suspects
    assert (one.kind, one.host, one.observation) == ("slow_gpu", "node1", True)


def test_a_rate_that_is_no_number_is_left_out() -> None:
    assert found(2, {("node1", 0): Plant({"bf16": float("nan")})}) == []


@pytest.mark.parametrize(
    ("nodes", "gpus", "slow"),
    [(1, 8, [(1, n) for n in range(5)]), (3, 8, [(m, n) for m in (1, 2) for n in range(8)]), (3, 1, [(1, 0), (2, 0)])],
)
def test_that_most_gpus_are_slow_is_worth_knowing_and_blames_none(nodes: int, gpus: int, slow: list) -> None:
    suspects = found(nodes, {(f"node{m}", n): Plant({"bf16": 0.85}) for m, n in slow}, gpus=gpus)
    (one,) = [each for each in suspects if each.kind == "slow_gpu"]
    assert (one.host, one.confidence, one.observation) == (None, NOBODY, True) and faults(suspects) == []
    assert f"{nodes * gpus - len(slow)} of {nodes * gpus} GPUs reach 7" in one.evidence


def test_a_single_fast_gpu_is_nothing() -> None:
    assert found(1, {("node1", 3): Plant({"bf16": 1.2})}) == []


def test_one_of_two_gpus_is_not_blamed() -> None:
    (suspect,) = found(1, {("node1", 1): SLOW}, gpus=2)
    assert (suspect.host, suspect.confidence, suspect.observation) == (None, NOBODY, False)
    assert "two GPUs do not show which of them is the odd one" in suspect.evidence


def test_one_of_two_gpus_is_blamed_where_its_state_explains_it() -> None:
    hot = Plant({"bf16": 0.85}, clock_mhz=1300, throttle={"hw_thermal_slowdown": 60.0})
    assert faults(found(1, {("node1", 1): hot}, gpus=2)) == [("throttled", "node1", gpu(1, 1))]


def test_one_gpu_alone_is_compared_with_its_data_sheet_only() -> None:
    assert found(1, {}, gpus=1) == []
    slow = {("node1", 0): Plant({"bf16": 0.7})}
    (suspect,) = found(1, slow, gpus=1)
    assert (suspect.kind, suspect.host, suspect.observation) == ("below_hardware", None, True)


def test_gpus_that_are_all_slow_are_an_observation_about_the_cluster() -> None:
    everywhere = {(f"node{n}", g): Plant({"hbm": 0.8}) for n in (1, 2) for g in range(8)}
    (suspect,) = found(2, everywhere)
    assert (suspect.kind, suspect.host, suspect.observation) == ("below_hardware", None, True)
    assert found(2, everywhere, hardware={"hbm_gb_per_s": None}) == [], "an unknown GPU has no ceilings"


def test_a_power_cap_that_all_have_explains_nothing() -> None:
    suspects = found(2, {("node1", 4): Plant({"hbm": 0.94}, throttle={"sw_power_cap": 97.0})}, noise=0.012, seed=1)
    assert [(s.kind, s.observation) for s in suspects] == [("slow_gpu", True)]


def test_a_throttled_gpu_that_is_not_slow_is_worth_knowing() -> None:
    (suspect,) = found(2, {("node1", 4): Plant(throttle={"hw_slowdown": 12.0})})
    assert (suspect.kind, suspect.host, suspect.observation) == ("throttled", "node1", True)


def test_a_process_that_only_holds_memory_is_worth_knowing() -> None:
    idle = Plant(values={"other_processes": (1, {"pids": [7]})})
    (suspect,) = found(2, {("node1", 4): idle})
    assert (suspect.kind, suspect.host, suspect.observation) == ("busy_gpu", "node1", True)


def test_links_that_are_down_are_the_evidence_for_slow_pairs_and_else_worth_knowing() -> None:
    down = {"nvlinks_active": (12, {"links": 18})}
    (slow,) = found(1, {("node1", 6): Plant({"peer": 0.7}, values=down)})
    (good,) = found(1, {("node1", 6): Plant(values=down)})
    assert (slow.observation, good.observation, slow.confidence) == (False, True, "high")
    assert all("12 of its 18 NVLinks are up" in suspect.evidence for suspect in (slow, good))
    assert found(1, {("node1", n): Plant(values=down) for n in range(8)}) == [], "none has more"


def test_old_errors_of_memory_and_harmless_xids_are_worth_knowing() -> None:
    old = Plant(values={"ecc_uncorrected": (2, {"before": 2}), "xid": (43, {})})
    suspects = found(2, {("node1", 4): old})
    assert {(s.kind, s.host, s.observation) for s in suspects} == {
        ("gpu_memory_errors", "node1", True),
        ("gpu_failed", "node1", True),
    }


def test_gpus_of_different_kinds_are_not_compared() -> None:
    older = {(1, n): "NVIDIA H100 80GB HBM3" for n in range(8)}
    slower = {("node1", n): Plant({"hbm": 0.7}) for n in range(8)}
    assert faults(found(2, slower, names=older)) == []


def test_links_that_are_all_narrow_are_an_observation_about_the_cluster() -> None:
    narrow = {("node1", n): Plant(values={"pcie_width": (8, {"max": 16})}) for n in range(8)}
    (suspect,) = found(1, narrow)
    assert (suspect.kind, suspect.host, suspect.observation) == ("slow_pcie", None, True)


def test_pairs_that_are_wired_differently_are_not_compared() -> None:
    plan, cells, facts = gpu_cells.plan(1, 4)
    records = gpu_cells.records(plan, cells[0])
    for index, record in enumerate(records):
        if record.metric == "peer_gb_per_s" and record.context["source"] // 2 != record.context["target"] // 2:
            records[index] = _scaled(record, 0.3)
    assert list(findings.find(plan, cells, {cells[0]["id"]: records}, facts)) == []


def _scaled(record: Any, factor: float) -> Any:
    return replace(record, value=record.value * factor)


def test_a_single_hiccup_neither_blames_nor_hides() -> None:
    plan, cells, facts = gpu_cells.plan(2)
    for plants, expected in (({}, []), ({("node1", 3): SLOW}, [("slow_gpu", "node1", gpu(1, 3))])):
        records = gpu_cells.records(plan, cells[0], plants)
        for index, record in enumerate(records):
            context = record.context
            if record.metric == "matmul_tflop_per_s" and context["block"] == 4 and context["gpu"] == 3:
                records[index] = _scaled(record, 0.4)
        assert faults(list(findings.find(plan, cells, {cells[0]["id"]: records}, facts))) == expected


def test_no_speed_is_suspected_on_cpus_and_wrong_values_are() -> None:
    assert found(2, {("node1", 0): Plant({"bf16": 0.5, "hbm": 0.5}, drift=0.3)}, device="cpu") == []
    assert faults(found(2, {("node1", 0): Plant({"bf16": 0.5}, wrong=1)}, device="cpu")) == [
        ("gpu_wrong_values", "node1", gpu(1, 0))
    ]


def test_a_cell_that_did_not_complete_says_nothing_of_speed() -> None:
    plan, cells, facts = gpu_cells.plan(2)
    cells[0]["state"] = "failed"
    records = gpu_cells.records(plan, cells[0], {("node1", 3): SLOW, ("node2", 1): Plant(wrong=2)})
    suspects = list(findings.find(plan, cells, {cells[0]["id"]: records}, facts))
    assert faults(suspects) == [("gpu_wrong_values", "node2", gpu(2, 1))]


def test_what_cells_of_several_node_counts_show_is_told_once() -> None:
    plan, cells, facts = gpu_cells.plan(4)
    _, few, seen = gpu_cells.plan(2)
    every = [*few, *cells]
    by_cell = {cell["id"]: gpu_cells.records(plan, cell, {("node2", 3): SLOW}) for cell in every}
    suspects = list(findings.find(plan, every, by_cell, facts | seen))
    assert [(s.kind, s.where) for s in suspects] == [("slow_gpu", f"gpu-4n-r1: {gpu(2, 3)}")]


def test_records_of_nothing_are_no_suspects() -> None:
    plan, cells, facts = gpu_cells.plan(2)
    assert list(findings.find(plan, cells, {}, {})) == list(findings.find(plan, [], {}, facts)) == []


def test_every_kind_is_known() -> None:
    assert {kind for _, _, expected in PLANTED.values() for kind, _, _ in expected} <= set(KINDS)


@pytest.mark.parametrize(
    ("p", "degrees", "expected"), [(0.975, 4, 2.7764), (0.95, 1, 6.3138), (0.9999, 4, 13.0337), (0.995, 30, 2.7500)]
)
def test_students_quantiles_are_those_of_the_tables(p: float, degrees: int, expected: float) -> None:
    assert student_quantile(p, degrees) == pytest.approx(expected, abs=1e-4)
