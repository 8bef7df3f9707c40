"""Atomic writing of files, and one-line errors for a full or unwritable disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.errors import InfrastructureError, disk_kind


def write_text_atomic(path: Path, text: str, errors: str = "replace") -> None:
    """Write `text` to `path` as UTF-8, atomically: readers see the old or the new file. Raises OSError.

    `errors`: what becomes of what is no text, such as a byte of a file's name, as `str.encode` has it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors=errors)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically. Raises OSError, and ValueError for NaN and infinity.

    It is read as it was, bytes in it that are no text included: what Python writes for them is JSON's own escape.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomic(path, text, "backslashreplace")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an InfrastructureError of one line; `path` names the disk."""
    try:
        yield
    except OSError as error:
        if kind := disk_kind(error):
            raise InfrastructureError(f"the disk of {path} is full: free some space and run again", kind) from error
        raise InfrastructureError(f"cannot write to {error.filename or path}: {error.strerror}") from error
