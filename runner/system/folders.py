"""Folders that are there whole or not at all: made aside and renamed, by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(folder: Path, locks: Path | None = None) -> Iterator[None]:
    """Let one process at a time make `folder`; the kernel releases the lock of a killed one. Raises OSError.

    The file of the lock is in `locks`, by default beside `folder`: file systems between nodes may have no locks.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    locks = locks or folder.parent
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(folder)  # what a killed process left: this one holds the lock
        yield


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` if the block succeeds, and removed otherwise. Raises OSError."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        yield temporary
        if folder.exists():  # incomplete, as the caller has seen
            folder.rename(Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent)) / "unfit")
        temporary.rename(folder)
    finally:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
