"""The agent on a node: what it runs, what it says, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runner import __version__
from runner.cluster import facts
from runner.node import slurm_step
from runner.node.check import check
from runner.node.leash import JobLeash
from runner.node.requests import CheckRequest, StepRequest
from runner.plan.engines import ray
from runner.system import process

pytestmark = pytest.mark.local

# Stands in for a workload: the agent only knows the files that a rank leaves.
RANK = """
import json, os, sys, time
with open("rank0.jsonl", "w", buffering=1) as events:
    events.write(json.dumps({"event": "start", "rank": 0, "pid": os.getpid()}) + "\\n")
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
            "attempt": 1,
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
    assert outcome["ranks"]["rank0"] == {"started": True, "ended": True, "stderr": [], "code": None, "ended_s": 0.0}
    files = {p.name: p for p in agent.folder.iterdir()}
    assert {"facts.json", "job.json", "telemetry.jsonl", "outcome.json", "engine.stdout"} <= set(files)
    assert files["engine.stdout"].read_text() == f"it's $(here) {agent.marker}\n"
    assert files["outcome.json"].stat().st_mtime_ns == max(p.stat().st_mtime_ns for p in files.values())
    assert json.loads(files["facts.json"].read_text())["boot_id"]
    assert len(files["telemetry.jsonl"].read_text().splitlines()) >= 2


def test_what_a_user_keeps_secret_reaches_the_rank_and_no_file(tmp_path):
    key = "0123456789abcdef-not-a-key"
    agent = Agent(tmp_path, python(f"print(os.environ['WANDB_API_KEY'] == '{key[:16]}' + '{key[16:]}')"),
                  secrets={"WANDB_API_KEY": key})  # fmt: skip
    agent.close()
    assert (agent.folder / "engine.stdout").read_text() == "True\n"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4 and not [path for path in files if key.encode() in path.read_bytes()]


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


def test_a_word_that_comes_with_the_request_is_not_lost(tmp_path):
    """An agent takes a moment to start, and a user who interrupts then does not wait for that."""
    agent = Agent(tmp_path, python("time.sleep(60)"))
    agent.say("stop")
    assert agent.close()["stopped"] == "stop"


def test_a_launcher_that_may_start_before_it_has_asked_does(tmp_path):
    agent = Agent(tmp_path, python("pass"), hold=True)
    agent.say("go")
    assert agent.close()["rc"] == 0


def test_no_process_survives_a_silent_controller(tmp_path):
    agent = Agent(tmp_path, python("time.sleep(60)"), heartbeat_timeout_s=1)
    outcome = agent.close()
    assert outcome["stopped"] == "no message from the controller for 1 s"
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
    refused = second.close()
    assert (refused["error"], refused["kind"]) == ("in use by run run-a", "in_use")
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
    assert (outcome["rc"], outcome["kind"]) == (None, "port_taken")


def test_an_engine_that_is_not_there_is_one_line(tmp_path):
    outcome = Agent(tmp_path, ["/nowhere/python"]).close()
    assert outcome["error"] == "program '/nowhere/python' is not installed or not on PATH"
    assert outcome["kind"] == "environment_missing"


def test_a_check_tells_every_problem_with_its_kind_and_the_nodes_time(tmp_path):
    request = CheckRequest("0.0.1", str(tmp_path), 1e6, ["torch", "no-such-package"], ["no-such-program"], 0)
    answer = check(request)
    assert answer.kinds == ["disk_full", "environment_missing", "environment_missing", "version_mismatch"]
    assert [problem.split()[-1] for problem in answer.problems][1:3] == ["no-such-package", "no-such-program"]
    assert abs(answer.time_s - time.time()) < 60
    good = replace(request, version=__version__, min_free_disk_gib=0, packages=["torch"], programs=[])
    assert check(good).problems == []


# --- ranks that stand still -----------------------------------------------------------------------

ANSWERS = f"""import faulthandler
    faulthandler.register({int(process.STACKS)}, file=open('rank0.stderr', 'w'), all_threads=False)
    def stand_here(depth):
        return stand_here(depth - 1) if depth else time.sleep(60)
    events.write(json.dumps({{"event": "progress"}}) + "\\n")
    stand_here(%d)"""


