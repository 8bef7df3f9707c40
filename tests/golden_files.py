"""Whole-file comparison with recorded outputs.

A difference prints the diff; a missing file fails. Re-record with `RECORD=1 make unit`, then read the diff.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("RECORD") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no golden {path}: record it with RECORD=1 make unit"
    expected = path.read_text()
    diff = "".join(difflib.unified_diff(expected.splitlines(True), text.splitlines(True), str(path), "now", n=2))
    assert text == expected, f"differs from its golden (RECORD=1 re-records it):\n{diff}"
