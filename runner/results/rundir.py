"""The run directory: the only module that knows the paths inside it, and how they are written.

Every file is written under a temporary name and renamed; directories are private (0700). A run that
has no end marker (a final state in status.json) is incomplete, never zero.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from runner.errors import InfrastructureError, UsageError
from runner.results import records
from runner.results.celldir import LAUNCHER, CellDir
from runner.results.status import FINAL_STATES, LIVE_STATES, cell_status
from runner.system.files import disk_errors, write_json_atomic, write_text_atomic

PULSE_S = 5.0  # a controller shows that often that it lives: not every file system tells another machine of a lock
PULSES_S = 3 * PULSE_S  # who has shown nothing for so long is dead


class NameTaken(InfrastructureError):
    """Another run has the name already."""


class RunDir:
    """Paths and states of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.json"
        self.status = path / "status.json"
        self.log = path / "benchmark.log"
        self.records = path / "records.jsonl"
        self.summary = path / "summary.json"
        self.report_html = path / "report.html"
        self.report_md = path / "report.md"
        self.telemetry = path / "telemetry" / "telemetry.parquet"
        self._alive = path / ".alive"

    @property
    def run_id(self) -> str:
        return self.path.name

    def cell(self, host: str, cell: str) -> CellDir:
        """The artefacts of one cell on one host."""
        return CellDir(self.path / "nodes" / host / cell)

    def launcher(self, cell: str) -> CellDir:
        """The artefacts of a launcher that runs on the controller (DeepSpeed's)."""
        return CellDir(self.path / LAUNCHER / cell)

    def earlier(self, cell: str, attempt: int) -> Path:
        """The artefacts of an attempt at a cell that was given up, below them one folder for each host."""
        return self.path / "attempts" / f"{cell}.{attempt}"

    def slurm(self, name: str) -> Path:
        """The sbatch file of a job; its log lies beside it."""
        return self.path / "slurm" / f"{name}.sbatch"

    def set_aside(self, cell: str, attempt: int) -> None:
        """Move what an attempt at a cell left out of the way of the next one. Nothing is deleted."""
        target = self.earlier(cell, attempt)
        left = {folder.parent.name: folder for folder in sorted(self.path.glob(f"nodes/*/{cell}"))}
        if (launcher := self.launcher(cell).path).is_dir():
            left[LAUNCHER] = launcher
        for name, folder in left.items():
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            place = target / name
            while place.exists():  # a controller that died here had moved it, and it was gathered once more
                place = place.with_name(f"{place.name}~")
            folder.rename(place)

    def read_outcomes(self, hosts: Iterable[str], cell: str) -> dict[str, dict[str, Any]]:
        """The outcome (as node.protocol.Outcome is written) of every host that wrote a whole one."""
        outcomes = {}
        for host in hosts:
            with contextlib.suppress(OSError, ValueError):
                outcomes[host] = json.loads(self.cell(host, cell).outcome.read_text())
        return outcomes

    def read_placement(self, cell: str, job_id: str | None) -> list[str]:
        """The hosts of a cell in rank order, as its agents in that job of Slurm's told; none where none has told it."""
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
        """Keep how the nodes were reached, pinned host keys included, for what is done to them later."""
        pinned = ssh_config.with_name("known_hosts")
        kept = self.path / pinned.name
        write_text_atomic(kept, pinned.read_text())
        write_text_atomic(self.path / "ssh_config", ssh_config.read_text().replace(str(pinned), str(kept)))

    @classmethod
    def create(cls, results: Path, plan: Mapping[str, Any]) -> Self:
        """Make the directory, save the plan, and point `latest` at it: all of it, or nothing is left.

        Raises NameTaken where the name of the run is taken, InfrastructureError where the disk does not take it.
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
        """Make the directory, empty; raises NameTaken where there is one."""
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            raise NameTaken(f"a run {self.run_id} is in {self.path.parent} already") from None

    def become_latest(self) -> None:
        """Point `latest` at this run, in one step: another run may do the same at the same time."""
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
        """The named run (id, unique beginning of one, or path), or the newest."""
        wanted = name or "latest"
        direct = Path(wanted) if "/" in wanted else results / wanted
        if (direct / "plan.json").is_file():
            return cls(direct.resolve())
        matches = [run.path for run in cls.all(results) if run.run_id.startswith(wanted)] if name else []
        if len(matches) == 1:
            return cls(matches[0].resolve())
        if matches:
            raise UsageError(f"run {name!r} is not unique in {results}: {', '.join(p.name for p in matches[:5])}")
        raise UsageError(
            f"no run {name!r} in {results}" if name else f"no run in {results} yet: start one with `runner bench`"
        )

    @classmethod
    def all(cls, results: Path) -> list[RunDir]:
        """Every run of a results directory, oldest first."""
        return [cls(p.parent) for p in sorted(results.glob("*/plan.json")) if not p.parent.is_symlink()]

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Hold the mark of a running controller; the kernel drops it when the controller dies.

        Raises UsageError where another one holds it.
        """
        with disk_errors(self.path):
            file = open(self._alive, "a")  # noqa: SIM115
        with file:
            for left in reversed(range(20)):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # somebody who only looks has it for a moment
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
                    file.truncate(0)  # and not removed: who waits for its lock would have one that nobody sees

    def _pulse(self, over: threading.Event) -> None:
        while not over.wait(PULSE_S):
            with contextlib.suppress(OSError):
                os.utime(self._alive)

    def controller(self) -> int | None:
        """The process id of the controller that runs this now, or None."""
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
        """Machine and process of a controller that is not on this machine and wrote no final state; else None."""
        try:
            written = json.loads(self.status.read_text())  # as written: a lock may tell nothing of another machine
        except (OSError, ValueError):
            return None
        controller = written.get("controller")
        if not controller or written.get("state") in FINAL_STATES or controller["host"] == socket.gethostname():
            return None
        return f"{controller['host']} (process {controller['pid']})"

    def beats(self, within_s: float = PULSES_S) -> bool:
        """Whether a controller, on whatever machine, shows within that time that it lives."""

        def touched() -> int:
            with open(self._alive) as file:  # opened each time: NFS looks anew only then
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

    def read_plan(self) -> dict[str, Any]:
        return self._read(self.plan, "run_id", "cells", "nodes")

    def read_status(self) -> dict[str, Any]:
        """The states; a run whose controller died without a final state is `incomplete`, and so are its cells.

        To whoever holds the mark itself, what is written there is a dead one's.
        """
        status = self._read(self.status, "state", "cells")
        if status["state"] not in FINAL_STATES and self.controller() in (None, os.getpid()):
            status["state"] = "incomplete"
            for cell in status["cells"].values():
                if cell["state"] in LIVE_STATES:
                    cell["state"] = "incomplete"
        status.setdefault("replaced", [])  # runs of earlier versions have neither this nor all keys of a cell
        status["cells"] = {name: cell_status(1) | cell for name, cell in status["cells"].items()}
        return status

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_json_atomic(self.plan, json.loads(json.dumps(plan)))

    def read_records(self) -> list[records.Record]:
        return records.load(self.records.read_text(errors="replace")) if self.records.exists() else []

    def write_status(self, status: Mapping[str, Any]) -> None:
        write_json_atomic(self.status, status)

    def write_end(self, state: str, error: Mapping[str, Any]) -> None:
        """Write that `error` ended the run: in `state`, unless its cells have given it a final one already.

        A run that leaves cells in the middle is incomplete, and so are they. Raises UsageError where status.json cannot
        be read, OSError where it cannot be written.
        """
        written = self._read(self.status, "state", "cells")
        live = [cell for cell in written["cells"].values() if cell["state"] in LIVE_STATES]
        for cell in live:
            cell["state"] = "incomplete"
        if written["state"] not in FINAL_STATES:
            written["state"] = "incomplete" if live else state
        self.write_status(written | {"error": dict(error)})

    def read_facts(self, plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Facts by cell and host; a host that wrote none, or not all of it, is left out."""
        facts: dict[str, dict[str, Any]] = {}
        for cell in plan["cells"]:
            for host in cell["hosts"]:
                path = self.cell(host, cell["id"]).facts
                with contextlib.suppress(OSError, ValueError):  # a node that died while writing
                    facts.setdefault(cell["id"], {})[host] = json.loads(path.read_text())
        return facts

    def telemetry_streams(self, plan: Mapping[str, Any]) -> dict[tuple[str, str], Path]:
        """The append-only telemetry stream of every (cell, host)."""
        return {
            (cell["id"], host): self.cell(host, cell["id"]).telemetry
            for cell in plan["cells"]
            for host in cell["hosts"]
        }
