"""`runner bench` on eight nodes over SSH, for real: what works, and what happens when something breaks."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial

import psutil
import pytest

from runner.results.rundir import RunDir
from runner.system import process
from testbed.benches import RUNNER, Bench, inside, podman, signal_rank, until

NAMES = [f"fukushimadc-02-hgx-{number:04d}" for number in (1, 2, 3, 4, 5, 6, 7, 9)]
pytestmark = pytest.mark.testbed


def wait_for_step(bench: Bench) -> None:
    """Until rank 0 has finished a training step."""

    def stepping() -> bool:
        streams = bench.results.glob(f"latest/nodes/{NAMES[0]}/*/rank0.jsonl")
        return any('"step_time_s"' in stream.read_text() for stream in streams)

    if not until(stepping, 120):
        bench.leave()  # its ranks would slow down the tests that follow
        pytest.fail("no training step within two minutes")


LONG = ("--test", "sft", "--set", "sft.steps=1000")


def test_a_rank_of_deepspeeds_that_is_killed_stops_the_others_and_its_node_is_named(testbed8, tmp_path):
    bench = Bench(testbed8.inventory, tmp_path, "--nodes", "3", "--engine", "deepspeed", *LONG)
    wait_for_step(bench)
    signal_rank(testbed8.container("node002"), "KILL")
    killed = time.monotonic()
    code, output = bench.end(60)
    assert code == 3, output
    assert time.monotonic() - killed < 30  # others are stopped within seconds; the report takes a few more
    status = bench.run.read_status()["cells"]["sft-tiny-3n-r1"]
    error = status["error"]
    assert (status["state"], error["kind"], error["host"]) == ("failed", "rank_killed", NAMES[1])
    assert "node002" in output
    for name in NAMES[:3]:  # artefacts of all, the healthy ones' too
        assert (bench.run.cell(name, "sft-tiny-3n-r1").path / "outcome.json").exists()
    assert process.marked(bench.marker) == []  # this kernel is the nodes': it sees every process of theirs


def test_an_agent_that_is_killed_leaves_no_rank_either(testbed8, tmp_path):
    bench = Bench(testbed8.inventory, tmp_path, "--nodes", "2", *LONG)
    wait_for_step(bench)
    podman("exec", testbed8.container("node002"), "pkill", "-9", "-f", "runner.node")
    code, output = bench.end(60)
    assert code == 3, output
    assert bench.run.read_status()["cells"]["sft-tiny-2n-r1"]["error"]["host"] == NAMES[1]
    assert process.marked(bench.marker) == []


def test_a_killed_controller_leaves_no_process_and_an_incomplete_run(testbed8, tmp_path):
    bench = Bench(testbed8.inventory, tmp_path, "--nodes", "3", "--engine", "deepspeed", *LONG)
    wait_for_step(bench)
    assert len(process.marked(bench.marker)) > 3
    below = psutil.Process(bench.process.pid).children(recursive=True)  # the launcher under its agent, and every ssh
    bench.process.send_signal(signal.SIGKILL)
    bench.end()
    assert until(lambda: process.marked(bench.marker) == [], 20)
    assert psutil.wait_procs(below, timeout=10)[1] == []
    for node in testbed8.nodes:
        agents = partial(inside, node["container"], "pgrep -f runner[.]node || true")
        assert until(lambda agents=agents: agents() == "", 10)
    listed = subprocess.run([RUNNER, "runs", "list", "--json", "--results", tmp_path], capture_output=True, text=True)
    assert [row["state"] for row in json.loads(listed.stdout)] == ["incomplete"]
    code, output = Bench(
        testbed8.inventory, tmp_path, "--nodes", "3", "--test", "torch", "--set", "torch.max_bytes=8"
    ).end()
    assert code == 0, output  # no lock is left behind


@pytest.fixture(scope="module")
def training(testbed8, tmp_path_factory) -> Iterator[Bench]:
    """A run on the first two nodes; the tests that ask for it follow each other, and the last one ends it."""
    bench = Bench(testbed8.inventory, tmp_path_factory.mktemp("training"), "--nodes", "2", *LONG)
    wait_for_step(bench)
    yield bench
    bench.leave()


def test_a_second_controller_is_refused_naming_the_first_run(testbed8, training, tmp_path):
    other = {"XDG_STATE_HOME": str(tmp_path / "other")}  # as another user's or machine's controller
    arguments = ("--hosts", "node[002-003]", "--test", "torch")
    code, output = Bench(testbed8.inventory, tmp_path / "b", *arguments, env=other).end()
    assert code == 3 and f"in use by run {training.run.run_id}" in output and "node002" in output


def test_ctrl_c_keeps_what_was_measured(training):
    training.process.send_signal(signal.SIGINT)
    code, output = training.end(60)
    assert code == 130, output
    assert training.run.read_status()["state"] == "cancelled"
    assert "step_time_s" in training.run.records.read_text() and training.run.report_html.exists()
    assert process.marked(training.marker) == []


def test_ctrl_c_twice_leaves_at_once_and_nothing_behind(testbed8, tmp_path):
    bench = Bench(testbed8.inventory, tmp_path, "--nodes", "2", *LONG)
    wait_for_step(bench)
    marker = bench.marker
    bench.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    bench.process.send_signal(signal.SIGINT)
    code, output = bench.end(30)
    assert code == 130, output
    assert "Traceback" not in output
    assert until(lambda: process.marked(marker) == [], 20)


def test_good_nodes_take_the_place_of_a_bad_one(testbed8, tmp_path):
    podman("exec", testbed8.container("node002"), "systemctl", "stop", "ssh")
    small = ("--test", "torch", "--set", "torch.max_bytes=8", "--set", "torch.collectives=[all_reduce]")
    try:
        code, output = Bench(testbed8.inventory, tmp_path, "--nodes", "3", "--skip-bad-nodes", *small).end()
    finally:
        podman("exec", testbed8.container("node002"), "systemctl", "start", "ssh")
    assert code == 0, output
    plan = RunDir.find(tmp_path, None).read_plan()
    assert plan["cells"][0]["hosts"] == [NAMES[0], NAMES[2], NAMES[3]]
    assert [(bad["alias"], bad["kind"]) for bad in plan["passed_over"]] == [("node002", "unreachable")]
