"""What a cell may leave on a node beside its own folder: processes with its mark, and Ray's folder of sessions."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from runner.plan.engines import ray
from runner.system import process


def remove(marker: str, grace_s: float) -> None:
    """End every process with the cell's mark: INT, then TERM and KILL, each after `grace_s` seconds. Then remove what a
    supervisor of Ray that was killed could not.
    """
    process.stop_marked(marker, grace_s)
    with contextlib.suppress(OSError):
        held = os.open(ray.folder(marker), os.O_RDONLY | os.O_NOFOLLOW)
        try:
            remove_unused(held, Path(ray.folder(marker)))
        finally:
            os.close(held)


def remove_unused(held: int, folder: Path) -> None:
    """Remove the folder that is open as `held`, unless another process has locked it."""
    if locked(held, fcntl.LOCK_EX) and is_at(held, folder):
        shutil.rmtree(folder, ignore_errors=True)


def is_at(held: int, path: Path) -> bool:
    """Whether what is open as `held` is still at `path`, and not removed or replaced by another's."""
    try:
        return os.path.samestat(os.fstat(held), path.stat())
    except OSError:
        return False


def locked(descriptor: int, kind: int) -> bool:
    """Lock the open file, LOCK_SH or LOCK_EX, if nobody else's lock is against it; returns whether that worked."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
