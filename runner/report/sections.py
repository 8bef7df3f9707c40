"""The report's sections, one per test: the interface of a test's report module, and its input."""

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
    """A run as input of one test's section: plan.json, summary.json, and records by cell id.

    `short` returns the alias of a node's name.
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
    """The interface of a test's report module. `GLOSSARY` is term -> explanation."""

    TITLE: str
    ANCHOR: str
    GLOSSARY: Mapping[str, str]

    def tables(self, cells: Sequence[Row]) -> list[Table]:
        """Tables of the test's cells, complete or not; `cells` are entries of summary.json, at least one."""

    def tiles(self, run: Measured) -> list[Tile]:
        """The test's most important numbers, from its largest node count."""

    def charts(self, run: Measured) -> Charts:
        """The test's charts, drawn from complete cells only."""


def sections() -> dict[str, Section]:
    """Test name -> its section, in the order of the page."""
    return {name: cast(Section, import_module(TESTS[name].report)) for name in reversed(tuple(TESTS))}


def tables(summary: Mapping[str, Any]) -> dict[str, list[Table]]:
    """Test name -> its tables, for every test that the run has cells of, in the order of the page."""
    found = {}
    for name, section in sections().items():
        if cells := [cell for cell in summary["cells"] if cell["test"] == name]:
            found[name] = section.tables(cells)
    return found


def glossary() -> dict[str, str]:
    """Term -> explanation, for every term in the report; docs/metrics.md has the formulas and sources."""
    return {term: text for section in sections().values() for term, text in section.GLOSSARY.items()}
