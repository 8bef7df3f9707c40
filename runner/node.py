"""`python -m runner.node`: the product's one process on a node, started once per cell by any backend.

It reads one JSON request from stdin, does it, and answers with one JSON message a line on stdout.
After the request, stdin is a leash: empty lines are heartbeats, `stop` asks for an orderly end, and
end-of-file or silence means that the controller is gone. However it ends, no process of the cell
survives it, and `outcome.json` is written last.

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

from runner import __version__, facts, process
from runner.rundir import write_json_atomic

TICK_S = 0.1
ALIVE_S = 5.0
LAST_LINES = 20
PLAIN = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "PATH", "TMPDIR", "SSH_AUTH_SOCK")


def main() -> int:
    request = json.loads(sys.stdin.buffer.readline() or b"{}")
    kind = request.get("kind")
    if kind == "check":
        _say("check", **check(request))
        return 0
    if kind == "cell":
        return Cell(request).run()
    if kind == "sweep":
        process.stop_marked(request["marker"], request["grace_s"])
        _say("sweep")
        return 0
    if kind == "clean":
        _say("clean", removed=clean(Path(request["scratch"]), request["run_id"]))
        return 0
    print(f"runner.node: unknown request {kind!r}", file=sys.stderr)
    return 2


def _say(kind: str, **fields: Any) -> None:
    # A torn pipe means that the controller is gone; the leash tells that, this write need not.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(json.dumps({"message": kind, **fields}).encode() + b"\n")
        sys.stdout.buffer.flush()


# --- check ----------------------------------------------------------------------------------------


def check(request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that would stop a cell on this node, found before anything starts.

    Request: scratch, min_free_disk_gib, packages (names that must be installed), programs.
    """
    problems = []
    scratch = Path(request["scratch"])
    try:
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = scratch / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        problems.append(f"cannot write to {scratch}: {error.strerror}")
    else:
        free_gib = shutil.disk_usage(scratch).free / 2**30
        if free_gib < request["min_free_disk_gib"]:
            problems.append(f"{free_gib:.1f} GiB free in {scratch}, {request['min_free_disk_gib']:g} GiB wanted")
        holder = _lock_holder(scratch)
        if holder:
            problems.append(f"in use by run {holder}")
    missing = [name for name in request["packages"] if facts.version_of(name) is None]
    if missing:
        problems.append(f"environment {sys.prefix} lacks {', '.join(missing)}")
    missing = [name for name in request["programs"] if shutil.which(name) is None]
    if missing:
        problems.append(f"lacks {', '.join(missing)}")
    if request["version"] != __version__:
        problems.append(f"has shakedown {__version__}, this controller is {request['version']}")
    if request["gpus"]:  # None where the inventory leaves the number open
        answering = len(facts.gpus()["gpus"])
        if answering < request["gpus"]:
            problems.append(f"{answering} GPUs answer, the inventory says {request['gpus']}")
    return {"problems": problems}


