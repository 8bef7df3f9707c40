"""Where the product's own files are, and where it keeps its cache and its state.

The own files lie around the package in a checkout, and inside it in an installed wheel: `setup.py` packs them
as `runner/_files`, arranged as in a checkout. Whatever reads or plays them asks here, and writes nothing there: an
installed package may belong to somebody else.
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
    """The inventory that `source` names: a path, or a plain word for one in ./inventory or among the product's own.

    Returns the path as it was given where it exists, so that a file or folder of the user's goes first; None where
    there is nothing of this name.
    """
    path = Path(source)
    if path.exists():
        return path
    if not _WORD.fullmatch(source) or source in (".", ".."):
        return None
    places = (Path("inventory", source), root / "inventory" / source)
    return next((place for place in places if place.exists()), None)


def inventories(root: Path = ROOT) -> list[str]:
    """The plain words that `inventory` knows here, sorted."""
    folders = (Path("inventory"), root / "inventory")
    return sorted({hosts.parent.name for folder in folders for hosts in folder.glob("*/hosts.y*ml")})


def cache_dir() -> Path:
    """The folder for what can be made again: read inventories, prepared data, how long tasks took."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shakedown"


def state_dir() -> Path:
    """The folder for what must outlive a command: locks, and which testbeds were started."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "shakedown"
