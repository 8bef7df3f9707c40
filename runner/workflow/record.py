"""What status.json says of a workflow: what was asked for, and its stages that run on the controller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from runner.errors import Interrupted, RunnerError, os_error_text
from runner.results.rundir import RunDir
from runner.system.clock import now

_WORKFLOW, _STAGES = "workflow", "stages"


class Stages:
    """`workflow` {name, asked} and `stages` {name: entry} of a run's status.json, each written as soon as it changes.

    An entry has `state` and `error` as a cell's, `started`, `ended`, `inputs` (`stages.inputs`), and what the stage has
    `left`. While a controller carries cells out, status.json is its journal's, which keeps these as they were.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def asked(self) -> tuple[str, Mapping[str, Any]] | None:
        """The workflow's name and options that the run was started with; None for a run that is no workflow."""
        found = self.run.read_status().get(_WORKFLOW)
        return (found["name"], found["asked"]) if found else None

    def ask(self, name: str, asked: Mapping[str, Any]) -> None:
        """Record what a workflow was asked for."""
        status = self.run.read_status()
        status[_WORKFLOW] = {"name": name, "asked": dict(asked)}
        status.setdefault(_STAGES, {})
        self.run.write_status(status)

    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        """The entries by the stage's name."""
        found: Mapping[str, Mapping[str, Any]] = self.run.read_status().get(_STAGES, {})
        return found

    def note(self, name: str, **changes: Any) -> None:
        """Change the entry of a stage."""
        status = self.run.read_status()
        stages = status.setdefault(_STAGES, {})
        empty: dict[str, Any] = {
            "state": "planned",
            "started": None,
            "ended": None,
            "error": None,
            "inputs": {},
            "left": {},
        }
        stages[name] = {**empty, **stages.get(name, {}), **changes}
        self.run.write_status(status)

    @contextmanager
    def running(self, name: str, inputs: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Record the start and the end of a stage, which fills what it has left; an error is recorded, and raised."""
        self.note(name, state="running", started=now(), ended=None, error=None, inputs=dict(inputs), left={})
        left: dict[str, Any] = {}
        try:
            yield left
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | Interrupted)
            message = os_error_text(error) if isinstance(error, OSError) else str(error) or type(error).__name__
            kind = error.kind if isinstance(error, RunnerError) else None
            self.note(
                name, state="cancelled" if stopped else "failed", ended=now(), error={"kind": kind, "message": message}
            )
            raise
        self.note(name, state="complete", ended=now(), left=left)
