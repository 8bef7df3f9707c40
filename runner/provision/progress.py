"""The progress of a play: tasks weighted by their duration in the previous run."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from runner import errors
from runner.system.places import cache_dir

if TYPE_CHECKING:
    from runner.provision.playbook import Call
    from runner.report.progress import Display


class Progress:
    """The position of the progress bar of `call` on `hosts` nodes, shown on `display`.

    Tasks are weighted by their duration in the previous run; without one, each counts 1 s.
    """

    def __init__(self, call: Call, display: Display, hosts: int) -> None:
        self._display = display
        self._hosts = hosts
        self._known = _read_seconds()
        self._all: list[str] = []
        self._done_s = 0.0
        self._task, self._answers, self._started = "", 0, time.monotonic()
        self.seconds: dict[str, float] = {}
        # Listing the tasks takes Ansible a second: in parallel with the play, not before it.
        threading.Thread(target=self._list, args=(call,), daemon=True).start()

    def _list(self, call: Call) -> None:
        from runner.provision import playbook

        with suppress(errors.RunnerError):
            self._all = playbook.tasks(call)

    def _expected_s(self, task: str) -> float:
        return self._known.get(task, 1.0)

    def task(self, name: str, role: str) -> None:
        """Record that a task starts, which ends the previous one; `role` is "" for a playbook's own task."""
        self._end()
        self._task = f"{role} : {name}" if role else name
        self._answers, self._started = 0, time.monotonic()
        self._show("")

    def _end(self) -> None:
        if self._task:
            self._done_s += self._expected_s(self._task)
            self.seconds[self._task] = round(time.monotonic() - self._started, 2)

    def answer(self, alias: str) -> None:
        """Record that the node `alias` has finished the current task."""
        self._answers += 1
        self._show(alias)

    def _show(self, alias: str) -> None:
        share = min(1.0, self._answers / self._hosts)
        total = sum(map(self._expected_s, self._all)) or 1.0
        done = min(total, self._done_s + share * self._expected_s(self._task)) if self._all else 0.0
        text = f"{self._answers}/{self._hosts} {alias or 'nodes'} · {self._task}"
        known = bool(self._all) and set(self._all) <= self._known.keys()  # else nobody knows
        self._display.at(done, total, text, left_s=total - done if known else None)

    def finish(self) -> None:
        """End the last task, and store the durations of all tasks for the next run; a full disk is no error."""
        from runner.system.files import write_json_atomic

        self._end()
        with suppress(OSError):
            cache_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json_atomic(_seconds_file(), {**self._known, **self.seconds})


def _seconds_file() -> Path:
    return cache_dir() / "task_seconds.json"


def _read_seconds() -> dict[str, float]:
    try:
        return {str(k): float(v) for k, v in json.loads(_seconds_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
