"""Test nccl in the report and in summary.json: rows that fold many cells, verdicts by size, rails, words on transport."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import report_fixture
from report_fixture import NAMES, Fixture

from runner.judge import analysis
from runner.report import bandwidth, nccl, sections
from runner.workloads.nccl.details import transport

GIB = 2**30


def summary_of(fixture: Fixture) -> dict[str, Any]:
    return analysis.summarise(*fixture.arguments)


def tables_of(fixture: Fixture) -> dict[str, list[dict[str, str]]]:
    """The rows of each table by the first term that it explains; those of settings, which explain none, by `settings`."""
    found = sections.tables(summary_of(fixture))["nccl"]
    return {table.terms[0][0] if table.terms else "settings": list(table.rows) for table in found}


def charts_of(fixture: Fixture) -> sections.Charts:
    summary, by_cell = summary_of(fixture), {}
    for record in fixture.records:
        by_cell.setdefault(record.cell, []).append(record)
    return nccl.charts(sections.Measured("nccl", fixture.plan, summary, by_cell, lambda host: host[-4:]))


# --- rows ---------------------------------------------------------------------------------------------------


def test_a_row_is_a_number_of_nodes_and_a_split_and_a_column_a_collective():
    fixture = report_fixture.nccl((1, 2), repeats=2)
    tables = tables_of(fixture)
    assert len(fixture.plan["cells"]) == 2 * (10 + 10 + 1 + 8)
    assert [row["busbw, GB/s"] for row in tables["busbw_gb_per_s"]] == ["1 node", "2 nodes", "2 nodes, each alone"]
    one, two, inside = tables["busbw_gb_per_s"]
    assert one["all-reduce"] == inside["all-reduce"] == "477 (99 %)"
    assert two["all-reduce"] == "171 (91 %)" and two["gather"] == "44.0"  # no ceiling is known of gather
    assert inside["all-to-all"] == ""
    assert [row["rails, GB/s"] for row in tables["rail"]] == ["2 nodes"]
    assert [key for key in tables["rail"][0] if key.startswith("rail ")] == [f"rail {k}" for k in range(8)]


def test_sizes_are_judged_one_by_one():
    """Half of the largest sizes lose two thirds of their rate: these are named, whatever the others reach."""
    fixture = report_fixture.nccl((2,), settings={"collectives": ["all_reduce", "broadcast"], "splits": ["none"]})

    def slowed(record):
        context = record.context
        hit = context.get("collective") == "broadcast" and context.get("size_bytes") in (GIB, 2 * GIB)
        factor = {"busbw_gb_per_s": 1 / 3, "algbw_gb_per_s": 1 / 3, "latency_us_mean": 3}.get(record.metric, 1)
        return replace(record, value=record.value * factor) if hit else record

    fixture.records = [slowed(record) for record in fixture.records]
    tables = tables_of(fixture)
    assert tables["verdict_by_size"][0]["broadcast"] == "✕ 1 GiB – 2 GiB: 30 %"
    assert tables["verdict_by_size"][0]["all-reduce"].startswith("✓ ")
    assert tables["busbw_gb_per_s"][0]["below"] == "✕ broadcast"
    assert tables["busbw_gb_per_s"][0]["broadcast"] == "✕ 90.9 (91 %)"


@pytest.mark.parametrize("slow", [False, True])
def test_a_size_is_as_good_as_the_worse_of_its_two_places(slow: bool):
    fixture = report_fixture.nccl((2,), settings={"collectives": ["all_reduce"], "splits": ["none"]})
    hit = {"busbw_gb_per_s": 1 / 3, "latency_us_mean": 3}
    fixture.records = [
        replace(r, value=r.value * hit.get(r.metric, 1))
        if (r.context.get("size_bytes"), r.context.get("in_place")) == (GIB, slow)
        else r
        for r in fixture.records
    ]
    assert tables_of(fixture)["verdict_by_size"][0]["all-reduce"] == "✕ 1 GiB: 30 %"


def test_a_size_of_which_latency_is_the_time_is_not_judged():
    row = tables_of(report_fixture.nccl((2,)))["verdict_by_size"][0]
    smallest = re.match(r"✓ (\d+) MiB – 8 GiB", row["all-reduce"])
    assert smallest and 32 <= int(smallest[1]) <= 512


def test_a_terminal_shows_the_first_collectives_whichever_they_are():
    settings = {"collectives": ["broadcast", "scatter", "all_to_all"], "splits": ["none"]}
    table = sections.tables(summary_of(report_fixture.nccl((2,), settings=settings)))["nccl"][0]
    assert [key for key in table.rows[0] if key in table.columns][1:4] == ["broadcast", "scatter", "all-to-all"]


def test_the_time_of_an_operation_is_of_all_gpus_together():
    """A split begins with sizes whose time is that of their bytes."""
    rows = tables_of(report_fixture.nccl((1, 2)))["latency_us_mean"]
    assert [row["time, µs"] for row in rows] == ["1 node", "2 nodes"]
    assert float(rows[0]["all-reduce"]) < 10


def test_cells_that_did_not_end_well_are_counted_in_their_row():
    fixture = report_fixture.nccl((1, 2))
    lost = [f"nccl-{name}-2n-r1" for name in ("gather", "scatter")]
    for cell in lost:
        fixture.status["cells"][cell].update(state="failed", error={"kind": "unknown", "message": "died"})
    fixture.records = [record for record in fixture.records if record.cell not in lost]
    rows = tables_of(fixture)["busbw_gb_per_s"]
    assert [row["state"] for row in rows] == ["", "2 of 10 failed", ""]
    assert rows[1]["gather"] == "" and rows[1]["all-reduce"]


def test_where_no_cell_ended_the_rows_still_say_so():
    fixture = report_fixture.nccl((2,))
    fixture.records = []
    for entry in fixture.status["cells"].values():
        entry.update(state="cancelled")
    (table,) = sections.tables(summary_of(fixture))["nccl"]
    assert [row["state"] for row in table.rows] == ["10 of 10 cancelled", "1 of 1 cancelled"]


def on_cpus(fixture: Fixture) -> None:
    for cell in fixture.plan["cells"]:
        cell["device"] = "cpu"


def on_one_kernel(fixture: Fixture) -> None:
    fixture.facts = report_fixture.facts(fixture.plan, one_kernel=True)


@pytest.mark.parametrize("made_so", [on_cpus, on_one_kernel])
def test_what_means_nothing_has_no_verdict(made_so: Callable[[Fixture], None]):
    fixture = report_fixture.nccl((2,), slow_rail=5)
    made_so(fixture)
    tables = tables_of(fixture)
    assert "verdict_by_size" not in tables
    assert not [value for rows in tables.values() for row in rows for value in row.values() if "✕" in value]
    assert "below" not in tables["busbw_gb_per_s"][0]


def test_what_measured_is_named_and_why_there_is_no_ceiling():
    fixture = report_fixture.nccl((1, 2))
    on_cpus(fixture)
    for entry in fixture.status["cells"].values():
        entry["used"] = {"nccl_tests": "2.19.6+STAND-IN"}
    assert "nccl-tests 2.19.6+STAND-IN." in sections.tables(summary_of(fixture))["nccl"][0].remark
    assert charts_of(fixture).note.endswith("what carries their messages has no rated speed.")


def test_wrong_values_are_marked_and_are_a_finding():
    fixture = report_fixture.nccl((2,), settings={"splits": ["none"]})
    index = next(i for i, r in enumerate(fixture.records) if r.metric == "wrong_values")
    fixture.records[index] = replace(fixture.records[index], value=96)
    summary = summary_of(fixture)
    assert [finding["kind"] for finding in summary["findings"]] == ["wrong_values"]
    table = sections.tables(summary)["nccl"][0]
    assert table.rows[0]["wrong values"] == "96" and "wrong values" in table.faults


# --- rails --------------------------------------------------------------------------------------------------


def test_the_slow_rail_stands_out_in_table_and_chart():
    fixture = report_fixture.nccl_slow_rail()
    (row,) = tables_of(fixture)["rail"]
    assert row["rail 5"] == "✕ 5.17 (−55 %)"
    assert (row["median"], row["slowest"]) == ("11.6", "✕ rail 5: 5.17 (−55 %)")
    assert not [key for key, value in row.items() if "✕" in value and key not in ("rail 5", "slowest")]
    bars = next(figure for figure in charts_of(fixture).figures if "each rail" in figure.title)
    assert re.findall(r'class="bar (c\d)"', bars.svg) == ["c0"] * 5 + ["c1"] + ["c0"] * 2
    assert "12.5 GB/s (NICs of a node)" in bars.svg


# --- evidence -----------------------------------------------------------------------------------------------


def evidence(**said: Any) -> dict[str, Any]:
    nothing = {"net": [], "link": [], "nics": [], "gpudirect": None, "nvls": None, "collnet": None, "via": []}
    return {**nothing, **said}


@pytest.mark.parametrize(
    ("said", "across", "words"),
    [
        (
            {"net": ["IB"], "nics": ["mlx5_0", "mlx5_1"], "gpudirect": "all", "nvls": True},
            True,
            "GPUDirect RDMA over mlx5_0 and mlx5_1, NVLS inside a node",
        ),
        (
            {"net": ["IB"], "link": ["RoCE"], "nics": ["mlx5_0"], "gpudirect": "none", "via": ["P2P/CUMEM"]},
            True,
            "RDMA without GPUDirect over mlx5_0 (RoCE), peer to peer inside a node",
        ),
        (
            {"net": ["IB"], "nics": ["mlx5_0"], "gpudirect": "some"},
            True,
            "RDMA, GPUDirect on some channels only, over mlx5_0",
        ),
        ({"net": ["Socket"], "nics": ["eth0"], "gpudirect": "none"}, True, "sockets (TCP), no RDMA, over eth0"),
        ({"net": ["IB"], "nvls": True}, False, "NVLS inside a node"),  # no byte left the node
        ({"net": ["AWS Libfabric"], "gpudirect": "all"}, True, "GPUDirect AWS Libfabric"),
        ({"net": ["IB"], "collnet": True}, True, "RDMA, SHARP in the switches"),
        ({"via": ["P2P/CUMEM", "SHM"]}, True, "peer to peer and shared memory of the host inside a node"),
        ({}, True, ""),
    ],
)
def test_evidence_becomes_a_sentence(said: dict[str, Any], across: bool, words: str):
    assert nccl.transport_words(evidence(**said), across) == words


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([], ""),
        ([("RING", 8)], "ring"),
        ([("RING", 8), ("RING", 65536), ("TREE", 1 << 20)], "ring below 1 MiB, tree from 1 MiB"),
        ([("NVLS_TREE", 8), ("CollnetDirect", 1024)], "NVLS tree below 1 KiB, CollNet direct from 1 KiB"),
        ([("SYMMETRIC", 8)], "SYMMETRIC"),  # one that no version here knows
    ],
)
def test_algorithms_are_told_from_the_smallest_size_up(chosen: list[tuple[str, int]], words: str):
    assert nccl.algorithm_words([{"algorithm": name, "from_bytes": size} for name, size in chosen]) == words


def test_hosts_with_the_same_evidence_are_one_whatever_the_number_of_their_channels():
    """A tree's root has other channels than its leaves."""
    fixture = report_fixture.nccl((2,))
    cell = "nccl-all_reduce-2n-r1"
    records = [record for record in fixture.records if record.cell == cell]
    uneven = [replace(r, value=r.value * 3) if r.metric == "channels" and r.host == NAMES[1] else r for r in records]
    (entry,) = transport(uneven)
    assert entry["hosts"] == NAMES[:2]
    assert (entry["net"], entry["nics"], entry["link"]) == (["IB"], ["mlx5_0", "mlx5_1"], ["RoCE"])
    assert (entry["gpudirect"], entry["nvls"], entry["collnet"]) == ("all", True, False)


