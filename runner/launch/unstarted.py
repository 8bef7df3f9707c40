"""What Open MPI's mpirun and Slurm's srun say where they could not start a cell's ranks: why, and on which node. Pure.

They write it in paragraphs between rules of dashes, in words that fit many causes; the cause itself stands in a line of
a shell, of ssh or of the dynamic loader, and the node in another line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from runner.cluster import reasons
from runner.launch.spellings import kind_of


@dataclass(frozen=True)
class Unstarted:
    """Why no rank was started: a kind in `failures.KINDS`, a message of one line, the launcher's name of the node."""

    kind: str
    message: str
    host: str | None = None


_VERSIONS = re.compile(r"detected a mismatch in versions between two processes")
_OPTION = re.compile(r"(?:orted|prted)\S*: Error: unknown option", re.IGNORECASE)
_OLDER = re.compile(r"received different version from \S+: (\S+) instead of (\S+)")
_PROGRAM = re.compile(r"unable to (?:launch|find) the specified (?:application|executable)")
_SLOTS = re.compile(r"There are not enough slots available")
_PMIX = re.compile(
    r"(?:specified plugin name for |create (?:mpi )?context for |cannot find mpi plugin for )mpi/(\w+)"
    r"|[Ii]nvalid MPI type,? ?'?(\w*)|\"--mpi=(\w+)\""
)
_PMIX_NODE = re.compile(r"mpi/pmix\w*: \w+: ([A-Za-z0-9][\w.-]*) \[\d+\]: ")
_LOST = re.compile(r"has lost communication with a remote daemon")
_DAEMONS = re.compile(
    r"(?:ORTE|PRTE) was unable to (?:reliably )?start one or more daemons"
    r"|does not know how to route a message to the specified"
    r"|An? (?:ORTE|PRTE|internal) daemon has unexpectedly failed|daemon \(pid \S+\) (?:died|on node \S+ failed)"
)
_DAEMON = re.compile(r"\b(?:orted|prted)\b")
_FIELD = r"^\s*{}\s*:\s*(\S.*?)\s*$"


def unstarted(lines: Sequence[str]) -> Unstarted | None:
    """Why nothing was started, from the last lines of mpirun or srun; None where they do not tell."""
    text = "\n".join(lines)

    def field(name: str) -> str | None:
        found = re.search(_FIELD.format(name), text, re.MULTILINE)
        return found[1] if found else None

    if _VERSIONS.search(text):
        here, there = field(r"Local (?:Open MPI|PRRTE|PRTE) version"), field(r"Peer (?:Open MPI|PRRTE|PRTE) version")
        return Unstarted(
            "version_mismatch", f"it has Open MPI {there}, not {here} as the controller", field("Peer host")
        )
    if older := _OLDER.search(text):
        return Unstarted("version_mismatch", f"nodes have Open MPI {older[1]} and {older[2]}", field("target node"))
    if _OPTION.search(text):
        return Unstarted("version_mismatch", "its Open MPI is older than the controller's", field("target node"))
    if _PROGRAM.search(text):
        program = field("Executable") or "the program"
        return Unstarted("environment_missing", f"{program} is missing there, or cannot be executed", field("Node"))
    if _SLOTS.search(text):
        return Unstarted("launcher_failed", "mpirun was given fewer slots than it is to start ranks")
    if plugin := _PMIX.search(text):
        name = next(filter(None, plugin.groups()), "pmix")
        host = _PMIX_NODE.search(text)
        missing = f"Slurm cannot use its plugin mpi/{name}: see `srun --mpi=list`, and whether libpmix is installed"
        return Unstarted("environment_missing", missing, host[1] if host else None)
    if _LOST.search(text):
        node = re.search(r"Remote daemon\s*:.* on node (\S+)", text)
        return Unstarted(
            "lost_connection", "mpirun lost the daemon that it had started there", node[1] if node else None
        )
    if _DAEMONS.search(text):
        return _no_daemon(lines, field("target node"))
    return None


def _no_daemon(lines: Sequence[str], host: str | None) -> Unstarted:
    """Why mpirun could not start its daemon on a node: in the words of ssh, of a shell there, or of the loader."""
    kind = reasons.reason_kind(255, lines)
    said = next((line for line in lines if reasons.reason_kind(255, [line]) != "unreachable"), None)
    said = said or next((line for line in lines if line.startswith("ssh: ")), None)
    if said is None:
        said = next((line for line in lines if _DAEMON.search(line) and kind_of([line])), None)
        kind = (kind_of([said]) if said else None) or "launcher_failed"
    why = f": {said.strip()}" if said else ", which must be able to connect to the controller"
    return Unstarted(kind, f"mpirun could not start its daemon there{why}", host)
