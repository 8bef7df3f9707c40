"""The numbers of test `nccl`: each size against the ceiling of the algorithm that NCCL used for it."""

from __future__ import annotations

import nccl_records as planted
import pytest

from runner.workloads.nccl import metrics


def judged(planned, one, records):
    return {(row.size_bytes, row.in_place): row for row in metrics.rows(planned, one, records)}


@pytest.mark.parametrize(
    ("algorithm", "ceiling"),
    # 2 nodes of 8 GPUs and 2 × 50 GB/s each. Two nodes send as little by a tree as where switches combine.
    [("RING", 100.0), ("TREE", 187.5), ("NVLS_TREE", 187.5), ("COLLNET_DIRECT", 187.5), ("NVLS", 187.5), (None, 187.5)],
)
def test_a_size_has_the_ceiling_of_its_algorithm(algorithm, ceiling):
    planned = planted.plan()
    one = planted.cell(planned)
    records = planted.table(one) + (planted.chosen(one, algorithm) if algorithm else [])
    assert {round(row.limit.gb_per_s, 6) for row in metrics.rows(planned, one, records)} == {ceiling}


def test_with_sharp_the_ceiling_does_not_fall_with_more_nodes():
    planned = planted.plan(hosts=[f"node-{number}" for number in range(8)])
    one = planted.cell(planned)
    assert metrics.limit_of(planned, one, "TREE").gb_per_s == pytest.approx(112.5)
    assert metrics.limit_of(planned, one, "COLLNET_CHAIN").gb_per_s == pytest.approx(2 * 100 * 63 / 64)


@pytest.mark.parametrize(
    ("collective", "ceiling"),
    [("all_gather", 100), ("broadcast", 100), ("reduce", 100), ("send_recv", 100), ("all_to_all", 23.4375)],
)
def test_each_collective_has_its_own(collective, ceiling):
    planned = planted.plan(f"nccl.collectives=[{collective}]")
    assert metrics.limit_of(planned, planted.cell(planned, collective), "RING").gb_per_s == pytest.approx(ceiling)


@pytest.mark.parametrize("collective", ["gather", "scatter", "hypercube", "all_to_all_v"])
def test_where_no_ceiling_is_known_none_is_drawn(collective):
    planned = planted.plan(f"nccl.collectives=[{collective}]")
    one = planted.cell(planned, collective)
    assert {row.verdict for row in metrics.rows(planned, one, planted.table(one))} == {"not_judged"}


def test_inside_nodes_nvlink_is_the_ceiling_and_a_rail_has_its_share_of_the_nics():
    planned = planted.plan()
    assert metrics.limit_of(planned, planted.cell(planned, "-node-"), "NVLS").gb_per_s == 480
    assert metrics.limit_of(planned, planted.cell(planned, "-rail3-"), "RING").gb_per_s == 100 / 8
    alone = planted.plan(hosts=["node-a"])
    assert metrics.limit_of(alone, planted.cell(alone), "NVLS").gb_per_s == 480


def test_on_cpus_nothing_is_compared():
    planned = planted.plan(device="cpu")
    one = planted.cell(planned)
    rows = metrics.rows(planned, one, planted.table(one))
    assert rows and {(row.limit, row.verdict) for row in rows} == {(None, "not_judged")}
    assert "all_reduce_busbw_pct_of_limit" not in metrics.summarise(planned, one, planted.table(one))[0]


def test_the_verdict_is_of_one_size_and_small_ones_have_none():
    """A fabric that is healthy but for one size: no average over sizes would show which."""
    planned = planted.plan()
    one = planted.cell(planned)
    records = planted.table(one, lambda size: 40.0 if size == 8 << 27 else 92.0) + planted.chosen(one)
    rows = judged(planned, one, records)
    assert {size: row.verdict for (size, in_place), row in rows.items() if in_place} == {
        **dict.fromkeys(planted.SIZES[:8], "not_judged"),  # up to 16 MiB
        8 << 24: "good",
        8 << 27: "low",
        8 << 30: "good",
    }
    assert "latency counts" in rows[8, True].reason
    assert rows[8 << 27, True].reason == "40 % of 100 GB/s (NICs of a node), less than 65 %"


def test_more_than_the_ceiling_is_suspicious_at_any_size():
    planned = planted.plan()
    one = planted.cell(planned)
    rows = judged(planned, one, planted.table(one, lambda size: 150.0) + planted.chosen(one))
    assert rows[8 << 30, False].verdict == "above" and "too low" in rows[8 << 30, False].reason
    tree = judged(planned, one, planted.table(one, lambda size: 150.0) + planted.chosen(one, "TREE"))
    assert tree[8 << 30, False].verdict == "good", "more than the NICs' rate is no fault of a tree over two nodes"


@pytest.mark.parametrize("collective", ["all_gather", "reduce_scatter"])
def test_nccl_counts_the_bytes_of_one_rank_where_each_has_a_share(collective):
    planned = planted.plan(f"nccl.collectives=[{collective}]")
    one = planted.cell(planned, collective)
    sizes = [size for size in planted.SIZES if size >= 16]
    records = planted.table(one, sizes=sizes) + [
        planted.value(one, "algorithm", size // 16, of=collective, algorithm="RING", protocol="LL") for size in sizes
    ]
    assert {(row.algorithm, row.protocol) for row in metrics.rows(planned, one, records)} == {("RING", "LL")}


def test_a_row_that_is_not_whole_is_no_row():
    planned = planted.plan()
    one = planted.cell(planned)
    records = [record for record in planted.table(one) if record.metric != "busbw_gb_per_s"]
    assert metrics.rows(planned, one, records) == [] and metrics.summarise(planned, one, []) == ({}, {})


def test_a_cell_has_its_highest_bandwidth_its_latency_and_its_wrong_values():
    planned = planted.plan()
    one = planted.cell(planned)
    found, limits = metrics.summarise(planned, one, planted.table(one, wrong=3) + planted.chosen(one))
    assert found["all_reduce_busbw_gb_per_s_max"] == pytest.approx(92, rel=0.01)
    assert found["all_reduce_busbw_pct_of_limit"] == pytest.approx(92, rel=0.01)
    assert found["all_reduce_latency_us_mean"] == pytest.approx(20, rel=0.01)
    assert found["wrong_values"] == 3 * 2 * len(planted.SIZES)
    assert limits == {"all_reduce": {"busbw_gb_per_s": 100.0, "binds": "NICs of a node"}}


def test_a_target_is_judged_by_its_sizes_and_never_by_a_split():
    planned = planted.plan()
    target = {"metric": "busbw_gb_per_s", "collective": "all_reduce", "direction": "min", "min_bytes": 1 << 30}
    whole, rail = planted.cell(planned), planted.cell(planned, "-rail0-")
    records = planted.table(whole, lambda size: 90.0 if size >= 1 << 30 else 95.0)
    assert metrics.target_value(target, {**whole, "metrics": {}}, records) == pytest.approx(90, rel=0.01)
    assert metrics.target_value(target, {**rail, "metrics": {}}, planted.table(rail)) is None
