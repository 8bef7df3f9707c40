"""The report's sections, one per report module: the interface of such a module, and its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from runner.report.figures import Figure, Row, complete_cells
from runner.report.tables import Table
from runner.results.records import Record
from runner.workloads.registry import TESTS


@dataclass(frozen=True)
class Tile:
    """One of the numbers at the top of the page, as texts; `verdict` adds a badge."""

    label: str
    value: str
    note: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Measured:
    """A run as input of one section: plan.json, summary.json, and records by cell id.

    `test` is the section's test; of several that share a report module, the first that the page would show. `short`
    returns the alias of a node's name.
    """

    test: str
    plan: Mapping[str, Any]
    summary: Mapping[str, Any]
    by_cell: Mapping[str, Sequence[Record]]
    short: Callable[[str], str]

    def groups(self) -> dict[tuple[str | None, int], list[Row]]:
        """(model, num_nodes) -> the test's complete cells, from the smallest node count up."""
        return complete_cells(self.summary["cells"], self.test)


@dataclass(frozen=True)
class Charts:
    """A section's charts. `subject` is appended to the section's title; `note` is printed above the charts."""

    figures: Sequence[Figure] = ()
    subject: str = ""
    note: str = ""


class Section(Protocol):
    """The interface of a report module, that of one test or of several. `GLOSSARY` is term -> explanation."""

    TITLE: str
    ANCHOR: str
    GLOSSARY: Mapping[str, str]

    def tables(self, cells: Sequence[Row]) -> list[Table]:
        """Tables of the tests' cells, complete or not; `cells` are entries of summary.json, at least one."""

    def tiles(self, run: Measured) -> list[Tile]:
        """The test's most important numbers, from its largest node count."""

    def charts(self, run: Measured) -> Charts:
        """The test's charts, drawn from complete cells only."""


def sections() -> dict[str, Section]:
    """Test name -> its section, in the order of the page. Of tests that share one, the first has it."""
    found: dict[str, Section] = {}
    for name in reversed(tuple(TESTS)):
        section = cast(Section, import_module(TESTS[name].report))
        if section not in found.values():
            found[name] = section
    return found


def tables(summary: Mapping[str, Any]) -> dict[str, list[Table]]:
    """The name in `sections` -> its tables, for every section that the run has cells of, in the order of the page."""
    found = {}
    for name, section in sections().items():
        tests = {test for test, row in TESTS.items() if row.report == TESTS[name].report}
        if cells := [cell for cell in summary["cells"] if cell["test"] in tests]:
            found[name] = section.tables(cells)
    return found


def glossary() -> dict[str, str]:
    """Term -> explanation, for every term in the report; docs/metrics.md has the formulas and sources."""
    return {term: text for section in sections().values() for term, text in section.GLOSSARY.items()}
