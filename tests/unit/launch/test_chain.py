"""A chain of cells: each runs once the one before it is complete, and what cannot run any more is said in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import plans
import pytest
from runs import NAMES, NodeAccess, Nodes, carry_out, states
from test_sharing import Queue, Together, failed

from runner.cli.conclusion import print_conclusion
from runner.cluster.inventory import Inventory
from runner.failures import Problem
from runner.launch import blame, drift
from runner.launch import run as bench
from runner.launch.slurm.script import cells_of
from runner.node.protocol import Outcome, Placed
from runner.plan import build
from runner.plan.plan import Plan
from runner.report import runs as reported
from runner.report.conclude import judge
from runner.report.progress import Display
from runner.results.rundir import RunDir
from runner.system import process
from runner.workloads.registry import TESTS

STAGES = ("sft", "merge-sft", "ppo")


def chained(cluster: Inventory, folder: Path, *, count: int = 2, spares: int = 0, **changes) -> Plan:
    """A chain of three cells on `count` nodes."""
    asked = plans.request(
        cluster,
        tests={},
        chain=plans.chain(*STAGES),
        node_counts=(count,),
        run_dir=str(folder / "20260102-030405-abcd"),
        spares=spares > 0,
        **changes,
    )
    return build.build(asked, cluster.nodes[: count + spares])


def log(nodes: Nodes) -> str:
    return nodes.run.log.read_text()


# --- over ssh -------------------------------------------------------------------------------------------


def test_cells_run_in_the_order_of_the_chain(cluster, tmp_path):
    nodes, status, _ = carry_out(chained(cluster, tmp_path))
    assert [cell for cell, _, _ in nodes.tried] == list(STAGES)
    assert set(states(status).values()) == {"complete"} and status["state"] == "complete"
    assert "not run" not in log(nodes)
    assert {cell: entry["inputs"] for cell, entry in status["cells"].items()} == {
        cell: {"setting": cell} for cell in STAGES
    }


@pytest.mark.parametrize("position", [0, 1])
def test_what_comes_after_a_failure_does_not_run_and_is_told_in_one_line(cluster, tmp_path, capsys, position):
    failed, behind = STAGES[position], STAGES[position + 1 :]
    nodes, status, _ = carry_out(chained(cluster, tmp_path), (failed, "rank_crashed", NAMES[0]))
    assert [cell for cell, _, _ in nodes.tried] == list(STAGES[: position + 1])
    assert states(status) == {
        **dict.fromkeys(STAGES[:position], "complete"), failed: "incomplete", **dict.fromkeys(behind, "planned"),
    }  # fmt: skip
    assert status["state"] == "incomplete"
    is_ = "is" if len(behind) == 1 else "are"
    lines = [line for line in log(nodes).splitlines() if "not run" in line]
    assert len(lines) == 1 and lines[0].endswith(f"{', '.join(behind)} {is_} not run: {failed} is not complete")
    summary = judge(nodes.run)
    assert [finding["where"] for finding in summary["findings"]] == [failed], "those that did not run are no findings"
    assert print_conclusion(nodes.run, summary, as_json=False) == 3
    said = reported.describe(nodes.run.read_plan(), status, datetime.now(UTC), 100)
    assert [line.strip() for line in said.splitlines() if "not run" in line] == [
        f"not run: {before} is not complete" for before in STAGES[position:-1]
    ]


def test_while_a_stage_runs_the_next_one_waits_for_it(cluster, tmp_path):
    built = chained(cluster, tmp_path)
    run = RunDir.create(tmp_path, built.to_dict())
    said = []

    class Looking(Nodes):
        def converse(self, planned, cell, watch, data, context):
            said.append(reported.describe(built.to_dict(), carried.journal.status, datetime.now(UTC), 100))
            return super().converse(planned, cell, watch, data, context)

    carried = bench.Run(built, run, Looking(run), Display(quiet=True), None, bench.Policy(), NodeAccess())
    carried.execute({})
    assert [[line.strip() for line in text.splitlines() if "waits" in line] for text in said] == [
        ["waits for sft", "waits for merge-sft"], ["waits for merge-sft"], [],
    ]  # fmt: skip


def test_a_stage_that_is_tried_again_is_not_overtaken(cluster, tmp_path):
    nodes, status, _ = carry_out(chained(cluster, tmp_path), ("merge-sft", "lost_connection", None), retries=1)
    assert [cell for cell, _, _ in nodes.tried] == ["sft", "merge-sft", "merge-sft", "ppo"]
    assert set(states(status).values()) == {"complete"}


def test_a_spare_takes_a_bad_nodes_place_in_the_whole_chain(cluster, tmp_path):
    built = chained(cluster, tmp_path, spares=1)
    nodes, status, after = carry_out(built, ("sft", "gpu_failed", NAMES[1]), replace_bad=True)
    assert set(states(status).values()) == {"complete"}
    assert {cell.hosts for cell in after.cells} == {(NAMES[0], NAMES[2])}
    assert len(nodes.tried) == 4


def test_without_a_spare_only_the_stage_that_failed_has_failed(cluster, tmp_path):
    nodes, status, _ = carry_out(chained(cluster, tmp_path), ("sft", "gpu_failed", NAMES[1]), replace_bad=True)
    assert states(status) == {"sft": "incomplete", "merge-sft": "planned", "ppo": "planned"}
    assert [finding["where"] for finding in judge(nodes.run)["findings"]] == ["sft"]


def test_a_node_that_is_bad_from_the_beginning_fails_the_first_stage_alone(cluster, tmp_path):
    bad = {NAMES[0]: [Problem("node_unreachable", "no route")]}
    nodes, status, _ = carry_out(chained(cluster, tmp_path), bad=bad)
    assert nodes.tried == [] and states(status) == {"sft": "failed", "merge-sft": "planned", "ppo": "planned"}
    assert "merge-sft, ppo are not run: sft is not complete" in log(nodes)


def test_a_stop_leaves_the_rest_of_the_chain_cancelled(cluster, tmp_path):
    built = chained(cluster, tmp_path)
    run = RunDir.create(tmp_path, built.to_dict())

    class Stopped(Nodes):
        def converse(self, planned, cell, watch, data, context):
            watch.stop.asked = True

    bench.Run(built, run, Stopped(run), Display(quiet=True), None, bench.Policy(), NodeAccess()).execute({})
    assert set(states(run.read_status()).values()) == {"cancelled"} and "not run" not in run.log.read_text()
    nodes, status, _ = carry_out(built)
    assert [cell for cell, _, _ in nodes.tried] == list(STAGES) and set(states(status).values()) == {"complete"}


# --- taken up again -------------------------------------------------------------------------------------


def test_a_resumed_chain_goes_on_from_its_last_finished_stage(cluster, tmp_path):
    built = chained(cluster, tmp_path)
    carry_out(built, ("merge-sft", "rank_crashed", NAMES[0]))
    nodes, status, _ = carry_out(built)
    assert [cell for cell, _, _ in nodes.tried] == ["merge-sft", "ppo"]
    assert set(states(status).values()) == {"complete"}


def remade(built: Plan, **inputs: dict[str, str]) -> Plan:
    cells = tuple(replace(cell, inputs=inputs.get(cell.id.replace("-", "_"), cell.inputs)) for cell in built.cells)
    return replace(built, cells=cells)


def test_a_stage_whose_inputs_have_changed_runs_again_with_all_behind_it(cluster, tmp_path):
    built = chained(cluster, tmp_path)
    _, status, _ = carry_out(built)
    assert drift.reopen(built, status, {}) == []
    changed = remade(built, merge_sft={"setting": "other", "model": "m"})
    assert drift.reopen(changed, status, {}) == ["merge-sft", "ppo"]
    assert status["cells"]["merge-sft"]["error"]["message"] == "made from another setting, model"
    assert status["cells"]["ppo"]["error"]["message"] == "made from what merge-sft had left, which runs again"


def test_a_setting_of_the_plan_that_is_no_input_makes_nothing_run_again(cluster, tmp_path):
    """A longer time limit, say; a test's cell is measured again whatever has changed."""
    built = chained(cluster, tmp_path)
    _, status, _ = carry_out(built)
    cells = tuple(replace(cell, params={**cell.params, "timeout_s": 7}) for cell in built.cells)
    assert drift.reopen(replace(built, cells=cells), status, {}) == []
    assert drift.reopen(replace(built, cells=tuple(replace(cell, inputs={}) for cell in cells)), status, {})


