"""Judging a run and writing its report from its run directory."""

from __future__ import annotations

from typing import Any

from runner.results import telemetry
from runner.results.rundir import RunDir
from runner.system.files import disk_errors, write_json_atomic


def judge(run: RunDir) -> dict[str, Any]:
    """Write summary.json, report.md and report.html of a run from its directory, and return the summary.

    It can be repeated at any time. Raises UsageError where the directory's plan or status cannot be read, and
    InfrastructureError where its disk is full or not writable.
    """
    from runner.judge import analysis
    from runner.report import page  # not on the way to the first step

    plan, status = run.read_plan(), run.read_status()
    recorded = run.read_records()
    observed = run.read_facts(plan)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (cell, host), stream in run.telemetry_streams(plan).items():
        samples.setdefault(cell, {})[host] = telemetry.read(stream)
    summary = analysis.summarise(plan, status, recorded, observed, telemetry=samples)
    with disk_errors(run.path):
        write_json_atomic(run.summary, summary)
        page.write(run.path, plan, status, summary, recorded, observed, telemetry=samples)
    return summary
