"""Entry point of every rank: `python -m runner.workloads CELL_DIR`."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from runner.cluster import nccl
from runner.errors import RunnerError
from runner.results.celldir import STREAMS, CellDir
from runner.system import process
from runner.workloads.job import Events, RankJob, rank_from_env
from runner.workloads.registry import TESTS

READY_S = 120.0  # Python on a cold file system, and the agent's checks of its node


def main(cell_dir: Path) -> None:
    """Run the test of the cell in `cell_dir` as one rank, and write its events there.

    RANK and WORLD_SIZE come from the environment. Exits with a message where the world size is not the planned one or
    the test is unknown; raises RunnerError where the test cannot run, and whatever the test itself raises.
    """
    _wait_for(cell_dir)
    job = RankJob.load(cell_dir)
    os.environ.update(job.env)  # before torch: NCCL and gloo read it when they are loaded
    rank = rank_from_env()
    if process.MARKER in os.environ:  # started by Shakedown; by hand, output stays on the terminal
        _own_output(cell_dir, rank)
    events = Events(cell_dir, rank)
    observed = int(os.environ["WORLD_SIZE"])
    events.start(world_size=observed, host=socket.gethostname(), pid=os.getpid(), device=job.device)
    if observed != job.world_size:
        sys.exit(f"rank {rank}: world size is {observed}, planned: {job.world_size}")
    if job.test not in TESTS:
        sys.exit(f"rank {rank}: unknown test {job.test!r}")
    try:
        TESTS[job.test].load_rank().run(job, events)
    finally:
        if libraries := nccl.loaded():
            events("nccl", libraries=libraries)
    events.end()


def _wait_for(cell_dir: Path) -> None:
    """Wait for the folder, which this node's agent makes: a launcher on another node may be ahead of it."""
    deadline = time.monotonic() + READY_S
    while not cell_dir.exists():
        if time.monotonic() > deadline:
            sys.exit(f"{socket.gethostname()}: its agent has not made {cell_dir} within {READY_S:g} s")
        time.sleep(0.05)


def _own_output(cell_dir: Path, rank: int) -> None:
    """Redirect stdout and stderr, including what NCCL prints, to this rank's files: the same for every engine."""
    for descriptor, stream in enumerate(STREAMS, 1):
        file = os.open(CellDir(cell_dir).stream(rank, stream), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)


if __name__ == "__main__":
    # DeepSpeed's launcher puts --local_rank=K before a script's own arguments.
    cell_dir = Path([a for a in sys.argv[1:] if not a.startswith("--local_rank")][-1])
    # Of Slurm's, an agent's words: under its own engine no process of the agent's hands this on.
    for word in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(word, signal.SIG_IGN)
    # Before torch, whose import may hang as well. The handler is in C: it works while Python is blocked.
    faulthandler.register(process.STACKS, all_threads=False)
    code = 1
    try:
        main(cell_dir)
        code = 0
    except RunnerError as error:
        sys.stderr.write(f"rank {os.environ.get('RANK', '?')}: {error}\n")
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # A regular exit of the interpreter takes 1.5 s to free what the kernel frees at once, and after a
    # failure it could wait for communicators whose peers still compute.
    os._exit(code)
