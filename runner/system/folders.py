"""Folders that are there whole or not at all: made aside and renamed, by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(folder: Path, locks: Path | None = None, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let one process at a time make `folder`; the kernel releases the lock of a killed one. Raises OSError.

    The file of the lock is in `locks`, by default beside `folder`: file systems between nodes may have no locks.
    `on_wait` is called once if another process has it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    locks = locks or folder.parent
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / f"{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(folder)  # what a killed process left: this one holds the lock
        yield


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` if the block succeeds, and removed otherwise. Raises OSError."""
    temporary = _temporary(folder)
    try:
        yield temporary
        if folder.exists():  # incomplete, as the caller has seen
            folder.rename(_temporary(folder) / "unfit")
        temporary.rename(folder)
    finally:
        _sweep(folder)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """While the block runs, nobody on this machine who heeds `use_of` removes `folder`. Raises OSError."""
    with open(use_of(folder), "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(file.fileno())
        yield


def use_of(folder: Path) -> Path:
    """The file beside `folder` that whoever uses it has locked, LOCK_SH, and that is as old as its last use."""
    return folder.with_name(f".{folder.name}.used")


def _temporary(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))


def _prefix(folder: Path) -> str:
    """How the names of temporary folders begin: a user's own beside them has no such name."""
    return f".{folder.name}.shakedown-"


def _sweep(folder: Path) -> None:
    for leftover in folder.parent.glob(f"{glob.escape(_prefix(folder))}*"):
        shutil.rmtree(leftover, ignore_errors=True)
