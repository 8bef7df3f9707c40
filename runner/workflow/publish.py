"""A trained model taken to where others find it: to a folder, to the Hugging Face hub, or by rsync; then read back.

A target is `dir:PATH`, `hf:OWNER/NAME` or `rsync:[[USER@]HOST:]PATH`. Only a model that was loaded and asked a question
after it was merged is published, and never over something else.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import InfrastructureError, RunnerError, UsageError, disk_kind, os_error_text, unknown
from runner.system import manifest, process
from runner.system.manifest import File, Manifest
from runner.system.places import cache_dir
from runner.system.wording import counted
from runner.workflow.progress import Progress, told
from runner.workloads.data import hub

FORMS = "dir:PATH, hf:OWNER/NAME or rsync:[[USER@]HOST:]PATH"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HOST = re.compile(r"(?:[A-Za-z_][\w.-]*@)?[A-Za-z0-9][\w.-]*", re.ASCII)
_TIMEOUT_S = 6 * 3600.0  # of a transfer
_SILENCE_S = 60  # without a byte
_PARTIAL = 23  # rsync's status where something was not transferred, such as a folder that is not there
_RSYNC = "write rsync:[[USER@]HOST:]PATH"


@dataclass(frozen=True)
class Published:
    """Where a model is now, as text for the user, how many bytes it has there, and the digest of its manifest."""

    where: str
    bytes: int
    digest: str


def check(target: str) -> None:
    """Refuse a target that could not be published to, before anything runs. Nothing is contacted.

    Raises UsageError.
    """
    kind, rest = _split(target)
    _KINDS[kind].check(rest)


def publish(model: Path, target: str, on_progress: Progress | None = None) -> Published:
    """Publish the folder `model` to `target`; where the same is there already, it remains.

    Raises UsageError for a model that was not loaded and asked a question after it was merged, and for a target that
    holds something else; InfrastructureError where it cannot be reached or written, or does not read back the same.
    """
    kind, rest = _split(target)
    _KINDS[kind].check(rest)
    content = _judged(model, on_progress)
    where = _KINDS[kind].send(model, content, rest, on_progress)
    return Published(where, content.bytes, content.digest)


def _split(target: str) -> tuple[str, str]:
    kind, colon, rest = target.partition(":")
    if not colon:
        raise UsageError(f"--publish {target}: write it as {FORMS}")
    if kind not in _KINDS:
        raise unknown("target", kind, _KINDS, f"--publish {target}")
    if not rest:
        raise UsageError(f"--publish {target}: say where to: {FORMS}")
    return kind, rest


def _judged(model: Path, on_progress: Progress | None) -> Manifest:
    """The manifest of a model that may be published: it is whole, was loaded and has answered."""
    content = manifest.read(model)
    if content is None:
        raise UsageError(f"{model} has no manifest: it is no model that a merge has finished; run that stage again")
    if not isinstance(content.about.get("question"), str) or not isinstance(content.about.get("answer"), str):
        raise UsageError(f"{model} was not loaded and asked a question after it was merged: run the merge again")
    faults = list(manifest.faults(model, content, told(on_progress, "checking the model")))
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UsageError(f"{model} is not what was merged: {faults[0]}{more}; run the merge again")
    return content


# ---- a folder ----


def _check_folder(path: str) -> None:
    if not path.isprintable():
        raise UsageError(f"--publish dir:{path!r}: that is no path of one line; name another")
    folder = Path(path).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--publish dir:{path}: that is a file; name a folder")
    above = next(one for one in (folder, *folder.parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--publish dir:{path}: nothing can be written below {above}; name another folder")
    if folder.is_dir() and manifest.read(folder) is None and any(folder.iterdir()):
        raise UsageError(f"--publish dir:{path}: the folder is not empty and holds no published model; name another")


def _to_folder(model: Path, content: Manifest, path: str, on_progress: Progress | None) -> str:
    folder = Path(path).expanduser().absolute()
    there = manifest.read(folder)
    if there is not None and there.digest != content.digest:
        raise UsageError(
            f"--publish dir:{path}: another model is there (digest {there.digest[:12]}); name another folder"
        )

    def build(temporary: Path) -> Mapping[str, Any]:
        manifest.copy(model, content.files, temporary, told(on_progress, "copying the model"))
        return content.about

    try:
        # Before it would be made again, without what the user has put beside it.
        if there is not None and (fault := next(manifest.faults(folder, content), None)):
            raise UsageError(
                f"--publish dir:{path}: what is there is damaged: {fault}; remove it or name another folder"
            )
        made, _ = manifest.made(folder, build, _locks(), told(on_progress, "reading the copy"))
    except OSError as error:
        raise InfrastructureError(f"--publish dir:{path}: {os_error_text(error)}", disk_kind(error)) from error
    if made.digest != content.digest:
        shutil.rmtree(folder, ignore_errors=True)
        raise InfrastructureError(
            f"--publish dir:{path}: the copy does not read back the same: see the disk of {folder}"
        )
    return str(folder)


def _locks() -> Path:
    """A folder of locks of this user's own: none is left beside what is published."""
    return cache_dir() / "locks"


