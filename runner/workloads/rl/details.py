"""What a stage of a workflow shows beside its numbers. Pure.

`details` in summary.json has

- `left`: the folder with what the stage leaves, on the nodes that it ran on;
- `answer`: {"question", "answer"} of a model that was asked, or None;
- `outputs`: where metrics are written beside records, by verl's names (`console`, `file`, `wandb`, `tensorboard`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from runner.results.records import Record

_LOGGER = re.compile(r"\+*trainer\.logger=(.*)")


def details(plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """The `details` of a cell, as the module's docstring describes them."""
    params = cell["params"]
    asked = [record.context for record in records if record.metric == "answer_s"]
    return {
        "left": params.get("target") or params.get("checkpoint"),
        "answer": {key: str(asked[-1].get(key, "")) for key in ("question", "answer")} if asked else None,
        "outputs": outputs(params.get("words", ())),
    }


def outputs(words: Sequence[str]) -> list[str]:
    """Where the overrides `words` have verl write its metrics, in their order."""
    found = [match[1] for word in words if (match := _LOGGER.fullmatch(word))]
    return re.findall(r"\w+", found[-1]) if found else []
