"""What the report says in words: signs, headlines and titles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner import failures
from runner.judge import metrics

SIGNS = {"pass": "✓", "fail": "✕", "inconclusive": "?", "not_judged": "–"}


VERDICTS = {"pass": "pass", "fail": "fail", "inconclusive": "inconclusive", "not_judged": "not judged"}


HEADLINES = {
    "pass": "The cluster meets its targets",
    "fail": "The cluster misses what is asked of it",
    "inconclusive": "Not settled: more repeats are needed",
    "not_judged": "It works; its speed was not judged",
}


TITLES = {
    **{name: kind.title for name, kind in failures.KINDS.items()},
    "rank_died": "A rank died",  # what runs say that recorded no kinds yet
    "node_unreachable": "A node stopped answering",
    "wrong_values": "Wrong results",
    "no_records": "Nothing was measured",
    "environment": "Nodes are set up differently",
}


FINDINGS_HEADLINES = {
    "environment": "Nodes are not set up the same",
    "wrong_values": "Collectives return wrong results",
}


def headline(summary: Mapping[str, Any]) -> str:
    """The verdict in plain words."""
    lost = sum(cell["state"] != "complete" for cell in summary["cells"])
    if summary["state"] == "failed":
        return f"The run failed: {lost} of {len(summary['cells'])} cells did not finish"
    if summary["state"] == "incomplete":
        return f"The run is incomplete: {lost} of {len(summary['cells'])} cells did not finish"
    if summary["state"] == "cancelled":
        return f"The run was stopped: {lost} of {len(summary['cells'])} cells did not finish"
    kinds = {finding["kind"] for finding in summary["findings"]}
    if len(kinds) == 1:
        return FINDINGS_HEADLINES.get(kinds.pop(), HEADLINES[summary["verdict"]])
    return HEADLINES[summary["verdict"]]


def target_text(target: Mapping[str, Any]) -> str:
    """`at least 98 %`, `at most 50 µs`."""
    word = "at least" if target["direction"] == "min" else "at most"
    return f"{word} {target['value']:g} {metrics.unit(target['metric'])}".strip()