# ---- rsync ----


_MARK = ".publishing.json"  # there while files are sent: the manifest of the model that they will be


def _check_rsync(target: str) -> None:
    host, path = _host_and_path(target)
    if target.startswith("//") or path.startswith(":"):
        raise UsageError(f"--publish rsync:{target}: a daemon of rsync is not supported; {_RSYNC}")
    if host is not None and not _HOST.fullmatch(host):
        raise UsageError(f"--publish rsync:{target}: {host!r} is no host; {_RSYNC}")
    if not path or path.startswith("-"):
        raise UsageError(f"--publish rsync:{target}: say to which folder; {_RSYNC}")
    if shutil.which("rsync") is None:
        raise UsageError(f"--publish rsync:{target}: rsync is not installed on this machine")


def _host_and_path(target: str) -> tuple[str | None, str]:
    """As rsync reads it: what is before a colon is a host unless there is a slash in it."""
    host, colon, path = target.partition(":")
    return (host, path) if colon and "/" not in host else (None, target)


def _by_rsync(model: Path, content: Manifest, target: str, on_progress: Progress | None) -> str:
    """Send file by file, the manifest last; then the other side compares contents with what is here."""
    host, path = _host_and_path(target)
    place = f"{host}:{path.rstrip('/')}/" if host else f"{path.rstrip('/')}/"
    _require_free(place, target, content)
    with tempfile.TemporaryDirectory(prefix="shakedown-") as temporary:
        mark, empty = Path(temporary, _MARK), Path(temporary, "empty")
        mark.write_bytes((model / manifest.NAME).read_bytes())
        empty.mkdir()
        _rsync(target, [str(mark), place])
        tell, done = told(on_progress, "sending the model"), 0
        for file in content.files:
            _rsync(target, ["--relative", f"{model}/./{file.path}", place])
            done += file.bytes
            tell(done, content.bytes)
        _rsync(target, [f"{model}/{manifest.NAME}", place])
        # What is excluded is not deleted: only the mark is.
        _rsync(target, ["-r", "--delete", f"--include=/{_MARK}", "--exclude=*", f"{empty}/", place])
    names = "\0".join(file.path for file in (*content.files, _of(model)))
    listed = ["--files-from=-", "--from0", f"{model}/", place]
    odd = _rsync(target, ["--checksum", "--dry-run", "--out-format=%n", *listed], names).splitlines()
    if differ := [line for line in odd if line and not line.endswith("/")]:
        raise InfrastructureError(
            f"--publish rsync:{target}: {differ[0]} does not read back the same: see the disk there"
        )
    return place


def _of(model: Path) -> File:
    """The model's manifest as a file."""
    data = (model / manifest.NAME).read_bytes()
    return File(manifest.NAME, len(data), hashlib.sha256(data).hexdigest())


def _require_free(place: str, target: str, content: Manifest) -> None:
    """Refuse a folder that holds something else than this model or a part of it."""
    listing = _rsync(target, ["--list-only", "--no-recursive", "--dirs", place], missing_ok=True)
    entries = (line.split(maxsplit=4) for line in listing.splitlines() if line[:1] in "-dl")
    names = {entry[4] for entry in entries if len(entry) == 5} - {"."}
    for name in (_MARK, manifest.NAME):
        if name not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="shakedown-") as temporary:
            _rsync(target, [f"{place}{name}", f"{temporary}/{manifest.NAME}"])
            there = manifest.read(Path(temporary))
        if there is not None and there.digest == content.digest:
            return
        other = f"another model is there (digest {there.digest[:12]})" if there else f"its {name} is not ours"
        raise UsageError(f"--publish rsync:{target}: {other}; name another folder")
    if names:
        has = counted(len(names), "entry", "entries")
        raise UsageError(f"--publish rsync:{target}: the folder has {has} and no published model; name another")


