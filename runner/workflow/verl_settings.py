"""verl's settings, checked and spelt where verl is not installed.

`configs/verl/<version>.json` has the configuration of verl's trainers as `--cfg job` shows it, and the fields of the
classes that it becomes; `configs/verl/extract.py` writes it. With it the controller refuses an unknown setting, or a
value of the wrong type, before anything is submitted, and writes the rest as overrides for Hydra.

A setting is a path of names with dots between them, as verl writes it. Hydra wants `+` before one that is not in the
configuration but in the class behind it, or in a dictionary that is open: `Trainer.overrides` sees to that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from runner.errors import FEW, UsageError, unknown
from runner.system.places import CONFIGS

VERSION = "0.9.1"
MANDATORY = "???"  # Hydra's mark of a value that must be given

_WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.-]*")
_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = ("true", "false", "null", "nan", "inf")
_OPTIONAL = re.compile(r"(?:typing\.)?Optional\[(.*)\]|(.*?)\s*\|\s*None")
_CONTAINERS = {"list": list, "List": list, "tuple": list, "Sequence": list, "dict": dict, "Dict": dict, "Mapping": dict}
_SCALARS = {"bool": bool, "int": int, "float": float, "str": str}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a dictionary",
}


@dataclass(frozen=True)
class Place:
    """Where a setting is: whether the configuration has it, its default there, and the type that its class declares."""

    present: bool
    default: Any = None
    declared: str = ""


@dataclass(frozen=True)
class Trainer:
    """One of verl's trainers with one of its training engines.

    `module` is what Python starts, `select` the overrides that choose the engine, `tree` the configuration, and
    `classes` the fields of each class as {field: type}.
    """

    name: str
    engine: str
    module: str
    select: tuple[str, ...]
    tree: Mapping[str, Any]
    classes: Mapping[str, Mapping[str, str]]

    def overrides(self, settings: Mapping[str, Any], where: str = "--set verl.") -> list[str]:
        """The arguments for Hydra, `select` first, then those of `settings` in their order.

        `where` stands before the name in messages. Raises UsageError for an unknown setting, with the nearest one, and
        for a value of another type.
        """
        words = list(self.select)
        for key, value in self.leaves(settings, where).items():
            self.check({key: value}, where)
            words.append(f"{'' if self.place(key, where).present else '+'}{key}={literal(value, key)}")
        return words

    def check(self, leaves: Mapping[str, Any], where: str = "--set verl.") -> None:
        """Raise UsageError for an unknown setting in `leaves`, one that the engine decides, a wrong type, and what
        Hydra cannot be told.
        """
        for key, value in leaves.items():
            if key in self.chosen:
                raise UsageError(f"{where}{key}: the training engine decides it (here {self.engine}); leave it out")
            shown = literal(value, key)
            if wrong := mismatch(self.place(key, where), value):
                raise UsageError(f"{where}{key}: {wrong}, got {shown}")

    def leaves(self, settings: Mapping[str, Any], where: str = "--set verl.") -> dict[str, Any]:
        """`settings` with those in a dictionary by themselves: `a={b: 1}` is `a.b=1`, for Hydra appends no dictionary.

        Raises UsageError for an unknown setting; `where` as for `overrides`.
        """
        found: dict[str, Any] = {}
        for key, value in settings.items():
            several = isinstance(value, Mapping) and value and key not in self.chosen
            if several and not mismatch(self.place(key, where), value):
                found |= self.leaves({f"{key}.{name}": one for name, one in value.items()}, where)
            else:
                found[key] = value
        return found

    @property
    def selected(self) -> dict[str, str]:
        """The names of configuration groups that `select` sets, with their values."""
        return dict(word.split("=", 1) for word in self.select)

    @property
    def chosen(self) -> set[str]:
        """The names of configuration groups that `select` of one engine or another sets."""
        return {
            word.partition("=")[0] for engine in engines(self.name) for word in _variant(self.name, engine)["select"]
        }

    def place(self, key: str, where: str = "") -> Place:
        """Where the setting `key` is. Raises UsageError, with the nearest name, where verl has none of it."""
        node: Any = self.tree
        declared = ""
        parts = key.split(".")
        for position, part in enumerate(parts):
            fields = self._fields(node)
            if isinstance(node, Mapping) and part in node and part != "_target_":
                node, declared = node[part], fields.get(part, "")
                if position and _is_open(node, declared) and position + 1 < len(parts):
                    return self._below(key, parts[position + 1 :], where)
            elif part in fields:
                rest = parts[position + 1 :]
                if not rest:
                    return Place(False, declared=fields[part])
                if _container(fields[part]) is not dict and fields[part] not in self.classes:
                    break
                return self._below(key, rest, where)
            else:
                break
        else:
            return Place(True, node, declared)
        raise self._unknown(key, where)

    def _below(self, key: str, rest: list[str], where: str) -> Place:
        """A place in an open dictionary, whose names verl leaves to others."""
        if all(_NAME.fullmatch(part) for part in rest):
            return Place(False)
        raise self._unknown(key, where)

    def _fields(self, node: Any) -> Mapping[str, str]:
        target = node.get("_target_", "") if isinstance(node, Mapping) else ""
        return self.classes.get(str(target).rpartition(".")[2], {})

    def _unknown(self, key: str, where: str) -> UsageError:
        """The error for a `key` that verl lacks: those that end as it does, those beside it, or the nearest."""
        parent, _, last = key.rpartition(".")
        tails = [path for path in self.paths if path.endswith(f".{last}")]
        if tails and not parent:
            shown = ", ".join(sorted(tails, key=lambda path: (path.count("."), path))[:FEW])
            return UsageError(
                f"{where}{key}: verl {VERSION} has no such setting at the top; did you mean one of {shown}?"
            )
        beside = [path.rpartition(".")[2] for path in self.paths if path.rpartition(".")[0] == parent]
        kind = f"setting of verl {VERSION} ({self.name})"
        if beside:
            return unknown(f"{kind}{f' below {parent}' if parent else ''}:", last, beside, f"{where}{key}")
        return unknown(kind, key, self.paths, f"{where}{key}")

    @cached_property
    def paths(self) -> list[str]:
        """Every setting of the configuration and of the classes behind it."""
        return sorted(set(self._walk(self.tree, "")))

    def _walk(self, node: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name in {**dict.fromkeys(self._fields(node)), **node}:
            if name != "_target_":
                yield f"{prefix}{name}"
                below = node.get(name)
                if isinstance(below, Mapping):
                    yield from self._walk(below, f"{prefix}{name}.")

    def missing(self, settings: Mapping[str, Any], below: str = "") -> list[str]:
        """The settings below the path `below` that verl has no default for and that `settings` does not give."""
        return [
            path
            for path in self.paths
            if path.startswith(below) and path not in settings and self.place(path).default == MANDATORY
        ]


@cache
def _read(version: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / "verl" / f"{version}.json").read_text())
    return content


def _variant(name: str, engine: str) -> dict[str, Any]:
    trainers = _read(VERSION)["trainers"]
    if name not in trainers:
        raise unknown("trainer of verl", name, trainers)
    variants: dict[str, dict[str, Any]] = trainers[name]["variants"]
    if engine not in variants:
        raise unknown("training engine of verl", engine, variants)
    return variants[engine]


def engines(trainer: str) -> list[str]:
    """The training engines whose settings are known: `fsdp` and `megatron`."""
    return sorted(_read(VERSION)["trainers"][trainer]["variants"])


def trainer(name: str, engine: str = "fsdp") -> Trainer:
    """verl's trainer `ppo` (which is GRPO too) or `sft`. Raises UsageError for another name, or another engine."""
    variant = _variant(name, engine)
    content = _read(VERSION)
    module = content["trainers"][name]["module"]
    return Trainer(name, engine, module, tuple(variant["select"]), variant["tree"], content["classes"])


