"""A folder as it is sent: its files with paths, modes and contents, and one digest over them.

Unlike an artefact (`manifest`) it may hold hidden files and symbolic links, and nothing is written into it: a copy is
right if its own digest is the one by which it is called. Nodes use this as well: the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

from runner.system.files import write_text_atomic

_BLOCK = 1 << 22
# A file that was changed so shortly before it was read may change again without a later time of change.
_SETTLED_S = 1.0

# Called with (bytes done, bytes in total).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """One file or symbolic link: its path in the folder with slashes, whether it is executable, its size in bytes, and
    its SHA-256 in hexadecimal, or, of a link, where it leads (`link`). Names that are no UTF-8 are surrogate-escaped.

    Of a mode only what Git keeps counts: the others depend on who copies.
    """

    path: str
    executable: bool
    bytes: int
    sha256: str
    link: str | None = None


@dataclass(frozen=True)
class Tree:
    """The files and links of a folder in the order of their paths. Empty folders are no part of it, as in Git."""

    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def digest(self) -> str:
        """SHA-256 over paths, modes and contents, in hexadecimal."""
        text = json.dumps([astuple(entry) for entry in self.entries])  # ASCII, so any name can be encoded
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> list[list[Any]]:
        """A JSON value from which `from_json` makes the tree."""
        return [list(astuple(entry)) for entry in self.entries]

    @classmethod
    def from_json(cls, value: Iterable[Sequence[Any]]) -> Tree:
        """The tree in what `to_json` returned. Raises TypeError for another value."""
        return cls(tuple(Entry(*one) for one in value))

    def changes(self, other: Tree) -> list[str]:
        """The paths whose entries differ between this tree and the `other`, in order."""
        mine, its = ({entry.path: entry for entry in tree.entries} for tree in (self, other))
        return sorted(path for path in mine.keys() | its.keys() if mine.get(path) != its.get(path))


def walk(folder: Path) -> list[str]:
    """The paths of all files and links in `folder`, without what is neither (sockets, pipes). Raises OSError."""
    found: list[str] = []
    todo = [""]
    while todo:
        below = todo.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                path = f"{below}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    todo.append(f"{path}/")
                elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                    found.append(path)
    return sorted(found)


def measure(
    folder: Path, paths: Iterable[str] | None = None, cache: Path | None = None, on_progress: Progress | None = None
) -> Tree:
    """The tree of these `paths` in `folder` (None: of all); each is a file or a link there.

    `cache` is a file with the digests of an earlier call: a file whose size, times and inode have not changed is not
    read again. Raises OSError.
    """
    there = [(path, (folder / path).lstat()) for path in sorted(set(walk(folder) if paths is None else paths))]
    total, done = sum(status.st_size for _, status in there if stat.S_ISREG(status.st_mode)), 0
    known, kept = _cached(cache), dict[str, list[Any]]()
    entries = []
    for path, status in there:
        if stat.S_ISLNK(status.st_mode):
            entries.append(Entry(path, False, 0, "", os.readlink(folder / path)))
            continue
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        before, settled = known.get(path), time.time() - status.st_ctime > _SETTLED_S
        if before is not None and before[:-1] == mark:
            size, sha256 = status.st_size, str(before[-1])
        else:
            size, sha256 = _sha256(folder / path)
        if settled:
            kept[path] = [*mark, sha256]
        done += status.st_size
        if on_progress is not None:
            on_progress(done, total)
        entries.append(Entry(path, bool(status.st_mode & stat.S_IXUSR), size, sha256))
    if cache is not None and kept != known:
        with suppress(OSError):  # it only saves time
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(cache, json.dumps(kept))
    return Tree(tuple(entries))


def _cached(cache: Path | None) -> dict[str, list[Any]]:
    try:
        value = json.loads(cache.read_text(encoding="utf-8")) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _sha256(path: Path) -> tuple[int, str]:
    """The size and the SHA-256 of a file, of the same reading."""
    digest, size = hashlib.sha256(), 0
    # A link that has come into the place of the file since is not followed.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def write_zip(folder: Path, tree: Tree, target: IO[bytes]) -> None:
    """Write the files of `tree`, which are in `folder`, as a zip: of one tree always the same bytes.

    Raises OSError, and ValueError for a link: systems that take a zip in place of rsync have none.
    """
    with zipfile.ZipFile(target, "w") as archive:
        for entry in tree.entries:
            if entry.link is not None:
                raise ValueError(f"{entry.path} is a symbolic link")
            # What zlib makes of a file depends on its version.
            info = zipfile.ZipInfo(entry.path, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # modes as on Unix
            info.external_attr = (stat.S_IFREG | (0o755 if entry.executable else 0o644)) << 16
            with open(folder / entry.path, "rb") as opened, archive.open(info, "w", force_zip64=True) as written:
                while block := opened.read(_BLOCK):
                    written.write(block)
