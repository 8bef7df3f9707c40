"""What a cell requires of this node before it may start, and the reason where it may not."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.cluster import facts
from runner.node.check import check
from runner.node.requests import CellRequest
from runner.results.celldir import CellDir


class Refused(Exception):
    """The cell cannot start here: a message with the reason, and the kind of failure."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def require_good_node(request: CellRequest) -> None:
    """Raise Refused for what would stop the cell on this node, if no preflight has checked it."""
    if request.check:
        found = check(request.check)
        if found.problems:
            raise Refused("; ".join(found.problems), found.kinds[0])


def require_environment(request: CellRequest, observed: Mapping[str, Any]) -> None:
    """Raise Refused if the environment differs from the one in which earlier cells of the run were measured."""
    before = request.environment
    if before and (changed := facts.changes(before, facts.comparable(observed))):
        raise Refused(f"environment changed: {'; '.join(changed)} (--accept-drift to continue)", "version_mismatch")


def require_free(port: int) -> None:
    """Raise Refused if another process uses the TCP port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise Refused(f"port {port} for the rendezvous is taken by another process", "port_taken") from None


@contextlib.contextmanager
def locked(request: CellRequest) -> Iterator[None]:
    """Hold the node's lock: one cell at a time. The kernel releases it with the process, however that ends.

    Raises Refused, naming the run that holds the lock.
    """
    if request.scratch is None:  # a launcher on the controller, which is not one of the nodes
        yield
        return
    scratch = Path(request.scratch)
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(scratch / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Refused(f"in use by run {file.read().strip() or 'unknown'}", "in_use") from None
        file.truncate(0)
        file.write(request.run_id)
        file.flush()
        yield
        file.truncate(0)


@contextlib.contextmanager
def linked(request: CellRequest) -> Iterator[None]:
    """Have the request's link, if it has one, lead to the cell's folder: ranks that another node starts wait for it."""
    if request.link is None:
        yield
        return
    link = Path(request.link)
    link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(request.cell_dir)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # others' folders may be beside it
            link.unlink()
            link.parent.rmdir()


def empty(folder: CellDir) -> None:
    """Remove the files of an earlier attempt at the cell: they were gathered and must not count for this attempt."""
    for path in folder.path.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != folder.messages:
            path.unlink()
