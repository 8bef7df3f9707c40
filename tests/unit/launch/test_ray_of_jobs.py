"""Cells of engine `ray`: their supervisors on each node over ssh and in Slurm's jobs, and the secret of each attempt."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from plans import request

from runner.launch import agents
from runner.launch.slurm import allocations
from runner.launch.slurm.script import render
from runner.node import slurm_step
from runner.node.requests import StepRequest
from runner.plan import build
from runner.plan.engines import ray
from runner.plan.engines.registry import offered
from runner.results.rundir import RunDir
from runner.workloads.rl.settings import RlTest

TESTS = {"rl": RlTest(program="ppo", words=("a=1",), checkpoint="/c").model_dump()}
PYTHON = "/opt/shakedown/env-gpu-vllm/bin/python"


@pytest.fixture
def plan(cluster):
    return build.build(request(cluster, tests=TESTS, node_counts=(2,), profile="gpu-vllm"), cluster.nodes)


def test_no_user_chooses_it():
    assert "ray" not in offered()


def test_each_node_has_a_supervisor_and_the_first_one_is_told_of_the_others(plan):
    (cell,) = plan.cells
    first, other = cell.launch.argv
    folder, port = cell.cell_dir, f"--port={cell.master_port}"
    common = (PYTHON, "-m", "runner.node.ray", folder, "--gpus=8", port)
    assert first == (*common, "--address=10.2.201.1", f"--other={cell.hosts[1]}=10.2.201.2")
    assert other == (*common, "--address=10.2.201.2", "--node=1", "--head=10.2.201.1")
    assert cell.world_size == 1 and cell.launch.head is None


def test_a_node_alone_meets_nobody(cluster):
    plan = build.build(request(cluster, tests=TESTS, node_counts=(1,), profile="gpu-vllm"), cluster.nodes)
    (argv,) = plan.cells[0].launch.argv
    assert argv and not [word for word in argv if word.startswith(("--port", "--other", "--head"))]


def test_the_nodes_of_a_cell_have_one_secret_which_no_plan_and_no_other_attempt_has(plan, tmp_path):
    (cell,) = plan.cells
    transport = agents.Agents(RunDir(tmp_path), "/tmp/ssh_config")
    attempts = [transport._sessions(plan, cell, None, False) for _ in range(2)]
    secrets = [{session.request["secrets"][ray.TOKEN] for session in sessions} for sessions in attempts]
    assert [len(each) for each in secrets] == [1, 1] and not secrets[0] & secrets[1]
    assert all(re.fullmatch("[0-9a-f]{64}", each) for one in secrets for each in one)
    assert not any(each in json.dumps(plan.to_dict()) for one in secrets for each in one)


def test_other_cells_have_none(cluster, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "t")
    plan = build.build(request(cluster, node_counts=(2,)), cluster.nodes)
    assert agents.secrets(plan.cells) == {"HF_TOKEN": "t"}


@pytest.fixture
def job(cluster):
    nodes = tuple(replace(node, backend="slurm") for node in cluster.nodes[:2])
    asked = request(cluster, tests=TESTS, backend="slurm", node_counts=(2,), slurm={}, named=False, profile="gpu-vllm")
    return allocations.prepare(
        build.build(asked, nodes), "name", build.build(asked, nodes).cells, None, True, ("node001", "node002"), None, {}
    )


def test_a_jobs_file_names_the_secret_and_does_not_hold_it(job):
    script = render(job, allocations.slurm_settings.Settings())
    assert f"#SBATCH --export={ray.TOKEN}\n" in script
    assert not re.search("[0-9a-f]{64}", script)


def test_an_agent_in_a_job_starts_its_nodes_supervisor_with_the_inventorys_addresses(job):
    step = StepRequest.from_json(job.steps[0].request)
    argvs = []
    for name in ("node002", "node001"):
        here = {"SLURM_STEP_NODELIST": "node[001-002]", "SLURMD_NODENAME": name}
        found, _ = slurm_step.placed(step, here, lambda: None, lambda: ())
        argvs.append(found.argv)
    other, first = argvs
    assert "--address=10.2.201.1" in first and "--other=fukushimadc-02-hgx-0002=10.2.201.2" in first
    assert "--address=10.2.201.2" in other and {"--node=1", "--head=10.2.201.1"} <= {*other}
