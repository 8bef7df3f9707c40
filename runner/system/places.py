"""Where the product's own files are, and where it keeps its cache and its state."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
ROLES = ROOT / "roles"
TESTBED = ROOT / "testbed"


def cache_dir() -> Path:
    """What can be made anew: read inventories, prepared data, how long tasks took."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shakedown"


def state_dir() -> Path:
    """What must outlive a command: locks, and what testbeds were started."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "shakedown"
