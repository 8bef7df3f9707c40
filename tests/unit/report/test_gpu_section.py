"""Test `gpu` in the report: the GPU that is at fault is first, stands out, and is the only thing in colour."""

from __future__ import annotations

import re

import pytest
import report_fixture
from report_fixture import NAMES, Fixture

from runner.judge import analysis
from runner.report import chart, gpu, page, terminal


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return report_fixture.gpus()


@pytest.fixture(scope="module")
def summary(fixture):
    return analysis.summarise(*fixture.arguments)


@pytest.fixture(scope="module")
def html(fixture, summary, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gpus")
    page.write(folder, *fixture.arguments[:2], summary, *fixture.arguments[2:])
    return (folder / "report.html").read_text()


def test_what_was_planted_is_found_and_nothing_else(summary) -> None:
    assert {(one["kind"], one["host"], one["where"].rpartition(": ")[2][:5]) for one in summary["findings"]} == {
        ("slow_gpu", NAMES[2], "GPU 5"),
        ("slow_gpu", NAMES[0], "GPU 3"),
        ("throttled", NAMES[6], "GPU 1"),
        ("slow_peer", NAMES[4], "GPU 6"),
    }
    assert summary["observations"] == []


def test_the_slow_gpus_are_the_first_rows_and_the_others_are_folded(summary) -> None:
    table = gpu.tables(summary["cells"])[1]
    assert {row["GPU"] for row in table.rows[:4]} == {
        f"{NAMES[2]} GPU 5",
        f"{NAMES[0]} GPU 3",
        f"{NAMES[6]} GPU 1",
        f"{NAMES[4]} GPU 6",
    }
    assert (len(table.rows), table.shown) == (64, 8)
    marked = [index for index, row in enumerate(table.rows) if any(value.startswith("✕") for value in row.values())]
    assert marked == [0, 1, 2, 3]
    assert table.rest.startswith("56 more GPUs, none more than 0.")


def test_each_gpu_has_its_share_of_the_peaks_of_the_hardware_file_which_no_cpu_has(summary) -> None:
    table = gpu.tables(summary["cells"])[1]
    rows = {row["GPU"]: row["of the peak, %"] for row in table.rows}
    assert table.remark.endswith("of the peak: bf16 · fp8 · memory.")
    assert rows[f"{NAMES[2]} GPU 5"] == "63 · 55 · 87"
    made = report_fixture.gpus()
    for cell in made.plan["cells"]:
        cell["device"] = "cpu"
    assert "of the peak, %" not in gpu.tables(analysis.summarise(*made.arguments)["cells"])[1].rows[0]


def test_the_tile_says_by_what_rate_the_slowest_gpu_is_slow(fixture, summary) -> None:
    run = gpu.Measured("gpu", fixture.plan, summary, {summary["cells"][0]["id"]: fixture.records}, str)
    assert gpu.tiles(run)[1].note == f"{NAMES[4]} GPU 6, to other GPUs, from the median"


def test_the_page_folds_healthy_gpus_and_a_terminal_counts_them(html, summary) -> None:
    shown, _, folded = html.partition('<summary class="small soft rest">')
    assert f"{NAMES[2]} GPU 5" in shown and f"{NAMES[2]} GPU 2" not in shown and f"{NAMES[2]} GPU 2" in folded
    assert "… 56 more GPUs, none more than 0." in terminal.terminal(summary)


def test_an_outlier_is_named_in_its_strip_and_no_other_point_is(html) -> None:
    strip = html.partition('aria-label="GPUs by bf16"')[2].partition("</svg>")[0]
    assert re.findall(r'class="value"[^>]*>([^<]+)<', strip) == ["GPU 5", "GPU 1"]
    assert strip.count("<circle") == 64


def test_the_matrix_is_that_of_the_node_with_a_slow_pair(html) -> None:
    matrices = re.findall(r"<h3>(GPU to GPU[^<]*)</h3>", html)
    assert matrices == ["GPU to GPU of node005, GB/s"]


def test_healthy_nodes_have_one_matrix_of_medians() -> None:
    made = report_fixture.gpus()
    made.records = [r for r in made.records if r.metric != "peer_gb_per_s" or r.host != NAMES[4]]
    summary = analysis.summarise(*made.arguments)
    run = gpu.Measured("gpu", made.plan, summary, {summary["cells"][0]["id"]: made.records}, str)
    titles = [figure.title for figure in gpu.charts(run).figures]
    assert titles[-1] == "GPU to GPU, GB/s, median of 7 nodes"


def test_a_field_is_the_deeper_the_slower_and_a_good_one_has_no_colour() -> None:
    drawn = chart.heat({(0, 1): 400.0, (1, 0): 340.0, (0, 2): 100.0}, 400.0, "pairs")
    assert re.findall(r'fill-opacity="([\d.]+)"', drawn) == ["0.00", "1.00", "0.50"]
    assert "0 to 2: 100" in drawn


def test_a_run_on_cpus_names_ranks_and_is_not_judged() -> None:
    made = report_fixture.gpus()
    made.plan["cells"][0]["device"] = "cpu"
    for record in made.records:
        record.context["uuid"] = None
    summary = analysis.summarise(*made.arguments)
    table = gpu.tables(summary["cells"])[1]
    assert table.rows[0]["GPU"].endswith("rank 6") and "✕" not in "".join(table.rows[0].values())
    run = gpu.Measured("gpu", made.plan, summary, {summary["cells"][0]["id"]: made.records}, str)
    assert gpu.charts(run).note.startswith("Not judged: ranks ran on the CPU")
