"""What verl writes of a step becomes phases, curves, and what was no number."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cluster.tools.verl_metrics import CURVES, IDLE, PHASES, Reader, latest, step_of

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
    assert step.phases_s[IDLE] == 1.5 and step.idle_share == 0.15
    assert sum(step.phases_s.values()) == step.seconds == 10.0, "what is after the step is not in it"
    assert step.tokens_per_s == {"rollout": 2000.0, "update_actor": 8000.0}
    assert step.tokens == 12000
    assert step.curves == {"reward": 0.25, "kl": 0.01, "response_tokens": 128.5}


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
    assert step.curves["kl"] == 0.5 and "grad_norm" not in step.curves


def test_a_timer_that_is_not_known_is_kept_and_is_in_no_phase():
    step = step_of(line(**{"timing_s/switch_wait": 0.75}))
    assert step.other_s == {"switch_wait": 0.75}
    assert step.phases_s[IDLE] == 1.5


def test_phases_that_take_longer_than_the_step_leave_no_idle_time():
    assert step_of(line(**{"timing_s/gen": 9.0})).phases_s[IDLE] == 0.0


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"step": 3}', "[1]", "null", '{"step": "x", "data": {}}', '{"step": 0, "data": {"val-core/acc": 0.5}}',
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
        numbers += [step.number for step in reader.feed(text[start:end])]
        start = end
    assert numbers == list(range(1, count + 1))


def test_a_line_without_its_end_waits_for_it():
    reader = Reader()
    assert reader.feed(line(1)) == []
    assert [step.number for step in reader.feed("\n" + line(2))] == [1]


def test_a_step_that_was_done_again_counts_once_with_what_it_was_last():
    first, again = step_of(line(2)), step_of(line(2, **{"critic/rewards/mean": 0.75}))
    assert [(step.number, step.curves["reward"]) for step in latest([step_of(line(3)), first, again])] == [
        (2, 0.75),
        (3, 0.25),
    ]


def test_every_curve_has_a_name_of_its_own():
    names = [name for keys in CURVES.values() for name in keys]
    assert len(set(names)) == len(names)
