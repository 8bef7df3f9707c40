"""The stand-in for nccl-tests, which role nccl_build builds where there is no GPU: as the real ones print and end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import stand_ins

CAPTURED = Path(__file__).resolve().parents[3] / "shared" / "captured" / "nccl-tests"
MPI = stand_ins.mpi_home()
mpi = pytest.mark.skipif(not (MPI and shutil.which("mpirun")), reason="no Open MPI with its headers on this machine")
captured = pytest.mark.skipif(not CAPTURED.exists(), reason=f"no captured outputs in {CAPTURED}")
ALL = [
    "all_gather", "all_reduce", "alltoall", "alltoallv", "broadcast", "gather", "hypercube", "reduce", "reduce_scatter", "scatter", "sendrecv",
]  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return Path(stand_ins.nccl_tests(tmp_path_factory.mktemp("nccl") / "root", MPI)) / "current" / "bin"


@pytest.fixture
def run(programs, tmp_path):
    """Run a program as so many ranks; what is planted comes from a file, and NCCL reads no settings of this machine."""

    def start(name, *options, ranks=2, planted="", **env):
        (tmp_path / "planted").write_text(planted)
        (tmp_path / "nccl.conf").write_text("")
        env = dict(
            os.environ, NCCL_TESTS_STAND_IN=str(tmp_path / "planted"), NCCL_CONF_FILE=str(tmp_path / "nccl.conf"), **env
        )
        launch = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
        argv = [*launch, str(programs / f"{name}_perf"), *options]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)

    return start


def rows(text):
    return [line.split() for line in text.splitlines() if re.match(r" +\d+ ", line)]


@pytest.mark.parametrize("name", ALL)
def test_each_program_computes_the_right_values_of_each_type(run, name):
    outcome = run(name, "-b", "8", "-e", "64K", "-f", "32", "-n", "1", "-d", "all", "-o", "all", "-g", "4", ranks=1)
    assert outcome.returncode == 0 and "# Out of bounds values : 0 OK" in outcome.stdout, outcome.stdout
    assert len(rows(outcome.stdout)) >= 3 * 12


@mpi
@pytest.mark.parametrize("name", ALL)
def test_so_it_does_between_processes_and_by_every_root(run, name):
    outcome = run(name, "-b", "8", "-e", "64K", "-f", "32", "-n", "1", "-d", "float", "-r", "-1", ranks=4)
    assert outcome.returncode == 0 and "# Out of bounds values : 0 OK" in outcome.stdout, (
        outcome.stdout + outcome.stderr
    )


@mpi
def test_damaged_values_are_counted_by_row_and_the_run_fails_as_the_real_one(run):
    outcome = run("all_reduce", "-b", "1K", "-e", "2K", "-f", "2", "-n", "1", planted="wrong.1 3\n")
    assert outcome.returncode == 7
    assert [row[8] for row in rows(outcome.stdout)] == [
        "3",
        "3",
    ] and "# Out of bounds values : 4 FAILED" in outcome.stdout


@captured
def test_its_table_is_the_real_ones(run):
    real = (CAPTURED / "gh200x2-2n-wrong-values-FAILED-2.17.8.txt").read_text().splitlines()
    ours = run("all_reduce", "-b", "8", "-e", "1M", "-f", "2", "-n", "2", "-g", "2", ranks=1).stdout.splitlines()
    assert [line for line in real if line.startswith("# ")][6:9] == [line for line in ours if line.startswith("# ")][
        6:9
    ]
    widths = {tuple(match.end() for match in re.finditer(r"\S+", line)) for line in real if line.startswith("     ")}
    assert widths == {tuple(m.end() for m in re.finditer(r"\S+", line)) for line in ours if re.match(r" +\d+ ", line)}


@captured
@mpi
def test_without_a_driver_it_says_what_the_real_one_does(run):
    def named(text):
        words = re.sub(
            r"^\S+: Test", "host: Test", re.sub(r"\.\. \S+ pid \d+", ".. host pid N", text), flags=re.MULTILINE
        )
        return {line for line in words.splitlines() if "Test " in line}

    real = (CAPTURED / "fail-no-driver-2.19.6-mpirun-2ranks.txt").read_text()
    outcome = run("all_reduce", "-b", "8", "-e", "1M", "-f", "8", planted="fail no-driver\n")
    assert outcome.returncode == 2 and named(outcome.stdout) == named(real)


@mpi
@pytest.mark.parametrize(("how", "rc"), [("network", 3), ("crash", 139), ("torn", 137)])
def test_one_rank_can_be_told_to_fail_half_way(run, how, rc):
    outcome = run("all_gather", "-b", "1K", "-e", "8K", "-f", "2", "-n", "1", planted=f"fail.0 {how}\n")
    assert outcome.returncode == rc and "# Out of bounds" not in outcome.stdout


LOG = dict(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,TUNING,ENV")
SHARP = "net IB\nnics mlx5_0:1/RoCE mlx5_1:1/RoCE\ngdr 1\nnvls 1\ncollnet 1\n"


@pytest.mark.parametrize(
    ("planted", "env", "says", "silent"),
    [
        ("", {}, ["Using network Socket", "via SHM/direct", "multicast support is not available"], ["NET/IB : Using"]),
        (SHARP, {}, ["Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE", "RDMA Enabled for HCA 1", "Algo NVLS"], ["COLLNET"]),
        (SHARP, {"NCCL_NVLS_ENABLE": "0"}, ["multicast support is not available", "Algo RING"], ["Algo NVLS"]),
        (SHARP, {"NCCL_IB_HCA": "=mlx5_1:1"}, ["Using [0]mlx5_1:1/RoCE"], ["mlx5_0:1"]),
        (SHARP, {"NCCL_IB_DISABLE": "1"}, ["Using network Socket"], ["GPU Direct RDMA"]),
        (SHARP, {"NCCL_NET_GDR_LEVEL": "LOC"}, ["GPU Direct RDMA Disabled for HCA 0 'mlx5_0'"], ["Enabled"]),
        ("", {"NCCL_BUFFSIZE": "8388608"}, ["NCCL_BUFFSIZE set by environment to 8388608."], []),
    ],
)
def test_what_nccl_would_say_is_what_is_planted_and_its_settings_allow(run, tmp_path, planted, env, says, silent):
    log = {"NCCL_DEBUG_FILE": f"{tmp_path}/log.%h.%p", **LOG}
    assert (
        run(
            "all_reduce", "-b", "1M", "-e", "1M", "-n", "1", "-g", "2", ranks=1, planted=planted, **log, **env
        ).returncode
        == 0
    )
    (file,) = tmp_path.glob("log.*")
    text = file.read_text()
    assert all(each in text for each in says) and not any(each in text for each in silent), text


@mpi
@pytest.mark.parametrize(
    ("split", "colors"),
    [("MOD 2", "0101"), ("%2", "0101"), ("DIV 2", "0011"), ("/0x2", "0011"), ("AND 1", "0101"), ("", "0000")],
)
def test_groups_are_split_as_nccl_tests_split_them(run, split, colors):
    text = run("all_reduce", "-b", "1K", "-e", "1K", "-n", "1", ranks=4, NCCL_TESTS_SPLIT=split).stdout
    assert "".join(re.findall(r"#  Rank +\d+ Group +(\d+)", text)) == colors
