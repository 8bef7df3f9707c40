"""What several commands take: the inventory, the folder of runs, and the places for cache and state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner import errors
from runner.system.places import cache_dir

if TYPE_CHECKING:
    from runner.cluster.inventory import Inventory


def inventory_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "-i", "--inventory", "source", envvar="RUNNER_INVENTORY", metavar="PATH",
        help="Ansible inventory; default: RUNNER_INVENTORY, then ansible.cfg's.", type=click.Path(),
    )(command)  # fmt: skip


def results_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--results", envvar="RUNNER_RESULTS", default="results", show_default=True, metavar="DIR",
        help="Folder of run directories.", type=click.Path(path_type=Path),
    )(command)  # fmt: skip


def run_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Completion of a run's id."""
    from runner.results.rundir import RunDir

    return [
        r.run_id for r in RunDir.all(Path(ctx.params.get("results") or "results")) if r.run_id.startswith(incomplete)
    ]


def read_inventory(source: str | None) -> Inventory:
    from runner.cluster import inventory

    if source == "":
        raise errors.UsageError("-i is empty: give an inventory, or leave -i out for ansible.cfg's")
    return inventory.read(inventory.default_source() if source is None else source, cache_dir() / "inventory")
