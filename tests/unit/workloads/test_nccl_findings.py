"""What is planted in the records of test `nccl` is found, on the right host and by its kind; what is healthy is not."""

from __future__ import annotations

from collections import defaultdict

import nccl_records as planted
import pytest

from runner.failures import KINDS, NOBODY
from runner.judge.analysis import summarise
from runner.workloads.nccl import findings

A, B = planted.HOSTS
FOUR = ("node-a", "node-b", "node-c", "node-d")


def found(planned, records, not_judged=None):
    """(kind, host, observation) of each suspect, and the suspects."""
    by_cell = defaultdict(list)
    for record in records:
        by_cell[record.cell].append(record)
    suspects = list(findings.find(planned, planted.summaries(planned, not_judged), by_cell, {}))
    assert all(suspect.kind in KINDS and suspect.where and "\n" not in suspect.evidence for suspect in suspects)
    return [(suspect.kind, suspect.host, suspect.observation) for suspect in suspects], suspects


def healthy(planned, **of_evidence):
    """The records of every cell of a plan, each near its ceiling."""
    records = []
    for one in planned["cells"]:
        rate = {"none": 92.0, "node": 450.0, "rail": 11.5}[one["params"]["split"]]
        algorithm = "NVLS" if one["params"]["split"] == "node" else "RING"
        records += planted.table(one, lambda size, rate=rate: rate) + planted.chosen(one, algorithm)
        evidence = {**of_evidence, "nvls": one["params"]["split"] != "rail" and of_evidence.get("nvls", True)}
        records += planted.evidence(one, **evidence)
    return records


ONLY = "nccl.collectives=[all_reduce]"


@pytest.mark.parametrize("hosts", [("node-a",), planted.HOSTS, FOUR])
def test_on_a_healthy_cluster_nothing_is_suspected(hosts):
    planned = planted.plan(ONLY, "nccl.splits=[none]", hosts=hosts)
    one = planted.cell(planned)
    rate, algorithm = (450.0, "NVLS") if len(hosts) == 1 else (92.0, "RING")
    records = planted.table(one, lambda size: rate) + planted.chosen(one, algorithm) + planted.evidence(one)
    assert found(planned, records) == ([], [])


def test_healthy_rails_and_nodes_are_not_suspected_either():
    planned = planted.plan(ONLY)
    assert len(planned["cells"]) == 10
    assert found(planned, healthy(planned)) == ([], [])


# --- one node that does otherwise is named, on any device -----------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("hosts", [planted.HOSTS, FOUR])
@pytest.mark.parametrize(
    ("plant", "kind", "words"),
    [
        ({"net": {B: "Socket"}, "nics": {B: ["eth0"]}}, "socket_fallback", "sockets over eth0 here, IB on other nodes"),
        ({"nics": {B: ["mlx5_1"]}}, "rail_missing", "mlx5_1 here, mlx5_0 and mlx5_1 on other nodes: mlx5_0 carries"),
        ({"gpudirect": {B: False}}, "no_gpudirect", "no channel of NCCL between nodes has GPUDirect RDMA here"),
        ({"nvls": {B: False}}, "no_nvls", "no NVLink SHARP (NVLS) here"),
    ],
)
def test_the_node_that_does_otherwise_is_named(plant, kind, words, hosts, device):
    planned = planted.plan(ONLY, "nccl.splits=[none]", hosts=hosts, device=device)
    one = planted.cell(planned)
    kinds, suspects = found(planned, planted.table(one) + planted.chosen(one) + planted.evidence(one, **plant))
    assert kinds == [(kind, B, False)]
    assert words in suspects[0].evidence and suspects[0].confidence == "high"


def test_one_finding_names_a_node_however_many_cells_show_it():
    planned = planted.plan("nccl.collectives=[all_reduce, all_gather]")
    records = [r for one in planned["cells"] for r in planted.evidence(one, gpudirect={B: False})]
    kinds, suspects = found(planned, records)
    assert kinds == [("no_gpudirect", B, False)]
    assert suspects[0].where == "nccl-all_reduce-2n-r1 and 1 more cell"


def test_some_channels_without_gpudirect_are_seen_as_well():
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    one = planted.cell(planned)
    staged = planted.value(one, "channels", 2, 9, via="NET/IB/1", net="IB", nic="mlx5_1", gpudirect=False)
    kinds, suspects = found(planned, [*planted.evidence(one), staged])
    assert kinds == [("no_gpudirect", B, False)] and "only 32 of 34 channels" in suspects[0].evidence


