"""Profiles on the controller: made once, for this machine and for nodes that see its files, and kept by their lock.

The role conda_env installs them on nodes that have files of their own.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cluster import environments, facts, pip
from runner.cluster.backends import BACKENDS
from runner.cluster.environments import (
    PROFILES,
    STAMP,
    Lock,
    fitting,
    installed,
    oldest_driver,
)
from runner.cluster.pip import OnProgress
from runner.cluster.profiles import LOCKS, ON_CPUS, lock, place
from runner.errors import InfrastructureError, unknown
from runner.system import folders, process
from runner.system.files import write_json_atomic

if TYPE_CHECKING:
    from runner.cluster.inventory import Node
    from runner.report.progress import Display

_NEEDED_GIB = {True: 20.0, False: 4.0}  # with and without CUDA's libraries; half of it while pip unpacks


@dataclass(frozen=True)
class Made:
    """A profile that is there: the path of its Python, the lock that it is of, and whether it had to be made."""

    python: Path
    lock: str
    changed: bool


def make(profile: str, on_progress: OnProgress = lambda done, total, text: None) -> Made:
    """Make `profile` unless it is whole; waits for another command that makes it.

    Raises InfrastructureError where this machine's driver, disk or pip cannot have it; then nothing is left of it.
    """
    folder, name = place(profile), _chosen(profile)
    python = folder / "bin" / "python"
    if not fault(profile):
        return Made(python, name, False)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with folders.alone(folder, on_wait=lambda: on_progress(0, 1, "waiting for another command that makes it")):
        if not fault(profile):
            return Made(python, name, False)
        _require_space(folder, name)
        try:
            _build(folder, name, on_progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return Made(python, name, True)


def wanted(nodes: Sequence[Node], variables: Mapping[str, Any], to_make: bool) -> dict[str, list[str]]:
    """By profile, the names of the nodes for which the controller has to have it.

    `variables` are those of this command, which take precedence. Where the inventory leaves it open, this machine has
    the profile for CPUs if it has no GPU: it is wanted `to_make` it, and misses nobody who has not made it. Raises
    UsageError for an unknown profile.
    """
    found: dict[str, list[str]] = {}
    for node in nodes:
        asked = variables.get("conda_env_further", node.profiles)
        if asked is None:
            alone = not BACKENDS[node.backend].remote and node.device != "cuda"
            alone = alone and (to_make or place(ON_CPUS).exists())
            asked = [ON_CPUS] if alone and not facts.gpus()["gpus"] else []
        for profile in asked:
            if profile not in LOCKS:
                raise unknown("profile", str(profile), LOCKS, "conda_env_further")
            if node.pythons.get(profile) == str(place(profile) / "bin" / "python"):
                found.setdefault(profile, []).append(node.name)
    return found


def settle(profiles: Iterable[str], display: Display, repair: bool) -> dict[str, tuple[str, bool]]:
    """By profile, why it is not usable ("" if it is) and whether it was made now; nothing is made without `repair`."""
    return {profile: _settled(profile, display, repair) for profile in profiles}


def _settled(profile: str, display: Display, repair: bool) -> tuple[str, bool]:
    if not repair:
        reason = fault(profile)
        return f"profile {profile} {reason} in {place(profile)}: run `runner setup`" if reason else "", False
    with display.progress(1.0):
        try:
            made = make(profile, lambda done, total, text: display.at(done, total, f"profile {profile}: {text}"))
        except InfrastructureError as error:
            return str(error), False
    if made.changed:
        display.note(f"profile {profile} is in {place(profile)}")
    return "", made.changed


def fault(profile: str) -> str:
    """Why `profile` is not usable on this machine as it is, in a few words; "" if it is."""
    return environments.fault(str(place(profile)))


def _chosen(profile: str) -> str:
    """The lock of `profile` that this machine's driver runs."""
    driver = facts.gpus()["driver"] or ""
    if found := fitting(driver, LOCKS[profile]):
        return found
    oldest = oldest_driver(PROFILES[LOCKS[profile][-1]])
    raise InfrastructureError(
        f"profile {profile} needs an NVIDIA driver >= {oldest} (lock {LOCKS[profile][-1]}), found "
        f"{driver or 'none'}: install a newer driver, or take the profile {ON_CPUS}",
        "driver_too_old",
    )


def _require_space(folder: Path, name: str) -> None:
    needed, free = _NEEDED_GIB[PROFILES[name] != "none"], shutil.disk_usage(folder.parent).free / 2**30
    if free < needed:
        raise InfrastructureError(
            f"{free:.1f} GiB free in {folder.parent}, {needed:g} GiB required for {name}: free some space there, or "
            "set XDG_CACHE_HOME to another disk",
            "disk_full",
        )


def _build(folder: Path, name: str, on_progress: OnProgress) -> None:
    pins = Lock(lock(name).read_text())
    shutil.rmtree(folder, ignore_errors=True)  # what was interrupted, or has changed
    on_progress(0, 2 * len(pins.lines), "creating the environment")
    env = pip.settings()
    process.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], timeout_s=300, env=env, check=True)
    # Only builds of another index have a local version, such as torch's for CPUs; a mirror may have them as well.
    built = [line for package, line in pins.lines.items() if "+" in pins.pins[package]]
    if built and (reason := _pip(folder, built, len(pins.lines), env, on_progress)):
        if pins.index:
            reason = _pip(folder, built, len(pins.lines), env, on_progress, "--extra-index-url", pins.index)
        if reason:
            raise InfrastructureError(f"pip cannot install the lock {name}: {reason}", "environment_missing")
    rest = [line for line in pins.lines.values() if line not in built]
    if reason := _pip(folder, rest, len(pins.lines), env, on_progress):
        raise InfrastructureError(f"pip cannot install the lock {name}: {reason}", "environment_missing")
    packages = installed(str(folder))
    missing = [pin for pin in pins.pins if pin not in pins.conditional and pin not in packages]
    if missing:
        raise InfrastructureError(f"pip left out {', '.join(missing)} of the lock {name}", "environment_missing")
    version = "{}.{}.{}".format(*sys.version_info[:3])
    content = {"hash": folder.name.rpartition("-")[2], "lock_sha256": pins.sha256, "profile": name}
    write_json_atomic(folder / STAMP, {**content, "manager": "venv", "python": version, "packages": packages})


def _pip(
    folder: Path, lines: Sequence[str], total: int, env: Mapping[str, str], on_progress: OnProgress, *words: str
) -> str:
    """Install the requirements `lines`, a part of `total`, in the environment `folder`; returns why that failed."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{line}\n" for line in lines))
    arguments = ["--no-deps", *words, "--requirement", str(requirements)]
    if reason := pip.install(folder, arguments, env, on_progress, total):
        return reason
    requirements.unlink()
    return ""