def stacks(agent: Agent) -> dict:
    """Where the rank stands, once it is there; then the agent is told to stop."""
    assert until(lambda: '"progress"' in read(agent.folder / "rank0.jsonl"))
    time.sleep(0.2)
    agent.say("stacks")
    time.sleep(1.5)
    agent.say("stop")
    return agent.close()["stacks"]["rank0"]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_a_rank_tells_where_it_stands_before_it_is_stopped(tmp_path):
    rank = stacks(Agent(tmp_path, python(ANSWERS % 0)))
    assert rank["state"] == "S" and 1.0 < rank["age_s"] < 60
    assert [frame.split()[-1] for frame in rank["frames"]] == ["stand_here", "<module>"]


def test_only_the_innermost_frames_are_told(tmp_path):
    rank = stacks(Agent(tmp_path, python(ANSWERS % 50)))
    assert [frame.split()[-1] for frame in rank["frames"]] == ["stand_here"] * 10


def test_a_stopped_rank_is_seen_as_such(tmp_path):
    agent = Agent(tmp_path, python(ANSWERS % 0))
    assert until(lambda: '"progress"' in read(agent.folder / "rank0.jsonl"))
    process.signal_all(agent.alive(), signal.SIGSTOP)
    rank = stacks(agent)
    assert (rank["state"], rank["frames"]) == ("T", [])
    assert agent.alive() == []


def test_a_rank_whose_own_program_is_stopped_is_seen_as_such(tmp_path):
    """As one of nccl-tests that waits in the kernel: the rank itself waits for its output, as all others do."""
    program = f"""import subprocess
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal({int(signal.SIGSTOP)})
    {ANSWERS % 0}"""
    rank = stacks(Agent(tmp_path, python(program)))
    assert (rank["state"], rank["frames"][0].split()[-1]) == ("T", "stand_here")


def test_a_rank_that_is_not_prepared_for_the_question_lives_on(tmp_path):
    agent = Agent(tmp_path, python("""events.write(json.dumps({"event": "progress"}) + "\\n"); time.sleep(3)"""))
    assert until(lambda: '"progress"' in read(agent.folder / "rank0.jsonl"))
    agent.say("stacks")
    outcome = agent.close()
    assert outcome["rc"] == 0 and outcome["stacks"]["rank0"]["frames"] == []


def test_under_slurm_ranks_are_asked_where_they_stand_just_before_their_time_is_up():
    early, late = JobLeash(60.0), JobLeash(1.0)
    for leash in (early, late):
        leash.tick()
    assert (early.stacks, late.stacks, late.reason) == (False, True, None)


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


@pytest.mark.parametrize("held", [True, False])
def test_held_ranks_see_that_their_data_is_there_once_the_controller_says_so(tmp_path, held):
    agent = Agent(tmp_path, python("while not os.path.exists('over'): time.sleep(0.05)"), job={"held": held})
    agent.hear("started")
    assert not (agent.folder / "go").exists()
    agent.say("go")
    assert until(lambda: (agent.folder / "go").exists(), 5.0 if held else 0.5) == held
    (agent.folder / "over").touch()
    assert agent.close()["rc"] == 0


def test_an_unwritable_folder_is_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    outcome = Agent(tmp_path, python("pass"), cell_dir=str(blocked / "cell")).close()
    assert outcome["error"].startswith("Not a directory")


# --- under Slurm, without Slurm: the agent is started as srun would ---------------------------------

# Stands in for torchrun, which takes seconds to start: runs one rank's code, which ends well or is interrupted.
TORCHRUN = """
import json, os, sys, time
folder = sys.argv[-1]
with open("rank0.jsonl", "w", buffering=1) as events:
    events.write(json.dumps({"event": "start", "rank": 0, "argv": sys.argv[1:]}) + "\\n")
    try:
        time.sleep(float(os.environ["RANK_S"]))
        events.write(json.dumps({"event": "end", "rank": 0}) + "\\n")
    except KeyboardInterrupt:
        events.write(json.dumps({"event": "flushed", "rank": 0}) + "\\n")
        sys.exit(1)
"""
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "a[1-2]", "SLURMD_NODENAME": "a1", "SLURM_NODEID": "0"}


