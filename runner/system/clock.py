"""The timestamp format that every file of a run uses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def now(ago_s: float = 0.0) -> str:
    """The UTC time `ago_s` seconds ago as text, such as `2026-01-31T23:59:59Z`."""
    return (datetime.now(UTC) - timedelta(seconds=ago_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
