"""Reads the metrics that verl writes of each step, one JSON object per line (its logger `file`). Pure.

Written for the trainers of verl 0.9.1 with rollout and training on the same GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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

# What curves show, and verl's names of it: the first that a step has.
CURVES: Mapping[str, tuple[str, ...]] = {
    "reward": ("critic/rewards/mean", "critic/score/mean"),
    "kl": ("actor/reward_kl_penalty", "actor/kl_loss", "actor/ppo_kl"),
    "response_tokens": ("response_length/mean",),
    "response_clipped": ("response_length/clip_ratio",),
    "grad_norm": ("actor/grad_norm",),
}


@dataclass(frozen=True)
class Step:
    """One step: its duration and that of its phases in seconds (those that it has, `idle` last), tokens per second of
    each phase where verl counts its tokens, and the values of CURVES that it has.

    `tokens` are all of the batch, prompts and answers. `not_numbers` are metrics that were NaN or infinite: verl's file
    has null for these. `other_s` are timers that this module does not know, which are in no phase.
    """

    number: int
    seconds: float
    phases_s: Mapping[str, float]
    tokens_per_s: Mapping[str, float]
    curves: Mapping[str, float]
    tokens: int | None = None
    not_numbers: tuple[str, ...] = ()
    other_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def idle_share(self) -> float:
        """The share of the step in none of its phases, 0…1."""
        return self.phases_s[IDLE] / self.seconds if self.seconds else 0.0


def step_of(line: str) -> Step | None:
    """The step in one line of the file; None for a line of another kind (validation), or one that is torn."""
    try:
        value = json.loads(line)
        number, data = int(value["step"]), value["data"]
        seconds = data.get("timing_s/step")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not _is_number(seconds):
        return None
    timers = {name.removeprefix("timing_s/"): one for name, one in data.items() if name.startswith("timing_s/")}
    # A timer with a slash in its name is a part of another one.
    whole = {name: float(one) for name, one in timers.items() if "/" not in name and _is_number(one)}
    phases = {phase: whole[timer] for phase, timer in PHASES.items() if timer in whole}
    known = {*PHASES.values(), *_BESIDE}
    per_token = {phase: data.get(f"timing_per_token_ms/{timer}") for phase, timer in PHASES.items()}
    tokens = data.get("perf/total_num_tokens")
    return Step(
        number=number,
        seconds=float(seconds),
        phases_s={**phases, IDLE: max(0.0, float(seconds) - sum(phases.values()))},
        tokens_per_s={phase: 1000 / one for phase, one in per_token.items() if _is_number(one) and one > 0},
        curves={
            name: float(data[found])
            for name, keys in CURVES.items()
            if (found := next((key for key in keys if _is_number(data.get(key))), None)) is not None
        },
        tokens=round(tokens) if _is_number(tokens) else None,
        not_numbers=tuple(sorted(name for name, one in data.items() if one is None)),
        other_s={name: one for name, one in whole.items() if name not in known},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Reader:
    """Reads a file that grows: `feed` takes what was added, and returns the steps that are complete by now."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[Step]:
        """The steps in what was read so far and not returned yet."""
        *lines, self._rest = (self._rest + text).split("\n")
        return [step for line in lines if (step := step_of(line)) is not None]


def latest(steps: Iterable[Step]) -> list[Step]:
    """Each step once, in order: one that was done again after a resume replaces what it was."""
    return [step for _, step in sorted({step.number: step for step in steps}.items())]
