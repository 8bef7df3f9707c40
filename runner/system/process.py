"""The only module that starts processes or signals them.

Commands are argument lists and every call has a time limit. A command that exceeds its limit, or whose
caller is interrupted, is terminated with its whole process group: INT, then TERM, then KILL.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from runner.errors import InfrastructureError

# Every process of a cell has this environment variable, whatever started it (torchrun puts its workers in
# separate sessions, pdsh starts them below sshd): leftover processes are found and terminated by it.
MARKER = "SHAKEDOWN_CELL"
# Requests the stacks of a rank. Of the signals that torch, NCCL and Slurm do not use, its default action is to be
# ignored, so that it does not kill a process without a handler.
STACKS = signal.SIGURG
# The signals by which the user stops a command.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def cell_marker(run_id: str, cell: str) -> str:
    """The value of MARKER in every process of a cell."""
    return f"{run_id}/{cell}"


@dataclass(frozen=True)
class Outcome:
    """The result of a finished command. `rc` is its exit status, or minus the number of the signal that ended it."""

    argv: tuple[str, ...]
    rc: int
    elapsed_s: float
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last line of stderr, or of stdout where stderr is empty: usually the reason of a failure."""
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return lines[-1].strip() if lines else ""


@contextlib.contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    """Give the signals this handler while the context lasts, then their former ones; in the main thread only."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def allow_open_files() -> None:
    """Raise the limit of open files to the hard limit: a connection has three pipes, a rank several streams."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stderr_to_stdout: bool = False,
    bound: bool = False,
) -> subprocess.Popen[bytes]:
    """Start `argv` in a new session with pipes on all three streams (unbuffered bytes).

    `env` replaces the whole environment. A `bound` process is killed as soon as the thread that started it ends,
    whatever ends that. Raises InfrastructureError when the program is missing or does not start.
    """
    try:
        return subprocess.Popen(
            list(argv),
            bufsize=0,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if stderr_to_stdout else subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_bind(os.getpid()) if bound else None,
        )
    except FileNotFoundError as error:
        raise InfrastructureError(f"program {argv[0]!r} is not installed or not on PATH") from error
    except OSError as error:
        raise InfrastructureError(f"cannot start {argv[0]!r}: {error.strerror}") from error


