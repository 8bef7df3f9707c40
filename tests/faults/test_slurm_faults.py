"""Planted faults under a real Slurm: the exit code, the node that is named, the kind, and what is left behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

import runner
from faults.conftest import (
    ENDLESS,
    SHORT,
    SLURM,
    SOME_SECONDS,
    assert_kept,
    assert_no_orphan,
    assert_nothing_half_written,
    assert_nothing_left,
    error_of,
    mend,
    slurm,
    wait_for_job,
)
from runner.errors import EXIT_INFRASTRUCTURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_TARGET_MISSED
from runner.results.rundir import RunDir
from testbed.benches import (
    RUNNER,
    Bench,
    inside,
    kill,
    mount,
    other_content,
    pause,
    podman,
    signal_rank,
    stop_next_rank,
    unmount,
    until,
)
from testbed.conftest import Testbed

pytestmark = pytest.mark.testbed

ENVIRONMENT = RUNNER.parent.parent
UNSHARED = ("--set", "slurm.shared=false")


@pytest.fixture
def mended(slurm3: Testbed) -> Iterator[None]:
    yield
    mend(slurm3)


@pytest.fixture
def shared(slurm3: Testbed, tmp_path: Path) -> Path:
    """A folder of results that the nodes see."""
    assert slurm3.share
    return slurm3.share / tmp_path.name


@pytest.fixture(scope="module")
def limited(slurm3: Testbed) -> Iterator[Bench]:
    """Two cells on the third node. The first never ends by itself: it waits for its job's limit beside other tests.

    Slurm gives notice half a minute after the start at the soonest: the second cell has ended by then.
    """
    assert slurm3.share
    arguments = ("--hosts", "node003", "--repeats", "2", "--set", "slurm.time_limit_s=120", *SHORT)
    bench = Bench(slurm3.inventory, slurm3.share / "limited", *SLURM, *arguments)
    stop_next_rank(slurm3.nodes[2]["container"])
    yield bench
    mend(slurm3)


@pytest.fixture(scope="module")
def unanswered(slurm3: Testbed) -> Iterator[Bench]:
    """Two cells, between whose jobs nobody answers any more: Slurm is asked for a minute beside other tests."""
    assert slurm3.share
    bench = Bench(
        slurm3.inventory, slurm3.share / "unanswered", *SLURM, "--nodes", "2", "--repeats", "2", *SOME_SECONDS
    )
    bench.wait_for_ranks()
    inside(slurm3.nodes[0]["container"], "systemctl stop slurmctld")
    assert until(lambda: first_cell(bench.run)["state"] != "running", 120)
    yield bench
    mend(slurm3)


def first_cell(run: RunDir) -> dict:
    return next(iter(run.read_status()["cells"].values()))


def assert_clean(bed: Testbed, run: RunDir) -> None:
    assert_nothing_half_written(run)
    assert_nothing_left(bed, run)


def assert_in_seconds(run: RunDir) -> None:
    """The first cell ended long before a peer's two minutes of patience."""
    cell = first_cell(run)
    took = datetime.fromisoformat(cell["ended"]) - datetime.fromisoformat(cell["started"])
    assert took.total_seconds() < 60, cell


def test_slurmctld_restarted_in_a_job_is_not_noticed_by_it(slurm3, limited, shared):
    bench = Bench(slurm3.inventory, shared, *SLURM, "--nodes", "2", *SOME_SECONDS)
    bench.wait_for_ranks()
    inside(slurm3.nodes[0]["container"], "systemctl restart slurmctld")
    code, output = bench.end()
    assert code == EXIT_OK, output
    assert (first_cell(bench.run)["state"], first_cell(bench.run)["error"]) == ("complete", None)
    assert_kept(bench.run, first_cell(bench.run)["hosts"])
    assert_clean(slurm3, bench.run)


def test_a_job_that_is_cancelled_by_hand_is_told_as_that(slurm3, limited, tmp_path):
    bench = Bench(slurm3.inventory, tmp_path, *SLURM, *UNSHARED, "--nodes", "2", *ENDLESS)
    bench.wait_for_ranks()
    job = wait_for_job(bench, "running")
    slurm(slurm3, "scancel", job)
    code, output = bench.end()
    assert code == EXIT_INTERRUPTED, output  # as by Ctrl-C
    assert first_cell(bench.run)["state"] == "cancelled"
    assert json.loads(bench.run.summary.read_text())["findings"] == []
    error = first_cell(bench.run)["error"]
    assert (error["kind"], error["host"]) == ("job_cancelled", None) and f"job {job}" in error["message"]
    assert_kept(bench.run, first_cell(bench.run)["hosts"])
    assert_clean(slurm3, bench.run)


