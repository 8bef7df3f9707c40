"""The folders of a user on a node: code and data, once each, and the copy of the code in which a run works.

`code/<digest>` and `data-sets/<digest>` in the scratch folder are called by the digest of what they hold, so each says
itself whether it is right. They arrive in `<digest>.incoming` beside their place and are renamed when they are whole;
nothing writes into them afterwards. Those that were not used for long are removed, except where a lock says that one is
in use. Only the standard library: nodes have no more.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runner.errors import disk_full
from runner.node.protocol import Stored
from runner.node.requests import StoreRequest
from runner.system import tree
from runner.system.files import write_json_atomic
from runner.system.folders import alone, replacing, use_of

KEPT = 8  # folders of a kind that are kept however long they were not used
UNUSED_S = 7 * 24 * 3600.0  # one that was used since is kept as well: a job may wait for it in a queue

_DIGEST = re.compile(r"[0-9a-f]{64}")
_INCOMING = ".incoming"
_BLOCK = 1 << 22
_FICLONE = 0x40049409  # ioctl_ficlone(2)
# What nobody is to write into; an owner that is not root is kept from it.
_FILE, _PROGRAM = 0o444, 0o555


def store(request: StoreRequest, locks: Path | None = None) -> Stored:
    """Whether this node has the folder whole, after what has arrived was put in its place; and the working copy of it,
    if one is asked for. What cannot be done is said in the answer. `locks` as in `folders.alone`.
    """
    folder = Path(request.root, request.digest)
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with alone(folder, locks):
            there = tree.measure(folder, None, _beside(folder, ".sums")) if folder.is_dir() else None
            if there is None or there.digest != request.digest:
                if not request.arrived:
                    return Stored(whole=False, found=there.digest if there else "")
                there = _arrived(folder)
                if there is None or there.digest != request.digest:
                    return Stored(whole=False, found=there.digest if there else "")
            _remove(incoming(folder))
            use_of(folder).touch()
            if request.work:
                work(folder, there, Path(request.work), locks)
        _clean(folder)
    except OSError as error:
        full = disk_full(error)
        text = f"no space is left for {folder}" if full else f"{error.filename or folder}: {error.strerror}"
        return Stored(problem=text, kind="disk_full" if full else "not_permitted")
    return Stored(whole=True, found=request.digest)


def _arrived(folder: Path) -> tree.Tree | None:
    """What has arrived for `folder`: it takes its place if it is right, and is removed otherwise."""
    new = incoming(folder)
    if not new.is_dir():
        return None
    for each in _files(new):  # before it is read, since this is a change as well
        each.chmod(_PROGRAM if each.stat().st_mode & 0o100 else _FILE)
    found = tree.measure(new, None, _beside(folder, ".sums"))
    if found.digest != folder.name:
        _remove(new)
        return found
    old = _beside(folder, ".unfit")
    _remove(old)
    if folder.exists():
        folder.rename(old)  # a process that reads it goes on with what it has opened
    new.rename(folder)
    _remove(old)
    return found


def work(folder: Path, there: tree.Tree, target: Path, locks: Path | None = None) -> None:
    """Make `target` the working copy of the code in `folder`, whose tree is `there`.

    One that is there is kept with all that was written into it; of other code, its files are replaced. Raises OSError.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = _beside(target, ".code")
    with alone(target, locks):
        if not target.is_dir():
            with replacing(target) as temporary:
                _copy(folder, there, temporary)
                write_json_atomic(record, there.to_json())
            return
        before = _recorded(record)
        if before is not None and before.digest == there.digest:
            return
        for entry in before.entries if before is not None else ():
            (target / entry.path).unlink(missing_ok=True)
        _copy(folder, there, target)
        write_json_atomic(record, there.to_json())


def _recorded(record: Path) -> tree.Tree | None:
    try:
        return tree.Tree.from_json(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _copy(folder: Path, there: tree.Tree, target: Path) -> None:
    """Copy the files of a folder, without their data where the file system can share it; they can be written."""
    for entry in there.entries:
        source, place = folder / entry.path, target / entry.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        if entry.link is not None:
            place.symlink_to(entry.link)
            continue
        with open(source, "rb") as read, open(place, "xb") as written:
            try:
                fcntl.ioctl(written, _FICLONE, read.fileno())
            except OSError:
                shutil.copyfileobj(read, written, _BLOCK)
        place.chmod(0o755 if entry.executable else 0o644)


def incoming(folder: Path) -> Path:
    """Where what is sent for the stored `folder` arrives."""
    return folder.with_name(folder.name + _INCOMING)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}{suffix}")


def _files(folder: Path) -> Iterator[Path]:
    for path in tree.walk(folder):
        if not (folder / path).is_symlink():
            yield folder / path


def _clean(new: Path) -> None:
    """Remove the folders beside `new` that were not used for longest, beyond KEPT, and not since UNUSED_S. One that
    another process uses or makes stays, and one that cannot be removed does no harm.
    """
    with suppress(OSError):
        dated = {}
        for each in new.parent.iterdir():
            if each.name.endswith(_INCOMING) and time.time() - each.stat().st_mtime > UNUSED_S:
                _remove(each)  # nobody has gone on with it
            if _DIGEST.fullmatch(each.name) and each != new and use_of(each).exists():
                dated[each] = use_of(each).stat().st_mtime
        for old in sorted(dated, key=lambda each: -dated[each])[KEPT - 1 :]:
            if time.time() - dated[old] > UNUSED_S:
                _drop(old)


def _drop(folder: Path) -> None:
    with open(use_of(folder), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use
            return
        gone = _beside(folder, ".unfit")
        _remove(gone)
        folder.rename(gone)  # at once: whoever comes next finds all of it or nothing
        _remove(gone)
        use_of(folder).unlink(missing_ok=True)
        _beside(folder, ".sums").unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