def slurm_request(tmp_path: Path, rank_s: float = 0.0, **changes: object) -> dict:
    stand_in = tmp_path / "stand-in" / "torch" / "distributed"
    if not stand_in.exists():
        stand_in.mkdir(parents=True)
        for folder in (stand_in, stand_in.parent):
            (folder / "__init__.py").touch()
        (stand_in / "run.py").write_text(TORCHRUN)
    return {
        "kind": "cell",
        "slurm": True,
        "run_id": "run-a",
        "cell": "c",
        "attempt": 1,
        "marker": f"run/{tmp_path.name}",
        "scratch": str(tmp_path / "scratch"),
        "shared_root": str(tmp_path / "nodes"),
        "engine": "torchrun",
        "gpus_per_node": 4,
        "master_port": 23456,
        "timeout_s": 60,
        "names": {"a1": "gpu-0001", "a2": "gpu-0009"},
        "addresses": {"a1": "10.0.0.1", "a2": "10.0.0.2"},
        "env": {"PYTHONPATH": str(stand_in.parents[1]), "RANK_S": str(rank_s), "NIC": "eth0"},
        "node_env": {"a1": {"NIC": "eth1"}},
        "job": {"a": 1},
        "telemetry_interval_s": 0.2,
        "grace_s": 0.5,
    } | changes


class Task:
    """An agent as a task of srun: an indented request, then the end of stdin; messages in a file."""

    def __init__(self, tmp_path: Path, rank_s: float = 0.0, **changes: object) -> None:
        request = slurm_request(tmp_path, rank_s, **changes)
        self.folder = tmp_path / "nodes" / "gpu-0001" / "c"
        self.marker = request["marker"]
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "runner.node"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **SLURM},
            text=True,
        )
        assert self.child.stdin
        self.child.stdin.write(json.dumps(request, indent=1) + "\n")
        self.child.stdin.flush()

    def said(self) -> list[dict]:
        file = self.folder / "messages.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def started(self) -> bool:
        rank = self.folder / "rank0.jsonl"
        return rank.exists() and "start" in rank.read_text()

    def end(self) -> dict:
        """Its outcome, once it has ended by itself."""
        printed, self.complaint = self.child.communicate(timeout=20)
        assert printed == ""
        assert process.marked(self.marker) == []
        return self.said()[-1]


def test_under_slurm_an_agent_needs_no_controller_and_tells_a_file(tmp_path):
    stale = tmp_path / "nodes" / "gpu-0001" / "c" / "messages.jsonl"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"message": "outcome", "rc": 0}\n')
    task = Task(tmp_path, 1.0)
    outcome = task.end()  # communicate() closes its stdin at once
    assert (outcome["message"], outcome["rc"], outcome["stopped"], task.child.returncode) == ("outcome", 0, None, 0)
    assert task.said()[0] == {"message": "placed", "job": "77", "hosts": ["gpu-0001", "gpu-0009"], "host": "gpu-0001"}
    assert {"started", "alive", "line"} <= {message["message"] for message in task.said()}
    assert json.loads((task.folder / "outcome.json").read_text())["host"] == "gpu-0001"
    job = json.loads((task.folder / "job.json").read_text())
    assert job["a"] == 1 and job["env"]["NIC"] == "eth1"
    argv = json.loads((task.folder / "rank0.jsonl").read_text().splitlines()[0])["argv"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--node-rank=0", "--master-addr=10.0.0.1"} <= set(argv)
    assert argv[-1] == str(task.folder)


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGUSR1, "time limit"), (signal.SIGUSR2, "stop"), (signal.SIGTERM, "stop")]
)
def test_slurms_signals_reach_every_process_and_ranks_have_time_to_flush(tmp_path, number, reason):
    task = Task(tmp_path, 60)
    assert until(task.started, 20)
    if number != signal.SIGTERM:  # Slurm sends it to all processes of a step; unprepared, it ends Python
        process.signal_all(process.marked(task.marker), number)
        time.sleep(0.2)
        assert process.marked(task.marker)
    task.child.send_signal(number)
    outcome = task.end()
    assert outcome["stopped"] == reason and task.child.returncode == 1
    assert "flushed" in (task.folder / "rank0.jsonl").read_text()


def test_a_cell_whose_controller_is_gone_ends_with_its_own_limit(tmp_path):
    outcome = Task(tmp_path, 60, timeout_s=1).end()
    assert outcome["stopped"] == "timed out"


def test_no_preflight_reached_the_node_so_the_agent_checks_it_before_it_starts(tmp_path):
    check = {
        "scratch": str(tmp_path / "scratch"),
        "min_free_disk_gib": 0,
        "packages": ["nosuch"],
        "programs": [],
        "gpus": 0,
    }
    task = Task(tmp_path, check={**check, "version": "0.0.1"})
    outcome = task.end()
    assert "lacks nosuch" in outcome["error"] and "this controller is 0.0.1" in outcome["error"]
    assert outcome["rc"] is None and not (task.folder / "rank0.jsonl").exists()


