"""Chains of cells on a real Slurm: jobs that wait for each other, with and without a controller."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults.conftest import SLURM, assert_nothing_half_written, assert_nothing_left, slurm
from runner.errors import EXIT_INFRASTRUCTURE, EXIT_OK
from testbed import chained
from testbed.benches import RUNNER, Bench, signal_rank, until

pytestmark = pytest.mark.testbed

QUICK, SOME_SECONDS, ENDLESS = 2, 12_000, 100_000_000
TWO = (*SLURM, "--nodes", "2")


class Chain(Bench):
    program = (sys.executable, chained.__file__)

    def entries(self) -> dict[str, dict]:
        return self.run.read_status()["cells"] if (self.results / "latest" / "status.json").exists() else {}

    def states(self) -> dict[str, str]:
        return {cell: entry["state"] for cell, entry in self.entries().items()}

    def jobs(self) -> list[str]:
        return [share[0] for share in self.run.read_status()["allocation"].values()]


def resume(chain: Chain) -> tuple[int, str]:
    command = [RUNNER, "bench", "--resume", "latest", "--results", chain.results]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    return done.returncode, done.stdout


def started(chain: Chain, cell: str) -> set[str]:
    """The nodes on which an agent of the cell has begun."""
    return {path.parent.parent.name for path in Path(chain.run.path).glob(f"nodes/*/{cell}/facts.json")}


def test_a_chain_ends_well_without_its_controller_and_is_taken_up(slurm3, tmp_path):
    """The second cell needs one node, and the third as many as the first."""
    results = slurm3.share / tmp_path.name
    stages = (f"sft:{SOME_SECONDS}", f"merge:{QUICK}:one", f"ppo:{QUICK}")
    chain = Chain(slurm3.inventory, results, *TWO, *stages)
    chain.wait_for_ranks()
    jobs = chain.jobs()
    assert len(set(jobs)) == 3 and chain.states() == {"sft": "running", "merge": "planned", "ppo": "planned"}
    waiting = slurm(slurm3, "squeue", "--noheader", "--format=%i %r %E", f"--jobs={','.join(jobs[1:])}")
    assert waiting.count("Dependency") == 2 and f"afterok:{jobs[0]}" in waiting and f"afterok:{jobs[1]}" in waiting
    chain.process.send_signal(signal.SIGKILL)
    chain.end()
    assert until(lambda: slurm(slurm3, "squeue", "--noheader", f"--jobs={','.join(jobs)}") == "", 120)
    code, output = resume(chain)
    assert code == EXIT_OK, output
    status = chain.run.read_status()
    found = {cell: (entry["state"], entry["attempt"]) for cell, entry in status["cells"].items()}
    assert found == dict.fromkeys(("sft", "merge", "ppo"), ("complete", 1)) and status["allocation"] == {}
    assert [len(started(chain, cell)) for cell in ("sft", "merge", "ppo")] == [2, 1, 2]
    assert_nothing_half_written(chain.run)
    assert_nothing_left(slurm3, chain.run)


def test_behind_a_stage_that_fails_nothing_runs_and_a_resumed_chain_goes_on_with_it(slurm3, tmp_path):
    results = slurm3.share / tmp_path.name
    chain = Chain(slurm3.inventory, results, *TWO, f"sft:{QUICK}", f"merge:{SOME_SECONDS}", f"ppo:{QUICK}")
    assert until(lambda: (chain.entries().get("merge", {}).get("progress") or {}).get("phase") == "all_reduce", 120)
    last = chain.jobs()[-1]
    for node in slurm3.nodes:
        signal_rank(node["container"], "KILL")
    code, output = chain.end()
    assert code == EXIT_INFRASTRUCTURE, output
    assert "ppo is not run: merge is not complete" in output
    assert chain.states() == {"sft": "complete", "merge": "failed", "ppo": "planned"}
    assert started(chain, "ppo") == set()
    assert "CANCELLED" in slurm(slurm3, "scontrol", "--oneliner", "show", "job", last)
    assert_nothing_left(slurm3, chain.run)
    code, output = resume(chain)
    assert code == EXIT_OK, output
    attempts = {cell: (entry["state"], entry["attempt"]) for cell, entry in chain.entries().items()}
    assert attempts == {"sft": ("complete", 1), "merge": ("complete", 2), "ppo": ("complete", 1)}
    assert_nothing_left(slurm3, chain.run)


def test_in_one_allocation_a_cell_may_need_one_node_of_several(slurm3, tmp_path):
    stages = (f"sft:{QUICK}", f"merge:{QUICK}:one", f"ppo:{QUICK}")
    chain = Chain(slurm3.inventory, slurm3.share / tmp_path.name, *TWO, "--one-allocation", *stages)
    code, output = chain.end()
    assert code == EXIT_OK, output
    assert len({entry["job"]["id"] for entry in chain.entries().values() if entry["job"]}) == 1
    assert [len(started(chain, cell)) for cell in ("sft", "merge", "ppo")] == [2, 1, 2]
    assert_nothing_left(slurm3, chain.run)


def test_a_stop_leaves_no_job_of_the_chain(slurm3, tmp_path):
    chain = Chain(slurm3.inventory, slurm3.share / tmp_path.name, *TWO, f"sft:{ENDLESS}", f"ppo:{QUICK}")
    chain.wait_for_ranks()
    done = subprocess.run(
        [RUNNER, "runs", "stop", "latest", "--results", chain.results], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    chain.end()
    assert set(chain.states().values()) == {"cancelled"}
    assert_nothing_left(slurm3, chain.run)
