"""Cells that share a job of Slurm's: one allocation for all, or an array for each number of nodes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from runs import FACTS, NodeAccess, ended_session, missing, planned, states
from slurm_commands import DOWN, Commands, for_ever
from slurm_commands import cluster as slurm_cluster

from conftest import NAMES
from runner.cluster import slurm as slurm_settings
from runner.cluster.inventory import Inventory
from runner.errors import InfrastructureError
from runner.launch import blame
from runner.launch import drift as resume
from runner.launch import run as bench
from runner.launch.slurm import allocations, answers, ledger
from runner.launch.slurm import commands as jobs
from runner.launch.slurm.script import cells_of, render
from runner.node.protocol import Outcome
from runner.report.progress import Display
from runner.results.rundir import RunDir
from runner.system import nodeset


class Together(allocations.Allocations):
    """Cells share jobs, whose commands are stand-ins: each sbatch gives the next number, from 7. `faults` are by
    (job, step): an error, after which the job has ended unless it was a rank's, or "stop", when the user stops the run
    there, or "silent", when Slurm does not hear of that.
    """

    def __init__(self, run: RunDir, commands: Commands, faults: dict) -> None:
        super().__init__(run, None, slurm_cluster(commands), {}, {})
        self.faults, self.tried = faults, []

    def converse(self, planned, cell, watch, data, context):
        job_id, step, script = self._submit(planned, cell, data, context)
        self.tried.append((cell.num_nodes, job_id, step))
        fault = self.faults.get((job_id, step))
        if isinstance(fault, dict) and fault["kind"].startswith("rank_"):  # the job goes on
            watch.sessions = [replace(ended_session(host), answered=True) for host in cell.hosts]
            return fault
        if isinstance(fault, dict):
            context.on_job(answers.JobInfo(job_id, script.stem, "time_limit", "TIMEOUT", "", (), None))
            return fault
        if fault == "stop":
            watch.stop.asked = True
            return None
        if fault == "silent":
            watch.stop.asked = True
            return blame.error("slurm_unreachable", "scancel: Unable to contact slurm controller")
        watch.sessions = [replace(ended_session(host), answered=True) for host in cell.hosts]
        watch.outcomes = {host: Outcome(rc=0) for host in cell.hosts}
        return None


class Queue(Commands):
    """A Slurm that numbers jobs from `first` on and has them in its queue until they are cancelled."""

    def __init__(self, cluster: Inventory, first: int) -> None:
        names = "".join(
            answers.SEPARATOR.join((node.alias, "idle", "", "8", "1", "none")) + "\n" for node in cluster.nodes
        )
        super().__init__(sinfo=[names], scontrol=["PartitionName=p"], squeue=[""], scancel=[""], sbatch=[""])
        self.jobs: dict[str, str] = {}
        self.next = first
        self.silent = False

    def __call__(self, argv, **options):
        if argv[0] == "sbatch":
            name = re.search("--job-name=(.*)", options["input"])
            assert name
            array = re.search(r"--array=0-(\d+)%1$", options["input"], re.MULTILINE)
            tasks = [f"_{number}" for number in range(int(array[1]) + 1)] if array else [""]
            self.jobs |= {f"{self.next}{task}": name[1] for task in tasks}
            self.answers["sbatch"] = iter([f"{self.next}\n"])
            self.next += 1
        elif argv[0] == "squeue":
            whole = {answers.whole(job): name for job, name in self.jobs.items()}
            self.answers["squeue"] = iter(["".join(f"{job} {name}\n" for job, name in whole.items())])
        elif argv[0] == "scancel" and self.silent:
            self.answers["scancel"] = iter([(1, DOWN)])
        elif argv[0] == "scancel":
            self.jobs = {job: name for job, name in self.jobs.items() if argv[-1] not in (job, answers.whole(job))}
            self.answers["scancel"] = iter([""])
        return super().__call__(argv, **options)


def of_sizes(
    cluster: Inventory,
    tmp_path: Path,
    faults: dict,
    counts: tuple[int, ...],
    repeats: int = 1,
    *,
    array: bool = True,
    named: bool = True,
    spares: int = 0,
    drift: bool = False,
    retries: int = 0,
    kind: type[Together] = Together,
) -> tuple[Together, Queue, bench.Run]:
    """A run of `repeats` cells of each size that share an array, or one job if not `array`; or that run taken up
    again. Slurm chooses the nodes unless `named`.
    """
    built = planned(cluster, tmp_path, counts=counts, spares=spares, repeats=repeats)
    built = replace(built, backend="slurm", one_allocation=not array, job_array=array, named=named)
    if not named:
        built = replace(built, cells=tuple(replace(cell, hosts=()) for cell in built.cells))
    run = RunDir(Path(built.run_dir))
    if run.plan.exists():
        built = resume.load(run)
    else:
        RunDir.create(tmp_path, built.to_dict())
    queue = Queue(cluster, 7 + len(list(run.path.glob("slurm/*.sbatch"))))
    carrier = kind(run, queue, faults)
    policy = bench.Policy(retries, spares > 0, drift)
    carried = bench.Run(built, run, carrier, Display(quiet=True), None, policy, NodeAccess())
    carried.stop.wait = lambda seconds: None  # nobody waits in a test
    return carrier, queue, carried


def together(cluster: Inventory, tmp_path: Path, faults: dict, *, array: bool = False, **more):
    """Three cells that share a job, or two of one node and two of two that share an `array` each."""
    counts, repeats = ((1, 2), 2) if array else ((1, 2, 3), 1)
    return of_sizes(cluster, tmp_path, faults, counts, repeats, array=array, **more)


def test_cells_share_one_job(cluster, tmp_path):
    carrier, commands, carried = together(cluster, tmp_path, {})
    carried.execute({})
    assert carrier.tried == [(1, "7", 0), (2, "7", 1), (3, "7", 2)]
    assert commands.named("scancel") == []


def test_cells_whose_turn_never_came_get_another_job_together(cluster, tmp_path):
    ended = {("7", 0): blame.error("time_limit", "reached its time limit")}
    never = {("7", step): blame.error("time_limit", "reached its time limit") for step in (1, 2)}
    carrier, _, carried = together(cluster, tmp_path, ended | never)
    carried.execute({})
    assert carrier.tried == [(1, "7", 0), (2, "7", 1), (2, "8", 0), (3, "8", 1)]
    assert list(states(carrier.run.read_status()).values()) == ["incomplete", "complete", "complete"]


def test_after_a_stop_what_is_missing_shares_one_job_again(cluster, tmp_path):
    carrier, commands, carried = together(cluster, tmp_path, {("7", 1): "stop"})
    carried.execute({})
    status = carrier.run.read_status()
    assert list(states(status).values()) == ["complete", "cancelled", "cancelled"]
    assert commands.named("scancel") == [["scancel", "7"]] and status["allocation"] == {}
    carrier, _, carried = together(cluster, tmp_path, {})
    carried.execute({})
    assert carrier.tried == [(2, "8", 0), (3, "8", 1)]


def test_a_retry_comes_after_the_cells_whose_job_goes_on(cluster, tmp_path):
    """Beside them it would measure their traffic, and they its."""
    faults = {("7", 0): failed("rank_killed"), ("7", 2): failed("rank_killed"), ("8", 1): failed("rank_killed")}
    carrier, _, carried = together(cluster, tmp_path, faults, retries=1)
    carried.execute({})
    assert carrier.tried == [(1, "7", 0), (2, "7", 1), (3, "7", 2), (3, "8", 0), (1, "8", 1)]
    assert list(states(carrier.run.read_status()).values()) == ["incomplete", "complete", "complete"]


def test_cells_of_one_size_share_an_array_and_sizes_follow_each_other(cluster, tmp_path):
    carrier, commands, carried = together(cluster, tmp_path, {}, array=True)
    carried.execute({})
    assert carrier.tried == [(n, f"{job}_{task}", None) for n, job in ((1, 7), (2, 8)) for task in (0, 1)]
    assert commands.named("scancel") == []
    first, second = sorted(path.read_text() for path in carrier.run.path.glob("slurm/*array*.sbatch"))
    assert cells_of(first) == ["torch-1n-r1", "torch-1n-r2"] and "--nodes=1\n" in first
    assert cells_of(second) == ["torch-2n-r1", "torch-2n-r2"] and "--nodes=2\n" in second


def test_a_retry_in_an_array_comes_after_the_other_tasks(cluster, tmp_path):
    carrier, _, carried = together(cluster, tmp_path, {("7_0", None): failed("rank_killed")}, array=True, retries=1)
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7_0", "7_1", "8_0", "9_0", "9_1"]
    assert set(states(carrier.run.read_status()).values()) == {"complete"}


def test_a_stop_cancels_all_tasks_of_an_array_and_what_is_missing_shares_another(cluster, tmp_path):
    carrier, commands, carried = together(cluster, tmp_path, {("7_0", None): "stop"}, array=True)
    carried.execute({})
    assert commands.named("scancel") == [["scancel", "7"]] and commands.jobs == {}, "at once: else the next one starts"
    assert set(states(carrier.run.read_status()).values()) == {"cancelled"}
    carrier, _, carried = together(cluster, tmp_path, {}, array=True)
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["8_0", "8_1", "9_0", "9_1"]


def test_a_node_that_is_given_up_is_in_no_later_task(cluster, tmp_path):
    bad = {("8_0", None): blame.error("node_failed", "lost a node", NAMES[1])}
    carrier, commands, carried = together(cluster, tmp_path, bad, spares=1, array=True)
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7_0", "7_1", "8_0", "9_0", "9_1"]
    assert commands.named("scancel") == [["scancel", "8"]]
    [again] = [path.read_text() for path in carrier.run.path.glob("slurm/*array-torch-2n-r1-2.sbatch")]
    assert "node002" not in [word for part in _lists(again) for word in nodeset.expand(part)]


def test_tasks_that_an_earlier_controller_left_are_followed_before_anything_else_runs(cluster, tmp_path):
    carrier, _, carried = together(cluster, tmp_path, {("8_0", None): "silent"}, array=True)
    carrier.cancel = lambda *_, **__: False  # type: ignore[method-assign]
    carried.execute({})
    status = carrier.run.read_status()
    assert status["allocation"].keys() == {"torch-2n-r1", "torch-2n-r2"}
    status["cells"]["torch-1n-r1"].update(state="failed", error=failed("rank_killed"))
    carrier.run.write_status(status)
    carrier, _, carried = together(cluster, tmp_path, {}, array=True)
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["8_0", "8_1", "9_0"]


def test_an_array_whose_id_was_never_noted_is_found_by_its_name(cluster, tmp_path):
    carrier, _, carried = together(cluster, tmp_path, {("7_0", None): "stop"}, array=True)
    carried.execute({})
    run, status = carrier.run, carrier.run.read_status()
    for cell in status["cells"].values():
        cell.update(state="planned", started=None, ended=None, error=None, job=None, attempt=1)
    status["cells"]["torch-1n-r1"].update(state="incomplete", started="2026-01-01T00:00:00Z")
    run.write_status({**status, "state": "incomplete", "allocation": {}})
    carrier, _, carried = together(cluster, tmp_path, {}, array=True)
    carrier.cluster.find = {f"shakedown-{run.run_id}-array-torch-1n-r1-1": "5"}.get
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["5_0", "5_1", "8_0", "8_1"]


def test_a_job_that_could_not_be_cancelled_is_followed_again(cluster, tmp_path):
    carrier, commands, carried = together(cluster, tmp_path, {("7", 1): "silent"})
    commands.silent = True
    carried.execute({})
    assert "jobs of this run may continue" in carrier.run.log.read_text()
    assert list(states(carrier.run.read_status()).values()) == ["complete", "incomplete", "planned"]
    carrier, _, carried = together(cluster, tmp_path, {})
    carried.execute({})
    assert carrier.tried == [(2, "7", 1), (3, "7", 2)]


def test_a_node_that_is_given_up_is_in_no_later_cell_of_a_shared_job(cluster, tmp_path):
    bad = {("7", 1): blame.error("node_failed", "lost a node", NAMES[0])}
    carrier, commands, carried = together(cluster, tmp_path, bad, spares=1)
    carried.execute({})
    assert carrier.tried == [(1, "7", 0), (2, "7", 1), (2, "8", 0), (3, "8", 1)]
    assert commands.named("scancel") == [["scancel", "7"]]
    [again] = [path.read_text() for path in carrier.run.path.glob("slurm/*all-torch-2n-r1-2.sbatch")]
    assert "--nodelist" in again and "node001" not in [w for part in _lists(again) for w in nodeset.expand(part)]
    assert len(carrier.run.read_status()["replaced"]) == 1, "one spare, for all cells"


def _lists(script: str) -> list[str]:
    return re.findall(r"--nodelist=(\S+)", script)


def failed(kind: str = "rank_crashed") -> dict:
    return blame.error(kind, "planted")


def test_cells_that_had_started_share_the_next_job_with_those_that_had_not(cluster, tmp_path):
    carrier, _, carried = together(cluster, tmp_path, {("7", 0): failed(), ("7", 1): "stop"})
    carried.execute({})
    carrier, queue, carried = together(cluster, tmp_path, {})
    carried.execute({})
    assert carrier.tried == [(1, "8", 0), (2, "8", 1), (3, "8", 2)]
    assert [cell["attempt"] for cell in carrier.run.read_status()["cells"].values()] == [2, 2, 1]
    assert list(queue.jobs) == ["8"], "and no other was submitted"


def test_a_cell_that_was_given_up_is_in_no_later_job(cluster, tmp_path):
    never = {("7", step): failed("time_limit") for step in (0, 1)}
    carrier, _, carried = together(cluster, tmp_path, never | {("8", 0): failed("time_limit")})
    carried.execute({})
    assert carrier.tried == [(1, "7", 0), (2, "7", 1), (2, "8", 0), (3, "8", 1)]
    script = next(carrier.run.path.glob("slurm/*all-torch-2n-r1-2.sbatch")).read_text()
    assert cells_of(script) == ["torch-2n-r1", "torch-3n-r1"]


def test_only_jobs_of_the_run_that_have_not_ended_are_cancelled(cluster, tmp_path):
    _, _, carried = together(cluster, tmp_path, {("7", 0): failed()})
    carried.execute({})
    _, queue, carried = together(cluster, tmp_path, {("8", 0): "stop"})
    queue.jobs["7"] = "somebody-elses-with-this-number"
    carried.execute({})
    assert queue.named("scancel") == [["scancel", "8"]]


def test_a_job_that_an_earlier_controller_left_is_cancelled_by_a_stop_as_well(cluster, tmp_path):
    _, _, carried = together(cluster, tmp_path, {("6", None): "stop"})
    queue, run = carried.transport.cluster._execute, carried.run
    status = run.read_status()
    job = {"id": "6", "state": "running"}
    status["cells"]["torch-2n-r1"].update(state="incomplete", started="2026-01-01T00:00:00Z", job=job)
    run.write_status({**status, "state": "incomplete"})
    carried = bench.Run(
        carried.current.plan, run, carried.transport, Display(quiet=True), None, bench.Policy(), NodeAccess()
    )
    queue.jobs["6"] = f"shakedown-{run.run_id}-torch-2n-r1-1"
    carried.execute({})
    assert queue.jobs == {} and set(states(run.read_status()).values()) == {"cancelled"}


def test_a_cell_whose_shared_job_is_gone_has_no_retry_more_than_asked_for(cluster, tmp_path):
    carrier, _, carried = together(cluster, tmp_path, {})
    status = carrier.run.read_status()
    status["allocation"] = {
        cell.id: ["7", step, "all", *cell.hosts] for step, cell in enumerate(carried.current.plan.cells)
    }
    cell = status["cells"]["torch-1n-r1"]
    cell.update(state="running", started="2026-01-01T00:00:00Z", hosts=NAMES[:1], job={"id": "7", "state": "running"})
    carrier.run.write_status({**status, "state": "running"})
    carrier.run.slurm("all").parent.mkdir()
    carrier.run.slurm("all").write_text("")
    never = {("7", step): failed("time_limit") for step in (0, 1, 2)}
    carrier, _, carried = together(cluster, tmp_path, never | {("8", 2): failed()})
    carried.execute({})
    assert [job for nodes, job, _ in carrier.tried if nodes == 3] == ["8"]


def test_a_job_whose_id_was_never_noted_has_the_cells_of_its_file(cluster, tmp_path):
    """Killed during sbatch: Slurm knows the job by its name."""
    carrier, _, carried = together(cluster, tmp_path, {("7", 0): failed(), ("7", 1): failed("time_limit")})
    carried.execute({})
    run = carrier.run
    missed = render(
        carrier.job(carried.current.plan, "x", carried.current.plan.cells[1:], None),
        carrier.settings(carried.current.plan),
    )
    run.slurm(f"shakedown-{run.run_id}-all-torch-2n-r1-1").write_text(missed)
    status = run.read_status()
    for name in ("torch-2n-r1", "torch-3n-r1"):
        status["cells"][name].update(state="planned", started=None, ended=None, error=None, job=None, attempt=1)
    status["cells"]["torch-2n-r1"].update(state="incomplete", started="2026-01-01T00:00:00Z")
    run.write_status({**status, "state": "incomplete", "allocation": {}})
    carrier, _, carried = together(cluster, tmp_path, {})
    carrier.cluster.find = {f"shakedown-{run.run_id}-all-torch-2n-r1-1": "5"}.get
    carried.execute({})
    assert carrier.tried[:2] == [(2, "5", 0), (3, "5", 1)]


# --- nobody is lost, nothing is doubled -----------------------------------------------------------------


class Facts(Together):
    """Writes facts as agents do, so that a drift is seen."""

    torch = "2.13.0"

    def converse(self, planned, cell, watch, data, context):
        fault = super().converse(planned, cell, watch, data, context)
        if fault is None:
            for host in cell.hosts:
                folder = self.run.cell(host, cell.id).path
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "facts.json").write_text(json.dumps({**FACTS, "packages": {"torch": self.torch}}))
        return fault


class Placing(Together):
    """Slurm chooses: the n-th conversation is on the n-th node and those after it. `not_started` is before that."""

    def converse(self, planned, cell, watch, data, context):
        begin = len(self.tried)
        nodes = [planned.nodes[(begin + n) % len(planned.nodes)] for n in range(cell.num_nodes)]
        job_id, step, _ = self._submit(planned, cell, data, context)
        self.tried.append((cell.num_nodes, job_id, step))
        fault = self.faults.get((job_id, step))
        if isinstance(fault, dict) and fault["kind"] == "not_started":
            return fault
        watch.cell = context.on_placed(nodes)
        watch.sessions = [replace(ended_session(host), answered=True) for host in watch.cell.hosts]
        if fault is None:
            watch.outcomes = {host: Outcome(rc=0) for host in watch.cell.hosts}
        return fault


def test_a_deferred_retry_is_not_lost_where_a_later_task_gives_up_its_node(cluster, tmp_path):
    faults = {
        ("7_0", None): failed("rank_killed"),
        ("7_1", None): blame.error("node_failed", "lost a node", NAMES[0]),
    }
    carrier, _, carried = of_sizes(cluster, tmp_path, faults, (1, 2), 2, spares=1, retries=1)
    carried.execute({})
    assert states(carrier.run.read_status())["torch-1n-r1"] == "complete", carrier.tried


def test_a_deferred_retry_is_not_lost_in_one_allocation_either(cluster, tmp_path):
    faults = {("7", 0): failed("rank_killed"), ("7", 1): blame.error("node_failed", "lost a node", NAMES[0])}
    carrier, _, carried = together(cluster, tmp_path, faults, spares=1, retries=1)
    carried.execute({})
    assert states(carrier.run.read_status())["torch-1n-r1"] == "complete", carrier.tried


def test_no_other_array_is_submitted_while_a_reopened_cells_task_goes_on(cluster, tmp_path):
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1, 2, 3), 2, kind=Facts)
    carried.execute({})
    assert set(states(carrier.run.read_status()).values()) == {"complete"}
    for cell in ("torch-1n-r1", "torch-1n-r2", "torch-2n-r2", "torch-3n-r1", "torch-3n-r2"):
        missing(carrier.run, cell)
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1, 2, 3), 2, kind=Facts, drift=True)
    carrier.torch = "2.12.1"
    carried.execute({})
    arrays = [answers.whole(job) for _, job, _ in carrier.tried]
    assert arrays == sorted(arrays, key=int), carrier.tried


def test_no_retry_is_submitted_while_a_reopened_cells_step_goes_on(cluster, tmp_path):
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1, 2, 3), 1, array=False, kind=Facts)
    carried.execute({})
    for cell in ("torch-1n-r1", "torch-2n-r1"):
        missing(carrier.run, cell)
    faults = {("8", 1): failed("rank_killed"), ("9", 0): failed("rank_killed")}
    carrier, _, carried = of_sizes(
        cluster, tmp_path, faults, (1, 2, 3), 1, array=False, kind=Facts, drift=True, retries=2
    )
    carrier.torch = "2.12.1"
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["8", "8", "9", "9", "10"], carrier.tried


def test_cells_that_slurm_had_placed_elsewhere_share_the_next_array(cluster, tmp_path):
    faults = {("7_0", None): failed("rank_killed"), ("7_1", None): failed("rank_killed")}
    carrier, _, carried = of_sizes(cluster, tmp_path, faults, (1,), 2, named=False, retries=1, spares=0, kind=Placing)
    carried.current.plan = replace(carried.current.plan, nodes=cluster.nodes[:4])
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7_0", "7_1", "8_0", "8_1"]


def cancelled_while_one_waited(cluster, tmp_path):
    """r1 ran and failed; r2 was cancelled while it waited, so that it started, has an error, and has no hosts."""
    faults = {("7_0", None): failed("rank_crashed"), ("7_1", None): failed("not_started")}
    carrier, _, carried = of_sizes(cluster, tmp_path, faults, (1,), 2, named=False, kind=Placing)
    carried.execute({})
    assert set(states(carrier.run.read_status()).values()) == {"incomplete"}


def test_a_failed_attempt_is_set_aside_before_the_cell_shares_another_array(cluster, tmp_path):
    cancelled_while_one_waited(cluster, tmp_path)
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), 2, named=False, kind=Placing)
    carried.execute({})
    entry = carrier.run.read_status()["cells"]["torch-1n-r2"]
    assert (entry["attempt"], [one["error"]["kind"] for one in entry["attempts"]]) == (2, ["not_started"])


def test_a_task_whose_controller_died_is_followed_and_not_submitted_twice(cluster, tmp_path):
    cancelled_while_one_waited(cluster, tmp_path)

    class Killed(Placing):
        def converse(self, planned, cell, watch, data, context):
            super().converse(planned, cell, watch, data, context)
            raise SystemExit("killed")

    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), 2, named=False, kind=Killed)
    with pytest.raises(SystemExit):
        carried.execute({})
    given = {row[0] for row in carrier.run.read_status()["allocation"].values()}
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), 2, named=False, kind=Placing)
    carried.execute({})
    assert given <= {job for _, job, _ in carrier.tried}, (given, carrier.tried)


class Interrupted(Queue):
    """The second Ctrl-C comes while the first task is waited for."""

    def __call__(self, argv, **options):
        if argv[0] == "squeue" and any(word.startswith("--jobs=") for word in argv):
            raise KeyboardInterrupt
        return super().__call__(argv, **options)


@pytest.mark.parametrize("array", [False, True])
def test_who_leaves_at_once_leaves_no_job_behind(cluster, tmp_path, array):
    built = planned(cluster, tmp_path, counts=(1,), repeats=3)
    built = replace(built, backend="slurm", one_allocation=not array, job_array=array)
    run = RunDir.create(tmp_path, built.to_dict())
    queue = Interrupted(cluster, 7)
    carrier = allocations.Allocations(run, None, slurm_cluster(queue), {}, {})
    carried = bench.Run(built, run, carrier, Display(quiet=True), None, bench.Policy(), NodeAccess())
    with pytest.raises(KeyboardInterrupt):
        carried.execute({})
    assert queue.jobs == {}, queue.named("scancel")


def test_the_tasks_that_wait_are_among_the_jobs_that_nobody_follows(cluster, tmp_path):
    carrier, _, carried = together(cluster, tmp_path, {("7_0", None): "silent"}, array=True)
    carrier.cancel = lambda *_, **__: False
    carried.execute({})
    status = carrier.run.read_status()
    assert {row[0] for row in status["allocation"].values()} == {"7_0", "7_1"}
    assert ledger.jobs_left(status) == ["7_0", "7_1"]


def test_a_waiting_task_is_told_of_where_the_one_before_it_had_ended(cluster, tmp_path):
    carrier, _, carried = together(cluster, tmp_path, {}, array=True)

    class Killed(BaseException):
        pass

    converse = carrier.converse

    def once(*args):
        if carrier.tried:
            raise Killed
        return converse(*args)

    carrier.converse = once
    carried._compare = lambda cell, own: (_ for _ in ()).throw(Killed())  # between two cells
    with pytest.raises(Killed):
        carried.execute({})
    status = carrier.run.read_status()
    assert status["allocation"] and ledger.jobs_left({**status, "state": "incomplete"}) == ["7_1"]


def ended_well(run: RunDir, cell: str, job_id: str) -> None:
    """What the agent of a task leaves that ran on the first node."""
    folder = run.cell(NAMES[0], cell).path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "messages.jsonl").write_text(json.dumps({"message": "placed", "job": job_id, "hosts": NAMES[:1]}) + "\n")
    (folder / "outcome.json").write_text(json.dumps({"rc": 0, "error": None, "attempt": 1}))


@pytest.mark.parametrize("array", [True, False])
def test_a_task_that_ended_well_without_a_controller_is_taken_even_if_slurm_has_forgotten_it(cluster, tmp_path, array):
    """As test_a_job_that_had_ended_well_is_taken_even_if_slurm_has_forgotten_it; nobody had followed this one yet."""
    built = planned(cluster, tmp_path, counts=(1,), repeats=2)
    built = replace(built, backend="slurm", one_allocation=not array, job_array=array)
    run = RunDir.create(tmp_path, built.to_dict())
    status = run.read_status()
    place = [["7_0", None], ["7_1", None]] if array else [["7", 0], ["7", 1]]
    status["allocation"] = {c.id: [*at, "x", *c.hosts] for c, at in zip(built.cells, place, strict=True)}
    job = {"id": place[0][0], "state": "running"}
    status["cells"]["torch-1n-r1"].update(state="incomplete", started="2026-01-01T00:00:00Z", job=job)
    run.write_status({**status, "state": "incomplete"})
    for cell, (job_id, _) in zip(built.cells, place, strict=True):
        ended_well(run, cell.id, job_id)

    class Forgetful(Queue):
        def __call__(self, argv, **options):
            if argv[0] == "sbatch":
                raise SystemExit("another job is submitted for what was measured")
            return super().__call__(argv, **options)

    queue = Forgetful(cluster, 9)
    queue.answers["scontrol"] = iter(for_ever(["PartitionName=p"]))
    carrier = allocations.Allocations(run, None, slurm_cluster(queue), {}, {})
    carrier.cluster.poll = lambda ids: {one: jobs.forgotten(one) for one in ids}
    carried = bench.Run(built, run, carrier, Display(quiet=True), None, bench.Policy(), NodeAccess())
    carried.execute({})
    assert set(states(run.read_status()).values()) == {"complete"}


class Lost(Queue):
    """Takes the first sbatch, whose answer is lost, and is silent for a while."""

    lost = True

    def __call__(self, argv, **options):
        outcome = super().__call__(argv, **options)
        if argv[0] == "sbatch" and self.lost:
            self.lost = False
            return replace(outcome, rc=1, stdout="", stderr=DOWN)
        return outcome


@pytest.mark.parametrize("array", [True, False])
def test_no_cell_is_in_two_jobs_where_the_answer_to_sbatch_was_lost(cluster, tmp_path, array):
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), 3, array=array)
    queue = Lost(cluster, 7)
    carrier.cluster = jobs.SlurmClient(slurm_settings.Settings(), patience_s=0, run=queue)
    silent_is_said(carrier)
    carried.execute({})
    held = [cell for argv, options in queue.calls if argv[0] == "sbatch" for cell in cells_of(options["input"])]
    assert sorted(held) == sorted(set(held)), [job for job in queue.jobs]


class KilledAfterSubmitting(Queue):
    """Its controller dies before it can note the job's id."""

    def __call__(self, argv, **options):
        outcome = super().__call__(argv, **options)
        if argv[0] == "sbatch":
            raise SystemExit("killed")
        return outcome