def _lock_holder(scratch: Path) -> str | None:
    """The run that holds this node's lock, or None."""
    try:
        with open(scratch / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except FileNotFoundError:
        pass
    return None


def clean(scratch: Path, run_id: str) -> bool:
    """Remove what a run left in this node's scratch folder; its artefacts have been gathered."""
    folder = scratch / run_id
    if folder.parent != scratch or not folder.is_dir():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


# --- one cell -------------------------------------------------------------------------------------


class Leash:
    """The controller's end of stdin: says when to stop and why."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._heard = time.monotonic()
        self._buffer = b""
        self.reason: str | None = None
        self.go = False

    def read(self) -> None:
        data = os.read(0, 65536)
        self._heard = time.monotonic()
        if not data:
            self.reason = self.reason or "controller gone"
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if line.strip() == b"go":
                self.go = True
            elif line.strip():  # an empty line is a heartbeat
                self.reason = self.reason or line.decode(errors="replace").strip()

    def tick(self) -> None:
        if time.monotonic() - self._heard > self._silence_s:
            self.reason = self.reason or f"no word from the controller for {self._silence_s:g} s"


class Tail:
    """New whole lines of the files that match a pattern in one folder, as they grow."""

    def __init__(self, folder: Path, patterns: tuple[str, ...]) -> None:
        self._folder, self._patterns = folder, patterns
        self._offsets: dict[Path, int] = {}

    def lines(self, last: bool = False) -> Iterator[tuple[str, str]]:
        """(file name, line) pairs; an unfinished line waits for its end, unless this is the `last` call."""
        for pattern in self._patterns:
            for path in sorted(self._folder.glob(pattern)):
                with open(path, "rb") as file:
                    file.seek(self._offsets.get(path, 0))
                    data = file.read()
                whole = data if last else data[: data.rfind(b"\n") + 1]
                self._offsets[path] = self._offsets.get(path, 0) + len(whole)
                for line in whole.decode(errors="replace").splitlines():
                    yield path.name, line


class Cell:
    """Runs one cell's engine process on this node and reports how it ended.

    Without `argv` the ranks of this node are started by someone else's launcher (DeepSpeed's, over
    pdsh): then the processes that carry the cell's marker are watched and ended instead.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request
        self.folder = Path(request["cell_dir"])
        self.marker: str = request["marker"]
        self.env: dict[str, str] = dict(request["env"])
        self.leash = Leash(request["heartbeat_timeout_s"])
        self.tail = Tail(self.folder, ("rank*.jsonl", "rank*.stdout", "rank*.stderr"))
        self.error: str | None = None

    def run(self) -> int:
        with contextlib.suppress(PermissionError):
            os.setsid()  # a Ctrl-C in the controller's terminal reaches the controller alone
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._on_signal)
        started = time.time()
        rc: int | None = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                if self.request.get("job"):
                    write_json_atomic(self.folder / "job.json", self.request["job"])
                write_json_atomic(self.folder / "facts.json", facts.collect(self.env))
                try:
                    rc = self._launch()
                finally:
                    process.stop_marked(self.marker, self.request["grace_s"])
        except OSError as error:
            full = error.errno == errno.ENOSPC
            self.error = f"disk full: {self.folder}" if full else f"{error.strerror}: {error.filename or self.folder}"
        except _Refused as error:
            self.error = str(error)
        outcome = {
            "schema": 1,
            "host": self.request["host"],
            "rc": rc,
            "stopped": self.leash.reason,
            "error": self.error,
            "started_s": started,
            "ended_s": time.time(),
            "ranks": self._ranks(),
            "engine_stderr": _last_lines(self.folder / "engine.stderr"),
        }
        for name, line in self.tail.lines(last=True):
            _say("line", file=name, line=line)
        with contextlib.suppress(OSError):  # on a full disk the message below still tells
            write_json_atomic(self.folder / "outcome.json", outcome)
        _say("outcome", **outcome)
        return 0 if rc == 0 and self.error is None else 1

    def _on_signal(self, number: int, _frame: object) -> None:
        self.leash.reason = self.leash.reason or signal.Signals(number).name

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
                raise _Refused(f"in use by run {file.read().strip() or 'unknown'}") from None
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
            _say("started", pid=None)
            return self._watch(None)
        # A launcher passes its folder and part of its environment on to remote shells, so it gets a
        # plain one of each; ranks start in the cell's folder with the node's environment.
        isolated = self.request.get("isolated", False)
        kept = {k: v for k, v in os.environ.items() if not isolated or k in PLAIN}
        env = {**kept, **self.env, process.MARKER: self.marker, **self.request.get("secrets", {})}
        env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
        child = process.spawn(argv, env=env, cwd="/" if isolated else str(self.folder))
        if child.stdin:
            child.stdin.close()
        _say("started", pid=child.pid)
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
        from runner.telemetry import Sampler

        sampler, next_sample, next_alive = Sampler(), 0.0, 0.0
        adopted = _Adopted(self.marker, self) if child is None else None
        with (
            selectors.DefaultSelector() as selector,
            open(self.folder / "telemetry.jsonl", "a", buffering=1) as stream,
            open(self.folder / "engine.stdout", "ab", buffering=0) as out,
            open(self.folder / "engine.stderr", "ab", buffering=0) as err,
        ):
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
                    elif not _copy(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
                self.leash.tick()
                for name, line in self.tail.lines():
                    _say("line", file=name, line=line)
                if time.monotonic() >= next_alive:
                    _say("alive")
                    next_alive = time.monotonic() + ALIVE_S
                if time.monotonic() >= next_sample:
                    stream.write(json.dumps(sampler.sample()) + "\n")
                    next_sample = time.monotonic() + self.request["telemetry_interval_s"]
                if self.leash.reason:
                    process.stop_marked(self.marker, self.request["grace_s"])
                    if child is not None:
                        process.stop_group(child, self.request["grace_s"])
                        _drain(child, out, err)
                        return child.returncode
                    return 0 if self.leash.reason == "done" and self._all_ended() else None
                if child is not None and child.poll() is not None:
                    _drain(child, out, err)
                    return child.returncode
                if adopted is not None and adopted.gone():
                    return 0 if self._all_ended() else None  # nobody here saw their status

    def _ranks(self) -> dict[str, dict[str, Any]]:
        """What each rank's file says: whether it started and ended, and its last lines of stderr if not."""
        ranks = {}
        for path in sorted(self.folder.glob("rank*.jsonl")):
            events = [line.partition('"event": "')[2].partition('"')[0] for line in path.open(errors="replace")]
            ended = "end" in events
            tail = [] if ended else _last_lines(path.with_suffix(".stderr"))
            ranks[path.stem] = {"started": "start" in events, "ended": ended, "stderr": tail}
        return ranks

    def _all_ended(self) -> bool:
        ranks = self._ranks()
        return bool(ranks) and all(rank["ended"] for rank in ranks.values())


class _Refused(Exception):
    """The cell cannot start here; the message says why."""


class _Adopted:
    """Whether the processes that another launcher started here have come and gone."""

    def __init__(self, marker: str, cell: Cell) -> None:
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
            raise _Refused(f"port {port} for the rendezvous is taken by another process") from None


def _copy(pipe: Any, file: Any) -> bool:
    """Move what the pipe holds to the file and the controller; False at its end."""
    try:
        data = pipe.read(65536)
    except BlockingIOError:
        return True
    if data is None:
        return True
    if not data:
        return False
    file.write(data)
    name = Path(file.name).name
    for line in data.decode(errors="replace").splitlines():
        _say("line", file=name, line=line)
    return True


def _drain(child: subprocess.Popen[bytes], out: Any, err: Any) -> None:
    for pipe, file in ((child.stdout, out), (child.stderr, err)):
        if pipe is not None:
            while pipe.readable() and (data := pipe.read(65536)):
                file.write(data)


def _last_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main())
