"""What a run does when cells fail: retries, spares, what can still run, and what a resumed run keeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from runs import FACTS, NAMES, NodeAccess, Nodes, carry_out, ended_session, missing, planned, states
from slurm_commands import Commands, line
from slurm_commands import cluster as slurm_cluster

from conftest import listing
from runner.cli.conclusion import print_conclusion
from runner.cluster import facts, inventory, ssh
from runner.cluster.inventory import Inventory, Node
from runner.errors import EXIT_INTERRUPTED, UsageError
from runner.failures import Problem
from runner.launch import agents, blame, drift
from runner.launch import run as bench
from runner.launch.signals import Stop
from runner.launch.slurm import allocations, answers, ledger
from runner.launch.supply import Data
from runner.launch.watch import CellContext, CellRun
from runner.node.protocol import Line
from runner.plan import build, plan
from runner.report import runs as reported
from runner.report.progress import Display
from runner.report.tables import took
from runner.results import celldir
from runner.results.rundir import RunDir
from runner.results.status import each_error, joined
from runner.workloads.registry import TESTS


def test_the_plan_comes_back_from_its_file(cluster, tmp_path):
    built = planned(cluster, tmp_path, counts=(1, 2), spares=1)
    again = plan.Plan.from_dict(json.loads(json.dumps(built.to_dict())))
    assert json.dumps(again.to_dict()) == json.dumps(built.to_dict())
    assert [plan.fingerprint(again, cell) for cell in again.cells] == [
        plan.fingerprint(built, cell) for cell in built.cells
    ]


def test_the_fingerprint_is_of_what_is_measured_not_of_where(cluster, tmp_path):
    built = planned(cluster, tmp_path)
    [cell] = built.cells
    elsewhere = build.place(cell, cluster.nodes[4:6], built, None)
    longer = replace(cell, params={**cell.params, "iters": 11})
    assert plan.fingerprint(built, elsewhere) == plan.fingerprint(built, cell) != plan.fingerprint(built, longer)


def test_infrastructure_is_tried_again_and_the_first_attempt_is_kept(cluster, tmp_path):
    nodes, status, _ = carry_out(planned(cluster, tmp_path), ("torch", "lost_connection", None), retries=2)
    entry = status["cells"]["torch-2n-r1"]
    assert (entry["state"], entry["attempt"], [a["error"]["kind"] for a in entry["attempts"]]) == (
        "complete", 2, ["lost_connection"],
    )  # fmt: skip
    assert nodes.tried[0][2] != nodes.tried[1][2], "the old rendezvous may still hold its port"
    assert (nodes.run.earlier("torch-2n-r1", 1) / NAMES[0] / "facts.json").exists()
    assert len(nodes.run.read_records()) == 2, "what the first attempt measured is not counted"


def test_what_the_ranks_have_chosen_is_kept_with_the_cell(cluster, tmp_path):
    """That of its last attempt: another node may have another GPU."""

    class Choosing(Nodes):
        def gather(self, planned, cell):
            used = {"event": "used", "rank": 0, "time_s": 1.5, "attention": f"kind {len(self.tried)}", "compile": False}
            with self.run.cell(cell.hosts[0], cell.id).events(0).open("a") as file:
                file.write(json.dumps(used) + "\n")
            return {}

    built = planned(cluster, tmp_path)
    run = RunDir(Path(built.run_dir))
    RunDir.create(run.path.parent, built.to_dict())
    nodes = Choosing(run, ("torch", "lost_connection", None))
    carried = bench.Run(built, run, nodes, Display(quiet=True), None, bench.Policy(2, False), NodeAccess())
    carried.stop.wait = lambda seconds: None
    carried.execute({})
    assert len(nodes.tried) == 2
    assert run.read_status()["cells"]["torch-2n-r1"]["used"] == {"attention": "kind 2", "compile": False}
    assert {record.metric for record in run.read_records()} == {"busbw_gb_per_s"}


def test_a_users_mistake_is_not_tried_again(cluster, tmp_path):
    nodes, status, _ = carry_out(planned(cluster, tmp_path), ("torch", "rank_crashed", NAMES[1]), retries=5)
    assert len(nodes.tried) == 1 and states(status) == {"torch-2n-r1": "incomplete"}


def test_the_second_run_of_a_kind_has_an_eta_and_the_first_has_none(cluster, tmp_path):
    class Shown(Display):
        left: list[float | None]

        def at(self, done, total, text, left_s=None):
            self.left.append(left_s)

    class Slow(Nodes):
        def converse(self, planned, cell, watch, data, context):
            watch.on_progress(0.5, "all_reduce")
            time.sleep(0.3)
            return super().converse(planned, cell, watch, data, context)

    lefts = []
    for number in range(2):
        built = planned(cluster, tmp_path / "results", counts=(1, 2))
        built = replace(built, run_id=f"2026010{number}", run_dir=str(tmp_path / "results" / f"2026010{number}"))
        run = RunDir.create(tmp_path / "results", built.to_dict())
        display = Shown(quiet=True)
        display.left = []
        bench.Run(built, run, Slow(run), display, None, bench.Policy(), NodeAccess()).execute({})
        lefts.append(display.left)
    assert set(lefts[0]) == {None}
    first = [left for left in lefts[1] if left is not None]
    assert max(first) == pytest.approx(0.6, abs=0.4) and min(first) < max(first) / 1.5
    entry = run.read_status()["cells"]["torch-2n-r1"]
    assert entry["phases"]["all_reduce"] == pytest.approx(0.3, abs=0.25)


def test_what_a_rank_notices_is_shown_at_once_and_what_it_does_is_kept_with_the_progress(cluster, tmp_path):
    class Training(Nodes):
        def converse(self, planned, cell, watch, data, context):
            super().converse(planned, cell, watch, data, context)
            session = type("Session", (), {"name": cell.hosts[0]})()
            event = {
                "event": "progress",
                "done": 3,
                "total": 8,
                "phase": "training",
                "detail": "step 4 of 8",
                "result": "r",
            }
            for one in (event, {"event": "notice", "text": "NaN in step 3: actor/grad_norm"}):
                watch.receive(session, Line("rank0.jsonl", json.dumps(one)))
            seen.append((carried.journal.entry(cell)["progress"], watch.stall_s))

    seen, notes = [], []
    built = planned(cluster, tmp_path)
    run = RunDir.create(tmp_path, built.to_dict())
    display = Display(quiet=True)
    display.note = notes.append
    carried = bench.Run(built, run, Training(run), display, None, bench.Policy(), NodeAccess())
    carried.execute({})
    progress, stall_s = seen[0]
    assert (progress["fraction"], progress["detail"], progress["result"]) == (0.375, "step 4 of 8", "r")
    alias = built.nodes[0].alias
    assert f"{built.cells[0].id}: {alias}: NaN in step 3: actor/grad_norm" in notes
    assert stall_s == TESTS[built.cells[0].test].silent_s and TESTS["rl"].silent_s > stall_s


def test_while_a_retry_waits_a_cell_has_not_failed(cluster, tmp_path):
    built = planned(cluster, tmp_path)
    run = RunDir.create(tmp_path, built.to_dict())
    carried = bench.Run(
        built,
        run,
        Nodes(run, ("torch", "lost_connection", None)),
        Display(quiet=True),
        None,
        bench.Policy(1),
        NodeAccess(),
    )
    seen = []
    carried.stop.wait = lambda seconds: seen.append(run.read_status()["cells"]["torch-2n-r1"])
    carried.execute({})
    [entry] = seen
    assert (entry["state"], entry["error"], entry["attempt"]) == ("planned", None, 2)
    assert [attempt["error"]["kind"] for attempt in entry["attempts"]] == ["lost_connection"]


def test_a_stop_while_a_retry_waits_cancels_the_cell(cluster, tmp_path):
    built = planned(cluster, tmp_path)
    run = RunDir.create(tmp_path, built.to_dict())
    nodes = Nodes(run, ("torch", "lost_connection", None))
    carried = bench.Run(built, run, nodes, Display(quiet=True), None, bench.Policy(1), NodeAccess())

    def stopped(seconds: float) -> None:
        carried.stop.asked = True

    carried.stop.wait = stopped
    carried.execute({})
    assert states(run.read_status()) == {"torch-2n-r1": "cancelled"} and len(nodes.tried) == 1


def test_retries_end(cluster, tmp_path):
    nodes, status, _ = carry_out(planned(cluster, tmp_path), ("torch", "hung", NAMES[1]), retries=2)
    assert len(nodes.tried) == 3 and status["cells"]["torch-2n-r1"]["error"]["host"] == NAMES[1]


def test_the_time_that_an_attempt_took_ends_with_its_gathering(cluster, tmp_path, monkeypatch):
    def slow(self, planned, cell):
        time.sleep(1.1)
        return {}

    monkeypatch.setattr(Nodes, "gather", slow)
    nodes, _, _ = carry_out(planned(cluster, tmp_path))
    assert "torch-2n-r1: complete after 1 s" in nodes.run.log.read_text()


@pytest.mark.parametrize("known", [True, False])
def test_a_node_that_is_known_to_be_dead_is_not_waited_for_again_at_gathering(cluster, tmp_path, monkeypatch, known):
    """Its kernel accepts connections, and nothing answers there, as on a node that hangs."""
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        dead.listen()
        variables = {"ansible_host": "127.0.0.1", "ansible_port": dead.getsockname()[1]}
        node = inventory.parse("inv", listing({NAMES[1]: variables})).nodes[0]
        built = planned(cluster, tmp_path)
        built = replace(built, nodes=(built.nodes[0], node))
        cell = replace(built.cells[0], hosts=(NAMES[1],))
        run = RunDir.create(tmp_path, built.to_dict())
        problem = {NAMES[1]: Problem("unreachable", "no answer on its SSH port")}
        monkeypatch.setattr(agents, "ask", lambda *_, **__: ({}, problem if known else {}))
        monkeypatch.setattr(agents, "converse", lambda *_, **__: None)
        watch = CellRun(cell, Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
        with ssh.rendered(inventory.parse("inv", listing({NAMES[1]: variables}))) as config:
            config = shorter(config)
            transport = agents.Agents(run, config)
            transport.converse(built, cell, watch, None, None)
            started = time.monotonic()
            missing = transport.gather(built, cell)
            took = time.monotonic() - started
    assert missing[NAMES[1]].kind == "hung" and "nothing answers on its SSH port" in missing[NAMES[1]].message
    assert (took < WAIT_S) == known


WAIT_S = 4  # instead of the 10 s of a rendered file


def shorter(config: str) -> str:
    text = Path(config).read_text()
    Path(config).write_text(text.replace("ConnectTimeout 10", f"ConnectTimeout {WAIT_S}"))
    return config


def test_a_spare_takes_the_place_of_a_failed_node_for_good(cluster, tmp_path):
    built = planned(cluster, tmp_path, counts=(1, 2), spares=2)
    nodes, status, after = carry_out(built, ("2n", "lost_connection", NAMES[1]), replace_bad=True)
    assert states(status) == {"torch-1n-r1": "complete", "torch-2n-r1": "complete"}
    [swap] = status["replaced"]
    assert (swap["host"], swap["by"], swap["cell"]) == (NAMES[1], NAMES[2], "torch-2n-r1")
    assert nodes.tried[-1][1] == (NAMES[0], NAMES[2])
    assert after.cells[1].hosts == (NAMES[0], NAMES[2]), "plan.json tells what ran where"
    assert [node.name for node in after.spares] == [NAMES[3]]


def test_a_spare_that_is_no_good_is_passed_over(cluster, tmp_path):
    built = planned(cluster, tmp_path, spares=2)
    access = NodeAccess(node003=Problem("unreachable", "nothing listens on its SSH port"))
    nodes, status, _ = carry_out(built, ("torch", "hung", NAMES[0]), replace_bad=True, access=access)
    assert status["replaced"][0]["by"] == NAMES[3]
    assert nodes.tried[-1][1] == (NAMES[1], NAMES[3])


def test_without_a_spare_cells_that_can_still_run_do(cluster, tmp_path):
    built = planned(cluster, tmp_path, counts=(1, 2, 3))
    nodes, status, _ = carry_out(built, ("", "lost_connection", NAMES[0]), replace_bad=True)
    assert states(status) == {"torch-1n-r1": "complete", "torch-2n-r1": "complete", "torch-3n-r1": "failed"}
    assert "needs 3 nodes, 2 are good" in status["cells"]["torch-3n-r1"]["error"]["message"]
    assert [len(hosts) for cell, hosts, _ in nodes.tried if NAMES[0] not in hosts] == [1, 2]


def test_a_node_that_slurm_chose_is_given_up_too(cluster, tmp_path):
    """The cell has its nodes only since its job runs: before, Slurm was to choose them."""
    built = replace(planned(cluster, tmp_path), backend="slurm", named=False)
    built = replace(built, cells=tuple(replace(cell, hosts=()) for cell in built.cells))
    run = RunDir.create(tmp_path, built.to_dict())

    class Chosen(Nodes):
        def converse(self, planned, cell, watch, data, course):
            excluded = (planned.slurm or {}).get("exclude", ())
            watch.cell = course.on_placed([node for node in planned.nodes if node.alias not in excluded][:2])
            return super().converse(planned, watch.cell, watch, data, course)

        def exclude(self, planned, host):
            nodes = (*planned.nodes, cluster.nodes[2])  # whom Slurm may choose instead
            return replace(planned, nodes=nodes, slurm={"exclude": [planned.node(host).alias]})

    nodes = Chosen(run, ("torch", "node_failed", NAMES[1]))
    carried = bench.Run(built, run, nodes, Display(quiet=True), None, bench.Policy(0, True), NodeAccess())
    carried.execute({})
    status = run.read_status()
    assert [swap["host"] for swap in status["replaced"]] == [NAMES[1]]
    assert [hosts for _, hosts, _ in nodes.tried] == [(NAMES[0], NAMES[1]), (NAMES[0], NAMES[2])]
    assert states(status) == {"torch-2n-r1": "complete"}


BOTH = (("hung", NAMES[0]), ("rank_killed", NAMES[1]))


@pytest.mark.parametrize(
    ("kinds", "retries", "replace_bad", "given_up", "tried"),
    [
        (BOTH, 1, True, [NAMES[0]], 2),  # as many as each alone would have
        (BOTH, 1, False, [], 2),
        (BOTH, 0, True, [NAMES[0]], 1),  # a rank that was killed is tried again only where retries are left
        ((("hung", NAMES[0]), ("lost_connection", NAMES[1])), 0, True, [NAMES[0], NAMES[1]], 2),
        ((("hung", NAMES[0]), ("rank_crashed", NAMES[1])), 1, True, [NAMES[0]], 1),  # it would crash again
    ],
)
def test_of_nodes_that_fail_together_each_has_what_it_would_have_alone(
    cluster, tmp_path, kinds, retries, replace_bad, given_up, tried
):
    error = joined([blame.error(kind, f"planted {kind}", host) for kind, host in kinds])
    built = planned(cluster, tmp_path, spares=2)
    nodes, status, _ = carry_out(built, error, retries=retries, replace_bad=replace_bad)
    assert [swap["host"] for swap in status["replaced"]] == given_up
    assert len(nodes.tried) == tried
    first = status["cells"]["torch-2n-r1"]
    first = first["attempts"][0] if first["attempts"] else first
    assert [(one["kind"], one["host"]) for one in each_error(first["error"])] == list(kinds)


def test_a_node_is_not_given_up_for_a_failure_that_names_nobody(cluster, tmp_path):
    _, status, _ = carry_out(planned(cluster, tmp_path, spares=1), ("torch", "lost_peers", None), replace_bad=True)
    assert status["replaced"] == []


# --- resume ---------------------------------------------------------------------------------------


def interrupted(cluster: Inventory, tmp_path: Path) -> tuple[plan.Plan, RunDir]:
    """A run of two cells whose controller died during the second."""
    built = planned(cluster, tmp_path, counts=(1, 2))
    carry_out(built)
    run = RunDir(Path(built.run_dir))
    status = run.read_status()
    status["state"] = "running"
    status["cells"]["torch-2n-r1"].update(state="running", ended=None, plan_hash=None)
    run.write_status(status)
    for host in NAMES[:2]:
        (run.cell(host, "torch-2n-r1").path / "rank0.jsonl").write_text('{"event": "val')
    return built, run


def test_only_what_is_missing_runs_again_and_nothing_is_counted_twice(cluster, tmp_path):
    _, run = interrupted(cluster, tmp_path)
    before = run.cell(NAMES[0], "torch-1n-r1").path.stat().st_mtime_ns
    nodes, status, _ = carry_out(drift.load(run))
    assert [cell for cell, _, _ in nodes.tried] == ["torch-2n-r1"]
    assert states(status) == {"torch-1n-r1": "complete", "torch-2n-r1": "complete"}
    assert run.cell(NAMES[0], "torch-1n-r1").path.stat().st_mtime_ns == before
    assert sorted(record.cell for record in run.read_records()) == ["torch-1n-r1", "torch-2n-r1", "torch-2n-r1"]


def test_a_cell_that_had_ended_before_its_controller_did_is_taken(cluster, tmp_path):
    _, run = interrupted(cluster, tmp_path)
    for host in NAMES[:2]:
        (run.cell(host, "torch-2n-r1").path / "outcome.json").write_text(json.dumps({"rc": 0, "error": None}))
    nodes, status, _ = carry_out(drift.load(run))
    assert nodes.tried == [] and states(status)["torch-2n-r1"] == "complete"


def test_what_an_earlier_attempt_left_on_the_nodes_is_not_taken_for_the_last_ones(cluster, tmp_path):
    """Killed before the second attempt had begun there, the controller gathers the first one's files once more."""
    _, run = interrupted(cluster, tmp_path)
    data = run.read_plan()
    data["cells"][1]["attempt"] = 2
    run.write_plan(data)
    for host in NAMES[:2]:
        (run.cell(host, "torch-2n-r1").path / "outcome.json").write_text(
            json.dumps({"rc": 0, "error": None, "attempt": 1})
        )
    nodes, _, _ = carry_out(drift.load(run))
    assert [cell for cell, *_ in nodes.tried] == ["torch-2n-r1"]


