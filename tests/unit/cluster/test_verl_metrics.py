"""What verl writes of a step becomes phases, curves, and what was no number."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cluster.tools.verl_metrics import CURVES, IDLE, PHASES, Reader, step_of

# A step of PPO as verl 0.9.1 times it: 10 s, of which 1.5 s are in none of its phases.
TIMED = {
    "gen": 4.0, "reward": 0.25, "old_log_prob": 0.5, "ref": 0.5, "values": 0.25, "adv": 0.0, "update_critic": 1.0,
    "update_actor": 1.5, "update_weights": 0.5, "step": 10.0, "testing": 3.0, "agent_loop/generate_sequences/max": 3.9,
}  # fmt: skip
DATA = {f"timing_s/{name}": seconds for name, seconds in TIMED.items()} | {
    "timing_per_token_ms/gen": 0.5,
    "timing_per_token_ms/update_actor": 0.125,
    "perf/total_num_tokens": 12000,
    "critic/rewards/mean": 0.25,
    "critic/score/mean": 0.5,
    "actor/kl_loss": 0.01,
    "response_length/mean": 128.5,
}


def line(number=3, **changes):
    return json.dumps({"step": number, "data": {**DATA, **changes}})


def test_a_step_is_its_phases_and_what_is_left():
    step = step_of(line())
    assert list(step.phases_s) == [*(phase for phase in PHASES if phase != "checkpoint"), IDLE]
    assert step.phases_s["rollout"] == 4.0 and step.phases_s["weight_sync"] == 0.5
    assert step.phases_s[IDLE] == 1.5
    assert sum(step.phases_s.values()) == step.seconds == 10.0, "what is after the step is not in it"
    assert step.tokens_per_s == {"rollout": 2000.0, "update_actor": 8000.0, "log_prob": 24000.0}
    assert step.tokens == 12000 and step.after_s == 3.0 and step.trained
    assert step.curves == {"reward_mean": 0.25, "kl": 0.01, "response_tokens_mean": 128.5}


def test_a_phase_that_a_trainer_has_not_is_absent_and_not_zero():
    grpo = {
        name: seconds for name, seconds in DATA.items() if name not in ("timing_s/values", "timing_s/update_critic")
    }
    step = step_of(json.dumps({"step": 1, "data": grpo}))
    assert "value" not in step.phases_s and "update_critic" not in step.phases_s
    assert step.phases_s[IDLE] == 2.75


def test_nan_is_named_since_verls_file_has_null_for_it():
    step = step_of(line(**{"actor/kl_loss": None, "actor/ppo_kl": 0.5, "actor/grad_norm": None}))
    assert step.not_numbers == ("actor/grad_norm", "actor/kl_loss")
    assert step.curves["kl_of_update"] == 0.5 and not {"kl", "grad_norm"} & set(step.curves)


def test_what_verl_gives_as_maximum_and_mean_is_a_spread():
    more = {
        "timing_s/agent_loop/generate_sequences/mean": 1.3, "response_length/max": 257, "global_seqlen/mean": 6000,
        "global_seqlen/max": 9000, "global_seqlen/balanced_max": 6300, "critic/returns/mean": 1, "critic/returns/max": 9,
        "timing_s/tool/max": 2.0,
    }  # fmt: skip
    assert step_of(line(**more)).spreads == {
        "agent_loop/generate_sequences": 3.0,
        "answers": 2.0,
        "tokens of data-parallel ranks": 1.05,
    }


def test_fine_tuning_has_tokens_and_a_loss_and_verl_times_nothing_of_it():
    data = {"train/loss": 1.5, "train/grad_norm": None, "train/global_tokens": 4096.0, "train/lr": 1e-5}
    step = step_of(json.dumps({"step": 7, "data": data}))
    assert (step.number, step.seconds, step.tokens, step.trained) == (7, None, 4096, True)
    assert step.curves == {"loss": 1.5} and step.not_numbers == ("train/grad_norm",) and step.phases_s == {}
    diverged = step_of(json.dumps({"step": 8, "data": {"train/loss": None}}))
    assert diverged.trained and diverged.not_numbers == ("train/loss",)


def test_a_line_of_a_validation_alone_is_no_step_that_was_trained():
    reward = step_of(json.dumps({"step": 0, "data": {"val-core/openai/gsm8k/acc/mean@1": 0.5, "val-aux/x": 9}}))
    assert (reward.number, reward.trained, reward.curves) == (0, False, {"validation_reward": 0.5})
    loss = step_of(json.dumps({"step": 12, "data": {"val/loss": 0.75}}))
    assert (loss.trained, loss.curves) == (False, {"validation_loss": 0.75})
    assert step_of(line(**{"val-core/arithmetic/reward/mean@1": 0.25})).curves["validation_reward"] == 0.25


def test_a_timer_that_is_not_known_is_kept_and_is_in_no_phase():
    step = step_of(line(**{"timing_s/switch_wait": 0.75}))
    assert step.other_s == {"switch_wait": 0.75}
    assert step.phases_s[IDLE] == 1.5


def test_phases_that_take_longer_than_the_step_leave_no_idle_time():
    assert step_of(line(**{"timing_s/gen": 9.0})).phases_s[IDLE] == 0.0


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"step": 3}', "[1]", "null", '{"step": "x", "data": {}}', '{"step": 0, "data": {"other": 0.5}}',
     '{"step": 1, "data": {"timing_s/step": null}}', '{"step": 1, "data": {"timing_s/step": true}}'],
)  # fmt: skip
def test_another_line_is_no_step(text):
    assert step_of(text) is None


@given(cuts=st.lists(st.integers(0, 3000), max_size=8), count=st.integers(1, 3))
def test_a_file_that_grows_gives_each_step_once_however_it_is_cut(cuts, count):
    text = "".join(f"{line(number)}\n" for number in range(1, count + 1))
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    reader, start, numbers = Reader(), 0, []
    for end in ends:
        numbers += [step.number for step in reader.feed(text[start:end].encode())]
        start = end
    assert numbers == list(range(1, count + 1))


def test_a_line_without_its_end_waits_for_it():
    reader = Reader()
    assert reader.feed(line(1).encode()) == []
    assert [step.number for step in reader.feed(f"\n{line(2)}".encode())] == [1]


def test_every_curve_has_a_name_of_its_own():
    names = [name for keys in CURVES.values() for name in keys]
    assert len(set(names)) == len(names)
