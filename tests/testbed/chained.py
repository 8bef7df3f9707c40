"""A program that runs a chain of test torch as `runner bench` runs tests: no command has a chain of quick ones.

Each LINK is NAME:ITERATIONS, or NAME:ITERATIONS:one for a cell that needs one node of several.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import click

from runner.cli.conclusion import print_conclusion
from runner.cli.options import read_inventory
from runner.errors import RunnerError
from runner.launch import prepare, start
from runner.plan import build, config
from runner.plan.request import Link
from runner.report.progress import Display
from runner.workloads.registry import TESTS

ONE = "torch-on-one-node"  # to the planner; to nodes it is torch


def _link(word: str) -> Link:
    name, iters, *one = word.split(":")
    settings = {"iters": int(iters), "min_bytes": 8, "max_bytes": 8, "collectives": ["all_reduce"]}
    return Link(name, ONE if one else "torch", config.load_test("torch", settings).model_dump(), {"iters": iters})


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("-i", dest="inventory")
    options.add_argument("--results", type=Path)
    options.add_argument("--backend")
    options.add_argument("--nodes", type=int)
    options.add_argument("--one-allocation", action="store_true")
    options.add_argument("--set", dest="settings", action="append", default=[])
    options.add_argument("link", nargs="+", type=_link)
    given = vars(options.parse_args())
    links, count = tuple(given.pop("link")), given.pop("nodes")
    asked = prepare.Options(
        command="chained", tests=("torch",), node_counts=(count,), settings=tuple(given.pop("settings")), **given
    )
    TESTS[ONE] = replace(TESTS["torch"], runs="one")  # type: ignore[index]
    planned = build.build

    def torch_to_nodes(request, nodes):
        plan = planned(request, nodes)
        return replace(plan, cells=tuple(replace(cell, test="torch") for cell in plan.cells))

    prepared = prepare.prepare(asked, read_inventory)
    build.build = torch_to_nodes
    prepared = replace(prepared, untuned=replace(prepared.untuned, tests={}, chain=links))
    try:
        ended = start.start(prepared, Display())
    except RunnerError as error:
        click.echo("\n".join([str(error), *getattr(error, "__notes__", ())]), err=True)
        return error.exit_code
    return print_conclusion(ended.run, ended.summary, as_json=False)


if __name__ == "__main__":
    sys.exit(main())
