"""How jobs are submitted on this cluster: the settings of Slurm, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from runner.errors import UsageError, unknown
from runner.system.nodeset import expand


@dataclass(frozen=True)
class Settings:
    """How jobs are submitted: the inventory's runner_slurm_* variables and `--set slurm.KEY=VALUE`.

    `time_limit_s` None is computed from the cells' own limits; `gres` None asks for the cell's GPUs.
    `exclude` are Slurm names of nodes that must not be used, `extra` whole option lines such as
    "--reservation=maint", `login` the inventory host on which Slurm's commands run (None: this machine),
    `shared` whether nodes see the run directory at the same path. A job that waits longer than `wait_s`,
    or longer than `stuck_s` for something that waiting will not bring, is given up.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit_s: int | None = None
    gres: str | None = None
    constraint: str | None = None
    exclude: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    login: str | None = None
    shared: bool = True
    wait_s: int | None = None
    stuck_s: int = 300


WORD = re.compile(r"[\w\[(*/][\w.,:;@%+=/|&*\[\]()-]*", re.ASCII)  # no blank, quote, $ or #


_EXTRA = re.compile(rf"--([a-z][a-z0-9-]*)(={WORD.pattern})?", re.ASCII)


_GRES = re.compile(r"[a-z]\w*(:[a-z][\w.-]*)?(:\d+[kmg]?)?", re.ASCII | re.IGNORECASE)


# What render sets itself, or what would undo it. Slurm takes any unambiguous beginning of a name as well.
_OWN = (
    " account array batch chdir clusters constraint cpus-per-gpu cpus-per-task error exclude exclusive export "
    "export-file get-user-env gpus gpus-per-node gpus-per-socket gpus-per-task gres help hold input job-name mem "
    "mem-per-cpu mem-per-gpu no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu "
    "ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable partition qos quiet "
    "requeue share signal test-only time time-min tres-per-task uid gid usage version wait wrap"
)


_PLACEHOLDER = re.compile(
    r"<[a-z_.][^<>\n]*>|\{\{.*?\}\}|\$\{[^}\n]*\}"
    r"|(?<![^\W_])((change|replace|fix)[_-]?me|(?-i:TODO)|x{3,})(?![^\W_])|(?<![^\W_])your[_-]\w+",
    re.IGNORECASE,
)  # fmt: skip


def placeholder(script: str) -> str | None:
    """The first thing that somebody was meant to replace (`<account>`, `CHANGEME`, `${X}`), or None."""
    found = _PLACEHOLDER.search(script)
    return found[0] if found else None


def settings(values: Mapping[str, Any], where: str) -> Settings:
    """`values` checked. Raises UsageError with `where`, the key, and the nearest name or what is expected."""
    types = {field.name: str(field.type) for field in fields(Settings)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in types:
            raise unknown("key", str(key), types, where)
        if value is None and "None" in types[key]:
            continue
        try:
            checked[key] = _checked(key, types[key], value)
        except ValueError as error:
            raise UsageError(f"{where}: {key} = {value!r}: {error}") from None
    return Settings(**checked)


def _checked(key: str, kind: str, value: Any) -> Any:
    if found := placeholder(str(value)):
        raise ValueError(f"{found!r} is a placeholder; replace it by the cluster's own value")
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if kind.startswith("int"):
        seconds = seconds_of(value) if isinstance(value, str) else value
        if type(seconds) is not int or seconds <= 0:
            raise ValueError("expected seconds above 0, or a text such as 1-12:00:00")
        return seconds
    if kind.startswith("tuple"):
        lines = [value] if isinstance(value, str) else value
        if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
            raise ValueError("expected a list of texts")
        if key == "exclude":
            return tuple(host for line in lines for host in expand(line))
        for line in lines:
            match = _EXTRA.fullmatch(line)
            if not match:
                raise ValueError("write each option as --name=value, without blanks, quotes, $ or #")
            if f" {match[1]}" in _OWN:
                raise ValueError(f"--{match[1]} is set by Shakedown; leave it out")
        return tuple(lines)
    text = str(value) if type(value) in (str, int) else ""  # YAML reads an account such as 1234 as a number
    if not WORD.fullmatch(text):
        raise ValueError("expected one word without blanks, quotes, $ or #")
    if key == "gres" and not all(_GRES.fullmatch(part) for part in text.split(",")):
        raise ValueError("write it as gpu:8 or gpu:h200:8")
    return text


def seconds_of(text: str) -> int | None:
    """Seconds of Slurm's M, M:S, H:M:S, D-H, D-H:M and D-H:M:S; None for UNLIMITED and whatever is no time."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        return None
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


NAME = "shakedown"  # with which the names of jobs begin: after it comes the run's id


LOGS = "/var/tmp"  # where a job's output goes on nodes that do not see the run directory; it is always there


def clock(seconds: int) -> str:
    """D-HH:MM:SS"""
    return f"{seconds // 86400}-{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
