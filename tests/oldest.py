"""The oldest transformers that a lock of the role `conda_env` has, to import instead of the one that is installed."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import tempfile
from pathlib import Path

from role_modules import ROOT
from runner.system import process

locks = importlib.import_module("ansible.module_utils.environments")
# What it needs in another version than the installed one does, or beside it.
WITH = ("tokenizers", "huggingface-hub", "requests", "urllib3", "certifi", "charset-normalizer")


def lock() -> locks.Lock:
    """The lock of this role's with the oldest transformers."""
    every = [locks.Lock(path.read_text()) for path in (ROOT / "roles/conda_env/files/profiles").glob("*.txt")]
    return min(every, key=lambda lock: [int(part) for part in lock.pins["transformers"].split(".")])


def transformers() -> Path:
    """A folder for PYTHONPATH with it, some 90 MB. pip fills it the first time (seconds), beside the packages of Python.

    Raises LookupError where pip cannot get it.
    """
    pins = [lock().lines[name] for name in ("transformers", *WITH)]
    place = Path(sys.prefix, "oldest-" + hashlib.sha256("\n".join(pins).encode()).hexdigest()[:12])
    if place.is_dir():
        return place
    with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
        argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{scratch}/site", *pins]
        outcome = process.run(argv, timeout_s=300)
        if outcome.rc:
            raise LookupError(f"pip has no {' '.join(pins)}: {outcome.stderr.strip().splitlines()[-1]}")
        try:
            os.rename(f"{scratch}/site", place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise
    return place