def test_a_run_that_is_carried_out_now_is_refused(cluster, tmp_path, held):
    _, run = interrupted(cluster, tmp_path)
    with held(run) as controller:
        with pytest.raises(UsageError, match=f"is running .process {controller.pid}"):
            drift.refuse_running(run, print)
        with pytest.raises(UsageError, match="is running"), run.alive():
            pass
        controller.kill()
    with run.alive():  # whoever holds it reads what the dead one left
        assert drift.load(run).run_id == run.run_id
        assert run.read_status()["cells"]["torch-2n-r1"]["state"] == "incomplete"


def test_a_run_that_is_carried_out_on_another_machine_is_refused_while_that_lives(cluster, tmp_path, beating):
    _, run = interrupted(cluster, tmp_path)
    run.write_status({**run.read_status(), "state": "running", "controller": {"host": "login2", "pid": 4711}})
    notes: list[str] = []
    with beating(run), pytest.raises(UsageError, match=r"carried out on login2 \(process 4711\)"):
        drift.refuse_running(run, notes.append)
    assert notes == [f"checking for 15 s whether login2 (process 4711) still carries out run {run.run_id}"]
    drift.refuse_running(run, notes.append)  # it died there


def test_a_run_whose_controller_died_on_another_machine_is_taken_up(cluster, tmp_path, beating):
    """Whoever holds a run shows that he lives, and must not take himself for the other."""
    _, run = interrupted(cluster, tmp_path)
    run.write_status({**run.read_status(), "state": "running", "controller": {"host": "login2", "pid": 4711}})
    drift.refuse_running(run, print)
    with run.alive():
        _, status, _ = carry_out(drift.load(run))
    assert set(states(status).values()) == {"complete"}


