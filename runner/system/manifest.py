"""The manifest of an artefact: `manifest.json` in its folder, with the size and SHA-256 of every file.

It is written last and atomically, so a folder that has one is complete. Hidden files and folders, those of version
control and of downloads, are no part of an artefact. Ranks on nodes use this as well: the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from runner.system.files import write_json_atomic
from runner.system.folders import alone, replacing

NAME = "manifest.json"
SCHEMA = 1
_BLOCK = 1 << 22

# Called with (bytes done, bytes in total).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class File:
    """One file of an artefact: its path in the folder with slashes, its size in bytes, its SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of an artefact in the order of their paths; `about` is what else its maker recorded, as JSON has it."""

    files: tuple[File, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 over paths and contents, in hexadecimal: `about` is no part of it."""
        return hashlib.sha256(json.dumps([astuple(file) for file in self.files]).encode()).hexdigest()


def paths(folder: Path) -> list[Path]:
    """The files of an artefact, also those behind links, in a fixed order. Raises OSError."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path != folder / NAME), key=lambda path: path.relative_to(folder).parts)


def _raise(error: OSError) -> None:
    raise error


def measure(
    folder: Path,
    about: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    known: Callable[[Path, os.stat_result], str | None] = lambda path, status: None,
) -> Manifest:
    """The manifest of what is in `folder`, which is read; nothing is written.

    `known` may say a file's SHA-256, then it is not read. Raises OSError.
    """
    there = [(path, path.stat()) for path in paths(folder)]
    total, done, files = sum(status.st_size for _, status in there), 0, []
    for path, status in there:
        sha256 = known(path, status) or _sha256(path, done, total, on_progress)
        files.append(File(path.relative_to(folder).as_posix(), status.st_size, sha256))
        done += status.st_size
    return Manifest(tuple(files), dict(about or {}))


def _sha256(path: Path, before: int, total: int, on_progress: Progress | None) -> str:
    """The SHA-256 of a file; `before` of `total` bytes have been read."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
            before += len(block)
            if on_progress is not None:
                on_progress(min(before, total), total)
    return digest.hexdigest()


def save(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder`, atomically. Raises OSError."""
    value = {"schema": SCHEMA, "digest": manifest.digest, **asdict(manifest)}
    write_json_atomic(folder / NAME, value)


def write(folder: Path, about: Mapping[str, Any] | None = None, on_progress: Progress | None = None) -> Manifest:
    """Measure what is in `folder` and write its manifest there: the last step of whoever makes an artefact.

    Raises OSError.
    """
    manifest = measure(folder, about, on_progress)
    save(folder, manifest)
    return manifest


def made(
    folder: Path,
    build: Callable[[Path], Mapping[str, Any] | None],
    locks: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[Manifest, bool]:
    """The manifest of the complete artefact in `folder`, and whether it was made now: by `build`, which fills the
    folder that it is called with and returns what the manifest is to say `about` it.

    One process at a time makes it; `locks` as in `folders.alone`, `on_progress` of reading what was made. Raises
    OSError.
    """
    if found := complete(folder):
        return found, False
    with alone(folder, locks):
        if found := complete(folder):  # made by another process while this one waited
            return found, False
        with replacing(folder) as temporary:
            manifest = write(temporary, build(temporary), on_progress)
            temporary.chmod(0o755)  # others read it on nodes
        return manifest, True


def copy(source: Path, files: Sequence[File], target: Path, on_progress: Progress | None = None) -> None:
    """Copy these files of the folder `source` into the folder `target`, which is there. Raises OSError."""
    total, done = sum(file.bytes for file in files), 0
    for file in files:
        place = target / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(source / file.path, "rb") as opened, open(place, "wb") as written:
            while block := opened.read(_BLOCK):
                written.write(block)
                done += len(block)
                if on_progress is not None:
                    on_progress(min(done, total), total)


def read(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None where there is none, or it is not one."""
    try:
        value = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files = tuple(File(str(one["path"]), int(one["bytes"]), str(one["sha256"])) for one in value["files"])
        manifest = Manifest(files, dict(value["about"]))
        return manifest if value["schema"] == SCHEMA and value["digest"] == manifest.digest else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def complete(folder: Path) -> Manifest | None:
    """The manifest in `folder` if every file is there in its size; None otherwise. No file is read."""
    manifest = read(folder)
    return manifest if manifest is not None and next(_sizes(folder, manifest), None) is None else None


def faults(folder: Path, manifest: Manifest, on_progress: Progress | None = None) -> Iterator[str]:
    """How `folder` differs from `manifest`, a line a file: `model.safetensors has 12 bytes, not 98`. Files are read.

    Files that the manifest does not have are none. Raises OSError.
    """
    odd = dict(_sizes(folder, manifest))
    yield from odd.values()
    done = 0
    for file in manifest.files:
        if file.path not in odd and _sha256(folder / file.path, done, manifest.bytes, on_progress) != file.sha256:
            yield f"{file.path} has another content"
        done += file.bytes


def _sizes(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of files that are not there in their size."""
    for file in manifest.files:
        try:
            size = (folder / file.path).stat().st_size
        except OSError:
            yield file.path, f"{file.path} is missing"
            continue
        if size != file.bytes:
            yield file.path, f"{file.path} has {size} bytes, not {file.bytes}"