def test_another_driver_on_a_node_makes_no_finished_stage_run_again(cluster, tmp_path):
    nodes, status, built = carry_out(chained(cluster, tmp_path))
    assert drift.measured(nodes.run, built, status) == {}
    tests = remade(built, sft={}, merge_sft={}, ppo={})
    assert drift.measured(nodes.run, tests, status).keys() == set(STAGES)


# --- over Slurm -----------------------------------------------------------------------------------------


class Watching(Together):
    """Remembers the jobs that Slurm had in its queue while each cell ran, and what status.json said of them."""

    def __init__(self, run: RunDir, commands: Queue, faults: dict) -> None:
        super().__init__(run, commands, faults)
        self.queue, self.queued, self.known = commands, list[list[str]](), list[dict]()

    def converse(self, planned, cell, watch, data, context):
        found = super().converse(planned, cell, watch, data, context)
        self.queued.append(list(self.queue.jobs))
        self.known.append({name: share[0] for name, share in self.run.read_status()["allocation"].items()})
        return found


def over_slurm(
    cluster: Inventory,
    folder: Path,
    faults: dict,
    *,
    one: bool = False,
    retries: int = 0,
    kind: type[Watching] = Watching,
) -> tuple[Watching, bench.Run]:
    """A chain of three cells over Slurm, whose jobs are numbered from 7; or that run taken up again."""
    built = chained(cluster, folder, count=2, one_allocation=one)
    built = replace(built, backend="slurm")
    run = RunDir(Path(built.run_dir))
    if run.plan.exists():
        built = drift.load(run)
    else:
        RunDir.create(folder, built.to_dict())
    carrier = kind(run, Queue(cluster, 7 + len(list(run.path.glob("slurm/*.sbatch")))), faults)
    carried = bench.Run(built, run, carrier, Display(quiet=True), None, bench.Policy(retries), NodeAccess())
    carried.stop.wait = lambda seconds: None  # nobody waits in a test
    return carrier, carried


