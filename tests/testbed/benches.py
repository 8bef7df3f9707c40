"""`runner bench` in the background on a testbed, for tests that break something while it runs."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from runner.provision.testbed.layout import SSH_PORT
from runner.results.rundir import RunDir
from runner.system import process

RUNNER = Path(sys.executable).with_name("runner")
BEFORE_RANKS = ("starting", "sending data")  # what the controller says of a cell; other phases are its ranks'


class Bench:
    """One `runner bench`; its output is held until `end`."""

    begun: ClassVar[list[Bench]] = []
    program: ClassVar[tuple[str | Path, ...]] = (RUNNER, "bench")

    def __init__(self, inventory: Path, results: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.results = results
        command = [*self.program, "-i", inventory, "--results", results, *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}
        )
        self.begun.append(self)

    def end(self, seconds: float = 240) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def leave(self, patience_s: float = 30) -> None:
        """End it if it still runs: as Ctrl-C, which ends its ranks and its jobs, or by force if that takes long."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.communicate(timeout=patience_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()

    @property
    def run(self) -> RunDir:
        return RunDir.find(self.results, None)

    @property
    def marker(self) -> str:
        """What every process of the run's first cell carries in its environment."""
        return f"{self.run.run_id}/{self.run.read_plan()['cells'][0]['id']}"

    def wait_for_ranks(self, seconds: float = 120) -> None:
        """Until the ranks of a cell have found each other and begun to measure."""

        def measuring() -> bool:
            if not (self.results / "latest" / "status.json").exists():
                return False
            cells = self.run.read_status()["cells"].values()
            return any(cell["progress"]["phase"] not in BEFORE_RANKS for cell in cells if cell.get("progress"))

        until(lambda: measuring() or self.process.poll() is not None, seconds)
        ended = self.process.poll() is not None
        assert not ended, self.end()[1]
        assert measuring(), f"no rank measures after {seconds:g} s"


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def pause(container: str) -> None:
    """Freeze a node. runc gives up while a process is between fork and exec, so it may take more than one try."""
    frozen = ["podman", "pause", container]
    assert until(lambda: process.run(frozen, timeout_s=60).rc == 0, 60), f"{container} cannot be paused"


def kill(container: str) -> None:
    """End a node as a power cut does. On a busy machine podman waits in vain for word of it, so that its own may fail."""
    process.run(["podman", "kill", container], timeout_s=60)
    state = ("inspect", "--format", "{{.State.Status}}", container)
    assert until(lambda: podman(*state).strip() == "exited", 60), f"{container} cannot be killed"


def podman(*arguments: str) -> str:
    # A container's monitor notes in its working directory that the kernel killed for memory: not in the checkout.
    return process.run(["podman", *arguments], timeout_s=60, check=True, cwd=tempfile.gettempdir()).stdout


def inside(container: str, script: str) -> str:
    """Run a shell script in a container."""
    return podman("exec", container, "bash", "-c", script)


def answers(container: str) -> bool:
    """Whether something listens on the node's SSH port, as seen from here."""
    address = podman("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)
    try:
        socket.create_connection((address.strip(), SSH_PORT), timeout=1).close()
    except OSError:
        return False
    return True


def mount(container: str, *arguments: str) -> None:
    """Mount something over a path of a container, which may not do so itself."""
    in_its_mounts(container, "mount", *arguments)


def unmount(container: str, path: str | Path) -> None:
    in_its_mounts(container, "umount", "--lazy", str(path))  # whoever still writes there is about to end


def in_its_mounts(container: str, *argv: str) -> None:
    pid = podman("inspect", "--format", "{{.State.Pid}}", container).strip()
    process.run(["nsenter", "--target", pid, "--mount", "--pid", "--", *argv], timeout_s=20, check=True)


def small_disk(container: str, path: str, size: str) -> None:
    """A file system of `size` at `path` of a container."""
    inside(container, f"mkdir -p {path}")
    mount(container, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)


def other_content(container: str, path: Path, text: str) -> None:
    """Another content of a file that the container shares with this machine, seen by the container alone."""
    inside(container, f"printf %s {shlex.quote(text)} > /tmp/{path.name}")
    mount(container, "--bind", f"/tmp/{path.name}", str(path))


def _to_ranks(name: str) -> str:
    return (
        'for p in $(pgrep -f "runner.workloads"); do'
        ' grep -qz "^RANK=" /proc/$p/environ && grep -qz "^LOCAL_RANK=" /proc/$p/environ'
        f" && kill -{name} $p; done"
    )


def signal_rank(container: str, name: str) -> None:
    """Send a signal to the ranks on a node, and to nothing else of it."""
    inside(container, f"{_to_ranks(name)}; true")


def stop_next_rank(container: str) -> None:
    """Stop the next rank that starts on a node, soon after it has."""
    stopped = 'ps -eo stat=,args= | grep -q "^T.*runner.workloads"'
    inside(container, f"for i in $(seq 600); do {_to_ranks('STOP')}; {stopped} && exit 0; sleep 0.1; done; exit 1")
