"""Writes the files of a run while it is carried out: status.json, benchmark.log, records.jsonl."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from runner.launch.slurm.ledger import Ledger
from runner.plan.plan import Cell, Plan
from runner.report.progress import Display
from runner.results import records
from runner.results.celldir import holds_events
from runner.results.rundir import RunDir
from runner.results.status import LIVE_STATES, cell_status, note_queue
from runner.system.clock import now
from runner.system.files import disk_errors, write_text_atomic

STATUS_S = 1.0  # minimum interval between two writes of the live view of nodes


class Journal:
    """The states of a run and of its cells, its notes and its records, each written as soon as it changes.

    `scheduled`: jobs of this run outlive their controller; `ledger` has those that continue.
    """

    def __init__(self, run: RunDir, display: Display, scheduled: bool) -> None:
        self.run, self._display, self._scheduled = run, display, scheduled
        self.status = run.read_status()
        self.ledger = Ledger.from_status(self.status) if scheduled else Ledger()
        complete = {cell for cell, entry in self.cells.items() if entry["state"] == "complete"}
        # Records of a cell that runs again are dropped.
        self._records = [record for record in run.read_records() if record.cell in complete]
        self._written = 0.0
        self._log: TextIO

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep benchmark.log open while the context lasts. Raises InfrastructureError if it cannot be written."""
        with (
            disk_errors(self.run.path),
            open(self.run.log, "a", buffering=1, encoding="utf-8", errors="replace") as self._log,
        ):
            yield

    # --- notes --------------------------------------------------------------------------------------

    def log(self, text: str) -> None:
        """Write one line to benchmark.log, with the time."""
        self._log.write(f"{now()} {text}\n")

    def note(self, text: str) -> None:
        """Show one line to the user, and write it to benchmark.log."""
        self._display.note(text)
        self.log(text)

    # --- states -------------------------------------------------------------------------------------

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """The entries of status.json by the cell's id."""
        return self.status["cells"]

    def entry(self, cell: Cell) -> dict[str, Any]:
        """The entry of a cell in status.json; changes are written by `write`."""
        return self.cells[cell.id]

    def complete(self, cell: Cell) -> bool:
        """Whether the cell is complete."""
        return self.entry(cell)["state"] == "complete"

    def write(self) -> None:
        """Write status.json."""
        self._written = time.monotonic()
        self.status["allocation"] = self.ledger.to_json()
        self.run.write_status(self.status)

    def save(self, state: str) -> None:
        """Change the run's own state and write status.json."""
        self.status["state"] = state
        self.write()

    def begin(self, command: str) -> None:
        """Record this process as the run's controller, and the command line in the log."""
        self.status["controller"] = {"host": socket.gethostname(), "pid": os.getpid()}
        self.save("running")
        self.log(command)

    def final_state(self) -> str:
        """The run's state after its last cell: the worst of theirs."""
        states = {entry["state"] for entry in self.cells.values()}
        return next((state for state in ("failed", "incomplete", "cancelled") if state in states), "complete")

    def cell_state(
        self, cell: Cell, state: str, error: dict[str, Any] | None = None, plan_hash: str | None = None
    ) -> None:
        """Change a cell's state and write status.json. `plan_hash`: fingerprint of the plan of a complete cell."""
        entry = self.entry(cell)
        entry.update(state=state, error=error)
        note_queue(entry, state == "waiting", now())
        if plan_hash is not None:
            entry["plan_hash"] = plan_hash
        if state in (*LIVE_STATES, "complete"):
            entry["inputs"] = dict(cell.inputs)
        if state in LIVE_STATES:
            entry.update(started=entry["started"] or now(), hosts=list(cell.hosts))
        else:
            entry.update(ended=now(), progress=None)
        self.write()

    def next_attempt(self, cell: Cell) -> int:
        """Start a new entry for a cell; the last one is kept in `attempts`. Returns the new number."""
        entry = self.entry(cell)
        last = {key: entry[key] for key in ("state", "started", "ended", "error", "job", "hosts")}
        self.cells[cell.id] = cell_status(entry["attempt"] + 1, [*entry["attempts"], last])
        self._records = [record for record in self._records if record.cell != cell.id]
        return entry["attempt"] + 1

    def replan(self, cell: Cell) -> None:
        """Have a cell whose attempt has not begun as it was planned, whatever an earlier controller said of it."""
        entry = self.entry(cell)
        self.cells[cell.id] = cell_status(entry["attempt"], entry["attempts"])

    def live(self, cell: Cell, nodes: Callable[[], Mapping[str, Any]]) -> None:
        """Keep status.json's view of the cell's nodes fresh, once in STATUS_S at most; only then are they looked at."""
        if time.monotonic() - self._written >= STATUS_S:
            self.entry(cell)["nodes"] = dict(nodes())
            self.write()

    def replaced(self, host: str, by: str | None, cell: Cell, error: Mapping[str, Any]) -> None:
        """Record that a node was given up (`by`: its spare, if any); written with the next state."""
        self.status["replaced"].append(
            {
                "host": host,
                "by": by,
                "cell": cell.id,
                "kind": error["kind"],
                "reason": error["message"],
                "at": now(),
            }
        )

    def exit_at_once(self) -> None:
        """Write final states when the controller exits at once: scheduled jobs may continue, other ranks end."""
        self.status["state"] = "incomplete"
        for entry in self.cells.values():
            if entry["state"] in LIVE_STATES and self._scheduled:
                entry["state"] = "incomplete"
            elif entry["state"] in ("planned", *LIVE_STATES):
                entry["state"] = "cancelled"
        self.write()

    # --- records ------------------------------------------------------------------------------------

    def collect(self, plan: Plan, cell: Cell) -> None:
        """Convert the ranks' files of a cell into records, and write records.jsonl.

        What they have chosen becomes part of the cell's entry in status.json, with its next state.
        """
        base = {
            "run_id": plan.run_id,
            "cell": cell.id,
            "test": cell.test,
            "model": cell.model,
            "num_nodes": cell.num_nodes,
            "world_size": cell.world_size,
            "repeat": cell.repeat,
        }
        self._records = [record for record in self._records if record.cell != cell.id]
        used = self.entry(cell)["used"] = {}
        for host in cell.hosts:
            for path in self.run.cell(host, cell.id).all_events():
                events = list(records.parse_jsonl(path.read_text(errors="replace")))
                self._records.extend(records.from_events(events, base, host))
                used.update(records.used(events))
        write_text_atomic(self.run.records, "".join(f"{record.to_json()}\n" for record in self._records))


class Streams:
    """Writes the received lines of one cell's files to benchmark.log, and for nodes that keep their files to a copy
    here, so that the output of a dying node is kept even if nothing can be gathered from it.
    """

    def __init__(self, journal: Journal, cell: Cell, alias: Mapping[str, str], kept_from: set[str]) -> None:
        """`alias`: name -> alias of each node. `kept_from`: the nodes whose files are not on this machine."""
        self._journal, self._cell, self._alias, self._kept_from = journal, cell, alias, kept_from
        self._files: dict[tuple[str, str], TextIO] = {}

    def line(self, host: str, file: str, line: str) -> None:
        """Write one line of `file` on `host`; events are not logged."""
        if host in self._kept_from:
            self._file(host, file).write(line + "\n")
        if not holds_events(file):
            self._journal.log(f"{self._cell.id} {self._alias.get(host, host)} {file}: {line}")

    def _file(self, host: str, file: str) -> TextIO:
        if (host, file) not in self._files:
            folder = self._journal.run.cell(host, self._cell.id)
            folder.create()
            self._files[host, file] = open(folder.path / Path(file).name, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        return self._files[host, file]

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
