"""`python -m runner.node.ray CELL_DIR …`: Ray on this node of a cell, from its ports to its last process.

One supervisor a node, started by the node's agent as torchrun is. It starts one `ray start --block`, whose descendants
are all that it ever ends: another Ray on the node, of this user or another, is not touched.

That of the first node starts Ray's head, waits until every node is there with its GPUs, submits the cell's only rank as
a job of Ray, and ends as that does. The others connect to it (`node.meeting`) and stay connected, so that nobody needs
a shared folder, a node that is lost is known at once, and under Slurm the others end without a controller.

The standard library only: the Python of a profile with Ray need not have the agent's packages.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.node import place
from runner.node.meeting import Inbox, Meeting, Peer, Refused, Unreachable, meet
from runner.node.output import end_of
from runner.node.protocol import Fault
from runner.plan.engines import ray
from runner.results.celldir import CellDir
from runner.results.logs import printable
from runner.system import process
from runner.system.files import write_json_atomic
from runner.system.wording import counted

POLL_S = 0.1  # between two looks at Ray's API while it starts
JOB_POLL_S = 0.5  # the same while the job runs
LATE_S = 5.0  # in which a node that is late says so itself
FEWER_S = 3.0  # a node that has fewer GPUs for so long will not have more
ANSWER_S = 5.0  # for one answer of Ray's API
SILENT_S = 60.0  # without an answer of Ray's API: it has ended
SETTLE_S = 3.0  # a job fails with a node that it has lost, which tells so itself a moment later
END_S = 3.0  # between TERM and KILL of Ray
LOGS_BYTES = 20 << 20  # of Ray's own logs that are kept
LAST = 300  # characters of an error
LOG_BYTES = 256 << 10  # of each file, from its end


class GaveUp(Exception):
    """Why there is no Ray, or none any more."""

    def __init__(self, kind: str, message: str, host: str | None = None) -> None:
        super().__init__(message)
        self.fault = Fault(kind, message, host)


class TooSlow(Exception):
    """Ray has given its own processes up before they had started."""


class Stopped(Exception):
    """The signal that ends this process."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Asked:
    """The command line: this node's place in rank order and address, the first node's address, and the addresses of
    the others by name, which only the first node is told.
    """

    cell_dir: Path
    gpus: int
    port: int
    node: int
    address: str
    head: str
    others: Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's Ray until the cell's job has ended; returns the job's exit status, 1 where there was none.

    Why there is none is left in the cell's folder (`CellDir.fault`).
    """
    process.adopt_orphans()
    asked = _asked(argv)
    folder = CellDir(asked.cell_dir)
    with process.handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), _on_signal):
        try:
            with Supervisor(asked, folder) as supervisor:
                return supervisor.run()
        except Stopped as stopped:
            return 128 + stopped.number
        except GaveUp as gave_up:
            fault = gave_up.fault
        except RunnerError as error:
            fault = Fault(error.kind or "environment_missing", str(error))
        except OSError as error:
            full = error.errno == errno.ENOSPC
            fault = Fault("disk_full" if full else "unknown", f"{error.strerror}: {error.filename or asked.cell_dir}")
    with contextlib.suppress(OSError):
        write_json_atomic(folder.fault, asdict(fault))
    print(f"{fault.kind}: {fault.message}", file=sys.stderr)
    return 1


def _on_signal(number: int, _frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # it ends now, once
    raise Stopped(number)


def _asked(argv: Sequence[str] | None) -> Asked:
    parser = argparse.ArgumentParser(prog="python -m runner.node.ray")
    parser.add_argument("cell_dir", type=Path)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--address", required=True)
    parser.add_argument("--head", default="")
    parser.add_argument("--other", action="append", default=[])
    found = parser.parse_args(argv)
    others = {name: address for name, _, address in (each.partition("=") for each in found.other)}
    return Asked(found.cell_dir, found.gpus, found.port, found.node, found.address, found.head, others)


class Supervisor:
    """Ray on this node. Entered, it has a folder and ports; left, nothing of it is there any more."""

    def __init__(self, asked: Asked, folder: CellDir) -> None:
        self.asked, self.folder = asked, folder
        self.job = json.loads(folder.job.read_text())
        self.join_s = float(self.job["params"]["join_s"])
        self.began = time.monotonic()
        self.deadline = self.began + self.join_s
        self.marker = os.environ.get(process.MARKER, str(asked.cell_dir))
        self.token = os.environ.pop(ray.TOKEN, "")
        self.inbox: Inbox = queue.Queue()
        self.peers: dict[int, Peer] = {}
        self.addresses: dict[int, str] = {}  # of the other nodes that have come, in Ray
        self.names = {index: name for index, name in enumerate(asked.others, 1)}
        self.said = deque[str](maxlen=200)  # the last lines of `ray start`
        self.child: subprocess.Popen[bytes] | None = None
        self.joined = False  # this node, and as the first node sees it, all: nothing is started once more
        self.gcs = ""  # where the others join, once somebody answers there

    def __enter__(self) -> Supervisor:
        self._left = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            if not self.token:
                raise GaveUp("ray_refused", f"{ray.TOKEN} is not set: nobody may use a Ray without a token")
            self.sessions = stack.enter_context(place.folder(Path(ray.folder(self.marker))))
            key = os.environ.get("SLURM_JOB_ID") or self.marker
            self.ports = ray.claim(key, place.ephemeral(), lambda ports: place.hold(ports, stack))
            stack.callback(self._keep_logs)
            stack.callback(self._end_ray)
            self._left = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._left.close()

    def run(self) -> int:
        """Carry out this node's part; returns the exit status of the job. Raises GaveUp."""
        self.grant = place.grant(self.job, self.asked.gpus)
        if self.grant.gpus < self.asked.gpus:
            raise GaveUp("gpus_missing", f"has {counted(self.grant.gpus, 'GPU')} to use, {self.asked.gpus} asked for")
        return self._follow() if self.asked.node else self._lead()

    # --- the first node -----------------------------------------------------------------------------

    def _lead(self) -> int:
        address = place.own_address(self.asked.address, *self.asked.others.values())
        with contextlib.ExitStack() as stack:
            if self.asked.others:
                stack.callback(self._met().close)
            api = Api(address, self.ports["dashboard"], self.token)
            while not self.joined:
                try:
                    self._come_up(api, address)
                except TooSlow:
                    self._tell_gcs("")
                    self._end_ray()
            self._say(f"{counted(1 + len(self.names), 'node')} joined, {counted(self.asked.gpus, 'GPU')} each")
            code = self._carry_out(api)
            self._say(f"the job has ended with status {code}")
            for peer in self.peers.values():
                peer.send({"end": code})
            return code

    def _met(self) -> Meeting:
        try:
            return Meeting(self.asked.port, self.token, self.inbox)
        except OSError as error:
            raise GaveUp("port_taken", f"port {self.asked.port}, on which the nodes meet: {error.strerror}") from error

    def _come_up(self, api: Api, address: str) -> None:
        """Start the head, and wait until all nodes have joined."""
        store = ray.store_bytes(self.job["device"])
        self._start(ray.head(sys.executable, address, self.ports, self.grant, self.marker, store))
        self._until(lambda: _accepts(address, self.ports["gcs"]))
        self._tell_gcs(ray.endpoint(address, self.ports["gcs"]))  # while the API still starts
        version = str(self._until(lambda: api.ask("GET", "/api/version"))["ray_version"])
        head = ray.Head(address, self.ports["gcs"], self.ports["dashboard"], version)
        write_json_atomic(self.folder.ray_head, head.to_json())
        self._say(f"Ray {version} answers at {ray.endpoint(address, head.dashboard)}")
        self._until_all_joined(api, address)
        self.joined = True

    def _tell_gcs(self, endpoint: str) -> None:
        """Tell the others where to join; empty: nowhere yet."""
        self.gcs = endpoint
        for index in self.addresses:
            self.peers[index].send({"gcs": endpoint})

    def _until(self, answers: Callable[[], Any]) -> Any:
        """Wait until the head answers; returns what."""
        while not (found := answers()):
            if time.monotonic() > self.deadline:
                raise GaveUp(
                    "never_joined", f"Ray's head has not answered within {self.join_s:g} s{self._last_words()}"
                )
            self._turn(POLL_S)
        return found

    def _until_all_joined(self, api: Api, own: str) -> None:
        """Wait for every node with its GPUs, and tell each once it is there; `own` is this node's address."""
        told = set[int]()
        fewer_since: float | None = None
        while lacking := self._lacking(api, own):
            without = {name for name, _, _ in lacking}
            for index in self.addresses.keys() - told:
                if self.names[index] not in without:
                    self.peers[index].send({"joined": True})
                    told.add(index)
            moment = time.monotonic()
            fewer = next((each for each in lacking if each[1] == "gpus_missing"), None)
            fewer_since = (fewer_since or moment) if fewer else None
            if fewer and fewer_since and moment - fewer_since > FEWER_S:
                raise GaveUp(fewer[1], fewer[2], fewer[0] or None)
            if moment > self.deadline + LATE_S:
                (name, kind, what), *others = lacking
                more = f"; nor {'has' if len(others) == 1 else 'have'} {len(others)} more" if others else ""
                raise GaveUp(kind, f"{what} within {self.join_s:g} s{more}", name or None)
            self._turn(POLL_S)
        for index in self.addresses.keys() - told:
            self.peers[index].send({"joined": True})

    def _lacking(self, api: Api, own: str) -> list[tuple[str, str, str]]:
        """What is missing, as `ray.missing`; the name of this node is empty."""
        expected = {"": own}
        for index, (name, address) in enumerate(self.asked.others.items(), 1):
            expected[name] = self.addresses.get(index, address)
        answer = api.ask("GET", "/api/v0/nodes?limit=10000&detail=false")
        with contextlib.suppress(ValueError):
            return ray.missing(ray.joined(answer or {}), expected, self.asked.gpus)
        return [("", "never_joined", "Ray's head has not told its nodes")]

    def _carry_out(self, api: Api) -> int:
        """Run the cell's rank as a job of Ray; returns its exit status."""
        words = ["env", "RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", sys.executable, "-m", "runner.workloads"]
        body = ray.submission(self.marker, [*words, str(self.asked.cell_dir)])
        job = body["submission_id"]
        self._submit(api, body)
        self._say(f"job {job} submitted")
        log = Growing(self.sessions / "session_latest" / "logs" / f"job-driver-{job}.log")
        answered = time.monotonic()
        while True:
            self._turn(JOB_POLL_S)
            now = api.ask("GET", f"/api/jobs/{job}")
            log.copy()  # what its rank says before it has files of its own
            if now is None:
                if time.monotonic() - answered > SILENT_S:
                    raise GaveUp("ray_died", f"Ray's head has not answered for {SILENT_S:g} s")
                continue
            answered = time.monotonic()
            state, code = ray.ended(now)
            if code is None:
                continue
            if state != ray.SUCCEEDED:
                self._settle()
                print(printable(str(now.get("message"))), file=sys.stderr)
                self._name_where_it_failed()
            return code if code >= 0 else 128 - code

    def _submit(self, api: Api, body: Mapping[str, Any]) -> None:
        """Submit the job, once, as soon as Ray takes it."""
        until = time.monotonic() + SILENT_S
        while not api.ask("POST", "/api/jobs/", body) and not api.ask("GET", f"/api/jobs/{body['submission_id']}"):
            if time.monotonic() > until:
                raise GaveUp("ray_died", f"Ray has not taken the job within {SILENT_S:g} s: {api.refusal}")
            self._turn(POLL_S)

    def _name_where_it_failed(self) -> None:
        """Where a task of the rank has failed on another node, say on which: what it died of, its own words tell."""
        where = ray.failed_at([printable(line) for line in end_of(self.folder.stream(0, "stderr"))])
        named = {address: self.names[index] for index, address in self.addresses.items()}
        if where in named:
            write_json_atomic(self.folder.fault, asdict(Fault(host=named[where])))

    def _settle(self) -> None:
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            self._turn(POLL_S)

    # --- the other nodes ----------------------------------------------------------------------------

    def _follow(self) -> int:
        where, within = ray.endpoint(self.asked.head, self.asked.port), f"within {self.join_s:g} s"
        try:
            host = meet(self.asked.head, self.asked.port, self.token, self.asked.node, self.inbox, self.deadline)
        except Refused:
            raise GaveUp("ray_refused", f"has another token than Ray's head at {where}") from None
        except Unreachable as error:
            raise GaveUp("never_joined", f"has not reached Ray's head at {where} {within}: {error}") from None
        address = place.own_address(self.asked.address, self.asked.head)
        host.send({"address": address})
        joins = ""
        while True:
            try:
                message = self._turn(POLL_S)
            except TooSlow:
                message = {"gcs": joins}
            if "end" in message:
                return 0
            if "gcs" in message:
                self._end_ray()
                self.joined, joins = False, str(message["gcs"])
                if joins:
                    store = ray.store_bytes(self.job["device"])
                    self._start(ray.worker(sys.executable, address, self.ports, self.grant, joins, store))
            self.joined = self.joined or "joined" in message
            if not self.joined and time.monotonic() > self.deadline:
                if self.child is None:
                    raise GaveUp("lost_peers", f"Ray's head at {where} has not answered {within}")
                raise GaveUp("never_joined", f"has not joined Ray {within}{self._last_words()}")

    # --- both ---------------------------------------------------------------------------------------

    def _turn(self, seconds: float) -> Mapping[str, Any]:
        """Wait so long, or for a message, which is returned. Raises GaveUp where Ray or the other side has gone."""
        if self.child is not None and self.child.poll() is not None:
            self._ended(self.child.returncode)
        try:
            peer, message = self.inbox.get(timeout=seconds)
        except queue.Empty:
            return {}
        if message is None:
            who = self.names.get(peer.node)
            raise GaveUp("lost_peers", f"has lost {who}" if who else "has lost Ray's head")
        if peer.node in self.names:
            self.peers[peer.node] = peer
            if "address" in message:
                self.addresses[peer.node] = str(message["address"])
                if self.gcs:
                    peer.send({"gcs": self.gcs})
        return message

    def _ended(self, status: int) -> None:
        """Ray has ended by itself: raise TooSlow where it may help to start it once more, else GaveUp."""
        self._reader.join(1)
        said = list(self.said)
        if not self.joined and ray.was_slow(said) and time.monotonic() < self.deadline:
            raise TooSlow
        kind, why = ray.why_ended(said)
        raise GaveUp(kind, f"Ray has ended with status {status}: {why}")

    def _start(self, argv: Sequence[str]) -> None:
        """Start Ray; its output goes to a file of its own."""
        self.said.clear()
        token = self.sessions / "token"
        fresh = token.with_name(f".token.{os.getpid()}")
        fresh.touch(mode=0o600)
        fresh.write_text(self.token)
        fresh.replace(token)  # the Ray of another supervisor on this machine may be reading it
        kept = {name: value for name, value in os.environ.items() if name not in ray.CLEARED}
        # The agent has put the job's into ours, a PYTHONPATH of the user behind the one that has this package.
        env = {**self.job.get("env", {}), **kept, **ray.environment(self.ports, str(token))}
        env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
        child = process.spawn(argv, env=env, cwd=str(self.folder.path), stderr_to_stdout=True, bound=True)
        assert child.stdin and child.stdout
        child.stdin.close()
        self.child = child
        self._reader = threading.Thread(target=self._read, args=(child.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: Any) -> None:
        # Of a full disk its rank complains; here it must not end the reading, or Ray waits for a reader.
        for line in output:
            with contextlib.suppress(OSError), open(self.folder.ray_output, "ab", buffering=0) as file:
                file.write(line)
            self.said.append(printable(line.decode(errors="replace").rstrip()))

    def _last_words(self) -> str:
        return f": {self.said[-1]}" if self.said else ""

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:.1f} s: {text}", flush=True)

    def _end_ray(self) -> None:
        """End Ray and whatever it has started, by their ids."""
        if self.child is not None and self.child.poll() is None:
            process.terminate(self.child)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(END_S)
        until = time.monotonic() + END_S
        while (left := process.descendants()) and time.monotonic() < until:
            process.signal_all(left, signal.SIGKILL)
            process.reap()
            time.sleep(0.02)
        self.child = None

    def _keep_logs(self) -> None:
        """Copy the ends of the logs of Ray's processes into the cell's folder."""
        left = LOGS_BYTES
        logs = self.sessions / "session_latest" / "logs"
        for path in sorted(logs.rglob("*")):
            with contextlib.suppress(OSError):
                if not path.is_file() or path.is_symlink() or not path.stat().st_size or left <= 0:
                    continue
                with open(path, "rb") as file:
                    file.seek(-min(LOG_BYTES, left, path.stat().st_size), os.SEEK_END)
                    data = file.read()
                target = self.folder.ray_logs / path.relative_to(logs)
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                target.write_bytes(data)
                left -= len(data)


class Api:
    """Ray's HTTP API at the head."""

    def __init__(self, address: str, port: int, token: str) -> None:
        self._address, self._port = address, port
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.refusal = "it does not answer"  # the last line of the last answer that was an error

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The answer; None where there is none, or an error. Raises GaveUp where the token is not accepted."""
        connection = http.client.HTTPConnection(self._address, self._port, timeout=ANSWER_S)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if answer.status in (401, 403):
            where = ray.endpoint(self._address, self._port)
            raise GaveUp("ray_refused", f"Ray at {where} refuses this job's token (HTTP {answer.status})")
        with contextlib.suppress(ValueError):
            value = json.loads(data)
            if answer.status == 200 and isinstance(value, dict):
                return value
        said = printable(data.decode(errors="replace")).split()
        self.refusal = " ".join(["HTTP", str(answer.status), *said])[-LAST:]
        return None


class Growing:
    """A file that grows, and is copied to stdout."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def copy(self) -> None:
        """Copy what is new."""
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
            self._offset += len(data)
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def _accepts(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        with socket.create_connection((address, port), timeout=ANSWER_S):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
