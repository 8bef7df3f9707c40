"""NCCL on a node: torch's own or the one that role nccl_build has built, and which of them a process uses.

Imported on nodes, before torch: the standard library only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from runner.errors import InfrastructureError
from runner.system import elf, process
from runner.system.wording import counted

Choice = Literal["torch", "built"]
TORCH, BUILT = get_args(Choice)
ROOT = "/opt/nccl"  # as nccl_build_root
FACT = Path("/etc/ansible/facts.d/nccl.fact")  # as role nccl_build writes it
LIBRARY = "libnccl.so.2"
SETUP = "run role nccl_build"  # the remedy, as a node knows it; a controller knows the inventory too
_LOADED = re.compile(r"/libnccl\.so[.\d]*$")
# NCCL's own answer. In a process of its own, since a broken library may end it.
_ASK = (
    "import ctypes, sys; answer = ctypes.c_int(); "
    "ctypes.CDLL(sys.argv[1]).ncclGetVersion(ctypes.byref(answer)); print(answer.value)"
)


def environment(root: str) -> dict[str, str]:
    """The variables by which a process uses the NCCL built in `root` in place of torch's own.

    torch's wheels find their own NCCL by a run path of the older kind (DT_RPATH), which LD_LIBRARY_PATH does not
    override: the library is loaded before torch is. torch then loads, as a second library if it is another file, the
    nvidia/nccl/lib/libnccl.so.2 of the first folder of sys.path that has one: role nccl_build makes such a folder, with
    a link. benchmarks/nccl_in_torch.py shows it with torch's own wheels.
    """
    return {"LD_PRELOAD": f"{root}/current/lib/{LIBRARY}", "PYTHONPATH": f"{root}/python"}


def joined(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """`first` and `second` in one: `second` replaces values, but extends the lists of `environment`."""
    lists = {name: f"{first[name]}:{second[name]}" for name in environment("") if first.get(name) and second.get(name)}
    return {**first, **second, **lists}


# --- what was built -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """The NCCL that role nccl_build has built on a node: its folder, its version, why torch cannot use it (or None)."""

    root: str
    version: str
    obstacle: str | None = None


def built(fact: Path = FACT) -> Built | None:
    """What role nccl_build has written of its build on this machine; None where it has built none."""
    try:
        told = json.loads(fact.read_text())
        root, version = str(Path(told["prefix"]).parent), str(told["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Built(root, version, obstacle(root))


def obstacle(root: str) -> str | None:
    """Why the ranks of this environment cannot use the NCCL built in `root`, in one line, or None."""
    library, link = Path(root, "current", "lib", LIBRARY), Path(root, "python", "nvidia", "nccl", "lib", LIBRARY)
    if not library.exists():
        return f"no NCCL is built in {root}: {SETUP}, or use torch's with --set nccl=torch"
    if not link.exists() or not link.samefile(library):
        return f"{link} is not the NCCL built in {root}: {SETUP}, or use torch's with --set nccl=torch"
    torch = _torch_library()
    try:
        lacking = elf.symbols(torch, "nccl")[0] - elf.symbols(library, "nccl")[1] if torch else None
    except (OSError, ValueError):
        return None  # what cannot be read is unknown
    if not lacking:
        return None
    first, more = sorted(lacking)[:3], len(lacking) - 3
    functions = ", ".join(first) + (f" and {counted(more, 'more function')}" if more > 0 else "")
    return (
        f"NCCL {version_of(library) or 'of unknown version'} in {root} is too old for the environment's torch, which "
        f"needs {functions}: build a newer one (nccl_build_version), or use torch's with "
        "--set nccl=torch"
    )


def program_obstacle(program: Path) -> str | None:
    """Why ranks cannot execute this program of nccl-tests, in one line, or None."""
    if not os.access(program, os.X_OK):
        if not any(program.parent.glob("*_perf")):
            return f"no nccl-tests in {program.parent}: {SETUP}"
        remedy = f"leave its collective out (nccl.collectives), or with a newer nccl_build_tests_version {SETUP}"
        return f"no {program.name} in {program.parent}, whose nccl-tests are too old for it: {remedy}"
    try:
        calls_mpi = bool(elf.symbols(program, "MPI_")[0])
    except (OSError, ValueError):
        return None  # what cannot be read is unknown
    if calls_mpi:
        return None
    return f"{program} was built without MPI, so that its ranks do not meet; with nccl_build_mpi: true, {SETUP}"


def _torch_library() -> Path | None:
    """The library of the environment's torch that calls NCCL; None without torch, and for a build without CUDA."""
    spec = importlib.util.find_spec("torch")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (library := Path(folder, "lib", "libtorch_cuda.so")).exists():
            return library
    return None


# --- which one a process uses -------------------------------------------------------------------------


def to_load(variables: Mapping[str, str]) -> Path | None:
    """The library that a rank with these environment variables will load; None where there is no NCCL."""
    for word in re.split(r"[: ]+", variables.get("LD_PRELOAD", "")):
        if _LOADED.search(word) and Path(word).exists():
            return Path(word)
    if (torch := _torch_library()) is None:
        return None
    own = (Path(folder, "nvidia", "nccl", "lib", LIBRARY) for folder in (str(torch.parents[2]), *sys.path))
    return next((file for file in own if file.exists()), Path(LIBRARY))  # else the loader finds it


def version_of(library: Path) -> str | None:
    """What ncclGetVersion of a library answers, such as "2.26.2"; None where it does not answer."""
    try:
        outcome = process.run([sys.executable, "-S", "-c", _ASK, str(library)], timeout_s=20)
    except InfrastructureError:  # no answer in time
        return None
    answer = outcome.stdout.strip()
    return _version(int(answer)) if outcome.rc == 0 and answer.isdigit() else None


def loaded() -> dict[str, str | None]:
    """File -> version of every NCCL that is loaded into this process, as ncclGetVersion answers.

    torch.cuda.nccl.version() would answer what torch was compiled with. None where a library does not answer.
    """
    import ctypes

    found: dict[str, str | None] = {}
    for file in sorted(_mapped()):
        answer = ctypes.c_int()
        try:
            ctypes.CDLL(file).ncclGetVersion(ctypes.byref(answer))
        except (OSError, AttributeError):
            found[file] = None
        else:
            found[file] = _version(answer.value)
    return found


def _mapped() -> Iterator[str]:
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    return (file for file in {line.split(maxsplit=5)[-1] for line in lines} if _LOADED.search(file))


def _version(code: int) -> str:
    """The version that ncclGetVersion encodes: 22602 -> "2.26.2", and 2804 -> "2.8.4" (nccl.h, NCCL_VERSION)."""
    major, rest = divmod(code, 1000) if code < 10000 else divmod(code, 10000)
    return f"{major}.{rest // 100}.{rest % 100}"


# --- its settings -------------------------------------------------------------------------------------


def settings(variables: Mapping[str, str], system: Path = Path("/etc/nccl.conf")) -> dict[str, str]:
    """The settings in the files that NCCL reads: the user's, then the system's. The first value of a name counts.

    `variables` are those of the process, which NCCL gives precedence: NCCL_CONF_FILE names the user's file, else it is
    ~/.nccl.conf. Source: NCCL, src/misc/param.cc.
    """
    own = variables.get("NCCL_CONF_FILE") or Path("~/.nccl.conf").expanduser()
    found: dict[str, str] = {}
    for file in (Path(own), system):
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            name, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                found.setdefault(name, value)
    return found
