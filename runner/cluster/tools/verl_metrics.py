"""Reads the metrics that verl writes of each step, one JSON object per line (its logger `file`). Pure.

Written for the trainers of verl 0.9.1 with rollout and training on the same GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

# What a step consists of, in the order in which it happens, and verl's timer of each. They do not overlap.
PHASES: Mapping[str, str] = {
    "rollout": "gen",
    "reward": "reward",
    "log_prob": "old_log_prob",
    "reference": "ref",
    "value": "values",
    "advantage": "adv",
    "update_critic": "update_critic",
    "update_actor": "update_actor",
    "checkpoint": "save_checkpoint",
    "weight_sync": "update_weights",
}
IDLE = "idle"  # the rest of a step: in none of its phases
_BESIDE = {"step", "testing"}  # the step itself, and what is after it

# What verl names otherwise: a value of a step by the name of its record, and verl's names: the first that the step has.
CURVES: Mapping[str, tuple[str, ...]] = {
    "reward_mean": ("critic/rewards/mean", "critic/score/mean"),
    "kl": ("actor/reward_kl_penalty", "actor/kl_loss"),  # from the reference, in the reward or in the loss
    "kl_of_update": ("actor/ppo_kl",),  # from the policy that gave the answers
    "response_tokens_mean": ("response_length/mean",),
    "response_tokens_max": ("response_length/max",),
    "response_clipped_share": ("response_length/clip_ratio",),
    "loss": ("train/loss",),
    "validation_loss": ("val/loss",),
    "grad_norm": ("actor/grad_norm", "train/grad_norm"),
}
_VALIDATION = "val-core/"  # how verl's names of what it validates by begin
_TOKENS = ("perf/total_num_tokens", "train/global_tokens")
_UNEVEN = {"response_length": "answers", "global_seqlen": "tokens of data-parallel ranks"}  # beside parts of phases
_BY_TOKEN = ("log_prob",)  # phases that take every token, and of which verl gives no rate


@dataclass(frozen=True)
class Step:
    """What one line says of a step: its duration and that of its phases in seconds (those that it has, `idle` last),
    tokens per second of each phase where verl counts its tokens, and the values of CURVES that it has, with
    `validation_reward` after a validation.

    `tokens` are all of the batch, prompts and answers. `not_numbers` are metrics that were NaN or infinite: verl's file
    has null for these. `other_s` are timers that this module does not know, which are in no phase; `after_s` is the
    validation after the step. `spreads` are maximum ÷ mean of what differs between answers or ranks, where verl gives
    both. Of fine-tuning verl times nothing: `seconds` is None. A line of a validation alone is not `trained`.
    """

    number: int
    seconds: float | None
    phases_s: Mapping[str, float] = field(default_factory=dict)
    tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, float] = field(default_factory=dict)
    tokens: int | None = None
    not_numbers: tuple[str, ...] = ()
    other_s: Mapping[str, float] = field(default_factory=dict)
    after_s: float = 0.0
    spreads: Mapping[str, float] = field(default_factory=dict)
    trained: bool = True


def step_of(line: str) -> Step | None:
    """The step in one line of the file; None for a line of another kind, or one that is torn."""
    try:
        value = json.loads(line)
        number, data = int(value["step"]), dict(value["data"])
    except (ValueError, KeyError, TypeError):
        return None
    seconds = data.get("timing_s/step")
    if not _is_number(seconds):
        seconds = None
        if not any(name in ("train/loss", "val/loss") or name.startswith(_VALIDATION) for name in data):
            return None
    timers = {name.removeprefix("timing_s/"): one for name, one in data.items() if name.startswith("timing_s/")}
    # A timer with a slash in its name is a part of another one.
    whole = {name: float(one) for name, one in timers.items() if "/" not in name and _is_number(one)}
    phases = {phase: whole[timer] for phase, timer in PHASES.items() if timer in whole}
    known = {*PHASES.values(), *_BESIDE}
    tokens = next((data[name] for name in _TOKENS if _is_number(data.get(name))), None)
    return Step(
        number=number,
        seconds=seconds if seconds is None else float(seconds),
        phases_s={} if seconds is None else {**phases, IDLE: max(0.0, float(seconds) - sum(phases.values()))},
        tokens_per_s=_rates(data, phases, tokens),
        curves=_curves(data),
        tokens=None if tokens is None else round(tokens),
        not_numbers=tuple(sorted(name for name, one in data.items() if one is None)),
        other_s={name: one for name, one in whole.items() if name not in known},
        after_s=whole.get("testing", 0.0),
        spreads=_spreads(data),
        trained=seconds is not None or "train/loss" in data,
    )


def _rates(data: Mapping[str, Any], phases_s: Mapping[str, float], tokens: float | None) -> dict[str, float]:
    per_token = {phase: data.get(f"timing_per_token_ms/{timer}") for phase, timer in PHASES.items()}
    found = {phase: 1000 / one for phase, one in per_token.items() if _is_number(one) and one > 0}
    return found | {
        phase: tokens / phases_s[phase] for phase in _BY_TOKEN if tokens and phases_s.get(phase) and phase not in found
    }


def _curves(data: Mapping[str, Any]) -> dict[str, float]:
    validated = sorted(name for name in data if name.startswith(_VALIDATION))
    return {
        name: float(data[found])
        for name, keys in {**CURVES, "validation_reward": validated}.items()
        if (found := next((key for key in keys if _is_number(data.get(key))), None)) is not None
    }


def _spreads(data: Mapping[str, Any]) -> dict[str, float]:
    """Maximum ÷ mean by what it is of."""
    found = {}
    for key, mean in data.items():
        of, _, last = key.rpartition("/")
        # Of ranks the maximum after verl has balanced them: before, it was nobody's.
        most = data.get(f"{of}/balanced_max", data.get(f"{of}/max"))
        name = _UNEVEN.get(of) or (of.removeprefix("timing_s/") if of.startswith("timing_s/") else "")
        if last == "mean" and name and most is not None and _is_number(mean) and _is_number(most) and mean > 0:
            found[name] = most / mean
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Reader:
    """Reads a file that grows: `feed` takes what was added, and returns the steps that are complete by now."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, added: bytes) -> list[Step]:
        """The steps in what was read so far and not returned yet."""
        *lines, self._rest = (self._rest + added).split(b"\n")
        return [step for line in lines if (step := step_of(line.decode(errors="replace"))) is not None]
