"""One cell on a node: starts the engine, watches and samples it, and ends it with everything that it started.

After the request, stdin is a leash: empty lines are heartbeats, `stop` ends the cell, and end-of-file or
no input means that the controller is gone. However the cell ends, none of its processes survives it, and
`outcome.json` is written last.

Under Slurm (`srun` starts it) the job is the leash, so the cell continues without a controller: signals end
it, and messages go to a file in the cell's folder, where a controller reads them when it can.

Only the standard library and small packages are imported here: this is on the path to the first step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from runner.cluster import facts, modules
from runner.errors import InfrastructureError
from runner.node import engine, gate, kernel, leftovers, ranks
from runner.node.leash import Leash
from runner.node.output import Tail, copy, last_lines, send_message
from runner.node.protocol import ALIVE_S, POLL_S, SLURM_WORDS, Alive, Fault, Outcome, RankStack, Started
from runner.node.requests import CellRequest
from runner.results.celldir import CellDir
from runner.system import process
from runner.system.files import write_json_atomic


class NodeCell:
    """Runs one node's part of a cell and reports how it ended.

    In this order: prepare (check and lock the node, empty the folder, write job and facts); a launcher then waits for
    the word "go"; start the engine; watch it until the ranks end or the leash gives a reason to end them; report.
    """

    def __init__(self, request: CellRequest, early: bytes = b"") -> None:
        """`early` are words that came together with the request."""
        self.request = request
        self.folder = CellDir(Path(request.cell_dir))
        self.leash = Leash.of(request)
        self.leash.receive(early)
        self.tail = Tail(self.folder.path, CellDir.RANK_FILES)
        self.stacks: Mapping[str, RankStack] = {}  # where ranks were when that was asked for

    def run(self) -> int:
        """Run the cell to its end, whatever that is; returns the agent's exit status."""
        self._take_signals()
        started_s, began, oom_kills = time.time(), time.monotonic(), process.oom_kills()
        rc: int | None = None
        fault: Fault | None = None
        try:
            self.folder.create()
            gate.require_good_node(self.request)
            with gate.locked(self.request):
                self._prepare()
                try:
                    with gate.linked(self.request):
                        rc = self._carry_out()
                finally:
                    leftovers.remove(self.request.marker, self.request.grace_s)
                    self._record_nccl()
        except (OSError, gate.Refused, InfrastructureError) as failure:
            fault = self._explained(failure)
        else:
            fault = self._told()
        outcome = Outcome(
            host=self.request.host,
            attempt=self.request.attempt,
            rc=rc,
            stopped=self.leash.reason,
            error=fault.message if fault else None,
            kind=fault.kind if fault else None,
            accused=fault.host if fault else None,
            oom_kills=process.oom_kills() - oom_kills,
            stacks=self.stacks,
            started_s=started_s,
            ended_s=time.time(),
            ranks=ranks.ends(self.folder),
            engine_stderr=last_lines(self.folder.engine_stderr),
            kernel=kernel.gpu_errors(began) if rc != 0 else (),
        )
        self._report(outcome)
        return 0 if outcome.ended_well else 1

    def _take_signals(self) -> None:
        words = SLURM_WORDS if self.request.under_slurm else {}
        if not self.request.under_slurm:  # Slurm finds what it started by sessions, on some clusters
            with contextlib.suppress(PermissionError):
                os.setsid()  # a Ctrl-C in the controller's terminal reaches the controller alone

        def on_signal(number: int, _frame: object) -> None:
            name = signal.Signals(number)
            self.leash.take(words.get(name) or name.name)

        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, *words):
            signal.signal(number, on_signal)

    def _prepare(self) -> None:
        """Write the job that ranks read and this node's facts; raises Refused if its environment has changed."""
        if self.request.scratch is not None:
            gate.empty(self.folder)
        if self.request.job:
            write_json_atomic(self.folder.job, self.request.job)
        observed = facts.collect(dict(self.request.env))
        if self.request.modules:
            observed["modules"] = list(modules.load(tuple(self.request.modules)).names)
        write_json_atomic(self.folder.facts, observed)
        gate.require_environment(self.request, observed)

    def _record_nccl(self) -> None:
        """Replace the NCCL in this node's facts by the one that its ranks have loaded."""
        observed = json.loads(self.folder.facts.read_text())
        if versions := ranks.nccl_versions(self.folder):
            write_json_atomic(self.folder.facts, {**observed, "nccl": " and ".join(versions)})

    def _carry_out(self) -> int | None:
        """Start the ranks and wait for their end; returns the engine's exit status, None if it is not known."""
        if self.request.rendezvous_port:
            gate.require_free(self.request.rendezvous_port)
        if self.request.hold and not self._wait_for_go():
            return None
        with engine.started(self.request, self.folder) as runs, open(self.folder.telemetry, "a", buffering=1) as stream:
            send_message(Started(runs.pid))
            self._watch(runs, stream)
            if self.leash.reason:
                process.stop_marked(self.request.marker, self.request.grace_s)
                runs.stop()
            return runs.status(self.leash.reason)

    def _wait_for_go(self) -> bool:
        """Wait until every node has its job file. Returns False if there is a reason not to start."""
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            while not (self.leash.go or self.leash.reason):
                if selector.select(POLL_S):
                    self.leash.read()
                self.leash.tick()
        return self.leash.go

    def _watch(self, runs: engine.Engine, telemetry: TextIO) -> None:
        """Stream and sample until the ranks end or the leash gives a reason to end them."""
        from runner.node.sampler import Sampler

        sampler, next_sample, next_alive = Sampler(), 0.0, 0.0
        stacks: ranks.Stacks | None = None
        held = bool((self.request.job or {}).get("held"))
        with selectors.DefaultSelector() as selector:
            if self.leash.stdin:
                selector.register(0, selectors.EVENT_READ, None)
            engine.register(runs, selector)
            while True:
                self._read(selector)
                self.leash.tick()
                if held and self.leash.go:
                    self.folder.go.touch()
                    held = False
                self.tail.pass_on()
                if time.monotonic() >= next_alive:
                    send_message(Alive())
                    next_alive = time.monotonic() + ALIVE_S
                if time.monotonic() >= next_sample:
                    telemetry.write(json.dumps(sampler.sample()) + "\n")
                    next_sample = time.monotonic() + self.request.telemetry_interval_s
                if self.leash.stacks and stacks is None:
                    stacks = ranks.Stacks(self.folder, self.request.marker)
                if stacks is not None and not self.stacks and stacks.due():
                    self.stacks = stacks.read()
                if self.leash.reason or runs.ended():
                    return

    def _read(self, selector: selectors.BaseSelector) -> None:
        """Read what the controller and the engine have written, waiting at most POLL_S."""
        for key, _ in selector.select(POLL_S):
            if key.data is None:
                if not self.leash.read():
                    selector.unregister(0)
            elif not copy(key.fileobj, key.data):
                selector.unregister(key.fileobj)

    def _explained(self, failure: Exception) -> Fault:
        """Why the cell could not be run here."""
        if isinstance(failure, gate.Refused):
            return Fault(failure.kind, str(failure))
        if isinstance(failure, OSError):
            if failure.errno == errno.ENOSPC:
                return Fault("disk_full", f"disk full: {self.folder.path}")
            return Fault("unknown", f"{failure.strerror}: {failure.filename or self.folder.path}")
        return Fault(getattr(failure, "kind", None) or "environment_missing", str(failure))  # its program was not found

    def _told(self) -> Fault | None:
        """Why the engine gave up, if it says so; None where the agent has ended it."""
        if self.leash.reason or not self.folder.fault.exists():
            return None
        return Fault.from_json(json.loads(self.folder.fault.read_text()))

    def _report(self, outcome: Outcome) -> None:
        self.tail.pass_on(last=True)
        with contextlib.suppress(OSError):  # on a full disk the message below is still sent
            write_json_atomic(self.folder.outcome, outcome.to_file())
        send_message(outcome)
