"""The settings for submitting jobs to this cluster's Slurm, and their validation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator, model_validator

from runner.cluster import slurm_gres
from runner.system.nodeset import expand
from runner.system.schema import ConfigFile, check

MOST_GPUS = 256  # of a node: a larger number is a GPU's model, as in gpu:4090
WORD = re.compile(r"[\w\[(*/][\w.,:;@%+=/|&*\[\]()-]*", re.ASCII)  # no blank, quote, $ or #
_EXTRA = re.compile(rf"--([a-z][a-z0-9-]*)(={WORD.pattern})?", re.ASCII)
# Options that the job script sets itself, or that would undo them. Slurm accepts any unambiguous prefix as well.
_OWN = (
    " account array batch chdir clusters constraint cpus-per-gpu cpus-per-task error exclude exclusive export "
    "export-file get-user-env gpus gpus-per-node gpus-per-socket gpus-per-task gres help hold input job-name mem "
    "mem-per-cpu mem-per-gpu no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu "
    "ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable partition qos quiet "
    "requeue reservation share signal test-only time time-min tres-per-task uid gid usage version wait wrap"
)

_PLACEHOLDER = re.compile(
    r"<[a-z_.][^<>\n]*>|\{\{.*?\}\}|\$\{[^}\n]*\}"
    r"|(?<![^\W_])((change|replace|fix)[_-]?me|(?-i:TODO)|x{3,})(?![^\W_])|(?<![^\W_])your[_-]\w+",
    re.IGNORECASE,
)  # fmt: skip


def placeholder(script: str) -> str | None:
    """The first placeholder in `script` (`<account>`, `CHANGEME`, `${X}`), or None."""
    found = _PLACEHOLDER.search(script)
    return found[0] if found else None


def seconds_of(text: str) -> int | None:
    """Seconds of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for UNLIMITED and for any other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        return None
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def clock(seconds: int) -> str:
    """Seconds as Slurm's D-HH:MM:SS."""
    return f"{seconds // 86400}-{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _seconds(value: Any) -> int:
    seconds = seconds_of(value) if isinstance(value, str) else value
    if type(seconds) is not int or seconds <= 0:
        raise ValueError("expected seconds above 0, or a text such as 1-12:00:00")
    return seconds


def _word(value: Any) -> str:
    text = str(value) if type(value) in (str, int) else ""  # YAML reads an account such as 1234 as a number
    if not WORD.fullmatch(text):
        raise ValueError("expected one word without blanks, quotes, $ or #")
    return text


def _gres(value: Any) -> str:
    """The resources as sbatch's --gres takes them: TRES's own spelling (`gres/gpu:h100=8`) is rewritten."""
    text = re.sub(r"(^|,)gres[/:]", r"\1", _word(value)).replace("=", ":")
    found, strange = slurm_gres.parse(text)
    if strange or "(" in text or not found:
        raise ValueError("write it as gpu:8 or gpu:h200:8")
    for one in found:
        if one.name == "gpu" and one.type is None and one.count > MOST_GPUS:
            raise ValueError(f"{text} asks each node for {one.count} GPUs; with their number, as gpu:{one.count}:8")
    return text


def _mem(value: Any) -> str:
    text = str(value) if type(value) in (str, int) else ""
    if not re.fullmatch(r"0|[1-9]\d*[KMGT]", text, re.IGNORECASE):
        raise ValueError("write it with its unit, as 1900G, or 0 for all memory of a node")
    return text


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a list of texts")
    return tuple(texts)


def _hosts(value: Any) -> tuple[str, ...]:
    return tuple(host for nodelist in _texts(value) for host in expand(nodelist))


def _options(value: Any) -> tuple[str, ...]:
    lines = _texts(value)
    for line in lines:
        match = _EXTRA.fullmatch(line)
        if not match:
            raise ValueError("write each option as --name=value, without blanks, quotes, $ or #")
        if f" {match[1]}" in _OWN:
            instead = f"use slurm.{match[1]}" if match[1] in Settings.model_fields else "leave it out"
            raise ValueError(f"--{match[1]} is set by Shakedown; {instead}")
    return lines


Word = Annotated[str, BeforeValidator(_word)]
Seconds = Annotated[int, BeforeValidator(_seconds)]


class Settings(ConfigFile):
    """How jobs are submitted: the inventory's runner_slurm_* variables and `--set slurm.KEY=VALUE`.

    `time_limit_s` None: computed from the cells' own limits; `gres` None: the cell's GPUs; `mem` of each node, as
    sbatch's --mem, None: as much as Slurm allows. `exclude` are Slurm names of nodes that must not be used, `extra`
    whole options such as "--switches=1", `login` the inventory host on which Slurm's commands run (None: this
    machine), `shared` whether nodes see the run directory at the same path (None: as the login host sees it). A job is
    cancelled when it has waited for `wait_s` (None: no limit), or for `stuck_s` for a reason that does not resolve by
    itself.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time_limit_s: Seconds | None = None
    gres: Annotated[str, BeforeValidator(_gres)] | None = None
    mem: Annotated[str, BeforeValidator(_mem)] | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    exclude: Annotated[tuple[str, ...], BeforeValidator(_hosts)] = ()
    extra: Annotated[tuple[str, ...], BeforeValidator(_options)] = ()
    login: Word | None = None
    shared: Annotated[bool, BeforeValidator(_flag)] | None = None
    wait_s: Seconds | None = None
    stuck_s: Seconds = 300

    @property
    def sees_files(self) -> bool:
        """`shared`; until it was observed, True where Slurm's commands run on this machine."""
        return self.login is None if self.shared is None else self.shared

    @model_validator(mode="before")
    @classmethod
    def _of_its_own(cls, values: Any) -> Any:
        """`--reservation` among the further options is the setting; it was given there before it was one."""
        prefix, extra = "--reservation=", values.get("extra") if isinstance(values, Mapping) else None
        extra = [extra] if isinstance(extra, str) else extra if isinstance(extra, list | tuple) else []
        own = [one for one in extra if isinstance(one, str) and one.startswith(prefix)]
        if not own or values.get("reservation") is not None:
            return values
        return {**values, "extra": [one for one in extra if one not in own], "reservation": own[-1][len(prefix) :]}

    @field_validator("*", mode="before")
    @classmethod
    def _replaced(cls, value: Any) -> Any:
        if found := placeholder(str(value)):
            raise ValueError(f"{found!r} is a placeholder; replace it by the cluster's own value")
        return value


def settings(values: Mapping[str, Any], where: str) -> Settings:
    """The settings in `values`, validated. `where` names their source in errors.

    Raises UsageError with `where`, the key, and the nearest valid name or the expected value.
    """
    return check(Settings, {str(key): value for key, value in values.items()}, where)
