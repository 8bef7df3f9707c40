"""What a job's output says of agents that could not be started. Text in, values out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runner.system.nodeset import expand


@dataclass(frozen=True)
class Unstarted:
    """Why the agent of a node did not start: the kind of failure (`failures.KINDS`), and Slurm's or Python's words."""

    kind: str
    why: str


# Lines of srun and of slurmstepd, which name the node. Spellings: Slurm 20.11 to 24.11.
_OF_A_NODE = (
    ("prolog_failed", r"Task launch for \S+ failed on node (?P<nodes>\S+): (?P<why>.*prolog.*)"),
    ("node_failed", r"Task launch for \S+ failed on node (?P<nodes>\S+): (?P<why>.*)"),
    ("prolog_failed", r"(?P<why>Prolog failure on node (?P<nodes>\S+))"),
    ("environment_missing", r"slurmstepd-(?P<nodes>\S+): error: execve\(\): (?P<why>.*)"),
    ("environment_missing", r"slurmstepd-(?P<nodes>\S+): error: (?P<why>(?:couldn't|could not) chdir.*)"),
)
_ENDED = re.compile(
    r"srun: error: (?P<nodes>\S+): tasks? [\d,-]+: "
    r"(?P<why>Exited with exit code \d+|Segmentation fault|Illegal instruction|Bus error|Aborted)"
)
# Of the agent's Python or its loader, which do not say on which node they are.
_SOFTWARE = re.compile(
    r"No module named |\bModuleNotFoundError\b|\bImportError\b|error while loading shared libraries|"
    r"cannot execute|Exec format error|version `\S+' not found|No Python at|init_fs_encoding"
)


def unstarted(lines: Iterable[str]) -> dict[str, Unstarted]:
    """The nodes (Slurm's names) whose agents ended before they could be heard, in the order of the log.

    An agent that fails later ends as well: what counts of it are its own messages.
    """
    lines = [line.strip() for line in lines]
    found: dict[str, Unstarted] = {}
    for kind, words in _OF_A_NODE:
        for match in filter(None, (re.search(words, line, re.IGNORECASE) for line in lines)):
            for node in _nodes(match["nodes"]):
                found.setdefault(node, Unstarted(kind, match["why"]))
    software = next((line for line in lines if _SOFTWARE.search(line)), None)
    for match in filter(None, (_ENDED.search(line) for line in lines)):
        kind, why = ("environment_missing", software) if software else ("not_started", match["why"])
        for node in _nodes(match["nodes"]):
            found.setdefault(node, Unstarted(kind, why))
    return found


def heading(cell: str) -> str:
    """The line of a job's output above what belongs to a cell, in a job of several cells."""
    return f"--- cell {cell}"


def of_cell(lines: Sequence[str], cell: str) -> list[str]:
    """The lines of a cell in the output of a job of several, one after the other; all of them without headings."""
    at = [number for number, line in enumerate(lines) if line.startswith(heading(""))]
    if not at:
        return list(lines)
    begins = [number for number in at if lines[number] == heading(cell)]
    ends = [number for number in at if begins and number > begins[-1]]
    return list(lines[begins[-1] : min(ends, default=len(lines))]) if begins else []


def _nodes(text: str) -> tuple[str, ...]:
    try:
        return expand(text)
    except ValueError:  # cut off
        return ()
