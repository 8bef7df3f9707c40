"""The environment of the lock `cpu-smoke`, with the real verl: made once, and kept by the lock's hash."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from role_modules import ROOT
from runner.workloads import rl

LOCK = ROOT / "roles" / "conda_env" / "files" / "profiles" / "cpu-smoke.txt"


def python() -> Path:
    """The Python of that environment, some 2 GB: made the first time (minutes). Raises LookupError where pip cannot."""
    digest = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:12]
    place = Path(sys.prefix, f"verl-{digest}")
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for the one that makes it
        if place.is_dir() and (place / "complete").exists():
            return place / "bin" / "python"
        shutil.rmtree(place, ignore_errors=True)  # what was interrupted
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        argv = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", LOCK]
        outcome = subprocess.run(argv, capture_output=True, text=True, timeout=900)
        if outcome.returncode:
            shutil.rmtree(place, ignore_errors=True)
            raise LookupError(f"pip has not all of {LOCK.name}: {(outcome.stderr.strip().splitlines() or [''])[-1]}")
        (place / "complete").touch()
    return place / "bin" / "python"


def run(code: str, plugin: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """That Python runs `code`, with this checkout to import from; with the environment of the plugin if `plugin`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "PYTHON"))}
    env = {**own, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    env.update(rl.ENVIRONMENT if plugin else {})
    return subprocess.run([python(), "-c", code], capture_output=True, text=True, env=env, timeout=timeout_s)
