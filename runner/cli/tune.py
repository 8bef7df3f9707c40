"""`runner tune`: finds the fastest settings of a model on nodes, which `runner bench` then uses."""

from __future__ import annotations

import json
from typing import Any

import click

from runner import errors
from runner.cli.bench import MODELS, complete, typed_command
from runner.cli.options import (
    POSITIVE,
    backend_option,
    engine_option,
    hosts_option,
    inventory_option,
    json_option,
    read_inventory,
    results_option,
    seed_option,
)

TRIES = ("compile", "hpz", "fp8", "quantised", "deepcompile")


@click.command()
@inventory_option
@results_option
@click.option("--nodes", "num_nodes", type=click.IntRange(min=1), metavar="N", help="Tune for N nodes; default: all.")
@hosts_option
@click.option("--skip-bad-nodes", is_flag=True, help="Use the first N good nodes.")
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    metavar="NAME",
    help=f"The model to tune: {', '.join(MODELS)}; or the path of your own file (.yaml).",
    shell_complete=complete(MODELS),
)
@engine_option
@backend_option
@seed_option
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="TEST.KEY=VALUE",
    help="A setting that is kept, e.g. sft.recompute=full, sft.seq_len=2048.",
)
@click.option(
    "--try",
    "tries",
    metavar="NAME,NAME",
    help=f"Try these too: {', '.join(TRIES)}. Precision is never changed unless it is asked for here.",
    shell_complete=complete(TRIES),
)
@click.option("--probes", type=click.IntRange(min=1), metavar="N", help="Run N probes at most; default: 16, on CPUs 6.")
@click.option(
    "--minutes",
    type=POSITIVE,
    default=20.0,
    show_default=True,
    metavar="M",
    help="Begin no probe that is likely to end later.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be tried; connect to no node.")
@json_option
@click.pass_context
def tune(
    ctx: click.Context,
    source: str | None,
    num_nodes: int | None,
    tries: str | None,
    probes: int | None,
    minutes: float,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the fastest settings of a model on nodes, by short runs; `runner bench` uses them from then on.

    Micro-batch with accumulation, recompute, ZeRO stage and bucket sizes, and on GPUs torch.compile, are tried where
    neither --set nor a DeepSpeed file of your own decides them. The global batch is kept.
    """
    from runner.launch import prepare
    from runner.launch import tune as use_case
    from runner.report.progress import Display

    bench = prepare.Options(
        command=typed_command(), inventory=source, node_counts=(num_nodes,) if num_nodes else (), **options
    )
    names = tuple(name.strip() for name in tries.split(",") if name.strip()) if tries else ()
    task = use_case.prepared(use_case.Options(bench, names, probes, minutes), read_inventory)
    if dry_run:
        click.echo(json.dumps(use_case.listed(task), indent=1) if as_json else use_case.described(task))
        ctx.exit(errors.EXIT_OK)
    ended = use_case.tune(task, read_inventory, Display())
    click.echo(json.dumps({**ended.tuned.to_dict(), "path": str(ended.path)}, indent=1) if as_json else shown(ended))


def shown(ended: Any) -> str:
    """What tuning found, as text: the probes, the settings as they are typed, and where they are kept."""
    from runner.launch import tune as use_case
    from runner.plan.tuned import typed
    from runner.report.tuned import table

    found = ended.tuned
    lines = [
        table(found, ended.default, ended.best),
        "",
        f"best for {found.subject.text()}, global batch {found.global_batch}: {use_case.conclusion(ended)}",
        f"  {typed(found.settings)}",
        f"kept in {ended.path}; runner bench uses it from now on",
    ]
    return "\n".join(lines)
