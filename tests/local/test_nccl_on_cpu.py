"""Test `nccl` on real ranks: mpirun starts them, each runs the stand-in for nccl-tests, over this machine's own MPI."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_ins

import ranks
from runner.launch.spellings import kind_of
from runner.node import lastwords
from runner.node.output import last_lines
from runner.plan import config
from runner.results.celldir import CellDir
from runner.system import process
from runner.workloads.nccl import computing
from runner.workloads.nccl.command import PROGRAMS
from runner.workloads.nccl.variants import variants

MPI = stand_ins.mpi_home()
pytestmark = [
    pytest.mark.local,
    pytest.mark.skipif(not (MPI and shutil.which("mpirun")), reason="no Open MPI with its headers on this machine"),
]
RUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return stand_ins.nccl_tests(tmp_path_factory.mktemp("nccl") / "root", MPI)


@pytest.fixture
def begin(root, tmp_path):
    """Start the ranks of a cell, 2 or as on `nodes` of 2, with what is planted; returns mpirun and the cell's folder."""

    def start(suffix="all_reduce", *settings, planted="", nodes=1):
        (tmp_path / "planted").write_text(planted)
        (tmp_path / "nccl.conf").write_text("")
        given = [f"nccl.root={root}", "nccl.max_bytes=8K", "nccl.factor=32", "nccl.iters=2", *settings]
        params = config.load_test("nccl", config.parse_settings(given)["nccl"]).model_dump()
        job = ranks.job("nccl", 2 * nodes, variants(params, nodes, 2)[suffix], num_nodes=nodes, gpus_per_node=2)
        folder = tmp_path / "cell"
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job))
        env = {
            **os.environ,
            "NCCL_TESTS_STAND_IN": str(tmp_path / "planted"),
            "NCCL_CONF_FILE": str(tmp_path / "nccl.conf"),
            process.MARKER: f"run/{tmp_path.name}",
        }
        argv = [*RUN, "-np", str(2 * nodes), sys.executable, "-m", "runner.workloads", str(folder)]
        return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), folder

    yield start
    process.stop_marked(f"run/{tmp_path.name}", 1)


@pytest.fixture
def run(begin):
    """Run the ranks of a cell to their end: mpirun's status, the cell's folder, and the events of each rank."""

    def start(*given, **planted):
        launched, folder = begin(*given, **planted)
        said, _ = launched.communicate(timeout=120)
        events = [[json.loads(line) for line in file.read_text().splitlines()] for file in CellDir(folder).all_events()]
        return launched.returncode, folder, ranks.Ended(process.Outcome((), launched.returncode, 0, said, ""), events)

    return start


def test_every_collective_has_its_program(root):
    assert all(os.access(f"{root}/current/bin/{program}_perf", os.X_OK) for program in PROGRAMS.values())


@pytest.mark.parametrize("collective", ["all_reduce", "send_recv", "hypercube", "all_to_all_v"])
def test_each_collective_is_measured_and_what_nccl_says_is_kept(run, collective):
    status, folder, ended = run(collective, f"nccl.collectives=[{collective}]")
    assert status == 0, ended.outcome.stdout
    assert {"size_bytes": 8192, "in_place": False}.items() <= ended.contexts("busbw_gb_per_s")[-2].items()
    assert ended.values("wrong_values") and set(ended.values("wrong_values")) == {0}
    assert ended.values("lost_rows") == [0] and ended.values("busbw_gb_per_s", rank=1) == []
    for rank in (0, 1):
        assert ended.ranks[rank][-1]["event"] == "end"
        assert ended.contexts("nics", rank)[0]["net"] == "Socket"
        assert "NCCL INFO Using network Socket" in CellDir(folder).nccl_log(rank).read_text()
    progress = [event for event in ended.ranks[0] if event["event"] == "progress"]
    assert progress[0]["done"] == 0 and progress[-1]["total"] == 3
    assert "# Collective test concluded" in CellDir(folder).stream(0, "stdout").read_text(), "the raw output is kept"


@pytest.mark.parametrize(("suffix", "groups"), [("all_reduce-node", [0, 0, 1, 1]), ("all_reduce-rail1", [0, 1, 0, 1])])
def test_a_split_makes_its_groups(run, suffix, groups):
    status, folder, ended = run(suffix, "nccl.split_min_bytes=8", nodes=2)
    assert status == 0, ended.outcome.stdout
    lines = [line for line in CellDir(folder).stream(0, "stdout").read_text().splitlines() if "#  Rank" in line]
    assert [int(line.split()[4]) for line in lines] in (groups, [group * 2 for group in groups])
    assert {context["split"] for context in ended.contexts("busbw_gb_per_s")} == {suffix[11:15]}


CLAIMS = "net IB\nnics mlx5_0:1/RoCE mlx5_1:1/RoCE\ngdr 1\nnvls 1\ncollnet 1\n"


@pytest.mark.parametrize(
    ("settings", "nvls", "read"),
    [((), [1], None), (("nccl.nvls=false", "nccl.buffsize=8M"), [0], {"NCCL_NVLS_ENABLE": "0"})],
)
def test_a_pair_of_runs_shows_the_effect_of_a_setting(run, settings, nvls, read):
    _, _, ended = run("all_reduce", *settings, planted=CLAIMS)
    assert ended.values("nvls") == nvls
    said = ended.contexts("settings")[0]["values"] if ended.contexts("settings") else {}
    assert said.get("NCCL_NVLS_ENABLE") == (read or {}).get("NCCL_NVLS_ENABLE")


