"""The joints: what one command prepares, the next one uses. Real nodes; each hand-over has its test here, or is named.

Without nodes: facts to plan, and roce.fact to nccl.conf to what ranks observe, in tests/unit/launch/test_joints.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

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
runner_python: {python}
"""
SMALL = ("--model", "tiny", "--set", "torch.max_bytes=64", "--set", "torch.collectives=[all_reduce]",
         "--set", "sft.steps=1", "--set", "sft.warmup_steps=1", "--set", "sft.samples=64")  # fmt: skip
CELLS = {"torch-2n-r1": "torch", "sft-tiny-2n-r1": "sft"}


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
        variables = VARIABLES.format(index=index, folder=folder, python=PYTHON)
        (folder / "inventory" / "group_vars" / "gpu_nodes.yml").write_text(variables)
        yield Testbed(name, folder / "inventory", state["nodes"], share)
    finally:
        provision_testbed.down(name)
        shutil.rmtree(folder / "index", ignore_errors=True)  # 1.3 GB, as is the next
        shutil.rmtree(folder / "wheelhouse", ignore_errors=True)


@pytest.fixture(scope="module")
def setup(bare: Testbed, tmp_path_factory: pytest.TempPathFactory) -> process.Outcome:
    """The outcome of `runner setup`. Slow (minutes): each of the two nodes gets and unpacks 1.3 GB."""
    argv = [str(RUNNER), "setup", "-i", str(bare.inventory), "--results", str(tmp_path_factory.mktemp("setup"))]
    return process.run(argv, timeout_s=900)


@pytest.fixture(scope="module")
def nodes(bare: Testbed, setup: process.Outcome) -> Testbed:
    """The nodes as `runner setup` has left them. It has built no NCCL, as they have no GPU: a stand-in is put there with
    the fact and the settings that role nccl_build writes.
    """
    assert setup.rc == 0, setup.stdout
    assert bare.share
    built = bare.share / "nccl"
    stand_ins.nccl(built, 90807)
    fact = json.dumps({"version": "9.8.7", "prefix": "/opt/nccl/a-build"})
    for node in bare.nodes:
        inside(
            node["container"],
            f"cp -a {built} /opt/nccl && mkdir -p /etc/ansible/facts.d && echo '{fact}' > /etc/ansible/facts.d/nccl.fact"
            " && printf 'NCCL_IB_TC=106\\nNCCL_IB_HCA==mlx5_0:1\\n' > /etc/nccl.conf",
        )
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
    tests = ("--test", "torch", "--test", "sft", "--nodes", "2", *SMALL)
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
    assert facts.keys() == CELLS.keys()
    for observed in (each for hosts in facts.values() for each in hosts.values()):
        for package in ("torch", "deepspeed", "transformers", "accelerate"):
            assert observed["packages"][package] == pinned[package]


@pytest.mark.parametrize("way", ["ssh", "slurm"])
@pytest.mark.parametrize("cell", CELLS)
def test_ranks_use_the_nccl_that_was_built_and_its_settings(runs, way, cell):
    hosts = runs[way].read_facts(runs[way].read_plan())[cell]
    assert len(hosts) == 2
    for host, observed in hosts.items():
        assert observed["nccl"] == "9.8.7"
        assert (observed["env"]["NCCL_IB_TC"], observed["env"]["NCCL_IB_HCA"]) == ("106", "=mlx5_0:1")
        (events,) = runs[way].cell(host, cell).all_events()
        told = [json.loads(line) for line in events.read_text().splitlines() if '"nccl"' in line]
        assert [each["libraries"] for each in told] == [{"/opt/nccl/a-build/lib/libnccl.so.2": "9.8.7"}]


MPIRUN = Path(RUNNER).with_name("mpirun")


@pytest.mark.skipif(not MPIRUN.exists(), reason="Open MPI is not in this environment: install the extra `dev`")
@pytest.mark.parametrize("first", ["node001", "node002"])
def test_mpirun_on_any_node_reaches_every_other_one_through_the_mesh(setup, bare, first):
    """As nccl-tests are started on several nodes. Its ssh gets a host's name and no option but -x."""
    names = [node["name"] for node in bare.nodes]
    argv = [str(MPIRUN), "--allow-run-as-root", "--host", ",".join(names), "-n", "2", "--map-by", "node", "hostname"]
    printed = podman("exec", bare.container(first), *argv)
    assert sorted(printed.split()) == sorted(names)
