"""One cell on a node: its engine process started, watched, sampled, and ended with everything that it started.

After the request, stdin is a leash: empty lines are heartbeats, `stop` asks for an orderly end, and
end-of-file or silence means that the controller is gone. However it ends, no process of the cell
survives it, and `outcome.json` is written last.

Under Slurm (`srun` starts it) the job is the leash, so it runs on without a controller: signals ask for the
end, and messages go to `messages.jsonl` in the cell's folder, where a controller reads them when it can.

Only the standard library and small packages are imported here: this is on the path to the first step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.cluster import facts
from runner.errors import InfrastructureError
from runner.node.check import check
from runner.node.leash import JobLeash, Leash
from runner.node.output import Tail, copy, drain, last_lines, say
from runner.node.stacks import Stacks
from runner.results.celldir import MESSAGES
from runner.system import process
from runner.system.files import write_json_atomic

TICK_S = 0.1
ALIVE_S = 5.0
# What Slurm's signals ask for. It sends them to every process of a step: scancel's own TERM ends ranks at once,
# so the controller says "stop" by one that ranks ignore, and they are interrupted as without Slurm.
SLURM_WORDS: dict[int, str] = {
    signal.SIGUSR1: "time limit",
    signal.SIGUSR2: "stop",
    signal.SIGTERM: "stop",
    process.STACKS: "stacks",
}
PLAIN = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "PATH", "TMPDIR", "SSH_AUTH_SOCK")


# --- check ----------------------------------------------------------------------------------------


# --- one cell -------------------------------------------------------------------------------------


class NodeCell:
    """Runs one cell's engine process on this node and reports how it ended.

    Without `argv` the ranks of this node are started by someone else's launcher (DeepSpeed's, over
    pdsh): then the processes that carry the cell's marker are watched and ended instead.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request
        self.folder = Path(request["cell_dir"])
        self.marker: str = request["marker"]
        self.env: dict[str, str] = dict(request["env"])
        slurm = bool(request.get("slurm"))
        self.leash = JobLeash(request["timeout_s"]) if slurm else Leash(request["heartbeat_timeout_s"])
        self.words = SLURM_WORDS if slurm else {}
        self.tail = Tail(self.folder, ("rank*.jsonl", "rank*.stdout", "rank*.stderr"))
        self.error: str | None = None
        self.error_kind: str | None = None
        self.standing: dict[str, dict[str, Any]] = {}

    def run(self) -> int:
        if not self.request.get("slurm"):  # Slurm finds what it started by sessions, on some clusters
            with contextlib.suppress(PermissionError):
                os.setsid()  # a Ctrl-C in the controller's terminal reaches the controller alone
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, *self.words):
            signal.signal(number, self._on_signal)
        started = time.time()
        rc: int | None = None
        oom_kills = process.oom_kills()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = check(self.request["check"]) if self.request.get("check") else {}
            if found.get("problems"):
                raise _Refused("; ".join(found["problems"]), found["kinds"][0])
            with self._locked():
                if self.request["scratch"] is not None:
                    _empty(self.folder)
                if self.request.get("job"):
                    write_json_atomic(self.folder / "job.json", self.request["job"])
                observed = facts.collect(self.env)
                write_json_atomic(self.folder / "facts.json", observed)
                self._refuse_drift(observed)
                try:
                    rc = self._launch()
                finally:
                    process.stop_marked(self.marker, self.request["grace_s"])
        except OSError as error:
            full = error.errno == errno.ENOSPC
            self.error_kind = "disk_full" if full else "unknown"
            self.error = f"disk full: {self.folder}" if full else f"{error.strerror}: {error.filename or self.folder}"
        except _Refused as error:
            self.error, self.error_kind = str(error), error.kind
        except InfrastructureError as error:  # its engine is not there
            self.error, self.error_kind = str(error), "environment_missing"
        outcome = {
            "schema": 1,
            "host": self.request["host"],
            "attempt": self.request.get("attempt", 1),  # a job that waits may be of an earlier version
            "rc": rc,
            "stopped": self.leash.reason,
            "error": self.error,
            "kind": self.error_kind,
            "oom_kills": process.oom_kills() - oom_kills,
            "stacks": self.standing,
            "started_s": started,
            "ended_s": time.time(),
            "ranks": self._ranks(),
            "engine_stderr": last_lines(self.folder / "engine.stderr"),
        }
        for name, line in self.tail.lines(last=True):
            say("line", file=name, line=line)
        with contextlib.suppress(OSError):  # on a full disk the message below still tells
            write_json_atomic(self.folder / "outcome.json", outcome)
        say("outcome", **outcome)
        return 0 if rc == 0 and self.error is None else 1

    def _on_signal(self, number: int, _frame: object) -> None:
        word = self.words.get(number) or signal.Signals(number).name
        if word == "stacks":
            self.leash.stacks = True
        else:
            self.leash.reason = self.leash.reason or word

    def _refuse_drift(self, observed: Mapping[str, Any]) -> None:
        """A cell that is to be compared with what was measured before runs in that environment or not at all."""
        before = self.request.get("environment")
        if before and (changed := facts.changes(before, facts.environment(observed))):
            raise _Refused(f"environment changed: {'; '.join(changed)} (--accept-drift to go on)", "version_mismatch")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One cell at a time on a node; the kernel drops the lock with the process, however it ends."""
        if self.request["scratch"] is None:  # a launcher on the controller, no node of its own
            yield
            return
        scratch = Path(self.request["scratch"])
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(scratch / "lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise _Refused(f"in use by run {file.read().strip() or 'unknown'}", "in_use") from None
            file.truncate(0)
            file.write(self.request["run_id"])
            file.flush()
            yield
            file.truncate(0)

    def _launch(self) -> int | None:
        port = self.request.get("rendezvous_port")
        if port:
            _require_free(port)
        if self.request.get("hold") and not self._wait_for_go():
            return None
        argv = self.request.get("argv")
        if not argv:
            say("started", pid=None)
            return self._watch(None)
        # A launcher passes its folder and part of its environment on to remote shells, so it gets a
        # plain one of each; ranks start in the cell's folder with the node's environment.
        isolated = self.request.get("isolated", False)
        kept = {k: v for k, v in os.environ.items() if not isolated or k in PLAIN}
        env = {**kept, **self.env, process.MARKER: self.marker, **self.request.get("secrets", {})}
        env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
        with _ignored(signal.SIGUSR1, signal.SIGUSR2):
            child = process.spawn(argv, env=env, cwd="/" if isolated else str(self.folder))
        if child.stdin:
            child.stdin.close()
        say("started", pid=child.pid)
        return self._watch(child)

    def _wait_for_go(self) -> bool:
        """A launcher starts when every node has its job file."""
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            while not (self.leash.go or self.leash.reason):
                if selector.select(TICK_S):
                    self.leash.read()
                self.leash.tick()
        return self.leash.go

    def _watch(self, child: subprocess.Popen[bytes] | None) -> int | None:
        """Stream, sample and wait until the ranks end or the leash says stop. Returns the exit status."""
        from runner.node.sampler import Sampler

        sampler, next_sample, next_alive = Sampler(), 0.0, 0.0
        adopted = _Adopted(self.marker, self) if child is None else None
        stacks: Stacks | None = None
        with (
            selectors.DefaultSelector() as selector,
            open(self.folder / "telemetry.jsonl", "a", buffering=1) as stream,
            open(self.folder / "engine.stdout", "ab", buffering=0) as out,
            open(self.folder / "engine.stderr", "ab", buffering=0) as err,
        ):
            if self.leash.stdin:
                selector.register(0, selectors.EVENT_READ, None)
            if child is not None:
                for pipe, file in ((child.stdout, out), (child.stderr, err)):
                    assert pipe is not None
                    os.set_blocking(pipe.fileno(), False)
                    selector.register(pipe, selectors.EVENT_READ, file)
            while True:
                for key, _ in selector.select(TICK_S):
                    if key.data is None:
                        self.leash.read()
                        if self.leash.reason == "controller gone":
                            selector.unregister(0)
                    elif not copy(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
                self.leash.tick()
                for name, line in self.tail.lines():
                    say("line", file=name, line=line)
                if time.monotonic() >= next_alive:
                    say("alive")
                    next_alive = time.monotonic() + ALIVE_S
                if time.monotonic() >= next_sample:
                    stream.write(json.dumps(sampler.sample()) + "\n")
                    next_sample = time.monotonic() + self.request["telemetry_interval_s"]
                if self.leash.stacks and stacks is None:
                    stacks = Stacks(self.folder, self.marker)
                if stacks is not None and not self.standing and stacks.due():
                    self.standing = stacks.read()
                if self.leash.reason:
                    process.stop_marked(self.marker, self.request["grace_s"])
                    if child is not None:
                        process.stop_group(child, self.request["grace_s"])
                        drain(child, out, err)
                        return child.returncode
                    return 0 if self.leash.reason == "done" and self._all_ended() else None
                if child is not None and child.poll() is not None:
                    drain(child, out, err)
                    return child.returncode
                if adopted is not None and adopted.gone():
                    return 0 if self._all_ended() else None  # nobody here saw their status

    def _ranks(self) -> dict[str, dict[str, Any]]:
        """What each rank's file says: whether it started and ended, and its last lines of stderr if not."""
        ranks = {}
        for path in sorted(self.folder.glob("rank*.jsonl")):
            events = [line.partition('"event": "')[2].partition('"')[0] for line in path.open(errors="replace")]
            ended = "end" in events
            tail = [] if ended else last_lines(path.with_suffix(".stderr"))
            ranks[path.stem] = {"started": "start" in events, "ended": ended, "stderr": tail}
        return ranks

    def _all_ended(self) -> bool:
        ranks = self._ranks()
        return bool(ranks) and all(rank["ended"] for rank in ranks.values())


@contextlib.contextmanager
def _ignored(*numbers: int) -> Iterator[None]:
    """A process that is started here ignores these signals, unless it asks for them."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _empty(folder: Path) -> None:
    """Remove what an earlier attempt at the cell left: it was gathered, and must not be taken for this one's."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MESSAGES:
            path.unlink()


class _Refused(Exception):
    """The cell cannot start here: a message that says why, and the kind of failure."""

    def __init__(self, message: str, kind: str = "unknown") -> None:
        super().__init__(message)
        self.kind = kind


class _Adopted:
    """Whether the processes that another launcher started here have come and gone."""

    def __init__(self, marker: str, cell: NodeCell) -> None:
        self._marker, self._seen, self._next, self._cell = marker, False, 0.0, cell

    def gone(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 0.5  # reading every process's environment costs milliseconds
        alive = bool(process.marked(self._marker))
        self._seen = self._seen or alive
        return self._seen and not alive and any(self._cell.folder.glob("rank*.jsonl"))


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise _Refused(f"port {port} for the rendezvous is taken by another process", "port_taken") from None
