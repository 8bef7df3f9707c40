"""`runner report`: judges a run again."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli.conclusion import print_conclusion
from runner.cli.options import results_option


@click.command()
@results_option
@click.argument("name", metavar="[RUN]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def report(ctx: click.Context, name: str | None, results: Path, as_json: bool) -> None:
    """Judge a run again and rewrite its report; default: the newest run."""
    from runner.report import conclude
    from runner.results.rundir import RunDir

    run = RunDir.find(results, name)
    ctx.exit(print_conclusion(run, conclude.judge(run), as_json))
