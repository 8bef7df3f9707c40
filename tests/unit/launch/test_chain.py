"""A chain of cells: each runs once the one before it is complete, and what cannot run any more is said in one line."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import plans
import pytest
from runs import NAMES, NodeAccess, Nodes, carry_out, states

from runner.cli.conclusion import print_conclusion
from runner.cluster.inventory import Inventory
from runner.failures import Problem
from runner.launch import drift
from runner.launch import run as bench
from runner.plan import build
from runner.plan.plan import Plan
from runner.report import runs as reported
from runner.report.conclude import judge
from runner.report.progress import Display
from runner.results.rundir import RunDir

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
