"""`python -m runner.node`: the product's one process on a node, started once per cell by any backend.

It reads one JSON request from stdin, does it, and answers with one JSON message a line on stdout.
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
import glob
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import __version__, slurm
from runner.cluster import facts
from runner.cluster import slurm as slurm_settings
from runner.errors import InfrastructureError
from runner.plan.engines.ranks import Ranks
from runner.plan.engines.registry import ENGINES
from runner.results.celldir import MESSAGES
from runner.system import process
from runner.system.files import write_json_atomic

TICK_S = 0.1
ALIVE_S = 5.0
LAST_LINES = 20
# What Slurm's signals ask for. It sends them to every process of a step: scancel's own TERM ends ranks at once,
# so the controller says "stop" by one that ranks ignore, and they are interrupted as without Slurm.
SLURM_WORDS: dict[int, str] = {
    signal.SIGUSR1: "time limit",
    signal.SIGUSR2: "stop",
    signal.SIGTERM: "stop",
    process.STACKS: "stacks",
}
PLAIN = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "PATH", "TMPDIR", "SSH_AUTH_SOCK")


def main() -> int:
    request = _request()
    kind = request.get("kind")
    if kind == "check":
        _say("check", **check(request))
        return 0
    if kind == "cell":
        return _slurm_cell(request) if request.get("slurm") else Cell(request).run()
    if kind == "sweep":
        process.stop_marked(request["marker"], request["grace_s"])
        _say("sweep")
        return 0
    if kind == "clean":
        _say("clean", removed=clean(Path(request["scratch"]), request["run_id"]))
        return 0
    print(f"runner.node: unknown request {kind!r}", file=sys.stderr)
    return 2


def _request() -> dict[str, Any]:
    """One JSON object from stdin: on one line, or indented, when a brace alone at the margin ends it."""
    lines = [sys.stdin.buffer.readline()]
    if lines[0].strip() == b"{":
        for line in sys.stdin.buffer:
            lines.append(line)
            if line.rstrip() == b"}":
                break
    return json.loads(b"".join(lines) or b"{}")


def _say(kind: str, /, **fields: Any) -> None:
    # A torn pipe means that the controller is gone; the leash tells that, this write need not. Under Slurm
    # this is a file, whose full disk the outcome tells.
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(json.dumps({"message": kind, **fields}).encode() + b"\n")
        sys.stdout.buffer.flush()


# --- check ----------------------------------------------------------------------------------------


def check(request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that would stop a cell on this node, found before anything starts.

    Request: scratch, min_free_disk_gib, packages (names that must be installed), programs.
    Answer: problems (one line each), kinds (of the same problems), time_s (this node's clock), facts.
    """
    problems: list[tuple[str, str]] = []
    scratch = Path(request["scratch"])
    try:
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = scratch / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        kind = "disk_full" if error.errno == errno.ENOSPC else "unknown"
        problems.append((kind, f"cannot write to {scratch}: {error.strerror}"))
    else:
        free_gib = shutil.disk_usage(scratch).free / 2**30
        if free_gib < request["min_free_disk_gib"]:
            text = f"{free_gib:.1f} GiB free in {scratch}, {request['min_free_disk_gib']:g} GiB wanted"
            problems.append(("disk_full", text))
        holder = _lock_holder(scratch)
        if holder:
            problems.append(("in_use", f"in use by run {holder}"))
    missing = [name for name in request["packages"] if facts.version_of(name) is None]
    if missing:
        problems.append(("environment_missing", f"environment {sys.prefix} lacks {', '.join(missing)}"))
    missing = [name for name in request["programs"] if shutil.which(name) is None]
    if missing:
        problems.append(("environment_missing", f"lacks {', '.join(missing)}"))
    if request["version"] != __version__:
        text = f"has shakedown {__version__}, this controller is {request['version']}"
        problems.append(("version_mismatch", text))
    observed = facts.collect({})
    if request["gpus"]:  # None where the inventory leaves the number open
        answering = len(observed["gpus"])
        if answering < request["gpus"]:
            text = f"{answering} GPUs answer, the inventory says {request['gpus']}"
            problems.append(("gpu_failed", text))
    return {
        "problems": [text for _, text in problems],
        "kinds": [kind for kind, _ in problems],
        "time_s": time.time(),
        "facts": observed,
    }


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
    """Remove what a run and its Slurm jobs left on this node; its artefacts have been gathered."""
    folder = scratch / run_id
    if not run_id or folder.parent != scratch:
        return False
    for log in Path(slurm_settings.LOGS).glob(f"{slurm_settings.NAME}-{glob.escape(run_id)}-*.log*"):
        with contextlib.suppress(OSError):
            log.unlink()
    if not folder.is_dir():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


# --- one cell -------------------------------------------------------------------------------------


class Leash:
    """The controller's end of stdin: says when to stop and why."""

    stdin = True

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._heard = time.monotonic()
        self._buffer = b""
        self.reason: str | None = None
        self.go = False
        self.stacks = False

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
            elif line.strip() == b"stacks":
                self.stacks = True
            elif line.strip():  # an empty line is a heartbeat
                self.reason = self.reason or line.decode(errors="replace").strip()

    def tick(self) -> None:
        if time.monotonic() - self._heard > self._silence_s:
            self.reason = self.reason or f"no word from the controller for {self._silence_s:g} s"


