"""The joints: what one command prepares, the next one uses. Real nodes; each hand-over has its test here, or is named.

Without nodes: facts to plan, and roce.fact to nccl.conf to what ranks observe, in tests/unit/launch/test_joints.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import stand_ins

from conftest import ROOT
from runner.provision.testbed import containers as provision_testbed
from runner.provision.testbed import layout
from runner.results.rundir import RunDir
from runner.system import process
from testbed import wheels
from testbed.benches import RUNNER, Bench, inside, podman
from testbed.conftest import Testbed

pytestmark = pytest.mark.testbed

LOCK = ROOT / "roles" / "conda_env" / "files" / "profiles" / "cpu.txt"
PYTHON = "/opt/shakedown/env/bin/python"
VARIABLES = """
conda_env_enabled: true
conda_env_manager: venv
conda_env_source: wheelhouse
conda_env_index_url: {index}
conda_env_wheelhouse: {folder}/wheelhouse
conda_env_min_free_gib: 4
runner_profiles: []
runner_python: {python}
nccl_build_enabled: true
nccl_build_url: file://{stand_ins}/{nccl}.tar.gz
nccl_build_sha256: {nccl_sha256}
nccl_build_tests_version: {tests_version}
nccl_build_tests_url: file://{stand_ins}/{tests}.tar.gz
nccl_build_tests_sha256: {tests_sha256}
nccl_build_cuda_home: {stand_ins}/cuda
nccl_build_archs: ["90"]
nccl_build_cxx: gcc
nccl_build_free_gib: 0.1
nccl_build_poll_s: 1
nccl_build_verify_collective: false
"""
STAND_INS = "/srv/stand-in"
ROCE = json.dumps({"hca": ["mlx5_0:1"], "gid_index": 3, "traffic_class": 106})
CLAIMED = r"net IB\nnics mlx5_0:1/RoCE mlx5_1:1/RoCE\n"  # by the stand-in; the settings leave it one of the two
VERSION = next(path.name for path in stand_ins.TREES.glob("nccl-[0-9]*")).split("-")[1]
WRITTEN = {
    "NCCL_BUFFSIZE": "8388608", "NCCL_IB_GID_INDEX": "3", "NCCL_IB_HCA": "=mlx5_0:1", "NCCL_IB_TC": "106",
}  # fmt: skip
TESTS = next(path.name for path in stand_ins.TREES.glob("nccl-tests-*")).rpartition("-")[2]
SMALL = ("--model", "tiny", "--set", "torch.max_bytes=64", "--set", "torch.collectives=[all_reduce]",
         "--set", "sft.steps=1", "--set", "sft.warmup_steps=1", "--set", "sft.samples=64",
         "--set", "nccl.collectives=[all_reduce]", "--set", "nccl.min_bytes=1024", "--set", "nccl.max_bytes=4096",
         "--set", "nccl.iters=2")  # fmt: skip
CELLS = {"torch-2n-r1": "torch", "sft-tiny-2n-r1": "sft"}
NCCL = "nccl-all_reduce-2n-r1"


@pytest.fixture(scope="module")
def bare(containers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Two nodes that have a Python and nothing else, an inventory that says what `runner setup` is to make of them."""
    name, folder = "pytest-joints", tmp_path_factory.mktemp("joints")
    share = folder / "share"
    share.mkdir()
    try:
        wanted = layout.Options(nodes=2, name=name, inventory=folder / "inventory", share=share)
        state = provision_testbed.up(wanted)
        (folder / "inventory" / "group_vars").mkdir()
        index = wheels.index(LOCK.read_text(), folder / "index")
        for node in state["nodes"]:  # modules that nobody imports need not be compiled: half a minute each
            inside(node["container"], "printf '[install]\\ncompile = false\\n' > /etc/pip.conf")
        archives = can_build_nccl(state["nodes"], folder)
        variables = VARIABLES.format(index=index, folder=folder, python=PYTHON, stand_ins=STAND_INS, **archives)
        (folder / "inventory" / "group_vars" / "gpu_nodes.yml").write_text(variables)
        yield Testbed(name, folder / "inventory", state["nodes"], share)
    finally:
        provision_testbed.down(name)
        shutil.rmtree(folder / "index", ignore_errors=True)  # 1.3 GB, as is the next
        shutil.rmtree(folder / "wheelhouse", ignore_errors=True)