def test_hosts_that_differ_have_rows_of_their_own():
    fixture = report_fixture.nccl_slow_rail()
    rows = tables_of(fixture)["transport"]
    assert [(row["hosts"], row["transport"][:22]) for row in rows] == [
        (NAMES[0], "GPUDirect RDMA over ml"),
        (NAMES[1], "RDMA without GPUDirect"),
    ]
    assert "0001: GPUDirect RDMA over" in charts_of(fixture).note


def test_numbers_of_nodes_with_the_same_evidence_share_a_row():
    rows = tables_of(report_fixture.nccl((1, 2, 4)))["transport"]
    assert [row["nodes"] for row in rows] == ["1", "2, 4"]
    assert rows[1]["transport"] == "GPUDirect RDMA over mlx5_0 and mlx5_1 (RoCE), NVLS inside a node"
    assert rows[1]["algorithms"] == (
        "all-reduce: ring below 1 MiB, tree from 1 MiB, NVLS tree from 64 MiB; all others: ring"
    )


def test_a_setting_stands_beside_what_nccl_made_of_it():
    rows = {row["setting"]: row for row in tables_of(report_fixture.nccl_slow_rail())["settings"]}
    assert rows["NCCL_COLLNET_ENABLE"]["NCCL says"] == "read 1; not used"
    assert rows["NCCL_NET_GDR_LEVEL"]["NCCL says"] == "read SYS; used by some only"
    assert rows["NCCL_BUFFSIZE"] == {"setting": "NCCL_BUFFSIZE", "asked": "8388608", "NCCL says": "read 8388608"}


