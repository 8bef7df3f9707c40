"""Choosing nodes, what running agents are told, and what a cell's end means."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from runner.cluster import nccl
from runner.cluster.reasons import GIVEN_UP
from runner.errors import InfrastructureError
from runner.failures import Problem
from runner.launch import preflight, watch
from runner.launch.talk import AgentSession
from runner.node.protocol import STACKS_S, Line, Outcome, Started
from runner.results import celldir
from runner.results.status import each_error


def outcome(rc: int | None = 1, stderr: list[str] | None = None, ended: bool = False, **more) -> Outcome:
    ranks = {"rank0": {"started": True, "ended": ended, "stderr": stderr or []}}
    plain = {"message": "outcome", "rc": rc, "error": None, "stopped": None, "ranks": ranks, "engine_stderr": []}
    return Outcome.from_json({**plain, **more})


def sessions(*names: str) -> list[AgentSession]:
    return [AgentSession(name, (), {}, rc=0, last_output=time.monotonic()) for name in names]


DOWN = Problem("unreachable", "no route to it")
LATE = Problem("clock", "its clock is 90 s behind the controller's")


def test_the_first_n_of_the_inventory_are_taken(cluster):
    nodes, passed = preflight.choose(cluster.nodes, 2, {"fukushimadc-02-hgx-0005": [DOWN]}, skip_bad=False)
    assert [n.alias for n in nodes] == ["node001", "node002"] and passed == ()


def test_all_bad_nodes_are_named_at_once(cluster):
    problems = {
        cluster.nodes[1].name: [DOWN],
        cluster.nodes[3].name: [Problem("disk_full", "0.1 GiB free"), LATE],
        cluster.nodes[7].name: [DOWN],
    }
    with pytest.raises(InfrastructureError) as error:
        preflight.choose(cluster.nodes, 4, problems, skip_bad=False)
    text = str(error.value)
    assert "2 of 4 nodes are bad" in text and "--skip-bad-nodes" in text
    assert "node002 (fukushimadc-02-hgx-0002): no route to it" in text and "node008" not in text
    assert f"node004 (fukushimadc-02-hgx-0004): 0.1 GiB free; {LATE.message}" in text
    assert error.value.exit_code == 3
    told = [(bad["alias"], bad["kind"], bad["message"]) for bad in error.value.nodes]
    assert told == [
        ("node002", "unreachable", "no route to it"),
        ("node004", "disk_full", "0.1 GiB free"),
        ("node004", "clock", LATE.message),
    ]
    assert error.value.kind is None, "they are of several kinds"


def test_good_nodes_take_the_place_of_bad_ones_and_the_report_says_so(cluster):
    problems = {cluster.nodes[1].name: [DOWN], cluster.nodes[7].name: [DOWN]}
    nodes, passed = preflight.choose(cluster.nodes, 4, problems, skip_bad=True)
    assert [n.alias for n in nodes] == ["node001", "node003", "node004", "node005"]
    (bad,) = passed  # node008 was not needed
    assert bad == {"host": cluster.nodes[1].name, "alias": "node002", "kind": DOWN.kind, "message": DOWN.message}


def test_too_few_good_nodes_is_an_error_even_when_skipping(cluster):
    with pytest.raises(InfrastructureError, match="7 of 8 nodes are good, 8 required") as error:
        preflight.choose(cluster.nodes, 8, {cluster.nodes[2].name: [DOWN]}, skip_bad=True)
    assert error.value.kind == "unreachable"


class Clock(SimpleNamespace):
    asked = False


def cell_run(cluster, **changes) -> watch.CellRun:
    launch = SimpleNamespace(head=changes.pop("head", None), files={})
    cell = SimpleNamespace(launch=launch, hosts=("a", "b"), params={"timeout_s": 60})
    run = watch.CellRun(cell, Clock(), lambda *_: None, lambda *_: None, deadline=time.monotonic() + 60)
    run.sessions = sessions("a", "b")
    for session in run.sessions:
        session.rc = None
    return run


def test_a_cell_is_complete_only_when_every_node_says_so(cluster):
    run = cell_run(cluster)
    run.receive(run.sessions[0], outcome(rc=0, ended=True))
    assert run.state()[0] == "failed"
    run.receive(run.sessions[1], outcome(rc=0, ended=True))
    assert run.state() == ("complete", None)


def test_others_are_stopped_soon_after_a_failure(cluster):
    run = cell_run(cluster)
    assert run.next_word(run.sessions[0]) is None
    run.receive(run.sessions[1], outcome(rc=1))
    run.first_failure -= watch.SETTLE_S + 0.1
    assert run.next_word(run.sessions[0]) == "stop"


def test_a_cell_that_overruns_is_asked_where_it_stands_and_is_incomplete(cluster):
    run = cell_run(cluster)
    run.deadline = time.monotonic() - 1
    assert run.next_word(run.sessions[0]) == "stacks"  # where do you stand? then
    run.reason_at -= STACKS_S
    assert run.next_word(run.sessions[0]) == "stop"
    for session in run.sessions:
        run.receive(session, outcome(rc=None, stopped="stop"))
    state, error = run.state()
    assert (state, error["kind"], error["host"]) == ("incomplete", "timed_out", None)
    assert error["message"] == "not finished within its limit of 60 s"


def test_a_silent_node_ends_the_cell_and_is_named(cluster):
    run = cell_run(cluster)
    run.sessions[1].last_output -= 100
    assert run.next_word(run.sessions[0]) == "stop"
    run.receive(run.sessions[0], outcome(rc=None, stopped="stop"))
    error = {"kind": "hung", "message": "b has not answered for 30 s", "host": "b", "stderr": []}
    assert run.state() == ("incomplete", error)
    run.receive(run.sessions[1], outcome(rc=None, stopped="stop"))  # awake again, too late
    assert run.state() == ("incomplete", error)


def test_two_nodes_that_fail_together_both_have_an_error(cluster):
    """One is paused, and a rank is killed on the other: the first to be known is told at once."""
    run = cell_run(cluster)
    told: list[tuple[str, str]] = []
    run.on_failure = lambda error: told.append((error["host"], error["kind"]))
    run.receive(run.sessions[1], outcome(rc=-9))
    run.first_failure -= watch.SETTLE_S + 0.1
    run.sessions[1].rc = 0
    for _ in range(3):
        run.looked = 0
        assert run.next_word(run.sessions[0]) == "stop"
    assert told == [("b", "rank_killed")], "within seconds, once, whatever else is silent"
    run.sessions[0].rc = GIVEN_UP
    state, error = run.state()
    assert (state, [(one["host"], one["kind"]) for one in each_error(error)]) == (
        "failed",
        [("a", "hung"), ("b", "rank_killed")],
    )


def test_a_rank_that_dies_beside_a_silent_node_is_not_lost(cluster):
    run = cell_run(cluster)
    told: list[str] = []
    run.on_failure = lambda error: told.append(error["host"])
    run.sessions[0].last_output -= 100
    assert run.next_word(run.sessions[0]) == "stop"
    run.receive(run.sessions[1], outcome(rc=-9))
    state, error = run.state()
    assert (state, told) == ("incomplete", ["a"])
    assert [(one["host"], one["kind"]) for one in each_error(error)] == [("a", "hung"), ("b", "rank_killed")]


def progress(run, done: int) -> None:
    event = json.dumps({"event": "progress", "done": done, "total": 9, "phase": "x"})
    run.receive(run.sessions[0], Line("rank0.jsonl", event))


def test_ranks_that_fall_silent_after_their_first_step_hang(cluster):
    run = cell_run(cluster)
    progress(run, done=0)
    run.stall_s = -1.0  # any silence is too long
    assert run.next_word(run.sessions[0]) is None  # loading takes what it takes
    progress(run, done=1)
    run.looked = 0
    assert run.next_word(run.sessions[0]) == "stacks"
    for session in run.sessions:
        run.receive(session, outcome(rc=None, stopped="stop"))
    assert run.state()[1]["kind"] == "rank_hung" and run.state()[1]["host"] is None


def test_ctrl_c_does_not_wait_for_stacks(cluster):
    run = cell_run(cluster)
    run.deadline = time.monotonic() - 1
    assert run.next_word(run.sessions[0]) == "stacks"
    run.stop.asked = True
    assert run.next_word(run.sessions[0]) == "stop"
    assert run.state() == ("cancelled", None)


def test_slurms_time_limit_leaves_a_cell_incomplete(cluster):
    run = cell_run(cluster)
    for session in run.sessions:
        run.receive(session, outcome(rc=None, stopped="time limit"))
    state, error = run.state()
    assert (state, error["kind"], error["host"]) == ("incomplete", "time_limit", None)


def test_a_launcher_goes_when_every_node_is_ready_and_the_nodes_are_done_when_it_is(cluster):
    run = cell_run(cluster, head=("deepspeed",))
    launcher = AgentSession(celldir.LAUNCHER, (), {}, last_output=time.monotonic())
    run.sessions.append(launcher)
    run.receive(run.sessions[0], Started())
    assert run.next_word(launcher) is None
    run.receive(run.sessions[1], Started())
    assert run.next_word(launcher) == "go"
    run.receive(launcher, outcome(rc=0, ended=True))
    assert run.next_word(run.sessions[0]) == "done"


# --- the NCCL of the ranks ---

GOOD = nccl.Built("/opt/nccl", "2.30.7")
NEWER = nccl.Built("/opt/nccl", "2.31.2")
TOO_OLD = nccl.Built("/opt/nccl", "2.26.2", "NCCL 2.26.2 in /opt/nccl is too old")


@pytest.mark.parametrize(
    ("built", "root", "reason"),
    [
        ([GOOD, GOOD, GOOD], "/opt/nccl", None),
        ([None, None, None], None, None),
        (
            [GOOD, None, GOOD],
            None,
            "node002 has no built one: run `runner setup -i inventory/fukushimadc-02 --tags nccl_build`",
        ),
        (
            [None, GOOD, None],
            None,
            "node[001,003] have no built one: run `runner setup -i inventory/fukushimadc-02 --tags nccl_build`",
        ),
        ([TOO_OLD, TOO_OLD, TOO_OLD], None, "NCCL 2.26.2 in /opt/nccl is too old"),
        (
            [GOOD, NEWER, GOOD],
            None,
            "nodes have built different ones, 2.30.7 in /opt/nccl on node[001,003], 2.31.2 in /opt/nccl on node002: "
            "run `runner setup -i inventory/fukushimadc-02 --tags nccl_build`",
        ),
    ],
)
def test_the_built_nccl_is_the_default_where_every_node_has_the_same(cluster, built, root, reason):
    nodes = cluster.nodes[:3]
    have = {node.name: each for node, each in zip(nodes, built, strict=True) if each}
    assert preflight.built_on_all(nodes, have) == (root, reason)
