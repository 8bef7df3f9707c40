"""Choosing nodes, telling a culprit from its victims, and what a cell's end means."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from runner import bench, blame, cells
from runner.backends import Talk
from runner.errors import InfrastructureError


def outcome(rc: int | None = 1, stderr: list[str] | None = None, ended: bool = False, **more) -> dict:
    ranks = {"rank0": {"started": True, "ended": ended, "stderr": stderr or []}}
    plain = {"message": "outcome", "rc": rc, "error": None, "stopped": None, "ranks": ranks, "engine_stderr": []}
    return {**plain, **more}


def talks(*names: str) -> list[Talk]:
    return [Talk(name, (), {}, rc=0, heard=time.monotonic()) for name in names]


def test_the_first_n_of_the_inventory_are_taken(cluster):
    nodes, passed = bench.choose(cluster.nodes, 2, {"fukushimadc-02-hgx-0005": "down"}, skip_bad=False)
    assert [n.alias for n in nodes] == ["node001", "node002"] and passed == ()


def test_all_bad_nodes_are_named_at_once(cluster):
    problems = {
        cluster.nodes[1].name: "down",
        cluster.nodes[3].name: "its host key changed",
        cluster.nodes[7].name: "down",
    }
    with pytest.raises(InfrastructureError) as error:
        bench.choose(cluster.nodes, 4, problems, skip_bad=False)
    text = str(error.value)
    assert "2 of 4 nodes are bad" in text and "--skip-bad-nodes" in text
    assert "node002 (fukushimadc-02-hgx-0002): down" in text and "node004" in text and "node008" not in text
    assert error.value.exit_code == 3


def test_good_nodes_take_the_place_of_bad_ones_and_the_report_says_so(cluster):
    problems = {cluster.nodes[1].name: "down", cluster.nodes[7].name: "down"}
    nodes, passed = bench.choose(cluster.nodes, 4, problems, skip_bad=True)
    assert [n.alias for n in nodes] == ["node001", "node003", "node004", "node005"]
    assert passed == ("node002 (fukushimadc-02-hgx-0002): down",)  # node008 was not needed


def test_too_few_good_nodes_is_an_error_even_when_skipping(cluster):
    with pytest.raises(InfrastructureError, match="7 of 8 nodes are good, 8 wanted"):
        bench.choose(cluster.nodes, 8, {cluster.nodes[2].name: "down"}, skip_bad=True)


def test_the_rank_that_died_first_hand_is_blamed_not_those_that_lost_it():
    lost = ["RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234"]
    said = blame.blame(
        talks("a", "b", "c"),
        {
            "a": outcome(stderr=lost),
            "b": outcome(rc=-9, stderr=["[rank1]: KeyboardInterrupt"]),
            "c": outcome(stderr=lost),
        },
    )
    assert said["host"] == "b" and said["message"] == "the engine was killed by SIGKILL"


def test_torchruns_table_of_failures_tells_which_rank_failed_first_and_how():
    table = (
        "Failures:\n[1]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 122)\n"
        "Root Cause (first observed failure):\n[0]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 123)\n"
    ).splitlines()
    warning = "[W1121 04:58:56.598321713 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved."
    ranks = {f"rank{i}": {"started": True, "ended": False, "stderr": [warning]} for i in range(2)}
    said = blame.blame(talks("a"), {"a": outcome(rc=1, ranks=ranks, engine_stderr=table)})
    assert said["message"] == "rank1 was killed by SIGKILL"


def test_without_such_a_table_the_rank_that_said_something_is_shown():
    ranks = {"rank0": {"started": True, "ended": False, "stderr": []}}
    ranks["rank1"] = {"started": True, "ended": False, "stderr": ["ImportError: no accelerate"]}
    said = blame.blame(talks("a"), {"a": outcome(rc=None, ranks=ranks)})
    assert said["message"] == "rank1 ended too soon: ImportError: no accelerate"


def test_an_engine_that_never_started_a_rank_is_quoted():
    said = blame.blame(talks("a"), {"a": outcome(rc=1, ranks={}, engine_stderr=["No module named torch"])})
    assert said["message"] == "the engine died with status 1: No module named torch" and said["host"] == "a"


def test_a_launcher_that_fails_alone_is_quoted():
    pdsh = outcome(rc=2, ranks={}, engine_stderr=["pdsh@x: node001: ssh exited with exit code 2"])
    nodes = {"a": outcome(rc=None, stopped="done", ranks={})}
    said = blame.blame(talks("a", blame.LAUNCHER), {**nodes, blame.LAUNCHER: pdsh})
    assert said["host"] is None and "died with status 2: pdsh@x" in said["message"]


def test_a_traceback_names_its_host_and_is_shown():
    trace = ["Traceback (most recent call last):", "ValueError: bad"]
    said = blame.blame(talks("a", "b"), {"a": outcome(stderr=trace), "b": outcome(rc=None, stopped="stop")})
    assert said == {"message": "rank0 died with status 1: ValueError: bad", "host": "a", "stderr": trace}


def test_two_first_hand_failures_are_not_told_apart():
    said = blame.blame(talks("a", "b"), {"a": outcome(stderr=["x"]), "b": outcome(stderr=["y"])})
    assert said["host"] is None and "a, b" in said["message"]


def test_lost_peers_alone_blame_nobody():
    said = blame.blame(
        talks("a", "b"), {"a": outcome(stderr=["Connection closed by peer"]), "b": outcome(stopped="stop")}
    )
    assert said["host"] is None and "only lost peers are reported, by a" in said["message"]


def test_a_node_without_an_outcome_is_a_lost_connection():
    lost = ["Connection reset by peer"]
    said = blame.blame(talks("a", "b"), {"a": outcome(stderr=lost)})
    assert said["host"] == "b" and "lost the connection" in said["message"]


class Clock(SimpleNamespace):
    asked = False


def cell_run(cluster, **changes) -> cells.CellRun:
    launch = SimpleNamespace(head=changes.pop("head", None))
    cell = SimpleNamespace(launch=launch, hosts=("a", "b"), params={"timeout_s": 60})
    run = cells.CellRun(cell, Clock(), lambda *_: None, lambda *_: None, deadline=time.monotonic() + 60)
    run.talks = talks("a", "b")
    for talk in run.talks:
        talk.rc = None
    return run


def test_a_cell_is_complete_only_when_every_node_says_so(cluster):
    run = cell_run(cluster)
    run.hear(run.talks[0], outcome(rc=0, ended=True))
    assert run.state()[0] == "failed"
    run.hear(run.talks[1], outcome(rc=0, ended=True))
    assert run.state() == ("complete", None)


def test_others_are_stopped_soon_after_a_failure(cluster):
    run = cell_run(cluster)
    assert run.word(run.talks[0]) is None
    run.hear(run.talks[1], outcome(rc=1))
    run.first_failure -= cells.SETTLE_S + 0.1
    assert run.word(run.talks[0]) == "stop"


def test_a_cell_that_overruns_or_falls_silent_is_incomplete_and_says_why(cluster):
    run = cell_run(cluster)
    run.deadline = time.monotonic() - 1
    assert run.word(run.talks[0]) == "stop"
    assert run.state()[0] == "incomplete" and "limit of 60 s" in run.state()[1]["message"]
    run = cell_run(cluster)
    run.talks[1].heard -= 100
    assert run.word(run.talks[0]) == "stop"
    assert "b has not answered" in run.state()[1]["message"]


def test_a_launcher_goes_when_every_node_is_ready_and_the_nodes_are_done_when_it_is(cluster):
    run = cell_run(cluster, head=("deepspeed",))
    launcher = Talk(blame.LAUNCHER, (), {}, heard=time.monotonic())
    run.talks.append(launcher)
    run.hear(run.talks[0], {"message": "started"})
    assert run.word(launcher) is None
    run.hear(run.talks[1], {"message": "started"})
    assert run.word(launcher) == "go"
    run.hear(launcher, outcome(rc=0, ended=True))
    assert run.word(run.talks[0]) == "done"
