"""A job followed to its end, against Slurm's commands that are passed in and agents' files that are planted."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_commands import DOWN, Commands, cluster, for_ever, line

from runner.cluster import slurm as slurm_settings
from runner.launch.slurm import answers
from runner.launch.slurm import commands as jobs
from runner.launch.slurm import follow as following
from runner.launch.talk import AgentSession
from runner.results.celldir import CellDir
from runner.system.process import Outcome

# --- waiting --------------------------------------------------------------------------------------


def test_waiting_tells_place_and_reason_and_ends_when_the_job_runs():
    commands = Commands(squeue=[line("7", "PENDING", "Priority"), "5\n7\n", line("7", "RUNNING", nodes="n1")])
    heard = []
    assert following.wait(cluster(commands), "7", heard.append).state == "running"
    assert [(info.reason, info.position) for info in heard] == [("Priority", 2)]


class Held(Commands):
    """A cluster that holds job 7 back for a reason, until it is cancelled."""

    def __init__(self, reason: str) -> None:
        super().__init__(squeue=[line("7", "PENDING", reason)], scancel=[""])

    def __call__(self, argv, **options):
        outcome = super().__call__(argv, **options)
        if argv[0] == "scancel":
            self.answers["squeue"] = iter(for_ever([line("7", "CANCELLED")]))
        return outcome


@pytest.mark.parametrize(
    ("reason", "settings", "said"),
    [
        ("PartitionDown", {"stuck_s": 0}, "partition"),
        ("Priority", {"wait_s": 1}, "Priority; allow it longer"),
        ("MaxMemPerLimit", {"stuck_s": 300}, "MaxMemPerLimit: .*slurm.mem"),
        ("InvalidQOS", {"stuck_s": 300}, "InvalidQOS: .*slurm.qos"),
    ],
)
def test_a_job_that_would_wait_in_vain_is_cancelled_and_the_reason_told(reason, settings, said):
    commands = Held(reason)
    with pytest.raises(jobs.NotStarted, match=f"job 7 waited . s and was cancelled: .*{said}"):
        following.wait(cluster(commands, **settings), "7", lambda info: None)
    assert commands.named("scancel") == [["scancel", "7"]]


@pytest.mark.parametrize(("others", "ends"), [("", True), ("7\n", True), ("7\n9\n", False), ("8_3\n", False)])
def test_a_limit_of_the_user_is_waited_for_while_another_job_of_theirs_runs(others, ends):
    class Limited(Held):
        def __call__(self, argv, **options):
            outcome = super().__call__(argv, **options)
            return replace(outcome, stdout=others) if "--me" in argv else outcome

    commands, heard = Limited("QOSMaxGRESPerUser"), []
    client = cluster(commands, stuck_s=0, wait_s=2)
    with pytest.raises(jobs.NotStarted, match="no other job of yours runs" if ends else "slurm.wait_s"):
        following.wait(client, "7", heard.append)
    assert all(("above what one user may have" in str(info.advice)) is ends for info in heard)


class Named(Held):
    """Job 7 names nodes; of n1, n2 and n3 the last is in a state."""

    def __init__(self, named: str, state: str) -> None:
        super().__init__("ReqNodeNotAvail, May be reserved for other job")
        self.named_nodes = named
        rows = [("n1", "drained"), ("n2", "allocated"), ("n3", state)]
        lines = [answers.SEPARATOR.join((name, word, "(null)", "2", "100", "fan broken")) for name, word in rows]
        self.answers["sinfo"] = iter(for_ever(["".join(f"{line}\n" for line in lines)]))

    def __call__(self, argv, **options):
        outcome = super().__call__(argv, **options)
        return replace(outcome, stdout=f"{self.named_nodes}\n") if "--format=%n" in argv else outcome


@pytest.mark.parametrize(
    ("named", "state", "found"),
    [
        ("n[2-3]", "drained", ["n3"]),
        ("n[2-3]", "draining", ["n3"]),
        ("n[1,3]", "down*", ["n1", "n3"]),
        ("n3", "idle*", ["n3"]),
        ("n[2-3]", "allocated", []),
        ("n[2-3]", "maint", []),  # a reservation ends
        ("n2", "drained", []),
        ("(null)", "drained", []),
        ("", "drained", []),
        ("n[2-", "drained", []),
    ],
)
def test_of_the_nodes_that_a_job_names_those_are_told_that_start_no_job(named, state, found):
    assert [node.name for node in cluster(Named(named, state)).out_of_service("7")] == found


@pytest.mark.parametrize(("state", "ends"), [("allocated", False), ("draining", True)])
def test_named_nodes_are_waited_for_while_they_are_busy_and_not_once_they_are_drained(state, ends):
    heard = []
    client = cluster(Named("n[2-3]", state), stuck_s=0, wait_s=None if ends else 0.1)
    with pytest.raises(jobs.NotStarted, match="it names are down or drained" if ends else "slurm.wait_s"):
        following.wait(client, "7", heard.append)
    assert all(("sinfo -R" in str(info.advice)) is ends for info in heard)


def test_what_ends_by_itself_is_waited_for_until_the_user_stops():
    commands = Held("Resources")
    info = following.wait(cluster(commands, stuck_s=1), "7", lambda info: None, stopped=lambda: len(commands.calls) > 2)
    assert info.state == "cancelled"


def test_who_leaves_while_a_job_is_cancelled_cancels_it_nevertheless():
    """The second Ctrl-C ends the command that the first one started."""
    commands = Held("Priority")
    commands.answers["scancel"] = iter([KeyboardInterrupt(), ""])
    with pytest.raises(KeyboardInterrupt):
        following.wait(cluster(commands), "7", lambda info: None, stopped=lambda: True)
    assert commands.named("scancel") == [["scancel", "7"]] * 2


# --- listening ------------------------------------------------------------------------------------


def said(folder: Path, *messages: dict, job: str = "7") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"message": "placed", "job": job}, *messages]
    (folder / "messages.jsonl").write_text("".join(f"{json.dumps(message)}\n" for message in lines))


GOOD = {"message": "outcome", "rc": 0, "error": None}


def conversation(tmp_path, commands, hosts, word=lambda session: None, patience_s=1.0, **follow):
    sessions = [AgentSession(host, (), {}) for host in hosts]
    heard: list[tuple[str, str]] = []
    info = following.converse(
        following.Follow(
            cluster(commands), "7", {host: CellDir(tmp_path / host) for host in hosts}, lag_s=0.1, **follow
        ),
        sessions,
        lambda session, message: heard.append((session.name, message.MESSAGE)),
        word,
        patience_s,
    )
    return info, sessions, heard


def test_every_agent_is_heard_and_the_jobs_end_awaited(tmp_path):
    said(tmp_path / "a", {"message": "alive"}, {"message": "line", "file": "x", "line": "y"}, GOOD)
    said(tmp_path / "b", {"message": "outcome", "rc": 1, "error": None})
    commands = Commands(squeue=[line("7", "RUNNING", nodes="a"), line("7", "COMPLETED", nodes="a")])
    info, sessions, heard = conversation(tmp_path, commands, ["a", "b"])
    assert info.state == "complete" and [session.rc for session in sessions] == [0, 1]
    assert heard == [("a", "placed"), ("a", "line"), ("a", "outcome"), ("b", "placed"), ("b", "outcome")]


def test_a_job_that_ends_leaves_its_silent_agents_without_outcome_but_with_its_log(tmp_path):
    said(tmp_path / "a", GOOD)
    (tmp_path / "job.log").write_text("srun: error: b: task 1: Killed\n")
    commands = Commands(squeue=[line("7", "NODE_FAIL", nodes="a,b")])
    info, sessions, _ = conversation(tmp_path, commands, ["a", "b"], log=tmp_path / "job.log")
    assert (info.state, sessions[0].rc, sessions[1].rc) == ("node_failed", 0, -1)
    assert sessions[1].stderr == ["srun: error: b: task 1: Killed"] and sessions[0].stderr == []


def test_an_agent_that_cannot_be_started_is_given_up_as_soon_as_the_jobs_output_says_so(tmp_path):
    """The others would wait for it, and only two minutes of silence would tell."""
    said(tmp_path / "a", {"message": "started"})
    log = tmp_path / "job.log"
    # One that has been heard fails by its own account, whatever srun says of it.
    log.write_text(
        "slurmstepd-n2: error: execve(): /opt/python: No such file\nsrun: error: n1: task 0: Exited with exit code 1\n"
    )
    commands = Commands(squeue=[line("7", "RUNNING", nodes="n[1-2]")])
    sessions = [AgentSession("a", (), {}), AgentSession("b", (), {})]
    folders = {session.name: CellDir(tmp_path / session.name) for session in sessions}
    follow = following.Follow(
        cluster(commands), "7", folders, log=log, names={"a": "n1", "b": "n2"}, lag_s=0.1
    )  # fmt: skip

    def word(session):
        if sessions[1].rc is not None:
            said(tmp_path / "a", {"message": "started"}, GOOD)
            commands.answers["squeue"] = iter(for_ever([line("7", "COMPLETED", nodes="n[1-2]")]))

    started = time.monotonic()
    following.converse(follow, sessions, lambda session, message: None, word)
    assert [session.rc for session in sessions] == [0, -1] and time.monotonic() - started < 15
    assert sessions[1].stderr == ["/opt/python: No such file"]


def test_a_job_that_slurm_put_back_into_the_queue_and_holds_has_ended(tmp_path):
    held = line("7", "PENDING", "launch failed requeued held")
    commands = Commands(squeue=[line("7", "RUNNING", nodes="a"), held], scancel=[""])
    started = time.monotonic()
    info, sessions, _ = conversation(tmp_path, commands, ["a"])
    assert (info.state, sessions[0].rc) == ("waiting", -1) and time.monotonic() - started < 10
    assert commands.named("scancel") == [["scancel", "7"]]


def test_what_an_earlier_job_left_in_the_folder_is_not_heard(tmp_path):
    said(tmp_path / "a", GOOD, job="6")
    info, sessions, heard = conversation(tmp_path, Commands(squeue=[line("7", "FAILED")]), ["a"])
    assert heard == [] and sessions[0].rc == -1 and info.state == "failed"


def test_a_growing_file_is_read_once_and_only_in_whole_lines(tmp_path):
    path = tmp_path / "messages.jsonl"
    reader = following._MessageReader(path, "7")
    assert reader.messages() == []
    path.write_bytes(b'{"message": "placed", "jo')
    assert reader.messages() == []
    path.write_bytes(b'{"message": "placed", "job": "7"}\n{"message": "alive"}\n\0\0\0\n{"message": "out')
    assert [m.MESSAGE for m in reader.messages()] == ["placed", "alive"]
    longer = path.read_bytes() + b'come"}\n'
    path.with_name("copy").write_bytes(longer)
    path.with_name("copy").replace(path)  # as rsync does
    assert [m.MESSAGE for m in reader.messages()] == ["outcome"]
    assert reader.messages() == []
    path.write_bytes(b'{"message": "placed", "job": "8"}\n' + longer)
    assert reader.messages() == []


def test_stop_is_told_once_by_slurm_and_insisted_on_when_it_is_not_heeded(tmp_path):
    said(tmp_path / "a", {"message": "started"})
    commands = Held("None")
    commands.answers["squeue"] = iter(for_ever([line("7", "RUNNING", nodes="a")]))

    class Deaf:
        def __call__(self, argv, **options):
            return commands(argv, **options) if argv != ["scancel", "--signal=USR2", "7"] else self.term(argv)

        def term(self, argv):
            commands.calls.append((argv, {}))
            return Outcome(tuple(argv), 0, 0.0, "", "")

    sessions = [AgentSession("a", (), {})]
    follow = following.Follow(
        jobs.SlurmClient(slurm_settings.Settings(), run=Deaf()), "7", {"a": CellDir(tmp_path / "a")}, lag_s=0.1
    )
    info = following.converse(follow, sessions, lambda session, message: None, lambda session: "stop", patience_s=0.5)
    assert commands.named("scancel") == [["scancel", "--signal=USR2", "7"], ["scancel", "7"]]
    assert info.state == "cancelled" and sessions[0].rc == -1


def test_a_stop_that_nobody_could_pass_on_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(following, "END_S", 0.3)
    said(tmp_path / "a", {"message": "started"})
    commands = Commands(squeue=[line("7", "RUNNING", nodes="a")], scancel=[(1, DOWN)])
    with pytest.raises(jobs.SlurmUnreachable, match="scancel: Unable to contact"):
        conversation(tmp_path, commands, ["a"], word=lambda session: "stop", patience_s=0.3)


def test_in_one_allocation_a_cell_ends_with_its_step_and_the_job_goes_on(tmp_path):
    said(tmp_path / "a", GOOD)
    commands = Commands(squeue=[line("7", "RUNNING", nodes="a"), "7.0\n7.batch\n"])
    _, sessions, _ = conversation(tmp_path, commands, ["a"], step=0)
    assert sessions[0].rc == 0

    # A step whose agents sent no message is over when the next one runs.
    running = line("7", "RUNNING", nodes="b")
    commands = Commands(squeue=[running, "7.1\n7.batch\n"])
    started = time.monotonic()
    info, sessions, _ = conversation(tmp_path, commands, ["b"], step=0)
    assert sessions[0].rc == -1 and info.state == "running" and time.monotonic() - started < 10
    assert not commands.named("scancel")


def test_slurm_may_be_silent_as_long_as_agents_are_heard(tmp_path):
    said(tmp_path / "a", {"message": "started"})
    commands = Commands(squeue=[(1, DOWN), (1, DOWN), line("7", "COMPLETED", nodes="a")])
    follow = following.Follow(cluster(commands, patience_s=0), "7", {"a": CellDir(tmp_path / "a")})
    sessions = [AgentSession("a", (), {})]

    def word(session):
        if len(commands.named("squeue")) > 1:
            said(tmp_path / "a", {"message": "started"}, GOOD)

    assert following.converse(follow, sessions, lambda session, message: None, word).state == "complete"
    assert sessions[0].rc == 0
