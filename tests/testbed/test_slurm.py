"""Jobs on a real Slurm: three containers, provisioned by `runner setup`, one folder shared as over NFS."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runner import __version__
from runner.cluster import inventory, ssh
from runner.cluster import slurm as slurm_settings
from runner.errors import UsageError
from runner.launch.slurm import answers, capacity, commands
from runner.launch.slurm import follow as following
from runner.launch.slurm.script import BatchJob, Step, render
from runner.launch.talk import AgentSession
from runner.node.protocol import Line, Message, Outcome, Placed
from runner.provision.testbed import containers as provision_testbed
from runner.provision.testbed import layout
from runner.results.celldir import CellDir
from runner.system import process
from testbed.benches import until

CELL = "torch-2n-r1"
pytestmark = pytest.mark.testbed

# Stands in for torchrun where it is the job that is tested, not the ranks: starts in no time, minds INT.
TORCHRUN = """
import faulthandler, json, os, signal, sys, time
faulthandler.register(signal.SIGURG, file=open("rank0.stderr", "w"))
with open("rank0.jsonl", "w", buffering=1) as events:
    events.write(json.dumps({"event": "start", "rank": 0, "pid": os.getpid()}) + "\\n")
    try:
        time.sleep(float(os.environ["RANK_S"]))
        events.write(json.dumps({"event": "end", "rank": 0}) + "\\n")
    except KeyboardInterrupt:
        events.write(json.dumps({"event": "flushed", "rank": 0}) + "\\n")
        sys.exit(1)
