"""What of the user's folders is sent to nodes: which files, how large they are, and their digest. Nodes are not asked.

Git says which files those are, in folders that are no work tree as well: it knows what a .gitignore means.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from runner.errors import InfrastructureError, UsageError, os_error_text
from runner.system import process, tree
from runner.system.places import cache_dir
from runner.system.wording import counted, size_text

LARGEST = 10**9  # bytes, 1 GB, that are sent without having been named
# What Python writes beside the sources differs at each run.
_NEVER = ("__pycache__/", ".git")
_GIT_S = 300.0


@dataclass(frozen=True)
class Folder:
    """A folder of the user whose files `paths` are sent. `within` is the working folder in it ("": itself).

    `option` is the one that named it, None: nobody did. `notes` are lines for the user.
    """

    root: Path
    paths: tuple[str, ...]
    within: str = ""
    option: str | None = None
    notes: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(self.sizes.values())

    def tree(self, on_progress: tree.Progress | None = None) -> tree.Tree:
        """Its files with their digests: they are read where they have changed since the last time.

        Raises UsageError for a file that cannot be read.
        """
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        try:
            return tree.measure(self.root, self.paths, cache_dir() / "trees" / f"{name}.json", on_progress)
        except OSError as error:
            raise UsageError(f"{self.option or 'the code'}: {os_error_text(error)}") from error

    def described(self) -> str:
        """What is sent, in one line: `/home/me/train: 31 files, 1.2 MiB`."""
        return f"{self.root}: {counted(len(self.paths), 'file')}, {size_text(self.bytes)}"


def of_script(words: Sequence[str], cwd: Path) -> Folder:
    """The code of the program that `words` start in the folder `cwd`: the Git work tree in which the script is, else
    its folder; where the first word is no file, what `cwd` is in.

    Raises UsageError where it is larger than LARGEST.
    """
    script = cwd / words[0] if words else cwd
    place = script.resolve().parent if script.is_file() and not _installed(words[0]) else cwd.resolve()
    if place != cwd.resolve() and cwd.resolve() in place.parents:
        place = cwd.resolve()  # `scripts/train.py` is started where it is expected to be
    root = work_tree(place) or place
    found = listed(root, _within(root, cwd))
    if found.bytes > LARGEST:
        raise UsageError(
            f"{found.described()}, of which {_heaviest(found)}: over 1 GB is only sent if it is named: "
            f"leave out what is no code (.gitignore), give data with --sync-data DIR, or add --sync {root}"
        )
    return found


def _installed(word: str) -> bool:
    """Whether the shell would look for the word in PATH, not here: a program of the system is not the user's code."""
    return "/" not in word and not word.endswith(".py")


def of_option(given: Path, cwd: Path) -> Folder:
    """The code in the folder that `--sync` names, without what its .gitignore leaves out."""
    root = _folder(given, "--sync")
    return listed(root, _within(root, cwd), "--sync")


def data_of(given: Path) -> Folder:
    """All files in the folder that `--sync-data` names, also those that Git ignores."""
    root = _folder(given, "--sync-data")
    try:
        paths = tree.walk(root)
    except OSError as error:
        raise UsageError(f"--sync-data {given}: {os_error_text(error)}") from error
    return _made(root, paths, "", "--sync-data", [])


def _folder(given: Path, option: str) -> Path:
    if not given.is_dir():
        raise UsageError(f"{option} {given}: there is no such folder; name one of this machine")
    return given.resolve()


def _within(root: Path, cwd: Path) -> str:
    """`cwd` as a path in `root`, "" where it is not in it."""
    here = cwd.resolve()
    return here.relative_to(root).as_posix() if root in here.parents else ""


def work_tree(folder: Path) -> Path | None:
    """The root of the Git work tree that `folder` is in; None where it is in none, or nothing but ignored there.

    Raises UsageError where Git refuses to read it.
    """
    try:
        outcome = _git(folder, "rev-parse", "--show-toplevel")
    except InfrastructureError:  # no git here
        return None
    if outcome.rc:
        if "dubious ownership" in outcome.stderr:
            raise UsageError(f"git: {outcome.stderr.splitlines()[0]}; name what is to be sent with --sync DIR")
        return None
    root = Path(outcome.stdout.removesuffix("\n"))
    ignored = root != folder and _git(folder, "check-ignore", "-q", ".").rc == 0
    return None if ignored else root


