"""`runner runs`: list and show runs, follow their output, stop them. A run itself needs nothing of this."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner import errors
from runner.cli.options import Commands, results_option, run_names
from runner.launch.slurm.cancel import cancel_jobs, slurm_of
from runner.report.runs import (
    aliases_of,
    changes,
    describe,
    done_text,
    overview,
    overview_table,
    verdict_text,
)
from runner.results import logs
from runner.results.logs import Line, last_lines, matches, parse_line

if TYPE_CHECKING:
    from runner.results.rundir import RunDir

REFRESH_S = 1.0  # status.json changes at most once a second


run_argument = click.argument("name", metavar="[RUN]", required=False, shell_complete=run_names)


@click.group(cls=Commands)
def runs() -> None:
    """Show runs and stop them. RUN is an id, a unique prefix of one, or a path; default: the newest."""


# --- commands -------------------------------------------------------------------------------------


@runs.command("list")
@results_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_runs(results: Path, limit: int | None, as_json: bool) -> None:
    """Every run with its state and verdict, newest last. Times are UTC."""
    from runner.results.rundir import RunDir

    moment = datetime.now(UTC)
    rows = [overview(run, moment) for run in RunDir.all(results)[-limit if limit else None :]]
    if not rows and not as_json:
        click.echo(f"no run in {results} yet: start one with `runner bench`")
        return
    click.echo(json.dumps(rows, indent=1) if as_json else overview_table(rows, _columns()))


@runs.command()
@results_option
@run_argument
@click.option("--watch", is_flag=True, help="Update it until the run has ended.")
@click.option("--json", "as_json", is_flag=True, help="status.json on stdout.")
def show(name: str | None, results: Path, watch: bool, as_json: bool) -> None:
    """The state of a run, its cells and nodes."""
    from runner.results.rundir import RunDir

    if watch and as_json:
        raise errors.UsageError("--watch and --json exclude each other: give one of them")
    run = RunDir.find(results, name)
    if as_json:
        click.echo(json.dumps(run.read_status(), indent=1))
        return
    if watch:
        with _looking(run):
            _watch(run)
    click.echo(_described(run))


@runs.command()
@results_option
@run_argument
@click.option("-n", "--lines", "count", type=click.IntRange(min=0), default=20, show_default=True, help="The last N.")
@click.option("-f", "--follow", is_flag=True, help="Follow the log until the run has ended.")
@click.option("--cell", metavar="CELL", help="Only the lines of this cell.")
@click.option("--host", "hosts", metavar="SET", help="Only these nodes: names, aliases, node[003-006].")
def tail(name: str | None, results: Path, count: int, follow: bool, cell: str | None, hosts: str | None) -> None:
    """The last output of the nodes, equal lines folded. Times are UTC."""
    from runner.results.rundir import RunDir
    from runner.results.status import FINAL_STATES

    run = RunDir.find(results, name)
    plan = run.read_plan()
    cells = [c["id"] for c in plan["cells"]]
    if cell is not None and cell not in cells:
        raise errors.unknown("cell", cell, cells)
    chosen = None if hosts is None else _chosen(plan, hosts)

    needle = (cell or "").encode()

    def parse(raw: bytes) -> Line | None:
        if needle not in raw:  # fast path for a long log
            return None
        line = parse_line(raw, cells)
        return line if matches(line, cell, chosen) else None

    if not follow and not run.log.exists():
        raise errors.UsageError(f"run {run.run_id} has no log: {run.log} does not exist")
    position = 0
    if run.log.exists():
        with open(run.log, "rb") as file:
            lines, position = last_lines(file, count, parse)
        for line in lines:
            click.echo(line)
    if follow:
        with _looking(run):
            for line in logs.follow(run.log, position, parse, lambda: run.read_status()["state"] in FINAL_STATES):
                click.echo(line)


@runs.command()
@results_option
@run_argument
@click.option("--no-wait", is_flag=True, help="Only request it; do not wait until the run has ended.")
def stop(name: str | None, results: Path, no_wait: bool) -> None:
    """Stop a run gracefully.

    Its ranks are stopped, and the results so far are gathered and judged. If the run has no controller, its
    Slurm jobs are cancelled. A second request makes the controller exit at once.
    """
    from runner.results.rundir import PULSES_S, RunDir
    from runner.system import process

    run = RunDir.find(results, name)
    if elsewhere := run.elsewhere():
        click.echo(f"checking for {PULSES_S:g} s whether {elsewhere} still runs it", err=True)
        if run.beats() or run.controller() is not None:  # it may be suspended and still own its run
            raise errors.UsageError(f"run {run.run_id} is carried out on {elsewhere}: stop it there")
    pid = run.controller()
    if pid is None:
        _stop_jobs(run, wait=not no_wait)
        return
    process.signal_all([pid], signal.SIGTERM)
    click.echo(f"asked run {run.run_id} to stop" + ("" if no_wait else "; waiting until it has ended"), err=not no_wait)
    if no_wait:
        return
    try:
        while run.controller() == pid:
            time.sleep(0.2)
    except KeyboardInterrupt:
        raise errors.Interrupted(f"no longer waiting; run {run.run_id} is still stopping") from None
    status = run.read_status()
    click.echo(f"run {run.run_id}: {status['state']}, {done_text(status)}")


# --- the state of a run ---------------------------------------------------------------------------


def _columns() -> int:
    """The width of the terminal in characters; 120, which fits every column, without one."""
    return shutil.get_terminal_size((120, 24)).columns


def _chosen(plan: Mapping[str, Any], hosts: str) -> set[str]:
    """The names in the log of the nodes in the set `hosts`. Raises UsageError for an unknown node."""
    from ClusterShell.NodeSet import NodeSet, NodeSetParseError

    from runner.results.celldir import LAUNCHER

    known = {word: alias for name, alias in aliases_of(plan).items() for word in (name, alias)} | {LAUNCHER: LAUNCHER}
    try:
        words = list(NodeSet(hosts, resolver=None))
    except NodeSetParseError as error:
        raise errors.UsageError(f"--host {hosts}: {error}; write sets as node[001-003,005] or a,b,c") from None
    for word in words:
        if word not in known:
            raise errors.unknown("node", word, known, f"--host {hosts}")
    return {known[word] for word in words}


def _described(run: RunDir) -> str:
    status = run.read_status()
    from runner.launch.slurm.ledger import jobs_left

    text = describe(run.read_plan(), status, datetime.now(UTC), _columns())
    if elsewhere := run.elsewhere():
        text += f"\n\nits controller is on {elsewhere}: only there is it known whether it still runs"
    elif jobs := jobs_left(status):
        text += (
            f"\n\nno controller saw {', '.join(f'job {job_id}' for job_id in jobs)} end; if it still runs,\n"
            f"  `runner {run.command} --resume {run.run_id}` follows it\n"
            f"  `runner runs stop {run.run_id}` cancels it"
        )
    elif verdict := verdict_text(run):
        text += f"\n\nverdict: {verdict.replace('_', ' ')}"
    return f"{text}\n\nfiles: {run.path}"


@contextmanager
def _looking(run: RunDir) -> Iterator[None]:
    """Turns Ctrl-C into Interrupted with one line: it ends the command that watches, not the run."""
    try:
        yield
    except KeyboardInterrupt:
        raise errors.Interrupted(f"no longer watching; run {run.run_id} continues") from None


def _statuses(run: RunDir) -> Iterator[dict[str, Any]]:
    """The run's status every REFRESH_S seconds; the last one is final."""
    from runner.results.status import FINAL_STATES

    while True:
        status = run.read_status()
        yield status
        if status["state"] in FINAL_STATES:
            return
        time.sleep(REFRESH_S)