def test_a_node_with_other_nics_than_most_is_an_observation():
    planned = planted.plan(ONLY, "nccl.splits=[none]", hosts=FOUR)
    one = planted.cell(planned)
    kinds, suspects = found(planned, planted.evidence(one, nics={"node-c": ["mlx5_0", "mlx5_4"]}))
    assert kinds == [("wrong_nic", "node-c", True)] and "mlx5_0 and mlx5_4 here" in suspects[0].evidence


@pytest.mark.parametrize(("hosts", "nics"), [(FOUR, 2), (FOUR, 1), (planted.HOSTS, 2)])
def test_a_node_with_one_nic_too_many_is_an_observation_and_the_others_lack_nothing(hosts, nics):
    planned = planted.plan(ONLY, "nccl.splits=[none]", hosts=hosts, nics=nics)
    records = planted.evidence(planted.cell(planned), nics={B: ["mlx5_0", "mlx5_1", "mlx5_9"]})
    kinds, suspects = found(planned, records)
    assert kinds == [("wrong_nic", B, True)] and "mlx5_1 and mlx5_9 here" in suspects[0].evidence


@pytest.mark.parametrize("nics", [1, 2, 8])
def test_nodes_that_lack_a_nic_are_named_however_many_they_are(nics):
    """One that most have lost is in the inventory, else only what several nodes have can be missing elsewhere."""
    planned = planted.plan(ONLY, "nccl.splits=[none]", hosts=FOUR, nics=nics)
    one = planted.cell(planned)
    lost = [FOUR[3], FOUR[1]] if nics == 1 else list(FOUR[1:])
    kinds, _ = found(planned, planted.evidence(one, nics={host: ["mlx5_1"] for host in lost}))
    assert sorted(kinds) == [("rail_missing", host, False) for host in sorted(lost)]


def test_nics_that_nccl_has_merged_are_each_of_them():
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    assert found(planned, planted.evidence(planted.cell(planned), nics=["mlx5_0+mlx5_1"])) == ([], [])


# --- what all nodes do is a fault of none, and only on GPUs ---------------------------------------------------


ALIKE = [
    ({"net": "Socket", "nics": ["eth0"], "gpudirect": False}, "socket_fallback"),
    ({"nics": ["mlx5_0"]}, "rail_missing"),
    ({"gpudirect": False}, "no_gpudirect"),
    ({"nvls": False}, "no_nvls"),
]


@pytest.mark.parametrize(("plant", "kind"), ALIKE)
def test_what_all_nodes_do_is_a_finding_without_a_host(plant, kind):
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    kinds, _ = found(planned, planted.evidence(planted.cell(planned), **plant))
    assert kinds == [(kind, None, False)]


@pytest.mark.parametrize(("plant", "kind"), ALIKE)
def test_in_containers_it_is_as_it_must_be(plant, kind):
    planned = planted.plan(ONLY, "nccl.splits=[none]", device="cpu")
    assert found(planned, planted.evidence(planted.cell(planned), **plant)) == ([], [])


@pytest.mark.parametrize(
    ("setting", "plant"),
    [
        ("nccl.net=Socket", {"net": "Socket", "nics": ["eth0"], "gpudirect": False}),
        ("nccl.gpudirect=false", {"gpudirect": False}),
        ("nccl.nvls=false", {"nvls": False}),
        ("nccl.hca==mlx5_0", {"nics": ["mlx5_0"]}),
    ],
)
def test_what_was_asked_for_is_no_fault(setting, plant):
    planned = planted.plan(ONLY, "nccl.splits=[none]", setting)
    assert found(planned, planted.evidence(planted.cell(planned), **plant)) == ([], [])


def test_fewer_gpus_than_nics_need_not_use_every_nic():
    planned = planted.plan(ONLY, "nccl.splits=[none]", gpus=1, nics=8)
    one = planted.cell(planned)
    assert found(planned, planted.evidence(one, nics=["mlx5_3"], nvls=False)) == ([], [])


def test_gpus_without_nvls_are_not_asked_for_it():
    planned = planted.plan(ONLY, "nccl.splits=[none]", nvls=False)
    assert found(planned, planted.evidence(planted.cell(planned), nvls=False)) == ([], [])