@pytest.mark.parametrize(("named", "repeats"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_killed_between_sbatch_and_the_note_of_its_id(cluster, tmp_path, named, repeats):
    kind = Together if named else Placing
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), repeats, named=named, kind=kind)
    carrier.cluster = slurm_cluster(KilledAfterSubmitting(cluster, 7))
    with pytest.raises(SystemExit):
        carried.execute({})
    carrier, queue, carried = of_sizes(cluster, tmp_path, {}, (1,), repeats, named=named, kind=kind)
    carrier.cluster.find = {f"shakedown-{carrier.run.run_id}-array-torch-1n-r1-1": "7"}.get
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == [f"7_{n}" for n in range(repeats)]
    assert queue.named("sbatch") == []


def test_retries_are_neither_exceeded_nor_lost_in_an_array(cluster, tmp_path):
    faults = {(f"{job}_{task}", None): failed("rank_killed") for job in range(7, 30) for task in range(4)}
    carrier, _, carried = of_sizes(cluster, tmp_path, faults, (1, 2), 2, retries=2)
    carried.execute({})
    attempts = [cell["attempt"] for cell in carrier.run.read_status()["cells"].values()]
    assert attempts == [3, 3, 3, 3] and len(carrier.tried) == 12


def test_the_bar_does_not_go_back(cluster, tmp_path):
    _, _, carried = of_sizes(cluster, tmp_path, {("7_0", None): failed("rank_killed")}, (1,), 4, retries=1)
    done = []
    carried.display.at = lambda at, total, text, **_: done.append(at / total)
    carried.execute({})
    assert done == sorted(done)