# --- types ---


def _inner(declared: str) -> tuple[str, bool]:
    """(the type without Optional, whether it was optional)."""
    match = _OPTIONAL.fullmatch(declared)
    return ((match[1] or match[2]), True) if match else (declared, False)


def _container(declared: str) -> type | None:
    return _CONTAINERS.get(_inner(declared)[0].partition("[")[0])


def _is_open(node: Any, declared: str) -> bool:
    """Whether names below `node` are free: an empty dictionary, or none yet where the class declares one."""
    return node == {} if isinstance(node, Mapping) else node is None and _container(declared) is dict


def mismatch(place: Place, value: Any) -> str:
    """What a value for `place` should be, where `value` is not that; "" where it is, or where verl leaves it open."""
    inner, optional = _inner(place.declared)
    if value is None:
        allowed = optional or place.default in (None, MANDATORY) or not place.declared or inner == "Any"
        return (
            ""
            if allowed and not isinstance(place.default, (bool, Mapping))
            else f"{_words(_expected(place))} is needed"
        )
    if inner.startswith("Literal["):
        choices = json.loads("[" + inner[8:-1].replace("'", '"') + "]")
        return "" if value in choices else f"one of {', '.join(map(str, choices))} is needed"
    expected = _expected(place)
    if not expected or _is_of(value, expected):
        return ""
    return f"{_words(expected)} is needed"


