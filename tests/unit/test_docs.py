"""What the documents say of the code is what the code says. `RECORD=1 make unit` writes the table of kinds anew."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from conftest import ROOT
from runner.cluster.slurm import Settings
from runner.failures import KINDS
from runner.workloads.registry import TESTS

GUIDE = ROOT / "docs" / "guide.md"
KINDS_TABLE = re.compile(r"(?<=<!-- kinds -->\n).*?(?=<!-- /kinds -->)", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *DOCUMENTS,
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("roles/*/README.md")),
    *sorted(ROOT.glob("benchmarks/results/*.md")),
]
SEPARATOR = re.compile(r"\|( *:?-+:? *\|)+")


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
    assert named == list(Settings.model_fields)


@pytest.mark.parametrize(
    ("name", "title", "alike"),
    [("nccl", "Findings", set()), ("gpu", "What it finds, and what to do", {"wrong_values", "drift"})],  # not as kinds
)
def test_every_setting_and_finding_of_a_test_with_a_page_of_its_own_is_explained(name, title, alike):
    def first_column(title):
        section = (ROOT / "docs" / f"{name}.md").read_text().partition(f"\n## {title}")[2].partition("\n## ")[0]
        return re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", section, re.MULTILINE)))

    assert sorted(first_column("Settings")) == sorted(TESTS[name].load_settings().model_fields)
    findings = Path(TESTS[name].load_findings().__file__)
    sources = "".join(path.read_text() for path in (findings, findings.with_name("condition.py")) if path.exists())
    found = {word for word in re.findall(r'"(\w+)"', sources) if word in KINDS}
    assert sorted(first_column(title)) == sorted(found - alike)


def test_the_picture_of_the_house_has_every_door_in_its_order():
    doors = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    picture = (ROOT / "docs" / "images" / "house.svg").read_text()
    assert re.findall(r"\w+", " ".join(re.findall(r'class="name"[^>]*>([^<]*)<', picture))) == doors


def test_every_door_is_described():
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| door |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    doors = {path.stem for path in (ROOT / "runner").iterdir() if not path.name.startswith("_")}
    assert sorted(named) == sorted(doors)


def test_every_variable_of_the_inventory_is_explained():
    from runner.cluster.inventory import _Variables

    text = GUIDE.read_text() + (ROOT / "docs" / "slurm.md").read_text()
    assert [name for name in _Variables.model_fields if f"`{name}" not in text] == []


def prose(text):
    """The lines of a page outside blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()


def headings(text):
    return [line for line in prose(text) if re.match(r"#+ ", line)]


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    return {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-") for line in headings(text)}


def first(line):
    return line[:1]


def cells(row):
    return re.split(r"(?<!\\)\|", row)


def malformed(text):
    """The faults of a page that was cut or joined wrongly: text that occurs twice, tables that are not whole."""
    blocks = [list(lines) for filled, lines in groupby(prose(text), lambda line: bool(line.strip())) if filled]
    tables = [
        [line for line in block if not line.startswith("<!--")] for block in blocks if "|" in {*map(first, block)}
    ]
    paragraphs = ["\n".join(block) for block in blocks if not {"|", "#"} & {*map(first, block)}]
    rows = [row for table in tables for row in table[2:]]
    faults = [f"twice: {one}" for one, count in Counter([*headings(text), *rows, *paragraphs]).items() if count > 1]
    for table in tables:
        if others := [line for line in table if first(line) != "|"]:
            faults.append(f"prose in a table: {others[0]}")
        elif len(table) < 3 or not SEPARATOR.fullmatch(table[1]):
            faults.append(f"a table without a header, a separator or a row: {table[0]}")
        else:
            wrong = [row for row in table if len(cells(row)) != len(cells(table[0]))]
            faults += [f"another number of cells than the header: {row}" for row in wrong]
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_is_well_formed(page):
    assert malformed(page.read_text()) == []


TABLE = "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"## One\n\n{TABLE}\n```\n## One\n```\n", None),
        ("## One\n\ntext\n\n## One\n", "twice: ## One"),
        ("some text\n\nother\n\nsome text\n", "twice: some text"),
        (f"{TABLE}\n| c | d |\n| --- | --- |\n| 1 | 2 |\n", "twice: | 1 | 2 |"),
        (f"{TABLE}| 3 | 4 | 5 |\n", "another number of cells than the header: | 3 | 4 | 5 |"),
        (f"{TABLE}and so on\n", "prose in a table: and so on"),
        ("| a | b |\n| 1 | 2 |\n| 3 | 4 |\n", "a table without a header, a separator or a row: | a | b |"),
        ("| a \\| b | c |\n| --- | --- |\n| 1 | 2 |\n", None),
    ],
)
def test_a_malformed_page_is_detected(text, fault):
    assert malformed(text)[:1] == ([fault] if fault else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", "\n".join(prose(page.read_text()))):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_that_is_named_exists(document):
    """Of the commands of `runner`, wherever a line of a document starts one."""
    from click import Context

    from runner.cli.main import cli

    for line in re.findall(r"^\s*runner (\w+ .*)$|`runner (\w+ [^`]*)`", document.read_text(), re.MULTILINE):
        words = re.sub(r"\s#.*|\s{3,}.*", "", "".join(line)).split()
        words = words[: words.index("--")] if "--" in words else words  # what follows is another program's
        command = cli
        while words and hasattr(command, "get_command"):
            found = command.get_command(Context(command), words[0].strip(","))
            if found is None:
                break
            command, words = found, words[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--"}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, line


def test_make_says_that_it_installs_and_shows_what():
    """Most of the minutes of the first `make bench` are pip's."""
    argv = ["make", "--dry-run", "--always-make", "bench"]
    lines = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    installs = [number for number, line in enumerate(lines) if "pip install" in line]
    said = next(number for number, line in enumerate(lines) if line.startswith('echo "installing'))
    assert installs and said < installs[0]
    assert not [lines[number] for number in installs if {"-q", "--quiet"} & set(lines[number].split())]
    assert lines[-1].endswith("bench -i inventory/local --model tiny")
