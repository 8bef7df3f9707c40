"""The states of a run and of its cells in status.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

FINAL_STATES = ("complete", "failed", "cancelled", "incomplete")


LIVE_STATES = ("waiting", "running")  # of a cell whose controller is alive


def cell_status(attempt: int, attempts: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The entry of a cell in status.json before attempt number `attempt`; `attempts` are the earlier entries.

    `plan_hash` identifies the plan with which a complete cell was measured, `job` is Slurm's description of its job,
    `nodes` the live state of each node, and `phases` the seconds of each phase of a complete cell.
    """
    return {
        "state": "planned",
        "started": None,
        "ended": None,
        "error": None,
        "attempt": attempt,
        "attempts": list(attempts),
        "hosts": [],
        "plan_hash": None,
        "job": None,
        "nodes": {},
        "progress": None,
        "phases": {},
    }


def joined(errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One error of `errors`, at least one, each of another node: the first, with the others in `also`."""
    first, *others = (alone for one in errors for alone in each_error(one))
    return {**first, "also": others} if others else first


def each_error(error: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The errors in an error of a cell, one for each node that failed; empty for None."""
    if not error:
        return []
    alone = {key: value for key, value in error.items() if key != "also"}
    return [alone, *(dict(other) for other in error.get("also", ()))]


def took_s(entry: Mapping[str, Any], now: datetime | None = None) -> float | None:
    """Seconds from the start of a cell's last attempt to its end, or to `now`; None where one of them is not known."""
    ended = datetime.fromisoformat(entry["ended"]) if entry.get("ended") else now
    if not entry.get("started") or ended is None:
        return None
    return (ended - datetime.fromisoformat(entry["started"])).total_seconds()
