"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from runner import errors
from runner.system.places import cache_dir

if TYPE_CHECKING:
    from runner.cluster.inventory import Inventory


class _Positive(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Commands(click.Group):
    """A group of commands that suggests the nearest name for one that it does not have."""

    noun = "command"

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click's. Raises UsageError with the nearest name for a command that there is not."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            raise errors.unknown(self.noun, args[0], self.list_commands(ctx)) from None


POSITIVE = _Positive(min=0, min_open=True)  # a number above 0; click's own takes NaN too


def inventory_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds `-i/--inventory`, passed as `source`: a path or name, None where it is not given."""
    return click.option(
        "-i", "--inventory", "source", envvar="RUNNER_INVENTORY", metavar="PATH",
        help="Ansible inventory; default: RUNNER_INVENTORY, then ansible.cfg's.", type=click.Path(),
    )(command)  # fmt: skip


def results_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds `--results`, the folder of run directories as a Path."""
    return click.option(
        "--results", envvar="RUNNER_RESULTS", default="results", show_default=True, metavar="DIR",
        help="Folder of run directories.", type=click.Path(path_type=Path),
    )(command)  # fmt: skip


# The same words in every command that has them.
hosts_option = click.option("--hosts", metavar="SET", help="Choose among these nodes: names, aliases, node[003-006].")
engine_option = click.option(
    "--engine", default="torchrun", show_default=True, help="torchrun, deepspeed, accelerate or none."
)
backend_option = click.option("--backend", help="local, ssh or slurm; default: what the inventory says.")
nodes_option = click.option(
    "--nodes", "num_nodes", type=click.IntRange(min=1), metavar="N", help="Run on N nodes; default: all."
)
skip_bad_nodes_option = click.option(
    "--skip-bad-nodes", is_flag=True, help="Use the first N good nodes and list the skipped ones."
)
replace_bad_nodes_option = click.option(
    "--replace-bad-nodes", is_flag=True, help="Replace nodes that fail by spare nodes, and continue."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout, nothing else.")
seed_option = click.option("--seed", default=0, show_default=True, type=int, help="Of data order and initial weights.")


def retries_option(again: str) -> Callable[..., Any]:
    """The option `--retries`; `again` is what a retry does, such as "Run a cell again"."""
    return click.option(
        "--retries", default=0, show_default=True, type=click.IntRange(0, 100), metavar="K",
        help=f"{again}, K times at most, after a failure of the infrastructure.",
    )  # fmt: skip


def typed_options(ctx: click.Context) -> list[click.Parameter]:
    """The options that are on the command line, not from a default or a variable."""
    return [p for p in ctx.command.params if ctx.get_parameter_source(str(p.name)) is ParameterSource.COMMANDLINE]


def refuse_empty(ctx: click.Context, given: Mapping[str, Any], blank: str | None = None) -> None:
    """Raise UsageError for an option without a value, as of a variable that is not set: it is not as if left out.

    `blank` are the characters that are no value (None: white space).
    """
    for param in ctx.command.params:
        value = given.get(str(param.name))
        if isinstance(value, str) and not value.strip(blank):
            name = max(param.opts, key=len)
            raise errors.UsageError(f"{name} is empty: give it a value, or leave it out")


def run_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The ids of runs that start with `incomplete`, for shell completion."""
    from runner.results.rundir import RunDir

    return [
        r.run_id for r in RunDir.all(Path(ctx.params.get("results") or "results")) if r.run_id.startswith(incomplete)
    ]


def read_inventory(source: str | None) -> Inventory:
    """The inventory `source`, or that of ansible.cfg for None. Raises UsageError where it is missing or invalid."""
    from runner.cluster import inventory

    if source == "":
        raise errors.UsageError("-i is empty: give an inventory, or leave -i out for ansible.cfg's")
    return inventory.read(inventory.default_source() if source is None else source, cache_dir() / "inventory")
