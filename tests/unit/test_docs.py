"""What the documents say of the code is what the code says. `RECORD=1 make unit` writes the table of kinds anew."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest

from conftest import ROOT
from runner.cluster.slurm import Settings
from runner.failures import KINDS

GUIDE = ROOT / "docs" / "guide.md"
KINDS_TABLE = re.compile(r"(?<=<!-- kinds -->\n).*?(?=<!-- /kinds -->)", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def table_of_kinds():
    rows = [
        f"| `{name}` | {kind.title} | {kind.fault} | {'yes' if kind.retry else 'no'} | {kind.advice} |"
        for name, kind in KINDS.items()
    ]
    return "\n".join(
        ["| kind | what it means | whose fault | `--retries` | what to do |", "| --- " * 5 + "|", *rows, ""]
    )


def test_the_guide_has_every_kind_of_failure():
    if os.environ.get("RECORD") == "1":
        GUIDE.write_text(KINDS_TABLE.sub(lambda _: table_of_kinds(), GUIDE.read_text()))
    assert KINDS_TABLE.findall(GUIDE.read_text()) == [table_of_kinds()], "not up to date: RECORD=1 make unit writes it"


def test_every_setting_of_slurm_is_explained():
    section = (ROOT / "docs" / "slurm.md").read_text().partition("\n## Settings")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", section, re.MULTILINE)))
    assert named == [field.name for field in dataclasses.fields(Settings)]


def test_every_module_has_its_one_idea():
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| module |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)/?`", "".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE)))
    modules = {path.stem for path in (ROOT / "runner").glob("*.py") if path.stem != "__init__"}
    assert sorted(named) == sorted({*modules, "workloads"})


def test_every_variable_of_the_inventory_is_explained():
    from runner.cluster.inventory import _Variables

    text = GUIDE.read_text() + (ROOT / "docs" / "slurm.md").read_text()
    assert [name for name in _Variables.model_fields if f"`{name}" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", document.read_text()):
        assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_that_is_named_exists(document):
    """Of the commands of `runner`, wherever a line of a document starts one."""
    from click import Context

    from runner.cli.main import cli

    for line in re.findall(r"^\s*runner (\w+ .*)$|`runner (\w+ [^`]*)`", document.read_text(), re.MULTILINE):
        words = re.sub(r"\s#.*|\s{3,}.*", "", "".join(line)).split()
        command = cli
        while words and hasattr(command, "get_command"):
            found = command.get_command(Context(command), words[0].strip(","))
            if found is None:
                break
            command, words = found, words[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--"}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, line
