"""The timestamp format that every file of a run uses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def now(ago_s: float = 0.0) -> str:
    """The UTC time `ago_s` seconds ago as text, such as `2026-01-31T23:59:59Z`."""
    return _text(datetime.now(UTC) - timedelta(seconds=ago_s))


def at(epoch_s: float) -> str:
    """The UTC time `epoch_s` seconds after 1970 began, in the same form."""
    return _text(datetime.fromtimestamp(epoch_s, UTC))


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