class Measured(Nodes):
    """As agents leave a cell, with its outcome; the user stops the run in the cell `stopped_in`."""

    stopped_in: str | None = None

    def converse(self, planned, cell, watch, data, context):
        if cell.id == self.stopped_in:
            self.tried.append((cell.id, cell.hosts, cell.master_port))
            watch.stop.asked = True
            return None
        fault = super().converse(planned, cell, watch, data, context)
        for host in cell.hosts:
            outcome = {"rc": 0, "error": None, "attempt": cell.attempt}
            (self.run.cell(host, cell.id).path / "outcome.json").write_text(json.dumps(outcome))
        return fault


def measure(built, run, policy=None, faults=(), stopped_in=None, torch="2.13.0") -> list[str]:
    """Carry out what is missing; the cells that ran."""
    nodes = Measured(run, *faults)
    nodes.stopped_in, nodes.facts = stopped_in, {**FACTS, "packages": {"torch": torch}}
    carried = bench.Run(built, run, nodes, Display(quiet=True), None, policy or bench.Policy(), NodeAccess())
    carried.stop.wait = lambda seconds: None
    carried.execute({})
    return [cell.removeprefix("torch-").removesuffix("-r1") for cell, *_ in nodes.tried]


def versions(run: RunDir) -> set[str]:
    """The versions of torch that the results were measured with."""
    seen = run.read_facts(run.read_plan())
    return {observed["packages"]["torch"] for hosts in seen.values() for observed in hosts.values()}


def test_a_cell_that_does_not_stand_is_not_taken_for_measured_after_a_stop(cluster, tmp_path):
    built = planned(cluster, tmp_path, counts=(1, 2))
    run = RunDir.create(tmp_path, built.to_dict())
    measure(built, run)
    for cell in ("torch-1n-r1", "torch-2n-r1"):
        missing(run, cell, "plan_changed")
    assert measure(drift.load(run), run, stopped_in="torch-1n-r1") == ["1n"]
    assert run.read_status()["cells"]["torch-2n-r1"]["error"]["kind"] == "plan_changed"
    assert measure(drift.load(run), run) == ["1n", "2n"]


