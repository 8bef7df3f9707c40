"""`runner workflow`: from a base model to a trained one, in stages."""

from __future__ import annotations

import json

import click

from runner.cli.options import Commands


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
