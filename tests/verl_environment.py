"""The profile `cpu-smoke`, with the real verl, as the product makes it: once, and kept by its lock."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from role_modules import ROOT
from runner.errors import InfrastructureError
from runner.provision import profiles
from runner.workloads import rl


def python() -> Path:
    """The Python of that profile, some 2 GB: made the first time (minutes). Raises LookupError where pip cannot."""
    try:
        return profiles.make("cpu-smoke").python
    except InfrastructureError as error:
        raise LookupError(str(error)) from None


def run(code: str, plugin: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """That Python runs `code`, with this checkout to import from; with the environment of the plugin if `plugin`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "PYTHON"))}
    env = {**own, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    env.update(rl.ENVIRONMENT if plugin else {})
    return subprocess.run([python(), "-c", code], capture_output=True, text=True, env=env, timeout=timeout_s)