def test_an_edited_plan_measures_its_cells_again(cluster, tmp_path):
    _, run = interrupted(cluster, tmp_path)
    data = run.read_plan()
    data["cells"][0]["params"]["iters"] = 99
    run.write_plan(data)
    status = run.read_status()
    assert drift.reopen(drift.load(run), status, {}) == ["torch-1n-r1"]
    assert status["cells"]["torch-1n-r1"]["error"]["kind"] == "plan_changed"


def test_a_changed_environment_is_named_by_property_and_nodes(cluster, tmp_path):
    built, run = interrupted(cluster, tmp_path)
    before = drift.measured(run, built, run.read_status())
    assert list(before) == ["torch-1n-r1"]
    now = {name: facts.comparable({**FACTS, "packages": {"torch": "2.12.1"}}) for name in NAMES}
    changed = drift.drift({**before, "other": {NAMES[1]: before["torch-1n-r1"][NAMES[0]]}}, now)
    aliases = {node.name: node.alias for node in cluster.nodes}
    assert drift.describe(changed, aliases) == "torch 2.13.0 -> 2.12.1 on node[001-002]"
    veth = {"name": "veth1", "speed_mbit_per_s": 10000, "mtu": 1500, "driver": None}
    same = facts.comparable({**FACTS, "boot_id": "another", "hostname": "m", "nics": [veth]})
    assert drift.drift(before, {name: same for name in NAMES}) == {}, "neither a reboot nor a container is one"


def test_a_node_that_left_the_inventory_is_named(cluster, tmp_path):
    built, run = interrupted(cluster, tmp_path)
    smaller = replace(cluster, nodes=cluster.nodes[:1])
    with pytest.raises(UsageError, match=f"needs {NAMES[1]}"):
        drift.renew(built, smaller, run, None, run.read_status())


def test_nodes_are_reached_as_the_inventory_says_today(cluster, tmp_path):
    built, run = interrupted(cluster, tmp_path)
    moved = replace(cluster, nodes=tuple(replace(node, address=f"10.9.9.{n}") for n, node in enumerate(cluster.nodes)))
    renewed = drift.renew(built, moved, run, "/tmp/new/ssh_config", run.read_status())
    assert renewed.nodes[0].address == "10.9.9.0"
    assert "--master-addr=10.9.9.0" in renewed.cells[0].launch.argv[0]


def test_a_bad_node_is_done_without_from_the_start(cluster, tmp_path):
    built, run = interrupted(cluster, tmp_path)
    built = replace(drift.load(run), spares=cluster.nodes[3:4])
    bad = {NAMES[1]: [Problem("refused_key", "it refuses the key"), Problem("clock", "its clock is late")]}
    nodes, status, _ = carry_out(built, replace_bad=True, bad=bad)
    assert nodes.tried[0][1] == (NAMES[0], NAMES[3])
    swap = status["replaced"][0]
    assert (swap["kind"], swap["reason"]) == ("refused_key", "it refuses the key; its clock is late")


def test_a_cell_that_cannot_run_without_a_bad_node_fails_for_what_is_wrong_with_it(cluster, tmp_path):
    _, run = interrupted(cluster, tmp_path)
    bad = {NAMES[1]: [Problem("clock", "its clock is late")]}
    _, status, _ = carry_out(drift.load(run), replace_bad=True, bad=bad)
    error = status["cells"]["torch-2n-r1"]["error"]
    assert (error["kind"], error["host"]) == ("clock", NAMES[1])


def test_nodes_without_work_get_no_data(cluster, tmp_path):
    """One that was replaced and is dead since would otherwise stop every later resume."""
    built, run = interrupted(cluster, tmp_path)
    built = replace(drift.load(run), nodes=cluster.nodes[:4])
    nodes = Nodes(run)
    again = bench.Run(built, run, nodes, Display(quiet=True), Data("/data/x"), bench.Policy(), NodeAccess())
    again.execute({})
    assert nodes.sent == NAMES[:2]


class Sending(Nodes):
    """A stand-in that cannot send data to some nodes: the first `times` times each."""

    def __init__(self, run: RunDir, problems: dict[str, Problem], times: int = 100) -> None:
        super().__init__(run)
        self.problems, self.times = problems, dict.fromkeys(problems, times)

    def send(self, planned, nodes, data, stopped):
        super().send(planned, nodes, data, stopped)
        failed = [node.name for node in nodes if self.times.get(node.name)]
        for name in failed:
            self.times[name] -= 1
        return {name: self.problems[name] for name in failed}


HUNG = Problem("hung", "it no longer answers")
FULL = Problem("disk_full", "its disk is full")
REFUSED = Problem("refused_key", "it refuses the key for this user")


def send_and_carry_out(cluster, tmp_path, problems, times=100, retries=0, replace_bad=False, test="sft", **more):
    built = planned(cluster, tmp_path, spares=2, **more)
    # What a cell is called does not matter here, but whether it needs data.
    built = replace(built, cells=tuple(replace(cell, test=test) for cell in built.cells))
    run = RunDir.create(tmp_path, built.to_dict())
    nodes = Sending(run, problems, times)
    policy = bench.Policy(retries, replace_bad)
    carried = bench.Run(built, run, nodes, Display(quiet=True), Data("/data/x"), policy, NodeAccess())
    carried.stop.wait = lambda seconds: None
    carried.execute({})
    return nodes, run.read_status(), run


@pytest.mark.parametrize("problem", [HUNG, FULL, REFUSED], ids=lambda problem: problem.kind)
def test_a_node_that_the_data_cannot_be_sent_to_fails_its_cell_and_not_the_run(cluster, tmp_path, problem):
    nodes, status, run = send_and_carry_out(cluster, tmp_path, {NAMES[1]: problem}, counts=(1, 2))
    assert states(status) == {"torch-1n-r1": "complete", "torch-2n-r1": "incomplete"}
    error = status["cells"]["torch-2n-r1"]["error"]
    assert (error["kind"], error["host"]) == (problem.kind, NAMES[1])
    assert error["message"] == f"the data cannot be sent to it: {problem.message}"
    assert run.report_html.exists() and json.loads(run.summary.read_text())["findings"][0]["host"] == NAMES[1]
    assert nodes.sent == [*NAMES[:2], NAMES[1]], "to all nodes at once, and again before the cell that needs it"
    assert f"node002: the data cannot be sent to it: {problem.message}; it is tried again before" in run.log.read_text()


def test_sending_data_is_tried_again_as_any_other_phase(cluster, tmp_path):
    _, status, _ = send_and_carry_out(cluster, tmp_path, {NAMES[1]: HUNG}, times=1, retries=1)
    entry = status["cells"]["torch-2n-r1"]
    assert (entry["state"], entry["attempt"]) == ("complete", 2)
    assert [one["error"]["kind"] for one in entry["attempts"]] == ["hung"]


def test_a_node_that_hangs_while_data_is_sent_is_replaced_by_a_spare_that_has_it(cluster, tmp_path):
    bad = {NAMES[1]: HUNG, NAMES[2]: FULL}  # nor can the first spare be sent anything
    nodes, status, _ = send_and_carry_out(cluster, tmp_path, bad, replace_bad=True)
    assert states(status) == {"torch-2n-r1": "complete"}
    [swap] = status["replaced"]
    assert (swap["host"], swap["by"], swap["kind"]) == (NAMES[1], NAMES[3], "hung")
    assert nodes.tried[-1][1] == (NAMES[0], NAMES[3])


