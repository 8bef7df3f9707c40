"""The environment of the processes that an agent starts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path

from runner.cluster import modules
from runner.node.requests import CellRequest
from runner.system import process
from runner.system.places import PACKAGE

# The variables of its own environment that an agent passes to an isolated process.
PLAIN = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "PATH", "TMPDIR", "SSH_AUTH_SOCK")


def of_engine(request: CellRequest) -> dict[str, str]:
    """The environment of the engine's process, which ranks inherit. Raises what `modules.load` raises."""
    # A launcher passes its folder and part of its environment on to remote shells, so it gets a plain one of each.
    own = modules.load(tuple(request.modules)).environment if request.modules else os.environ
    kept = {name: value for name, value in own.items() if not request.isolated or name in PLAIN}
    env = {**kept, **request.env, process.MARKER: request.marker, **request.secrets}
    programs = Path(sys.executable).parent
    if request.profile and request.scratch and request.argv:
        programs = Path(request.argv[0]).parent
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(importable(Path(request.scratch))), env.get("PYTHONPATH")))
        )
    env["PATH"] = f"{programs}:{env.get('PATH', os.defpath)}"
    return env


def importable(scratch: Path, package: Path = PACKAGE) -> Path:
    """A folder in `scratch` with nothing to import but this package: the Python of a profile has it from there.

    So ranks of a profile run what their agent runs, and see nothing else of the agent's environment.
    """
    folder = scratch / "import" / hashlib.sha256(str(package).encode()).hexdigest()[:12]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / package.name).symlink_to(package)
    return folder
