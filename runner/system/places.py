"""Paths of the product's own files, of its cache and of its state.

The product's files are beside the package in a checkout, and inside it in an installed wheel: `setup.py` packs them
as `runner/_files`, arranged as in a checkout. All code gets their paths from this module and treats them as
read-only: an installed package may belong to another user.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

# The folder of the package `runner`, and the one from which it is imported.
PACKAGE = Path(__file__).resolve().parents[1]
IMPORT_ROOT = PACKAGE.parent

_WORD = re.compile(r"[^/\x00]+")


def find_root(package: Path) -> Path:
    """The folder with configs/, roles/, site.yml and so on, for the package `runner` in the folder `package`."""
    packed = package / "_files"
    return packed if packed.is_dir() else package.parent


# On a node, whose environment holds the package alone, none of these exists: opening a file fails.
ROOT = find_root(PACKAGE)
ANSIBLE_CFG = ROOT / "ansible.cfg"
CONFIGS = ROOT / "configs"
INVENTORIES = ROOT / "inventory"
ROLES = ROOT / "roles"
TESTBED = ROOT / "testbed"


def inventory(source: str, root: Path = ROOT) -> Path | None:
    """The path of the inventory `source`: a path, or a plain name in ./inventory or in the product's own folder.

    Returns the given path where it exists, so that the user's file or folder takes precedence; None where nothing has
    this name.
    """
    path = Path(source)
    if path.exists():
        return path
    if not _WORD.fullmatch(source) or source in (".", ".."):
        return None
    places = (Path("inventory", source), root / "inventory" / source)
    return next((place for place in places if place.exists()), None)


def inventories(root: Path = ROOT) -> list[str]:
    """The plain names that `inventory` accepts in the current folder, sorted."""
    folders = (Path("inventory"), root / "inventory")
    return sorted({hosts.parent.name for folder in folders for hosts in folder.glob("*/hosts.y*ml")})


def cache_dir() -> Path:
    """The folder for data that can be recreated: parsed inventories, prepared data, durations of tasks."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shakedown"


def state_dir() -> Path:
    """The folder for state that must outlive a command: locks, records of running testbeds."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "shakedown"