def _rsync(target: str, arguments: Sequence[str], input: str | None = None, missing_ok: bool = False) -> str:
    """Run rsync; returns its stdout. Raises InfrastructureError with its own reason."""
    # -s: paths reach the other side as they are, not through its shell. BatchMode: nobody is there to be asked.
    words = ["rsync", "-lt", "-s", "--mkpath", f"--timeout={_SILENCE_S}", "-e", "ssh -o BatchMode=yes", *arguments]
    outcome = process.run(words, timeout_s=_TIMEOUT_S, input=input)
    if outcome.rc == 0:
        return outcome.stdout
    if missing_ok and outcome.rc == _PARTIAL and "No such file or directory" in outcome.stderr:
        return ""
    lines = [line.strip() for line in outcome.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if not line.startswith("rsync error:")), (lines or ["rsync failed"])[0])
    full = "No space left on device" in outcome.stderr
    raise InfrastructureError(f"--publish rsync:{target}: {said}", "disk_full" if full else None)


# ---- the hub ----


def _check_hub(repo: str) -> None:
    from huggingface_hub import constants, get_token

    if not _REPOSITORY.fullmatch(repo):
        raise UsageError(f"--publish hf:{repo}: write the repository as OWNER/NAME")
    if get_token() is None:
        raise UsageError(f"--publish hf:{repo}: set HF_TOKEN to a token that may write")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"--publish hf:{repo}: HF_HUB_OFFLINE is set; unset it, or publish to a folder")


def _to_hub(model: Path, content: Manifest, repo: str, on_progress: Progress | None) -> str:
    """Upload file by file, then make them one commit; the checksums of the hub are compared with our own."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api, files = HfApi(), [*content.files, _of(model)]
    try:
        # Private unless it is there: whoever publishes decides who may see it.
        api.create_repo(repo, repo_type="model", private=True, exist_ok=True)
        names = {one.rfilename for one in api.model_info(repo, timeout=20).siblings or ()}
        if manifest.NAME not in names and names - {".gitattributes", "README.md"}:
            raise UsageError(f"--publish hf:{repo}: the repository holds something else; name another")
        added = [CommitOperationAdd(file.path, model / file.path) for file in files]
        tell, done = told(on_progress, "uploading the model"), 0
        for file, one in zip(files, added, strict=True):
            api.preupload_lfs_files(repo, [one], repo_type="model")
            done += file.bytes
            tell(min(done, content.bytes), content.bytes)
        stale = sorted(name for name in names - {file.path for file in files} if name.endswith(_WEIGHTS))
        removed = [CommitOperationDelete(name) for name in stale]  # of the model that was there before
        commit = api.create_commit(repo, [*added, *removed], commit_message=f"Model {content.digest[:12]}")
        odd = next(_differing(api, repo, commit.oid, files, model), None)
    except RunnerError:
        raise
    except Exception as error:
        raise _hub_error(repo, error) from error
    if odd is not None:
        raise InfrastructureError(f"--publish hf:{repo}: {odd} on the hub is not what was sent: publish again")
    return f"{api.endpoint}/{repo} at {commit.oid[:12]}"


def _differing(api: Any, repo: str, commit: str, files: Sequence[File], model: Path) -> Iterator[str]:
    """The files that the hub has in another content at a commit, by the checksums that it computes itself."""
    found = {one.path: one for one in api.get_paths_info(repo, [file.path for file in files], revision=commit)}
    for file in files:
        there = found.get(file.path)
        if there is None or there.size != file.bytes:
            yield file.path
        elif there.lfs is not None:
            if there.lfs.sha256 != file.sha256:
                yield file.path
        elif there.blob_id != _git_id((model / file.path).read_bytes()):
            yield file.path


def _git_id(content: bytes) -> str:
    """Git's name of a file's content, which the hub gives for small files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _hub_error(repo: str, error: Exception) -> RunnerError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UsageError(
            f"--publish hf:{repo}: the hub refuses the token ({status}): set HF_TOKEN to one that may write"
        )
    found = hub.error_of("repository", repo, error, "try again, or publish to a folder (dir:PATH)")
    if isinstance(found, UsageError) and not (isinstance(status, int) and 400 <= status < 500):
        return InfrastructureError(str(found))  # the hub's or the network's: a server's error, an upload broken off
    return found


@dataclass(frozen=True)
class _Kind:
    check: Callable[[str], None]
    send: Callable[[Path, Manifest, str, Progress | None], str]


_KINDS: Mapping[str, _Kind] = {
    "dir": _Kind(_check_folder, _to_folder),
    "hf": _Kind(_check_hub, _to_hub),
    "rsync": _Kind(_check_rsync, _by_rsync),
}
