"""Steps of a training with verl become metrics, and what is wrong with them is found."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from verl_lines import PHASES_S, rl_line, sft_line

from runner.cluster.tools.verl_metrics import step_of
from runner.failures import Suspect
from runner.results.records import Record
from runner.workloads.rl import findings, metrics
from runner.workloads.rl.record import values_of

CELL = {"id": "rl-2n-r1", "num_nodes": 2, "gpus_per_node": 4}


def records_of(lines: Iterable[str], seconds: float | None = None) -> list[Record]:
    """What is recorded of an attempt that wrote `lines`; `seconds` is what a step takes where verl does not say."""
    found = []
    for index, line in enumerate(lines):
        step = step_of(line)
        assert step is not None
        for metric, value, context in values_of(step, step.seconds or (seconds if index else None), index > 0):
            found.append(Record("r", CELL["id"], "t", None, 2, 1, 1, metric, value, "node001", 0, context))
    return found


def summary(lines: Iterable[str], seconds: float | None = None) -> dict[str, float]:
    return metrics.summarise({}, CELL, records_of(lines, seconds))[0]


def found(lines: Iterable[str]) -> list[Suspect]:
    return list(findings.find({}, [CELL], {CELL["id"]: records_of(lines)}, {}))


def test_shares_and_rates_are_those_of_measured_steps():
    """The first step compiles for a minute: nothing of it is in any of them."""
    m = summary([rl_line(1, idle_s=60), *(rl_line(number) for number in range(2, 12))])
    assert (m["steps"], m["steps_measured"]) == (11, 10)
    assert m["step_time_s_p50"] == m["step_time_s_p95"] == pytest.approx(9.0)
    assert m["tokens_per_s"] == pytest.approx(12000 / 9)
    assert m["tokens_per_s_per_gpu"] == pytest.approx(12000 / 9 / 8)
    shares = {name.removesuffix("_share_pct"): value for name, value in m.items() if name.endswith("_share_pct")}
    assert sum(shares.values()) == pytest.approx(100)
    assert shares["rollout"] == pytest.approx(100 * 4 / 9) and shares["idle"] == pytest.approx(5)
    assert list(shares) == [
        "rollout", "reward", "log_prob", "reference", "value", "advantage", "update_critic", "update_actor",
        "weight_sync", "idle",
    ]  # fmt: skip
    assert m["rollout_tokens_per_s"] == pytest.approx(2000) and m["update_actor_tokens_per_s"] == pytest.approx(8000)
    assert m["log_prob_tokens_per_s"] == pytest.approx(24000)


def test_the_rate_of_a_phase_is_its_tokens_by_its_time():
    """Not the mean of rates: a step that takes longer counts as much longer."""
    lines = [rl_line(1), rl_line(2, gen=1.0, **{"timing_per_token_ms/gen": 0.1}), rl_line(3, gen=9.0)]
    assert summary(lines)["rollout_tokens_per_s"] == pytest.approx((10_000 * 1 + 2000 * 9) / 10)


def test_curves_begin_and_end_with_the_mean_of_a_fifth_of_the_steps():
    m = summary([rl_line(number, reward=number / 10) for number in range(1, 11)])
    assert (m["reward_mean_first"], m["reward_mean_last"]) == (pytest.approx(0.15), pytest.approx(0.95))
    assert m["response_clipped_pct"] == 12.5 and m["response_tokens_mean_last"] == 100
    alone = summary([rl_line(1, reward=0.5)])
    assert (alone["reward_mean_first"], alone["reward_mean_last"], alone["steps"]) == (0.5, 0.5, 1)
    assert not {"tokens_per_s", "step_time_s_p50", "idle_share_pct"} & set(alone), "one step is compilation"


def test_fine_tuning_has_rates_and_a_loss_and_no_phases():
    m = summary([sft_line(number, loss=2.0 / number) for number in range(1, 6)], seconds=2.0)
    assert m["tokens_per_s"] == 2048 and m["tokens_per_s_per_gpu"] == 256 and m["step_time_s_p50"] == 2.0
    assert (m["loss_first"], m["loss_last"]) == (2.0, 0.4)
    assert not [name for name in m if name.endswith("_share_pct")]


def test_a_validation_before_the_first_step_is_no_step():
    before = '{"step": 0, "data": {"val-core/arithmetic/reward/mean@1": 0.0}}'
    m = summary([before, rl_line(1), rl_line(2, **{"val-core/arithmetic/reward/mean@1": 0.5})])
    assert m["steps"] == 2 and (m["validation_reward_first"], m["validation_reward_last"]) == (0.0, 0.5)


def test_a_merge_has_its_times():
    one = Record("r", "c", "t", None, 1, 1, 1, "merge_s", 4.5, "node001", 0, {})
    assert metrics.summarise({}, CELL, [one])[0] == {"merge_s": 4.5}


def test_a_target_is_compared_with_the_metric_of_its_name():
    assert metrics.target_value({"metric": "idle_share_pct"}, {"metrics": {"idle_share_pct": 31.0}}, []) == 31.0
    assert metrics.target_value({"metric": "kl_last"}, {"metrics": {}}, []) is None


# --- findings ----------------------------------------------------------------------------------------------------


def test_a_healthy_training_shows_nothing():
    assert found([rl_line(number) for number in range(1, 9)]) == []
    assert found([sft_line(1), sft_line(2)]) == [] and found([]) == []


def test_nan_fails_the_run_and_is_named_with_its_step():
    (nan,) = found(
        [rl_line(1), rl_line(2), rl_line(3, reward=None, **{"actor/grad_norm": None}), rl_line(4, reward=None)]
    )
    assert (nan.kind, nan.observation) == ("not_a_number", False)
    assert nan.where == "rl-2n-r1, from step 3 on"
    assert nan.evidence == (
        "actor/grad_norm, critic/rewards/mean of step 3 of 4 are NaN or infinite, and in 1 later step"
    )


def test_nan_of_fine_tuning_fails_the_run_as_well():
    (nan,) = found([sft_line(1), sft_line(2, loss=None)])
    assert nan.evidence == "train/loss of step 2 of 2 is NaN or infinite"


def test_an_idle_step_is_an_observation_with_its_reason():
    (idle,) = found([rl_line(1), rl_line(2), rl_line(3, idle_s=5.7), rl_line(4), rl_line(5, idle_s=4.275)])
    assert (idle.kind, idle.observation) == ("idle_step", True)
    assert idle.where == "rl-2n-r1, steps 3, 5"
    assert idle.evidence.startswith(
        "2 of 4 measured steps had no phase at work for more than 30 % of their time, at worst 40 %: 5.7 of 14.2 s of step 3. "
    )
    assert "verl times nothing in it" in idle.evidence


def test_a_first_step_may_be_idle_since_it_compiles():
    assert found([rl_line(1, idle_s=100), rl_line(2)]) == []


def test_the_reason_is_verls_own_timer_where_it_has_one():
    (idle,) = found([rl_line(1), rl_line(2, idle_s=5.7, **{"timing_s/switch_wait": 5.13})])
    assert idle.evidence.endswith("90 % of that is in verl's timer switch_wait")


def test_the_reason_is_a_rank_that_others_wait_for_where_verl_says_so():
    spread = {"global_seqlen/mean": 1000, "global_seqlen/balanced_max": 2500, "global_seqlen/max": 9000}
    (idle,) = found([rl_line(1), rl_line(2, idle_s=5.7, **spread)])
    assert idle.evidence.endswith(
        "tokens of data-parallel ranks differ: the largest is 2.5 times the mean, and all wait for it"
    )


def test_a_rollout_that_waits_for_few_answers_is_an_observation():
    (uneven,) = found([rl_line(1), rl_line(2), rl_line(3, **{"response_length/max": 450.0})])
    assert (uneven.kind, uneven.observation) == ("uneven_rollout", True)
    assert uneven.evidence == (
        "in 1 of 2 measured steps: in step 3 the longest answer has 4.5 times the mean's "
        "tokens, and rollout takes 4 of 9 s"
    )
    times = {"timing_s/agent_loop/generate_sequences/mean": 1.0, "timing_s/agent_loop/generate_sequences/max": 3.0}
    (slow,) = found([rl_line(1), rl_line(2, **times)])
    assert "the slowest of agent loop/generate sequences takes 3 times the mean's time" in slow.evidence


def test_answers_may_differ_where_rollout_is_little_of_a_step():
    lines = [rl_line(1), rl_line(2, gen=0.5, **{"response_length/max": 450.0})]
    assert found(lines) == [] and PHASES_S["gen"] == 4.0


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("idle_share_pct", [100 * 0.45 / 9, 100 * 4.5 / 13.05]),
        ("rollout_tokens_per_s", [2000.0, 2000.0]),
        ("tokens_per_s", [12000 / 9, 12000 / 13.05]),
        ("tokens_per_s_per_gpu", [12000 / 9 / 8, 12000 / 13.05 / 8]),
        ("step_time_s_p50", [9.0, 13.05]),
        ("reward_mean_last", [0.75]),
        ("response_clipped_pct", [12.5]),
        ("merge_s", []),
    ],
)
def test_what_repeats_within_a_cell_are_its_measured_steps(metric, values):
    records = records_of([rl_line(1, idle_s=99), rl_line(2), rl_line(3, idle_s=4.5, reward=0.75)])
    cell = {**CELL, "metrics": metrics.summarise({}, CELL, records)[0]}
    assert metrics.samples({"metric": metric}, cell, records) == [pytest.approx(value) for value in values]


def test_a_usual_step_is_the_median_one():
    m = summary([rl_line(1), rl_line(2), rl_line(3), rl_line(4, idle_s=90)])
    assert m["step_time_s_p50"] == pytest.approx(9.0) and m["step_time_s_mean"] == pytest.approx((9 + 9 + 98.55) / 3)
