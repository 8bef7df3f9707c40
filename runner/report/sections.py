"""The report's sections, one a test: what a test's report module offers, and what it is given."""

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
    """One of the numbers at the head of the page."""

    label: str
    value: str
    note: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Measured:
    """A run, as the section of one of its tests sees it. `short` gives a node's alias."""

    test: str
    plan: Mapping[str, Any]
    summary: Mapping[str, Any]
    by_cell: Mapping[str, Sequence[Record]]
    short: Callable[[str], str]

    def groups(self) -> dict[tuple[str | None, int], list[Row]]:
        """(model, num_nodes) -> complete cells of the test, smallest first."""
        return complete_cells(self.summary["cells"], self.test)


@dataclass(frozen=True)
class Charts:
    """A section's charts. `subject` follows the section's title; a `note` stands above them."""

    figures: Sequence[Figure] = ()
    subject: str = ""
    note: str = ""


class Section(Protocol):
    """What a test's report module offers. `GLOSSARY` is term -> what it means."""

    TITLE: str
    ANCHOR: str
    GLOSSARY: Mapping[str, str]

    def tables(self, cells: Sequence[Row]) -> list[Table]:
        """Tables of the test's cells, complete or not; `cells` are those of summary.json, and not empty."""

    def tiles(self, run: Measured) -> list[Tile]:
        """The test's most telling numbers, from its largest node count."""

    def charts(self, run: Measured) -> Charts:
        """The test's charts, of complete cells only."""


def sections() -> dict[str, Section]:
    """The section of every test by the test's name, in the order of the page."""
    return {name: cast(Section, import_module(TESTS[name].report)) for name in reversed(tuple(TESTS))}


def tables(summary: Mapping[str, Any]) -> dict[str, list[Table]]:
    """The tables of every test that the run has cells of, in the order of the page."""
    found = {}
    for name, section in sections().items():
        if cells := [cell for cell in summary["cells"] if cell["test"] == name]:
            found[name] = section.tables(cells)
    return found


def glossary() -> dict[str, str]:
    """What every term of the report means; docs/metrics.md has the formulas and sources."""
    return {term: text for section in sections().values() for term, text in section.GLOSSARY.items()}
