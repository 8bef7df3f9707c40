"""The agent on a node: what it runs, what it says, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import process

pytestmark = pytest.mark.local

# Stands in for a workload: the agent only knows the files that a rank leaves.
RANK = """
import json, os, sys, time
with open("rank0.jsonl", "w", buffering=1) as events:
    events.write(json.dumps({"event": "start", "rank": 0}) + "\\n")
    %s
    events.write(json.dumps({"event": "end", "rank": 0}) + "\\n")
"""


class Agent:
    """One agent with its leash in our hands."""

    def __init__(self, tmp_path: Path, argv: list[str] | None, **changes: object) -> None:
        self.folder = tmp_path / "cell"
        self.marker = f"run/{tmp_path.name}"
        request = {
            "kind": "cell",
            "run_id": "run-a",
            "cell": "c",
            "marker": self.marker,
            "host": "n1",
            "scratch": str(tmp_path / "scratch"),
            "cell_dir": str(self.folder),
            "job": {"a": 1},
            "argv": argv,
            "env": {"GREETING": "it's $(here)"},
            "telemetry_interval_s": 0.2,
            "heartbeat_timeout_s": 30,
            "grace_s": 0.5,
            **changes,
        }
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "runner.node"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.say(json.dumps(request))

    def say(self, line: str) -> None:
        assert self.child.stdin
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()

    def hear(self, kind: str) -> dict:
        assert self.child.stdout
        for line in self.child.stdout:
            message = json.loads(line)
            if message["message"] == kind:
                return message
        raise AssertionError(f"the agent ended without {kind!r}")

    def close(self) -> dict:
        """Its outcome, once it has ended by itself."""
        outcome = self.hear("outcome")
        self.child.wait(10)
        for pipe in (self.child.stdin, self.child.stdout):
            assert pipe
            pipe.close()
        return outcome

    def alive(self) -> list[int]:
        return process.marked(self.marker)


def python(body: str) -> list[str]:
    return [sys.executable, "-c", RANK % body]


def until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_rank_that_ends_well_leaves_facts_job_telemetry_and_an_outcome_written_last(tmp_path):
    agent = Agent(tmp_path, python("print(os.environ['GREETING'], os.environ['SHAKEDOWN_CELL']); time.sleep(0.5)"))
    outcome = agent.close()
    assert outcome["rc"] == 0 and outcome["error"] is None
    assert outcome["ranks"]["rank0"] == {"started": True, "ended": True, "stderr": []}
    files = {p.name: p for p in agent.folder.iterdir()}
    assert {"facts.json", "job.json", "telemetry.jsonl", "outcome.json", "engine.stdout"} <= set(files)
    assert files["engine.stdout"].read_text() == f"it's $(here) {agent.marker}\n"
    assert files["outcome.json"].stat().st_mtime_ns == max(p.stat().st_mtime_ns for p in files.values())
    assert json.loads(files["facts.json"].read_text())["boot_id"]
    assert len(files["telemetry.jsonl"].read_text().splitlines()) >= 2


def test_a_rank_that_fails_gives_its_status_and_last_words(tmp_path):
    agent = Agent(tmp_path, python("open('rank0.stderr', 'w').write('first\\nlast words\\n'); sys.exit(7)"))
    outcome = agent.close()
    assert outcome["rc"] == 7
    assert outcome["ranks"]["rank0"]["ended"] is False
    assert outcome["ranks"]["rank0"]["stderr"] == ["first", "last words"]


@pytest.mark.parametrize("deaf", [False, True])
def test_no_process_survives_a_controller_that_dies(tmp_path, deaf):
    """Workers in sessions of their own, which ignore INT and TERM, are ended as well."""
    ignore = "signal.signal(2, signal.SIG_IGN); signal.signal(15, signal.SIG_IGN)" if deaf else "pass"
    worker = f"import signal, time; {ignore}; time.sleep(60)"
    body = f"import subprocess; subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True); time.sleep(60)"
    agent = Agent(tmp_path, python(body))
    agent.hear("started")
    assert until(lambda: len(agent.alive()) == 2)
    assert agent.child.stdin
    agent.child.stdin.close()  # what the kernel does when a controller is SIGKILLed
    outcome = agent.hear("outcome")
    assert outcome["stopped"] == "controller gone"
    assert agent.alive() == []
    agent.child.stdout.close()
    agent.child.wait(10)


def test_no_process_survives_a_silent_controller(tmp_path):
    agent = Agent(tmp_path, python("time.sleep(60)"), heartbeat_timeout_s=1)
    outcome = agent.close()
    assert outcome["stopped"] == "no word from the controller for 1 s"
    assert agent.alive() == []


def test_heartbeats_keep_a_cell_running(tmp_path):
    agent = Agent(tmp_path, python("time.sleep(2)"), heartbeat_timeout_s=1)
    for _ in range(5):
        time.sleep(0.4)
        agent.say("")
    assert agent.close()["rc"] == 0


def test_stop_and_signals_end_the_ranks_in_good_order(tmp_path):
    agent = Agent(tmp_path, python("time.sleep(60)"))
    agent.hear("started")
    agent.say("stop")
    assert agent.close()["stopped"] == "stop"
    second = Agent(tmp_path, python("time.sleep(60)"))
    second.hear("started")
    os.kill(second.child.pid, signal.SIGTERM)
    assert second.close()["stopped"] == "SIGTERM"
    assert second.alive() == []


def test_a_node_takes_one_cell_at_a_time_and_names_the_holder(tmp_path):
    first = Agent(tmp_path, python("time.sleep(60)"))
    first.hear("started")
    second = Agent(tmp_path, python("pass"), run_id="run-b", cell_dir=str(tmp_path / "other"))
    assert second.close()["error"] == "in use by run run-a"
    first.say("stop")
    first.close()
    third = Agent(tmp_path, python("pass"), run_id="run-c")
    assert third.close()["rc"] == 0


def test_a_taken_rendezvous_port_is_named_before_anything_starts(tmp_path):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        outcome = Agent(tmp_path, python("pass"), rendezvous_port=port).close()
    assert outcome["error"] == f"port {port} for the rendezvous is taken by another process"
    assert outcome["rc"] is None


def test_ranks_that_another_launcher_started_are_watched_and_ended(tmp_path):
    agent = Agent(tmp_path, None)
    agent.hear("started")
    env = {**os.environ, process.MARKER: agent.marker}
    with subprocess.Popen(python("time.sleep(1)"), env=env, cwd=agent.folder) as rank:
        outcome = agent.close()
        rank.wait()
    assert outcome["rc"] == 0 and outcome["ranks"]["rank0"]["ended"]


def test_a_launcher_waits_for_its_word(tmp_path):
    agent = Agent(tmp_path, python("pass"), hold=True)
    time.sleep(0.5)
    assert not (agent.folder / "rank0.jsonl").exists()
    agent.say("go")
    assert agent.close()["rc"] == 0


def test_an_unwritable_folder_is_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    outcome = Agent(tmp_path, python("pass"), cell_dir=str(blocked / "cell")).close()
    assert outcome["error"].startswith("Not a directory")