def silent_is_said(carrier: Together) -> None:
    """As the real conversation does it."""
    inner = carrier.converse

    def converse(*args):
        try:
            return inner(*args)
        except jobs.SlurmUnreachable as error:
            return blame.error("slurm_unreachable", str(error))

    carrier.converse = converse  # type: ignore[method-assign]


def test_a_task_whose_job_is_found_by_its_name_has_no_retry_more_and_cancels_no_others(cluster, tmp_path):
    carrier, _, carried = of_sizes(cluster, tmp_path, {("7_1", None): failed("time_limit")}, (1,), 4)
    queue = Lost(cluster, 7)
    carrier.cluster = jobs.SlurmClient(slurm_settings.Settings(), patience_s=0, run=queue)
    carrier.cluster.find = lambda name: next(
        (answers.whole(job) for job, its in queue.jobs.items() if its == name), None
    )
    silent_is_said(carrier)
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7_1", "7_2", "7_3"], queue.named("scancel")


def never_heard(cluster, tmp_path, repeats: int = 3, array: bool = True, faults: dict | None = None):
    """A run taken up again, whose controller was killed while sbatch had not answered."""
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), repeats, array=array)
    status = carrier.run.read_status()
    name = allocations.job_name(carried.current.plan, carried.current.plan.cells[0], 1)
    status["allocation"] = {cell.id: [None, None, name, *cell.hosts] for cell in carried.current.plan.cells}
    status["cells"]["torch-1n-r1"].update(
        state="incomplete", started="2026-01-01T00:00:00Z", error=failed("slurm_unreachable")
    )
    carrier.run.write_status({**status, "state": "incomplete"})
    carrier, queue, carried = of_sizes(cluster, tmp_path, faults or {}, (1,), repeats, array=array)
    carrier.cluster.find = lambda name: None  # type: ignore[method-assign]
    return carrier, queue, carried


