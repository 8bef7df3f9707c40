"""Checks this node for everything that would stop a cell, before anything starts; removes what a run left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from runner import __version__
from runner.cluster import addresses, facts, modules, mpi, nccl, slurm_names
from runner.errors import InfrastructureError
from runner.node import profiles
from runner.node.protocol import Checked
from runner.node.requests import CheckRequest
from runner.system.wording import counted
from runner.workloads import weights


def check(request: CheckRequest) -> Checked:
    """Everything that would stop a cell on this node, and the node's clock and facts. Nothing is started."""
    problems: list[tuple[str, str]] = []
    scratch = Path(request.scratch)
    try:
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = scratch / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        kind = "disk_full" if error.errno == errno.ENOSPC else "unknown"
        problems.append((kind, f"cannot write to {scratch}: {error.strerror}"))
    else:
        free_gib = shutil.disk_usage(scratch).free / 2**30
        if free_gib < request.min_free_disk_gib:
            text = f"{free_gib:.1f} GiB free in {scratch}, {request.min_free_disk_gib:g} GiB required"
            problems.append(("disk_full", text))
        holder = _lock_holder(scratch)
        if holder:
            problems.append(("in_use", f"in use by run {holder}"))
    missing = [name for name in request.packages if facts.version_of(name) is None]
    if missing:
        problems.append(("environment_missing", f"environment {sys.prefix} lacks {', '.join(missing)}"))
    missing = [name for name in request.programs if shutil.which(name) is None]
    if missing:
        problems.append(("environment_missing", f"lacks {', '.join(missing)}"))
    reasons = [nccl.program_obstacle(Path(program)) for program in request.nccl_tests]
    reasons += [mpi.obstacle()] if request.open_mpi else []
    reasons += [mpi.step_obstacle()] if request.slurm_mpi else []
    problems += [("environment_missing", reason) for reason in dict.fromkeys(reasons) if reason]
    if request.version != __version__:
        text = f"has shakedown {__version__}, this controller is {request.version}"
        problems.append(("version_mismatch", text))
    if request.nccl_root and (reason := nccl.obstacle(request.nccl_root)):
        problems.append(("environment_missing", reason))
    if request.weights and (reason := weights.fault(Path(request.weights))):
        problems.append(("weights_unusable", f"--weights {request.weights}: they {reason}"))
    problems += [("not_shared", reason) for reason in map(_unseen, request.shared.items()) if reason]
    observed = facts.collect(nccl.environment(request.nccl_root) if request.nccl_root else {})
    environment: Mapping[str, str] = os.environ
    if request.modules:
        try:
            loaded = modules.load(tuple(request.modules))
            environment, observed["modules"] = loaded.environment, list(loaded.names)
        except InfrastructureError as error:
            problems.append((error.kind or "unknown", str(error)))
    if request.profile:
        problems += profiles.problems(request.profile, observed.get("driver") or "", environment)
    if request.gpus:  # None where the inventory leaves the number open
        answering = len(observed["gpus"])
        if answering < request.gpus:
            answer = "answers" if answering == 1 else "answer"
            text = f"{counted(answering, 'GPU')} {answer}, the inventory says {request.gpus}"
            problems.append(("gpu_failed", text))
    return Checked(
        problems=[text for _, text in problems],
        kinds=[kind for kind, _ in problems],
        time_s=time.time(),
        facts=observed,
        addresses=addresses.resolve(request.names),
        open_mpi=mpi.version() if request.open_mpi else None,
    )


def _unseen(file: tuple[str, str]) -> str | None:
    """Why this node does not see what the controller wrote into a file, None if it does."""
    path, content = file
    try:
        same = Path(path).read_text() == content
    except OSError as error:
        there = f"does not see the controller's {Path(path).parent} ({error.strerror})"
    else:
        if same:
            return None
        there = f"has another {Path(path).parent} than the controller"
    return f"{there}: name a folder that all nodes see at the same path (--work, runner_shared)"


def _lock_holder(scratch: Path) -> str | None:
    """The run that holds this node's lock, or None."""
    try:
        with open(scratch / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except FileNotFoundError:
        pass
    return None


def clean(scratch: Path, run_id: str) -> bool:
    """Remove the files of a run and its Slurm jobs from this node, whose artefacts have been gathered.

    Returns whether the run had a folder in `scratch`.
    """

    folder = scratch / run_id
    if not run_id or folder.parent != scratch:
        return False
    for log in Path(slurm_names.LOGS).glob(f"{slurm_names.NAME}-{glob.escape(run_id)}-*.log*"):
        with contextlib.suppress(OSError):
            log.unlink()
    if not folder.is_dir():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True