class JobLeash(Leash):
    """Under Slurm nobody holds stdin: a cell runs until it ends, is signalled, or has had its time."""

    stdin = False

    def tick(self) -> None:
        ran_s = time.monotonic() - self._heard
        self.stacks = self.stacks or ran_s > self._silence_s - 2 * _Stacks.ANSWER_S
        if ran_s > self._silence_s:
            self.reason = self.reason or "timed out"


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
            "engine_stderr": _last_lines(self.folder / "engine.stderr"),
        }
        for name, line in self.tail.lines(last=True):
            _say("line", file=name, line=line)
        with contextlib.suppress(OSError):  # on a full disk the message below still tells
            write_json_atomic(self.folder / "outcome.json", outcome)
        _say("outcome", **outcome)
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
            _say("started", pid=None)
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
        stacks: _Stacks | None = None
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
                if self.leash.stacks and stacks is None:
                    stacks = _Stacks(self.folder, self.marker)
                if stacks is not None and not self.standing and stacks.due():
                    self.standing = stacks.read()
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


def _slurm_cell(request: Mapping[str, Any]) -> int:
    """One cell under Slurm: this node's part of it, told in a file of the cell's folder."""
    try:
        own = placed(request, os.environ)
        folder = Path(own["cell_dir"])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / MESSAGES).unlink(missing_ok=True)  # an earlier job's
        stream = os.open(folder / MESSAGES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except (OSError, ValueError) as error:
        print(f"runner.node: {request['cell']}: {error}", file=sys.stderr)
        return 1
    os.dup2(stream, 1)
    os.close(stream)
    _say("placed", job=slurm.own_id(os.environ), hosts=own["hosts"], host=own["host"])
    return Cell(own).run()


def placed(request: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """A node's own request, from the one that all nodes of a step get and what Slurm told this task.

    Of the common request: `hosts` are Slurm names in rank order (none: Slurm's order); `names`,
    `addresses` and `node_env` have the inventory's names, addresses and variables of hosts by Slurm name;
    `shared_root` is the folder of all hosts' artefacts where nodes share it, else `cell_dir` is on each node.
    Raises ValueError saying what Slurm did not tell.
    """
    placement, index = slurm.placement(environ)
    own = placement[index]
    hosts = tuple(request.get("hosts") or placement)
    if own not in hosts:
        raise ValueError(f"Slurm started it on {own}, which is none of {', '.join(hosts)}")
    index = hosts.index(own)
    names = [request.get("names", {}).get(host, host) for host in hosts]
    root = request.get("shared_root")
    cell_dir = str(Path(root, names[index], request["cell"])) if root else request["cell_dir"]
    launch = ENGINES[request["engine"]].launch(
        Ranks(
            nodes=[_Host(name, sys.executable) for name in names],
            gpus_per_node=request["gpus_per_node"],
            master_address=request.get("addresses", {}).get(hosts[0], hosts[0]),
            master_port=request["master_port"],
            cell_dir=cell_dir,
            launcher_dir=cell_dir,
            ssh_config=None,
            marker=request["marker"],
        )
    )
    env = {**request["env"], **request.get("node_env", {}).get(own, {})}
    return {
        **request,
        "host": names[index],
        "hosts": names,
        "cell_dir": cell_dir,
        "env": env,
        "job": {**request["job"], "env": env},
        "argv": launch.argv[index],
        "rendezvous_port": request["master_port"] if index == 0 else None,
    }


@dataclass(frozen=True)
class _Host:
    alias: str
    python: str


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

    def __init__(self, marker: str, cell: Cell) -> None:
        self._marker, self._seen, self._next, self._cell = marker, False, 0.0, cell

    def gone(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 0.5  # reading every process's environment costs milliseconds
        alive = bool(process.marked(self._marker))
        self._seen = self._seen or alive
        return self._seen and not alive and any(self._cell.folder.glob("rank*.jsonl"))


class _Stacks:
    """Where each rank of this node stands, asked of all at once and read `ANSWER_S` later."""

    ANSWER_S = 1.0
    FRAMES = 10

    def __init__(self, folder: Path, marker: str) -> None:
        alive = set(process.marked(marker))
        self._asked: dict[Path, tuple[int, int]] = {}  # a rank's events: its process, what it had said on stderr
        for path in sorted(folder.glob("rank*.jsonl")):
            with open(path, "rb") as file:
                pid = json.loads(file.readline() or b"{}").get("pid")
            if pid in alive:  # neither ended, nor torchrun's own agent, nor somebody who got an old number
                stderr = path.with_suffix(".stderr")
                self._asked[path] = (pid, stderr.stat().st_size if stderr.exists() else 0)
        process.signal_all([pid for pid, _ in self._asked.values()], process.STACKS)
        self._due = time.monotonic() + self.ANSWER_S

    def due(self) -> bool:
        return time.monotonic() >= self._due

    def read(self) -> dict[str, dict[str, Any]]:
        """By rank: the kernel's state of it, seconds since its last event, its innermost frames, innermost first."""
        standing = {}
        for path, (pid, said) in self._asked.items():
            try:
                with open(path.with_suffix(".stderr"), "rb") as file:
                    file.seek(said)
                    text = file.read().decode(errors="replace")
            except OSError:
                text = ""
            standing[path.stem] = {
                "state": process.state(pid),
                "age_s": round(time.time() - path.stat().st_mtime, 1),
                "frames": frames(text)[: self.FRAMES],
            }
        return standing


_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_ROOT = re.compile(r".*/(?:site-packages/|(?=runner/workloads/))")


def frames(text: str) -> list[str]:
    """The frames in what faulthandler wrote, such as `torch/cuda/__init__.py:1083 synchronize`."""
    return [f"{_ROOT.sub('', path)}:{line} {function}" for path, line, function in _FRAME.findall(text)]


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise _Refused(f"port {port} for the rendezvous is taken by another process", "port_taken") from None


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
