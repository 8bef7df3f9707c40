"""Errors that a user can act on, with the exit code of the command."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence

EXIT_OK = 0
EXIT_TARGET_MISSED = 1
EXIT_USAGE = 2
EXIT_INFRASTRUCTURE = 3
EXIT_INTERRUPTED = 130

FEW = 12  # names that an error lists although it suggests one of them


class RunnerError(Exception):
    """One line for the user: what was requested, what was found, what to do.

    For programs: the `kind` of failure (`failures.KINDS`), None if it is none of them, and in `nodes` {"host", "alias",
    "kind", "message"} for each problem of each bad node.
    """

    exit_code = EXIT_USAGE
    kind: str | None = None

    def __init__(self, message: str, kind: str | None = None, nodes: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(message)
        self.kind = kind or self.kind
        self.nodes = nodes


class UsageError(RunnerError):
    """Wrong option, configuration file or input data."""


class InfrastructureError(RunnerError):
    """A node, a connection, a disk or a job failed."""

    exit_code = EXIT_INFRASTRUCTURE


class Interrupted(RunnerError):
    """The user stopped the command; measured values were kept."""

    exit_code = EXIT_INTERRUPTED


def disk_full(error: OSError) -> bool:
    """Whether `error` says that a disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_kind(error: OSError) -> str | None:
    """The kind of failure "controller_disk_full" if `error` says that a disk is full, else None."""
    return "controller_disk_full" if error.errno == errno.ENOSPC else None


def os_error_text(error: OSError) -> str:
    """The error as one line: the file, if the system names one, and what is wrong."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{(error.strerror or str(error)).lower()}"


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UsageError:
    """The error for a `name` that is not one of `known`, with the nearest valid one; `where` is a file or an option."""
    import difflib  # not imported on the path to the first step

    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    every = f"known: {', '.join(known)}"
    hint = f"did you mean {near[0]!r}?" if near else every
    if near and len(known) <= FEW:
        hint += f" ({every})"
    place = f"{where}: " if where else ""
    return UsageError(f"{place}unknown {kind} {name!r}; {hint}")