def dependencies(carrier: Watching) -> list[str | None]:
    """What each submitted job waits for, in the order of submission."""
    scripts = [options["input"] for argv, options in carrier.queue.calls if argv == ["sbatch", "--parsable"]]
    found = [re.search(r"^#SBATCH --dependency=afterok:(.*)$", script, re.MULTILINE) for script in scripts]
    assert [("--kill-on-invalid-dep=yes" in script) for script in scripts] == [one is not None for one in found]
    return [one[1] if one else None for one in found]


def test_the_whole_chain_is_submitted_with_its_first_stage_each_job_after_the_one_before(cluster, tmp_path):
    carrier, carried = over_slurm(cluster, tmp_path, {})
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7", "8", "9"]
    assert dependencies(carrier) == [None, "7", "8"]
    assert carrier.queued[0] == ["7", "8", "9"]
    assert carrier.known[0] == {"sft": "7", "merge-sft": "8", "ppo": "9"}
    status = carrier.run.read_status()
    assert set(states(status).values()) == {"complete"} and status["allocation"] == {}
    assert carrier.queue.named("scancel") == []


def test_each_job_is_known_before_the_next_one_is_submitted(cluster, tmp_path):
    """A controller that is killed in between loses none."""
    carrier, carried = over_slurm(cluster, tmp_path, {})
    noted = []
    submit = carrier.cluster.submit

    def looking(script, secrets=None):
        shares = carrier.run.read_status()["allocation"]
        noted.append({cell: share[0] for cell, share in shares.items()})
        assert all(Path(carrier.run.slurm(share[2])).exists() for share in shares.values())
        return submit(script, secrets)

    carrier.cluster.submit = looking  # type: ignore[method-assign]
    carried.execute({})
    assert noted == [
        {"sft": None}, {"sft": "7", "merge-sft": None}, {"sft": "7", "merge-sft": "8", "ppo": None},
    ]  # fmt: skip