def test_a_setting_of_which_nccl_says_nothing_is_not_taken_for_used():
    fixture = report_fixture.nccl((2,), settings={"nvls": False, "buffsize": 8 << 20})
    fixture.records = [r for r in fixture.records if r.metric not in ("settings", "nvls")]
    rows = {row["setting"]: row["NCCL says"] for row in tables_of(fixture)["settings"]}
    assert rows == {"NCCL_NVLS_ENABLE": "nothing of it", "NCCL_BUFFSIZE": "nothing of it"}


# --- charts -------------------------------------------------------------------------------------------------


def test_curves_have_the_ceiling_of_their_algorithm_and_say_what_binds():
    charts = charts_of(report_fixture.nccl((1, 2, 8)))
    across = next(figure for figure in charts.figures if figure.title == "All-reduce across nodes, GB/s")
    assert across.ceilings == ["2 nodes 188 (NVLS tree: NICs of a node)", "8 nodes 112 (NVLS tree: NICs of a node)"]
    assert re.search(r"2 nodes, 1 GiB: 16\d GB/s \(NVLS tree, SIMPLE\)", across.svg)
    inside = [figure for figure in charts.figures if figure.title.startswith("Inside one node")]
    assert [len(figure.legend) for figure in inside] == [5, 5]
    assert charts.note == (
        "8 nodes: GPUDirect RDMA over mlx5_0 and mlx5_1 (RoCE), NVLS inside a node. "
        "All-reduce: ring below 1 MiB, tree from 1 MiB, NVLS tree from 64 MiB."
    )


