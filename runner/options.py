"""What several commands take: the inventory, the folder of runs, and the places for cache and state."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner import errors
from runner.system.places import cache_dir

if TYPE_CHECKING:
    from runner.inventory import Inventory


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
    from runner import inventory

    if source == "":
        raise errors.UsageError("-i is empty: give an inventory, or leave -i out for ansible.cfg's")
    return inventory.read(inventory.default_source() if source is None else source, cache_dir() / "inventory")


@contextmanager
def transport(inventory: Inventory) -> Iterator[str]:
    """A private folder with the rendered ssh_config, on a path that pdsh and rsync can take unquoted."""
    from runner.inventory import known_hosts, ssh_config

    # TMPDIR may hold spaces, which PDSH_SSH_ARGS cannot carry.
    with tempfile.TemporaryDirectory(prefix="shakedown-", dir="/tmp") as folder:
        pinned = Path(folder, "known_hosts")
        pinned.write_text(known_hosts(inventory))
        config = Path(folder, "ssh_config")
        config.write_text(ssh_config(inventory, str(pinned)))
        yield str(config)
