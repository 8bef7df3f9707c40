"""What controller and agents send each other: written and read back, by this version and by others."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.node import protocol, requests
from runner.node.protocol import (
    Checked,
    Cleaned,
    Environment,
    Line,
    Linked,
    Making,
    Message,
    Outcome,
    Placed,
    RankEnd,
    RankStack,
    Reached,
    Started,
    Stopped,
    Swept,
    Word,
)
from runner.node.requests import (
    CellRequest,
    CheckRequest,
    CleanRequest,
    EnvironmentRequest,
    LinksRequest,
    ProfileCheck,
    StepRequest,
    SweepRequest,
)

CHECK = CheckRequest(
    "1.0", "/scratch", 10.0, ["torch"], ["rsync"], 8, names=["gpu-2"], nccl_tests=["/n/x_perf"], open_mpi=True,
    profile=ProfileCheck("rl", "/rl/bin/python", "run `it`", {"ab": "cpu-smoke"}, ["verl"]), shared={"/w/f": "x"}, modules=["cuda"],
)  # fmt: skip
OF_CELL = {"modules": ["cuda/12.4"], "run_id": "r", "cell": "c", "attempt": 2, "marker": "r/c"}
NODE = CellRequest(
    **OF_CELL, host="n1", scratch="/scratch", cell_dir="/scratch/r/c", job={"a": 1}, argv=["python"], env={"A": "b"}
)
HEAD = CellRequest(
    **OF_CELL, host="launcher", scratch=None, cell_dir="/r/c", argv=["deepspeed"], env={}, isolated=True, hold=True
)
STEP = StepRequest(
    **OF_CELL, engine="torchrun", gpus_per_node=8, master_port=20000, timeout_s=60.0, scratch="/scratch",
    shared_root="/r/nodes", hosts=["a2", "a1"], names={"a1": "gpu-1"}, env={}, job={"a": 1}, check=CHECK,
    environment={"packages.torch": "2.13.0", "os": None},
)  # fmt: skip


def through_json(value):
    return json.loads(json.dumps(value))


LINKS = LinksRequest([29500], {"n2": "10.0.0.2"}, {"A": "b"})
ENVIRONMENT = EnvironmentRequest("/scratch/env", "ab", "pip", {"requirements.txt": "a==1"}, "3.9", {"A": "b"})


@pytest.mark.parametrize(
    "request_",
    [CHECK, NODE, HEAD, STEP, SweepRequest("r/c"), CleanRequest("/scratch", "r"), LINKS, ENVIRONMENT],
)
def test_an_agent_reads_the_request_that_was_sent(request_):
    assert requests.read_request(through_json(request_.to_json())) == request_


def test_a_request_holds_nothing_that_its_receiver_has_no_use_for():
    assert {"isolated", "hold", "check"}.isdisjoint(NODE.to_json())
    assert {"job", "secrets", "rendezvous_port"}.isdisjoint(HEAD.to_json())
    assert "kind" not in STEP.to_json()["check"] and STEP.to_json()["slurm"] is True


def test_a_job_of_another_version_that_waited_in_slurms_queue_is_read():
    earlier = through_json(STEP.to_json())
    for key in ("attempt", "check", "environment", "names", "addresses", "node_env", "hosts"):
        earlier.pop(key, None)
    read = requests.read_request({**earlier, "of_a_later_version": 1})
    assert isinstance(read, StepRequest)
    assert (read.attempt, read.check, read.names, read.hosts) == (1, None, {}, ())


@pytest.mark.parametrize("value", [{}, {"kind": "dance"}])
def test_an_unknown_request_is_named(value):
    with pytest.raises(requests.UnknownRequest, match=f"unknown request {value.get('kind')!r}"):
        requests.read_request(value)


OUTCOME = Outcome(
    host="n1", attempt=2, rc=-9, stopped=Word.STOP, error="e", kind="rank_killed", oom_kills=1,
    stacks={"rank0": RankStack("S", 1.5, ["a.py:1 f"])}, started_s=1.0, ended_s=2.0,
    ranks={"rank0": RankEnd(True, False, ["last words"])}, engine_stderr=["x"], kernel=["k"],
)  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        Placed("7", ["a", "b"], "a"), Started(17), Line("rank0.stdout", "\"é\u2028\""), protocol.Alive(), OUTCOME,
        Checked(["p"], ["disk_full"], 3.0, {"gpus": []}, {"gpu-2": ["10.0.0.2"]}), Swept(), Cleaned(True),
        Linked([{"name": "eth0"}], "570", {"/f": "powersave"}, [29500], "nft", "inet filter input"),
        Reached({"n2": {"29500": "refused"}}), Making(1, 2, "x"), Environment("/p", "3.11.2", True, "no", "disk_full"),
    ],
)  # fmt: skip
def test_a_controller_reads_the_message_that_was_sent(message):
    assert protocol.read_message(json.dumps(message.to_json())) == message


def test_outcome_json_has_the_keys_that_runs_before_have():
    keys = "schema host attempt rc stopped error kind oom_kills stacks started_s ended_s ranks engine_stderr kernel"
    assert list(OUTCOME.to_file()) == [*keys.split(), "accused"]
    assert through_json(OUTCOME.to_file())["ranks"]["rank0"] == {
        "started": True, "ended": False, "stderr": ["last words"], "code": None, "ended_s": 0.0,
    }  # fmt: skip


def test_an_outcome_of_another_version_is_read_as_far_as_it_goes():
    earlier = Outcome.from_json({"rc": 0, "error": None, "ranks": {"rank0": {"ended": True, "later": 1}}, "later": 2})
    assert earlier.ended_well and earlier.attempt == 1 and earlier.stacks == {}
    assert earlier.ranks == {"rank0": RankEnd(ended=True)}
    assert Outcome.from_json({"rc": 0, "error": None, "stacks": None}).ended_well
    assert not Outcome.from_json({"rc": 0, "error": "disk full"}).ended_well
    assert not Outcome().ended_well


def test_a_message_of_a_kind_that_is_not_known_is_a_message_all_the_same():
    message = protocol.read_message('{"message": "of a later version", "a": 1}')
    assert type(message) is Message


@pytest.mark.parametrize("line", ["", "Welcome to node001", "[1]", "null", '{"message": "out', "{}", '{"message": []}'])
def test_what_is_no_message_is_none(line):
    assert protocol.read_message(line) is None


@given(st.binary(max_size=40))
def test_no_line_is_a_surprise(line):
    assert protocol.read_message(line) is None


def test_every_word_that_slurm_passes_on_has_a_signal_and_none_has_two_meanings():
    assert [protocol.slurm_signal(word) for word in (Word.STOP, Word.STACKS, Stopped.TIME_LIMIT)] == [
        "USR2", "URG", "USR1",
    ]  # fmt: skip
    assert protocol.SLURM_WORDS[signal.SIGTERM] == Word.STOP


def test_timings_leave_room_for_each_other():
    assert 5 * protocol.HEARTBEAT_S <= protocol.SILENCE_S and 5 * protocol.ALIVE_S <= protocol.SILENCE_S
    assert protocol.PATIENCE_S > 3 * protocol.GRACE_S and protocol.STACKS_S > protocol.STACKS_ANSWER_S
    assert protocol.POLL_S < protocol.HEARTBEAT_S


def test_it_needs_the_standard_library_only():
    source = Path(protocol.__file__).read_text()
    imported = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert [line for line in imported if "runner" in line] == ["from runner.system import process"]