@pytest.mark.parametrize(("factor", "drawn"), [(0.97, False), (0.9, True)])
def test_in_place_is_drawn_where_it_differs(factor: float, drawn: bool):
    busbw = {8: 0.1, GIB: 90.0, 2 * GIB: 92.0}
    curve = bandwidth.Curve("broadcast", 2, busbw, {**busbw, 8: 0.05, GIB: 90.0 * factor})
    (figure,) = bandwidth.figures([curve], {2: 0}, ["broadcast"])
    assert (" pale" in figure.svg, "in place" in figure.about) == (drawn, drawn)


def test_the_most_important_numbers_are_on_top():
    fixture = report_fixture.nccl_sockets()
    summary = summary_of(fixture)
    tiles = {t.label: t for t in nccl.tiles(sections.Measured("nccl", fixture.plan, summary, {}, str))}
    assert tiles["NCCL all-reduce busbw"].note == "4 nodes, 3 % of the ceiling"
    assert (tiles["transport between nodes"].value, tiles["transport between nodes"].note) == (
        "sockets (TCP), no RDMA",
        "eth0, 4 nodes",
    )
    assert tiles["below 65 % of the ceiling"].value == "6 of 6 collectives"


def test_of_nodes_that_differ_the_odd_one_is_on_top():
    fixture = report_fixture.nccl_slow_rail()
    summary = summary_of(fixture)
    run = sections.Measured("nccl", fixture.plan, summary, {}, {NAMES[0]: "node001", NAMES[1]: "node002"}.__getitem__)
    tile = next(tile for tile in nccl.tiles(run) if tile.label == "transport between nodes")
    assert (tile.value, tile.note) == (
        "differs by node",
        "node002: RDMA without GPUDirect, over mlx5_0 and mlx5_1 (RoCE)",
    )
