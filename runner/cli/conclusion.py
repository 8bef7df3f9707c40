"""Prints the results of a run, and determines the exit code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from runner import errors

if TYPE_CHECKING:
    from runner.results.rundir import RunDir


def print_conclusion(run: RunDir, summary: Mapping[str, Any], as_json: bool) -> int:
    """Print the summary of a run, as tables or as JSON.

    Returns the exit code: 130 for a cancelled cell, 3 for one that is not complete, 1 for a missed target or a finding.
    """
    from runner.report import terminal

    if as_json:
        click.echo(json.dumps(summary, indent=1, allow_nan=False))
    else:
        click.echo(terminal.terminal(summary))
        click.echo(f"\nreport: {run.report_html}")
    if any(cell["state"] != "complete" for cell in summary["cells"]):
        click.echo(terminal.to_finish(run), err=as_json)
    states = {cell["state"] for cell in summary["cells"]}
    if "cancelled" in states:
        return errors.EXIT_INTERRUPTED
    if states - {"complete"}:
        return errors.EXIT_INFRASTRUCTURE
    missed = summary["verdict"] not in ("pass", "not_judged") or summary["findings"]
    return errors.EXIT_TARGET_MISSED if missed else errors.EXIT_OK