@pytest.mark.parametrize("array", [True, False])
def test_cells_of_a_job_that_never_came_to_slurm_share_the_next(cluster, tmp_path, array):
    carrier, _, carried = never_heard(cluster, tmp_path, array=array)
    carried.execute({})
    assert len({answers.whole(job) for _, job, _ in carrier.tried}) == 1, carrier.tried


def test_a_job_that_never_came_to_slurm_is_no_reason_for_an_attempt_more(cluster, tmp_path):
    faults = {(f"{job}_0", None): failed("rank_crashed") for job in range(7, 30)}
    _, queue, carried = never_heard(cluster, tmp_path, 1, faults=faults)
    carried.execute({})
    assert len(queue.named("sbatch")) == 1


def test_a_job_that_slurm_refuses_leaves_its_other_cells_to_the_next(cluster, tmp_path):
    class Refuses(Queue):
        refused = False

        def __call__(self, argv, **options):
            outcome = super().__call__(argv, **options)
            if argv[0] == "sbatch" and not self.refused:
                self.refused = True
                self.jobs.clear()
                return replace(outcome, rc=1, stdout="", stderr="sbatch: error: QOSMaxSubmitJobPerUserLimit")
            return outcome

    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), 4)
    carrier.cluster = slurm_cluster(Refuses(cluster, 7))
    inner = carrier.converse

    def converse(*args):
        try:
            return inner(*args)
        except InfrastructureError as error:
            return blame.error("not_started", str(error))

    carrier.converse = converse
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["8_0", "8_1", "8_2"]


