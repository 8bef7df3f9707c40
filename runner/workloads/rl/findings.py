"""What the records of a stage that trains show: values that are no numbers, and steps that wait. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from runner.cluster.tools.verl_metrics import IDLE
from runner.failures import NOBODY, Suspect
from runner.results.records import Record
from runner.system.wording import are, counted, ranges
from runner.workloads.rl import metrics
from runner.workloads.rl.metrics import Step
from runner.workloads.rl.phases import in_words

IDLE_SHARE = 0.3  # of a step, from which on it is idle
UNEVEN = 2.0  # maximum ÷ mean from which on most of those that answer wait for the last
ROLLOUT = 0.3  # share of a step from which on it matters how even the rollout is


def find(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    by_cell: Mapping[str, Sequence[Record]],
    facts: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> Iterator[Suspect]:
    """Metrics that were NaN, then, as observations, idle steps and rollouts that wait for few answers."""
    for cell in cells:
        found = metrics.trained(metrics.steps(by_cell.get(cell["id"], ())))
        yield from _not_numbers(cell["id"], found)
        measured = [step for step in found if step.measured and step.seconds and step.phases_s]
        yield from _idle(cell["id"], measured)
        yield from _uneven(cell["id"], measured)


def _not_numbers(cell: str, found: Sequence[Step]) -> Iterator[Suspect]:
    steps = [step for step in found if step.not_numbers]
    if steps:
        first, every = steps[0], dict.fromkeys(name for step in steps for name in step.not_numbers)
        again = f", and in {counted(len(steps) - 1, 'later step')}" if len(steps) > 1 else ""
        more = f" ({_list(list(every))})" if len(every) > len(first.not_numbers) else ""
        yield Suspect(
            "not_a_number",
            where=f"{cell}, from step {first.number} on",
            evidence=f"{_list(first.not_numbers)} of step {first.number} of {found[-1].number} "
            f"{are(len(first.not_numbers))} NaN or infinite{again}{more}",
            confidence="high",
        )


def _idle(cell: str, measured: Sequence[Step]) -> Iterator[Suspect]:
    idle = [step for step in measured if step.idle_share > IDLE_SHARE]
    if idle:
        worst = max(idle, key=lambda step: step.idle_share)
        rest = worst.phases_s[IDLE]
        yield Suspect(
            "idle_step",
            where=f"{cell}, {_steps(idle)}",
            evidence=f"{len(idle)} of {counted(len(measured), 'measured step')} had no phase at work for more than "
            f"{100 * IDLE_SHARE:.0f} % of their time, at worst {100 * worst.idle_share:.0f} %: {rest:.3g} of "
            f"{worst.seconds:.3g} s of step {worst.number}. {_reason(worst)}",
            confidence=NOBODY,
            observation=True,
        )


def _reason(step: Step) -> str:
    """Why a step was idle, by what verl says of it: timers outside phases, and what some wait for others in."""
    rest = step.phases_s[IDLE]
    parts = []
    if step.other_s:
        timer = max(step.other_s, key=lambda name: step.other_s[name])
        seconds = min(step.other_s[timer], rest)
        if seconds > 0.1 * rest:
            parts.append(f"{100 * seconds / rest:.0f} % of that is in verl's timer {timer}")
    uneven = {of: ratio for of, ratio in step.spreads.items() if ratio >= UNEVEN}
    if uneven:
        of = max(uneven, key=lambda name: uneven[name])
        parts.append(f"{of} differ: the largest is {uneven[of]:.3g} times the mean, and all wait for it")
    if not parts:
        parts.append(
            "verl times nothing in it: between phases its controller reads prompts, balances the batch and hands it to "
            "the workers"
        )
    return "; ".join(parts)


def _uneven(cell: str, measured: Sequence[Step]) -> Iterator[Suspect]:
    """Steps of which much is rollout, in which few answers take longer than all others."""
    found = []
    for step in measured:
        share = step.phases_s.get("rollout", 0.0) / (step.seconds or 1.0)
        differ = {of: ratio for of, ratio in step.spreads.items() if of == "answers" or "generate" in of}
        if differ and share > ROLLOUT and max(differ.values()) >= UNEVEN:
            found.append((max(differ.values()), max(differ, key=lambda of: differ[of]), step))
    if found:
        ratio, of, step = max(found, key=lambda one: one[0])
        seconds = step.phases_s["rollout"]
        what = "the longest answer has" if of == "answers" else f"the slowest of {in_words(of)} takes"
        unit = "tokens" if of == "answers" else "time"
        yield Suspect(
            "uneven_rollout",
            where=f"{cell}, {_steps([one for *_, one in found])}",
            evidence=f"in {len(found)} of {counted(len(measured), 'measured step')}: in "
            f"step {step.number} {what} {ratio:.3g} times the mean's {unit}, and rollout takes {seconds:.3g} of "
            f"{step.seconds:.3g} s",
            confidence=NOBODY,
            observation=True,
        )


def _steps(found: Sequence[Step]) -> str:
    """`step 4`, or `steps 2-5, 9`."""
    numbers = ranges([step.number for step in found])
    return f"step {numbers}" if len(found) == 1 else f"steps {numbers}"


def _list(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
