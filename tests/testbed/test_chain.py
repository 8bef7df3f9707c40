"""Chains of cells on a real Slurm: jobs that wait for each other, with and without a controller."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults.conftest import SLURM, assert_nothing_half_written, assert_nothing_left, slurm
from runner.errors import EXIT_INTERRUPTED, EXIT_OK
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


def began(chain: Chain, cell: str) -> set[str]:
    """The nodes on which an agent of the cell has begun."""
    return {path.parent.parent.name for path in Path(chain.run.path).glob(f"nodes/*/{cell}/facts.json")}


def test_a_chain_goes_on_without_its_controller_ends_with_a_stage_that_fails_and_is_taken_up(slurm3, tmp_path):
    """The second cell needs one node, and the third as many as the first."""
    results = slurm3.share / tmp_path.name
    stages = (f"sft:{SOME_SECONDS}", f"merge:{SOME_SECONDS}:one", f"ppo:{QUICK}")
    chain = Chain(slurm3.inventory, results, *TWO, *stages)
    chain.wait_for_ranks()
    jobs = chain.jobs()
    assert len(set(jobs)) == 3 and chain.states() == {"sft": "running", "merge": "planned", "ppo": "planned"}
    waiting = slurm(slurm3, "squeue", "--noheader", "--format=%i %r %E", f"--jobs={','.join(jobs[1:])}")
    assert waiting.count("Dependency") == 2 and f"afterok:{jobs[0]}" in waiting and f"afterok:{jobs[1]}" in waiting
    chain.process.send_signal(signal.SIGKILL)
    chain.end()
    assert until(lambda: any(chain.run.path.glob("nodes/*/merge/rank0.jsonl")), 120)
    for node in slurm3.nodes:
        signal_rank(node["container"], "KILL")
    assert until(lambda: slurm(slurm3, "squeue", "--noheader", f"--jobs={','.join(jobs)}") == "", 120)
    assert "JobState=CANCELLED" in slurm(slurm3, "scontrol", "--oneliner", "show", "job", jobs[2])
    assert [len(began(chain, cell)) for cell in ("sft", "merge", "ppo")] == [2, 1, 0]
    code, output = resume(chain)
    assert code == EXIT_OK, output
    found = {cell: (entry["state"], entry["attempt"]) for cell, entry in chain.entries().items()}
    assert found == {"sft": ("complete", 1), "merge": ("complete", 2), "ppo": ("complete", 1)}
    assert [len(began(chain, cell)) for cell in ("sft", "merge", "ppo")] == [2, 1, 2]
    assert chain.jobs() == []
    assert_nothing_half_written(chain.run)
    assert_nothing_left(slurm3, chain.run)


def test_in_one_allocation_a_cell_may_need_one_node_of_several(slurm3, tmp_path):
    stages = (f"sft:{QUICK}", f"merge:{QUICK}:one", f"ppo:{QUICK}")
    chain = Chain(slurm3.inventory, slurm3.share / tmp_path.name, *TWO, "--one-allocation", *stages)
    code, output = chain.end()
    assert code == EXIT_OK, output
    assert len({entry["job"]["id"] for entry in chain.entries().values() if entry["job"]}) == 1
    assert [len(began(chain, cell)) for cell in ("sft", "merge", "ppo")] == [2, 1, 2]
    assert_nothing_left(slurm3, chain.run)


def test_behind_a_stage_that_somebody_cancels_nothing_runs(slurm3, tmp_path):
    chain = Chain(slurm3.inventory, slurm3.share / tmp_path.name, *TWO, f"sft:{ENDLESS}", f"ppo:{QUICK}")
    chain.wait_for_ranks()
    first, second = chain.jobs()
    slurm(slurm3, "scancel", first)
    code, output = chain.end()
    assert code == EXIT_INTERRUPTED and "ppo is not run: sft is not complete" in output, output
    assert chain.states() == {"sft": "cancelled", "ppo": "planned"} and chain.jobs() == []
    assert chain.entries()["sft"]["error"]["kind"] == "job_cancelled"
    assert "JobState=CANCELLED" in slurm(slurm3, "scontrol", "--oneliner", "show", "job", second)
    assert began(chain, "ppo") == set()
    assert_nothing_left(slurm3, chain.run)