def beside(argv: Sequence[str], *, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start `argv` in a new session with this process's own streams, but without input. `env` replaces the whole
    environment. Raises OSError.
    """
    return subprocess.Popen(list(argv), env=dict(env), stdin=subprocess.DEVNULL, start_new_session=True)


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the process group of `child`, unless it has ended."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def _bind(parent: int) -> Callable[[], None]:
    """What a child does before its program starts, so that the kernel kills it when `parent` ends (prctl(2))."""
    import ctypes

    libc = ctypes.CDLL(None)  # before the fork, since loading takes locks

    def bind() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # which ended before
            os._exit(1)

    return bind


def adopt_orphans() -> None:
    """From now on, what descends from this process and loses its parent becomes this process's child (prctl(2))."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def descendants() -> list[int]:
    """Ids of the processes that descend from this one and have not ended."""
    below: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
                letter, parent = file.read().rpartition(")")[2].split()[:2]
                below.setdefault(int(parent), []).append(int(entry) if letter != "Z" else 0)
    found, todo = [], [os.getpid()]
    while todo:
        children = below.get(todo.pop(), [])
        found += [pid for pid in children if pid]
        todo += [pid for pid in children if pid]
    return found


def reap() -> None:
    """Take note of the children that have ended, adopted ones too, so that their ids are free."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def exit_fd(child: subprocess.Popen[bytes]) -> int | None:
    """A file descriptor that becomes readable when `child` ends; the caller closes it.

    None where the system does not support it (Linux before 5.3).
    """
    try:
        return os.pidfd_open(child.pid)
    except (AttributeError, OSError):
        return None


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    check: bool = False,
    errors: str = "replace",
) -> Outcome:
    """Run `argv` until it ends and return its Outcome. `input` is written to its stdin, `env` replaces the environment.

    `errors`: what becomes of output that is no UTF-8, as `bytes.decode` has it.

    Raises InfrastructureError when the program is missing, when `timeout_s` passes, or, with `check`,
    when the exit status is not 0. On any exception (Ctrl-C), its whole process group is terminated.
    """
    started = time.monotonic()
    child = spawn(argv, env=env, cwd=cwd)
    _running.add(child)
    data = input.encode() if isinstance(input, str) else input
    try:
        stdout, stderr = child.communicate(data, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        stop_group(child)
        raise InfrastructureError(f"{argv[0]} gave no result within {timeout_s:g} s") from None
    except BaseException:
        stop_group(child)
        raise
    finally:
        _running.discard(child)
    outcome = Outcome(
        argv=tuple(argv),
        rc=child.returncode,
        elapsed_s=time.monotonic() - started,
        stdout=stdout.decode(errors=errors),
        stderr=stderr.decode(errors=errors),
    )
    if check and outcome.rc != 0:
        raise InfrastructureError(f"{argv[0]} failed with status {outcome.rc}: {outcome.last_line}")
    return outcome


# The children that `run` waits for, of all threads.
_running: set[subprocess.Popen[bytes]] = set()


def stop_running() -> None:
    """Send TERM to every command that `run` waits for in other threads; their calls then return."""
    for child in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)


def ask_children_to_end() -> None:
    """Send TERM to every child of this process that has not been waited for yet."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()


def stop_group(child: subprocess.Popen[bytes], grace_s: float = 3.0) -> None:
    """Terminate the process group of `child` and wait for it: INT, then TERM and KILL, each after `grace_s` seconds."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(grace_s)
            break
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def terminate(child: subprocess.Popen[bytes]) -> None:
    """Send TERM to `child` alone, which terminates its own children; no error where it has already ended."""
    child.terminate()


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Send KILL to the process group of `child`, unless it has ended; the caller waits for `child`."""
    signal_group(child, signal.SIGKILL)


def marked(marker: str) -> list[int]:
    """Ids of the processes on this machine that have `marker` in their environment, this process excluded."""
    expected = f"{MARKER}={marker}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                if expected in file.read().split(b"\0"):
                    found.append(int(entry))
        except OSError:
            continue  # it has ended in the meantime, or belongs to another user
    return found


def state(pid: int) -> str | None:
    """The kernel's state letter of a process: R running, S sleeping, D uninterruptible wait, T stopped, Z zombie.

    None where there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return None


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process and its threads have used so far; 0 where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


STUCK = "TtD"  # the letters of processes that do not run, and do not wait for input either


def state_with_children(pid: int) -> str | None:
    """The state letter of a process, or of the first of its descendants that is stuck where it is not itself."""
    import psutil

    own = state(pid)
    try:
        below = [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:  # it has ended, or is not ours to look at
        return own
    states = [own, *(state(child) for child in below)]
    return next((each for each in states if each and each in STUCK), own)


def oom_kills() -> int:
    """The number of processes in this process's memory cgroup that the kernel's OOM killer ended; 0 if unknown.

    cgroup v2 counts in memory.events, v1 in memory.oom_control. Inside a container the path that the kernel
    reports may not be mounted: then the nearest parent folder is read, at last the container's root.
    """
    try:
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return 0
    for controllers, root, name in (
        ("memory", "/sys/fs/cgroup/memory", "memory.oom_control"),
        ("", "/sys/fs/cgroup", "memory.events"),
    ):
        for _, found, path in own:
            if found != controllers:
                continue
            place = Path(root + path)
            for folder in (place, *place.parents):
                if folder.is_relative_to(root) and (folder / name).exists():
                    words = (folder / name).read_text().split()
                    return int(dict(zip(words[::2], words[1::2], strict=False)).get("oom_kill", 0))
    return 0


def signal_all(pids: Iterable[int], number: int) -> None:
    """Send the signal `number` to each process; skips those that have ended or belong to another user."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def stop_marked(marker: str, grace_s: float) -> None:
    """Terminate every process with `marker` in its environment: INT, then TERM and KILL, each after `grace_s` seconds.

    Returns as soon as none is left.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        pids = marked(marker)
        if not pids:
            return
        signal_all(pids, number)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if not marked(marker):
                return
            time.sleep(0.05)
