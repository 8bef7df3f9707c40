"""What nodes answer before anything starts, and what `runner check` makes of it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import replace

import mpi_probe
import pytest
from plans import request

from conftest import NAMES
from runner.cli import setup
from runner.cluster.reasons import setup_command
from runner.errors import UsageError
from runner.failures import Problem
from runner.launch import agents, carry, preflight, talk
from runner.launch.signals import Stop
from runner.launch.watch import CellRun
from runner.node import check
from runner.node.protocol import Checked
from runner.node.requests import CheckRequest
from runner.plan import build, config
from runner.provision.board import Board, exit_code, failures, table, warnings
from runner.provision.playbook import Event
from runner.report.progress import Display
from runner.results.celldir import LAUNCHER
from runner.results.rundir import RunDir

FACTS = {"env": {}, "gpus": [], "nccl_built": None}


@pytest.fixture
def answering(monkeypatch):
    """Nodes that answer what `answers` has for them, else that all is well; and the requests they got."""
    answers, requests = {}, []

    def ask(nodes, backend, ssh_config, request):
        requests.append(([node.name for node in nodes], request))
        given = {node.name: answers.get(node.name, {}) for node in nodes}
        return {n: Checked(**{"time_s": time.time(), "facts": FACTS, **values}) for n, values in given.items()}, {}

    monkeypatch.setattr(talk, "ask", ask)
    monkeypatch.setattr(preflight.facts, "comparable", lambda seen: {})
    return answers, requests


def test_swapped_addresses_stop_a_benchmark_and_name_the_node_that_has_them(cluster, answering):
    answers, requests = answering
    answers[NAMES[3]] = {"addresses": {NAMES[0]: ["10.2.201.2"], NAMES[1]: ["10.2.201.1"]}}
    found = preflight.readiness(cluster.nodes, "torchrun", None)
    ((name, (problem,)),) = found.items()
    assert name == NAMES[3] and problem.kind == "wrong_address"
    assert problem.message.startswith(f"has {NAMES[0]} at 10.2.201.2, which is node002; {NAMES[1]} at 10.2.201.1")
    assert {*NAMES, "node001", "node008"} <= {*requests[0][1].names}


def test_nodes_that_differ_are_each_asked_for_what_they_are_declared_to_have(cluster, answering):
    small = replace(cluster.nodes[2], gpus=4, min_free_disk_gib=9.0)
    preflight.readiness([*cluster.nodes[:2], small], "torchrun", None)
    assert [(names, r.gpus, r.min_free_disk_gib) for names, r in answering[1]] == [
        (NAMES[:2], 8, cluster.nodes[0].min_free_disk_gib),
        (NAMES[2:3], 4, 9.0),
    ]


@pytest.mark.parametrize(("wanted", "kinds"), [("built", ["environment_missing"]), ("torch", []), (None, [])], ids=str)
def test_a_built_nccl_that_is_wanted_and_not_there_is_known_before_a_benchmark(cluster, tmp_path, wanted, kinds):
    here = {"backend": "local", "inventory": "inventory/lab", "scratch": str(tmp_path), "device": "cpu", "gpus": 0}
    node = replace(cluster.nodes[0], **here, min_free_disk_gib=0.0, nccl=wanted, nccl_root=str(tmp_path / "nccl"))
    found = preflight.readiness([node], "torchrun", None).get(node.name, ())
    assert [problem.kind for problem in found] == kinds
    for problem in found:
        assert problem.message.startswith(f"no NCCL is built in {tmp_path}/nccl: run `runner setup -i inventory/lab")


def test_nodes_that_use_another_nccl_are_asked_for_theirs(cluster, answering):
    built = replace(cluster.nodes[2], nccl="built", nccl_root="/srv/nccl")
    preflight.readiness([*cluster.nodes[:2], built], "torchrun", None)
    assert [(names, request.nccl_root) for names, request in answering[1]] == [
        (NAMES[:2], None), (NAMES[2:3], "/srv/nccl"),
    ]  # fmt: skip


def test_each_node_is_asked_for_the_profile_where_it_has_it(cluster, answering):
    elsewhere = {node.name: f"/{'sw' if node.name == NAMES[2] else 'opt'}/rl/bin/python" for node in cluster.nodes[:3]}
    nodes = [replace(node, pythons={"gpu-vllm": elsewhere[node.name]}) for node in cluster.nodes[:3]]
    access = preflight.NodeAccess("ssh", "cuda", "torchrun", ("torch",), None, profile="gpu-vllm")
    access.ask(nodes)
    assert [(names, request.profile.python) for names, request in answering[1]] == [
        (NAMES[:2], "/opt/rl/bin/python"), (NAMES[2:3], "/sw/rl/bin/python"),
    ]  # fmt: skip
    assert all({*NAMES[:3]} <= {*request.names} for _, request in answering[1]), "addresses are compared over all"


# --- what an MPI test needs ---


PROGRAM = "/opt/nccl/current/bin/all_reduce_perf"


@pytest.fixture
def mpi_access(monkeypatch):
    """Access to nodes over ssh for an MPI test; this controller has Open MPI 4.1.4."""
    mpi_probe.register(monkeypatch)
    monkeypatch.setattr(preflight.mpi, "version", lambda: "4.1.4")
    return preflight.NodeAccess("ssh", "cuda", "deepspeed", (mpi_probe.NAME,), None, nccl_tests=(PROGRAM,))


def test_nodes_are_asked_for_what_an_mpi_test_needs_and_for_nothing_of_the_others_engine(
    cluster, answering, mpi_access
):
    mpi_access.ask(cluster.nodes[:2])
    ((_, request),) = answering[1]
    assert list(request.nccl_tests) == [PROGRAM]
    assert request.open_mpi and not request.slurm_mpi and not request.packages
    scheduled = replace(cluster.nodes[0], backend="slurm")
    asked = preflight.checks(scheduled, "cuda", "torchrun", (mpi_probe.NAME,))
    assert asked.slurm_mpi and not asked.open_mpi


def test_another_open_mpi_than_the_controllers_is_told_for_its_node(cluster, answering, mpi_access):
    answers, _ = answering
    answers[NAMES[0]], answers[NAMES[1]] = {"open_mpi": "4.1.4"}, {"open_mpi": "4.1.2"}
    ((name, (problem,)),) = mpi_access.ask(cluster.nodes[:2]).problems.items()
    assert name == NAMES[1] and problem.kind == "version_mismatch"
    assert problem.message.startswith("has Open MPI 4.1.2, this controller 4.1.4")
    assert not mpi_access.ask(cluster.nodes[1:2]).problems  # on one node the controller's takes no part


def test_a_controller_without_mpirun_is_told_what_to_install_before_anything_starts(cluster, mpi_access, monkeypatch):
    tests = {mpi_probe.NAME: config.load_test("torch", {}).model_dump()}
    monkeypatch.setenv("PATH", "/nowhere")
    alone = build.build(request(cluster, tests=tests, node_counts=(1,)), cluster.nodes)
    carry.require_launcher(alone)  # which the node itself starts
    with pytest.raises(UsageError, match=r"engine mpirun starts mpirun on this machine.*apt install openmpi-bin"):
        carry.require_launcher(build.build(request(cluster, tests=tests, node_counts=(1, 2)), cluster.nodes))


def test_a_launcher_here_needs_nothing_of_the_nodes_and_is_the_one_whose_version_was_compared(
    cluster, mpi_access, tmp_path, monkeypatch
):
    mpirun, sent = tmp_path / "mpirun", []
    mpirun.write_text("")
    mpirun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(agents, "converse", lambda sessions, *_, **__: sent.extend(sessions))
    nodes = [replace(node, python="/only/on/nodes/python") for node in cluster.nodes]
    tests = {mpi_probe.NAME: config.load_test("torch", {}).model_dump()}
    built = build.build(request(cluster, tests=tests, node_counts=(2,)), nodes)
    watch = CellRun(built.cells[0], Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
    monkeypatch.setattr(agents.Agents, "_sweep", lambda *_: None)
    agents.Agents(RunDir.create(tmp_path, built.to_dict()), "ssh_config").converse(
        built, built.cells[0], watch, None, None
    )
    (launcher,) = [session for session in sent if session.name == LAUNCHER]
    assert launcher.argv[0] == sys.executable and launcher.request["argv"][0] == str(mpirun)


def test_missing_nccl_tests_are_told_with_the_command_that_builds_them(cluster, tmp_path, mpi_access):
    here = {"backend": "local", "inventory": "inventory/lab", "scratch": str(tmp_path), "device": "cpu", "gpus": 0}
    node = replace(cluster.nodes[0], **here, min_free_disk_gib=0.0, nccl_root=str(tmp_path / "nccl"))
    program = tmp_path / "nccl" / "current" / "bin" / "all_reduce_perf"
    access = replace(mpi_access, backend="local", device="cpu", nccl_tests=[str(program)])

    def told():
        return [problem for problem in access.ask([node]).problems.get(node.name, ()) if "nccl" in problem.message]

    (problem,) = told()
    assert problem.kind == "environment_missing"
    assert problem.message.startswith(
        f"no nccl-tests in {tmp_path}/nccl/current/bin: run `{setup_command(node, 'nccl_build')}"
    )
    program.parent.mkdir(parents=True)
    shutil.copy("/bin/true", program)  # a program that calls no MPI
    (problem,) = told()
    assert "built without MPI" in problem.message and "nccl_build_mpi: true" in problem.message
    program.write_text("#!/bin/sh\n")  # what cannot be read is unknown
    assert not told()
    access = replace(access, nccl_tests=[str(program.with_name("alltoallv_perf"))])
    assert told()[0].message.startswith(f"no alltoallv_perf in {program.parent}, whose nccl-tests are too old for it: ")
    assert "nccl_build_tests_version run `runner setup" in told()[0].message


def test_nccl_tests_that_were_asked_for_elsewhere_are_looked_for_there(cluster, tmp_path, mpi_access):
    here = {"backend": "local", "inventory": "inventory/lab", "scratch": str(tmp_path), "device": "cpu", "gpus": 0}
    node = replace(cluster.nodes[0], **here, min_free_disk_gib=0.0)
    access = replace(mpi_access, backend="local", device="cpu", nccl_tests=["/nowhere/current/bin/all_reduce_perf"])
    (problem,) = [one for one in access.ask([node]).problems[node.name] if "nccl" in one.message]
    assert problem.message == (
        f"no nccl-tests in /nowhere/current/bin: run `{setup_command(node, 'nccl_build')}` with "
        "nccl_build_root: /nowhere, or give another --set nccl.root"
    )


def test_an_agent_answers_with_the_addresses_it_has(tmp_path):
    request = CheckRequest(version="0", scratch=str(tmp_path), min_free_disk_gib=0.0, names=["10.1.2.3", "localhost"])
    assert check.check(request).addresses == {"10.1.2.3": ["10.1.2.3"]}


# --- in the table of `runner check` ---


def board_of(cluster, monkeypatch, problems, *events):
    board = Board({node.name: node.alias for node in cluster.nodes})
    board.events += events
    monkeypatch.setattr(preflight, "readiness", lambda nodes, *_: {n: p for n, p in problems.items()
                                                                  if n in {node.name for node in nodes}})  # fmt: skip
    setup._add_readiness(board, cluster.nodes, None)
    return board


def event(name, role, status):
    return Event("", name, "Verify", role, "verify", "", status, 0.1, problems=({"what": "wrong"},))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("clock", "its clock is 41 s ahead of this machine's"),
        ("disk_full", "0.5 GiB free in /var/tmp/shakedown, 466 GiB required"),
        ("wrong_address", "has a at 10.0.0.2, which is node002: correct its /etc/hosts or DNS"),
        ("environment_missing", "lacks rsync"),
        ("unknown", "cannot write to /var/tmp/shakedown: Read-only file system"),
    ],
)
def test_what_bench_refuses_is_a_failure_of_its_node_alone(cluster, monkeypatch, kind, text):
    board = board_of(cluster, monkeypatch, {NAMES[1]: [Problem(kind, text)]})
    assert [(f.nodes, f.line()) for f in failures(board)] == [("node002", f"bench: {text}")]
    assert board.bad() == {NAMES[1]} and exit_code(board, "complete") == 1


def test_a_run_in_progress_is_told_and_is_no_fault(cluster, monkeypatch):
    board = board_of(cluster, monkeypatch, {name: [Problem("in_use", "in use by run 7")] for name in NAMES[:2]})
    assert warnings(board) == [("node[001-002]", "bench", "in use by run 7")]
    assert not board.bad() and exit_code(board, "complete") == 0


@pytest.mark.parametrize(("kind", "role"), setup._TOLD_BY.items())
def test_what_a_role_has_told_in_more_detail_is_not_told_again(cluster, monkeypatch, kind, role):
    problems = {name: [Problem(kind, "the same")] for name in NAMES[:2]}
    board = board_of(cluster, monkeypatch, problems, event(NAMES[0], role, "failed"))
    assert [(f.nodes, f.what) for f in failures(board)] == [("node001", "wrong"), ("node002", "the same")]


@pytest.mark.parametrize(("status", "lines"), [("failed", ["wrong"]), ("ok", ["no NCCL is built: run"])])
def test_what_a_role_that_failed_would_mend_is_told_by_that_role(cluster, monkeypatch, status, lines):
    remedy = setup_command(cluster.nodes[0], "nccl_build")
    problems = {NAMES[0]: [Problem("environment_missing", f"no NCCL is built: run `{remedy}`")]}
    board = board_of(cluster, monkeypatch, problems, event(NAMES[0], "nccl_build", status))
    assert [failure.what.split(" `")[0] for failure in failures(board)] == lines


def test_a_node_without_an_answer_is_not_asked_again(cluster, monkeypatch):
    silent = event(NAMES[0], "ssh_mesh", "unreachable")
    board = board_of(cluster, monkeypatch, {NAMES[0]: [Problem("hung", "does not answer")]}, silent)
    assert len(failures(board)) == 1 and "node001  NO ANSWER  –" in table(board)
