"""Test nccl on real nodes: mpirun over ssh and srun in a job start its ranks, and end them. nccl-tests is the stand-in."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import stand_ins

from runner.cluster import mpi
from runner.results.rundir import RunDir
from runner.system import process
from testbed.benches import Bench, inside
from testbed.conftest import Testbed

pytestmark = pytest.mark.testbed

CELLS = ("--nodes", "2", "--test", "nccl", "--set", "nccl.collectives=[all_reduce]", "--set", "nccl.splits=[none]")
SMALL = ("--set", "nccl.max_bytes=1K", "--set", "nccl.iters=2")
# Iterations for minutes, whoever starts them: what is to be broken is broken while it runs.
LONG = ("--set", "nccl.min_bytes=8", "--set", "nccl.max_bytes=8", "--set", "nccl.iters=20000000")
SLURM = ("--backend", "slurm")
WAYS: Mapping[str, tuple[str, ...]] = {"ssh": (), "slurm": SLURM}


@pytest.fixture(scope="module")
def nodes(slurm3: Testbed) -> Testbed:
    """The nodes with the stand-in for nccl-tests where role nccl_build would put it."""
    home = stand_ins.mpi_home()
    if home is None or not shutil.which("mpirun"):
        pytest.skip("the stand-in for nccl-tests is compiled with Open MPI: install libopenmpi-dev and openmpi-bin")
    assert slurm3.share
    root = slurm3.share / "nccl"
    if not root.exists():
        stand_ins.nccl_tests(root, home)
    for node in slurm3.nodes:
        inside(node["container"], f"ln -sfn {root} /opt/nccl")
    return slurm3


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, nodes: Testbed) -> str:
    """A way to the nodes that works between this machine's Open MPI and that of their release."""
    if request.param == "ssh":
        theirs = inside(nodes.nodes[0]["container"], "mpirun --version").splitlines()[0]
        if mpi.version() not in theirs.split():
            pytest.skip(f"over ssh the same Open MPI is needed on both sides: {mpi.version()} here, there {theirs}")
    return str(request.param)


def results(nodes: Testbed, folder: Path, way: str) -> Path:
    """A folder that the nodes see, or one that they do not."""
    assert nodes.share
    return folder / "results" if way == "ssh" else nodes.share / folder.name


def left(nodes: Testbed, marker: str) -> dict[str, str]:
    """The processes of a cell that are left, by node, and on this machine."""
    look = f"grep -lzs SHAKEDOWN_CELL={marker} /proc/[0-9]*/environ | grep -v self || true"
    found = {node["name"]: inside(node["container"], look).strip() for node in nodes.nodes}
    found["here"] = " ".join(str(pid) for pid in process.marked(marker) if not _in_container(pid))
    return {where: pids for where, pids in found.items() if pids}


