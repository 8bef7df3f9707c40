"""Runs that are taken up again: after a controller was killed, in another environment, and when there is nothing to do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from faults.conftest import SHORT, SLURM, SOME_SECONDS, assert_nothing_half_written, assert_nothing_left, slurm
from runner.errors import EXIT_INFRASTRUCTURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from runner.results.rundir import RunDir
from testbed.benches import RUNNER, Bench, stop_next_rank

pytestmark = pytest.mark.local


def resume(results: Path, *arguments: object) -> tuple[int, str]:
    """`runner bench --resume` of the newest run: its exit code and what it says."""
    command = [RUNNER, "bench", "--resume", "latest", "--results", results, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    return done.returncode, done.stdout


def this_machine(folder: Path, **variables: str) -> Path:
    """An inventory of this machine with one rank, whose environment has `variables` beside."""
    folder.mkdir(exist_ok=True)
    host = {"ansible_connection": "local", "ansible_host": "127.0.0.1", "runner_gpus_per_node": 1}
    hosts = {"localhost": {**host, "runner_device": "cpu", "runner_env": variables}}
    (folder / "hosts.yml").write_text(json.dumps({"all": {"children": {"gpu_nodes": {"hosts": hosts}}}}))
    return folder


def contexts(run: RunDir) -> list[tuple]:
    return sorted((r.cell, r.rank, r.metric, json.dumps(dict(r.context), sort_keys=True)) for r in run.read_records())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The results of a run of two cells that is complete; the tests add to it in their order."""
    folder = tmp_path_factory.mktemp("finished")
    bench = Bench(this_machine(folder / "before", NCCL_DEBUG="WARN"), folder / "results", "--repeats", "2", *SHORT)
    code, output = bench.end()
    assert code == EXIT_OK, output
    return folder


def test_controllers_killed_at_random_moments_lose_and_double_nothing(tmp_path):
    """The short form of the script that kills fifty."""
    inventory = this_machine(tmp_path / "inventory")
    command = [sys.executable, ROOT / "benchmarks" / "resume.py", "--runs", "3", "--seed", "4", "-i", inventory]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stdout
    last = re.fullmatch(r"3 of 3 runs complete and equal, (\d+) controllers killed", done.stdout.splitlines()[-1])
    assert last and int(last[1]) >= 2, done.stdout


def test_a_complete_run_has_nothing_left_to_do(finished):
    run = RunDir.find(finished / "results", None)
    before = run.records.read_bytes()
    code, output = resume(finished / "results")
    assert code == EXIT_OK, output
    assert "2 of 2 cells complete" in output and run.records.read_bytes() == before


def test_another_environment_is_named_and_refused_and_nothing_is_touched(finished):
    run = RunDir.find(finished / "results", None)
    before = run.status.read_bytes(), run.plan.read_bytes(), run.records.read_bytes()
    changed = this_machine(finished / "after", NCCL_DEBUG="INFO")
    code, output = resume(finished / "results", "-i", changed)
    assert code == EXIT_USAGE, output
    assert "NCCL_DEBUG" in output and "WARN" in output and "INFO" in output and "--accept-drift" in output
    assert before == (run.status.read_bytes(), run.plan.read_bytes(), run.records.read_bytes())


def test_accepted_drift_measures_all_cells_again_each_once(finished):
    run = RunDir.find(finished / "results", None)
    expected = contexts(run)
    code, output = resume(finished / "results", "-i", finished / "after", "--accept-drift")
    assert code == EXIT_OK, output
    cells = run.read_status()["cells"].values()
    assert [(cell["state"], cell["attempt"]) for cell in cells] == [("complete", 2), ("complete", 2)]
    assert contexts(run) == expected
    for cell in run.read_plan()["cells"]:
        facts = json.loads((run.cell("localhost", cell["id"]).path / "facts.json").read_text())
        assert facts["env"]["NCCL_DEBUG"] == "INFO"


