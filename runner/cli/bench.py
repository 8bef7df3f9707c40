"""`runner bench`: benchmarks nodes, or resumes a run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from runner import errors
from runner.cli.conclusion import print_conclusion
from runner.cli.options import (
    backend_option,
    engine_option,
    hosts_option,
    inventory_option,
    json_option,
    nodes_option,
    read_inventory,
    replace_bad_nodes_option,
    results_option,
    retries_option,
    run_names,
    seed_option,
    skip_bad_nodes_option,
    typed_options,
)
from runner.system.places import CONFIGS
from runner.workloads.registry import TESTS, offered, usual

if TYPE_CHECKING:
    from runner.launch import prepare
    from runner.plan.plan import Cell, Plan


def _names(kind: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def complete(names: Sequence[str]) -> Callable[..., list[str]]:
    """A completion of an option whose values are `names`."""
    return lambda ctx, param, incomplete: [name for name in names if name.startswith(incomplete)]


MODELS = _names("models")


@click.command()
@inventory_option
@results_option
@nodes_option
@click.option("--sweep", metavar="1,2,4,8", help="Run on each of these node counts: the scaling curve.")
@hosts_option
@skip_bad_nodes_option
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    metavar="NAME",
    help=f"The model to train: {', '.join(MODELS)}; or the path of your own file (.yaml).",
    shell_complete=complete(MODELS),
)
@click.option("--weights", metavar="ID_OR_PATH", help="Start from these Hugging Face weights; default: random.")
@click.option(
    "--test",
    "tests",
    multiple=True,
    help="; ".join(f"{name}: {TESTS[name].summary}" for name in offered()) + f"; default: {' and '.join(usual())}.",
    metavar="NAME",
    shell_complete=complete(offered()),
)
@engine_option
@backend_option
@click.option(
    "--scaling", default="weak", show_default=True, help="weak: same work per GPU; strong: same global batch."
)
@retries_option("Run a cell again")
@replace_bad_nodes_option
@click.option("--resume", metavar="RUN", help="Finish a run: complete cells are kept.", shell_complete=run_names)
@click.option("--accept-drift", is_flag=True, help="Resume in a changed environment; old cells run again.")
@click.option("--one-allocation", is_flag=True, help="Slurm: one job for all cells instead of one each.")
@click.option("--job-array", is_flag=True, help="Slurm: one job array for the cells of each number of nodes.")
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(1, 1000), help="Repeats of each cell.")
@seed_option
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="TEST.KEY=VALUE",
    help="Change a setting, e.g. sft.steps=20, nccl=torch.",
)
@click.option("--tune", is_flag=True, help="First find the fastest settings, as runner tune, if none are known.")
@click.option("--dry-run", is_flag=True, help="Print the plan; connect to no node, start no run.")
@json_option
@click.pass_context
def bench(ctx: click.Context, **options: Any) -> None:
    """Benchmark nodes: collectives and DeepSpeed fine-tuning, with a report."""
    name, drift = options.pop("resume"), options.pop("accept_drift")
    if name is None:
        if drift:
            raise errors.UsageError("--accept-drift is only valid with --resume RUN")
        ctx.exit(_start(**options))
    if other := [max(p.opts, key=len) for p in typed_options(ctx) if p.name not in WITH_RESUME]:
        raise errors.UsageError(f"--resume uses the options that {name} was planned with: omit {', '.join(other)}")
    ctx.exit(_resume(name, drift, **{key: options[key] for key in WITH_RESUME if key in options}))


# The options that may differ from one execution of a plan to the next.
WITH_RESUME = ("resume", "accept_drift", "source", "results", "retries", "replace_bad_nodes", "dry_run", "as_json")


def _start(
    source: str | None,
    num_nodes: int | None,
    sweep: str | None,
    tune: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Start a run; `options` are fields of `prepare.Options`. Returns the exit code."""
    from runner.launch import prepare
    from runner.report.progress import Display

    asked = prepare.Options(command=typed_command(), inventory=source, node_counts=_counts(num_nodes, sweep), **options)
    prepared = prepare.prepare(asked, read_inventory)
    if tune and prepared.request.tuned is None:
        if not prepared.tuned.use:
            raise errors.UsageError("--tune and --set tuned=false exclude each other: give one of them")
        prepared = _tuned(asked, prepared, dry_run)
    if dry_run:
        plan = prepared.plan
        click.echo(json.dumps(plan.to_dict(), indent=1) if as_json else _described(plan, plan.cells))
        for note in prepared.notes:
            click.echo(note if as_json else f"\n{note}", err=as_json)
        return errors.EXIT_OK
    from runner.launch import start  # not on the way of a dry run

    ended = start.start(prepared, Display())
    return print_conclusion(ended.run, ended.summary, as_json)