def _in_container(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    except OSError:
        return True


@pytest.fixture(scope="module")
def finished() -> dict[str, RunDir]:
    """The runs that are complete, by way."""
    return {}


@pytest.fixture
def run(nodes: Testbed, way: str, finished: dict[str, RunDir], tmp_path: Path) -> RunDir:
    """A complete run by this way, one for all tests."""
    if way not in finished:
        bench = Bench(nodes.inventory, results(nodes, tmp_path, way), *CELLS, *SMALL, *WAYS[way])
        code, output = bench.end()
        assert code == 0, output
        finished[way] = bench.run
    return finished[way]


def test_every_size_is_measured_once_each_way_by_ranks_on_both_nodes(run, way):
    (cell,) = run.read_plan()["cells"]
    assert cell["engine"] == ("mpirun" if way == "ssh" else "srun") and cell["world_size"] == 2
    busbw = [record for record in run.read_records() if record.metric == "busbw_gb_per_s"]
    sizes = [(record.context["size_bytes"], record.context["in_place"]) for record in busbw]
    assert sorted(sizes) == sorted((8 << step, in_place) for step in range(8) for in_place in (False, True))
    hosts = cell["hosts"]
    for host in hosts:
        (events,) = run.cell(host, cell["id"]).all_events()
        first = json.loads(events.read_text().splitlines()[0])
        assert first["host"] == host and first["world_size"] == 2


def test_nothing_is_left_of_a_run_that_is_complete(nodes, run):
    assert not left(nodes, f"{run.run_id}/{run.read_plan()['cells'][0]['id']}")
    for node in nodes.nodes:
        assert run.run_id not in inside(node["container"], "find /var/tmp")


def killed(nodes: Testbed, bench: Bench) -> str:
    """Kill the rank on the run's last node; returns the node's name."""
    host = bench.run.read_plan()["cells"][0]["hosts"][-1]
    inside(nodes.container(host), "pkill -9 -f runner.workloads")
    return host


def test_a_killed_rank_is_blamed_on_its_node_and_nothing_is_left(nodes, tmp_path, way):
    bench = Bench(nodes.inventory, results(nodes, tmp_path, way), *CELLS, *LONG, *WAYS[way])
    bench.wait_for_ranks()
    marker, host = bench.marker, killed(nodes, bench)
    code, output = bench.end()
    (entry,) = bench.run.read_status()["cells"].values()
    assert code == 3 and (entry["error"]["host"], entry["error"]["kind"]) == (host, "rank_killed"), output
    assert not left(nodes, marker)


def test_a_run_that_is_interrupted_leaves_nothing(nodes, tmp_path, way):
    bench = Bench(nodes.inventory, results(nodes, tmp_path, way), *CELLS, *LONG, *WAYS[way])
    bench.wait_for_ranks()
    marker = bench.marker
    assert {*bench.run.read_plan()["cells"][0]["hosts"]} <= {*left(nodes, marker)}
    bench.process.send_signal(signal.SIGINT)
    code, output = bench.end()
    assert code == 130, output
    assert not left(nodes, marker)


GOOD = "net IB\nnics mlx5_0:1/RoCE mlx5_1:1/RoCE\ngdr 1\nnvls 1\n"
# What is planted on one node, and the kinds that are found there; of wrong values no node is to blame.
PLANTED = {
    "few rails, no GPUDirect, wrong values": (
        GOOD.replace(" mlx5_1:1/RoCE", "").replace("gdr 1", "gdr 0") + "wrong 2\n",
        {"rail_missing", "no_gpudirect", "wrong_values"},
    ),
    "sockets": (GOOD.replace("net IB", "net Socket"), {"socket_fallback"}),
    "no driver": ("fail no-driver", {"gpu_unavailable"}),
    "torn": (GOOD + "fail torn", {"rank_killed"}),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_on_one_node_is_found_there(nodes, tmp_path, way, planted):
    """The stand-in claims RDMA over two rails on both nodes, but for what is planted on one of them."""
    there, kinds = PLANTED[planted]
    one, other = nodes.nodes[:2]
    for node, claims in ((one, GOOD), (other, there)):
        inside(
            node["container"], f"mkdir -p /etc/stand-in && printf %b {shlex.quote(claims)} > /etc/stand-in/nccl-tests"
        )
    try:
        hosts = ("--hosts", f"{one['name']},{other['name']}")
        code, output = Bench(nodes.inventory, results(nodes, tmp_path, way), *CELLS, *SMALL, *hosts, *WAYS[way]).end()
    finally:
        for node in (one, other):
            inside(node["container"], "rm /etc/stand-in/nccl-tests")
    summary = json.loads((RunDir.find(results(nodes, tmp_path, way), None).path / "summary.json").read_text())
    assert code in (1, 3), output
    expected = {(None if kind == "wrong_values" else other["name"], kind) for kind in kinds}
    assert {(found["host"], found["kind"]) for found in summary["findings"]} == expected, output
    assert len(summary["findings"]) == len(kinds)


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_a_node_without_nccl_tests_is_named_with_the_command_that_builds_them(nodes, tmp_path, way):
    node = nodes.nodes[1]
    inside(node["container"], "mv /opt/nccl /opt/elsewhere")
    try:
        code, output = Bench(nodes.inventory, tmp_path, *CELLS, *SMALL).end()
    finally:
        inside(node["container"], "mv /opt/elsewhere /opt/nccl")
    assert code == 3 and f"({node['name']}): no nccl-tests in /opt/nccl/current/bin: run `runner setup" in output
    assert "--tags nccl_build" in output and nodes.nodes[0]["name"] not in output
