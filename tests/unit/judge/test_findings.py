"""What is a finding: nodes that failed together, nodes that were given up, interfaces that differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import report_fixture
from report_fixture import NAMES

from runner import errors
from runner.cli import conclusion
from runner.failures import KINDS, Suspect
from runner.judge import analysis, findings
from runner.report import page, terminal, words
from runner.results.rundir import RunDir
from runner.results.status import joined

CELL = "sft-tiny-2n-r1"
SWAP = {"host": NAMES[1], "by": NAMES[2], "cell": CELL, "kind": "hung", "reason": "it no longer answers", "at": ""}
HUNG = {"kind": "hung", "message": "it no longer answers", "host": NAMES[1], "stderr": []}
KILLED = {"kind": "rank_killed", "message": "rank0 was killed by SIGKILL", "host": NAMES[0], "stderr": []}


def summary_of(replaced: list[dict[str, Any]], error: dict[str, Any] | None = None) -> dict[str, Any]:
    fixture = report_fixture.testbed((1, 2))
    fixture.status["replaced"] = replaced
    if error:
        fixture.status["cells"][CELL].update(state="incomplete", error=error)
    return analysis.summarise(*fixture.arguments)


def test_nodes_that_failed_together_are_findings_of_their_own() -> None:
    found = summary_of([], joined([HUNG, KILLED]))["findings"]
    assert [(one["host"], one["kind"], one["where"]) for one in found] == [
        (NAMES[1], "hung", CELL),
        (NAMES[0], "rank_killed", CELL),
    ]


@pytest.mark.parametrize("by", [NAMES[2], None])
def test_a_node_that_was_given_up_is_a_finding_with_exit_code_1(by, tmp_path, capsys) -> None:
    summary = summary_of([{**SWAP, "by": by}])
    (found,) = summary["findings"]
    assert (found["host"], found["kind"], found["where"], found["replaced_by"]) == (NAMES[1], "hung", CELL, by)
    assert (f"{NAMES[2]} took its place" in found["evidence"]) == (by is not None)
    assert "it no longer answers" in found["evidence"]
    assert (summary["state"], summary["verdict"]) == ("complete", "fail")
    assert words.headline(summary) == "1 node failed and was given up"
    last = terminal.terminal(summary).splitlines()
    assert "It works" not in "".join(last) and last[-1] == "✕ 1 node failed and was given up"
    fixture = report_fixture.testbed((1, 2))
    page.write(tmp_path, *fixture.arguments[:2], summary, *fixture.arguments[2:])
    top = (
        (tmp_path / "report.html").read_text().partition('<header class="card hero fail">')[2].partition("</header>")[0]
    )
    assert "✕ fail" in top and f"<h1>{words.headline(summary)}</h1>" in top, "the words are the terminal's"
    assert conclusion.print_conclusion(RunDir(tmp_path), summary, False) == errors.EXIT_TARGET_MISSED
    assert "to finish it" not in capsys.readouterr().out


def test_nodes_that_were_given_up_are_counted() -> None:
    summary = summary_of([SWAP, {**SWAP, "host": NAMES[2], "by": NAMES[3], "kind": "lost_connection"}])
    assert words.headline(summary) == "2 nodes failed and were given up"


def test_a_node_that_was_given_up_in_a_cell_that_failed_is_told_once() -> None:
    summary = summary_of([{**SWAP, "by": None}], HUNG)
    (found,) = summary["findings"]
    assert "replaced_by" not in found and words.headline(summary).startswith("The run is incomplete")


def test_another_mtu_on_the_interface_that_carries_the_traffic_is_a_finding() -> None:
    fixture = report_fixture.testbed((1, 2, 4))
    for per_host in fixture.facts.values():
        for host, observed in per_host.items():
            mtu = 1200 if host == NAMES[1] else 1500
            carries = {"name": "eth0", "speed_mbit_per_s": 10_000, "mtu": mtu, "driver": None, "carries_traffic": True}
            observed["nics"] = [carries]
    (found,) = analysis.summarise(*fixture.arguments)["findings"]
    assert (found["host"], found["kind"], found["where"]) == (NAMES[1], "environment", "traffic nic eth0")
    assert "MTU 1200 here" in found["evidence"] and "MTU 1500 on 3 other nodes" in found["evidence"]


SLOW = Suspect("environment", "gpu-8n-r1", "4 % slower than the others", "medium", NAMES[1])


def test_what_a_test_suspects_is_a_finding_with_its_fault_and_advice() -> None:
    (found,) = findings.find([], {}, [SLOW, replace(SLOW, observation=True)], {})
    kind = KINDS[SLOW.kind]
    assert found == {
        "host": NAMES[1],
        "kind": "environment",
        "where": "gpu-8n-r1",
        "evidence": f"4 % slower than the others; {kind.advice}",
        "confidence": "medium",
        "fault": kind.fault,
    }


def test_an_observation_is_told_apart_from_findings_and_fails_nothing(tmp_path, capsys) -> None:
    fixture = report_fixture.testbed((1, 2))
    summary = analysis.summarise(*fixture.arguments)
    assert summary["observations"] == []
    summary["observations"] = findings.observations([SLOW, replace(SLOW, observation=True)])
    assert [one["host"] for one in summary["observations"]] == [NAMES[1]], "the other is a finding"
    page.write(tmp_path, *fixture.arguments[:2], summary, *fixture.arguments[2:])
    for text in ((tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()):
        assert "Observations" in text and "4 % slower than the others" in text and "Findings" not in text
    told = terminal.terminal(summary)
    assert f"• Nodes are set up differently: {NAMES[1]}: 4 % slower" in told and "✕" not in told
    assert conclusion.print_conclusion(RunDir(tmp_path), summary, False) == 0


def test_a_summary_from_before_observations_is_shown() -> None:
    summary = summary_of([])
    del summary["observations"]
    assert terminal.terminal(summary)


def test_a_cell_says_why_its_speed_means_nothing() -> None:
    assert {cell["not_judged"] for cell in summary_of([])["cells"]} == {
        "2 nodes share one kernel (same boot id): speeds prove that the system works, not how fast it is",
        "ranks ran on the CPU: targets are for GPUs",
    }