"""


@dataclass
class Cluster:
    slurm: commands.SlurmClient
    nodes: tuple[inventory.Node, ...]
    ssh_config: str
    share: Path
    containers: dict[str, str]

    def inside(self, alias: str, *argv: str, check: bool = True) -> str:
        return process.run(["podman", "exec", self.containers[alias], *argv], timeout_s=60, check=check).stdout

    def left(self, marker: str) -> str:
        """Processes of a cell that live on any node."""
        script = f"grep -lzs '^{process.MARKER}={marker}' /proc/[0-9]*/environ; true"
        return "".join(self.inside(alias, "bash", "-c", script) for alias in self.containers)


@pytest.fixture(scope="module")
def cluster(slurm3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    share = slurm3.share / "jobs"
    stand_in = share / "stand-in" / "torch" / "distributed"
    stand_in.mkdir(parents=True)
    for package in (stand_in, stand_in.parent):
        (package / "__init__.py").touch()
    (stand_in / "run.py").write_text(TORCHRUN)
    read = inventory.read(str(slurm3.inventory), folder / "cache")
    pins, config = folder / "known_hosts", folder / "ssh_config"
    pins.write_text(ssh.known_hosts(read))
    config.write_text(ssh.ssh_config(read, str(pins)))
    settings = slurm_settings.settings({"partition": "gpu", "login": "node001"}, "test")
    at = {node["alias"]: node["container"] for node in slurm3.nodes}
    return Cluster(commands.SlurmClient(settings, read.nodes[0], str(config)), read.nodes, str(config), share, at)


@dataclass
class Run:
    """A job with one cell or several, submitted and followed."""

    cluster: Cluster
    folder: Path
    rank_s: float | None = None  # None: torchrun itself, else its stand-in that sleeps so long
    shared: bool = True
    cells: tuple[tuple[str, int, float | None], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    job_id: str = ""
    sessions: list[AgentSession] = field(default_factory=list)
    heard: list[tuple[str, Message]] = field(default_factory=list)
    waited: list[answers.JobInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run_id = self.folder.name
        self.cells = self.cells or ((CELL, len(self.hosts) or 2, self.rank_s),)
        self.name = f"shakedown-{self.run_id}"
        self.log = self.folder / "job.log" if self.shared else Path(f"/var/tmp/{self.run_id}.log")
        self.folder.mkdir(exist_ok=True)

    def marker(self, cell: str = CELL) -> str:
        return f"{self.run_id}/{cell}"

    def request(self, cell: str, num_nodes: int, rank_s: float | None) -> dict[str, Any]:
        nodes = self.cluster.nodes
        stand_in = {"PYTHONPATH": str(self.cluster.share / "stand-in"), "RANK_S": str(rank_s)}
        params = {"collectives": ["all_reduce"], "min_bytes": 8, "max_bytes": 64, "factor": 8, "warmup": 1, "iters": 2}
        place = {"shared_root": str(self.folder / "nodes")} if self.shared else {"cell_dir": self.cell_dir(cell)}
        return {
            "kind": "cell",
            "slurm": True,
            "run_id": self.run_id,
            "cell": cell,
            "attempt": 1,
            "marker": self.marker(cell),
            "scratch": "/var/tmp/shakedown",
            "engine": "torchrun",
            "gpus_per_node": 1,
            "master_port": 23456,
            "timeout_s": 300,
            "telemetry_interval_s": 1.0,
            "grace_s": 3.0,
            "hosts": list(self.hosts),
            "names": {node.alias: node.name for node in nodes},
            "addresses": {node.alias: node.address for node in nodes},
            "env": {"GLOO_SOCKET_IFNAME": "eth0", **({} if rank_s is None else stand_in)},
            "check": {
                "version": __version__, "scratch": "/var/tmp/shakedown", "min_free_disk_gib": 0.1,
                "packages": ["torch"], "programs": [], "gpus": 0,
            },
            "job": {
                "run_id": self.run_id, "cell": cell, "test": "torch", "num_nodes": num_nodes, "gpus_per_node": 1,
                "world_size": num_nodes, "device": "cpu", "seed": 0, "model": None, "weights": None, "deepspeed": None,
                "data": None, "hardware": {}, "env": {}, "params": {**params, "dtype": "float32", "timeout_s": 300},
            },
            **place,
        }  # fmt: skip

    def cell_dir(self, cell: str) -> str:
        return f"/var/tmp/shakedown/{self.run_id}/{cell}"

    def script(self) -> str:
        steps = tuple(
            Step(cell, count, self.request(cell, count, rank_s), self.hosts, timeout_s=60)
            for cell, count, rank_s in self.cells
        )
        job = BatchJob(self.name, steps, sys.executable, str(self.log), 1, "cpu", secrets=("HF_TOKEN",))
        return render(job, slurm_settings.settings({"partition": "gpu", **self.settings}, "test"))

    def submit(self) -> answers.JobInfo:
        self.job_id = self.cluster.slurm.submit(self.script(), {"HF_TOKEN": "a 's3cret' $(x)"})
        return following.wait(self.cluster.slurm, self.job_id, self.waited.append)

    def follow(self, info: answers.JobInfo, step: int | None = None, word=lambda session: None) -> answers.JobInfo:
        cell, count, _ = self.cells[step or 0]
        words = inventory.by_word(self.cluster.nodes)
        nodes = [words[name] for name in info.nodes[:count]]
        self.sessions = [AgentSession(node.name, (), {}) for node in nodes]
        follow = following.Follow(
            self.cluster.slurm,
            self.job_id,
            {node.name: CellDir(self.folder / "nodes" / node.name / cell) for node in nodes},
            step=step,
            source=None if self.shared else self.cell_dir(cell),
            nodes=nodes,
            ssh_config=self.cluster.ssh_config,
            log=self.log if self.shared else None,
            lag_s=0.5,
        )
        return following.converse(
            follow, self.sessions, lambda session, m: self.heard.append((session.name, m)), word, patience_s=20
        )

    def outcomes(self) -> dict[str, Outcome]:
        return {name: message for name, message in self.heard if isinstance(message, Outcome)}

    def rank_started(self) -> bool:
        return any('"start"' in path.read_text() for path in self.folder.glob(f"nodes/*/{CELL}/rank0.jsonl"))

    def stopped(self) -> set[str | None]:
        return {outcome.stopped for outcome in self.outcomes().values()}


@pytest.fixture(scope="module")
def run(cluster):
    """Makes runs; their jobs end with the tests at the latest."""
    made: list[Run] = []

    def make(rank_s: float | None = None, **options: Any) -> Run:
        made.append(Run(cluster, cluster.share / f"run-{len(made)}", rank_s, **options))
        return made[-1]

    yield make
    for one in made:
        if one.job_id:
            cluster.slurm.cancel(one.job_id)


@pytest.fixture(scope="module")
def limited(run):
    """A job on the third node with a limit of two minutes: Slurm's notice comes 30 to 90 s after its start.

    With a limit of one minute it may come at once, before the step has begun, and is then lost.
    """
    one = run(300, hosts=("node003",), settings={"time_limit_s": 120})
    return one, one.submit()


def test_what_cannot_be_shared_is_refused(tmp_path):
    for folder in (tmp_path / "nosuch", tmp_path / "a:b"):
        with pytest.raises(UsageError, match=r"--share .*: give a folder that exists and has no colon"):
            provision_testbed.up(layout.Options(nodes=1, name="pytest-share", share=folder, inventory=tmp_path))


def test_the_cluster_is_seen_before_anything_is_submitted(cluster):
    partitions, nodes = cluster.slurm.look()
    assert [(p.name, p.state, len(p.nodes)) for p in partitions] == [("gpu", "up", 3)]
    assert [(node.name, node.usable) for node in nodes] == [(f"node00{n}", True) for n in (1, 2, 3)]


def test_slurm_says_beforehand_what_it_would_refuse(cluster, run):
    assert cluster.slurm.test_only(run(0.0).script()) is None
    assert "nvalid partition" in str(cluster.slurm.test_only(run(0.0, settings={"partition": "nosuch"}).script()))
    assert cluster.slurm.find("shakedown-nosuch") is None


@pytest.mark.parametrize("shared", [True, False])
def test_a_cell_of_real_ranks_runs_with_and_without_a_shared_file_system(cluster, run, limited, shared):
    one = run(shared=shared)
    submitted = one.submit()
    info = one.follow(submitted)
    assert info.state == "complete" and [session.rc for session in one.sessions] == [0, 0]
    assert cluster.slurm.find(one.name) == one.job_id
    assert [session.name for session in one.sessions] == [node.name for node in cluster.nodes[:2]]
    assert one.outcomes().keys() == {session.name for session in one.sessions}
    events = [json.loads(m.line) for _, m in one.heard if isinstance(m, Line) and m.file == "rank0.jsonl"]
    assert {"start", "value", "end"} <= {event["event"] for event in events}
    for host in one.outcomes():
        assert (one.folder / "nodes" / host / CELL / "outcome.json").is_file()
    assert "s3cret" not in one.script() and cluster.left(one.marker()) == ""

    # A controller that comes back hears it all again.
    first, one.heard = one.heard, []
    assert one.follow(submitted).state == "complete"
    assert sorted(map(str, one.heard)) == sorted(map(str, first))


def test_before_the_time_limit_ranks_have_time_to_flush(cluster, limited):
    one, info = limited
    one.follow(info)
    assert one.stopped() == {"time limit"}
    assert "flushed" in str(one.heard) and cluster.left(one.marker()) == ""


def test_hosts_that_are_named_have_their_ranks_in_that_order(cluster, run):
    one = run(0.5, hosts=("node003", "node001"))
    one.follow(one.submit())
    placed = {name: message.hosts for name, message in one.heard if isinstance(message, Placed)}
    third, first = cluster.nodes[2].name, cluster.nodes[0].name
    assert placed == {name: [third, first] for name in (third, first)}


def test_a_job_that_is_cancelled_by_hand_says_so_and_leaves_nothing(cluster, run):
    one, done = run(300), []

    def word(session):
        if one.rank_started() and not done:
            done.append(cluster.inside("node002", "scancel", one.job_id))

    assert one.follow(one.submit(), word=word).state == "cancelled"
    assert one.stopped() == {"stop"} and len(one.outcomes()) == 2 and cluster.left(one.marker()) == ""


def test_words_reach_every_agent_and_ranks_have_time_to_flush(cluster, run):
    one, asked = run(300), []

    def word(session):
        if one.rank_started():
            asked.append(time.monotonic())
        return None if not asked else "stacks" if time.monotonic() - asked[0] < 3 else "stop"

    one.follow(one.submit(), word=word)
    assert one.stopped() == {"stop"} and len(one.outcomes()) == 2
    assert all("run.py" in str(outcome.stacks["rank0"].frames) for outcome in one.outcomes().values())
    assert "flushed" in str(one.heard) and cluster.left(one.marker()) == ""


def test_in_one_allocation_cells_follow_each_other_and_one_that_is_stopped_does_not_end_the_next(run):
    one = run(cells=(("first", 1, 0.3), (CELL, 3, 300), ("last", 1, 0.3)))
    info = one.submit()
    hosts, ends = [], []
    for step in range(len(one.cells)):
        one.heard = []
        stop = "stop" if step == 1 else None
        one.follow(info, step=step, word=lambda session, stop=stop: stop if one.rank_started() else None)
        hosts.append([session.name for session in one.sessions])
        ends.append((one.stopped(), len(one.outcomes())))
    assert ends == [({None}, 1), ({"stop"}, 3), ({None}, 1)]
    assert hosts[0] == hosts[2] == hosts[1][:1]


def test_a_job_whose_node_is_drained_is_given_up_with_the_reason(cluster, run):
    cluster.inside("node003", "scontrol", "update", "node=node003", "state=drain", "reason=fan broken")
    try:
        impatient = commands.SlurmClient(
            slurm_settings.settings({"stuck_s": 1}, "test"), cluster.nodes[0], cluster.ssh_config
        )
        one = run(0.0, hosts=("node002", "node003"))
        one.job_id = impatient.submit(one.script())
        with pytest.raises(commands.NotStarted, match=f"job {one.job_id} waited .* node"):
            following.wait(impatient, one.job_id, one.waited.append)
        assert impatient.poll([one.job_id])[one.job_id].state == "cancelled"
        assert one.waited[0].state == "waiting"
    finally:
        cluster.inside("node003", "scontrol", "update", "node=node003", "state=resume")


def test_a_step_that_cannot_start_is_told_by_the_jobs_log(cluster, run):
    one = run(0.0)
    one.job_id = cluster.slurm.submit(one.script().replace(sys.executable, "/nosuch/python"))
    info = one.follow(following.wait(cluster.slurm, one.job_id, one.waited.append))
    assert info.state == "failed" and {session.rc for session in one.sessions} == {-1}
    assert any("/nosuch/python" in said for said in one.sessions[0].stderr)


@pytest.mark.parametrize("reserved", [False, True])
def test_nodes_of_a_reservation_are_used_with_it_and_not_without(cluster, reserved):
    cluster.inside(
        "node001", "scontrol", "create", "reservation", "reservationname=acceptance", "starttime=now", "duration=5",
        "nodes=node003", "flags=maint", "user=root",
    )  # fmt: skip
    try:
        given = {"reservation": "acceptance"} if reserved else {}
        client = commands.SlurmClient(
            slurm_settings.settings(given, "test"), cluster.nodes[0], cluster.ssh_config
        )  # fmt: skip

        def usable():
            return [node.name for node in client.look()[1] if node.usable]

        assert until(lambda: usable() == (["node003"] if reserved else ["node001", "node002"]), 60)
    finally:
        cluster.inside("node001", "scontrol", "delete", "reservationname=acceptance")


def test_as_much_memory_is_asked_for_as_is_allowed_and_more_is_never_waited_for(cluster, run):
    """As a site that limits memory: Slurm would leave a job with --mem=0 waiting for ever."""
    cluster.inside("node001", "scontrol", "update", "partitionname=gpu", "maxmempernode=1000")
    try:
        partitions, nodes = cluster.slurm.look()
        asked = capacity.memory(cluster.slurm.settings, partitions, nodes)
        assert asked == "1000M"
        assert cluster.slurm.test_only(run(0.0, settings={"mem": asked}).script()) is None
        one = run(0.0, settings={"mem": "0"})
        began = time.monotonic()
        with pytest.raises(commands.NotStarted, match=r"MaxMemPerLimit: .*lower slurm.mem"):
            one.submit()
        assert time.monotonic() - began < 30 and one.waited[0].state == "waiting"
        assert cluster.slurm.poll([one.job_id])[one.job_id].state == "cancelled"
    finally:
        cluster.inside("node001", "scontrol", "update", "partitionname=gpu", "maxmempernode=0")
