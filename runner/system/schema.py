"""Validation of input files with pydantic; errors name the file, the field and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from runner.errors import UsageError, unknown

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(value: Any) -> Any:
    """The bytes of `8`, `64K`, `1MiB`, `8G` (powers of 1024, as in nccl-tests); any other value unchanged."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
    return value


def _size(value: Any) -> Any:
    found = parse_size(value)
    if isinstance(found, str):
        raise ValueError("give a number of bytes, such as 8, 64K, 1M or 8G")
    return found


PositiveInt = Annotated[int, Field(gt=0, strict=True)]  # strict: YAML's `yes` is not a number


Size = Annotated[PositiveInt, BeforeValidator(_size)]


class ConfigFile(BaseModel):
    """The base of every schema of a YAML file: frozen, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


AnyFile = TypeVar("AnyFile", bound=BaseModel)


def check(schema: type[AnyFile], values: Any, where: str) -> AnyFile:
    """`values` validated as `schema`; `where` names the file in errors.

    Raises UsageError of one line for the first error, with the file, the field and the nearest valid name.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: expected a mapping of settings, found {type(values).__name__}")
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        # A misspelt key also makes the correct one missing: report the misspelling.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            place = ".".join([where, *(str(part) for part in first["loc"][:-1])])
            raise unknown("key", str(first["loc"][-1]), _fields_at(schema, first["loc"]), place) from None
        if first["type"] == "missing":
            raise UsageError(f"{where}: {field} is missing") from None
        if first["type"] == "literal_error":
            expected = re.findall(r"'([^']+)'", first.get("ctx", {}).get("expected", ""))
            raise unknown("value", str(first["input"]), expected, f"{where}: {field}") from None
        cause = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":
            cause = "give a list, such as [a, b]"
        if first["type"] == "string_pattern_mismatch" and (described := _description(schema, first["loc"])):
            cause = f"give {described}"
        raise UsageError(f"{where}: {field} = {first['input']!r}: {cause}" if field else f"{where}: {cause}") from None


def _description(schema: type[BaseModel], location: tuple[int | str, ...]) -> str | None:
    """What the field at `location` is, where its schema says so."""
    return next((one.description for name, one in schema.model_fields.items() if location == (name,)), None)


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> Iterable[str]:
    """The field names of the model that holds the last part of `location`."""
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = schema.model_fields[part].annotation
            nested = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
            schema = next(kind for kind in nested if issubclass(kind, BaseModel))
    return schema.model_fields


def _twice(node: Any, visited: set[int]) -> Iterator[Any]:
    """The keys below a node of YAML that its mapping has had before."""
    if id(node) in visited or not isinstance(getattr(node, "value", None), list):
        return
    visited.add(id(node))
    seen = set()
    for one in node.value:
        key, below = one if isinstance(one, tuple) else (None, one)
        if key is not None:
            if (key.tag, str(key.value)) in seen:
                yield key
            seen.add((key.tag, str(key.value)))
        yield from _twice(below, visited)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises UsageError where it cannot be read, is not valid YAML, or has a key twice: the first would be lost.
    """
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        for key in _twice(node, set()):
            raise yaml.constructor.ConstructorError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
        return loader.construct_document(node) if node is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, RecursionError) as error:  # a date that there is not; lists in lists without an end
        raise UsageError(f"{path}: not valid YAML: {error}") from None