# --- settings: what was asked for and what was used -----------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "plant", "words"),
    [
        ("collnet=true", {"collnet": False}, "did not use SHARP of the switches"),
        ("nvls=true", {"nvls": False}, "did not use NVLink SHARP"),
        ("nvls=false", {"nvls": True}, "used NVLink SHARP all the same"),
        ("gpudirect=false", {"gpudirect": True}, "used GPUDirect RDMA all the same"),
        ("net=IB", {"net": "Socket", "nics": ["eth0"]}, "used Socket"),
        ("buffsize=8388608", {"settings": {"NCCL_BUFFSIZE": "4194304"}}, "read 4194304"),
        ("variables={NCCL_IB_TC: 106}", {"settings": {"NCCL_IB_TC": "0"}}, "read 0"),
    ],
)
def test_a_setting_that_was_not_obeyed_is_a_finding(setting, plant, words):
    planned = planted.plan(ONLY, "nccl.splits=[none]", f"nccl.{setting}", device="cpu")
    kinds, suspects = found(planned, planted.evidence(planted.cell(planned), **plant))
    assert kinds == [("setting_ignored", None, False)]
    assert suspects[0].evidence.startswith(f"--set nccl.{setting.partition('=')[0].split('{')[0]}")
    assert words in suspects[0].evidence


@pytest.mark.parametrize(
    ("setting", "plant"),
    [
        ("collnet=true", {"collnet": True}),
        ("collnet=false", {"collnet": False}),
        ("gpudirect=true", {"gpudirect": True}),
        ("buffsize=8M", {"settings": {"NCCL_BUFFSIZE": "8388608"}}),
        ("variables={NCCL_IB_TC: '0x6a'}", {"settings": {"NCCL_IB_TC": "106"}}),
        ("variables={NCCL_IB_TC: 106}", {}),
    ],
)
def test_a_setting_that_was_obeyed_or_not_told_of_is_none(setting, plant):
    planned = planted.plan(ONLY, "nccl.splits=[none]", f"nccl.{setting}", device="cpu")
    assert found(planned, planted.evidence(planted.cell(planned), **plant)) == ([], [])


@pytest.mark.parametrize(
    ("setting", "algorithm", "protocol", "ignored"),
    [
        ("algo=Tree", "RING", "SIMPLE", True),
        ("algo=Tree", "TREE", "LL", False),
        ("algo=NVLSTree", "NVLS_TREE", "SIMPLE", False),
        ("proto=LL128", "RING", "SIMPLE", True),
        ("proto=Simple", "RING", "SIMPLE", False),
    ],
)
def test_another_algorithm_or_protocol_than_asked_for_is_a_finding(setting, algorithm, protocol, ignored):
    planned = planted.plan(ONLY, "nccl.splits=[none]", f"nccl.{setting}")
    kinds, _ = found(planned, planted.chosen(planted.cell(planned), algorithm, protocol))
    assert kinds == ([("setting_ignored", None, False)] if ignored else [])


def test_a_rail_has_no_nvlink_sharp_and_a_node_no_switches():
    planned = planted.plan(ONLY, "nccl.nvls=true", "nccl.collnet=true")
    records = []
    for one in planned["cells"]:
        split = one["params"]["split"]
        records += planted.evidence(one, nvls=split != "rail", collnet=split != "node")
    assert found(planned, records) == ([], [])


# --- values and speed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "observation"), [(30.0, False), (60.0, True), (70.0, None)])
def test_a_curve_that_falls_at_the_largest_sizes_is_told(end, observation):
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    one = planted.cell(planned)
    records = planted.table(one, lambda size: 92.0 if size < 1 << 30 else end) + planted.chosen(one)
    kinds, suspects = found(planned, records + planted.evidence(one))
    assert kinds == ([] if observation is None else [("slow_fabric", None, observation)])
    assert all(f"falls to {end:.4g} at 8 GiB" in suspect.evidence for suspect in suspects)
    assert all(suspect.where == f"{one['id']}: 1 GiB to 8 GiB" for suspect in suspects)


def test_wrong_values_of_a_row_that_was_lost_are_told_by_the_footer():
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    one = planted.cell(planned)
    records = [*planted.table(one), *planted.chosen(one), *planted.evidence(one)]
    records.append(planted.value(one, "wrong_values", 1))
    kinds, suspects = found(planned, records)
    assert kinds == [("wrong_values", None, False)] and "at least 1 wrong element in" in suspects[0].evidence


def test_wrong_values_are_of_nobody_in_particular():
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    one = planted.cell(planned)
    sizes = [8 << 18]
    kinds, suspects = found(planned, planted.table(one, sizes=sizes, wrong=96) + planted.evidence(one))
    assert kinds == [("wrong_values", None, False)]
    assert suspects[0].confidence == NOBODY and "192 wrong elements" in suspects[0].evidence
    assert "2 MiB" in suspects[0].where