@pytest.mark.parametrize("error", ["rank_crashed", "time_limit"])
def test_the_jobs_behind_a_stage_that_failed_are_cancelled_by_their_ids(cluster, tmp_path, error):
    carrier, carried = over_slurm(cluster, tmp_path, {("8", None): failed(error)})
    carrier.queue.jobs["5"] = "shakedown-other-run-sft-1"
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7", "8"]
    assert carrier.queue.named("scancel") == [["scancel", "9"]]
    status = carrier.run.read_status()
    assert states(status) == {"sft": "complete", "merge-sft": "incomplete", "ppo": "planned"}
    assert status["allocation"] == {}
    assert carrier.run.log.read_text().count("not run: merge-sft is not complete") == 1


def test_a_stage_that_is_tried_again_has_the_rest_of_the_chain_submitted_again(cluster, tmp_path):
    carrier, carried = over_slurm(cluster, tmp_path, {("7", None): failed("rank_killed")}, retries=1)
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7", "10", "11", "12"]
    assert dependencies(carrier) == [None, "7", "8", None, "10", "11"]
    assert sorted(carrier.queue.named("scancel")) == [["scancel", "8"], ["scancel", "9"]]
    assert set(states(carrier.run.read_status()).values()) == {"complete"}
    names = [path.stem for path in carrier.run.path.glob("slurm/*.sbatch")]
    assert len(names) == 6, "no two jobs have one name, by which one whose id is not known is found"


def test_a_stage_that_its_time_limit_ended_goes_on_when_the_run_is_resumed_and_the_rest_comes_behind_it(
    cluster, tmp_path
):
    _, carried = over_slurm(cluster, tmp_path, {("8", None): failed("time_limit")})
    carried.execute({})
    carrier, carried = over_slurm(cluster, tmp_path, {})
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["10", "11"] and dependencies(carrier) == [None, "10"]
    entries = carrier.run.read_status()["cells"]
    assert [entry["attempt"] for entry in entries.values()] == [1, 2, 1]
    assert set(states(carrier.run.read_status()).values()) == {"complete"}


@pytest.mark.parametrize(("continues", "attempts"), [(True, 3), (False, 1)])
@pytest.mark.parametrize("kind", ["time_limit", "timed_out"])
def test_a_stage_with_checkpoints_goes_on_after_a_time_limit_as_often_as_retries_are_allowed(
    cluster, tmp_path, monkeypatch, kind, continues, attempts
):
    monkeypatch.setitem(TESTS, "torch", replace(TESTS["torch"], continues=continues))
    limits = {(job, None): failed(kind) for job in ("7", "10")}
    carrier, carried = over_slurm(cluster, tmp_path, limits, retries=2)
    carried.execute({})
    status = carrier.run.read_status()
    assert status["cells"]["sft"]["attempt"] == attempts
    assert set(states(status).values()) == ({"complete"} if continues else {"incomplete", "planned"})


def test_a_stop_cancels_the_whole_chain(cluster, tmp_path):
    carrier, carried = over_slurm(cluster, tmp_path, {("7", None): "stop"})
    carried.execute({})
    status = carrier.run.read_status()
    assert [job for job in carrier.queue.jobs if job != "7"] == [] and status["allocation"] == {}
    assert set(states(status).values()) == {"cancelled"}
    carrier, carried = over_slurm(cluster, tmp_path, {}, kind=Saying)
    carried.execute({})
    assert dependencies(carrier) == [None, "10", "11"]
    assert carrier.said[0] == [("merge-sft", "planned", ["waits for sft"]), ("ppo", "planned", ["waits for merge-sft"])]
    assert set(states(carrier.run.read_status()).values()) == {"complete"}


