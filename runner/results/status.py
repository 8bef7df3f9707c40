"""The states of a run and of its cells, as status.json has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FINAL_STATES = ("complete", "failed", "cancelled", "incomplete")


LIVE_STATES = ("waiting", "running")  # of a cell whose controller lives


def cell_status(attempt: int, attempts: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A cell's entry in status.json before its `attempt`; `attempts` are the earlier ones.

    `plan_hash` is that of the plan which a complete cell was measured by, `job` what Slurm says of its job,
    `nodes` the live state of each.
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
    }