def _words(expected: tuple[type, ...]) -> str:
    return " or ".join(_WORDS[kind] for kind in expected) if expected else "a value"


def _expected(place: Place) -> tuple[type, ...]:
    """The types that a value may have: what the class declares, else what the default is; () for any."""
    inner = _inner(place.declared)[0]
    if inner in _SCALARS:
        return (_SCALARS[inner],)
    if kind := _container(inner):
        return (kind,)
    default = place.default
    if isinstance(default, str):
        return () if default.startswith("${") or default == MANDATORY else (str, list)  # files: one, or a list of them
    if isinstance(default, list):
        return (list, str)
    return next(((kind,) for kind in (bool, int, float, dict) if isinstance(default, kind)), ())


def _is_of(value: Any, expected: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in expected
    if isinstance(value, int) and float in expected:
        return True
    if isinstance(value, (int, float)) and str in expected:
        return True  # a name that is a number
    if isinstance(value, tuple):
        return list in expected
    return isinstance(value, expected)


# --- spelling ---


def value_of(text: str) -> Any:
    """The value that Hydra reads in `text`, as a user writes it: numbers such as 1e-6 are numbers, `on` is a text."""
    import yaml

    stripped = text.strip()
    if stripped[:1] in ("[", "{"):
        try:
            return _numbers(yaml.safe_load(stripped))
        except (yaml.YAMLError, RecursionError, ValueError):  # an alias of what it is in; a date that there is not
            raise UsageError(f"{text!r} is neither a list nor a dictionary: see its brackets and quotes") from None
    if len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\"":
        return stripped[1:-1]
    if stripped.lower() in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[stripped.lower()]
    return _numbers(stripped)


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value) if set(value) & set(".eE") else int(value)
    return value


def literal(value: Any, key: str = "") -> str:
    """`value` in Hydra's grammar, so that it is read back as the same. Raises UsageError for what that cannot write."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise UsageError(f"{key} = {value}: give a finite number")
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(literal(item, key) for item in value) + "]"
    if isinstance(value, Mapping):
        if bad := next((name for name in value if not _NAME.fullmatch(str(name))), None):
            raise UsageError(f"{key}: {bad!r} is no name for Hydra: use letters, digits and _")
        return "{" + ",".join(f"{name}:{literal(item, key)}" for name, item in value.items()) + "}"
    text = str(value)
    if "${" in text:  # also inside quotes, where Hydra resolves it
        raise UsageError(f"{key} = {text}: ${{…}} stands for another value of verl's: give that value itself")
    if not text.isprintable():
        raise UsageError(f"{key}: {text!r} is no text of one line")
    if _WORD.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    # A backslash is itself, but before a quote or at the end.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"
