"""The run directory: the only module that knows the paths inside it, and how its files are written.

Every file is written under a temporary name and renamed; directories are private (0700). A run without
an end marker (a final state in status.json) is incomplete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from runner.errors import InfrastructureError, UsageError
from runner.results import records
from runner.results.celldir import LAUNCHER, CellDir
from runner.results.status import FINAL_STATES, LIVE_STATES, cell_status
from runner.system.files import disk_errors, write_json_atomic, write_text_atomic

PULSE_S = 5.0  # interval of a controller's signs of life: not every file system shows locks of other machines
PULSES_S = 3 * PULSE_S  # a controller without a sign of life for so long counts as dead


class NameTaken(InfrastructureError):
    """Another run already has the name."""


def new_id() -> str:
    """A name for a run: the time (UTC, to the second) and two random bytes."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)


class RunDir:
    """The paths of one run, and its files read and written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.json"
        self.status = path / "status.json"
        self.log = path / "benchmark.log"
        self.records = path / "records.jsonl"
        self.summary = path / "summary.json"
        self.report_html = path / "report.html"
        self.report_md = path / "report.md"
        self.sync = path / "sync.json"  # the user's folders that were sent
        self.telemetry = path / "telemetry" / "telemetry.parquet"
        self._alive = path / ".alive"

    @property
    def run_id(self) -> str:
        """The name of the run, which is that of its directory."""
        return self.path.name

    def cell(self, host: str, cell: str) -> CellDir:
        """The artefacts of one cell on one host."""
        return CellDir(self.path / "nodes" / host / cell)

    def cells(self) -> list[CellDir]:
        """The artefacts of every cell on every host that were gathered, in the order of their paths."""
        return [CellDir(path) for path in sorted(self.path.glob("nodes/*/*")) if path.is_dir()]

    def launcher(self, cell: str) -> CellDir:
        """The artefacts of a launcher that runs on the controller (DeepSpeed's)."""
        return CellDir(self.path / LAUNCHER / cell)

    def earlier(self, cell: str, attempt: int) -> Path:
        """The folder with the artefacts of an earlier attempt at a cell, one folder in it for each host."""
        return self.path / "attempts" / f"{cell}.{attempt}"

    def slurm(self, name: str) -> Path:
        """The sbatch file of a job; its log is in the same folder."""
        return self.path / "slurm" / f"{name}.sbatch"

    def set_aside(self, cell: str, attempt: int) -> None:
        """Move the artefacts of an attempt at a cell to `earlier`. Nothing is deleted."""
        target = self.earlier(cell, attempt)
        left = {folder.parent.name: folder for folder in sorted(self.path.glob(f"nodes/*/{cell}"))}
        if (launcher := self.launcher(cell).path).is_dir():
            left[LAUNCHER] = launcher
        for name, folder in left.items():
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            place = target / name
            while place.exists():  # a controller that died here had moved it, and it was gathered again
                place = place.with_name(f"{place.name}~")
            folder.rename(place)

    def read_outcomes(self, hosts: Iterable[str], cell: str) -> dict[str, dict[str, Any]]:
        """The outcomes (JSON of node.protocol.Outcome) by host; hosts without a complete one are left out."""
        outcomes = {}
        for host in hosts:
            with contextlib.suppress(OSError, ValueError):
                outcomes[host] = json.loads(self.cell(host, cell).outcome.read_text())
        return outcomes

    def read_placement(self, cell: str, job_id: str | None) -> list[str]:
        """The hosts of a cell in rank order, as its agents in that Slurm job recorded them; empty if none did."""
        for folder in map(CellDir, sorted(self.path.glob(f"nodes/*/{cell}"))):
            with (
                contextlib.suppress(OSError, ValueError, KeyError, TypeError),
                open(folder.messages, encoding="utf-8") as file,
            ):
                placed = json.loads(file.readline())
                if job_id and placed["job"] == job_id:
                    return [str(host) for host in placed["hosts"]]
        return []

    def keep_transport(self, ssh_config: Path) -> None:
        """Copy the ssh_config and its pinned host keys into the directory, for later commands."""
        pinned = ssh_config.with_name("known_hosts")
        kept = self.path / pinned.name
        write_text_atomic(kept, pinned.read_text())
        write_text_atomic(self.path / "ssh_config", ssh_config.read_text().replace(str(pinned), str(kept)))

    @classmethod
    def create(cls, results: Path, plan: Mapping[str, Any]) -> Self:
        """Create the directory, save the plan, and point `latest` at it. If a step fails, nothing is left.

        Raises NameTaken if the name of the run is taken, InfrastructureError if the disk cannot be written.
        """
        run = cls(results / plan["run_id"])
        with disk_errors(results):
            results.mkdir(parents=True, exist_ok=True)
            run.reserve()
            try:
                (run.path / "telemetry").mkdir(mode=0o700)
                controller = {"host": socket.gethostname(), "pid": os.getpid()}
                status = {"schema": 1, "run_id": run.run_id, "state": "planned", "replaced": []}
                cells = {cell["id"]: cell_status(1) for cell in plan["cells"]}
                run.write_status(status | {"cells": cells, "controller": controller})
                run.write_plan(plan)  # a folder with a plan is a run, and can be read
                run.become_latest()
            except BaseException:
                shutil.rmtree(run.path, ignore_errors=True)
                raise
        return run

    def reserve(self) -> None:
        """Create the empty directory; raises NameTaken if it exists."""
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            raise NameTaken(f"a run {self.run_id} is in {self.path.parent} already") from None

    def become_latest(self) -> None:
        """Point `latest` at this run, atomically: another run may do the same at the same time."""
        link = self.path.with_name(f".latest.{self.run_id}")  # no other run has that name
        try:
            link.symlink_to(self.run_id)
            link.replace(self.path.with_name("latest"))
        except OSError:
            with contextlib.suppress(OSError):
                link.unlink()
            raise

    @classmethod
    def find(cls, results: Path, name: str | None) -> RunDir:
        """The named run (id, unique beginning of an id, or path), or the newest one for None.

        Raises UsageError if there is no such run, or more than one.
        """
        if name == "":  # of a variable that is not set, most likely: not the newest, which may be stopped or changed
            raise UsageError("the name of a run is empty: give it, or latest for the newest")
        selected = name or "latest"
        if not name and not (results / "latest" / "plan.json").is_file():  # that run was deleted
            selected = next((run.run_id for run in reversed(cls.all(results))), selected)
        direct = Path(selected) if "/" in selected else results / selected
        if (direct / "plan.json").is_file():
            return cls(direct.resolve())
        matches = [run.path for run in cls.all(results) if run.run_id.startswith(selected)] if name else []
        if len(matches) == 1:
            return cls(matches[0].resolve())
        if matches:
            raise UsageError(f"run {name!r} is not unique in {results}: {', '.join(p.name for p in matches[:5])}")
        raise UsageError(
            f"no run {name!r} in {results}" if name else f"no run in {results} yet: start one with `runner bench`"
        )

    @classmethod
    def all(cls, results: Path) -> list[RunDir]:
        """All runs of a results directory, oldest first."""
        return [cls(p.parent) for p in sorted(results.glob("*/plan.json")) if not p.parent.is_symlink()]

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Hold the lock of a running controller; the kernel releases it when the controller dies.

        Raises UsageError if another controller holds it, InfrastructureError if the disk cannot be written.
        """
        with disk_errors(self.path):
            file = open(self._alive, "a")  # noqa: SIM115
        with file:
            for left in reversed(range(20)):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # a process that only checks holds it for a moment
                    if not left:
                        what = f"run {self.run_id} is running: `runner runs show {self.run_id}` shows it"
                        raise UsageError(what) from None
                    time.sleep(0.05)
            with disk_errors(self.path):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            over = threading.Event()
            pulse = threading.Thread(target=self._pulse, args=(over,), daemon=True)
            pulse.start()
            try:
                yield
            finally:
                over.set()
                pulse.join()
                with contextlib.suppress(OSError):
                    file.truncate(
                        0
                    )  # not removed: a process that waits for its lock would get one that others do not see

    def _pulse(self, over: threading.Event) -> None:
        while not over.wait(PULSE_S):
            with contextlib.suppress(OSError):
                os.utime(self._alive)

    def controller(self) -> int | None:
        """The id of the controller's process on this machine, None if none runs here."""
        try:
            with open(self._alive) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read() or 0) or None  # it has the lock and is about to write its id
        except FileNotFoundError:
            pass
        return None

    def elsewhere(self) -> str | None:
        """Host and process of a controller on another machine that wrote no final state; else None."""
        try:
            written = json.loads(self.status.read_text())  # as written: a lock on another machine may not be visible
        except (OSError, ValueError):
            return None
        controller = written.get("controller")
        if not controller or written.get("state") in FINAL_STATES or controller["host"] == socket.gethostname():
            return None
        return f"{controller['host']} (process {controller['pid']})"

    def beats(self, within_s: float = PULSES_S) -> bool:
        """Whether a controller on any machine shows a sign of life; waits for it up to `within_s`."""

        def touched() -> int:
            with open(self._alive) as file:  # opened each time: NFS refreshes it only then
                return os.fstat(file.fileno()).st_mtime_ns

        deadline = time.monotonic() + within_s
        with contextlib.suppress(OSError):
            before = touched()
            while time.monotonic() < deadline:
                time.sleep(0.2)
                if touched() != before:
                    return True
        return False

    def _read(self, path: Path, *keys: str) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict) or not value.keys() >= set(keys):
            raise UsageError(f"run {self.run_id}: {path} is missing or damaged")
        return value

    def _require_cells(self, cells: Any) -> None:
        """Raise UsageError for a status without cells, or with what is none: nothing says what became of them."""
        if not isinstance(cells, dict) or not cells or not all(isinstance(one, dict) for one in cells.values()):
            raise UsageError(
                f"run {self.run_id}: {self.status} is damaged, its cells are gone: restore it from a copy, or start "
                "another run"
            )

    def read_plan(self) -> dict[str, Any]:
        """The JSON object of plan.json. Raises UsageError if it is missing or damaged."""
        return self._read(self.plan, "run_id", "cells", "nodes")

    @property
    def command(self) -> str:
        """The command of `runner` that resumes this run: `bench`, `launch`, or the one of its workflow."""
        try:
            status = json.loads(self.status.read_text())
        except (OSError, ValueError):  # it was not written yet
            status = {}
        found = status.get("workflow")
        if "launch" in status:
            return "launch"
        return f"workflow {found['name']}" if found else "bench"

    def read_status(self) -> dict[str, Any]:
        """The JSON object of status.json; a run whose controller died without a final state is `incomplete`, and so
        are its running cells.

        If this process holds the lock, the written state is an earlier controller's. Raises UsageError if the file is
        missing or damaged.
        """
        status = self._read(self.status, "state", "cells")
        self._require_cells(status["cells"])
        if status["state"] not in FINAL_STATES and self.controller() in (None, os.getpid()):
            status["state"] = "incomplete"
            for cell in status["cells"].values():
                if cell["state"] in LIVE_STATES:
                    cell["state"] = "incomplete"
        status.setdefault("replaced", [])  # runs of earlier versions have neither this nor all keys of a cell
        status["cells"] = {name: cell_status(1) | cell for name, cell in status["cells"].items()}
        return status

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Write plan.json. Raises OSError if the disk cannot be written."""
        write_json_atomic(self.plan, json.loads(json.dumps(plan)))

    def read_records(self) -> list[records.Record]:
        """The records of all cells; empty if there is no file yet."""
        return records.load(self.records.read_text(errors="replace")) if self.records.exists() else []

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Write status.json. Raises OSError if the disk cannot be written."""
        write_json_atomic(self.status, status)

    def write_end(self, state: str, error: Mapping[str, Any]) -> None:
        """Write that `error` ended the run in `state`, unless it already has a final state.

        A run with cells that still run is incomplete, and so are these. Raises UsageError if status.json cannot be
        read, OSError if it cannot be written.
        """
        written = self._read(self.status, "state", "cells")
        live = [cell for cell in written["cells"].values() if cell["state"] in LIVE_STATES]
        for cell in live:
            cell["state"] = "incomplete"
        if written["state"] not in FINAL_STATES:
            written["state"] = "incomplete" if live else state
        self.write_status(written | {"error": dict(error)})

    def read_facts(self, plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Facts by cell and host; hosts without a complete file are left out."""
        facts: dict[str, dict[str, Any]] = {}
        for cell in plan["cells"]:
            for host in cell["hosts"]:
                path = self.cell(host, cell["id"]).facts
                with contextlib.suppress(OSError, ValueError):  # a node that died while writing
                    facts.setdefault(cell["id"], {})[host] = json.loads(path.read_text())
        return facts

    def telemetry_streams(self, plan: Mapping[str, Any]) -> dict[tuple[str, str], Path]:
        """The telemetry file of every (cell, host), one sample per line."""
        return {
            (cell["id"], host): self.cell(host, cell["id"]).telemetry
            for cell in plan["cells"]
            for host in cell["hosts"]
        }
