"""Reading the sampler's streams, and compacting them into one Parquet file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(stream: Path) -> list[dict[str, Any]]:
    """The samples of one JSON-lines stream; incomplete lines are skipped. Empty where there is no file."""
    if not stream.exists():
        return []
    samples = []
    for line in stream.read_text(errors="replace").splitlines():
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        if isinstance(sample, dict):
            samples.append(sample)
    return samples


def compact(streams: dict[tuple[str, str], Path], target: Path) -> bool:
    """Write the streams, keyed by (cell, host), to `target` as a long Parquet table: cell, host, time_s, name, value.

    Returns False and writes no file where no stream has a sample.
    """
    import polars

    columns: dict[str, list[Any]] = {"cell": [], "host": [], "time_s": [], "name": [], "value": []}
    for (cell, host), stream in sorted(streams.items()):
        for sample in read(stream):
            time_s = sample.pop("time_s", None)
            for name, value in sample.items():
                for column, item in zip(columns, (cell, host, time_s, name, float(value)), strict=True):
                    columns[column].append(item)
    if not columns["cell"]:
        return False
    partial = target.with_suffix(".partial")
    polars.DataFrame(columns).write_parquet(partial)
    partial.replace(target)
    return True