def listed(root: Path, within: str = "", option: str | None = None) -> Folder:
    """The files in `root` that Git would track: tracked ones and those that are not ignored, with submodules.

    Raises UsageError for files that cannot be read.
    """
    notes: list[str] = []
    try:
        paths = _tracked(root, notes)
    except InfrastructureError:
        if any((root / name).exists() for name in (".gitignore", ".git")):
            notes.append("git is not installed here: what .gitignore leaves out is sent as well")
        paths = [path for path in tree.walk(root) if not {"__pycache__", ".git"} & set(path.split("/"))]
    return _made(root, paths, within, option, notes)


def _made(root: Path, paths: Sequence[str], within: str, option: str | None, notes: list[str]) -> Folder:
    sizes: dict[str, int] = {}
    outside = []
    links = {path for path in paths if (root / path).is_symlink()}
    for path in sorted(set(paths)):
        if links and any(parent.as_posix() in links for parent in PurePosixPath(path).parents):
            continue  # tracked in a folder that has become a link here
        try:
            status = (root / path).lstat()
        except FileNotFoundError:  # tracked, and removed here
            continue
        except OSError as error:
            raise UsageError(f"{option or 'the code'}: {os_error_text(error)}") from error
        if stat.S_ISREG(status.st_mode):
            sizes[path] = status.st_size
        elif stat.S_ISLNK(status.st_mode):
            sizes[path] = 0
            if not (root / path).resolve().is_relative_to(root):
                outside.append(f"{path} -> {os.readlink(root / path)}")
    if outside:
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        notes.append(f"links lead out of {root}, nodes must have what they name: {', '.join(outside[:3])}{more}")
    return Folder(root, tuple(sizes), within, option, tuple(notes), sizes)


def _tracked(root: Path, notes: list[str], below: str = "") -> list[str]:
    """The paths in `root` of what Git tracks or would track below the folder `below` ("" or with a slash at its end).

    Raises InfrastructureError where git is not installed.
    """
    folder = root / below
    listing = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", *(f"--exclude={one}" for one in _NEVER))
    if work_tree(folder) is not None:
        outcome = _git(folder, *listing)
    else:  # an empty repository elsewhere takes it for its own
        with tempfile.TemporaryDirectory(prefix="shakedown-git-") as empty:
            _git(folder, "init", "-q", "--bare", empty, check=True)
            outcome = _git(folder, f"--git-dir={empty}", f"--work-tree={folder}", *listing)
    if outcome.rc:
        raise UsageError(f"git cannot list {folder}: {outcome.last_line}")
    found = []
    for name in filter(None, outcome.stdout.split("\0")):
        path = below + name.removesuffix("/")
        if (root / path).is_symlink() or not (root / path).is_dir():
            found.append(path)
        elif (root / path / ".git").exists():  # a submodule, or another repository in this one
            found += _tracked(root, notes, f"{path}/")
        else:
            notes.append(f"{path} is empty: it is a submodule that is not checked out (git submodule update --init)")
    return found


def _git(folder: Path, *arguments: str, check: bool = False) -> process.Outcome:
    """Git's answer in `folder`; its bytes are read as names of files are."""
    # A hook or another Git that called us must not say which repository is meant.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"LC_ALL": "C"}
    command = ["git", "-c", "core.quotePath=false", *arguments]
    return process.run(command, timeout_s=_GIT_S, env=env, cwd=str(folder), check=check, errors="surrogateescape")


def _heaviest(folder: Folder) -> str:
    """The three entries of the folder that weigh most, as text."""
    weight: dict[str, int] = {}
    for path, size in folder.sizes.items():
        first, slash, _ = path.partition("/")
        weight[first + slash] = weight.get(first + slash, 0) + size
    most = sorted(weight.items(), key=lambda one: -one[1])[:3]
    return ", ".join(f"{name} {size_text(size)}" for name, size in most)