def test_tasks_of_a_found_array_that_was_cancelled_run_again_in_one_resume(cluster, tmp_path):
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), 3)
    carrier.cluster = slurm_cluster(KilledAfterSubmitting(cluster, 7))
    with pytest.raises(SystemExit):
        carried.execute({})
    cancelled = {(f"7_{task}", None): failed("job_cancelled") for task in range(3)}
    carrier, _, carried = of_sizes(cluster, tmp_path, cancelled, (1,), 3)
    carrier.cluster.find = {allocations.job_name(carried.current.plan, carried.current.plan.cells[0], 1): "7"}.get
    carried.execute({})
    assert set(states(carrier.run.read_status()).values()) == {"complete"}, carrier.tried


def stopped_while_the_next_task_ended(cluster, tmp_path, job_id: str):
    """Ctrl-C while the first cell's artefacts are gathered; `job_id` has left the second one's meanwhile."""
    carrier, _, carried = of_sizes(cluster, tmp_path, {("7_0", None): failed("rank_crashed")}, (1,), 3)

    def gather(plan, cell):
        if not carried.stop.asked and carrier.tried and cell.id == "torch-1n-r1":
            ended_well(carrier.run, "torch-1n-r2", job_id)
            carried.stop.asked = True
        return {}

    carrier.gather = gather
    carried.execute({})
    return carrier.run