def test_two_nodes_that_the_data_cannot_be_sent_to_are_both_named_and_replaced(cluster, tmp_path):
    bad = {NAMES[0]: HUNG, NAMES[1]: FULL}
    _, status, _ = send_and_carry_out(cluster, tmp_path, bad, replace_bad=True)
    assert states(status) == {"torch-2n-r1": "complete"}
    assert [(swap["host"], swap["kind"]) for swap in status["replaced"]] == [
        (NAMES[0], "hung"),
        (NAMES[1], "disk_full"),
    ]


def test_a_cell_that_needs_no_data_runs_where_none_can_be_sent(cluster, tmp_path):
    _, status, _ = send_and_carry_out(cluster, tmp_path, {NAMES[1]: FULL}, test="torch")
    assert states(status) == {"torch-2n-r1": "complete"}


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (HUNG, "hung"),
        (Problem("unreachable", "nothing listens on its SSH port"), "unreachable"),
        (Problem("lost_connection", "it closed the connection"), "lost_connection"),
        (Problem("unknown", "rsync error: some files could not be transferred"), "not_gathered"),
    ],
)
def test_what_fails_while_artefacts_are_gathered_has_the_kind_that_it_has_elsewhere(
    cluster, tmp_path, monkeypatch, problem, kind
):
    monkeypatch.setattr(Nodes, "gather", lambda self, planned, cell: {NAMES[1]: problem})
    _, status, _ = carry_out(planned(cluster, tmp_path))
    error = status["cells"]["torch-2n-r1"]["error"]
    assert (error["kind"], error["host"]) == (kind, NAMES[1])
    assert error["message"] == f"its artefacts were not gathered: {problem.message}"


def test_a_full_disk_of_this_machine_is_no_nodes_fault(cluster, tmp_path, monkeypatch):
    full = Problem("controller_disk_full", "this machine's disk is full")
    monkeypatch.setattr(Nodes, "gather", lambda self, planned, cell: dict.fromkeys(cell.hosts, full))
    _, status, _ = carry_out(planned(cluster, tmp_path, spares=1), retries=1, replace_bad=True)
    [error] = each_error(status["cells"]["torch-2n-r1"]["error"])
    assert (error["kind"], error["host"], status["replaced"]) == ("controller_disk_full", None, [])


def test_a_launcher_is_no_node_that_a_spare_could_replace(cluster, tmp_path):
    built = planned(cluster, tmp_path, spares=1)
    run = RunDir.create(tmp_path, built.to_dict())
    nodes = Nodes(run)
    carried = bench.Run(built, run, nodes, Display(quiet=True), None, bench.Policy(0, True), NodeAccess())
    assert not carried._replace(
        built.cells[0], blame.error("lost_connection", "lost the connection to it", celldir.LAUNCHER)
    )


def test_what_was_set_aside_is_never_in_the_way(tmp_path):
    """A controller that dies while it makes room has moved folders, and gathers them again when it is resumed."""
    run = RunDir(tmp_path / "run")
    for content in ("first", "second"):
        folder = run.cell("node001", "torch-1n-r1").path
        folder.mkdir(parents=True)
        (folder / "rank0.jsonl").write_text(content)
        run.set_aside("torch-1n-r1", 1)
    kept = run.earlier("torch-1n-r1", 1)
    assert sorted((path.parent.name, path.read_text()) for path in kept.rglob("*.jsonl")) == [
        ("node001", "first"),
        ("node001~", "second"),
    ]


def test_a_run_of_an_earlier_version_is_taken_up(cluster, tmp_path):
    _, run = interrupted(cluster, tmp_path)
    status = run.read_status()
    old = ("state", "started", "ended", "error")
    cells = {name: {key: cell[key] for key in old} for name, cell in status["cells"].items()}
    run.write_status({"state": "running", "cells": cells})
    _, status, _ = carry_out(drift.load(run))
    assert states(status) == {"torch-1n-r1": "complete", "torch-2n-r1": "complete"}
    assert status["cells"]["torch-2n-r1"]["attempt"] == 2


def test_only_one_controller_holds_a_run(cluster, tmp_path):
    _, run = interrupted(cluster, tmp_path)
    with run.alive():
        with pytest.raises(UsageError, match="is running"), run.alive():
            pass
        assert run.controller() == os.getpid()


# --- jobs that go on without a controller ---------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shared", "attempt"),
    [
        (None, {}, 1),
        ("slurm_unreachable", {}, 1),
        ("node_failed", {}, 2),
        (None, {"torch-2n-r1": ["7", 1, "all"]}, 1),
        ("plan_changed", {"torch-2n-r1": ["7", 1, "all"]}, 2),  # its old job would give the old measurement again
    ],
)
def test_a_job_is_followed_where_its_end_is_not_known(cluster, tmp_path, kind, shared, attempt):
    built, run = interrupted(cluster, tmp_path)
    status = run.read_status()
    error = kind and blame.error(kind, "planted")
    status["cells"]["torch-2n-r1"].update(state="incomplete", error=error)
    status.update(state="incomplete", allocation=shared)
    run.write_status(status)
    nodes = Nodes(run)
    again = bench.Run(
        replace(built, backend="slurm"), run, nodes, Display(quiet=True), None, bench.Policy(), NodeAccess()
    )
    for host in NAMES[:2]:
        shutil.rmtree(run.cell(host, "torch-2n-r1").path)
    again.execute({})
    entry = run.read_status()["cells"]["torch-2n-r1"]
    assert (entry["state"], entry["attempt"]) == ("complete", attempt)


def test_slurm_that_does_not_answer_is_no_reason_for_a_second_job(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path), backend="slurm")

    class Again(Nodes):
        def converse(self, planned, cell, watch, data, context):
            for host in cell.hosts:  # the stand-in makes them anew
                shutil.rmtree(self.run.cell(host, cell.id).path, ignore_errors=True)
            return super().converse(planned, cell, watch, data, context)

    run = RunDir.create(tmp_path, built.to_dict())
    nodes = Again(run, ("torch", "slurm_unreachable", None))
    carried = bench.Run(built, run, nodes, Display(quiet=True), None, bench.Policy(1), NodeAccess())
    carried.stop.wait = lambda seconds: None
    carried.execute({})
    entry = run.read_status()["cells"]["torch-2n-r1"]
    assert len(nodes.tried) == 2 and (entry["state"], entry["attempt"]) == ("complete", 1)


def test_slurms_own_name_of_a_node_wins_over_its_place_in_the_inventory():
    listing = {"gpu_nodes": {"hosts": ["node001", "node003"]}, "_meta": {"hostvars": {}}}
    nodes = inventory.parse("x", listing).nodes
    assert [node.alias for node in nodes] == ["node001", "node002"]
    known = ("node001", "node002", "node003")
    assert [allocations.slurm_name(node, known) for node in nodes] == ["node001", "node003"]