def test_a_damaged_plan_is_one_line_and_is_left_as_it_is(finished):
    run = RunDir.find(finished / "results", None)
    whole = run.plan.read_text()
    damaged = whole[: len(whole) // 2]
    run.plan.write_text(damaged)
    try:
        code, output = resume(finished / "results")
        assert (code, output) == (EXIT_USAGE, f"runner: run {run.run_id}: {run.plan} is missing or damaged\n")
        assert run.plan.read_text() == damaged
    finally:
        run.plan.write_text(whole)


@pytest.mark.testbed
def test_a_job_goes_on_without_its_controller_and_is_taken_up(slurm3, tmp_path):
    results = slurm3.share / tmp_path.name
    bench = Bench(slurm3.inventory, results, *SLURM, "--nodes", "2", *SOME_SECONDS)
    bench.wait_for_ranks()
    job = next(iter(bench.run.read_status()["cells"].values()))["job"]["id"]
    bench.process.send_signal(signal.SIGKILL)
    bench.end()
    assert bench.run.read_status()["state"] == "incomplete"
    code, output = resume(results)
    assert code == EXIT_OK, output
    (cell,) = bench.run.read_status()["cells"].values()
    assert (cell["state"], cell["attempt"], cell["job"]["id"]) == ("complete", 1, job)
    again = contexts(bench.run)
    assert len(set(again)) == len(again) > 0
    assert_nothing_half_written(bench.run)
    assert_nothing_left(slurm3, bench.run)


@pytest.mark.testbed
def test_the_tasks_of_an_array_go_on_without_a_controller_and_one_that_was_cancelled_runs_again(slurm3, tmp_path):
    results = slurm3.share / tmp_path.name
    bench = Bench(slurm3.inventory, results, *SLURM, "--job-array", "--nodes", "2", "--repeats", "3", *SOME_SECONDS)
    bench.wait_for_ranks()
    bench.process.send_signal(signal.SIGKILL)
    bench.end()
    tasks = [job_id for job_id, *_ in bench.run.read_status()["allocation"].values()]
    array = tasks[0].partition("_")[0]
    assert tasks == [f"{array}_{number}" for number in range(3)]
    slurm(slurm3, "scancel", tasks[2])
    code, output = resume(results)
    assert code == EXIT_OK, output
    assert f"job {tasks[2]} is not known to Slurm any more: cancelled while it waited" in output
    first, second, third = bench.run.read_status()["cells"].values()
    assert [(cell["attempt"], cell["job"]["id"]) for cell in (first, second)] == [(1, tasks[0]), (1, tasks[1])]
    assert (third["attempt"], third["job"]["id"] in tasks) == (2, False)
    assert {cell["state"] for cell in (first, second, third)} == {"complete"}
    starts = [datetime.fromisoformat(cell["job"]["start"]) for cell in (first, second)]
    assert starts[0] < starts[1], "one at a time"
    assert len(set(contexts(bench.run))) == len(contexts(bench.run)) > 0
    assert_nothing_left(slurm3, bench.run)


@pytest.mark.testbed
def test_after_ctrl_c_what_is_missing_shares_one_job_again(slurm3, tmp_path):
    results = slurm3.share / tmp_path.name
    bench = Bench(slurm3.inventory, results, *SLURM, "--one-allocation", "--nodes", "2", "--repeats", "3", *SHORT)
    stop_next_rank(slurm3.nodes[0]["container"])  # or cells of a second may all be over before it is interrupted
    bench.process.send_signal(signal.SIGINT)
    code, output = bench.end()
    assert code == EXIT_INTERRUPTED, output
    status = bench.run.read_status()
    missing = [name for name, cell in status["cells"].items() if cell["state"] == "cancelled"]
    assert len(missing) >= 2 and status["allocation"] == {}, "one at most ended before it heard"
    assert_nothing_left(slurm3, bench.run)
    code, output = resume(results)
    assert code == EXIT_OK, output
    cells = bench.run.read_status()["cells"]
    assert {cell["state"] for cell in cells.values()} == {"complete"}
    assert len({cells[name]["job"]["id"] for name in missing}) == 1
    assert len(list((bench.run.path / "slurm").glob("*.sbatch"))) == 2
    assert len(set(contexts(bench.run))) == len(contexts(bench.run)) > 0


@pytest.mark.testbed
def test_under_slurm_a_new_cell_shows_what_has_changed_and_older_ones_run_again(slurm3, tmp_path):
    results = slurm3.share / tmp_path.name
    bench = Bench(slurm3.inventory, results, *SLURM, "--hosts", "node001", "--repeats", "2", *SHORT)
    code, output = bench.end()
    assert code == EXIT_OK, output
    plan = bench.run.read_plan()
    plan["cells"][1]["params"]["iters"] += 1  # measured by another plan, it is missing now
    bench.run.write_plan(plan)
    changed = tmp_path / "changed"
    changed.mkdir()
    hosts = yaml.safe_load((slurm3.inventory / "hosts.yml").read_text())
    hosts["all"]["children"]["gpu_nodes"]["vars"]["runner_env"]["NCCL_DEBUG"] = "INFO"
    (changed / "hosts.yml").write_text(yaml.safe_dump(hosts))

    code, output = resume(results, "-i", changed)
    assert code == EXIT_INFRASTRUCTURE, output
    assert "NCCL_DEBUG absent -> INFO" in output and "--accept-drift" in output
    states = [(cell["state"], cell["attempt"]) for cell in bench.run.read_status()["cells"].values()]
    assert states == [("complete", 1), ("failed", 2)]

    code, output = resume(results, "-i", changed, "--accept-drift")
    assert code == EXIT_OK, output
    assert "torch-1n-r1 runs again: measured in another environment: env.NCCL_DEBUG absent -> INFO on node001" in output
    states = [(cell["state"], cell["attempt"]) for cell in bench.run.read_status()["cells"].values()]
    assert states == [("complete", 2), ("complete", 3)]
    for cell, hosts in bench.run.read_facts(bench.run.read_plan()).items():
        assert {facts["env"].get("NCCL_DEBUG") for facts in hosts.values()} == {"INFO"}, cell
    assert len(set(contexts(bench.run))) == len(contexts(bench.run)) > 0
    assert_nothing_left(slurm3, bench.run)
