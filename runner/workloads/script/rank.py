"""A rank of test `script`: starts the user's program, hands signals on to it, and ends as it does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from runner.errors import UsageError, os_error_text
from runner.system import folders, process
from runner.workloads.job import DATA_VARIABLE, Events, RankJob

_PYTHONS = ("python", "python3")
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(job: RankJob, events: Events) -> None:
    """Start the program and wait for it; its end is the event `exit`.

    Exits with the program's own code, 128 + n after signal n, where that is not 0. Raises UsageError where the program
    cannot be started.
    """
    python = str(job.params["python"] or sys.executable)
    env = environment(os.environ, job.params["env"], python)
    began = time.monotonic()
    with _held(env.get(DATA_VARIABLE)):
        code = _supervised(command(job.params["argv"], python, env), job.params["folder"], env)
    seconds = time.monotonic() - began
    number = -code if code < 0 else None
    code = 128 + number if number else code
    events("exit", code=code, signal=number, seconds=round(seconds, 3))
    if code:
        sys.exit(code)
    events.value("script_s", seconds)


@contextmanager
def _held(data: str | None) -> Iterator[None]:
    """While the block runs, data that were sent to this node stay; a folder that is used in place is the user's."""
    with ExitStack() as stack:
        if data and folders.use_of(Path(data)).exists():
            with suppress(OSError):  # a file system without locks
                stack.enter_context(folders.in_use(Path(data)))
        yield


def command(words: Sequence[str], python: str, env: Mapping[str, str]) -> list[str]:
    """What `words` start: a file of Python and the word `python` mean `python`, any other word is a program, which is
    looked for in the PATH of `env` unless it is a path. The words themselves stay as they are.
    """
    first, *rest = words
    if first.endswith(".py"):
        return [python, *words]
    if first in _PYTHONS:
        return [python, *rest]
    return [first if "/" in first else shutil.which(first, path=env.get("PATH")) or first, *rest]


def environment(own: Mapping[str, str], given: Mapping[str, str], python: str) -> dict[str, str]:
    """The environment of the program: that of the rank, with the programs beside `python` first, and `given`."""
    return {**own, "PATH": f"{Path(python).parent}:{own.get('PATH', os.defpath)}", **given}


def _supervised(argv: Sequence[str], folder: str, env: Mapping[str, str]) -> int:
    """Run `argv` in a process group of its own, to which signals go on; returns its status, -n after signal n."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            _signal(child, number)

    with process.handling(_HANDED_ON, hand_on):
        # What is ignored here the program would ignore too: these are an agent's words, the program may have its own.
        with process.handling((signal.SIGUSR1, signal.SIGUSR2), signal.SIG_DFL):
            try:
                child = subprocess.Popen(argv, cwd=folder, env=dict(env), stdin=subprocess.DEVNULL, process_group=0)
            except OSError as error:
                if not Path(folder).is_dir():
                    raise UsageError(f"the working folder {folder} is not on this node") from error
                raise UsageError(f"cannot start {argv[0]}: {os_error_text(error)}") from error
        for number in early:
            _signal(child, number)
        status = child.wait()
        _signal(child, signal.SIGTERM)  # what it leaves in its group, such as the workers of a data loader
        return status


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
