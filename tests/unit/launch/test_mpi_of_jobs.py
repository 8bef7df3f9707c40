"""An MPI test under Slurm: one agent of a job starts the ranks of all its nodes, by a step of Slurm's own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import mpi_probe
import pytest
from plans import request

from golden_files import check as golden
from runner.launch import preflight
from runner.launch.slurm import allocations
from runner.launch.slurm.script import render
from runner.node import gate, slurm_step
from runner.node.requests import StepRequest
from runner.plan import build, config

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]"}
PMIX = ("none", "pmix", "pmi2")


@pytest.fixture
def job(cluster, monkeypatch):
    """The job of one MPI cell on two nodes, which Slurm chooses or not."""
    mpi_probe.register(monkeypatch)

    def of(named: bool = False, shared: bool = True):
        nodes = tuple(replace(node, backend="slurm") for node in cluster.nodes[:2])
        tests = {mpi_probe.NAME: {**config.load_test("torch", {}).model_dump(), "timeout_s": 600}}
        asked = request(cluster, backend="slurm", tests=tests, node_counts=(2,), slurm={}, named=named)
        plan = build.build(asked, nodes)
        checks = preflight.checks(nodes[0], "cuda", "torchrun", (mpi_probe.NAME,))
        known = [node.alias for node in nodes]
        return allocations.prepare(plan, "job", plan.cells[:1], None, shared, known, checks, {})

    return of


@pytest.mark.parametrize(("name", "named"), [("mpi-cell", False), ("mpi-cell-named-hosts", True)])
def test_the_file_shows_the_command_by_which_the_first_agent_starts_all_ranks(job, name, named):
    script = render(job(named), allocations.slurm_settings.Settings())
    head, _, tail = script.partition("<<'REQUEST'\n")
    golden(f"slurm/{name}.sh", head + "<<'REQUEST'\n...\n" + tail[tail.index("\nREQUEST\n") + 1 :])


@pytest.mark.parametrize("shared", [True, False])
def test_the_first_nodes_agent_starts_them_and_the_others_watch(job, shared):
    step = StepRequest.from_json(job(shared=shared).steps[0].request)
    first, _ = slurm_step.placed(step, {**STEP, "SLURMD_NODENAME": "a1"}, lambda: None, lambda: PMIX)
    other, _ = slurm_step.placed(step, {**STEP, "SLURMD_NODENAME": "a2"}, lambda: None, lambda: PMIX)
    assert other.argv is None and first.argv and first.argv[0] == "srun"
    assert {"--overlap", "--mpi=pmix", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--nodelist=a1,a2"} <= {
        *first.argv
    }
    # One command for all nodes, whose folders differ where they share them.
    assert (first.cell_dir != other.cell_dir) == shared
    assert first.argv[-1] == first.link == other.link and first.link not in (first.cell_dir, other.cell_dir)


@pytest.mark.parametrize(("offered", "chosen"), [(("none", "pmix_v4"), "pmix_v4"), (("pmi2",), "pmi2"), ((), "pmix")])
def test_the_plugin_is_one_that_this_clusters_slurm_has(job, offered, chosen):
    step = StepRequest.from_json(job().steps[0].request)
    first, _ = slurm_step.placed(step, {**STEP, "SLURMD_NODENAME": "a1"}, lambda: None, lambda: offered)
    assert f"--mpi={chosen}" in first.argv


def test_an_attempts_ranks_find_their_folder_only_while_its_agent_is_ready(job, tmp_path):
    step = StepRequest.from_json(job().steps[0].request)
    step = replace(step, scratch=str(tmp_path / "scratch"), shared_root=str(tmp_path / "nodes"), attempt=2)
    asked, _ = slurm_step.placed(step, {**STEP, "SLURMD_NODENAME": "a2"}, lambda: None, lambda: PMIX)
    Path(asked.cell_dir).mkdir(parents=True)
    link = Path(str(asked.link))
    assert link.name.endswith(".2") and not link.exists()
    with gate.linked(asked):
        assert os.path.samefile(link, asked.cell_dir)
    assert not link.exists() and not link.parent.exists() and Path(asked.cell_dir).exists()
