"""How the fastest settings are searched for: which are tried next, given what those before have shown. Pure.

What is measured decides, and a difference counts where it exceeds what the same settings differ by: else the default,
or the simpler setting, stays. Memory decides how far the micro-batch is raised, and only where memory ended that,
activations are computed again: at the same micro-batch that is always slower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from runner.plan.tuned import MICRO_BATCH, RECOMPUTE, STAGE
from runner.results.tuned import OK, OUT_OF_MEMORY, REFUSED, Probe

GAIN = 0.03  # the least gain that counts: one process differs from the next by that much

Settings = Mapping[str, Any]


class Spent(Exception):
    """No further probe is allowed: raised by what measures, and the end of a search."""


@dataclass(frozen=True)
class Change:
    """Settings that are tried together, on settings that include `only`."""

    settings: Settings
    only: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Space:
    """What may be tried. `base` are the settings without tuning.

    `micro_batches` are in sequences and ascend, `recompute` in the order in which it costs time, `stages` in the order
    in which they are tried; one that is held has the base's value alone, or none. `changes` are tried last, one at a
    time, each on the best settings until then.
    """

    base: Settings
    micro_batches: Sequence[int]
    recompute: Sequence[str]
    stages: Sequence[int] = ()
    changes: Sequence[Change] = ()


def least_gain(one: Probe, other: Probe) -> float:
    """The relative gain that equal settings can show too: GAIN, or more where the steps of the two differ by more."""
    return max(GAIN, 2 * math.hypot(one.noise or 0.0, other.noise or 0.0))


def faster(one: Probe, other: Probe) -> bool:
    """Whether `one` is faster than `other` by more than GAIN and by more than the steps of both differ."""
    if one.outcome != OK or not one.positions_per_s_per_gpu:
        return False
    if other.outcome != OK or not other.positions_per_s_per_gpu:
        return True
    return one.positions_per_s_per_gpu > other.positions_per_s_per_gpu * (1 + least_gain(one, other))


def search(space: Space, measure: Callable[[Settings], Probe]) -> Probe | None:
    """The probe of the best settings, None where none succeeded. Each setting is measured once at most.

    `measure` raises Spent where it must not be asked again: the best until then is returned.
    """
    found = _Search(space, measure)
    with suppress(Spent):
        found.run()
    return found.best


class _Search:
    def __init__(self, space: Space, measure: Callable[[Settings], Probe]) -> None:
        self.space, self.ask = space, measure
        self.seen: dict[str, Probe] = {}
        self.best: Probe | None = None

    def probe(self, settings: Settings) -> Probe:
        """The settings measured, once; the best of all is kept."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self.seen:
            made = self.seen[key] = self.ask(settings)
            if made.outcome == OK and (self.best is None or faster(made, self.best)):
                self.best = made
        return self.seen[key]

    def run(self) -> None:
        self.probe(self.space.base)
        self._memory()
        if self.best is not None:
            self._stage()
        for change in self.space.changes:
            if self.best is not None and change.only.items() <= self.best.settings.items():
                self.probe({**self.best.settings, **change.settings})

    # --- micro-batch and recompute ------------------------------------------------------------------

    def _at(self, recompute: str, micro_batch: int) -> Probe:
        return self.probe({**self.space.base, RECOMPUTE: recompute, MICRO_BATCH: micro_batch})

    def _memory(self) -> None:
        """The micro-batch from the base's upwards, without recomputation first; once memory ends that, with more."""
        start = self.space.base[MICRO_BATCH]
        for number, recompute in enumerate(self.space.recompute):
            ended = self._climb(recompute, start)
            if number == 0 and ended == start:  # not even the base's: the largest smaller one that fits
                for smaller in reversed([m for m in self._doubling() if m < start]):
                    if not _lacks_memory(self._at(recompute, smaller)):
                        break
                    ended = smaller
            elif number == 0:
                self._descend(recompute, start)
            elif ended == start:  # the largest that fits of those between what fitted before and this
                fitted = self.best.settings[MICRO_BATCH] if self.best else 0
                for smaller in reversed([m for m in self.space.micro_batches if fitted < m < start]):
                    if not _lacks_memory(self._at(recompute, smaller)):
                        break
            if ended is None:
                return
            start = ended

    def _climb(self, recompute: str, start: int) -> int | None:
        """Raise the micro-batch from `start` while that is faster; returns the first for which memory does not suffice,
        None where something else ended it.
        """
        before: Probe | None = None
        for micro in [start, *(m for m in self._doubling(start) if m > start)]:
            made = self._at(recompute, micro)
            if _lacks_memory(made):
                if before is not None:
                    least = before.settings[MICRO_BATCH]
                    between = [m for m in self.space.micro_batches if least < m < micro]
                    if between:
                        self._at(recompute, between[-1])
                return micro
            if made.outcome != OK or (before is not None and not faster(made, before)):
                return None
            before = made
        return None

    def _descend(self, recompute: str, start: int) -> None:
        """Lower the micro-batch from `start` while that is faster, where raising it was not."""
        before = self._at(recompute, start)
        if self.best is not None and self.best.settings[MICRO_BATCH] > start:
            return
        for micro in reversed([m for m in self._doubling() if m < start]):
            made = self._at(recompute, micro)
            if not faster(made, before):
                return
            before = made

    def _doubling(self, start: int = 0) -> list[int]:
        """Of the micro-batches each that is at least twice the one before, from `start` or the least one."""
        return list(_doubling([m for m in self.space.micro_batches if m >= start]))

    # --- the ZeRO stage -----------------------------------------------------------------------------

    def _stage(self) -> None:
        """The stages on the best settings: a further one only where memory refuses the one before; if it refuses all,
        the first at the next smaller micro-batch.
        """
        assert self.best is not None
        best = self.best.settings
        stages = [stage for stage in self.space.stages if stage != best.get(STAGE)]
        for stage in stages:
            if not _lacks_memory(self.probe({**best, STAGE: stage})):
                return
        smaller = [m for m in self._doubling() if m < best[MICRO_BATCH]]
        if stages and smaller:
            self.probe({**best, STAGE: stages[0], MICRO_BATCH: smaller[-1]})


def _lacks_memory(probe: Probe) -> bool:
    return probe.outcome in (OUT_OF_MEMORY, REFUSED)


def _doubling(ascending: Sequence[int]) -> Iterator[int]:
    last = 0
    for each in ascending:
        if each >= 2 * last:
            yield each
            last = each
