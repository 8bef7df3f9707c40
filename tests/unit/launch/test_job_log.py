"""What a job's output says of agents that could not be started: which node, which kind, in whose words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.launch.slurm import job_log

EXECVE = """\
srun: cluster configuration lacks support for cpu binding
slurmstepd-node003: error: execve(): /opt/shakedown/bin/python: No such file or directory
srun: error: node003: task 2: Exited with exit code 2
srun: error: node001: task 0: Exited with exit code 1
"""
PROLOG = """\
slurmstepd-node001: error: Prolog failure on node node002
srun: error: Task launch for StepId=17.0 failed on node node002: Job prolog failed
srun: error: Application launch failed: Job prolog failed
srun: Job step aborted: Waiting up to 32 seconds for job step to finish.
slurmstepd-node001: error: *** STEP 17.0 ON node001 CANCELLED AT 2026-11-27T15:23:48 ***
srun: error: node001: task 0: Terminated
"""


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (EXECVE, {"node003": ("environment_missing", "/opt/shakedown/bin/python: No such file or directory"),
                  "node001": ("not_started", "Exited with exit code 1")}),
        (PROLOG, {"node002": ("prolog_failed", "Job prolog failed")}),
        ("slurmstepd-gpu-07: error: execve(): /opt/python: Permission denied", {"gpu-07": ("environment_missing", "/opt/python: Permission denied")}),
        ("slurmstepd-a: error: execve(): python: Exec format error\n", {"a": ("environment_missing", "python: Exec format error")}),
        ("srun: error: Task launch for StepId=3.0 failed on node n7: Communication connection failure", {"n7": ("node_failed", "Communication connection failure")}),
        ("srun: error: Task launch for 3.0 failed on node n7: Invalid job credential", {"n7": ("node_failed", "Invalid job credential")}),
        ("srun: error: Task launch for StepId=9.0 failed on node n[1-2]: Slurmd could not execve job", {
            "n1": ("node_failed", "Slurmd could not execve job"), "n2": ("node_failed", "Slurmd could not execve job")}),
        ("/opt/python: No module named runner\nsrun: error: node002: task 1: Exited with exit code 1\n", {"node002": ("environment_missing", "/opt/python: No module named runner")}),
        ("ModuleNotFoundError: No module named 'psutil'\nsrun: error: node[001-002]: tasks 0-1: Exited with exit code 1\n", {
            "node001": ("environment_missing", "ModuleNotFoundError: No module named 'psutil'"), "node002": ("environment_missing", "ModuleNotFoundError: No module named 'psutil'")}),
        ("/opt/python: error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file\nsrun: error: b: task 1: Exited with exit code 127", {
            "b": ("environment_missing", "/opt/python: error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file")}),
        ("/opt/python: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found\nsrun: error: b: task 1: Exited with exit code 1", {
            "b": ("environment_missing", "/opt/python: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found")}),
        ("srun: error: b: task 1: Illegal instruction (core dumped)", {"b": ("not_started", "Illegal instruction")}),
        ("srun: error: b: task 1: Exited with exit code 1", {"b": ("not_started", "Exited with exit code 1")}),
        # What a cancelled or killed job leaves says nothing of a start.
        ("srun: error: a: task 0: Terminated\nsrun: error: b: tasks 1-3: Killed\nsrun: forcing job termination", {}),
        ("slurmstepd-a: error: *** JOB 21 ON a CANCELLED AT 2026-11-27T15:23:48 DUE TO TIME LIMIT ***", {}),
        ("srun: cluster configuration lacks support for cpu binding", {}),
        ("srun: error: n[1-: task 1: Exited with exit code 1", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_which_agents_did_not_start_and_why(log, found):
    assert {node: (one.kind, one.why) for node, one in job_log.unstarted(log.splitlines()).items()} == found


def test_in_a_job_of_several_cells_each_has_its_own_lines():
    first, second = job_log.heading("torch-1n-r1"), job_log.heading("torch-1n-r10")
    lines = ["srun: lacks support", first, "one", second, "ten", "eleven"]
    assert job_log.of_cell(lines, "torch-1n-r1") == [first, "one"]
    assert job_log.of_cell(lines, "torch-1n-r10") == [second, "ten", "eleven"]
    assert job_log.of_cell(lines, "torch-1n-r2") == []  # its step has not begun
    assert job_log.of_cell(["one", "two"], "torch-1n-r1") == ["one", "two"]  # a job of an earlier version


@given(st.text())
def test_any_output_is_read(text):
    assert all(one.why for one in job_log.unstarted(text.splitlines()).values())
