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
    `nodes` the live state of each node, and `phases` the seconds of each phase of a complete cell. `queued_s` are the
    seconds that its jobs waited in a queue until `queued_since`, when the last wait began that has not ended. `used` is
    what its ranks chose, by setting, and `inputs` what a cell of a chain is made from, by name, as digests. `exit_code`
    is that of a user's program, None where none has ended.
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
        "used": {},
        "inputs": {},
        "exit_code": None,
        "queued_s": 0.0,
        "queued_since": None,
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
    """Seconds from the start of a cell's last attempt to its end, or to `now`, without those in a queue; None where
    one of the two moments is not known.
    """
    ended = datetime.fromisoformat(entry["ended"]) if entry.get("ended") else now
    if not entry.get("started") or ended is None:
        return None
    return max(0.0, (ended - datetime.fromisoformat(entry["started"])).total_seconds() - queued_s(entry, ended))


def queued_s(entry: Mapping[str, Any], now: datetime | None = None) -> float:
    """Seconds that the jobs of a cell's last attempt have waited in a queue, up to `now` if one waits."""
    since = entry.get("queued_since")
    waits = max(0.0, (now - datetime.fromisoformat(since)).total_seconds()) if since and now else 0.0
    return float(entry.get("queued_s") or 0.0) + waits


def note_queue(entry: dict[str, Any], waits: bool, at: str) -> None:
    """Record in a cell's entry that from `at` (ISO time) on its job waits in a queue, or no longer does."""
    if waits:
        entry["queued_since"] = entry["queued_since"] or at
    else:
        entry.update(queued_s=queued_s(entry, datetime.fromisoformat(at)), queued_since=None)
