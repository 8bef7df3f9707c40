"""What a play did: events folded into failures, warnings, and a table of nodes and roles. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from runner import errors

if TYPE_CHECKING:
    from runner.provision.playbook import Event


# The worst of what a role's tasks did on a node is the role's state there.
_RANK = {"skipped": 0, "ok": 1, "changed": 2, "failed": 3, "unreachable": 4}


_SHOWN = {"skipped": "off", "ok": "ok", "changed": "changed", "failed": "FAILED", "unreachable": "NO ANSWER"}


@dataclass
class Board:
    """What happened so far on `nodes` (inventory names to aliases)."""

    nodes: Mapping[str, str]
    events: list[Event] = field(default_factory=list)

    def roles(self) -> list[str]:
        return list(dict.fromkeys(event.role for event in self.events if event.role))

    def state(self, host: str, role: str) -> str | None:
        """A role's state on a node; None where it was not reached."""
        states = [event.status for event in self.events if event.host == host and event.role == role]
        return max(states, key=_RANK.__getitem__, default=None)

    def bad(self) -> set[str]:
        return {event.host for event in self.events if event.status in ("failed", "unreachable")}

    def unreachable(self) -> set[str]:
        return {event.host for event in self.events if event.status == "unreachable"}


@dataclass(frozen=True)
class Failure:
    """One thing that is wrong, and on which nodes it is so in the same words."""

    nodes: str
    role: str
    phase: str
    what: str
    expected: str
    found: str
    remedy: str

    def line(self) -> str:
        where = f"{self.role}: " if self.role else ""
        text = f"{where}{self.what}"
        if self.expected or self.found:
            text += f": expected {self.expected}, found {self.found}"
        return f"{text} ({self.remedy})" if self.remedy else text


def failures(board: Board) -> list[Failure]:
    """Every failure, equal ones folded over nodes and roles, in the order in which they were met."""
    from runner.system.nodeset import fold

    met: dict[tuple[str, ...], dict[str, dict[str, None]]] = {}
    named = set()
    for event in board.events:
        if event.status not in ("failed", "unreachable") or (not event.role and event.host in named):
            continue  # a playbook's last word on a node repeats its roles'
        named.add(event.host)
        for problem in event.problems or ({"what": event.message},):
            key = tuple(str(problem.get(k, "")) for k in ("what", "expected", "found", "remedy"))
            entry = met.setdefault(key, {"nodes": {}, "roles": {}, "phases": {}})
            entry["nodes"][board.nodes[event.host]] = entry["roles"][event.role] = entry["phases"][event.phase] = None
    return [
        Failure(
            fold(list(entry["nodes"])),
            ", ".join(filter(None, entry["roles"])),
            ", ".join(filter(None, entry["phases"])),
            *key,
        )
        for key, entry in met.items()
    ]


def _folded(board: Board, met: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """(nodes, what) of each different `what` in (host, what), in the order in which they were met."""
    from runner.system.nodeset import fold

    nodes: dict[tuple[str, ...], dict[str, None]] = {}
    for host, what in met:
        nodes.setdefault(what, {})[board.nodes[host]] = None
    return [(fold(list(names)), what) for what, names in nodes.items()]


def warnings(board: Board) -> list[tuple[str, str, str]]:
    """(nodes, role, text) of each warning, equal ones folded."""
    met = ((event.host, (event.role, text)) for event in board.events for text in event.warnings)
    return [(nodes, role, text) for nodes, (role, text) in _folded(board, met)]


def table(board: Board) -> str:
    """Node × role, for people: narrow enough for 80 columns. Roles that are off on all nodes are one line below."""
    from tabulate import tabulate

    states = {role: {host: board.state(host, role) for host in board.nodes} for role in board.roles()}
    off = [role for role, found in states.items() if set(found.values()) <= {"skipped", None}]
    rows = [
        [alias, *("–" if (s := states[role][host]) is None else _SHOWN[s] for role in states if role not in off)]
        for host, alias in board.nodes.items()
    ]
    headers = ["node", *(role.replace("_", "\n") for role in states if role not in off)]
    lines = [tabulate(rows, headers=headers)] if len(headers) > 1 else []
    return "\n".join([*lines, *([f"off: {', '.join(off)}"] if off else [])])


def summary(board: Board, state: str, elapsed_s: float, said: str) -> dict[str, Any]:
    """What `--json` prints and summary.json holds."""
    return {
        "schema": 1,
        "state": state,
        "elapsed_s": round(elapsed_s, 1),
        "nodes": {
            alias: {"name": host, "roles": {role: board.state(host, role) for role in board.roles()}}
            for host, alias in board.nodes.items()
        },
        "failures": [asdict(failure) for failure in failures(board)],
        "warnings": [{"nodes": nodes, "role": role, "text": text} for nodes, role, text in warnings(board)],
        "error": said or None,
    }


def diffs(board: Board) -> list[tuple[str, str, str, str]]:
    """(nodes, setting, before, after) of each difference that a dry converge found, equal ones folded."""
    met = []
    for event in board.events:
        for entry in event.diff if isinstance(event.diff, list) else [event.diff] if event.diff else []:
            setting = str(entry.get("before_header") or entry.get("after_header") or event.task)
            before, after = (str(entry.get(side) or "").strip() for side in ("before", "after"))
            met.append((event.host, (setting, before, after)))
    return [(nodes, setting, before, after) for nodes, (setting, before, after) in _folded(board, met)]


def exit_code(board: Board, state: str) -> int:
    """3 where a node was not reached, 1 where one is not as wanted, 130 after an interruption."""
    if state == "cancelled":
        return errors.EXIT_INTERRUPTED
    if board.unreachable():
        return errors.EXIT_INFRASTRUCTURE
    if board.bad():
        return errors.EXIT_TARGET_MISSED
    return errors.EXIT_OK if state == "complete" else errors.EXIT_INFRASTRUCTURE
