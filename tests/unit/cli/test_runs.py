"""Looking at runs: what people see of them, and a run stopped from another terminal.

The run directories are written by hand here, as a controller writes them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from conftest import NAMES
from golden_files import check as golden
from runner.cli.main import cli
from runner.cluster import slurm as slurm_settings
from runner.errors import InfrastructureError, UsageError
from runner.launch.slurm import commands
from runner.launch.slurm.cancel import cancel_jobs
from runner.report.runs import changes, describe, details, node_states_text, overview, overview_table
from runner.results.rundir import RunDir
from runner.system.process import Outcome

RUNNER = Path(sys.executable).with_name("runner")
NOW = datetime(2026, 1, 2, 3, 10, 0, tzinfo=UTC)
RUN = "20260102-030405-abcd"
NODES = [{"name": name, "alias": f"node{i:03d}"} for i, name in enumerate(NAMES, start=1)]
CELLS = ["torch-8n-r1", "sft-llama-2-7b-8n-r1", "sft-llama-2-7b-8n-r2", "sft-llama-2-7b-8n-r3"]


def plan(**more):
    return {
        "run_id": RUN, "created": "2026-01-02T03:04:05Z", "engine": "torchrun", "inventory": "inventory/here",
        "nodes": NODES, "cells": [{"id": cell, "hosts": NAMES} for cell in CELLS], **more,
    }  # fmt: skip


def cell(state="planned", started=None, ended=None, error=None, **more):
    return {"state": state, "started": started, "ended": ended, "error": error, **more}


def status(state="running", cells=None, **more):
    cells = cells or {}
    return {"schema": 1, "run_id": RUN, "state": state, "cells": {c: cells.get(c, cell()) for c in CELLS}, **more}


def at(second, minute=4):
    return f"2026-01-02T03:{minute:02d}:{second:02d}Z"


def live_nodes(**states):
    """Eight running nodes, some of them otherwise: alias -> (state, heard)."""
    chosen = {node["name"]: states.get(node["alias"], ("running", "2026-01-02T03:09:59Z")) for node in NODES}
    return {host: {"state": state, "heard": heard} for host, (state, heard) in chosen.items()}


ATTEMPTED = {"state": "failed", "started": at(10), "ended": at(40), "hosts": NAMES, "job": None,
             "error": {"kind": "rank_killed", "message": "rank1 was ended by SIGKILL", "host": NAMES[7], "stderr": []},
             }  # fmt: skip

STATUSES = {
    "running": status(
        cells={
            CELLS[0]: cell("complete", at(6), at(30), attempt=1, attempts=[], job=None, nodes={}, progress=None),
            CELLS[1]: cell(
                "running", at(45), attempt=2, attempts=[ATTEMPTED],
                job={"id": "123", "state": "RUNNING", "reason": "None", "position": None, "start": None},
                nodes=live_nodes(node004=("silent", "2026-01-02T03:09:48Z"), node006=("starting", None)),
                progress={"fraction": 0.4, "phase": "all_reduce 8 MiB", "eta_s": 12},
            ),
            CELLS[2]: cell(
                "waiting", attempt=1, attempts=[], nodes={}, progress=None,
                job={"id": "124", "state": "PENDING", "reason": "Priority", "position": 2, "start": at(30, 40)},
            ),
        },
        replaced=[{"host": NAMES[7], "by": NAMES[6], "cell": CELLS[1], "reason": "rank_killed", "at": at(44)}],
    ),
    "failed": status(
        "failed",
        {
            CELLS[0]: cell("complete", at(6), at(30)),
            CELLS[1]: cell("failed", at(31), at(50), ATTEMPTED["error"], nodes=live_nodes()),
            CELLS[2]: cell("incomplete", at(51), None, {"message": "node002 said nothing", "host": None, "stderr": []}),
            CELLS[3]: cell("cancelled"),
        },
    ),
}  # fmt: skip


def make(results, run_id=RUN, state=None, summary=None, **more):
    run = RunDir.create(results, plan(**more) | {"run_id": run_id})
    run.write_status(state or STATUSES["failed"])
    if summary:
        run.summary.write_text(json.dumps(summary))
    return run


def runner(*arguments):
    done = CliRunner().invoke(cli, ["runs", *map(str, arguments)])
    return done if done.exception is None or isinstance(done.exception, SystemExit) else raise_(done.exception)


def raise_(error):
    raise error


CONTROLLER = """
import json, pathlib, signal, sys, time
from runner.results.rundir import RunDir
run = RunDir(pathlib.Path(sys.argv[1]))
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
status = json.loads(run.status.read_text())
def say(run_state, **cell):
    status["state"] = run_state
    status["cells"]["torch-8n-r1"].update(cell)
    run.write_status(status)
