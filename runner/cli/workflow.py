"""`runner workflow`: from a base model to a trained one, in stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner import errors
from runner.cli.bench import complete, typed_command
from runner.cli.conclusion import print_conclusion
from runner.cli.options import (
    Commands,
    backend_option,
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
    seed_option,
    skip_bad_nodes_option,
    typed_options,
)
from runner.workflow.stages import WORKFLOWS, stages_of

if TYPE_CHECKING:
    from runner.launch.carry import RunResult
    from runner.workflow.asked import Options

PROFILES = ("cpu-smoke", "gpu-vllm")
TARGETS = ("dir:", "hf:", "rsync:")
TRACKERS = ("wandb", "tensorboard")
_OF_A_FILE = "ppo"  # the workflow of from-verl-yaml
_POSITIVE = click.IntRange(min=1)


class _Workflows(Commands):
    noun = "workflow"


@click.group(cls=_Workflows)
def workflow() -> None:
    """Train a model in stages: fine-tuning, then PPO or GRPO on Ray, with verl."""


@workflow.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout: the stages of each workflow.")
def list_workflows(as_json: bool) -> None:
    """Workflows and their stages: where each runs, what it needs and what it leaves."""
    from runner.workflow import describe

    click.echo(json.dumps(describe.as_dict(), indent=1) if as_json else describe.listing().rstrip())


def _stage_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The names of stages that complete the last one of a list."""
    begun, _, last = incomplete.rpartition(",")
    stages = stages_of(name if (name := str(ctx.info_name)) in WORKFLOWS else _OF_A_FILE)
    names = dict.fromkeys(name for stage in stages for name in (stage.name, stage.program.value))
    return [f"{begun},{name}" if begun else name for name in names if name.startswith(last)]


# What the nodes are and what is made of what; those of WHAT may change from one execution of a run to the next.
_WHERE = (
    inventory_option,
    results_option,
    nodes_option,
    hosts_option,
    skip_bad_nodes_option,
    backend_option,
    click.option("--work", metavar="DIR", help="A folder that all nodes see; default: that of the runs."),
)
_DIVIDED = (
    click.option("--dp", "data_parallel", type=int, metavar="N", help="Data parallelism; default: what is left."),
    click.option("--tp", "tensor_parallel", type=int, default=1, metavar="N", help="Tensor parallelism in training."),
    click.option("--pp", "pipeline_parallel", type=int, default=1, metavar="N", help="Pipeline stages in training."),
    click.option(
        "--rollout-tp", "rollout_tensor", type=int, default=1, metavar="N", help="Tensor parallelism in rollout."
    ),
)
_WHAT = (
    click.option("--model", metavar="ID_OR_PATH", help="The model to begin with; on CPUs by default a tiny Llama."),
    click.option("--data", metavar="NAME", help="gsm8k, a file, folder or hub id; on CPUs by default sums."),
    click.option("--rl-data", metavar="NAME", help="Other data for PPO and GRPO."),
    click.option("--reward", metavar="FILE", help="A Python file with compute_score."),
    click.option(
        "--profile",
        metavar="NAME",
        help=f"The environment with verl: {' or '.join(PROFILES)}; default: by device.",
        shell_complete=complete(PROFILES),
    ),
    click.option("--steps", type=_POSITIVE, metavar="N", help="Steps of each trainer."),
    click.option("--epochs", type=_POSITIVE, metavar="N", help="Passes over the data, where no steps are given."),
    seed_option,
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="verl.KEY=VALUE, or verl.sft.… and verl.rl.… for one trainer; slurm.KEY=VALUE; STAGE.timeout_s=SECONDS; "
        "ppo.join_s=SECONDS; targets.NAME=VALUE.",
    ),
    click.option(
        "--publish",
        metavar="TARGET",
        help="Publish the model: dir:PATH, hf:OWNER/NAME or rsync:HOST:PATH.",
        shell_complete=complete(TARGETS),
    ),
    click.option(
        "--track",
        multiple=True,
        type=click.Choice(TRACKERS),
        help="Metrics go there as well. Of W&B nothing is sent unless WANDB_MODE=online.",
    ),
    click.option("--project", metavar="NAME", envvar="WANDB_PROJECT", help="W&B's project; default: WANDB_PROJECT."),
    click.option(
        "--stages", metavar="NAME,NAME", help="Only these: see runner workflow list.", shell_complete=_stage_names
    ),
)
_HOW = (
    retries_option("Run a stage again"),
    replace_bad_nodes_option,
    click.option("--resume", metavar="RUN", help="Go on with a run: what stands is kept.", shell_complete=run_names),
    click.option("--one-allocation", is_flag=True, help="Slurm: one job for all stages instead of one each."),
    click.option("--dry-run", is_flag=True, help="Print stages, commands and jobs; connect to no node, start no run."),
    json_option,
)
_OF_RUN = ("hosts", "skip_bad_nodes", "backend", "seed", "retries", "replace_bad_nodes", "one_allocation")
_KEPT = ("num_nodes", "hosts", "skip_bad_nodes", "backend", "work", "one_allocation")  # with --resume


