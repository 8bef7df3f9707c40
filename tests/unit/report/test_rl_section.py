"""Training with verl in the report: stages, timelines of phases, curves, answers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import report_fixture
from report_fixture import Fixture

from runner.errors import UsageError
from runner.judge import analysis
from runner.plan import config
from runner.report import chart, rl, sections


def summary_of(fixture: Fixture) -> dict[str, Any]:
    return analysis.summarise(*fixture.arguments)


def charts_of(fixture: Fixture) -> dict[str, list[Any]]:
    """The figures by their title."""
    by_cell: dict[str, list[Any]] = {}
    for record in fixture.records:
        by_cell.setdefault(record.cell, []).append(record)
    found: dict[str, list[Any]] = {}
    for figure in rl.charts(sections.Measured("rl", fixture.plan, summary_of(fixture), by_cell, str)).figures:
        found.setdefault(figure.title, []).append(figure)
    return found


# --- stages --------------------------------------------------------------------------------------------------


def test_stages_are_in_the_order_of_the_workflow_with_what_each_left():
    table = rl.stages(summary_of(report_fixture.rl()))
    assert [row["stage"] for row in table.rows] == ["prepare", "sft", "merge-sft", "ppo", "merge-ppo", "publish"]
    assert [row["on"] for row in table.rows] == [
        "this machine",
        "2 nodes",
        "1 node",
        "2 nodes",
        "1 node",
        "this machine",
    ]
    assert {row["result"] for row in table.rows} == {"✓ complete"}
    assert table.rows[0]["left"].startswith("/scratch/models/llama-3.2-1b-instruct; /scratch/data/gsm8k-sft.parquet")
    assert "0123abcd" not in str(table.rows) and "89ab" not in str(table.rows), "checksums are for machines"
    assert (
        table.rows[4]["left"] == "/scratch/models/ppo.77e0" and table.rows[5]["left"] == "/home/anna/models/gsm8k-ppo"
    )


def test_a_stage_that_failed_says_why_and_one_that_waits_has_left_nothing():
    fixture = report_fixture.rl()
    fixture.status["cells"]["ppo"] |= {
        "state": "failed",
        "error": {"kind": "ray_died", "message": "Ray ended", "host": None},
    }
    fixture.status["cells"]["merge-ppo"] |= {"state": "planned", "started": None, "ended": None}
    fixture.status["stages"]["publish"] |= {"state": "planned", "started": None, "ended": None, "left": {}}
    rows = {row["stage"]: row for row in rl.stages(summary_of(fixture)).rows}
    assert (rows["ppo"]["result"], rows["ppo"]["left"]) == ("✕ failed", "Ray ended")
    assert (rows["merge-ppo"]["result"], rows["merge-ppo"]["left"]) == ("planned", "")
    assert rows["publish"]["left"] == ""


def test_a_run_that_is_no_workflow_has_no_stages():
    assert rl.stages(summary_of(report_fixture.testbed((1, 2)))) is None
    assert rl.stages({}) is None, "a summary of an earlier version"


# --- numbers -------------------------------------------------------------------------------------------------


def test_all_stages_share_one_section_whichever_test_they_are():
    summary = summary_of(report_fixture.rl())
    (tables,) = sections.tables(summary).values()
    assert [row["stage"] for row in tables[0].rows] == ["sft", "merge-sft", "ppo", "merge-ppo"]
    assert len({id(section) for section in sections.sections().values()}) == len(sections.sections())


def test_the_numbers_of_a_stage_are_those_of_its_kind():
    sft, merged, ppo, _ = sections.tables(summary_of(report_fixture.rl())).popitem()[1][0].rows
    assert sft["loss"] and not sft["reward"] and not sft["idle, %"]
    assert ppo["reward"] and ppo["KL"] and ppo["idle, %"] and not ppo["loss"]
    assert merged["merge, s"] == "38.0" and not merged["tokens/s"]


def test_phases_have_their_share_and_their_rate():
    tables = sections.tables(summary_of(report_fixture.rl())).popitem()[1]
    rows = {row["phase"]: row for row in tables[1].rows}
    assert next(iter(rows)) == "rollout" and list(rows)[-1] == "idle" and "log-prob" in rows
    assert abs(sum(float(row["of a step, %"]) for row in rows.values()) - 100) < 0.5
    assert rows["rollout"]["tokens/s"] and not rows["idle"]["tokens/s"]


def test_answers_are_shown_with_their_question_in_every_row_only_where_questions_differ():
    fixture = report_fixture.rl()
    table = sections.tables(summary_of(fixture)).popitem()[1][2]
    assert [row["model of"] for row in table.rows] == ["merge-sft", "merge-ppo"] and "question" not in table.rows[0]
    assert table.remark.endswith(f"to: {report_fixture.QUESTION}") and "72" in table.rows[1]["answer"]
    for index, record in enumerate(fixture.records):
        if record.metric == "answer_s" and record.cell == "merge-sft":
            fixture.records[index] = replace(record, context={**record.context, "question": "2 + 2?"})
    table = sections.tables(summary_of(fixture)).popitem()[1][2]
    assert [row["question"] for row in table.rows] == ["2 + 2?", report_fixture.QUESTION]


def test_what_was_not_sent_to_weights_and_biases_says_how_it_is():
    fixture = report_fixture.rl()
    remark = sections.tables(summary_of(fixture)).popitem()[1][0].remark
    assert "wandb sync nodes/*/*/wandb/offline-run-*" in remark and "tensorboard --logdir" in remark
    for entry in fixture.status["cells"].values():
        entry["used"] = {"wandb": "online"}
    assert "wandb" not in sections.tables(summary_of(fixture)).popitem()[1][0].remark


# --- charts --------------------------------------------------------------------------------------------------


def test_the_timeline_has_a_column_a_step_whose_bands_are_its_phases():
    (figure,) = charts_of(report_fixture.rl())["Time of a step by phase, s"]
    titles = re.findall(r"<title>(step \d+: [^<]*)</title>", figure.svg)
    assert len({title.split(":")[0] for title in titles}) == 30
    of_two = [title for title in titles if title.startswith("step 2:")]
    assert of_two[0].startswith("step 2: rollout ") and of_two[-1].startswith("step 2: idle ")
    assert any("log-prob" in title and "reference" in title for title in of_two)
    assert [name for _, name in figure.legend] == [name for _, name, _ in rl.BANDS]
    assert "Training went on from a checkpoint before step 21." in figure.about


def test_a_first_step_that_compiles_is_cut_off_with_its_height():
    (figure,) = charts_of(report_fixture.rl())["Time of a step by phase, s"]
    assert "Its column is cut off." in figure.about and figure.svg.count("↑</text>") == 2
    (even,) = charts_of(report_fixture.rl(steps=4, attempts=()))["Time of a step by phase, s"]
    assert "cut off" not in even.about and "↑" not in even.svg


def test_of_many_steps_a_column_is_the_mean_of_several():
    (figure,) = charts_of(report_fixture.rl(steps=95))["Time of a step by phase, s"]
    assert "each the mean of 3" in figure.about
    names = {title.split(":")[0] for title in re.findall(r"<title>(steps? [^<]*)</title>", figure.svg)}
    assert len(names) == 32 and "steps 4 to 6" in names and "steps 94 to 95" in names


def test_reward_kl_and_lengths_are_curves_over_steps():
    found = charts_of(report_fixture.rl())
    assert list(found) == [
        "Loss",
        "Time of a step by phase, s",
        "Reward",
        "KL, nat per token",
        "Length of answers, tokens",
    ]
    (reward,) = found["Reward"]
    assert [name for _, name in reward.legend] == ["training", "validation"]
    assert len(re.findall("<circle", reward.svg)) == 33


def test_one_step_is_drawn_as_well():
    found = charts_of(report_fixture.rl(steps=1, attempts=(1,)))
    assert len(re.findall("<circle", found["Reward"][0].svg)) == 1
    assert "nan" not in str(found).lower()


def test_nan_is_a_finding_on_the_page_that_fails_the_run():
    fixture = report_fixture.rl()
    last = next(r for r in fixture.records if r.metric == "reward_mean")
    context = {"step": 12, "names": ["actor/grad_norm"]}
    fixture.records.append(replace(last, metric="not_a_number", value=1, context=context))
    summary = summary_of(fixture)
    assert summary["verdict"] == "fail"
    assert summary["findings"][0]["evidence"].startswith(
        "actor/grad_norm of step 12 of 30 is NaN or infinite; lower the"
    )
    assert [one["kind"] for one in summary["observations"]] == ["idle_step", "uneven_rollout"]


def test_parts_of_a_column_are_never_higher_than_the_axis():
    stack = chart.Column("1", [(5.0, 0, "a"), (50.0, 1, "b"), (1.0, 2, "c")])
    svg = chart.columns([stack], "step", chart.linear("", [8.0], from_zero=True), "about")
    heights = [float(found) for found in re.findall(r'<rect [^>]*height="([\d.]+)"', svg)]
    assert len(heights) == 2 and sum(heights) <= chart.HEIGHT - chart.TOP - chart.BOTTOM + 0.2
    assert "56 ↑" in svg


# --- targets -------------------------------------------------------------------------------------------------


def judged(fixture: Fixture, **changes: Any) -> dict[str, Any]:
    fixture.plan["targets"] = [{**target, **changes} for target in config.load_targets("workflow")]
    (target,) = summary_of(fixture)["targets"]
    return target


def test_a_target_of_a_workflow_is_judged_by_its_steps():
    target = judged(report_fixture.rl())
    assert (target["name"], target["verdict"], target["repeats"]) == ("idle", "pass", 28)
    assert 2 < target["measured"] < 6
    strict = judged(report_fixture.rl(), value=1.0)
    assert strict["verdict"] == "fail" and "required: at most 1 %" in strict["reason"]
    short = judged(report_fixture.rl(steps=3, attempts=(1,)))
    assert short["verdict"] == "inconclusive"


def test_a_target_is_not_judged_on_cpus():
    fixture = report_fixture.rl()
    for cell in fixture.plan["cells"]:
        cell["device"] = "cpu"
    assert judged(fixture)["verdict"] == "not_judged"


def test_a_target_is_changed_by_name():
    assert [one["value"] for one in config.load_targets("workflow", {"idle": 12})] == [12.0]
    with pytest.raises(UsageError, match="idle"):
        config.load_targets("workflow", {"idel": 12})
    with pytest.raises(UsageError, match=r"--set targets\.idle=much"):
        config.load_targets("workflow", {"idle": "much"})


def test_a_path_inside_the_run_begins_there_and_an_answer_without_text_is_named():
    fixture = report_fixture.rl()
    fixture.plan["run_dir"] = "/scratch"
    for index, record in enumerate(fixture.records):
        if record.metric == "answer_s":
            fixture.records[index] = replace(record, context={**record.context, "answer": " \n"})
    summary = summary_of(fixture)
    assert rl.stages(summary).rows[2]["left"] == "models/sft.9a1c"
    assert {row["answer"] for row in sections.tables(summary).popitem()[1][2].rows} == {"(no text)"}


def test_steps_are_whole_numbers_on_the_axis():
    svg = charts_of(report_fixture.rl(steps=3, attempts=(1,)))["Reward"][0].svg
    assert re.findall(r">([\d.]+)</text>", svg)[-3:] == ["1", "2", "3"]


# --- utilisation ---------------------------------------------------------------------------------------------


def test_gpus_of_nodes_whose_ranks_tell_no_steps_count_as_well():
    fixture = report_fixture.rl(steps=3, attempts=(1,))
    hosts = next(cell["hosts"] for cell in fixture.plan["cells"] if cell["id"] == "ppo")
    at = 1000.0
    for index, record in enumerate(fixture.records):
        if record.cell == "ppo" and record.metric == "step_time_s":
            fixture.records[index] = replace(record, context={**record.context, "started_s": at})
            at += record.value
    busy = {hosts[0]: 90, hosts[1]: 30}
    moments = [(10.0, 0), (1400.0, None), (5000.0, 0)]  # before, in a measured step, after
    fixture.telemetry["ppo"] = {
        host: [{"time_s": moment, "gpu0_util_pct": util if idle is None else idle} for moment, idle in moments]
        for host, util in busy.items()
    }
    (cell,) = [cell for cell in summary_of(fixture)["cells"] if cell["id"] == "ppo"]
    assert (cell["metrics"]["gpu_util_pct_mean"], cell["slowest_gpu"]["host"]) == (60.0, hosts[1])