@pytest.mark.parametrize("by", ["scancel", "Ctrl-C"])
def test_whoever_stops_a_cell_it_is_nobodys_fault(cluster, tmp_path, by):
    """A job that somebody cancels and a run that somebody stops are judged alike."""
    built = replace(planned(cluster, tmp_path), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())

    class Stopped(Nodes):
        def converse(self, planned, cell, watch, data, context):
            watch.stop.asked = by == "Ctrl-C"
            return super().converse(planned, cell, watch, data, context)

    nodes = Stopped(run, ("torch", "job_cancelled", None))
    policy = bench.Policy(retries=2)
    summary = bench.Run(built, run, nodes, Display(quiet=True), None, policy, NodeAccess()).execute({})
    assert states(run.read_status()) == {"torch-2n-r1": "cancelled"} and len(nodes.tried) == 1
    assert (summary["state"], summary["findings"], summary["verdict"]) == ("cancelled", [], "not_judged")
    assert print_conclusion(run, summary, as_json=True) == EXIT_INTERRUPTED


def test_slurms_reason_has_a_line_of_its_own_and_a_queue_no_eta(cluster, tmp_path):
    """A bar's text is cut in a narrow terminal, and an ETA in a queue is a number that grows."""
    built = replace(planned(cluster, tmp_path), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())
    notes, bars = [], []

    class Seen(Display):
        def note(self, text):
            notes.append(text)

        def at(self, done, total, text, left_s=None):
            bars.append((text, left_s))

    class Queue(Nodes):
        def converse(self, planned, cell, watch, data, context):
            waits = answers.JobInfo("7", "x", "waiting", "PENDING", "Priority", (), "2026-11-27T18:00:00", position=3)
            why = "PartitionDown: the partition starts no jobs"
            for info in (waits, waits, replace(waits, reason="PartitionDown", advice=why), waits):
                context.on_job(info)
            self.shown = reported.details(context.entry, {}, datetime.now(UTC))
            context.on_job(replace(waits, state="running", raw="RUNNING"))
            return super().converse(planned, cell, watch, data, context)

    nodes = Queue(run)
    bench.Run(built, run, nodes, Seen(), None, bench.Policy(), NodeAccess()).execute({})
    said = [note for note in notes if "waits as job" in note]
    assert said == [
        "torch-2n-r1 waits as job 7: Priority",
        "torch-2n-r1 waits as job 7: PartitionDown: the partition starts no jobs",
    ]
    queued = [left_s for text, left_s in bars if "waits in Slurm's queue, place 3" in text]
    assert queued == [None] * 4 and not any("Priority" in text for text, _ in bars)
    assert nodes.shown == ["job 7 waiting: Priority, position 3 in the queue, expected to start 2026-11-27T18:00:00"]


def test_the_time_in_a_queue_is_told_apart_from_the_time_that_a_cell_took(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())
    shown = []

    class Queue(Nodes):
        def converse(self, planned, cell, watch, data, context):
            waits = answers.JobInfo("7", "x", "waiting", "PENDING", "Priority", (), None)
            context.on_job(waits)
            time.sleep(2.1)
            status = json.loads(run.status.read_text())
            shown.append(reported.describe(planned.to_dict(), status, datetime.now(UTC), 80))
            context.on_job(replace(waits, state="running", raw="RUNNING"))
            return super().converse(planned, cell, watch, data, context)

    summary = bench.Run(built, run, Queue(run), Display(quiet=True), None, bench.Policy(), NodeAccess()).execute({})
    [cell] = summary["cells"]
    assert cell["queued_s"] >= 2 and cell["took_s"] <= 1
    assert re.search(r"torch-2n-r1 +waiting .* 0 s, queued [23] s", shown[0])
    assert re.search(r"torch-2n-r1: complete after [01] s, [23] s in the queue", run.log.read_text())
    assert re.fullmatch(r"[01] s, queued [23] s", took(cell))


def through_slurm(built: plan.Plan, run: RunDir, placed: str = "") -> tuple[allocations.Allocations, Commands]:
    """Slurm's commands that know the run's nodes by their aliases, and job 7, which runs on `placed`."""
    nodes = "".join(answers.SEPARATOR.join((node.alias, "idle", "", "8", "1", "none")) + "\n" for node in built.nodes)
    commands = Commands(
        sbatch=["7\n"], sinfo=[nodes], scontrol=["PartitionName=p"], squeue=[line("7", "RUNNING", nodes=placed)]
    )
    return allocations.Allocations(run, None, slurm_cluster(commands), {}, {}), commands


@pytest.mark.parametrize(
    ("state", "reason", "kind"),
    [
        ("drained", "Prolog error", "prolog_failed"),
        ("drained", "prolog gpu_health: GPU 3 fell off the bus", "prolog_failed"),
        ("down*", "Not responding", "node_failed"),
        ("drained", "", "node_failed"),
    ],
)
def test_a_node_that_slurm_does_not_use_has_a_kind(cluster, state, reason, kind):
    listed = [("node001", "idle", "none"), ("node002", state, reason or "none")]
    sinfo = "".join(answers.SEPARATOR.join((name, word, "", "8", "1", why)) + "\n" for name, word, why in listed)
    commands = slurm_cluster(Commands(sinfo=[sinfo], scontrol=["PartitionName=p"]))
    found = allocations.problems(commands, cluster.nodes[:3])
    assert {name: one.kind for name, one in found.items()} == {NAMES[1]: kind, NAMES[2]: "not_in_slurm"}
    assert reason in found[NAMES[1]].message


DRAINED = Problem("prolog_failed", "Slurm says drained (Prolog error)")
BROKEN = Problem("node_failed", "Slurm says drained (fan broken)")


@pytest.mark.parametrize(
    ("found", "kind", "host"),
    [
        ({}, "not_started", None),
        ({"a": DRAINED}, "prolog_failed", "a"),
        ({"a": BROKEN}, "not_started", "a"),
        ({"a": DRAINED, "b": DRAINED}, "prolog_failed", None),
        ({"a": DRAINED, "b": BROKEN}, "not_started", None),
    ],
)
def test_what_slurm_says_of_its_nodes_tells_why_a_job_did_not_start(found, kind, host):
    error = allocations.with_slurm_state(blame.error("not_started", "given up"), found)
    assert (error["kind"], error["host"]) == (kind, host)
    assert error["message"] == "; ".join(["given up", *(f"{name}: {one.message}" for name, one in found.items())])