def _command(name: str, workflow_name: str, options: Sequence[Any], text: str) -> click.Command:
    """A command that carries out a workflow."""

    def run(ctx: click.Context, **given: Any) -> None:
        refuse_empty(ctx, given, " ,")
        ctx.exit(_run(ctx, workflow_name, **given))

    made: Callable[..., None] = click.pass_context(run)
    for option in reversed(options):
        made = option(made)
    return click.command(name, help=text, short_help=text)(made)


for _name in WORKFLOWS:
    _stages = ", ".join(stage.name for stage in stages_of(_name))
    workflow.add_command(_command(_name, _name, (*_WHERE, *_WHAT, *_DIVIDED, *_HOW), f"{_stages}."))

_FILE = click.argument("document", metavar="FILE", type=click.Path(path_type=Path))
workflow.add_command(
    _command(
        "from-verl-yaml",
        _OF_A_FILE,
        (_FILE, *_WHERE, *_WHAT, *_HOW),
        "PPO as a file with the sections parallelism, distributed, model, training and inference asks for it.",
    )
)


def _run(
    ctx: click.Context,
    name: str,
    resume: str | None,
    dry_run: bool,
    as_json: bool,
    document: Path | None = None,
    **given: Any,
) -> int:
    """Carry out a workflow, or show what it would do. Returns the exit code."""
    from runner.report.progress import Display
    from runner.workflow import preview, start

    if resume is not None:
        if document is not None:
            raise errors.UsageError(
                f"what {document} asked for is kept with the run: runner workflow {_OF_A_FILE} --resume RUN"
            )
        return _resume(ctx, name, resume, dry_run, as_json, given)
    options = _options(name, given)
    if document is not None:
        from runner.system.schema import read_yaml
        from runner.workflow.asked import with_document

        options = with_document(options, read_yaml(document), str(document))
    if dry_run:
        made = start.planned(options, read_inventory)
        click.echo(json.dumps(preview.as_dict(made), indent=1) if as_json else preview.text(made))
        return errors.EXIT_OK
    return _concluded(start.start(options, read_inventory, Display()), as_json)


def _resume(
    ctx: click.Context,
    name: str,
    named: str,
    dry_run: bool,
    as_json: bool,
    given: dict[str, Any],
) -> int:
    """Go on with a run. Returns the exit code."""
    from runner.launch import resume
    from runner.report.progress import Display
    from runner.results.rundir import RunDir
    from runner.workflow import preview, start
    from runner.workflow.record import Stages

    run = RunDir.find(given["results"], named)
    found = Stages(run).asked()
    if found is None:
        raise errors.UsageError(f"{run.run_id} is no run of a workflow: resume it with runner bench --resume {named}")
    if found[0] != name:
        raise errors.UsageError(f"{run.run_id} is a run of {found[0]}: runner workflow {found[0]} --resume {named}")
    typed = typed_options(ctx)
    if other := [max(p.opts, key=len) for p in typed if p.name in _KEPT]:
        raise errors.UsageError(f"--resume runs where {run.run_id} was planned to run: omit {', '.join(other)}")
    options = _renewed(start.from_json(found[1]), name, given, {str(p.name) for p in typed}, run)
    if dry_run:
        made = start.planned(options, read_inventory, run=run)
        click.echo(json.dumps(preview.as_dict(made), indent=1) if as_json else preview.text(made))
        return errors.EXIT_OK
    again = resume.Options(
        run,
        inventory=options.run.inventory,
        retries=given["retries"],
        replace_bad_nodes=given["replace_bad_nodes"],
    )
    return _concluded(start.resume(options, again, read_inventory, Display()), as_json)


def _concluded(ended: RunResult, as_json: bool) -> int:
    """Print the results of a run, and where its metrics were kept. Returns the exit code."""
    from runner.workflow.tracking import kept

    code = print_conclusion(ended.run, ended.summary, as_json)
    for line in kept(ended.run):
        click.echo(line, err=as_json)
    return code


def _options(name: str, given: dict[str, Any]) -> Options:
    from runner.launch import prepare
    from runner.workflow.asked import Options

    given = dict(given)
    count, source, results = given.pop("num_nodes"), given.pop("source"), given.pop("results")
    run = prepare.Options(
        results=results,
        command=typed_command(),
        inventory=source,
        node_counts=(count,) if count else (),
        **{key: given.pop(key) for key in _OF_RUN},
    )
    stages = tuple(part.strip() for part in (given.pop("stages") or "").split(",") if part.strip())
    return Options(name, run, stages=stages, **given)


def _renewed(before: Options, name: str, given: dict[str, Any], typed: set[str], run: Any) -> Options:
    """What a run was asked for, with what is typed now; settings are added to those before. All stages, unless some
    are named.
    """
    now = _options(name, given)
    of_run = {key: getattr(now.run, key) for key in _OF_RUN if key in typed}
    if now.run.inventory is not None:
        of_run["inventory"] = now.run.inventory
    merged = replace(before.run, results=Path(run.path).parent, command=now.run.command, **of_run)
    known = {each.name for each in fields(now)} - {"settings", "stages", "run"}
    changed = {key: getattr(now, key) for key in typed & known}
    if len(length := {"steps", "epochs"} & typed) == 1:  # in place of what was asked for in the other unit
        changed |= {key: None for key in {"steps", "epochs"} - length}
    return replace(before, run=merged, stages=now.stages, settings=(*before.settings, *now.settings), **changed)
