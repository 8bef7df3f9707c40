"""Environment modules (Environment Modules, Lmod) of a site: loaded once where ranks start, and what was loaded.

`module` is a function of a login shell. What it does to the environment is read back, so that everything else is
started without a shell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from runner.errors import InfrastructureError
from runner.system import process

_MARK = "SHAKEDOWN-MODULES"
# Files of a login shell and modules may print what they like before it.
_SCRIPT = f"""
type module > /dev/null 2>&1 || echo "no command module in a login shell" >&2
for name in "$@"; do module load "$name"; done
printf '\\0{_MARK}\\0'
env -0
"""
_OF_THE_SHELL = re.compile(r"_|SHLVL|PWD|OLDPWD|BASH_FUNC_.*")
_LOAD_S = 60.0  # module files on a distant disk


@dataclass(frozen=True)
class Loaded:
    """The environment with modules loaded, and all that are, by full names with versions, in order."""

    environment: Mapping[str, str]
    names: tuple[str, ...]


def argv(names: Sequence[str]) -> list[str]:
    """The command that loads the modules and prints the environment; `read` reads its output."""
    return ["bash", "--login", "-c", _SCRIPT, "bash", *names]


def read(names: Sequence[str], outcome: process.Outcome) -> Loaded:
    """What a command of `argv` has loaded.

    Raises InfrastructureError of kind `module_missing`, naming what it has not.
    """
    _, _, printed = outcome.stdout.partition(f"\0{_MARK}\0")
    pairs = (line.partition("=") for line in printed.split("\0") if "=" in line)
    environment = {name: value for name, _, value in pairs if not _OF_THE_SHELL.fullmatch(name)}
    loaded = tuple(filter(None, environment.get("LOADEDMODULES", "").split(":")))
    missing = [name for name in names if not any(one == name or one.startswith(f"{name}/") for one in loaded)]
    if missing:
        said = [line.strip() for line in outcome.stderr.splitlines() if line.strip()]
        reason = next((line for line in said if missing[0] in line or "no command module" in line), "")
        reason = reason or next(iter(said[-1:]), "nothing was said")
        raise InfrastructureError(f"cannot load the module {', '.join(missing)}: {reason}", "module_missing")
    return Loaded(environment, loaded)


@cache
def load(names: tuple[str, ...]) -> Loaded:
    """Load the modules here, once in this process. Raises InfrastructureError of kind `module_missing`."""
    return read(names, process.run(argv(names), timeout_s=_LOAD_S))