# --- how it fails -----------------------------------------------------------------------------------------


def end_of(folder: Path, rank: int) -> str | None:
    """The kind that the controller gives to a rank by its last words; None where it left none."""
    cell = CellDir(folder)
    endings = lastwords.endings(last_lines(cell.stream(rank, "stderr"), cell.stream(rank, "stdout")))
    return kind_of([text for ending in endings for text in (ending.text, *ending.also)]) if endings else None


def test_the_rank_that_fails_says_why_and_its_victim_is_silent(run):
    status, folder, ended = run(planted="fail.1 not-initialized")
    assert status != 0 and (end_of(folder, 0), end_of(folder, 1)) == (None, "fabric_not_ready")
    assert not any(event["event"] == "end" for events in ended.ranks for event in events)


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ("fail.1 no-driver", "CUDA driver version is insufficient for CUDA runtime version"),
        ("fail.1 network", "IBV_WC_RETRY_EXC_ERR"),
        ("fail.1 crash", "was killed by SIGSEGV"),
        ("devices.1 1", "Invalid number of GPUs"),
    ],
)
def test_its_own_words_are_its_last(run, planted, words):
    _, folder, _ = run(planted=planted)
    said = CellDir(folder).stream(1, "stderr").read_text()
    assert words in said.splitlines()[-1] and said.splitlines()[-1].startswith("rank 1: all_reduce_perf ")
    assert CellDir(folder).stream(0, "stderr").read_text() == ""


def test_what_was_measured_before_a_failure_is_kept_and_a_torn_row_is_not(run):
    status, _, ended = run("all_reduce", "nccl.factor=2", planted="fail.0 torn")
    assert status != 0
    sizes = [context["size_bytes"] for context in ended.contexts("busbw_gb_per_s") if context["in_place"]]
    assert 0 < len(sizes) < 14 and sizes == [8 << step for step in range(len(sizes))]


def test_wrong_values_are_counted_and_every_rank_ends_well(run):
    status, _, ended = run(planted="wrong.1 3")
    assert status == 0 and max(ended.values("wrong_values")) == 3
    assert [events[-1]["event"] for events in ended.ranks] == ["end", "end"]


def test_wrong_values_in_a_row_that_was_lost_are_known_from_the_footer(run, tmp_path):
    program = tmp_path / "root" / "current" / "bin" / "all_reduce_perf"
    program.parent.mkdir(parents=True)
    row = (
        "           8             2     float     sum      -1    10.00    0.00    0.00       0    10.00    0.00    0.00"
    )
    lines = [f"{row}       0", f"{row}", "# Out of bounds values : 4 FAILED"]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + "exit 1\n")
    program.chmod(0o755)
    status, _, ended = run("all_reduce", f"nccl.root={tmp_path}/root")
    assert status == 0 and ended.values("wrong_values") == [0, 0, 1] and ended.values("lost_rows") != [0]


def test_without_nccl_tests_that_is_said(run, tmp_path):
    _, folder, _ = run("all_reduce", f"nccl.root={tmp_path}/nowhere")
    said = CellDir(folder).stream(0, "stderr").read_text()
    assert said.startswith(
        f"rank 0: no nccl-tests: {tmp_path}/nowhere/current/bin/all_reduce_perf is missing: run role"
    )


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nccl_tests_ends_with_its_rank_whatever_ends_that(tmp_path, number):
    """It may be stuck in the driver, and no longer read from the launcher: here it is a program that only sleeps."""
    program = tmp_path / "root" / "current" / "bin" / "all_reduce_perf"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    params = config.load_test("nccl", {"root": str(tmp_path / "root"), "max_bytes": 8}).model_dump()
    (tmp_path / "job.json").write_text(json.dumps(ranks.job("nccl", 1, variants(params, 1, 1)["all_reduce"])))
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", process.MARKER: f"run/{tmp_path.name}"}
    rank = subprocess.Popen([sys.executable, "-m", "runner.workloads", str(tmp_path)], env=env)
    deadline = time.monotonic() + 60
    while not (programs := children(rank.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(programs) == 1
    rank.send_signal(number)
    rank.wait(30)
    deadline = time.monotonic() + 10
    while process.state(programs[0]) not in (None, "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    left, state = process.marked(f"run/{tmp_path.name}"), process.state(programs[0])
    process.stop_marked(f"run/{tmp_path.name}", 1)
    assert left == [] and state in (None, "Z")


@pytest.mark.parametrize(("program", "busy"), [("while :; do :; done", True), ("exec sleep 60", False)])
def test_a_program_that_stands_still_is_told_from_one_that_computes(program, busy):
    """A rank of NCCL or MPI that waits for its peers polls, one that is stuck in its driver does not."""
    child = subprocess.Popen(["sh", "-c", program])
    watched = computing.Program(child.pid)
    assert watched.computes(), "not known yet"
    deadline = time.monotonic() + 10
    while watched.computes() is not busy and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(computing.LOOK_S)
    found = watched.computes()
    child.kill()
    child.wait()
    assert found is busy