def test_a_task_that_ended_before_its_array_was_left_is_taken(cluster, tmp_path):
    run = stopped_while_the_next_task_ended(cluster, tmp_path, "7_1")
    assert states(run.read_status())["torch-1n-r2"] == "complete"


def test_what_an_earlier_job_left_is_not_taken_for_that_of_a_task_that_goes_on(cluster, tmp_path):
    stopped_while_the_next_task_ended(cluster, tmp_path, "6_1")
    carrier, queue, carried = of_sizes(cluster, tmp_path, {}, (1,), 3)
    carried.execute({})
    assert set(queue.jobs) == {job for _, job, _ in carrier.tried} == {"8_0", "8_1", "8_2"}


def test_where_an_earlier_job_was_is_not_where_a_new_one_is(cluster, tmp_path):
    carrier, _, carried = of_sizes(cluster, tmp_path, {("7_0", None): "stop"}, (1,), 2, named=False)
    carried.execute({})
    ended_well(carrier.run, "torch-1n-r2", "7_1")
    never = {("8_1", None): failed("not_started")}
    carrier, _, carried = of_sizes(cluster, tmp_path, never, (1,), 2, named=False, kind=Placing)
    carried.execute({})
    assert (
        carried.current.plan.cells[1].hosts == () and carrier.run.read_status()["cells"]["torch-1n-r2"]["hosts"] == []
    )


