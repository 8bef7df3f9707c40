"""`runner data`: prepare training data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from runner.cli.options import Commands
from runner.errors import UsageError
from runner.workloads.data.pack import Progress
from runner.workloads.data.prepare import cached, default_cache_dir, prepare, resolve


@click.group(cls=Commands)
def data() -> None:
    """Training data for the sft test."""


@data.command("prepare")
@click.option("--source", default="builtin", show_default=True, help="builtin, alpaca, a file or folder, or a hub id.")
@click.option("--tokenizer", help="Hugging Face id or folder.  [default: the built-in one]")
@click.option("--seq-len", type=int, default=2048, show_default=True, help="Tokens in a sequence.")
@click.option("--samples", type=int, help="Rows of the built-in set.  [default: 4096]")
@click.option("--seed", type=int, default=0, show_default=True, help="For the built-in rows and the order.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="[default: ~/.cache/shakedown/data]")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON on stdout.")
@click.option("--dry-run", is_flag=True, help="Show what would be prepared; write nothing.")
def prepare_command(
    source: str,
    tokenizer: str | None,
    seq_len: int,
    samples: int | None,
    seed: int,
    cache_dir: Path | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Tokenise and pack instruction data once; later calls use the cache."""
    if samples is not None and source != "builtin":
        raise UsageError(f"--samples is for builtin; {source!r} has its own number of rows: leave it out")
    cache_dir = cache_dir or default_cache_dir()
    samples = 4096 if samples is None else samples
    if dry_run:
        folder = cache_dir / resolve(source, seq_len, tokenizer, samples, seed)[2]
        answer = {"path": str(folder), "cached": cached(folder) is not None}
    else:
        with _progress_bar() as on_progress:
            found = prepare(
                source,
                seq_len=seq_len,
                tokenizer=tokenizer,
                cache_dir=cache_dir,
                samples=samples,
                seed=seed,
                on_progress=on_progress,
            )
        answer = {"path": str(found.path), **found.manifest}
    if as_json:
        click.echo(json.dumps(answer))
        return
    answer.pop("bytes", None)
    width = max(map(len, answer))
    for name, value in answer.items():
        click.echo(f"{name:<{width}}  {value:,}" if type(value) is int else f"{name:<{width}}  {value}")


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A progress bar with the time left on stderr; imported and drawn only once there is progress to show."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def show(done: int, total: int) -> None:
            if not bars:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                columns = TextColumn("tokenise"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
                bars.append(stack.enter_context(Progress(*columns, console=Console(stderr=True))))
                bars[0].add_task("tokenise", total=total)
            bars[0].update(bars[0].task_ids[0], completed=done)

        yield show
