"""Profiles: Python environments beside a node's own, whose packages would not go together with those of the others.

Each is a lock of the role conda_env, or a choice of one by the driver. Only a cell's ranks run in it
(`Cell.profile`); agents, and cells without a profile, have the node's own Python.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath

from runner.cluster.environments import CHOICES, Lock
from runner.system import places

# By profile, the locks of which one is installed, in the order in which a driver chooses: the first that it runs.
LOCKS: Mapping[str, tuple[str, ...]] = {"cpu-smoke": ("cpu-smoke",), "gpu-vllm": CHOICES["gpu-vllm"]}
ON_CPUS = "cpu-smoke"
# The packages of a profile that a site which installs them itself has to have.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "cpu-smoke": ("ray", "torch", "transformers", "verl"),
    "gpu-vllm": ("ray", "torch", "transformers", "verl", "vllm"),
}
PREFIX = "/opt/shakedown/env"  # of role conda_env, where the inventory sets none


def lock(name: str) -> Path:
    """The path on the controller of the role's lock `name`."""
    return places.ROLES / "conda_env" / "files" / "profiles" / f"{name}.txt"


def place(profile: str) -> Path:
    """Where the controller has `profile`, for itself and for nodes that see its files: another lock, another place."""
    made_from = hashlib.sha256(sys.version.encode())
    for name in LOCKS[profile]:
        made_from.update(lock(name).read_bytes())
    return folder() / f"{profile}-{made_from.hexdigest()[:12]}"


def locks(profile: str) -> dict[str, str]:
    """The names of the locks of which `profile` is installed, by the SHA-256 of their texts."""
    return {Lock(lock(name).read_text()).sha256: name for name in LOCKS[profile]}


def is_of_setup(profile: str, python: str) -> bool:
    """Whether `runner setup` makes the environment with the Python `python` for `profile`."""
    return python == str(place(profile) / "bin" / "python") or python.endswith(f"-{profile}/bin/python")


def folder() -> Path:
    """The controller's folder of profiles."""
    return places.cache_dir() / "profiles"


def pythons(python: str, prefix: str | None, main: str | None, declared: Mapping[str, str]) -> dict[str, str]:
    """The path of each profile's Python on a node with the Python `python`.

    `prefix` and `main` are conda_env_prefix and conda_env_profile, None where the inventory leaves them open;
    `declared` are those that it names itself, of other profiles too. Who has the controller's Python sees its profiles
    as well; a Python that the role has not installed is a site's own, and has what the site put there.
    """
    ours = PurePath(prefix or PREFIX)
    found = {}
    for profile in LOCKS:
        if main in (profile, *LOCKS[profile]):
            found[profile] = python
        elif PurePath(python).parent == ours / "bin":
            found[profile] = f"{ours}-{profile}/bin/python"
        elif PurePath(python).parent == PurePath(sys.executable).parent:
            found[profile] = str(place(profile) / "bin" / "python")
        else:
            found[profile] = python
    return {**found, **declared}
