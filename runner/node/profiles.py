"""Checks the Python of a profile on this node: whole, of the right lock, for this driver, and able to start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from runner.cluster import environments
from runner.errors import InfrastructureError
from runner.node.requests import ProfileCheck
from runner.system import process

_PROBE_S = 60.0  # a Python on a cold or distant disk


def problems(profile: ProfileCheck, driver: str, environment: Mapping[str, str] = os.environ) -> list[tuple[str, str]]:
    """Why ranks cannot run in `profile` on this node, as (kind, one line).

    `driver` is the version of NVIDIA's driver, "" for none; in `environment` its Python is started.
    """
    names = list(profile.locks.values())
    if names and not environments.fitting(driver, names):
        oldest = environments.oldest_driver(environments.PROFILES[names[-1]])
        text = f"profile {profile.name} ({names[-1]}) needs an NVIDIA driver >= {oldest}, found {driver or 'none'}"
        return [("driver_too_old", f"{text}: install a newer one")]
    prefix = str(Path(profile.python).parents[1])
    if profile.locks and (reason := environments.fault(prefix, profile.locks)):
        return [("environment_missing", f"profile {profile.name} {reason} in {prefix}: {profile.remedy}")]
    if profile.locks:
        name = environments.stamp(prefix)["profile"]
        if not environments.fitting(driver, [name]):
            oldest = environments.oldest_driver(environments.PROFILES[name])
            text = f"profile {profile.name} has the lock {name}, for a driver >= {oldest}, found {driver or 'none'}"
            return [("driver_too_old", f"{text}: {profile.remedy}")]
    try:
        missing = _lacks(profile, environment)
    except (InfrastructureError, ValueError) as error:
        text = f"profile {profile.name}: {profile.python} gives no answer ({error}): {profile.remedy}"
        return [("environment_missing", text)]
    if missing:
        text = f"profile {profile.name}: {profile.python} lacks {', '.join(missing)}: {profile.remedy}"
        return [("environment_missing", text)]
    return []


_PROBE = """
import importlib.util, sys
print("lacks", *(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
"""


def _lacks(profile: ProfileCheck, environment: Mapping[str, str]) -> list[str]:
    """The packages that its Python does not find, which takes no import of them.

    Raises InfrastructureError where it does not start, ValueError where it ends badly.
    """
    env = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    outcome = process.run([profile.python, "-c", _PROBE, *profile.packages], timeout_s=_PROBE_S, env=env)
    word, *missing = outcome.stdout.split() or [""]
    if outcome.rc != 0 or word != "lacks":
        raise ValueError(outcome.last_line or f"status {outcome.rc}")
    return missing