def test_a_rank_killed_once_costs_a_retry(slurm3, limited, shared):
    bench = Bench(slurm3.inventory, shared, *SLURM, "--nodes", "2", "--retries", "1", *SOME_SECONDS)
    bench.wait_for_ranks()
    killed = first_cell(bench.run)["hosts"][1]
    signal_rank(slurm3.container(killed), "KILL")
    code, output = bench.end()
    assert code == EXIT_OK, output
    cell = first_cell(bench.run)
    (before,) = cell["attempts"]
    assert (before["error"]["kind"], before["error"]["host"]) == ("rank_killed", killed)
    assert (cell["state"], cell["attempt"]) == ("complete", 2) and cell["job"]["id"] != before["job"]["id"]
    assert (bench.run.earlier("torch-2n-r1", 1) / before["hosts"][0] / "outcome.json").is_file()
    assert_clean(slurm3, bench.run)


def test_another_version_on_a_node_is_found_by_the_agent_itself(slurm3, limited, shared):
    version, odd = Path(runner.__file__), slurm3.nodes[1]
    other_content(odd["container"], version, '__version__ = "0.0.1"\n')
    try:
        bench = Bench(slurm3.inventory, shared, *SLURM, "--hosts", "node001,node002", *SHORT)
        code, output = bench.end()
    finally:
        unmount(odd["container"], version)
    assert code == EXIT_INFRASTRUCTURE, output
    error = error_of(bench.run)
    assert (error["kind"], error["host"]) == ("version_mismatch", odd["name"])
    assert "has shakedown 0.0.1" in error["message"]
    assert_clean(slurm3, bench.run)


@pytest.mark.parametrize("sharing", [(), UNSHARED], ids=["shared", "unshared"])
def test_a_node_without_the_environment_is_named_in_seconds_among_those_that_slurm_chose(
    slurm3, limited, shared, sharing
):
    bare = slurm3.nodes[1]
    mount(bare["container"], "-t", "tmpfs", "tmpfs", str(ENVIRONMENT))
    try:
        bench = Bench(slurm3.inventory, shared, *SLURM, *sharing, "--nodes", "2", *SHORT)
        code, output = bench.end()
    finally:
        unmount(bare["container"], ENVIRONMENT)
    assert code == EXIT_INFRASTRUCTURE, output
    error = error_of(bench.run)
    assert (error["kind"], error["host"]) == ("environment_missing", bare["name"]), error
    assert "No such file or directory" in error["message"]
    assert_in_seconds(bench.run)
    assert_clean(slurm3, bench.run)


@pytest.fixture
def failing_prolog(slurm3: Testbed, mended: None) -> Iterator[None]:
    """A prolog on all nodes that fails on the second one."""
    conf, prolog = "/etc/slurm/slurm.conf", "/etc/slurm/prolog"
    for node in slurm3.nodes:
        status = int(node is slurm3.nodes[1])
        inside(
            node["container"],
            f"printf '#!/bin/sh\\nexit {status}\\n' > {prolog} && chmod 755 {prolog} && cp -p {conf} {conf}.kept "
            f"&& echo Prolog={prolog} >> {conf}",
        )
    slurm(slurm3, "scontrol", "reconfigure")
    yield
    for node in slurm3.nodes:
        inside(node["container"], f"mv {conf}.kept {conf} && rm {prolog}")
    slurm(slurm3, "scontrol", "reconfigure")


def test_a_prolog_that_fails_is_told_of_its_node_where_slurm_chooses(slurm3, limited, failing_prolog, shared):
    bad = slurm3.nodes[1]["name"]
    bench = Bench(slurm3.inventory, shared, *SLURM, "--nodes", "2", *SHORT)
    code, output = bench.end()
    assert code == EXIT_INFRASTRUCTURE, output
    error = error_of(bench.run)
    assert (error["kind"], error["host"]) == ("prolog_failed", bad), error
    assert "Slurm says drained (Prolog error)" in error["message"]
    assert_in_seconds(bench.run)
    assert_clean(slurm3, bench.run)


