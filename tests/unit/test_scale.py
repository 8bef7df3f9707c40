"""Planning 512 nodes with 8 GPUs: what must hold of the plan that benchmarks/scale.py measures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cluster import slurm as slurm_settings

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scale.py"
NUM_NODES = 512


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steps(scale):
    return scale.Steps(NUM_NODES)


def test_aliases_are_positions_although_the_names_have_gaps(steps):
    nodes = steps.inventory.nodes
    assert [node.alias for node in nodes] == [f"node{position:03d}" for position in range(1, NUM_NODES + 1)]
    assert nodes[7].name == "fukushimadc-02-hgx-0009"
    assert len({node.address for node in nodes}) == NUM_NODES


def test_the_sweep_has_a_cell_for_each_test_and_number_of_nodes_on_the_first_nodes(steps):
    names = [node.name for node in steps.inventory.nodes]
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert [(cell.test, cell.num_nodes) for cell in steps.plan.cells] == [
        (test, size) for test in ("torch", "sft") for size in sizes
    ]
    for cell in steps.plan.cells:
        assert list(cell.hosts) == names[: cell.num_nodes]
        assert cell.world_size == 8 * cell.num_nodes


def test_every_node_of_a_cell_gets_its_rank_and_the_same_rendezvous(steps):
    for cell in steps.plan.cells:
        assert len(cell.launch.argv) == cell.num_nodes
        for rank, argv in enumerate(cell.launch.argv):
            assert {f"--nnodes={cell.num_nodes}", "--nproc-per-node=8", f"--node-rank={rank}"} <= set(argv)
            assert {"--master-addr=10.2.0.2", f"--master-port={cell.master_port}"} <= set(argv)


def test_no_two_cells_share_a_name_a_folder_or_a_port(steps):
    cells = steps.plan.cells
    for values in ({c.id for c in cells}, {c.cell_dir for c in cells}, {c.master_port for c in cells}):
        assert len(values) == len(cells) == 20


def test_weak_scaling_keeps_the_sequences_per_gpu(steps):
    assert {c.batch.global_batch // c.world_size for c in steps.plan.cells if c.batch} == {16}


def test_every_cell_and_node_has_its_job_and_a_folder_of_its_own_to_gather_into(steps):
    pairs = {(cell.id, host) for cell in steps.plan.cells for host in cell.hosts}
    assert len(pairs) == 2 * (2 * NUM_NODES - 1)
    assert steps.jobs.keys() == steps.targets.keys() == pairs
    assert len(set(steps.targets.values())) == len(pairs)
    assert all(json.loads(text)["cell"] == cell for (cell, _), text in steps.jobs.items())


def test_the_plan_for_a_person_and_for_a_machine_name_every_cell(steps):
    saved = json.loads(steps.json)
    assert [cell["id"] for cell in saved["cells"]] == [cell.id for cell in steps.plan.cells]
    assert all(f"cell {cell.id}: " in steps.text for cell in steps.plan.cells)
    assert "hosts  node[001-512] = fukushimadc-02-hgx-[0001-0007,0009-0015," in steps.text


def test_the_one_node_that_ran_out_of_memory_is_found_among_512_that_failed(steps):
    assert steps.blamed["host"] == steps.inventory.nodes[-1].name
    assert "out of memory" in steps.blamed["message"]


def test_every_cell_has_its_own_sbatch_file(steps):
    assert list(steps.scripts) == [cell.id for cell in steps.plan.cells]
    for cell in steps.plan.cells:
        lines = steps.scripts[cell.id].splitlines()
        assert f"#SBATCH --job-name=shakedown-{steps.plan.run_id}-{cell.id}-1" in lines
        assert f"#SBATCH --nodes={cell.num_nodes}" in lines
        assert slurm_settings.placeholder(steps.scripts[cell.id]) is None


@pytest.mark.local
def test_a_small_fleet_is_heard_and_leaves_nothing_behind(scale, tmp_path):
    """Two agents for a second, in a process of their own: the agents' parent takes the signals."""
    argv = [sys.executable, SCRIPT, "fleet", "--agents", "2", "--step-s", "0.5", "--seconds", "1", "--folder", tmp_path]
    result = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout)
    # Two steps, or three with one on the edge, of 4 values of 8 ranks and 2 more of rank 0, on each node.
    assert result["lines_per_s"] >= 2 * (4 * 8 + 2)
    assert 0 < result["lag_median_s"] < 5
    assert (result["silent"], result["unheard"], result["left_over"]) == (0, 0, 0)
