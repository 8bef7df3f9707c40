"""MPI on a machine: Open MPI's launcher, and the plugin by which Slurm lets the ranks of an MPI program meet.

Imported on nodes: the standard library only.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence

from runner.errors import InfrastructureError
from runner.system import process

LAUNCHER = "mpirun"
DAEMONS = ("orted", "prted")  # of Open MPI up to 4, and from 5 on
INSTALL = "install Open MPI (Debian, Ubuntu: openmpi-bin)"
_ANSWER_S = 20.0


def version() -> str | None:
    """The version of the Open MPI whose mpirun is on PATH, such as "4.1.4"; None where there is none."""
    found = re.search(r"^\S+ \(Open MPI\) (\S+)", _answer([LAUNCHER, "--version"]), re.MULTILINE)
    return found[1] if found else None


def obstacle() -> str | None:
    """Why Open MPI's launcher cannot start ranks on this machine, in one line, or None."""
    if shutil.which(LAUNCHER) is None:
        return f"lacks {LAUNCHER}: {INSTALL}"
    if version() is None:
        said = (_answer([LAUNCHER, "--version"]).splitlines() or ["nothing"])[0].strip()
        return f"its {LAUNCHER} is not Open MPI's ({LAUNCHER} --version: {said}): {INSTALL}, first on PATH"
    if not any(map(shutil.which, DAEMONS)):
        return f"lacks {' and '.join(DAEMONS)}, of which mpirun starts one on each node: {INSTALL}"
    return None


def plugins() -> tuple[str, ...]:
    """The names that `srun --mpi=list` answers here."""
    return named_plugins(_answer(["srun", "--mpi=list"]))


def named_plugins(answer: str) -> tuple[str, ...]:
    """The plugins in the answer of `srun --mpi=list`, of any release of Slurm."""
    found = re.findall(r"\b(?:none|openmpi|cray_\w+|pmi\d|pmix(?:_v\d+)?)\b(?! plugin)", answer)
    return tuple(dict.fromkeys(found))


def plugin(offered: Sequence[str]) -> str | None:
    """The plugin of `offered` under which programs of Open MPI meet, None where there is none.

    PMIx, which all of its releases can do; else PMI-2, which some builds up to Open MPI 4 can.
    """
    versions = sorted((name for name in offered if name.startswith("pmix_v")), key=lambda name: int(name[6:]))
    return next((name for name in ("pmix", *reversed(versions), "pmi2") if name in offered), None)


def step_obstacle() -> str | None:
    """Why srun cannot start an MPI program from this machine, in one line, or None."""
    if shutil.which("srun") is None:
        return "lacks srun, which starts MPI programs in a job: install Slurm's client (Debian, Ubuntu: slurm-client)"
    offered = plugins()
    if plugin(offered) is not None:
        return None
    return (
        f"its Slurm has no plugin for MPI programs (srun --mpi=list: {', '.join(offered) or 'no answer'}): "
        "install Slurm's PMIx plugin on every node"
    )


def _answer(argv: Sequence[str]) -> str:
    try:
        outcome = process.run(argv, timeout_s=_ANSWER_S)
    except InfrastructureError:
        return ""
    return f"{outcome.stdout}\n{outcome.stderr}".strip()
