"""Records: one measured value each, with its planned and observed context. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """One measured value. `metric` has the unit as a suffix; `context` has the other parameters of the value.

    `host` and `rank` are None for a value of the whole cell.
    """

    run_id: str
    cell: str
    test: str
    model: str | None
    num_nodes: int
    world_size: int
    repeat: int
    metric: str
    value: float
    host: str | None = None
    rank: int | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The record as one line of JSON, without line end. Raises ValueError for NaN and infinity."""
        return json.dumps(asdict(self), allow_nan=False)


def parse_jsonl(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines text; an incomplete line or another JSON value is skipped."""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def load(text: str) -> list[Record]:
    """The records in the text of a records.jsonl; lines that are not records are skipped."""
    known = {field.name for field in fields(Record)}
    needed = known - {"host", "rank", "context", "schema"}
    return [Record(**obj) for obj in parse_jsonl(text) if obj.get("schema") == SCHEMA and needed <= obj.keys() <= known]


def used(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a rank has chosen, by the name of the setting: the fields of its last `used` event; empty without one."""
    found: Mapping[str, Any] = {}
    for event in events:
        if event.get("event") == "used":
            found = event
    return {name: value for name, value in found.items() if name not in ("event", "rank", "time_s")}


def from_events(events: Iterable[Mapping[str, Any]], base: Mapping[str, Any], host: str) -> Iterator[Record]:
    """The records of the `value` events of one rank on `host`; `base` has the fields of Record that the cell sets."""
    for event in events:
        if event.get("event") == "value":
            yield Record(
                **base,
                host=host,
                rank=event["rank"],
                metric=event["metric"],
                value=float(event["value"]),
                context=event.get("context", {}),
            )
