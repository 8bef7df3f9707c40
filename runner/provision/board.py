"""The results of a play: events folded into failures, warnings, and a table of nodes and roles. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from runner import errors

if TYPE_CHECKING:
    from runner.provision.playbook import Event, Status


# The worst status of a role's tasks on a node is the role's state there.
_RANK = {"skipped": 0, "ok": 1, "changed": 2, "failed": 3, "unreachable": 4}


_SHOWN = {"skipped": "off", "ok": "ok", "changed": "changed", "failed": "FAILED", "unreachable": "NO ANSWER"}


@dataclass
class Board:
    """The events so far on `nodes` (inventory name -> alias)."""

    nodes: Mapping[str, str]
    events: list[Event] = field(default_factory=list)

    def roles(self) -> list[str]:
        """The names of the roles that have events, in order of their first event."""
        return list(dict.fromkeys(event.role for event in self.events if event.role))

    def state(self, host: str, role: str) -> str | None:
        """The state of a role on a node: the worst status of its tasks; None where none of them ran."""
        states = [event.status for event in self.events if event.host == host and event.role == role]
        return max(states, key=_RANK.__getitem__, default=None)

    def bad(self) -> set[str]:
        """The inventory names of the nodes with a failed task or without a connection."""
        return {event.host for event in self.events if event.status in ("failed", "unreachable")}

    def off(self, host: str) -> dict[str, str]:
        """{role: reason} of the roles that are switched off on a node."""
        reasons = {role: reason for event in self.events if event.host == host for role, reason in event.off.items()}
        return {role: reason for role, reason in reasons.items() if self.state(host, role) == "skipped"}

    def add(
        self,
        host: str,
        role: str,
        problems: Sequence[str | Mapping[str, str]],
        warnings: Sequence[str] = (),
        changed: bool = False,
    ) -> None:
        """Add what was found on a node beside the play, as the events of a `role` of its own.

        A problem is one line, or has the keys of a role's: what, expected, found, remedy.
        """
        from runner.provision.playbook import Event

        told = tuple({"what": problem} if isinstance(problem, str) else problem for problem in problems)
        status: Status = "failed" if problems else "changed" if changed else "ok"
        self.events.append(Event("", host, "", role, "verify", "", status, 0.0, "", told, tuple(warnings)))

    def unreachable(self) -> set[str]:
        """The inventory names of the nodes that could not be reached."""
        return {event.host for event in self.events if event.status == "unreachable"}


@dataclass(frozen=True)
class Failure:
    """One failure and the nodes that have it, as a folded set; equal failures of several nodes are one."""

    nodes: str
    role: str
    phase: str
    what: str
    expected: str
    found: str
    remedy: str

    def line(self) -> str:
        """The failure as one line, without its nodes: role, what, expected, found and remedy."""
        where = f"{self.role}: " if self.role else ""
        text = f"{where}{self.what}"
        if self.expected or self.found:
            text += f": expected {self.expected}, found {self.found}"
        return f"{text} ({self.remedy})" if self.remedy else text


def failures(board: Board) -> list[Failure]:
    """Every failure, equal ones folded over nodes and roles, in order of first occurrence."""
    from runner.system.nodeset import fold

    found: dict[tuple[str, ...], dict[str, dict[str, None]]] = {}
    named = set()
    for event in board.events:
        if event.status not in ("failed", "unreachable") or (not event.role and event.host in named):
            continue  # a playbook's final task on a node repeats the failures of its roles
        named.add(event.host)
        for problem in event.problems or ({"what": event.message},):
            key = tuple(str(problem.get(k, "")) for k in ("what", "expected", "found", "remedy"))
            entry = found.setdefault(key, {"nodes": {}, "roles": {}, "phases": {}})
            entry["nodes"][board.nodes[event.host]] = entry["roles"][event.role] = entry["phases"][event.phase] = None
    return [
        Failure(
            fold(list(entry["nodes"])),
            ", ".join(filter(None, entry["roles"])),
            ", ".join(filter(None, entry["phases"])),
            *key,
        )
        for key, entry in found.items()
    ]


def _folded(board: Board, pairs: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """(folded nodes, what) of each distinct `what` in the `pairs` (host, what), in order of first occurrence."""
    from runner.system.nodeset import fold

    nodes: dict[tuple[str, ...], dict[str, None]] = {}
    for host, what in pairs:
        nodes.setdefault(what, {})[board.nodes[host]] = None
    return [(fold(list(names)), what) for what, names in nodes.items()]


def warnings(board: Board) -> list[tuple[str, str, str]]:
    """(folded nodes, role, text) of each distinct warning."""
    pairs = ((event.host, (event.role, text)) for event in board.events for text in event.warnings)
    return [(nodes, role, text) for nodes, (role, text) in _folded(board, pairs)]


def table(board: Board) -> str:
    """A table of nodes × roles for 80 columns; below it the roles that are off on all nodes, and why any is off."""
    from tabulate import tabulate

    states = {role: {host: board.state(host, role) for host in board.nodes} for role in board.roles()}
    off = [role for role, found in states.items() if set(found.values()) <= {"skipped", None}]
    rows = [
        [alias, *("–" if (s := states[role][host]) is None else _SHOWN[s] for role in states if role not in off)]
        for host, alias in board.nodes.items()
    ]
    headers = ["node", *(role.replace("_", "\n") for role in states if role not in off)]
    lines = [tabulate(rows, headers=headers)] if len(headers) > 1 else []
    return "\n".join([*lines, *_off_lines(board, off)])


def _off_lines(board: Board, off: Sequence[str]) -> list[str]:
    """Lines of "where: roles: reason", folded over nodes and roles; `off` are the roles that are off on all nodes."""
    pairs = ((host, one) for host in board.nodes for one in board.off(host).items())
    where = {role: "off" for role in off}
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for nodes, (role, reason) in _folded(board, pairs):
        reasons.setdefault((where.get(role, f"off on {nodes}"), reason), {})[role] = None
    told = {role for roles in reasons.values() for role in roles}
    lines = [f"{place}: {', '.join(roles)}: {reason}" for (place, reason), roles in reasons.items()]
    return [*lines, *([f"off: {', '.join(rest)}"] if (rest := [role for role in off if role not in told]) else [])]


def summary(board: Board, state: str, elapsed_s: float, error: str) -> dict[str, Any]:
    """The content of `--json` and of summary.json; `error` is Ansible's own error, "" for none."""
    return {
        "schema": 1,
        "state": state,
        "elapsed_s": round(elapsed_s, 1),
        "nodes": {
            alias: {"name": host, "roles": {role: board.state(host, role) for role in board.roles()}}
            for host, alias in board.nodes.items()
        },
        "failures": [asdict(failure) for failure in failures(board)],
        "off": {alias: board.off(host) for host, alias in board.nodes.items()},
        "warnings": [{"nodes": nodes, "role": role, "text": text} for nodes, role, text in warnings(board)],
        "error": error or None,
    }


def diffs(board: Board) -> list[tuple[str, str, str, str]]:
    """(folded nodes, setting, before, after) of each distinct difference that check mode found."""
    pairs = []
    for event in board.events:
        for entry in event.diff if isinstance(event.diff, list) else [event.diff] if event.diff else []:
            setting = str(entry.get("before_header") or entry.get("after_header") or event.task)
            before, after = (str(entry.get(side) or "").strip() for side in ("before", "after"))
            pairs.append((event.host, (setting, before, after)))
    return [(nodes, setting, before, after) for nodes, (setting, before, after) in _folded(board, pairs)]


def exit_code(board: Board, state: str) -> int:
    """The exit code: 0 success, 1 a node failed, 3 a node was unreachable or Ansible failed, 130 interrupted."""
    if state == "cancelled":
        return errors.EXIT_INTERRUPTED
    if board.unreachable():
        return errors.EXIT_INFRASTRUCTURE
    if board.bad():
        return errors.EXIT_TARGET_MISSED
    return errors.EXIT_OK if state == "complete" else errors.EXIT_INFRASTRUCTURE
