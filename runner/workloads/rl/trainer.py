"""One of verl's trainers in the process of a rank, and how far it is.

The trainer is imported and called, not started: its errors are the rank's, and its output goes where a rank's goes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.workloads.job import Events

LOOK_S = 0.5  # between two looks at verl's file
# Hydra's own folder of each start and its log: what it would write there, words and output have as well.
_HYDRA = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout")
_LENGTH = re.compile(r"\+*trainer\.total_training_steps=(\d+)")


def environment(events: Events) -> dict[str, str]:
    """The variables with which the trainer of the rank of `events` writes into its cell's folder, and asks no hub."""
    return {
        "VERL_FILE_LOGGER_PATH": str(events.folder.verl_metrics),
        "TENSORBOARD_DIR": str(events.folder.path / "tensorboard"),
        "WANDB_DIR": str(events.folder.path),
        "WANDB_MODE": os.environ.get("WANDB_MODE", "offline"),
        "HF_HUB_OFFLINE": "1",  # everything is there before a stage starts
        "HYDRA_FULL_ERROR": "1",  # else Hydra ends the process, and says nothing of where
    }


def run(module: str, words: Sequence[str], events: Events, change: Callable[[Any], None] | None = None) -> None:
    """Run verl's trainer `module` with the overrides `words`; `change` may alter it after its import.

    Raises whatever the trainer does.
    """
    os.environ.update(environment(events))
    loaded = import_module(module)
    if change:
        change(loaded)
    sys.argv = [module, *_HYDRA, *words]
    with Follower(events.folder.verl_metrics, total_of(words), events):
        loaded.main()


def total_of(words: Sequence[str]) -> int | None:
    """The number of steps that `words` ask for, None where it depends on the data."""
    found = [int(match[1]) for word in words if (match := _LENGTH.fullmatch(word))]
    return found[-1] if found else None


class Follower:
    """Reads the file of verl's metrics while it grows, in a thread of its own, and writes the progress to `events`."""

    def __init__(self, path: Path, total: int | None, events: Events) -> None:
        self.path, self.total, self.events = path, total, events
        self.read, self.rest = 0, b""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="verl-metrics", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._over.wait(LOOK_S)
            self.look()

    def look(self) -> None:
        """Read what was added since the last look."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.read)
                added = file.read()
        except OSError:
            return
        self.read += len(added)
        *lines, self.rest = (self.rest + added).split(b"\n")
        for line in lines:
            self.take(line.decode(errors="replace"))

    def take(self, line: str) -> None:
        """Write what one line says."""
        step = step_of(line)
        if step is not None:
            self.events.progress(step, max(step, self.total or 0), "step")


def step_of(line: str) -> int | None:
    """The number of the step of one line, None for a line that is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