def _watch(run: RunDir) -> None:
    """Show the run until it has ended: updated in place on a terminal, else one line per change."""
    from rich.console import Console

    from runner.system.clock import now

    plan, console = run.read_plan(), Console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        for change in changes(plan, _statuses(run)):
            click.echo(f"{now()} {change}")
        return
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, transient=True) as live:
        for status in _statuses(run):
            view = (plan, status, datetime.now(UTC), console.width)
            text = describe(*view)
            if text.count("\n") >= console.height:  # rich would cut off the end, which shows the current cell
                text = describe(*view, brief=True)
            live.update(Text(text), refresh=True)


# --- stopping -------------------------------------------------------------------------------------


def _stop_jobs(run: RunDir, wait: bool) -> None:
    """Cancel the Slurm jobs that a controller left behind."""
    status, plan = run.read_status(), run.read_plan()
    over = f"run {run.run_id} is not running: its state is {status['state']}"
    if not plan.get("slurm") or status["state"] == "complete":
        raise errors.UsageError(over)
    cancelled = cancel_jobs(slurm_of(run, plan), run.run_id, wait)
    if not cancelled:
        raise errors.UsageError(f"{over}; none of its jobs is waiting or running")
    click.echo(f"run {run.run_id} had no controller; cancelled {', '.join(f'job {job_id}' for job_id in cancelled)}")