def test_a_time_limit_ends_its_cell_and_not_the_next(slurm3, limited):
    code, output = limited.end()
    assert code == EXIT_INFRASTRUCTURE, output
    cells = limited.run.read_status()["cells"]
    assert [cell["state"] for cell in cells.values()] == ["incomplete", "complete"]
    error = error_of(limited.run, "torch-1n-r1")
    assert (error["kind"], error["host"]) == ("time_limit", None)
    assert_kept(
        limited.run, [slurm3.nodes[2]["name"]], "torch-1n-r1", ranks=False
    )  # it was stopped before it said a word
    assert_clean(slurm3, limited.run)


def test_a_node_drained_between_submit_and_start_is_named(slurm3, mended, shared):
    slurm(slurm3, "sbatch", "--exclusive", "--nodelist=node003", "--output=/dev/null", "--wrap=sleep 600")
    arguments = ("--hosts", "node002,node003", "--set", "slurm.stuck_s=2", *SHORT)
    bench = Bench(slurm3.inventory, shared, *SLURM, *arguments)
    wait_for_job(bench, "waiting")
    slurm(slurm3, "scontrol", "update", "nodename=node003", "state=drain", "reason=fan broken")
    code, output = bench.end()
    assert code == EXIT_INFRASTRUCTURE, output
    error = error_of(bench.run)
    assert (error["kind"], error["host"]) == ("not_started", slurm3.nodes[2]["name"]), output
    assert "fan broken" in error["message"]
    assert_clean(slurm3, bench.run)


def test_a_node_that_hangs_is_left_out_and_the_cell_runs_elsewhere(slurm3, mended, shared):
    bench = Bench(slurm3.inventory, shared, *SLURM, "--nodes", "2", "--replace-bad-nodes", *SOME_SECONDS)
    bench.wait_for_ranks()
    first, hung = first_cell(bench.run)["hosts"]
    pause(slurm3.container(hung))
    code, output = bench.end()
    assert code == EXIT_TARGET_MISSED, output  # a node that was given up is a finding
    status, cell = bench.run.read_status(), first_cell(bench.run)
    (before,) = cell["attempts"]
    assert (before["error"]["kind"], before["error"]["host"]) == ("hung", hung)
    assert slurm(slurm3, "squeue", "-h", "-o", "%T", "-j", before["job"]["id"]) in ("", "COMPLETING")
    assert [(one["host"], one["by"]) for one in status["replaced"]] == [(hung, None)]
    assert cell["state"] == "complete" and hung not in cell["hosts"]
    (alias,) = [node["alias"] for node in slurm3.nodes if node["name"] == hung]
    scripts = [path.read_text() for path in sorted(bench.run.slurm("any").parent.glob("*.sbatch"))]
    assert [f"#SBATCH --exclude={alias}" in script.splitlines() for script in scripts] == [False, True]
    assert (bench.run.earlier("torch-2n-r1", 1) / first / "outcome.json").is_file()
    podman("unpause", slurm3.container(hung))
    assert_clean(slurm3, bench.run)


def test_slurmd_down_is_told_of_the_node_and_others_are_used(slurm3, mended, shared):
    down = slurm3.nodes[2]
    inside(down["container"], "systemctl stop slurmd")
    # Slurm has not noticed it yet, and sends a job there.
    bench = Bench(slurm3.inventory, shared / "unnoticed", *SLURM, "--hosts", "node002,node003", *SHORT)
    code, output = bench.end()
    assert code == EXIT_INFRASTRUCTURE, output
    error = error_of(bench.run)
    assert (error["kind"], error["host"]) == ("node_failed", down["name"]), output
    assert_clean(slurm3, bench.run)

    # What slurmctld does by itself after its SlurmdTimeout of minutes.
    slurm(slurm3, "scontrol", "update", "nodename=node003", "state=down", "reason=Not responding")
    for chosen in (("--hosts", "node002,node003"), ("--nodes", "3")):
        code, output = Bench(slurm3.inventory, shared / "refused", *SLURM, *chosen, *SHORT).end()
        assert code == EXIT_INFRASTRUCTURE and "Not responding" in output, output
        assert re.search("node003|0003", output)
    assert not (shared / "refused").exists()
    code, output = Bench(slurm3.inventory, shared / "others", *SLURM, "--nodes", "2", *SHORT).end()
    assert code == EXIT_OK, output
    assert first_cell(RunDir.find(shared / "others", None))["hosts"] == [node["name"] for node in slurm3.nodes[:2]]


