"""A run's summary in a terminal: tables of at most 100 columns."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.report import rl, sections
from runner.report.figures import nodes_text
from runner.report.tables import Table
from runner.report.words import SIGNS, VERDICTS, headline, title
from runner.results.rundir import RunDir

WIDTH = 100
NARROW = 8  # columns that a sentence has at least


def terminal(summary: Mapping[str, Any]) -> str:
    """The contents of summary.json as tables of at most 100 columns, without control characters."""
    from tabulate import tabulate

    def table(rows: list[dict[str, str]]) -> str:
        return tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True, colalign=("left",))

    parts, first = [], rl.stages(summary)
    every = [*([first] if first else []), *(shown for tables in sections.tables(summary).values() for shown in tables)]
    for shown in (shown for shown in every if shown.columns):
        if shown.note:
            parts.append(_wrapped(shown.note))
        rows = _columns(shown)
        folded = f"\n… {shown.rest}" if shown.shown else ""
        parts.append(table(rows[: shown.shown or len(rows)]) + folded)
    curve = [row for row in summary["scaling"] if row["num_nodes"] != row["base_nodes"]]
    if curve:
        parts.append(
            table(
                [
                    {
                        "scaling": f"{_cut(row['model'])}, {nodes_text(row['num_nodes'])} against {row['base_nodes']}",
                        "efficiency, %": f"{100 * row['efficiency']:.1f}",
                        "95 % CI": f"{100 * row['ci'][0]:.1f} – {100 * row['ci'][1]:.1f}",
                        "target, %": f"{100 * row['target']:g}" if row["target"] else "",
                        "verdict": VERDICTS[row["verdict"]],
                    }
                    for row in curve
                ]
            )
        )
    for sign, found in (("✕", summary["findings"]), ("•", summary.get("observations", ()))):
        for one in found:
            who = f"{one['host']}: " if one["host"] else ""
            parts.append(_wrapped(f"{sign} {title(one['kind'])}: {who}{one['evidence']}"))
    # The findings above give the reason already, or nothing was judged yet.
    why = "" if summary["findings"] or summary["state"] == "cancelled" else f": {summary['reason']}"
    parts.append(_wrapped(f"{SIGNS[summary['verdict']]} {headline(summary)}{why}"))
    text = "\n\n".join(parts)
    return "".join(char for char in text if char == "\n" or char.isprintable())


def to_finish(run: RunDir) -> str:
    """The line that says how a run is finished, for a shell in the current folder."""
    results = run.path.parent.absolute()
    where = "" if results == Path("results").absolute() else f" --results {shlex.quote(str(results))}"
    return f"to finish it: runner {run.command} --resume {run.run_id}{where}"


def _columns(shown: Table) -> list[dict[str, str]]:
    """The rows of a table with the columns and the texts that a terminal shows, which 100 columns have room for."""
    import textwrap

    keys = [key for key in shown.rows[0] if key in shown.columns]
    widths = [  # tabulate leaves two columns after a header
        max(len(shown.columns[key]) + 2, *(len(_cut(row[key])) for row in shown.rows))
        for key in keys
        if key not in shown.words
    ]
    sentences = len(keys) - len(widths)
    room = max(NARROW, (WIDTH - sum(widths) - 2 * (len(keys) - 1)) // max(1, sentences))
    return [
        {
            shown.columns[key]: "\n".join(textwrap.wrap(row[key], room, break_on_hyphens=False))
            if key in shown.words
            else _cut(row[key])
            for key in keys
        }
        for row in shown.rows
    ]


def _cut(text: str, width: int = 28) -> str:
    """The end of a long text, since a cell's id ends with its node count and repeat."""
    return text if len(text) <= width else "…" + text[1 - width :]


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
