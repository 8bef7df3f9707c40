"""How long cells take: seconds of each phase, from the last complete cells of the same kind in the same folder of runs.

A cell's kind is all that its duration depends on: test and its settings, model, number of nodes and ranks, device,
engine, backend and inventory. Of a kind that was never complete nothing is known.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.results.rundir import RunDir

PLAN_KEYS = ("engine", "backend", "inventory", "weights")
RUNS = 20  # how many of the last runs are read
SAMPLES = 3  # of how many of the last cells of a kind the median is taken


def kind(plan: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """The kind of a cell as text, from the contents of plan.json and of its entry there."""
    of_plan = [plan.get(key) for key in PLAN_KEYS]
    of_cell = [cell.get(key) for key in ("test", "model", "num_nodes", "world_size", "device", "params")]
    return json.dumps([*of_plan, *of_cell], sort_keys=True)


class Clock:
    """Measures the seconds that an attempt at a cell spends in each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.phase: str | None = None
        self._since = time.monotonic()

    def enter(self, phase: str | None) -> None:
        """End the current phase and begin `phase`; None: one whose length says nothing of other cells."""
        if phase != self.phase:
            if self.phase is not None:
                self.seconds[self.phase] = round(self.seconds.get(self.phase, 0.0) + self.in_phase_s(), 2)
            self.phase, self._since = phase, time.monotonic()

    def in_phase_s(self) -> float:
        """Seconds since the current phase began."""
        return time.monotonic() - self._since


class Timings:
    """The seconds of the phases of the last complete cells, by kind."""

    def __init__(self, results: Path) -> None:
        """Reads the last RUNS runs of the folder `results`; those that cannot be read are passed over."""
        self._samples: dict[str, list[Mapping[str, float]]] = defaultdict(list)
        for run in RunDir.all(results)[-RUNS:]:
            with suppress(UsageError, KeyError, TypeError, AttributeError):
                plan, cells = run.read_plan(), run.read_status()["cells"]
                for cell in plan["cells"]:
                    entry = cells[cell["id"]]
                    if entry["state"] == "complete" and entry.get("phases"):
                        self.add(kind(plan, cell), entry["phases"])

    def add(self, of: str, seconds: Mapping[str, float]) -> None:
        """Add a complete cell of the kind `of`, the newest of all."""
        self._samples[of].append(dict(seconds))

    def expected(self, of: str) -> dict[str, float] | None:
        """The seconds of each phase of a cell of the kind `of`, in order; None if there was no such cell."""
        samples = self._samples[of][-SAMPLES:] if of in self._samples else []
        if not samples:
            return None
        return {phase: statistics.median(one[phase] for one in samples if phase in one) for phase in samples[-1]}

    def total_s(self, of: str) -> float | None:
        """The seconds of a whole cell of the kind `of`; None if there was no such cell."""
        seconds = self.expected(of)
        return None if seconds is None else sum(seconds.values())

    def left_s(self, of: str, clock: Clock) -> float | None:
        """The seconds that a cell of the kind `of` still takes; None if that is not known of its current phase."""
        seconds = self.expected(of) or {}
        if clock.phase not in seconds:
            return None
        phases = list(seconds)
        later = sum(seconds[phase] for phase in phases[phases.index(clock.phase) + 1 :])
        return max(0.0, seconds[clock.phase] - clock.seconds.get(clock.phase, 0.0) - clock.in_phase_s()) + later