def _tuned(asked: prepare.Options, prepared: prepare.Prepared, dry_run: bool) -> prepare.Prepared:
    """The run planned with what tuning finds now; in a dry run as it was, and what would be tried is on stderr."""
    from runner.cli.tune import shown
    from runner.launch import prepare, tune
    from runner.report.progress import Display

    if not any(TESTS[name].trains for name in prepared.request.tests):
        raise errors.UsageError("--tune: none of the tests trains a model; add --test sft")
    task = tune.prepared(tune.Options(asked), read_inventory)
    if dry_run:
        click.echo(tune.described(task), err=True)
        return prepared
    click.echo(shown(tune.tune(task, read_inventory, Display())), err=True)
    return prepare.prepare(asked, read_inventory)


def typed_command() -> str:
    """This command as a line that a shell in the same folder runs again: with the program as it was found, and with
    what it took from the environment.
    """
    context = click.get_current_context()
    taken = [
        f"{param.envvar}={shlex.quote(os.environ[str(param.envvar)])}"
        for param in context.command.params
        if context.get_parameter_source(str(param.name)) is ParameterSource.ENVIRONMENT
    ]
    program, on_path = sys.argv[0], shutil.which("runner")
    if on_path and os.path.realpath(program) == os.path.realpath(on_path):
        program = "runner"
    return " ".join([*taken, shlex.join([program, *sys.argv[1:]])])


def _resume(
    name: str, accept_drift: bool, source: str | None, results: Path, dry_run: bool, as_json: bool, **options: Any
) -> int:
    """Finish the run `name`; `options` are fields of `resume.Options`. Returns the exit code."""
    from runner.launch import resume
    from runner.report.progress import Display
    from runner.results.rundir import RunDir
    from runner.workflow.record import Stages

    run = RunDir.find(results, name)
    if (found := Stages(run).asked()) is not None:  # whose stages are made again where what they are made from changed
        raise errors.UsageError(f"{run.run_id} is a run of a workflow: runner workflow {found[0]} --resume {name}")
    if run.command != "bench":
        raise errors.UsageError(f"{run.run_id} is no run of runner bench: runner {run.command} --resume {name}")
    asked = resume.Options(run, inventory=source, accept_drift=accept_drift, **options)
    display = Display()
    if dry_run:
        with resume.prepared(asked, read_inventory, display) as left:
            ids = [cell.id for cell in left.pending]
            click.echo(json.dumps(ids) if as_json else _described(left.plan, left.pending))
        return errors.EXIT_OK
    ended = resume.resume(asked, read_inventory, display)
    return print_conclusion(ended.run, ended.summary, as_json)


def _described(plan: Plan, cells: Sequence[Cell]) -> str:
    """The plan as text; under Slurm with the sbatch files that would be submitted."""
    from runner.cluster.backends import BACKENDS
    from runner.launch.slurm import allocations
    from runner.plan import describe
    from runner.system.nodeset import fold

    text = describe.describe(replace(plan, cells=tuple(cells)), fold)
    scripts = allocations.preview(plan, cells) if BACKENDS[plan.backend].scheduled else []
    return "\n\n".join([text, *scripts])


def _counts(num_nodes: int | None, sweep: str | None) -> tuple[int, ...]:
    """The requested node counts; empty means all nodes. Raises UsageError for wrong counts."""
    if sweep is None:
        return (num_nodes,) if num_nodes else ()
    if num_nodes is not None:
        raise errors.UsageError("--nodes and --sweep exclude each other: give one of them")
    try:
        counts = tuple(sorted({int(part) for part in sweep.split(",")}))
    except ValueError:
        raise errors.UsageError(f"--sweep {sweep}: write node counts with commas, such as 1,2,4,8") from None
    if counts[0] < 1:
        raise errors.UsageError(f"--sweep {sweep}: node counts start at 1")
    return counts