class Saying(Watching):
    """Remembers what `runs show` said of the cells behind each one that ran, in a run that was stopped before."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.said = list[list[tuple[str, str, list[str]]]]()

    def converse(self, planned, cell, watch, data, context):
        found = super().converse(planned, cell, watch, data, context)
        status = json.loads(self.run.status.read_text())
        text = reported.describe(planned.to_dict(), status, datetime.now(UTC), 100)
        rows = [line.strip() for line in text.splitlines()]
        behind = [each.id for each in context.behind]
        self.said.append([
            (row.split()[0], row.split()[1], [rows[number + 1]])
            for number, row in enumerate(rows) if row.split()[:1] and row.split()[0] in behind
        ])  # fmt: skip
        return found


def test_a_job_that_cannot_be_submitted_yet_is_when_its_turn_comes(cluster, tmp_path):
    """Where the user may have so many jobs, say."""

    class Limited(Queue):
        def __call__(self, argv, **options):
            if argv == ["sbatch", "--parsable"] and "--dependency" in options["input"]:
                return process.Outcome(tuple(argv), 1, 0.0, "", "sbatch: error: QOSMaxSubmitJobPerUserLimit")
            return super().__call__(argv, **options)

    carrier, carried = over_slurm(cluster, tmp_path, {})
    carrier.queue.__class__ = Limited
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7", "8", "9"] and carrier.queued[0] == ["7"]
    assert set(states(carrier.run.read_status()).values()) == {"complete"}


def test_in_one_allocation_all_stages_share_a_job_and_a_resumed_chain_shares_another(cluster, tmp_path):
    carrier, carried = over_slurm(cluster, tmp_path, {("7", 1): failed()}, one=True)
    carried.execute({})
    assert [(job, step) for _, job, step in carrier.tried] == [("7", 0), ("7", 1)]
    status = carrier.run.read_status()
    assert states(status) == {"sft": "complete", "merge-sft": "incomplete", "ppo": "planned"}
    assert dependencies(carrier) == [None] and status["allocation"] == {}
    carrier, carried = over_slurm(cluster, tmp_path, {}, one=True)
    carried.execute({})
    assert [(job, step) for _, job, step in carrier.tried] == [("8", 0), ("8", 1)]
    (script,) = [options["input"] for argv, options in carrier.queue.calls if argv == ["sbatch", "--parsable"]]
    assert cells_of(script) == ["merge-sft", "ppo"] and script.count('[ "$status" -eq 0 ] || exit "$status"') == 2


def test_a_quick_stage_that_ended_before_its_turn_came_has_the_times_of_its_nodes(cluster, tmp_path):
    class Ahead(Watching):
        """While the first cell is followed, the job of the second one begins and ends."""

        def converse(self, planned, cell, watch, data, context):
            found = super().converse(planned, cell, watch, data, context)
            if cell.id == "sft":
                for each, hours in zip(planned.cells[1].hosts, (0, 1), strict=True):
                    folder = self.run.cell(each, "merge-sft")
                    folder.create()
                    folder.messages.write_text(json.dumps(Placed("8", planned.cells[1].hosts, each).to_json()) + "\n")
                    begun = 1_800_000_000.0 + 3600 * hours
                    outcome = Outcome(rc=0, host=each, started_s=begun, ended_s=begun + 60)
                    folder.outcome.write_text(json.dumps(outcome.to_file()))
            return found

    carrier, carried = over_slurm(cluster, tmp_path, {}, kind=Ahead)
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7", "9"]
    entry = carrier.run.read_status()["cells"]["merge-sft"]
    assert (entry["state"], entry["started"], entry["ended"]) == (
        "complete", "2027-01-15T08:00:00Z", "2027-01-15T09:01:00Z",
    )  # fmt: skip
    assert "merge-sft: complete, it ended before its turn came" in carrier.run.log.read_text()


# --- a controller that was killed -----------------------------------------------------------------------


class Killed(BaseException):
    """The controller ends without a word."""


class Dying(Watching):
    """A controller that is killed while it follows the job `at`."""

    at = "7"

    def converse(self, planned, cell, watch, data, context):
        found = super().converse(planned, cell, watch, data, context)
        if self.tried[-1][1] == self.at:
            raise Killed
        return found


def killed(cluster: Inventory, folder: Path, **more) -> Watching:
    carrier, carried = over_slurm(cluster, folder, {}, kind=Dying, **more)
    with pytest.raises(Killed):
        carried.execute({})
    return carrier


@pytest.mark.parametrize("one", [True, False])
def test_the_jobs_of_a_killed_controller_are_followed_and_none_is_submitted_twice(cluster, tmp_path, one):
    killed(cluster, tmp_path, one=one)
    carrier, carried = over_slurm(cluster, tmp_path, {}, one=one)
    carried.execute({})
    jobs = [(job, step) for _, job, step in carrier.tried]
    assert jobs == ([("7", 0), ("7", 1), ("7", 2)] if one else [("7", None), ("8", None), ("9", None)])
    assert carrier.queue.named("sbatch") == []
    assert set(states(carrier.run.read_status()).values()) == {"complete"}


def test_a_stage_that_failed_without_a_controller_is_tried_again_with_the_rest_of_the_chain(cluster, tmp_path):
    killed(cluster, tmp_path)
    carrier, carried = over_slurm(cluster, tmp_path, {("7", None): failed("time_limit")})
    carrier.queue.jobs |= {job: f"shakedown-{carrier.run.run_id}-{job}" for job in ("8", "9")}
    carried.execute({})
    assert [job for _, job, _ in carrier.tried] == ["7", "10", "11", "12"]
    assert dependencies(carrier) == [None, "10", "11"]
    assert sorted(carrier.queue.named("scancel")) == [["scancel", "8"], ["scancel", "9"]]


def test_jobs_of_a_killed_controller_that_make_what_is_not_asked_for_any_more_are_cancelled(cluster, tmp_path):
    carrier = killed(cluster, tmp_path)
    status = carrier.run.read_status()
    for cell in ("merge-sft", "ppo"):
        status["cells"][cell].update(state="incomplete", error=blame.error("plan_changed", "changed since: setting"))
    carrier.run.write_status(status)
    carrier, carried = over_slurm(cluster, tmp_path, {})
    carrier.queue.jobs |= {job: f"shakedown-{carrier.run.run_id}-{job}" for job in ("7", "8", "9")}
    carried.execute({})
    assert sorted(carrier.queue.named("scancel")) == [["scancel", "8"], ["scancel", "9"]]
    assert [job for _, job, _ in carrier.tried] == ["7", "10", "11"] and dependencies(carrier) == ["7", "10"]


def test_what_was_not_submitted_when_the_controller_was_killed_is_submitted_behind_the_job_that_continues(
    cluster, tmp_path
):
    carrier, carried = over_slurm(cluster, tmp_path, {})
    submit, done = carrier.cluster.submit, []

    def dying(script, secrets=None):
        if len(done) == 1:
            raise Killed
        done.append(submit(script, secrets))
        return done[-1]

    carrier.cluster.submit = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        carried.execute({})
    assert carrier.run.read_status()["allocation"].keys() == {"sft", "merge-sft"}
    carrier, carried = over_slurm(cluster, tmp_path, {})
    carrier.cluster.find = {}.get  # type: ignore[method-assign]
    carried.execute({})
    jobs = [job for _, job, _ in carrier.tried]
    assert jobs[0] == "7" and set(states(carrier.run.read_status()).values()) == {"complete"}
    assert dependencies(carrier) == ["7", jobs[1]]
