"""Which phase of a step verl's trainer is in, while it is in it.

verl tells how long phases took when a step has ended, which is minutes later. Its trainers time each phase with
`marked_timer`; where `environment` says so, verl imports `runner.workloads.rl.mark`, and each phase's name is written
to a file as well.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from runner.cluster.tools.verl_metrics import PHASES

FILE = "SHAKEDOWN_PHASE_FILE"
_MODULES = "VERL_USE_EXTERNAL_MODULES"  # verl's own
_OF_TIMER = {timer: phase for phase, timer in PHASES.items()} | {"testing": "validation"}


def environment(path: Path, existing: Mapping[str, str]) -> dict[str, str]:
    """The variables with which verl imports `mark` beside what it imports already, and phases are in `path`."""
    before = existing.get(_MODULES, "")
    return {FILE: str(path), _MODULES: ",".join(filter(None, (before, "runner.workloads.rl.mark")))}


def in_words(phase: str) -> str:
    """A phase as people read it."""
    return {"log_prob": "log-prob"}.get(phase, phase.replace("_", " "))


def read(path: Path) -> str:
    """The phase that the trainer which writes `path` is in; empty where it is not known."""
    try:
        return path.read_text()
    except OSError:
        return ""


def noted(
    timer: Callable[..., AbstractContextManager[None]], path: Path
) -> Callable[..., AbstractContextManager[None]]:
    """verl's `timer`, which writes the phase that it times to `path`."""

    @functools.wraps(timer)
    @contextmanager
    def marked(name: str, *args: Any, **named: Any) -> Iterator[None]:
        if phase := _OF_TIMER.get(name):
            # What only shows where a trainer is never ends it.
            with suppress(OSError):
                fresh = path.with_name(f".{path.name}.{os.getpid()}")
                fresh.write_text(phase)
                fresh.replace(path)
        with timer(name, *args, **named):
            yield

    return marked