def can_build_nccl(nodes: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """Give the first node what role nccl_build builds from, as stand-ins: a toolkit, the two archives, MPI's headers;
    all nodes what role roce_qos leaves, and NICs that the programs find. Returns names and checksums of the archives.
    """
    first, told = nodes[0]["container"], {}
    inside(first, f"mkdir -p {STAND_INS}/cuda/bin")
    podman("cp", str(stand_ins.TREES / "nvcc"), f"{first}:{STAND_INS}/cuda/bin/nvcc")
    for name, tree in (("nccl", "nccl-[0-9]*"), ("tests", "nccl-tests-*")):
        (source,) = stand_ins.TREES.glob(tree)
        archive = folder / f"{source.name}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(source, arcname=source.name)
        podman("cp", str(archive), f"{first}:{STAND_INS}/")
        told |= {name: source.name, f"{name}_sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    apt = ["apt-get", "install", "--yes", "--no-install-recommends", "libopenmpi-dev"]
    process.run(["podman", "exec", first, *apt], timeout_s=300, check=True, cwd=str(folder))
    for node in nodes:
        inside(node["container"], f"mkdir -p /etc/ansible/facts.d && echo '{ROCE}' > /etc/ansible/facts.d/roce.fact")
        inside(node["container"], f"mkdir -p /etc/stand-in && printf '{CLAIMED}' > /etc/stand-in/nccl-tests")
    return told | {"tests_version": told["tests"].rpartition("-")[2]}


@pytest.fixture(scope="module")
def setup(bare: Testbed, tmp_path_factory: pytest.TempPathFactory) -> process.Outcome:
    """The outcome of `runner setup`. Slow (minutes): each of the two nodes gets and unpacks 1.3 GB."""
    argv = [str(RUNNER), "setup", "-i", str(bare.inventory), "--results", str(tmp_path_factory.mktemp("setup"))]
    return process.run(argv, timeout_s=900)


@pytest.fixture(scope="module")
def nodes(bare: Testbed, setup: process.Outcome) -> Testbed:
    """The nodes as `runner setup` has left them. What it has built of NCCL and nccl-tests are the stand-ins."""
    assert setup.rc == 0, setup.stdout
    return bare


def test_setup_is_green_and_check_right_after_it_too(setup, bare):
    assert setup.rc == 0, setup.stdout
    checked = process.run([str(RUNNER), "check", "-i", str(bare.inventory)], timeout_s=300)
    assert checked.rc == 0 and "2 of 2 nodes as expected" in checked.stdout, checked.stdout
    assert "FAILED" not in checked.stdout and "warning" not in checked.stdout


@pytest.fixture(scope="module")
def runs(nodes: Testbed) -> dict[str, RunDir]:
    """A finished run in the environment that setup has made, by each backend."""
    assert nodes.share
    tests = ("--test", "torch", "--test", "sft", "--test", "nccl", "--nodes", "2", *SMALL)
    finished = {}
    for way, arguments in (("ssh", ()), ("slurm", ("--backend", "slurm"))):
        bench = Bench(nodes.inventory, nodes.share / way, *tests, *arguments)
        code, output = bench.end(600)
        assert code == 0, (way, output)
        finished[way] = bench.run
    return finished


@pytest.mark.parametrize("way", ["ssh", "slurm"])
def test_bench_runs_in_the_environment_that_setup_made(runs, way):
    plan = runs[way].read_plan()
    assert {node["python"] for node in plan["nodes"]} == {PYTHON}
    pinned = dict(line.split("==") for line in LOCK.read_text().splitlines() if "==" in line and line[0] != "#")
    facts = runs[way].read_facts(plan)
    assert facts.keys() == {*CELLS, NCCL}
    for observed in (each for hosts in facts.values() for each in hosts.values()):
        for package in ("torch", "deepspeed", "transformers", "accelerate"):
            assert observed["packages"][package] == pinned[package]


@pytest.mark.parametrize("way", ["ssh", "slurm"])
@pytest.mark.parametrize("cell", CELLS)
def test_ranks_use_the_nccl_that_was_built_and_its_settings(runs, way, cell):
    hosts = runs[way].read_facts(runs[way].read_plan())[cell]
    assert len(hosts) == 2
    for host, observed in hosts.items():
        assert observed["nccl"] == VERSION
        assert (observed["env"]["NCCL_IB_TC"], observed["env"]["NCCL_IB_HCA"]) == ("106", "=mlx5_0:1")
        (events,) = runs[way].cell(host, cell).all_events()
        told = [json.loads(line) for line in events.read_text().splitlines() if '"nccl"' in line]
        (libraries,) = [each["libraries"] for each in told]
        assert list(libraries.values()) == [VERSION]
        assert all(re.fullmatch(r"/opt/nccl/[^/]+-sm90-[^/]+/lib/libnccl\.so\S*", path) for path in libraries)


@pytest.mark.parametrize("way", ["ssh", "slurm"])
def test_nccl_measures_with_what_setup_has_built_and_under_the_settings_that_it_wrote(runs, way):
    records = [record for record in runs[way].read_records() if record.cell == NCCL]
    measured = {record.context["size_bytes"] for record in records if record.metric == "busbw_gb_per_s"}
    assert measured == {1024, 2048, 4096}
    hosts = runs[way].read_facts(runs[way].read_plan())[NCCL]
    told = {(record.metric, record.host): record.context for record in records if record.metric in ("settings", "nics")}
    assert told.keys() == {(metric, host) for metric in ("settings", "nics") for host in hosts}
    for host in hosts:
        assert WRITTEN.items() <= told["settings", host]["values"].items()
        assert (told["nics", host]["net"], told["nics", host]["names"]) == ("IB", ["mlx5_0"])
    (printed,) = [text for host in hosts if (text := runs[way].cell(host, NCCL).stream(0, "stdout")).exists()]
    assert f"nccl-tests version {TESTS}" in printed.read_text()


MPIRUN = Path(RUNNER).with_name("mpirun")


@pytest.mark.skipif(not MPIRUN.exists(), reason="Open MPI is not in this environment: install the extra `dev`")
@pytest.mark.parametrize("first", ["node001", "node002"])
def test_mpirun_on_any_node_reaches_every_other_one_through_the_mesh(setup, bare, first):
    """As nccl-tests are started on several nodes. Its ssh gets a host's name and no option but -x."""
    names = [node["name"] for node in bare.nodes]
    argv = [str(MPIRUN), "--allow-run-as-root", "--host", ",".join(names), "-n", "2", "--map-by", "node", "hostname"]
    printed = podman("exec", bare.container(first), *argv)
    assert sorted(printed.split()) == sorted(names)
