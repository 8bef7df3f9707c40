"""`runner testbed`: start and stop a cluster of containers on this machine."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from runner.cli.options import POSITIVE, Commands
from runner.errors import EXIT_INFRASTRUCTURE, UsageError
from runner.provision.testbed.containers import OnProgress, down, dry_run, require_root, status, up
from runner.provision.testbed.layout import DEFAULT_NAME, MAX_NODES, Options


@contextmanager
def _shown() -> Iterator[OnProgress]:
    """Shows progress on stderr: one line with the seconds left, or plain lines without a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, left_s: click.echo(f"testbed: {what} (about {left_s:.0f} s left)", err=True)
        return
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            left_s = task.fields["end_s"] - time.monotonic()
            return Text(f"about {left_s:.0f} s left" if left_s > 0 else "longer than usual")

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), Left())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, end_s=0.0)

        def show(what: str, left_s: float) -> None:
            progress.update(task, description=what, end_s=time.monotonic() + left_s)

        yield show


_name_option = click.option(
    "--name", default=DEFAULT_NAME, show_default=True, help="Several may exist side by side.", metavar="NAME"
)


@click.group(cls=Commands)
def testbed() -> None:
    """Start and stop a cluster of containers on this machine."""


@testbed.command("up")
@click.option("--nodes", type=click.IntRange(1, MAX_NODES), default=8, show_default=True, help="How many nodes.")
@_name_option
@click.option("--inventory", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder for the generated inventory.  [default: inventory/testbed]")  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Memory of each node, e.g. 4g.")
@click.option("--cpus", type=POSITIVE, metavar="N", help="Processors of each node.")
@click.option("--image", metavar="IMAGE", help="Build on this image of a registry instead of debootstrap.")
@click.option("--release", metavar="NAME",
              help="Code name of the nodes' release, e.g. trixie.  [default: this machine's]")  # fmt: skip
@click.option("--share", type=click.Path(path_type=Path), metavar="DIR",
              help="A folder that all nodes see at the same path and may write to.")  # fmt: skip
@click.option("--dry-run", "dry", is_flag=True, help="Print what would be run and written.")
def _up(dry: bool, **options: Any) -> None:
    """Start the nodes and write their inventory. The first time it builds the image (about a minute)."""
    requested = Options(**options)
    if requested.memory and not re.fullmatch(r"[1-9][0-9]*[bkmg]?", requested.memory):
        raise UsageError(f"--memory {requested.memory!r}: give a number with k, m or g, e.g. 4g")
    if dry:
        click.echo("\n".join(dry_run(requested)))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped by either signal, it removes what it started
    started = time.monotonic()
    with _shown() as on_progress:
        state = up(requested, on_progress)
    count, folder = len(state["nodes"]), Path(state["folder"])
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    took = "was up already" if state["already"] else f"is up after {time.monotonic() - started:.0f} s"
    click.echo(f"testbed {requested.name!r} {took}: {count} {'node' if count == 1 else 'nodes'}, inventory {shown}")
    click.echo(f"next: runner bench -i {shown} --nodes {count} --model tiny")


@testbed.command("down")
@_name_option
def _down(name: str) -> None:
    """Stop and remove the nodes, their network and their inventory."""
    click.echo(f"testbed {name!r} {'is down' if down(name) else 'was not up'}")


@testbed.command("status")
@_name_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def _status(name: str, as_json: bool) -> int:
    """Show each node; the exit code is 3 unless all of them answer."""
    require_root()
    nodes = status(name)
    if as_json:
        click.echo(json.dumps(nodes, indent=1))
    elif not nodes:
        click.echo(f"testbed {name!r} is not up: start it with `runner testbed up`")
    else:
        for node in nodes:
            answer = "sshd answers" if node["sshd"] else "sshd does not answer"
            click.echo(f"{node['name']}  {node['alias']}  {node['address']:<13}  {node['state']:<8}  {answer}")
    return 0 if nodes and all(node["sshd"] for node in nodes) else EXIT_INFRASTRUCTURE
