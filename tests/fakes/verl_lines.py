"""Lines as verl 0.9.1 writes them of a step, with invented numbers: its own names of metrics, and null for NaN."""

from __future__ import annotations

import json
from typing import Any

PHASES_S = {
    "gen": 4.0, "reward": 0.25, "old_log_prob": 0.5, "ref": 0.5, "values": 0.25, "adv": 0.05, "update_critic": 1.0,
    "update_actor": 1.5, "update_weights": 0.5,
}  # fmt: skip


def rl_line(number: int, idle_s: float = 0.45, reward: float | None = 0.25, **changes: Any) -> str:
    """A step of PPO with the timers of PHASES_S and `idle_s` beside them; `changes` are further metrics, or others."""
    timers = {name: changes.pop(name, seconds) for name, seconds in PHASES_S.items()}
    data = {f"timing_s/{name}": seconds for name, seconds in timers.items()} | {
        "timing_s/step": sum(timers.values()) + idle_s,
        "timing_per_token_ms/gen": 0.5,
        "timing_per_token_ms/update_actor": 0.125,
        "perf/total_num_tokens": 12000,
        "critic/rewards/mean": reward,
        "actor/reward_kl_penalty": 0.01 * number,
        "response_length/mean": 100.0,
        "response_length/max": 150.0,
        "response_length/clip_ratio": 0.125,
        "actor/grad_norm": 0.5,
    }
    return json.dumps({"step": number, "data": {**data, **changes}}) + "\n"


def sft_line(number: int, loss: float | None = 1.5, tokens: float = 4096.0) -> str:
    """A step of fine-tuning."""
    data = {"train/loss": loss, "train/grad_norm": 0.5, "train/lr": 1e-5, "train/global_tokens": tokens}
    return json.dumps({"step": number, "data": data}) + "\n"