def test_a_cell_without_a_job_waits_for_those_that_have_one(cluster, tmp_path):
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), 2)
    run, second = carrier.run, carried.current.plan.cells[1]
    status = run.read_status()
    name = allocations.job_name(carried.current.plan, second, 1)
    status["allocation"] = {second.id: ["5_0", None, name, *second.hosts]}
    unheard = {"state": "incomplete", "started": "2026-01-01T00:00:00Z", "error": failed("slurm_unreachable")}
    status["cells"]["torch-1n-r1"].update(unheard)
    status["cells"][second.id].update(unheard, job={"id": "5_0", "state": "running"})
    run.write_status({**status, "state": "incomplete"})
    carrier, _, carried = of_sizes(cluster, tmp_path, {}, (1,), 2)
    carrier.cluster.find = lambda name: None
    carried.execute({})
    assert carrier.tried[0][1] == "5_0", carrier.tried


def test_nothing_is_removed_from_nodes_while_a_job_goes_on(cluster, tmp_path):
    carrier, queue, carried = together(cluster, tmp_path, {("7_0", None): "silent"}, array=True)
    queue.silent, carrier.shared, cleaned = True, False, []
    carrier.gather = lambda plan, cell: {}
    carrier.clean = lambda plan, nodes: cleaned.extend(nodes)
    carried.execute({})
    assert cleaned == [] and queue.jobs