# --- SSH, on the same nodes, while nobody answers for Slurm ----------------------------------------


def test_over_ssh_a_rank_killed_once_costs_a_retry(slurm3, unanswered, tmp_path):
    arguments = ("--nodes", "2", "--retries", "1", *SOME_SECONDS)
    bench = Bench(slurm3.inventory, tmp_path / "results", *arguments)
    bench.wait_for_ranks()
    killed = slurm3.nodes[1]
    signal_rank(killed["container"], "KILL")
    code, output = bench.end()
    assert code == EXIT_OK, output
    cell = first_cell(bench.run)
    (before,) = cell["attempts"]
    assert (before["error"]["kind"], before["error"]["host"]) == ("rank_killed", killed["name"])
    assert (cell["state"], cell["attempt"]) == ("complete", 2)
    assert_nothing_half_written(bench.run)
    assert_no_orphan(bench.marker, 60)


def test_over_ssh_a_spare_takes_the_place_of_a_node_that_dies(slurm3, unanswered, tmp_path):
    arguments = ("--nodes", "2", "--replace-bad-nodes", *SOME_SECONDS)
    bench = Bench(slurm3.inventory, tmp_path / "results", *arguments)
    bench.wait_for_ranks()
    first, dead, spare = slurm3.nodes
    kill(dead["container"])
    code, output = bench.end()
    assert code == EXIT_TARGET_MISSED, output  # a node that was given up is a finding
    status, cell = bench.run.read_status(), first_cell(bench.run)
    (before,) = cell["attempts"]
    assert (before["error"]["kind"], before["error"]["host"]) == ("lost_connection", dead["name"])
    assert [(one["host"], one["by"]) for one in status["replaced"]] == [(dead["name"], spare["name"])]
    assert (cell["state"], set(cell["hosts"])) == ("complete", {first["name"], spare["name"]})
    assert (bench.run.earlier("torch-2n-r1", 1) / first["name"] / "outcome.json").is_file()
    assert_nothing_half_written(bench.run)
    assert_no_orphan(bench.marker, 60)


def test_without_slurmctld_what_runs_is_measured_and_nothing_more_is_started(slurm3, unanswered):
    code, output = unanswered.end()
    assert code == EXIT_INFRASTRUCTURE, output
    cells = unanswered.run.read_status()["cells"]
    assert [cell["state"] for cell in cells.values()] == ["complete", "incomplete"], output
    error = error_of(unanswered.run, "torch-2n-r2")
    assert (error["kind"], error["host"]) == ("slurm_unreachable", None)
    mend(slurm3)
    assert_clean(slurm3, unanswered.run)


def test_runs_stop_ends_a_run_from_elsewhere_and_jobs_without_a_controller(slurm3, tmp_path):
    ssh = Bench(slurm3.inventory, tmp_path / "ssh", "--hosts", "node003", *ENDLESS)
    job = Bench(slurm3.inventory, tmp_path / "job", *SLURM, *UNSHARED, "--hosts", "node002", *ENDLESS)
    orphan = Bench(slurm3.inventory, tmp_path / "orphan", *SLURM, *UNSHARED, "--hosts", "node001", *ENDLESS)
    for bench in (ssh, job, orphan):
        bench.wait_for_ranks()
    orphan.process.send_signal(signal.SIGKILL)
    orphan.end()
    for bench in (ssh, job, orphan):
        stop = subprocess.run([RUNNER, "runs", "stop", "--results", bench.results], capture_output=True, text=True)
        assert stop.returncode == EXIT_OK, stop.stderr
        if bench is not orphan:
            code, output = bench.end()
            assert code == EXIT_INTERRUPTED, output
            assert first_cell(bench.run)["state"] == "cancelled"
            assert_kept(bench.run, first_cell(bench.run)["hosts"])
            assert_nothing_half_written(bench.run)
        assert until(lambda bench=bench: bench.run.run_id not in slurm(slurm3, "squeue", "-h", "-o", "%j"), 60)
        assert_nothing_left(slurm3, bench.run)
