"""The report as people and browsers get it. The runs are synthetic (report_fixture)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_fixture
from hypothesis import given
from hypothesis import strategies as st

from golden_files import check as golden
from runner.cluster import limits
from runner.cluster.tools.verl_metrics import PHASES
from runner.judge import analysis
from runner.report import chart, figures, sections, terminal
from runner.report.page import write
from runner.system.wording import size_text
from runner.workloads.nccl.command import PROGRAMS
from runner.workloads.registry import TESTS

RUNS = {
    "healthy": report_fixture.healthy,
    "testbed": report_fixture.testbed,
    "broken": report_fixture.broken,
    "nccl": report_fixture.nccl,
    "nccl-sockets": report_fixture.nccl_sockets,
    "nccl-slow-rail": report_fixture.nccl_slow_rail,
    "gpus": report_fixture.gpus,
    "rl": report_fixture.rl,
}
HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Tags in order, text outside of tags, and whether every tag is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.words += data


def written(tmp_path: Path, fixture: report_fixture.Fixture) -> tuple[str, str]:
    """(HTML, Markdown) of a run."""
    summary = analysis.summarise(*fixture.arguments)
    plan, status, records, facts, telemetry = fixture.arguments
    write(tmp_path, plan, status, summary, records, facts, telemetry)
    return (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module", params=RUNS)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, str, dict[str, Any]]:
    """(name, HTML, Markdown, summary) of each kind of run."""
    fixture = RUNS[request.param]()
    html, markdown = written(tmp_path_factory.mktemp("run"), fixture)
    return request.param, html, markdown, analysis.summarise(*fixture.arguments)


def test_markdown_and_terminal_are_as_recorded(run: tuple[str, str, str, dict[str, Any]]) -> None:
    name, _, markdown, summary = run
    golden(f"report/{name}.md", markdown)
    golden(f"report/{name}.txt", terminal.terminal(summary) + "\n")


def test_the_page_is_well_formed_and_needs_nothing_else(run: tuple[str, str, str, dict[str, Any]]) -> None:
    _, html, _, _ = run
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith("#"), f"<{tag} {name}> leaves the file"
    assert "url(" not in html and "@import" not in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in html


def test_every_link_inside_the_page_has_its_end(run: tuple[str, str, str, dict[str, Any]]) -> None:
    _, html, _, _ = run
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(re.findall(r'id="([^"]+)"', html))


def test_the_run_directory_holds_whole_files_only(tmp_path: Path) -> None:
    written(tmp_path, report_fixture.testbed((1, 2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_the_verdict_comes_first_and_a_refusal_stands_beside_the_curve(tmp_path: Path) -> None:
    html, _ = written(tmp_path, report_fixture.testbed())
    words = Page(html).words
    assert words.index("It works; its speed was not judged") < words.index("Scaling efficiency, %")
    note = words.index("Not judged: 8 nodes share one kernel")
    assert words.index("Findings" if "Findings" in words else "Scaling") < note < words.index("Scaling efficiency, %")
    assert html.count("stamp badge not_judged") == 3  # on every chart of the curve
    assert "No ceiling is drawn: ranks ran on the CPU" in words


def test_a_ceiling_is_drawn_and_names_what_binds(tmp_path: Path) -> None:
    html, _ = written(tmp_path, report_fixture.healthy())
    assert "ceiling of 2 nodes: 188 GB/s (NICs of a node)" in html
    assert "ceiling of 1 node: 480 GB/s (NVLink inside a node)" in html
    assert "No ceiling is drawn" not in html


def test_the_failed_cell_shows_its_last_words_and_the_odd_node_is_marked(tmp_path: Path) -> None:
    html, _ = written(tmp_path, report_fixture.broken())
    words = " ".join(Page(html).words.split())
    assert "The run failed: 1 of 24 cells did not finish" in words
    assert "Tried to allocate 2.50 GiB" in words
    assert "≠ 550.90.07 node005" in words
    assert "570.124.06 node[001-004,006-008]" in words
    assert "node[001-008] the same: 16 properties" in words


def test_nothing_that_a_node_says_becomes_markup(tmp_path: Path) -> None:
    fixture = report_fixture.broken()
    fixture = _renamed(fixture, report_fixture.NAMES[2], HOSTILE)
    for node in fixture.plan["nodes"]:
        node["alias"] = node["alias"].replace("node003", f'"{HOSTILE}')
    fixture.plan["command"] += f" --model {HOSTILE}"
    for entry in fixture.status["cells"].values():
        if entry["error"]:
            entry["error"]["stderr"].append(f"{HOSTILE} ]]> --> </pre></style>")
    for per_host in fixture.facts.values():
        for facts in per_host.values():
            facts["kernel"] = f"6.8 {HOSTILE}"
    html, markdown = written(tmp_path, fixture)
    page = Page(html)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert HOSTILE in page.words
    assert HOSTILE not in html
    fenced = re.sub(r"^(`{3,})\n.*?\n\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)  # shown as it is
    assert "<script" not in re.sub(r"\\<", "", fenced)


def _renamed(fixture: report_fixture.Fixture, old: str, new: str) -> report_fixture.Fixture:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {walk(k): walk(v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v) for v in value]
        return value.replace(old, new) if isinstance(value, str) else value

    records = [replace(r, host=walk(r.host)) for r in fixture.records]
    plan, status, facts, telemetry = (
        walk(copy.deepcopy(part)) for part in (fixture.plan, fixture.status, fixture.facts, fixture.telemetry)
    )
    return report_fixture.Fixture(plan, status, records, facts, telemetry)


@pytest.mark.parametrize("made", [*RUNS.values(), report_fixture.one_gpu])
def test_the_terminal_gets_100_columns_and_no_control_characters(made: Callable[[], report_fixture.Fixture]) -> None:
    fixture = made()
    first = fixture.plan["cells"][0]
    fixture.status["cells"]["torch-" + "a-long-name-" * 9] = fixture.status["cells"][first["id"]]
    first["id"] = "torch-" + "a-long-name-" * 9
    for entry in fixture.status["cells"].values():
        if entry["error"]:
            entry["error"]["message"] = "\x1b[31mred\x07 " + "a long story " * 20
    text = terminal.terminal(analysis.summarise(*fixture.arguments))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_a_run_that_measured_nothing_still_has_a_report(tmp_path: Path) -> None:
    fixture = report_fixture.testbed((2,))
    fixture.records, fixture.facts = [], {}
    for entry in fixture.status["cells"].values():
        entry["state"] = "cancelled"
    html, _ = written(tmp_path, fixture)
    assert "The run is incomplete: 2 of 2 cells did not finish" in html
    assert "No node recorded its facts." in html


def test_one_node_is_not_compared_and_numbers_agree_with_their_nouns(tmp_path: Path) -> None:
    fixture = report_fixture.testbed((1,))
    fixture.status["cells"]["torch-1n-r1"].update(state="failed", attempt=2)
    html, markdown = written(tmp_path, fixture)
    words = " ".join(Page(html).words.split())
    assert "One node: nothing to compare." in words and "One node: nothing to compare." in markdown
    assert "No difference" not in words + markdown
    assert "1: node001 = fukushimadc-02-hgx-0001, 1 CPU rank\n" in markdown
    one = {noun for noun in re.findall(r"\b1 (\w+)", words + terminal.terminal(analysis.summarise(*fixture.arguments)))}
    assert not {noun for noun in one if noun.endswith("s") and noun not in {"s"}}, one


ALONE = "Collectives need two ranks: with one, only the device's own copies are measured."


def test_one_rank_shows_its_copies_and_no_table_of_collectives(tmp_path: Path) -> None:
    fixture = report_fixture.one_gpu()
    html, markdown = written(tmp_path, fixture)
    text = terminal.terminal(analysis.summarise(*fixture.arguments))
    assert Page(html).open == []
    assert ALONE in " ".join(Page(html).words.split()) and ALONE in markdown and ALONE in text
    assert "| torch-1n-r1 | 4,150 (86 %) | 8 GiB | 55.2 | 54.7 |" in markdown
    for shown in (html, markdown, text):
        assert (
            "wrong values</th>" not in shown
            and "all-reduce, GB/s" not in shown
            and "bus bandwidth against" not in shown
        )
    assert "copy within the device" in html and 'id="m-host_to_device_gb_per_s"' in html


def test_wrong_bytes_of_a_copy_are_a_finding_and_marked(tmp_path: Path) -> None:
    fixture = report_fixture.one_gpu()
    index = next(i for i, r in enumerate(fixture.records) if r.metric == "wrong_values")
    fixture.records[index] = replace(fixture.records[index], value=12)
    summary = analysis.summarise(*fixture.arguments)
    (found,) = summary["findings"]
    assert found["kind"] == "wrong_values"
    assert found["evidence"].startswith("12 wrong elements in the result of copy; ")
    html, _ = written(tmp_path, fixture)
    assert '<td class="odd">12</td>' in html


def test_a_run_of_the_version_before_with_one_rank_is_still_shown(tmp_path: Path) -> None:
    """It holds collectives of one rank, which sent nothing."""
    fixture = report_fixture.testbed((1, 2))
    kept = [r for r in fixture.records if r.cell != "torch-1n-r1"]
    context = {"collective": "all_reduce", "size_bytes": 8, "iters": 20, "dtype": "float32"}
    old = next(r for r in fixture.records if r.cell == "torch-1n-r1")
    values = {"latency_us_p50": 9.0, "latency_us_p99": 11.0, "busbw_gb_per_s": 0.0, "wrong_values": 0.0}
    kept += [replace(old, metric=metric, value=value, context=context) for metric, value in values.items()]
    fixture.records = kept
    html, markdown = written(tmp_path, fixture)
    assert ALONE in markdown and Page(html).open == []


@pytest.mark.parametrize("name", TESTS)
def test_a_tests_report_module_offers_a_section(name: str) -> None:
    section = next(one for test, one in sections.sections().items() if TESTS[test].report == TESTS[name].report)
    assert section.TITLE and re.fullmatch("[a-z]+", section.ANCHOR)
    fixture = report_fixture.nccl() if name == "nccl" else report_fixture.healthy((1, 2))
    summary = analysis.summarise(*fixture.arguments)
    cells = [cell for cell in summary["cells"] if cell["test"] == name]
    table = section.tables(cells or [{**cell, "test": name, "metrics": {}} for cell in summary["cells"]])[0]
    assert set(table.columns) & set(table.rows[0]) and {term for term, _ in table.terms} <= set(section.GLOSSARY)
    nobody = sections.Measured(name, fixture.plan, {**summary, "cells": []}, {}, str)
    assert section.tiles(nobody) == [] and section.charts(nobody) == sections.Charts()


def test_every_term_of_the_glossary_is_in_the_reference_of_metrics() -> None:
    reference = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    assert [term for term in sections.glossary() if term not in reference] == []


def test_every_metric_of_a_summary_is_in_the_reference_of_metrics() -> None:
    reference = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    made = (report_fixture.healthy((1, 2)), report_fixture.one_gpu(), report_fixture.nccl((1, 2)), report_fixture.rl())
    summaries = [analysis.summarise(*each.arguments) for each in made]
    names = {name for summary in summaries for cell in summary["cells"] for name in cell["metrics"]}
    collectives = "|".join((*limits.COLLECTIVES, "barrier", *PROGRAMS))
    general = {re.sub(rf"^({collectives})_", "<collective>_", name) for name in names}
    general = {re.sub(rf"^({'|'.join(PHASES)})_(share_pct|tokens_per_s)$", r"<phase>_\2", name) for name in general}
    assert sorted(name for name in general if f"`{name}`" not in reference) == []


# --- numbers and charts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.1234, "0.123"),
        (5.8, "5.80"),
        (99.96, "100"),
        (425_095.9, "425,096"),
        (0.00012, "0.00012"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(8, "8 B"), (1024, "1 KiB"), (1.5 * 2**30, "1.5 GiB"), (2**43, "8 TiB"), (2**53, "8192 TiB")]
)
def test_sizes_are_written_in_powers_of_1024(size: float, text: str) -> None:
    assert size_text(size) == text


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.booleans())
def test_a_linear_axis_holds_its_values_and_few_round_ticks(values: list[float], from_zero: bool) -> None:
    axis = chart.linear("", values, from_zero)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values)
    assert 2 <= len(axis.ticks) <= 8
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_byte_axis_holds_its_sizes_and_few_ticks(first: int, second: int) -> None:
    sizes = [2.0**first, 2.0**second]
    axis = chart.bytes_axis("", sizes)
    assert all(0 <= axis.place(size) <= 1 for size in sizes)
    assert 1 <= len(axis.ticks) <= 7


def test_a_chart_shows_every_point_with_its_title() -> None:
    points = [chart.Point(1, 10, "one", 9, 11), chart.Point(2, 20, "two & more")]
    svg = chart.lines([chart.Series("a<b", points)], chart.nodes_axis([1, 2]), chart.linear("", [10, 20]), "about")
    assert svg.count("<circle") == 2
    assert "<title>two &amp; more</title>" in svg
    assert "a&lt;b" in svg and "a<b" not in svg
    assert svg.count('class="interval') == 1


def test_the_command_that_repeats_the_run_can_be_pasted_from_both(tmp_path: Path) -> None:
    fixture = report_fixture.testbed((1,))
    fixture.plan["command"] = "runner bench --hosts 'node[001-002]' --set sft.dataset='my_data*' # ```"
    html, markdown = written(tmp_path, fixture)
    assert fixture.plan["command"] in Page(html).words
    assert f"\n````\n{fixture.plan['command']}\n````\n" in markdown


def test_without_gpus_nothing_is_per_gpu_and_one_node_count_has_no_efficiency(tmp_path: Path) -> None:
    fixture = report_fixture.testbed((2,))
    html, markdown = written(tmp_path, fixture)
    shown = re.sub(r'<details class="card"[^>]*id="glossary">.*?</details>', "", html, flags=re.DOTALL)
    for text in (Page(shown).words, markdown, terminal.terminal(analysis.summarise(*fixture.arguments))):
        assert "per GPU" not in text and "per rank" in text
        assert "efficiency" not in text.lower().replace("scaling efficiency is", "")


def test_the_page_has_the_nodes_names_beside_their_aliases_and_the_time_that_each_cell_took(tmp_path: Path) -> None:
    html, markdown = written(tmp_path, report_fixture.testbed((1, 2)))
    for text in (" ".join(Page(html).words.split()), markdown.replace("\\", "")):
        assert "2: node[001-002] = fukushimadc-02-hgx-[0001-0002]" in text
    assert "150 s" not in markdown and re.search(r"^\| torch-1n-r1 .*\| 2 min \|$", markdown, re.MULTILINE)
    broken, _ = written(tmp_path, report_fixture.broken())
    assert "node003 (fukushimadc-02-hgx-0003): rank19 died" in broken


def test_rates_are_drawn_against_the_plan_and_arithmetic_against_both_ceilings(tmp_path: Path) -> None:
    html, _ = written(tmp_path, report_fixture.healthy())
    words = Page(html).words
    assert "1 node: bound by GPU" in words and "assumed from one H200, not measured here" in words
    assert "the plan predicts 12,900 positions/s per GPU" in html and "matrix products: 7" in html
    assert "data sheet: 989 TFLOP/s" in html and "% of the matmul rate" in words


def cells_of(html: str) -> str:
    """The page's words, with a blank between the cells of a table."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_the_page_says_with_what_cells_were_trained(tmp_path: Path) -> None:
    fixture = report_fixture.healthy(counts=(1, 2), repeats=1)
    html, _ = written(tmp_path, fixture)
    words = cells_of(html)
    assert "every cell varlen bf16 none 3 4 4 no loss fast AdamW fused" in words and report_fixture.CHOSEN in words
    last = next(cell for cell in fixture.plan["cells"] if cell["test"] == "sft" and cell["num_nodes"] == 2)
    fixture.status["cells"][last["id"]]["used"]["attention"] = "sdpa"
    words = cells_of(written(tmp_path, fixture)[0])
    assert f"{last['id']} sdpa bf16" in words and "every cell" not in words


def test_a_run_of_an_earlier_version_has_neither(tmp_path: Path) -> None:
    fixture = report_fixture.healthy(counts=(1,), repeats=1)
    for cell in fixture.plan["cells"]:
        del cell["expected"], cell["chosen"]
    for entry in fixture.status["cells"].values():
        entry.pop("used")
    fixture.records = [record for record in fixture.records if record.metric != "matmul_tflop_per_s"]
    html, _ = written(tmp_path, fixture)
    assert "Rate against the plan" not in html and "Arithmetic, TFLOP/s" not in html and "Chosen" not in html


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(0, 2e6))
def test_a_bar_and_its_text_stay_in_the_chart(values: list[float], ceiling: float) -> None:
    rows = [
        chart.Bar(f"{i} nodes", value, f"{value:,.0f}", i, [chart.Rule(ceiling, "c")]) for i, value in enumerate(values)
    ]
    svg = chart.bars(rows, chart.linear("", [*values, ceiling], from_zero=True), "bars")
    drawn = re.findall(r'<rect class="bar c\d" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    assert len(drawn) == len(values)
    assert all(float(x) + float(width) <= chart.WIDTH for x, width in drawn)
