"""Rows of data as they are stored: JSON, JSON-lines and Parquet files, and data sets of the Hugging Face hub.

Rows are dictionaries. Only the fields that are asked for are read: others may hold anything, even what Python has no
value for. An error is one line with the file, the row and the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.workloads.data import hub
from runner.workloads.weights import is_pointer

SUFFIXES = (".json", ".jsonl", ".parquet")
# The fields that are read of a message in a chat.
_MESSAGE_FIELDS = ("role", "content")


def files(path: Path) -> list[Path]:
    """The data files of a folder in a fixed order, or the file itself. Raises UsageError where there is none."""
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise UsageError(f"{path}: data files end in {', '.join(SUFFIXES)}; rename or convert it")
        return [path]
    try:
        # Hidden files are other programs': macOS leaves a ._NAME beside each file on foreign disks.
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        files = sorted(file for file in visible if file.suffix in SUFFIXES and file.is_file())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if not files:
        raise UsageError(f"{path}: the folder has no {', '.join(SUFFIXES)} file")
    return files


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of the suffixes and contents of files; their names do not affect the result."""
    total = hashlib.sha256()
    for file in paths:
        try:
            with open(file, "rb") as opened:
                total.update(file.suffix.encode() + hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    return total.hexdigest()


def of_file(file: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row of a data file; of a table only `fields` are read, others are None.

    Raises UsageError, naming the row or the line where it is not readable, and for a file without rows.
    """
    if is_pointer(file):
        raise UsageError(f"{file}: a Git LFS pointer, not the data: run `git lfs pull` there")
    read = {".json": _json_rows, ".jsonl": _jsonl_rows}.get(file.suffix)
    empty = True
    for where, row in read(file) if read else _parquet_rows(file, fields):
        empty = False
        yield f"{file}: {where}", row
    if empty:
        raise UsageError(f"{file}: no rows; give at least one")


def _text(file: Path) -> str:
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{file}: line {line} is not UTF-8 (byte {error.start}); convert the file") from error


def _json(text: str) -> Any:
    """The value of a JSON text. An integer with more digits than Python converts is read as a float."""

    def integer(digits: str) -> float:
        try:
            return int(digits)
        except ValueError:
            return float(digits)

    return json.loads(text, parse_int=integer)


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    text = _text(file)
    if not text.strip():
        return
    try:
        rows = _json(text)
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if it has one object a line" if error.msg == "Extra data" else ""
        raise UsageError(f"{file}: line {error.lineno} is not JSON: {error.msg}{hint}") from error
    except RecursionError as error:
        raise UsageError(f"{file}: nested too deeply to be rows of data") from error
    if not isinstance(rows, list):
        raise UsageError(f"{file}: contains one {type(rows).__name__}; a .json file must be one array of rows")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    # not splitlines(): it also splits at U+2028 and others, which JSON allows inside strings
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", _json(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UsageError(f"{file}: line {number} is not JSON: {reason}") from error


def _parquet_rows(file: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            table = opened.read(columns=[name for name in fields if name in names])
    except Exception as error:  # the library raises many types
        raise UsageError(f"{file}: not readable as Parquet: {hub.first_line(error)}") from error
    yield from _rows(table, names, fields, str(file))


def _rows(
    table: Any,
    names: Iterable[str],
    fields: Sequence[str],
    source: str,
    decode: Callable[[str, Any], Any] = lambda _, value: value,
) -> Iterator[tuple[str, Any]]:
    """The rows of an Arrow table of `fields`; of its other columns, `names`, only that they are there.

    `decode` takes a column's name and a value to the value that is meant.
    """
    unread, read = dict.fromkeys(names), [name for name in fields if name in table.column_names]
    for number in range(table.num_rows):
        where = f"row {number + 1}"
        row: dict[str, Any] = {}
        for name in read:
            try:
                row[name] = decode(name, _value(table.column(name)[number]))
            except Exception as error:  # the library raises many types
                raise UsageError(f"{source}: {where}: {name} cannot be read: {hub.first_line(error)}") from error
            if row.get("messages") is not None:  # then nothing else of the row is used
                break
        yield where, {**unread, **row}


def _value(scalar: Any) -> Any:
    """The Python value of an Arrow scalar; of a list of messages only the fields that are read."""
    import pyarrow

    kind = getattr(scalar.type, "value_type", None)
    if kind is None or not pyarrow.types.is_struct(kind) or not scalar.is_valid:
        return scalar.as_py()
    fields = [field.name for field in kind if field.name in _MESSAGE_FIELDS]
    messages = scalar.values
    columns = {name: messages.field(name).to_pylist() for name in fields}
    return [
        {name: columns[name][number] for name in fields} if messages[number].is_valid else None
        for number in range(len(messages))
    ]


def of_hub(rows: Any, repo: str, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(where, row) of a `datasets.Dataset`, of which nothing else is decoded than `fields`; `repo` is its name."""
    import datasets

    names = [name for name in fields if name in rows.column_names]
    if not names:
        yield f"{repo}: row 1", dict.fromkeys(rows.column_names)
        return
    features = datasets.Features({name: _of_messages(rows.features[name]) for name in names})
    table = rows.select_columns(names).with_format("arrow")[:]
    decoded = _rows(
        table, rows.column_names, fields, repo, lambda name, value: features.decode_example({name: value})[name]
    )
    yield from ((f"{repo}: {where}", row) for where, row in decoded)


def _of_messages(feature: Any) -> Any:
    """A column's feature in `datasets`; of a list of messages only the fields that are read."""
    fields = getattr(feature, "feature", None)
    if not isinstance(fields, dict):
        return feature
    return replace(feature, feature={name: fields[name] for name in fields if name in _MESSAGE_FIELDS})
