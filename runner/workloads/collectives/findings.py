"""What the records of test `torch` show to be wrong: collectives whose results are not the exact answer. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runner.failures import NOBODY, Suspect
from runner.results.records import Record
from runner.system.wording import counted


def find(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    by_cell: Mapping[str, Sequence[Record]],
    facts: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> Iterable[Suspect]:
    """One suspect for each collective of a cell that gave wrong elements, with the sizes at which it did."""
    for cell in cells:
        wrong: dict[str, dict[int, float]] = defaultdict(dict)
        for record in by_cell.get(cell["id"], ()):
            if record.metric == "wrong_values" and record.value > 0:
                context = record.context
                wrong[str(context.get("collective", "collective"))][int(context.get("size_bytes", 0))] = record.value
        for collective, sizes in wrong.items():
            yield Suspect(
                "wrong_values",
                where=f"{cell['id']}: {collective}, {', '.join(f'{size:,} B' for size in sorted(sizes))}",
                evidence=f"{counted(round(sum(sizes.values())), 'wrong element')} in the result of {collective}",
                confidence=NOBODY,  # every rank took part: the values do not show which one is at fault
            )