def test_a_prolog_that_failed_under_srun_is_told_of_its_node(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path), backend="slurm")
    carrier, _ = through_slurm(built, RunDir.create(tmp_path, built.to_dict()))
    watch = CellRun(built.cells[0], Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
    watch.sessions = [ended_session(host) for host in built.cells[0].hosts]
    watch.sessions[0].stderr = ["srun: error: Task launch for 23.0 failed on node node002: Job prolog failed"]
    info = answers.JobInfo("23", "x", "failed", "FAILED", "", ("node001", "node002"), None)
    error = carrier._fault(info, watch, built)
    assert (error["kind"], error["host"]) == ("prolog_failed", NAMES[1])


def test_a_prolog_that_failed_before_any_node_answered_is_told_of_its_node(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())
    listed = [("node001", "idle", "none"), ("node002", "drained", "Prolog error")]
    sinfo = "".join(answers.SEPARATOR.join((name, word, "", "8", "1", why)) + "\n" for name, word, why in listed)
    commands = slurm_cluster(Commands(sinfo=[sinfo], scontrol=["PartitionName=p"]))
    carrier = allocations.Allocations(run, None, commands, {}, {})
    watch = CellRun(built.cells[0], Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
    watch.sessions = [ended_session(host) for host in built.cells[0].hosts]
    info = answers.JobInfo("23", "x", "failed", "FAILED", "", ("node001", "node002"), None)
    error = carrier._fault(info, watch, built)
    assert (error["kind"], error["host"]) == ("prolog_failed", NAMES[1])
    assert error["message"].endswith("before any node answered; " + f"{NAMES[1]}: Slurm says drained (Prolog error)")


def slurm_saying(built: plan.Plan, run: RunDir, *later: tuple[str, str, str]) -> allocations.Allocations:
    """Slurm's commands that know two good nodes at first, and say `later` of them after that."""

    def sinfo(listed):
        return "".join(answers.SEPARATOR.join((name, word, "", "8", "1", why)) + "\n" for name, word, why in listed)

    before = [(node.alias, "idle", "none") for node in built.nodes]
    commands = slurm_cluster(Commands(sinfo=[sinfo(before), sinfo(later or before)], scontrol=["PartitionName=p"]))
    carrier = allocations.Allocations(run, None, commands, {}, {})
    carrier._look()
    return carrier


@pytest.mark.parametrize(
    ("state", "later", "kind", "host"),
    [
        # Slurm cancels a job that is not to be requeued where a prolog fails before anything has started.
        ("cancelled", ("drained", "Prolog error"), "prolog_failed", 1),
        ("cancelled", ("drained", "prolog gpu_health: GPU 3 fell off the bus"), "prolog_failed", 1),
        ("cancelled", ("down*", "Not responding"), "node_failed", 1),
        ("cancelled", ("idle", "none"), "job_cancelled", None),
        ("waiting", ("drained", "Prolog error"), "prolog_failed", 1),
        ("waiting", ("drained", "batch job complete failure"), "not_started", 1),
        ("failed", ("drained", "Prolog error"), "prolog_failed", 1),
    ],
)
def test_a_job_that_did_not_start_where_slurm_chose_names_the_node(
    cluster, tmp_path, monkeypatch, state, later, kind, host
):
    monkeypatch.setattr(allocations, "DRAIN_S", 0.05)
    built = replace(planned(cluster, tmp_path), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())
    carrier = slurm_saying(built, run, ("node001", "idle", "none"), ("node002", *later))
    watch = CellRun(built.cells[0], Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
    watch.sessions = [ended_session(name) for name in built.cells[0].hosts]
    info = answers.JobInfo("23", "x", state, state.upper(), "launch failed requeued held", ("node001", "node002"), None)
    error = carrier._fault(info, watch, built)
    assert (error["kind"], error["host"]) == (kind, host and NAMES[host])


def test_a_node_that_slurm_drains_after_it_has_cancelled_the_job_is_named(cluster, tmp_path, monkeypatch):
    """Slurm 24.11 cancels a job whose prolog failed, and only then drains the node."""
    built = replace(planned(cluster, tmp_path), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())
    carrier = slurm_saying(built, run)
    found = iter([{}, {}, {NAMES[1]: DRAINED}])
    monkeypatch.setattr(allocations, "problems", lambda *_: next(found))
    watch = CellRun(built.cells[0], Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
    watch.sessions = [ended_session(name) for name in built.cells[0].hosts]
    info = answers.JobInfo("23", "x", "cancelled", "CANCELLED", "Prolog", ("node001", "node002"), None)
    error = carrier._fault(info, watch, built)
    assert (error["kind"], error["host"]) == ("prolog_failed", NAMES[1])


@pytest.mark.parametrize(
    ("placed", "left"),
    [(("node001",), ("node001",)), ((), ()), (("node001",), ("node001", "node002"))],
    ids=["at once", "all", "while the job ended"],
)
def test_a_node_that_slurm_drains_and_takes_out_of_the_job_is_named_as_well(cluster, tmp_path, placed, left):
    built = replace(planned(cluster, tmp_path), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())
    carrier = slurm_saying(built, run, ("node001", "idle", "none"), ("node002", "drained", "Prolog error"))
    watch = CellRun(built.cells[0], Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
    watch.sessions = [ended_session(name) for name in built.cells[0].hosts[: len(placed)]]
    info = answers.JobInfo("23", "x", "cancelled", "CANCELLED", "Prolog", left, None)
    error = carrier._fault(info, watch, built)
    assert (error["kind"], error["host"]) == ("prolog_failed", NAMES[1])


@pytest.mark.parametrize(
    ("later", "kind", "host"),
    [
        ([("node001", "idle", "none"), ("node002", "drained", "Prolog error")], "prolog_failed", NAMES[1]),
        ([("node001", "idle", "none"), ("node002", "idle", "none")], "not_started", None),
    ],
)
def test_a_job_that_never_ran_names_the_node_that_slurm_has_drained_since(cluster, tmp_path, later, kind, host):
    built = replace(planned(cluster, tmp_path), backend="slurm", named=False)
    [cell] = built.cells
    carrier = slurm_saying(built, RunDir.create(tmp_path, built.to_dict()), *later)
    error = carrier._not_started(replace(cell, hosts=()), "job 7 waited 2 s: launch failed requeued held", built)
    assert (error["kind"], error["host"]) == (kind, host)


def test_a_node_without_the_environment_among_several_is_named_with_its_kind(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path), backend="slurm")
    carrier = slurm_saying(built, RunDir.create(tmp_path, built.to_dict()))
    watch = CellRun(built.cells[0], Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
    watch.sessions = [ended_session(name) for name in built.cells[0].hosts]
    watch.sessions[0].answered = True
    log = ["/opt/python: No module named runner", "srun: error: node[001-002]: tasks 0-1: Exited with exit code 1"]
    info = answers.JobInfo("23", "x", "failed", "FAILED", "", ("node001", "node002"), None)
    error = carrier._fault(info, watch, built, log)
    assert (error["kind"], error["host"]) == ("environment_missing", NAMES[1]) and "also" not in error
    assert error["message"] == "job 23 cannot start its agent: /opt/python: No module named runner"


def test_a_jobs_id_is_noted_before_slurm_is_asked_for_anything_else(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path), backend="slurm", one_allocation=True)
    run = RunDir.create(tmp_path, built.to_dict())
    carrier, commands = through_slurm(built, run)
    [cell] = built.cells
    heard: list[tuple[str, str, ledger.JobShare | None]] = []

    def on_job(info: answers.JobInfo) -> None:
        heard.append((info.job_id, info.state, context.ledger.share(cell.id)))
        assert not commands.named("squeue")

    context = CellContext({"attempt": 1, "job": None}, [cell], ledger.Ledger(), on_job, lambda nodes: cell)
    assert carrier._submit(built, cell, None, context)[:2] == ("7", 0)
    [(job_id, state, share)] = heard
    assert (job_id, state, share.job_id, share.step) == ("7", "waiting", "7", 0)


def test_a_step_is_heard_on_the_hosts_that_it_was_given_not_on_the_first_of_its_job(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path, counts=(4,)), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())
    carrier, _ = through_slurm(built, run, placed="node[001-004]")
    [cell] = built.cells
    given = (NAMES[3], NAMES[1])
    cell = replace(cell, num_nodes=2, hosts=given)

    class Placed(Exception):
        pass

    def on_placed(nodes: Sequence[Node]) -> plan.Cell:
        raise Placed(*(node.name for node in nodes))

    shared = ledger.Ledger({cell.id: ledger.JobShare("7", 1, "all", given)})
    context = CellContext({"attempt": 1, "job": None}, [cell], shared, lambda info: None, on_placed)
    watch = CellRun(cell, Stop(Display(quiet=True)), lambda *_: None, lambda *_: None)
    with pytest.raises(Placed) as placed:
        carrier.converse(built, cell, watch, None, context)
    assert placed.value.args == given


def test_a_node_that_left_the_inventory_does_not_matter_where_all_its_cells_are_complete(cluster, tmp_path):
    built, run = interrupted(cluster, tmp_path)
    status = run.read_status()
    status["cells"]["torch-2n-r1"].update(state="complete")
    run.write_status(status)
    renewed = drift.renew(built, replace(cluster, nodes=cluster.nodes[:1]), run, None, run.read_status())
    assert [node.name for node in renewed.nodes] == NAMES[:2]


def test_a_job_that_had_ended_well_is_taken_even_if_slurm_has_forgotten_it(cluster, tmp_path):
    _, run = interrupted(cluster, tmp_path)
    for host in NAMES[:2]:
        (run.cell(host, "torch-2n-r1").path / "outcome.json").write_text(json.dumps({"rc": 0, "error": None}))
    nodes, status, _ = carry_out(replace(drift.load(run), backend="slurm"))
    assert nodes.tried == [] and states(status)["torch-2n-r1"] == "complete"


def test_nodes_that_the_data_cannot_be_sent_to_are_left_to_others_by_slurm(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path, counts=(3,)), backend="slurm", named=False)
    run = RunDir.create(tmp_path, built.to_dict())

    class Deaf(allocations.Allocations):
        """Its second node cannot be sent anything."""

        def send(self, planned, nodes, data, stopped):
            return {nodes[1].name: Problem("unreachable", "no route to it")}

    carrier = Deaf(run, None, through_slurm(built, run)[0].cluster, {}, {})
    carried = bench.Run(built, run, carrier, Display(quiet=True), Data(str(tmp_path)), bench.Policy(), NodeAccess())
    with carried.journal.opened():
        assert carried.data.send(built.cells[0], [], set(), lambda: None, lambda: False) is None
    assert carried.current.plan.slurm["exclude"] == ["node002"]


def test_cells_of_an_older_environment_run_again_once_a_newer_one_has_shown_that_it_changed(cluster, tmp_path):
    """Under Slurm nodes cannot be asked before."""
    built, run = interrupted(cluster, tmp_path)
    # The new cell may run on nodes that no older cell ran on.
    moved = build.place(built.cells[1], cluster.nodes[4:6], built, None)
    built = replace(built, cells=(built.cells[0], moved), nodes=cluster.nodes, backend="slurm")
    nodes = Nodes(run)
    nodes.facts = {**FACTS, "packages": {"torch": "2.12.1"}}
    for accepted, tried in ((True, ["torch-2n-r1", "torch-1n-r1"]), (True, [])):
        again = bench.Run(
            built, run, nodes, Display(quiet=True), None, bench.Policy(accept_drift=accepted), NodeAccess()
        )
        again.execute({})
        assert [cell for cell, *_ in nodes.tried] == tried
        nodes.tried.clear()
    status = run.read_status()
    assert states(status) == {"torch-1n-r1": "complete", "torch-2n-r1": "complete"}
    [first] = status["cells"]["torch-1n-r1"]["attempts"]
    assert first["error"]["kind"] == "drift"
    assert sorted(record.cell for record in run.read_records()) == ["torch-1n-r1", "torch-2n-r1", "torch-2n-r1"]


DRIFT = bench.Policy(accept_drift=True)


def three_measured(cluster: Inventory, tmp_path: Path, spares: int = 0) -> RunDir:
    """A run through Slurm, all of whose three cells were measured with torch 2.13.0."""
    built = replace(planned(cluster, tmp_path, counts=(1, 2, 3), spares=spares), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())
    assert measure(built, run) == ["1n", "2n", "3n"]
    return run


def test_what_was_complete_runs_after_what_was_missing(cluster, tmp_path):
    run = three_measured(cluster, tmp_path)
    missing(run, "torch-2n-r1")
    missing(run, "torch-3n-r1")
    assert measure(drift.load(run), run, DRIFT, torch="2.12.1") == ["2n", "3n", "1n"]
    assert versions(run) == {"2.12.1"}


def test_what_is_to_be_measured_again_is_so_after_a_stop_too(cluster, tmp_path):
    run = three_measured(cluster, tmp_path)
    missing(run, "torch-3n-r1")
    stopped = measure(drift.load(run), run, DRIFT, stopped_in="torch-1n-r1", torch="2.12.1")
    assert stopped == ["3n", "1n"]
    assert measure(drift.load(run), run, DRIFT, torch="2.12.1") == ["1n", "2n"]
    assert versions(run) == {"2.12.1"}


def test_a_cell_that_ended_without_its_controller_may_be_of_the_older_environment(cluster, tmp_path):
    run = three_measured(cluster, tmp_path)
    missing(run, "torch-3n-r1")
    status = run.read_status()
    status["state"] = "running"
    status["cells"]["torch-2n-r1"].update(state="running", ended=None, plan_hash=None)
    run.write_status(status)
    assert measure(drift.load(run), run, DRIFT, torch="2.12.1") == ["3n", "1n", "2n"]
    assert versions(run) == {"2.12.1"}


def test_what_is_measured_again_is_not_so_on_a_node_that_was_given_up(cluster, tmp_path):
    run = three_measured(cluster, tmp_path, spares=1)
    missing(run, "torch-3n-r1")
    policy = bench.Policy(0, True, True)
    fault = ("3n", "node_failed", NAMES[0])
    assert measure(drift.load(run), run, policy, [fault], torch="2.12.1") == ["3n", "3n", "1n", "2n"]
    assert set(states(run.read_status()).values()) == {"complete"}
    assert all(NAMES[0] not in cell["hosts"] for cell in run.read_plan()["cells"])


def test_over_ssh_nodes_were_asked_already_and_nothing_more_runs_again(cluster, tmp_path):
    """Nodes may differ among each other, and a newer cell may run on others."""
    _, run = interrupted(cluster, tmp_path)
    assert measure(drift.load(run), run, DRIFT, torch="2.12.1") == ["2n"]


def test_what_differs_between_nodes_anyway_is_no_change():
    old = {"driver": "570", "torch": "2.13.0"}
    before = {"a": {"n1": old, "n2": {**old, "driver": "580"}}}
    assert drift.outdated(before, {"n3": {**old, "driver": "590"}}) == {}
    assert drift.outdated(before, {"n1": {**old, "driver": "590"}}) == {"a": {"n1": ["driver 570 -> 590"]}}
    assert facts.changes(drift.common(before), {**old, "env.NCCL_DEBUG": "INFO"}) == ["env.NCCL_DEBUG absent -> INFO"]


def test_a_job_that_may_go_on_is_not_called_cancelled(cluster, tmp_path):
    built = replace(planned(cluster, tmp_path), backend="slurm")
    run = RunDir.create(tmp_path, built.to_dict())

    class Unheard(Nodes):
        def converse(self, planned, cell, watch, data, context):
            watch.stop.asked = True
            context.on_job(answers.JobInfo("7", "x", "running", "RUNNING", "", (), None))
            return blame.error("slurm_unreachable", "scancel: Unable to contact slurm controller")

    bench.Run(built, run, Unheard(run), Display(quiet=True), None, bench.Policy(), NodeAccess()).execute({})
    status = run.read_status()
    assert states(status) == {"torch-2n-r1": "incomplete"}
    assert ledger.jobs_left(status) == ["7"]
