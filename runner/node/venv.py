"""The Python environment of a user's program on a node: made once of each lock, whole or not at all.

`<root>/<digest>` is a link to the folder that was made aside: programs in an environment know its path, so that it
cannot be renamed, but a link can, at once. A stamp, written last, lists what is in it; what has lost a package or a
file since is made anew. Only the standard library: nodes have no more.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import secrets
import select
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from runner.cluster import environments, pip
from runner.cluster.environments import STAMP
from runner.errors import InfrastructureError, disk_full
from runner.node.leash import Leash
from runner.node.output import send_message
from runner.node.protocol import ALIVE_S, SILENCE_S, Alive, Environment, Making
from runner.node.requests import EnvironmentRequest
from runner.system import process
from runner.system.files import write_json_atomic
from runner.system.folders import alone

PIP, CONDA = "pip", "conda"  # the tools of a request
REQUIREMENTS, CONSTRAINTS, CONDA_FILE = "requirements.txt", "constraints.txt", "environment.yml"
_NAME = 16  # characters of a digest in the name of a folder
_START_S = 60.0  # a Python on a cold or distant disk
_CREATE_S = 300.0
# By name, what makes an environment of environment.yml, and the words that it takes before the folder.
_CONDAS: Mapping[str, Sequence[str]] = {
    "micromamba": ("create", "--yes", "--quiet"),
    "mamba": ("env", "create", "--quiet"),
    "conda": ("env", "create", "--quiet"),
}
_NO_INDEX = (
    ": name one with runner_env in the inventory, as PIP_INDEX_URL, or a folder of wheels that the node sees, as "
    "PIP_FIND_LINKS with PIP_NO_INDEX: '1'"
)


class Abandoned(Exception):
    """Nobody waits for the environment any more."""


def place(root: str, digest: str) -> Path:
    """Where the environment of a digest is on a node: the same on all."""
    return Path(root, digest[:_NAME])


def python_of(root: str, digest: str) -> str:
    """The path of its Python."""
    return str(place(root, digest) / "bin" / "python")


def answer(request: EnvironmentRequest, early: bytes = b"") -> int:
    """Carry an `EnvironmentRequest` out, sending its progress; `early` is what came after it. Returns 0."""
    leash = Leash(SILENCE_S)
    leash.receive(early)
    told: list[object] = [None, time.monotonic()]

    def on_progress(done: int, total: int, step: str) -> None:
        while select.select([0], [], [], 0)[0] and leash.read():
            pass
        leash.tick()
        if leash.reason:
            raise Abandoned(leash.reason)
        if told[0] != (done, total, step):
            told[:] = [(done, total, step), time.monotonic()]
            send_message(Making(done, total, step))
        elif time.monotonic() - float(str(told[1])) > ALIVE_S:
            told[1] = time.monotonic()
            send_message(Alive())

    try:
        send_message(make(request, on_progress))
    except Abandoned as stopped:
        print(f"runner.node: the environment was not made: {stopped}", file=sys.stderr)
    return 0


def make(request: EnvironmentRequest, on_progress: pip.OnProgress = lambda done, total, step: None) -> Environment:
    """The environment of a request, made unless it is whole; waits for another process that makes it.

    What cannot be made is said in the answer, and nothing is left of it. Raises what `on_progress` raises.
    """
    folder = place(request.root, request.digest)
    found = ".".join(map(str, sys.version_info[:2]))
    if request.tool == PIP and request.python and environments.numbers(found) < environments.numbers(request.python):
        told = f"its Python is {found}, the lock requires {request.python} or newer"
        return Environment(problem=told, kind="version_mismatch")
    made = False
    try:
        if fault(folder):
            with alone(folder, on_wait=lambda: on_progress(0, 0, "waiting for another command that makes it")):
                made = bool(fault(folder))
                if made:
                    _replace(folder, lambda aside: _build(aside, request, on_progress))
    except InfrastructureError as error:
        full = "no space left" in str(error).lower() or "disk quota" in str(error).lower()
        return Environment(problem=str(error), kind="disk_full" if full else error.kind or "environment_missing")
    except OSError as error:
        text = f"{error.filename or folder}: {error.strerror or error}"
        return Environment(problem=text, kind="disk_full" if disk_full(error) else "not_permitted")
    version = str(environments.stamp(str(folder)).get("python", found))
    return Environment(str(folder / "bin" / "python"), version, made)


def fault(folder: Path) -> str:
    """Why the environment at `folder` is not usable, in a few words; "" if it is."""
    if reason := environments.fault(str(folder)):
        return reason
    stamp = environments.stamp(str(folder))
    if stamp.get("manager") == PIP and stamp.get("base") != _base():
        return f"was made by {stamp.get('base')}, which is {_base()} now"
    if reason := _torn(folder, sizes=stamp.get("manager") == PIP):
        return reason
    try:
        outcome = process.run([str(folder / "bin" / "python"), "-c", ""], timeout_s=_START_S, env=pip.settings())
    except InfrastructureError as error:
        return f"has a Python that does not start ({error})"
    return f"has a Python that does not start ({outcome.last_line})" if outcome.rc else ""


def _base() -> str:
    return f"{sys.base_prefix} {'.'.join(map(str, sys.version_info[:3]))}"


def _torn(folder: Path, sizes: bool) -> str:
    """A file that a package has lost, or whose size is another than the one that it was installed with; "" for none."""
    for record in sorted(folder.glob("lib/python3*/site-packages/*.dist-info/RECORD")):
        with open(record, encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                if len(row) < 3 or row[0].endswith(".pyc"):
                    continue
                path = record.parents[1] / row[0]
                try:
                    size = path.stat().st_size
                except OSError:
                    return f"has lost {row[0]}"
                if sizes and row[2].isdigit() and size != int(row[2]):
                    return f"has another {row[0]}"
    return ""


def _replace(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill a new folder, and `folder` lead to it; of what was there, and of a failure, nothing stays."""
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
    try:
        _sweep(folder, keep=folder.resolve() if folder.is_symlink() else None)
        build(aside)
        link = aside.with_name(f"{aside.name}.link")
        link.symlink_to(aside.name)
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        link.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _sweep(folder, keep=aside.resolve())


