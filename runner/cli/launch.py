"""`runner launch`: starts a program of the user's on nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from runner import errors
from runner.cli.bench import typed_command
from runner.cli.conclusion import print_conclusion
from runner.cli.options import (
    backend_option,
    engine_option,
    hosts_option,
    inventory_option,
    json_option,
    nodes_option,
    read_inventory,
    refuse_empty,
    replace_bad_nodes_option,
    results_option,
    retries_option,
    run_names,
    skip_bad_nodes_option,
    typed_options,
)
from runner.system.places import INVENTORIES

_WORDS = "runner.launch.words"
_AT_RESUME = ("resume", "source", "results", "retries", "replace_bad_nodes", "resume_arg", "accept_drift", "as_json")


class _Launch(click.Command):
    """A command whose words behind the first `--` are the user's: they are kept, never parsed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True  # a program without -- has an error of its own
        if "--" in args:
            at = args.index("--")
            ctx.meta[_WORDS] = tuple(args[at + 1 :])
            args = args[:at]
        rest = super().parse_args(ctx, args)
        if _WORDS in ctx.meta and ctx.args and not ctx.resilient_parsing:
            ctx.fail(f"Got unexpected extra argument ({ctx.args[0]})")
        return rest


@click.command(
    cls=_Launch,
    options_metavar="[OPTIONS] -- PROGRAM [ARGUMENTS]",
)
@inventory_option
@results_option
@nodes_option
@hosts_option
@click.option("--auto", is_flag=True, help="This machine, with all its GPUs.")
@skip_bad_nodes_option
@engine_option
@backend_option
@click.option("--sync", metavar="DIR", help="The code that nodes get; default: the script's Git work tree or folder.")
@click.option("--sync-data", metavar="DIR", help="Data that nodes get; their path there is in SHAKEDOWN_DATA.")
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="Set for the program; kept in the run's files.")
@click.option("--env-pass", multiple=True, metavar="NAME", help="Passed on from here, such as a token; kept nowhere.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="script.timeout_s=SECONDS.")
@retries_option("Start it again")
@replace_bad_nodes_option
@click.option("--resume", metavar="RUN", help="Start the program of this run again.", shell_complete=run_names)
@click.option("--resume-arg", metavar="WORDS", help="Words that the program gets behind its own when it is resumed.")
@click.option("--accept-drift", is_flag=True, help="With --resume: take code that has changed since.")
@click.option("--dry-run", is_flag=True, help="Print the plan and its commands; connect to no node, start nothing.")
@json_option
@click.pass_context
def launch(ctx: click.Context, **given: Any) -> None:
    """Start your own program on nodes: what follows -- is its command line.

    A file of Python, the word python, or any program. The exit code is the program's own.
    """
    refuse_empty(ctx, {name: value for name, value in given.items() if name != "source"})
    ctx.exit(_resume(ctx, given) if given["resume"] is not None else _launch(ctx, **given))


def _launch(
    ctx: click.Context,
    source: str | None,
    results: Path,
    num_nodes: int | None,
    auto: bool,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Start a program, or show what would be started. Returns the exit code."""
    from runner.launch import prepare, script
    from runner.report.progress import Display

    words = ctx.meta.get(_WORDS)
    if words is None:
        raise errors.UsageError("there is no --: write runner launch [OPTIONS] -- PROGRAM [ARGUMENTS]")
    if given["accept_drift"]:
        raise errors.UsageError("--accept-drift goes with --resume RUN")
    if auto:
        if source is not None or num_nodes is not None or given["hosts"] or given["backend"]:
            raise errors.UsageError("--auto is this machine alone: omit -i, --nodes, --hosts and --backend")
        source = str(INVENTORIES / "local")
    run = prepare.Options(
        results=results,
        command=typed_command(),
        inventory=source,
        node_counts=(num_nodes,) if num_nodes else (),
        **{key: given[key] for key in ("hosts", "skip_bad_nodes", "engine", "backend", "retries", "replace_bad_nodes")},
    )
    options = script.Options(
        run,
        words,
        Path.cwd(),
        env=given["env"],
        env_pass=given["env_pass"],
        resume_arg=given["resume_arg"] or "",
        sync=given["sync"],
        sync_data=given["sync_data"],
        settings=given["settings"],
    )
    made = script.planned(options, read_inventory)
    if dry_run:
        click.echo(json.dumps(made.run.plan.to_dict(), indent=1) if as_json else _described(made))
        return errors.EXIT_OK
    ended = script.launch(made, Display())
    return _concluded(ended, as_json)


def _described(made: Any) -> str:
    """The plan as text, with the program and what is sent."""
    from runner.plan import describe
    from runner.system.nodeset import fold

    return "\n".join([describe.describe(made.run.plan, fold), "", *made.lines])


def _resume(ctx: click.Context, given: dict[str, Any]) -> int:
    """Start the program of a run again. Returns the exit code."""
    from runner.launch import resume, script
    from runner.report.progress import Display
    from runner.results.rundir import RunDir

    if ctx.meta.get(_WORDS):
        raise errors.UsageError("--resume starts the program of the run: omit what follows --")
    if other := [max(p.opts, key=len) for p in typed_options(ctx) if p.name not in _AT_RESUME]:
        raise errors.UsageError(f"--resume runs what the run has planned: omit {', '.join(other)}")
    asked = resume.Options(
        RunDir.find(given["results"], given["resume"]),
        inventory=given["source"],
        retries=given["retries"],
        replace_bad_nodes=given["replace_bad_nodes"],
        accept_drift=given["accept_drift"],
    )
    return _concluded(script.again(asked, given["resume_arg"], read_inventory, Display()), given["as_json"])


def _concluded(ended: Any, as_json: bool) -> int:
    """Print how a run ended. Returns the exit code: the program's own, where it ran and failed."""
    from runner.launch import script

    code, text = script.exit_code(ended.run, print_conclusion(ended.run, ended.summary, as_json))
    click.echo(text, err=as_json)
    return code
