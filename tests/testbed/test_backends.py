"""The same cells by every backend: what is recorded of them differs only in where and when they ran."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from runner.results.rundir import RunDir
from testbed.benches import Bench, inside
from testbed.conftest import Testbed

pytestmark = pytest.mark.testbed

CELLS = ("--test", "torch", "--set", "torch.max_bytes=64", "--set", "torch.collectives=[all_reduce, barrier]")
SLURM = ("--backend", "slurm")
# One rank on this machine, as the testbed's nodes have.
LOCAL = """
all:
  children:
    gpu_nodes:
      hosts:
        localhost: {ansible_connection: local, ansible_host: 127.0.0.1, runner_gpus_per_node: 1, runner_device: cpu}
"""
WAYS = ("ssh", "slurm", "slurm unshared", "slurm in one allocation", "slurm in job arrays")


@pytest.fixture(scope="module")
def runs(slurm3: Testbed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """A finished run of the same cells by each backend. Slurm keeps its own apart, whoever comes first."""
    folder, share = tmp_path_factory.mktemp("backends"), slurm3.share
    assert share
    this_machine = folder / "this_machine"
    this_machine.mkdir()
    (this_machine / "hosts.yml").write_text(LOCAL)
    both = (*CELLS, "--sweep", "1,2")

    def finished(started: Mapping[str, Bench]) -> dict[str, RunDir]:
        for way, bench in started.items():
            code, output = bench.end()
            assert code == 0, (way, output)
        return {way: bench.run for way, bench in started.items()}

    return finished(
        {
            "local": Bench(this_machine, folder / "local", *CELLS),
            "ssh": Bench(slurm3.inventory, folder / "ssh", *both),
        }
    ) | finished(
        {
            "slurm": Bench(slurm3.inventory, share / "slurm", *SLURM, *both),
            "slurm unshared": Bench(slurm3.inventory, folder / "unshared", *SLURM, *both),
            "slurm in one allocation": Bench(slurm3.inventory, share / "one", *SLURM, "--one-allocation", *both),
            "slurm in job arrays": Bench(slurm3.inventory, share / "arrays", *SLURM, "--job-array", *both),
        }
    )


def measured(run: RunDir, cell: str | None = None) -> Counter[str]:
    """Every record without its value and without what says which run it is of and where."""
    kept = [json.loads(line) for line in run.records.read_text().splitlines()]
    left_out = ("run_id", "host", "value")
    return Counter(
        json.dumps({key: value for key, value in record.items() if key not in left_out}, sort_keys=True)
        for record in kept
        if cell in (None, record["cell"])
    )


def summary(run: RunDir) -> dict:
    return json.loads(run.summary.read_text())


def test_after_setup_the_inventory_says_where_slurm_is_and_files_are_looked_for(runs):
    said = {way: runs[way].read_plan()["slurm"] for way in WAYS[1:] if "slurm" in way}
    assert {one["login"] for one in said.values()} == {runs["ssh"].read_plan()["nodes"][0]["name"]}
    assert {way for way, one in said.items() if not one["shared"]} == {"slurm unshared"}


@pytest.mark.parametrize("way", WAYS[1:])
def test_records_differ_only_in_run_host_and_value(runs, way):
    assert measured(runs["ssh"]) and measured(runs[way]) == measured(runs["ssh"])


@pytest.mark.parametrize("way", WAYS)
def test_a_cell_of_one_node_is_the_same_on_this_machine(runs, way):
    assert measured(runs["local"]) and measured(runs[way], "torch-1n-r1") == measured(runs["local"])


@pytest.mark.parametrize("way", WAYS[1:])
def test_every_record_names_the_host_that_its_rank_was_on(runs, way):
    cells = {cell["id"]: cell["hosts"] for cell in runs[way].read_plan()["cells"]}
    for record in runs[way].read_records():
        assert record.rank is not None and record.host == cells[record.cell][record.rank]


@pytest.mark.parametrize("way", WAYS[1:])
def test_summaries_have_the_same_cells_targets_and_verdict(runs, way):
    def shape(run: RunDir) -> dict:
        said = summary(run)
        cells = [
            {**cell, "hosts": len(cell["hosts"]), "metrics": sorted(cell["metrics"]), "took_s": 0, "queued_s": 0}
            for cell in said.pop("cells")
        ]
        return {**said, "run_id": "", "cells": cells}

    assert shape(runs[way]) == shape(runs["ssh"])


@pytest.mark.parametrize("way", WAYS[1:])
def test_reports_say_the_same_in_structure(runs, way):
    def outline(path: Path) -> list[str]:
        lines = path.read_text().splitlines()
        return [line for line in lines if line.startswith("#") or line.startswith("| cell")]

    assert outline(runs[way].report_md) == outline(runs["ssh"].report_md)


@pytest.mark.parametrize("way", ["local", *WAYS])
def test_the_same_artefacts_are_kept_of_every_node(runs, way):
    run = runs[way]
    for cell in run.read_plan()["cells"]:
        for rank, host in enumerate(cell["hosts"]):
            names = {path.name for path in run.cell(host, cell["id"]).path.iterdir()}
            wanted = {"job.json", "facts.json", "outcome.json", "telemetry.jsonl", "engine.stdout", "engine.stderr"}
            assert wanted | {f"rank{rank}.jsonl", f"rank{rank}.stdout", f"rank{rank}.stderr"} <= names


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_jobs_log_lies_beside_its_file_and_nowhere_else(runs, slurm3, way):
    run = runs[way]
    files = sorted(path.name for path in run.slurm("x").parent.iterdir())
    scripts = [name for name in files if name.endswith(".sbatch")]
    assert len(scripts) == (1 if "allocation" in way else 2)
    logs = [name.replace(".sbatch", ".log.0" if "array" in way else ".log") for name in scripts]
    assert files == sorted([*scripts, *logs])
    for node in slurm3.nodes:
        assert run.run_id not in inside(node["container"], "ls /var/tmp /var/tmp/shakedown")