def _sweep(folder: Path, keep: Path | None) -> None:
    for each in folder.parent.glob(f"{folder.name}.*"):
        if each.suffix == ".link":
            each.unlink(missing_ok=True)
        elif each.is_dir() and each.resolve() != keep:
            shutil.rmtree(each, ignore_errors=True)


def _build(aside: Path, request: EnvironmentRequest, on_progress: pip.OnProgress) -> None:
    on_progress(0, 0, "creating the environment")
    env = pip.settings({**os.environ, **request.env})
    if request.tool == CONDA:
        _conda(aside, request.files, env, on_progress)
        version = process.run(
            [str(aside / "bin" / "python"), "-c", "import platform; print(platform.python_version())"],
            timeout_s=_START_S, env=env, check=True,
        ).stdout.strip()  # fmt: skip
    else:
        _pip(aside, request.files, env, on_progress)
        version = ".".join(map(str, sys.version_info[:3]))
    content = {"digest": request.digest, "manager": request.tool, "python": version, "base": _base()}
    write_json_atomic(aside / STAMP, {**content, "packages": environments.installed(str(aside))})


def _pip(aside: Path, files: Mapping[str, str], env: Mapping[str, str], on_progress: pip.OnProgress) -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("pip") is None:
        raise InfrastructureError(
            f"{sys.executable} has no pip or no venv: install them (`sudo apt install python3-venv python3-pip`), or "
            "name another Python with runner_python"
        )
    process.run([sys.executable, "-m", "venv", "--without-pip", str(aside)], timeout_s=_CREATE_S, env=env, check=True)
    for name, text in files.items():
        (aside / name).write_text(text, encoding="utf-8")
    arguments = ["--requirement", str(aside / REQUIREMENTS)]
    arguments += ["--constraint", str(aside / CONSTRAINTS)] if CONSTRAINTS in files else []
    if reason := pip.install(aside, arguments, env, on_progress):
        raise InfrastructureError(f"pip: {reason}{_NO_INDEX if pip.UNREACHED in reason else ''}")


def _conda(aside: Path, files: Mapping[str, str], env: Mapping[str, str], on_progress: pip.OnProgress) -> None:
    program, words = next(((path, words) for name, words in _CONDAS.items() if (path := shutil.which(name))), ("", ()))
    if not program:
        raise InfrastructureError(
            f"environment.yml requires one of {', '.join(_CONDAS)} on its PATH, which has none: install micromamba "
            "there, or give a requirements.txt or a uv.lock"
        )
    file = aside.with_name(f"{aside.name}.{CONDA_FILE}")
    try:
        file.write_text(files[CONDA_FILE], encoding="utf-8")
        argv = [program, *words, "--prefix", str(aside), "--file", str(file)]
        status, text = pip.follow(argv, env, lambda said: on_progress(0, 0, f"{Path(program).name} creates it"))
    finally:
        file.unlink(missing_ok=True)
    if reason := pip.reason(status, text):
        raise InfrastructureError(f"{Path(program).name}: {reason}")
