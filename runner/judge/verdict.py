"""Judging a value against a target by its confidence interval, or not at all where that is meaningless. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from runner.cluster import limits
from runner.results.statistics import quantile
from runner.system.wording import counted

MIN_REPEATS = 3  # below this the spread between repeats is not known, whatever the spread inside one


MIN_PARAMETERS = 100_000_000  # below this a step is launch overhead and latency, whatever the hardware


RESAMPLES = 1000


CONFIDENCE = 0.95


MAX_REPEATS_NEEDED = 100


def not_judged_reason(
    cell: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any] | None = None
) -> str | None:
    """Why the speed of this cell cannot be judged, or None where it can.

    `facts` is host -> facts.json; `model` is the model of a cell that trains.
    """
    hosts = list(cell["hosts"])
    boots = {host: facts.get(host, {}).get("boot_id") for host in hosts}
    shared = max(Counter(boot for boot in boots.values() if boot).values(), default=0)
    if shared > 1:
        proof = "speeds prove that the system works, not how fast it is"
        return f"{counted(shared, 'node')} share one kernel (same boot id): {proof}"
    if cell["device"] == "cpu":
        return "ranks ran on the CPU: targets are for GPUs"
    if model and limits.parameters(model).total < MIN_PARAMETERS:
        return f"model {model['name']} is too small to load a GPU: it proves that the system works, not how fast it is"
    unseen = [host for host, boot in boots.items() if not boot]
    if unseen and len(hosts) > 1:
        return f"no facts from {', '.join(unseen)}: cannot tell whether nodes share a kernel"
    return None


@dataclass(frozen=True)
class Judgement:
    """A verdict (`pass`, `fail`, `inconclusive`, `not_judged`), its reason, and the repeats that would decide."""

    verdict: str
    reason: str
    repeats_needed: int | None = None


def judge(
    value: float,
    ci: tuple[float, float],
    repeats: int,
    target: float,
    direction: str,
    unit: str = "",
    least: int = MIN_REPEATS,
) -> Judgement:
    """`pass` or `fail` only where the whole confidence interval is on one side of the target, else `inconclusive`.

    `value`, `ci` (low, high) and `target` are in `unit`; `direction` is `min` (at least the target) or `max` (at most).
    With fewer repeats than `least` it is `inconclusive`. The repeats needed are estimated from the interval's width,
    which shrinks with the square root of their number.
    """
    low, high = ci
    unit = f" {unit}" if unit else ""
    interval = "" if repeats == least == 1 else f" (95 % CI {_measured(low)} – {_measured(high)})"
    text = f"{_measured(value)}{unit}{interval}"
    if repeats < least:
        reason = f"{text}; {repeats} of at least {least} repeats: the spread between them is not known"
        return Judgement("inconclusive", f"{reason}; add --repeats {least}", least)
    sign = 1 if direction == "min" else -1
    worst, best = (low, high) if direction == "min" else (high, low)
    required = f"required: {'at least' if direction == 'min' else 'at most'} {_number(target)}{unit}"
    if sign * (worst - target) >= 0:
        return Judgement("pass", f"{text}; {required}")
    if sign * (best - target) < 0:
        return Judgement("fail", f"{text}; {required}")
    gap, half = abs(value - target), (high - low) / 2
    needed = MAX_REPEATS_NEEDED if gap == 0 else math.ceil(repeats * (half / gap) ** 2)
    needed = min(max(needed, repeats + 1), MAX_REPEATS_NEEDED)
    about = "more than " if needed == MAX_REPEATS_NEEDED else "about "
    reason = f"{text}; {required}, which is inside the interval; {about}{needed} repeats would decide"
    return Judgement("inconclusive", reason, needed)


def bootstrap(
    samples: Sequence[Sequence[tuple[float, float]]],
    base: Sequence[Sequence[tuple[float, float]]] | None,
    seed: str,
) -> tuple[float, float, float]:
    """(median, low, high) of a rate, or of its ratio to a base's rate, with a 95 % percentile interval.

    `samples` is one list per repeat of (amount, seconds) per step; a repeat's rate is Σ amount ÷ Σ seconds and
    the value is the median over repeats. Each of the 1000 resamples draws repeats with replacement and, within
    each drawn repeat, steps with replacement (a two-level bootstrap: steps of one repeat are correlated). `seed` makes
    the interval reproducible.
    """

    def rate(repeats: Sequence[Sequence[tuple[float, float]]]) -> float:
        return statistics.median(sum(a for a, _ in r) / sum(s for _, s in r) for r in repeats)

    def drawn(repeats: Sequence[Sequence[tuple[float, float]]]) -> float:
        return rate([random.choices(r, k=len(r)) for r in random.choices(repeats, k=len(repeats))])

    random = Random(seed)
    draws = [drawn(samples) / (drawn(base) if base else 1.0) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    value = rate(samples) / (rate(base) if base else 1.0)
    return value, quantile(draws, tail), quantile(draws, 1 - tail)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _measured(value: float) -> str:
    """Four digits, trailing zeros included, so that 94.00 and 94.01 compare."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")