def test_torn_output_is_said_and_is_nobodys_measurement():
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    kinds, suspects = found(planned, [planted.value(planted.cell(planned), "lost_rows", 2)])
    assert kinds == [("torn_output", None, False)] and "2 rows" in suspects[0].evidence


def test_a_slow_rail_is_named_with_its_nic():
    planned = planted.plan(ONLY)
    records = healthy(planned)
    slow = planted.cell(planned, "-rail5-")
    records = [r for r in records if not (r.cell == slow["id"] and r.metric == "busbw_gb_per_s")]
    records += [r for r in planted.table(slow, lambda size: 6.0) if r.metric == "busbw_gb_per_s"]
    kinds, suspects = found(planned, records)
    assert kinds == [("slow_rail", None, False)]
    assert "GPU 5 of each" in suspects[0].where and "11.5" in suspects[0].evidence


def test_a_rail_that_is_slow_at_one_size_only_is_not():
    planned = planted.plan(ONLY, "nccl.splits=[rail]")
    records = []
    for one in planned["cells"]:
        slow = one["params"]["rail"] == 5
        records += planted.table(one, lambda size, slow=slow: 8.0 if slow and size == 8 << 24 else 11.5)
    assert found(planned, records) == ([], [])


def test_what_is_far_from_its_ceiling_at_every_size_is_a_finding():
    """A RoCE fabric with congestion: RDMA, both rails, GPUDirect, and less than half of the wire."""
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    one = planted.cell(planned)
    records = planted.table(one, lambda size: 45.0) + planted.chosen(one) + planted.evidence(one)
    kinds, suspects = found(planned, records)
    assert kinds == [("slow_fabric", None, False)] and "45 % of 100 GB/s" in suspects[0].evidence
    less = planted.table(one, lambda size: 60.0) + planted.chosen(one) + planted.evidence(one)
    assert found(planned, less)[0] == [("slow_fabric", None, True)]


def test_all_slow_collectives_of_a_number_of_nodes_are_one_finding():
    """It tells of the worst, and names the others with what they reach."""
    planned = planted.plan("nccl.collectives=[all_reduce,all_gather,broadcast]", "nccl.splits=[none]")
    records = []
    for one, rate in zip(planned["cells"], (40.0, 30.0, 90.0), strict=True):
        records += planted.table(one, lambda size, rate=rate: rate) + planted.chosen(one) + planted.evidence(one)
    kinds, (suspect,) = found(planned, records)
    assert kinds == [("slow_fabric", None, False)]
    assert suspect.evidence.startswith("all_gather: at best 30 GB/s at 8 GiB, ")
    assert suspect.evidence.endswith("; also all_reduce 40 %") and "broadcast" not in suspect.evidence
    assert "and 1 more cell: " in suspect.where and "GiB" in suspect.where


def test_slowness_that_a_transport_explains_is_one_finding_not_two():
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    one = planted.cell(planned)
    plant = {"net": "Socket", "nics": ["eth0"], "gpudirect": False}
    records = planted.table(one, lambda size: 5.0) + planted.chosen(one) + planted.evidence(one, **plant)
    assert found(planned, records)[0] == [("socket_fallback", None, False), ("slow_fabric", None, True)]


def test_more_than_the_hardware_allows_is_an_observation():
    planned = planted.plan(ONLY, "nccl.splits=[none]")
    one = planted.cell(planned)
    records = planted.table(one, lambda size: 130.0) + planted.chosen(one) + planted.evidence(one)
    kinds, suspects = found(planned, records)
    assert kinds == [("above_ceiling", None, True)] and "130" in suspects[0].evidence


def test_where_nodes_share_a_kernel_no_speed_is_suspected():
    planned = planted.plan(ONLY)
    records = [r for one in planned["cells"] for r in planted.table(one, lambda size: 1.0)]
    assert found(planned, records, not_judged="2 nodes share one kernel") == ([], [])


def test_a_finding_reaches_the_summary_with_its_host_and_its_advice():
    planned = {**planted.plan(ONLY, "nccl.splits=[none]"), "run_id": "run", "models": {}}
    one = planted.cell(planned)
    records = planted.table(one) + planted.chosen(one) + planted.evidence(one, gpudirect={B: False})
    status = {"state": "complete", "cells": {one["id"]: {"state": "complete", "attempt": 1}}}
    facts = {one["id"]: {host: {"boot_id": host} for host in planted.HOSTS}}
    summary = summarise(planned, status, records, facts)
    (finding,) = summary["findings"]
    assert (finding["host"], finding["kind"]) == (B, "no_gpudirect") and "nvidia_peermem" in finding["evidence"]
    assert summary["verdict"] == "fail" and summary["observations"] == []
