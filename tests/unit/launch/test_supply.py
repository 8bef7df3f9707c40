"""Data that are prepared while the ranks of the first cell import: what these wait for, and what ends them."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import NAMES, NodeAccess, Nodes, ended_session, planned, states

from runner.errors import InfrastructureError, Interrupted, UsageError
from runner.failures import Problem
from runner.launch import carry
from runner.launch import run as bench
from runner.launch.supply import Data
from runner.node.protocol import LAST_WORDS, Line, Outcome, Started, Word
from runner.report.progress import Display
from runner.results.rundir import RunDir
from runner.workloads.data import prepare as data_prepare

DIED = Problem("lost_connection", "the connection to it ended")


class Holding(Nodes):
    """A stand-in for nodes whose ranks import at once and then wait for their word; `seen` is what happened, in order.

    `unsendable` are nodes that no data can be sent to, `dies` one that ends while it waits, once.
    """

    def __init__(self, run: RunDir, unsendable: tuple[str, ...] = (), dies: str | None = None) -> None:
        super().__init__(run)
        self.unsendable, self.dies = unsendable, dies
        self.seen: list[str] = []
        self.importing, self.stopped = threading.Event(), threading.Event()
        self.while_held = lambda: None

    def send(self, planned, nodes, data, stopped):
        self.seen.append("sent")
        super().send(planned, nodes, data, stopped)
        return {name: DIED for name in self.unsendable}

    def converse(self, planned, cell, watch, data, context):
        if not watch.held:
            self.seen.append("not held")
            return super().converse(planned, cell, watch, data, context)
        self.seen.append("importing")
        self.tried.append((cell.id, cell.hosts, cell.master_port))
        watch.sessions = [SimpleNamespace(**vars(ended_session(host)), alive=True) for host in cell.hosts]
        for session in watch.sessions:
            session.rc, session.last_output = None, time.monotonic() + 1e6
            watch.receive(session, Started(1))
        watch.begin()
        line = '{"event": "progress", "done": 0, "total": 10, "phase": "loading"}'
        watch.receive(watch.sessions[0], Line("rank0.jsonl", line))
        assert watch.deadline == math.inf, "its time begins when it goes on"
        assert self.run.read_status()["cells"][cell.id]["progress"] is None
        self.importing.set()
        self.while_held()
        if self.dies:
            died, self.dies = self.dies, None
            watch.receive(
                next(one for one in watch.sessions if one.name == died),
                Outcome(error="GPU 3 fell off the bus", kind="gpu_failed"),
            )
        while not (word := watch.next_word(watch.sessions[0])):
            time.sleep(0.01)
        self.seen.append(str(word))
        if word == Word.GO:
            assert watch.deadline < math.inf
            assert watch.next_word(watch.sessions[-1]) == Word.GO
        stopped = word in LAST_WORDS
        if stopped:
            self.stopped.set()
        for session in watch.sessions:
            session.alive, session.rc = False, 1 if stopped else 0
            if session.name not in watch.outcomes:
                watch.receive(session, Outcome(rc=session.rc, stopped=word if stopped else None))
        return None


class Preparation:
    """The preparation of data that lasts until `may_end`, or fails, or is stopped."""

    def __init__(self, nodes: Holding, error: Exception | None = None) -> None:
        self.nodes, self.error, self.times = nodes, error, 0
        self.may_end: threading.Event = nodes.importing

    def __call__(self, stopped) -> None:
        self.times += 1
        while not self.may_end.wait(0.01):
            if stopped():
                raise Interrupted("interrupted while data was prepared")
        if self.error:
            raise self.error
        self.nodes.seen.append("prepared")


@pytest.fixture
def carried(cluster, tmp_path):
    """Makes a run whose cells train, on data that are not prepared yet."""

    def make(*, error=None, spares=0, retries=0, test="sft", counts=(2,), **faults):
        built = planned(cluster, tmp_path, spares=spares, counts=counts)
        built = replace(built, cells=tuple(replace(cell, test=test) for cell in built.cells))
        run = RunDir.create(tmp_path, built.to_dict())
        nodes = Holding(run, **faults)
        preparation = Preparation(nodes, error)
        policy = bench.Policy(retries, spares > 0)
        made = bench.Run(built, run, nodes, Display(quiet=True), Data("/data/x", preparation), policy, NodeAccess())
        made.stop.wait = lambda seconds: None
        return made, nodes, preparation

    return make


def test_ranks_import_while_data_is_prepared_and_go_on_once_every_node_has_it(carried):
    run, nodes, _ = carried(counts=(1, 2))
    run.execute({})
    assert nodes.seen == ["importing", "prepared", "sent", "go", "not held"]
    status = run.run.read_status()
    assert set(states(status).values()) == {"complete"}
    held, other = status["cells"].values()
    assert "phases" not in held or not held["phases"], "the start of ranks that wait is no measure for others"
    assert other["phases"]


def test_a_preparation_that_fails_ends_the_cell_that_waits_and_the_run(carried):
    run, nodes, _ = carried(error=UsageError("row 7 has no response"))
    with pytest.raises(UsageError, match="row 7"):
        run.execute({})
    assert nodes.seen == ["importing", "stop"]
    assert states(run.run.read_status()) == {"torch-2n-r1": "cancelled"}


def test_a_node_that_the_data_cannot_be_sent_to_ends_the_cell_that_waits(carried):
    run, nodes, _ = carried(unsendable=(NAMES[1],))
    run.execute({})
    assert nodes.seen[:4] == ["importing", "prepared", "sent", "stop"]
    entry = run.run.read_status()["cells"]["torch-2n-r1"]
    assert (entry["state"], entry["error"]["kind"], entry["error"]["host"]) == ("incomplete", DIED.kind, NAMES[1])


def test_a_node_that_dies_while_its_ranks_wait_is_replaced_and_nothing_is_prepared_twice(carried):
    run, nodes, preparation = carried(dies=NAMES[1], spares=1)
    preparation.may_end = nodes.stopped
    run.execute({})
    assert nodes.seen == ["importing", "stop", "prepared", "sent", "sent", "not held"]
    assert preparation.times == 1 and nodes.sent[-1] == NAMES[2], "the spare has it as well"
    status = run.run.read_status()
    assert [swap["host"] for swap in status["replaced"]] == [NAMES[1]]
    assert states(status) == {"torch-2n-r1": "complete"}


def test_a_stop_ends_ranks_that_wait_without_waiting_for_the_preparation(carried):
    run, nodes, preparation = carried()
    forever = preparation.may_end = threading.Event()
    nodes.while_held = lambda: setattr(run.stop, "asked", True)
    preparation.__class__ = type("Deaf", (Preparation,), {"__call__": lambda self, stopped: forever.wait(60)})
    run.execute({})
    assert nodes.seen == ["importing", "stop"] and not forever.is_set()
    assert states(run.run.read_status()) == {"torch-2n-r1": "cancelled"}
    forever.set()


def test_a_preparation_ends_with_the_run_that_is_stopped(carried):
    run, nodes, preparation = carried()
    preparation.may_end = threading.Event()
    nodes.while_held = lambda: setattr(run.stop, "asked", True)
    before = set(threading.enumerate())
    run.execute({})
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_a_preparation_ends_with_the_attempt_whatever_ends_that_and_sends_nothing(carried):
    """As a disk of this machine that is full: the process must not wait for what nobody needs."""
    run, nodes, preparation = carried()
    preparation.may_end = threading.Event()
    nodes.while_held = lambda: (_ for _ in ()).throw(InfrastructureError("the disk is full"))
    before = set(threading.enumerate())
    with pytest.raises(InfrastructureError, match="full"):
        run.execute({})
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    assert nodes.seen == ["importing"] and nodes.sent == []


def test_a_cell_that_needs_no_data_is_not_disturbed_by_its_preparation(carried):
    run, nodes, preparation = carried(test="torch")
    preparation.may_end.set()
    run.execute({})
    assert nodes.seen == ["prepared", "sent", "not held"]


@pytest.mark.parametrize(
    ("backend", "tests", "cached", "later"),
    [
        ("ssh", ("sft",), False, True),
        ("ssh", ("sft",), True, False),
        ("ssh", ("torch", "sft"), False, False),  # else it would disturb what `torch` measures
        ("slurm", ("sft",), False, False),  # what is submitted has its data
    ],
)
def test_data_is_prepared_later_where_ranks_of_the_first_cell_can_wait_for_it(
    cluster, tmp_path, monkeypatch, backend, tests, cached, later
):
    monkeypatch.setattr(carry, "cache_dir", lambda: tmp_path / "cache")
    params = {"dataset": "builtin", "seq_len": 64, "tokenizer": None, "samples": 32}
    built = replace(planned(cluster, tmp_path), backend=backend)
    cells = [replace(built.cells[0], test=test, params=params) for test in tests]
    if cached:
        asked = {name: value for name, value in params.items() if name != "dataset"}
        data_prepare.prepare("builtin", **asked, seed=built.seed, cache_dir=tmp_path / "cache" / "data")
    data = carry.prepare_data(built, cells, Display(quiet=True))
    assert data is not None and data.ready != later
    assert Path(data.folder, "manifest.json").exists() != later
    data.complete(lambda: False)
    assert data.ready and data_prepare.cached(Path(data.folder))