def test_a_changed_environment_is_named_and_nothing_starts(tmp_path):
    before = facts.comparable(facts.collect({})) | {"packages.torch": "1.0"}
    task = Task(tmp_path, environment=before)
    outcome = task.end()
    assert outcome["error"].startswith("environment changed: ") and "torch 1.0 -> " in outcome["error"]
    assert "--accept-drift" in outcome["error"] and not (task.folder / "rank0.jsonl").exists()


def test_a_task_without_slurms_variables_says_so_and_ends(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    argv = [sys.executable, "-P", "-m", "runner.node"]
    done = process.run(argv, timeout_s=20, env=env, input=json.dumps(slurm_request(tmp_path)) + "\n")
    assert done.rc == 1 and "SLURM_STEP_NODELIST is not set" in done.stderr


def test_named_hosts_give_the_order_of_ranks_whatever_slurm_sorts(tmp_path):
    request = StepRequest.from_json(slurm_request(tmp_path, hosts=["a2", "a1"]))
    (first, hosts), (second, _) = (
        slurm_step.placed(request, {**SLURM, "SLURMD_NODENAME": name}) for name in ("a2", "a1")
    )
    assert "--node-rank=0" in first.argv and "--node-rank=1" in second.argv
    assert "--master-addr=10.0.0.2" in first.argv and "--master-addr=10.0.0.2" in second.argv
    assert (first.rendezvous_port, second.rendezvous_port) == (23456, None)
    assert hosts == ["gpu-0009", "gpu-0001"]
    with pytest.raises(ValueError, match="a2, which is not one of a1, a3"):
        slurm_step.placed(replace(request, hosts=["a1", "a3"]), {**SLURM, "SLURMD_NODENAME": "a2"})


def test_a_node_that_the_inventory_does_not_know_goes_by_slurms_name_and_its_own_folder(tmp_path):
    changes = {"names": {}, "addresses": {}, "shared_root": None, "cell_dir": "/scratch/run-a/c"}
    request = StepRequest.from_json(slurm_request(tmp_path, **changes))
    own, _ = slurm_step.placed(request, {**SLURM, "SLURMD_NODENAME": "a2"})
    assert (own.host, own.cell_dir) == ("a2", "/scratch/run-a/c")
    assert "--master-addr=a1" in own.argv and own.env["NIC"] == "eth0"


def test_a_second_attempt_finds_nothing_of_the_first(tmp_path):
    Agent(tmp_path, python("pass")).close()
    (tmp_path / "cell" / "torchrun").mkdir()
    (tmp_path / "cell" / "rank7.jsonl").write_text('{"event": "end"}\n')
    second = Agent(tmp_path, python("pass")).close()
    assert list(second["ranks"]) == ["rank0"]
    assert not (tmp_path / "cell" / "torchrun").exists()


GIVES_UP = """import json, pathlib, sys, time
fault = {"kind": "never_joined", "message": "n2 has not joined Ray within 1 s", "host": "n2"}
pathlib.Path("fault.json").write_text(json.dumps(fault))
time.sleep(%s)
sys.exit(1)
"""


def test_an_engine_of_our_own_says_why_it_gave_up_and_whose_failure_that_is(tmp_path):
    outcome = Agent(tmp_path, [sys.executable, "-c", GIVES_UP % 0]).close()
    assert (outcome["rc"], outcome["kind"], outcome["accused"]) == (1, "never_joined", "n2")
    assert outcome["error"] == "n2 has not joined Ray within 1 s"


def test_what_an_engine_says_as_it_is_ended_is_no_failure(tmp_path):
    agent = Agent(tmp_path, [sys.executable, "-c", GIVES_UP % 60])
    agent.hear("started")
    assert until((agent.folder / "fault.json").exists)
    agent.say("stop")
    outcome = agent.close()
    assert (outcome["stopped"], outcome["error"], outcome["kind"]) == ("stop", None, None)


def test_what_a_killed_supervisor_of_ray_left_is_removed_by_its_agent(tmp_path):
    folder = Path(ray.folder(f"run/{tmp_path.name}"))
    leaves = f"import os, signal; os.makedirs({str(folder / 'session')!r}); os.kill(os.getpid(), signal.SIGKILL)"
    outcome = Agent(tmp_path, [sys.executable, "-c", leaves]).close()
    assert outcome["rc"] == -signal.SIGKILL and not folder.exists()