with run.alive():
    say("running", state="running", started="2026-01-02T03:04:06Z")
    print("ready", flush=True)
    %s
"""
UNTIL_STOPPED = """
    while not asked: time.sleep(0.02)
    time.sleep(0.5)
    say("cancelled", state="cancelled", ended="2026-01-02T03:04:30Z")
"""


@pytest.fixture
def controller():
    """Starts a process that holds a run as its controller does and carries out a few lines of Python."""
    started = []

    def start(run, script=UNTIL_STOPPED):
        process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLER % script.strip(), run.path], stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# --- list -----------------------------------------------------------------------------------------


def test_list_tells_state_verdict_and_times_newest_last(tmp_path):
    make(tmp_path, "20260102-000000-0001", STATUSES["failed"], {"verdict": "not_judged"})
    (make(tmp_path, "20260103-000000-0002").path / "status.json").write_text("{")
    make(tmp_path, "20260104-000000-0003")
    rows = json.loads(runner("list", "--json", "--results", tmp_path).stdout)
    assert [row["run"][:8] for row in rows] == ["20260102", "20260103", "20260104"]
    assert rows[1] == {"run": "20260103-000000-0002", "state": "unreadable"}
    assert rows[0] == {
        "run": "20260102-000000-0001", "state": "failed", "verdict": "not_judged", "cells": "1/4",
        "started": "2026-01-02T03:04:05Z", "ended": "2026-01-02T03:04:51Z", "duration_s": 46.0,
        "nodes": 8, "engine": "torchrun", "inventory": "inventory/here",
    }  # fmt: skip
    limited = runner("list", "--limit", 2, "--results", tmp_path).stdout
    assert "20260102-" not in limited and "unreadable" in limited and "20260104-" in limited


def test_a_run_that_goes_on_has_no_end_and_no_verdict(tmp_path, controller):
    run = make(tmp_path, state=status(), summary={"verdict": "pass"})  # of the judgement before it was resumed
    controller(run)
    row = overview(run, NOW)
    assert (row["state"], row["verdict"], row["ended"], row["duration_s"]) == ("running", None, None, 355.0)


@pytest.mark.parametrize(
    ("hosts", "num_nodes", "used"),
    [
        ([NAMES[:2], NAMES[:4]], (2, 4), 4),
        ([NAMES[:2], [NAMES[0], NAMES[3]]], (2, 2), 3),  # one was replaced
        ([[], []], (1, 2), 2),  # Slurm is to choose among eight
    ],
)
def test_list_counts_the_nodes_that_a_run_uses_not_those_it_could_have(tmp_path, hosts, num_nodes, used):
    cells = [{"id": f"c{n}", "hosts": on, "num_nodes": n} for on, n in zip(hosts, num_nodes, strict=True)]
    run = make(tmp_path, state=status("complete"), cells=cells)
    assert overview(run, NOW)["nodes"] == used


@pytest.mark.parametrize("deleted", [False, True])
def test_show_tail_and_list_agree_on_the_newest_run(tmp_path, deleted):
    for number in (1, 2, 3):
        run = make(tmp_path, f"20260102-00000{number}-aaaa")
        run.log.write_text(f"2026-01-02T03:04:05Z {CELLS[0]} node001 rank0.stdout: of run {number}\n")
    if deleted:  # `latest` points to what is gone
        shutil.rmtree(run.path)
    newest = 2 if deleted else 3
    assert f"files: {tmp_path}/20260102-00000{newest}-aaaa" in runner("show", "--results", tmp_path).stdout
    assert f"of run {newest}" in runner("tail", "--results", tmp_path).stdout
    assert f"20260102-00000{newest}-aaaa" in runner("list", "--results", tmp_path).stdout.splitlines()[-1]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_of_runs_gives_way_in_a_narrow_terminal(tmp_path, width):
    run = make(tmp_path, summary={"verdict": "inconclusive"})
    text = overview_table([overview(run, NOW)], width)
    assert all(len(line) <= width for line in text.splitlines())
    assert RUN in text and "failed" in text and "inconclusive" in text
    assert ("inventory/here" in text) == (width == 120)


def test_no_runs_are_an_empty_list(tmp_path):
    assert json.loads(runner("list", "--json", "--results", tmp_path / "none").stdout) == []
    assert "no run in" in runner("list", "--results", tmp_path / "none").stdout


# --- show -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("state", STATUSES)
def test_show(state, width):
    text = describe(plan(), STATUSES[state], NOW, width)
    assert all(len(line) <= width for line in text.splitlines())
    golden(f"runs/show-{state}-{width}.txt", text + "\n")


def test_a_brief_look_leaves_out_what_there_is_nothing_to_say_of():
    text = describe(plan(), STATUSES["running"], NOW, 80, brief=True)
    assert CELLS[1] in text and CELLS[2] in text and "1 of 4 cells complete" in text
    assert CELLS[0] not in text and CELLS[3] not in text
    assert (
        describe(plan(), status("planned"), NOW, 80, brief=True).strip() == f"run {RUN}: planned, 0 of 4 cells complete"
    )


def test_show_of_a_run_tells_verdict_and_files(tmp_path):
    run = make(tmp_path, summary={"verdict": "not_judged"})
    shown = runner("show", "--results", tmp_path)
    assert shown.exit_code == 0
    assert "verdict: not judged" in shown.stdout and str(run.path) in shown.stdout


def test_show_tells_of_a_job_that_goes_on_without_its_controller(tmp_path):
    job = {"id": "124", "state": "running", "reason": "", "position": None, "start": at(30)}
    make(tmp_path, state=status(cells={CELLS[0]: cell("running", at(6), job=job)}))
    text = runner("show", "--results", tmp_path).stdout
    assert "incomplete, 0 of 4 cells complete" in text and "no controller saw job 124 end" in text
    assert f"`runner bench --resume {RUN}`" in text and f"`runner runs stop {RUN}`" in text
    make(tmp_path, run_id=f"{RUN}2", state=status("incomplete", {CELLS[0]: cell("incomplete", at(6), at(9), job=job)}))
    assert "no controller" not in runner("show", "--results", tmp_path).stdout


def test_a_job_that_runs_is_not_expected_to_start():
    job = {"id": "124", "state": "running", "reason": "", "position": None, "start": at(30)}
    lines = {state: details(cell(state, at(6), job=job), {}, NOW)[0] for state in ("waiting", "running")}
    assert "expected to start" in lines["waiting"] and lines["running"] == "job 124 running"


def test_json_of_show_is_the_status_as_it_is_to_be_read(tmp_path):
    make(tmp_path, state=status(cells={CELLS[0]: cell("running", at(6))}))  # its controller is dead
    shown = json.loads(runner("show", RUN[:8], "--json", "--results", tmp_path).stdout)
    assert shown["state"] == shown["cells"][CELLS[0]]["state"] == "incomplete"


def test_nodes_are_folded_by_state_the_longest_silence_is_told():
    nodes = {
        "a1": {"state": "silent", "heard": "2026-01-02T03:09:30Z"},
        "a2": {"state": "silent", "heard": "2026-01-02T03:09:50Z"},
        "a3": {"state": "ended", "heard": "2026-01-02T03:09:50Z"},
        "a4": {"state": "later versions say more", "heard": None},
    }
    assert node_states_text(nodes, {}, NOW) == "a3 ended, a[1-2] silent for 30 s, a4 later versions say more"
    assert node_states_text(nodes, {"a1": "b9"}, None) == "a3 ended, a2,b9 silent, a4 later versions say more"


def test_what_nodes_said_cannot_steer_the_terminal():
    error = {
        "kind": "rank_crashed",
        "message": "\x1b]0;title\x07\x1b[31mred\x1b[0m\r\x08 text",
        "host": None,
        "stderr": [],
    }
    text = describe(plan(), status("failed", {CELLS[0]: cell("failed", at(1), at(2), error)}), NOW, 80)
    assert "rank crashed: red text" in text and re.sub(r"[\n -~…]", "", text) == ""


def test_watch_tells_each_change_once_and_not_what_moves_by_itself():
    nodes = live_nodes(node004=("silent", at(48)))
    steps = [
        cell(), cell("waiting", at(6), job={"id": "7", "state": "PENDING", "reason": "Priority", "position": 2}),
        cell("running", at(9), progress={"fraction": 0.1, "phase": "all_reduce"}),
        cell("running", at(9), progress={"fraction": 0.9, "phase": "all_reduce"}),
        cell("running", at(9), nodes=nodes), cell("running", at(9), nodes=nodes), cell("complete", at(9), at(50)),
    ]  # fmt: skip
    assert list(changes(plan(), [status(cells={CELLS[0]: step}) for step in steps])) == [
        "torch-8n-r1: waiting; job 7 pending: Priority, position 2 in the queue",
        "torch-8n-r1: running",
        "torch-8n-r1: running; node[001-003,005-008] running, node004 silent",
        "torch-8n-r1: complete",
    ]


TRAINS = {"fraction": 0.375, "phase": "training", "eta_s": None, "at": at(58), "detail": "step 4 of 8, rollout",
          "result": "step 3: reward 0.250, 9 s, rollout 44 %"}  # fmt: skip
FOUND = {"state": "complete", "started": at(1), "ended": at(3), "error": None, "inputs": {}, "left": {"model": "/m"}}


def test_a_training_shows_its_stage_step_phase_and_reward():
    stages = {"prepare": FOUND, "publish": {**FOUND, "state": "planned", "started": None, "ended": None}}
    now = NOW.replace(minute=4, second=59)
    text = describe(plan(), status(cells={CELLS[0]: cell("running", at(9), progress=TRAINS)}, stages=stages), now, 100)
    lines = [line.strip() for line in text.splitlines()]
    assert "38 %, training: step 4 of 8, rollout" in lines and "step 3: reward 0.250, 9 s, rollout 44 %" in lines
    assert [line.split()[:2] for line in lines if line.startswith(("prepare", CELLS[0], "publish"))] == [
        ["prepare", "complete"], [CELLS[0], "running"], ["publish", "planned"],
    ]  # fmt: skip


def test_a_training_that_is_silent_says_since_when():
    late = NOW.replace(minute=9, second=58)
    text = describe(plan(), status(cells={CELLS[0]: cell("running", at(9), progress=TRAINS)}), late, 100)
    assert "training: step 4 of 8, rollout; nothing new for 5 min" in text


def test_watch_tells_what_each_step_gave_and_not_each_phase():
    moved = [
        TRAINS, {**TRAINS, "detail": "step 4 of 8, update actor"},
        {**TRAINS, "detail": "step 5 of 8", "result": "step 4: reward 0.500, 9 s; NaN: actor/grad_norm"},
    ]  # fmt: skip
    steps = [status(cells={CELLS[0]: cell("running", at(9), progress=one)}) for one in moved]
    assert list(changes(plan(), steps)) == [
        "torch-8n-r1: running; step 3: reward 0.250, 9 s, rollout 44 %",
        "torch-8n-r1: running; step 4: reward 0.500, 9 s; NaN: actor/grad_norm",
    ]


def test_watch_goes_on_until_the_run_ends(tmp_path, controller):
    run = make(tmp_path, state=status())
    controller(run, 'time.sleep(2); say("complete", state="complete", ended="2026-01-02T03:04:30Z")')
    shown = runner("show", "--watch", "--results", tmp_path)
    assert re.search(r"Z torch-8n-r1: running\n.*Z torch-8n-r1: complete\n", shown.stdout)
    assert f"run {RUN}: complete, 1 of 4 cells complete" in shown.stdout


def test_ctrl_c_ends_the_look_and_not_the_run(tmp_path, controller):
    run = make(tmp_path, state=status())
    held = controller(run)
    for command in (["show", "--watch"], ["tail", "--follow"]):
        look = subprocess.Popen([RUNNER, "runs", *command, "--results", tmp_path], stdout=-1, stderr=-1, text=True)
        time.sleep(1.5)
        look.send_signal(2)
        _, said = look.communicate(timeout=20)
        assert (look.returncode, said) == (130, f"runner: no longer watching; run {RUN} continues\n")
    assert run.controller() == held.pid


# --- tail -----------------------------------------------------------------------------------------

LOG = f"""\
{at(5)} runner bench --nodes 8
{at(6)} {CELLS[0]} node002 rank1.stderr: [W1121 03:04:06.373738351 socket.cpp:207] [rank1] no name for 10.0.0.12
{at(6)} {CELLS[0]} node001 rank0.stderr: [W1121 03:04:06.373999351 socket.cpp:207] [rank0] no name for 10.0.0.11
{at(6)} {CELLS[0]} node001 rank0.stdout: loss 2.50
{at(6)} {CELLS[0]} node002 rank1.stdout: loss 2.75
{at(7)} {CELLS[0]} node003 rank2.stderr: [W1121 03:04:07.000000001 socket.cpp:207] [rank2] no name for 10.0.0.13
{at(7)} {CELLS[0]} node003 rank2.stdout: loss 2.50
{at(8)} {CELLS[0]} node003 rank2.stdout: step 1
{at(8)} {CELLS[0]} node003 rank2.stdout: step 2
{at(8)} {CELLS[0]} node001 rank0.stdout: step 1
{at(8)} {CELLS[0]} node001 rank0.stdout: step 2
{at(20)} {CELLS[0]} node001 rank0.stdout: step 2
{at(21)} {CELLS[0]} launcher engine.stdout: node001: [INFO] process 70 spawned
{at(21)} {CELLS[0]} launcher engine.stdout: node008: [INFO] process 64 spawned
{at(22)} {CELLS[0]} node001 rank0.stderr: \x1b[31mred\x1b[0m\ttab: not a cell
{at(30)} {CELLS[0]}: failed after 24 s
{at(30)}   rank1 was ended
by SIGKILL
{at(31)} {CELLS[1]} node003 rank2.stdout: frame at 0x7f32ab from pid 1000000
{at(31)} {CELLS[1]} node004 rank3.stdout: frame at 0x7f99cd from pid 1203456
{at(31)} {CELLS[1]} node005 rank4.stdout: frame at 0x7f99ce from pid 1900001
{at(31)} {CELLS[1]} node006 rank5.stdout: frame at 0x7f99cf from pid 1900003
"""


def logged(tmp_path, text=LOG, **more):
    run = make(tmp_path, **more)
    run.log.write_text(text)
    return run


def test_tail_folds_what_nodes_say_alike(tmp_path):
    logged(tmp_path)
    golden("runs/tail.txt", runner("tail", "-n", 99, "--results", tmp_path).stdout)


def test_tail_is_the_end_of_the_whole(tmp_path):
    logged(tmp_path)
    whole = runner("tail", "-n", 99, "--results", tmp_path).stdout.splitlines()
    for count in (0, 1, 2, 3, 7):
        assert runner("tail", "-n", count, "--results", tmp_path).stdout.splitlines() == whole[len(whole) - count :]


def test_the_first_of_the_last_lines_is_folded_from_all_its_nodes(tmp_path):
    said = (f"{at(s)} {CELLS[0]} n{n} rank{n}.stdout: now {s}" for s in range(10, 50, 5) for n in range(60))
    logged(tmp_path, "".join(f"{line}\n" for line in said))
    lines = runner("tail", "-n", 2, "--results", tmp_path).stdout.splitlines()
    assert lines == [f"03:04:{s} {CELLS[0]} n[0-59] rank[0-59].stdout: now {s}" for s in (40, 45)]


def test_tail_chooses_by_cell_and_host(tmp_path):
    logged(tmp_path)
    chosen = runner("tail", "--cell", CELLS[1], "--results", tmp_path).stdout
    assert chosen.startswith(f"03:04:31 {CELLS[1]} node[003-006] rank[2-5].stdout: ") and chosen.count("\n") == 1
    for hosts in (f"node003,{NAMES[3]}", "node[003-004]"):
        both = runner("tail", "--host", hosts, "-n", 1, "--results", tmp_path).stdout
        assert " node[003-004] rank[2-3].stdout: frame at 0x7f32ab from pid [1000000,1203456]" in both
    assert "process [64,70]" in runner("tail", "--host", "launcher", "--results", tmp_path).stdout
    with pytest.raises(UsageError, match="--host node009: unknown node 'node009'; did you mean 'node00"):
        runner("tail", "--host", "node009", "--results", tmp_path)
    with pytest.raises(UsageError, match="unknown cell 'torch-8n-r2'; did you mean 'torch-8n-r1'"):
        runner("tail", "--cell", "torch-8n-r2", "--results", tmp_path)


def test_a_run_without_a_log_says_so(tmp_path):
    make(tmp_path)
    with pytest.raises(UsageError, match="has no log"):
        runner("tail", "--results", tmp_path)


def test_follow_goes_on_until_the_run_has_ended_and_tells_every_line(tmp_path, controller):
    run = logged(tmp_path, f"{at(5)} the past\n{at(5)} the start of a li", state=status())
    runner("tail", "--results", tmp_path)  # what it imports takes time once
    controller(run, """
    log = open(run.log, "a")
    log.write("ne\\n")
    for second in range(6, 10):
        time.sleep(1.2 if second == 8 else 0.3)
        ranks = ((f"2026-01-02T03:04:{second:02d}Z torch-8n-r1 node00{n}", n - 1) for n in (1, 2, 3))
        log.write("".join(f"{start} rank{k}.stdout: now {second}\\n" for start, k in ranks))
        log.flush()  # all three at once: however slow this machine is, they come together
    say("complete", state="complete", ended="2026-01-02T03:04:30Z")
    """)  # fmt: skip
    said = runner("tail", "--follow", "--results", tmp_path).stdout.splitlines()
    assert said == [
        "03:04:05 the past",
        "03:04:05 the start of a line",
        *(f"03:04:0{s} {CELLS[0]} node[001-003] rank[0-2].stdout: now {s}" for s in (6, 7, 8, 9)),
    ]


# --- stop -----------------------------------------------------------------------------------------


def test_stop_waits_until_the_controller_has_ended_in_good_order(tmp_path, controller):
    run = make(tmp_path, state=status())
    controller(run)
    stopped = runner("stop", "--results", tmp_path)
    assert stopped.exit_code == 0
    assert stopped.stdout == f"run {RUN}: cancelled, 0 of 4 cells complete\n"
    assert stopped.stderr == f"asked run {RUN} to stop; waiting until it has ended\n"
    assert run.controller() is None


def test_stop_without_waiting_only_asks(tmp_path, controller):
    run = make(tmp_path, state=status())
    held = controller(run)
    assert runner("stop", "--no-wait", "--results", tmp_path).stdout == f"asked run {RUN} to stop\n"
    assert held.wait(timeout=10) == 0


def test_a_run_that_is_over_cannot_be_stopped_and_nobody_is_signalled(tmp_path):
    run = make(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (run.path / ".alive").write_text(str(bystander.pid))  # a process id that no lock proves
        with pytest.raises(UsageError, match="is not running: its state is failed"):
            runner("stop", "--results", tmp_path)
        assert bystander.poll() is None
        bystander.kill()


def test_a_controller_that_lives_on_another_machine_is_named(tmp_path, beating):
    run = make(tmp_path, state=status(controller={"host": "login2.example", "pid": 4711}))
    with (
        beating(run),
        pytest.raises(UsageError, match=r"carried out on login2.example \(process 4711\): stop it there"),
    ):
        runner("stop", "--results", tmp_path)
    assert "login2.example (process 4711)" in runner("show", "--results", tmp_path).stdout


def test_one_that_died_there_keeps_nobody_from_stopping_what_it_left(tmp_path, beating):
    make(tmp_path, state=status(controller={"host": "login2.example", "pid": 4711}))
    with pytest.raises(UsageError, match="is not running: its state is incomplete"):
        runner("stop", "--results", tmp_path)


def test_a_controller_there_that_holds_its_run_and_shows_nothing_is_no_process_of_this_machine(
    tmp_path, beating, controller
):
    """It may be suspended; its process id may be another process's here."""
    run = make(tmp_path, state=status(controller={"host": "login2.example", "pid": 4711}))
    held = controller(run)
    with pytest.raises(UsageError, match=r"carried out on login2.example"):
        runner("stop", "--no-wait", "--results", tmp_path)
    time.sleep(0.3)
    assert held.poll() is None


def test_where_a_run_that_is_over_was_carried_out_matters_no_more(tmp_path):
    make(tmp_path, state=status("failed", controller={"host": "login2.example", "pid": 4711}))
    assert "login2" not in runner("show", "--results", tmp_path).stdout
    with pytest.raises(UsageError, match="is not running: its state is failed"):
        runner("stop", "--results", tmp_path)


def test_a_controller_of_this_machine_that_died_is_no_other_machines(tmp_path):
    make(tmp_path, state=status(controller={"host": socket.gethostname(), "pid": os.getpid()}))
    with pytest.raises(UsageError, match="is not running: its state is incomplete"):
        runner("stop", "--results", tmp_path)


class Cluster:
    """Slurm's commands as a stand-in: names of jobs by id, which leave the queue some looks after they were cancelled."""

    def __init__(self, jobs, looks_to_end=1):
        self.jobs, self.looks_to_end, self.cancelled, self.slept = jobs, looks_to_end, [], 0.0

    def run(self, argv, **_):
        if argv[0] == "scancel":
            self.cancelled.append(argv[-1])
            return Outcome(tuple(argv), 0, 0.0, "", "")
        if self.cancelled:
            self.looks_to_end -= 1
        left = {i: name for i, name in self.jobs.items() if self.looks_to_end >= 0 or i not in self.cancelled}
        return Outcome(tuple(argv), 0, 0.0, "".join(f"{job_id} {name}\n" for job_id, name in left.items()), "")

    def sleep(self, seconds):
        self.slept += seconds

    def cancel(self, wait=True):
        return cancel_jobs(commands.SlurmClient(slurm_settings.Settings(), run=self.run), RUN, wait, self.sleep)


def test_jobs_left_behind_are_cancelled_by_id_and_those_of_others_are_not():
    cluster = Cluster({
        "1": f"shakedown-{RUN}-{CELLS[0]}-1", "2": f"shakedown-{RUN}-all-{CELLS[1]}-1",
        "3": f"shakedown-{RUN}0-{CELLS[2]}-1", "4": "somebody else's",
    })  # fmt: skip
    assert cluster.cancel() == ["1", "2"]
    assert cluster.cancelled == ["1", "2"] and cluster.slept > 0


def test_a_job_that_slurm_does_not_end_is_told():
    cluster = Cluster({"7": f"shakedown-{RUN}-{CELLS[0]}-1"}, looks_to_end=10**6)
    with pytest.raises(InfrastructureError, match=r"job 7 cancelled .* ago and not ended"):
        cluster.cancel()
    assert cluster.cancel(wait=False) == ["7"]


def test_stop_of_a_run_whose_controller_died_cancels_its_job(tmp_path):
    """squeue and scancel are stand-ins here: two shell scripts and a file with the queue."""
    run = make(
        tmp_path / "results",
        state=status(cells={CELLS[0]: cell("running", at(6), job={"id": "41", "state": "RUNNING"}),
                            CELLS[1]: cell("complete", at(6), at(9), job={"id": "40", "state": "COMPLETED"})}),
        slurm={"partition": "gpu"},
    )  # fmt: skip
    queue, programs = tmp_path / "queue", tmp_path / "bin"
    programs.mkdir()
    queue.write_text(f"41 shakedown-{RUN}-{CELLS[0]}-1\n")
    for name, script in (
        ("squeue", f"cat {queue}"),
        ("scancel", f"echo $* >> {queue}.said; sed -i d {queue}"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    stop = [RUNNER, "runs", "stop", "--results", run.path.parent]
    done = subprocess.run(stop, env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, f"run {RUN} had no controller; cancelled job 41\n"), done.stderr
    assert Path(f"{queue}.said").read_text() == "41\n"
    done = subprocess.run(stop, env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (
        2, f"runner: run {RUN} is not running: its state is incomplete; none of its jobs is waiting or running\n",
    )  # fmt: skip


# --- the command line -----------------------------------------------------------------------------


def test_names_of_runs_are_completed(tmp_path):
    make(tmp_path)
    words = {"_RUNNER_COMPLETE": "bash_complete", "COMP_WORDS": "runner runs show 2026", "COMP_CWORD": "3"}
    environment = {**os.environ, **words, "RUNNER_RESULTS": str(tmp_path)}
    done = subprocess.run([RUNNER], env=environment, capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == f"plain,{RUN}"


def test_watch_and_json_exclude_each_other(tmp_path):
    with pytest.raises(UsageError, match="--watch and --json"):
        runner("show", "--watch", "--json", "--results", tmp_path)
