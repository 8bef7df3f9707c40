"""The report's signs, headlines and titles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner import failures
from runner.judge import metrics
from runner.system.wording import counted, was

SIGNS = {"pass": "✓", "fail": "✕", "inconclusive": "?", "not_judged": "–"}


VERDICTS = {"pass": "pass", "fail": "fail", "inconclusive": "inconclusive", "not_judged": "not judged"}


HEADLINES = {
    "pass": "The cluster meets its targets",
    "fail": "The cluster does not meet its targets",
    "inconclusive": "Undecided: more repeats are needed",
    "not_judged": "It works; its speed was not judged",
}


def title(kind: str) -> str:
    """The title of a finding of this kind; that of `unknown` for a kind that no version defined."""
    return failures.KINDS[failures.current(kind)].title


def headline(summary: Mapping[str, Any]) -> str:
    """The headline of a run from the contents of summary.json: its state, its findings, or its verdict."""
    every = len(summary["cells"])
    lost = sum(cell["state"] != "complete" for cell in summary["cells"])
    unfinished = f"{lost} of {counted(every, 'cell')} did not finish"
    if summary["state"] == "failed":
        return f"The run failed: {unfinished}"
    if summary["state"] == "incomplete":
        return f"The run is incomplete: {unfinished}"
    if summary["state"] == "cancelled":
        return f"The run was stopped: {unfinished}"
    if summary["findings"] and all("replaced_by" in finding for finding in summary["findings"]):
        count = len({finding["host"] for finding in summary["findings"]})
        return f"{counted(count, 'node')} failed and {was(count)} given up"
    kinds = {failures.current(finding["kind"]) for finding in summary["findings"]}
    if len(kinds) > 1:
        return f"The cluster has {counted(len(summary['findings']), 'problem')}"
    if kinds and (text := failures.KINDS[kinds.pop()].headline):
        return text
    return HEADLINES[summary["verdict"]]


def target_text(target: Mapping[str, Any]) -> str:
    """What a target requires, with its unit: `at least 98 %`, `at most 50 µs`."""
    word = "at least" if target["direction"] == "min" else "at most"
    return f"{word} {target['value']:g} {metrics.unit(target['metric'])}".strip()
