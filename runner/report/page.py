"""report.html and report.md: the results of a run, for people.

The page is one file without scripts or network access: charts are inline SVG, and everything that came from a
node (host names, log lines, versions) is escaped. It shows the numbers of summary.json and computes
nothing but medians over repeats.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner import failures
from runner.judge import analysis, findings
from runner.report import figures, rl, sections
from runner.report.figures import curves, number, per_rank
from runner.report.words import SIGNS, VERDICTS, headline, target_text, title
from runner.results.records import Record
from runner.results.rundir import RunDir
from runner.results.status import each_error
from runner.system.files import write_text_atomic
from runner.system.wording import counted


def write(
    run_dir: Path,
    plan: Mapping[str, Any],
    status: Mapping[str, Any],
    summary: Mapping[str, Any],
    records: Iterable[Record],
    facts: findings.Facts,
    telemetry: analysis.Telemetry | None = None,
) -> None:
    """Write report.md and report.html into `run_dir`, each completely or not at all.

    `plan`, `status` and `summary` are the contents of the JSON files of these names, `facts` is cell id -> host ->
    facts.json. Raises OSError where a file cannot be written.
    """
    page = _page(plan, status, summary, list(records), facts)
    run = RunDir(run_dir)
    fence = max(re.findall("`{3,}", plan["command"]), default="``") + "`"  # longer than any within
    command = _Verbatim(f"{fence}\n{plan['command']}\n{fence}")
    write_text_atomic(run.report_md, _render("report.md.j2", {**page, "command": command}, _markdown_text))
    write_text_atomic(run.report_html, _render("report.html.j2", page, None))


def _render(template: str, page: Mapping[str, Any], finalize: Callable[[Any], Any] | None) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=finalize is None,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(page)


class _Verbatim:
    """A text that is written as it is, for a reader to copy."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


def _markdown_text(value: Any) -> Any:
    """A text of a run escaped for Markdown: it can add no tag, cell border, link or emphasis."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(value.split())) if isinstance(value, str) else value


# --- the page ---------------------------------------------------------------------------------------------


@dataclass
class Naming:
    """How the page names nodes: by alias, since names are long, and in folded lists. `alias` is name -> alias."""

    alias: Mapping[str, str] = field(default_factory=dict)

    def short(self, host: str | None) -> str:
        """The node's alias; the name itself where it has none, and an empty text for None."""
        return self.alias.get(host or "", host or "")

    def long(self, host: str | None) -> str:
        """`alias (name)`; the name alone where it has no alias, and an empty text for None."""
        return f"{self.alias[host]} ({host})" if host and host in self.alias else host or ""

    def fold(self, hosts: Iterable[str]) -> str:
        """The nodes' aliases as a folded set, `node[001-008]`; a comma-separated list where names cannot be folded."""
        return _folded(self.short(host) for host in hosts)

    def both(self, hosts: Sequence[str]) -> str:
        """How many nodes, their folded aliases and their folded names: `2: node[001-002] = gpu[07-08]`."""
        aliases, names = self.fold(hosts), _folded(hosts)
        return f"{len(hosts)}: {aliases}" + (f" = {names}" if names != aliases else "")


def _folded(words: Iterable[str]) -> str:
    from runner.system.nodeset import fold

    names = sorted(words)
    plain = all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    return fold(names) if names and plain else ", ".join(names)


def _page(
    plan: Mapping[str, Any],
    status: Mapping[str, Any],
    summary: Mapping[str, Any],
    records: Sequence[Record],
    facts: findings.Facts,
) -> dict[str, Any]:
    from markupsafe import Markup

    naming = Naming({node["name"]: node["alias"] for node in plan["nodes"]})
    by_cell: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_cell[record.cell].append(record)
    runs = {name: sections.Measured(name, plan, summary, by_cell, naming.short) for name in sections.sections()}
    not_judged = [row["reason"] for row in summary["scaling"] if row["verdict"] == "not_judged"]
    return {
        "plan": plan,
        "summary": summary,
        "verdict": VERDICTS[summary["verdict"]],
        "sign": SIGNS[summary["verdict"]],
        "signs": SIGNS,
        "verdicts": VERDICTS,
        "headline": headline(summary),
        "reason": _with_aliases(summary["reason"], naming.long, naming),
        "tiles": [tile for name, section in sections.sections().items() for tile in section.tiles(runs[name])],
        "about": _about(plan, summary, naming),
        "targets": [
            {**t, "text": _with_aliases(t["reason"], naming.short, naming)}
            for t in summary["targets"]
            if t["measured"] is not None
        ],
        "unmeasured": [t for t in summary["targets"] if t["measured"] is None],
        "target_text": target_text,
        "scaling": summary["scaling"],
        "curves": curves(summary["scaling"]),
        "per": per_rank(summary["cells"]),
        "scaling_reason": not_judged[-1] if not_judged and len(not_judged) == len(summary["scaling"]) else "",
        "scaling_figures": figures.scaling(summary),
        "stages": rl.stages(summary),
        "sections": _sections(runs, summary),
        "environment": _environment(facts, naming),
        "findings": _found(summary["findings"], naming),
        "observations": _found(summary.get("observations", ()), naming),
        "unfinished": _unfinished(summary["cells"], status, naming),
        "glossary": sections.glossary(),
        "number": number,
        "counted": counted,
        "svg": Markup,
    }


def _found(found: Iterable[Mapping[str, Any]], naming: Naming) -> list[dict[str, Any]]:
    """Findings or observations as the page shows them, with their titles and the nodes' aliases."""
    return [
        {
            **one,
            "title": title(one["kind"]),
            "who": naming.long(one["host"]),
            "where": _with_aliases(one["where"], naming.short, naming),
            "evidence": _with_aliases(one["evidence"], naming.long, naming),
        }
        for one in found
    ]


def _with_aliases(text: str, named: Callable[[str], str], naming: Naming) -> str:
    """`text` with each node's name as `named` writes it."""
    names = sorted(naming.alias, key=len, reverse=True)  # so that no name is found inside another
    return re.sub("|".join(map(re.escape, names)), lambda found: named(found[0]), text) if names else text


def _about(plan: Mapping[str, Any], summary: Mapping[str, Any], naming: Naming) -> list[tuple[str, str]]:
    """(name, value) of each row that describes the run: id, start, nodes, hardware, model, engine."""
    hardware = plan.get("hardware", {})
    used = {host for cell in plan["cells"] for host in cell["hosts"]}  # of those that Slurm had to choose from
    hosts = [node["name"] for node in plan["nodes"] if node["name"] in used or not used]
    first: Mapping[str, Any] = plan["cells"][0] if plan["cells"] else {"gpus_per_node": 0, "device": "?"}
    number = first["gpus_per_node"]
    ranks = counted(number, "CPU rank" if first["device"] == "cpu" else "GPU") + " each" * (len(hosts) > 1)
    models = ", ".join(plan.get("models", {}))
    engines = (
        " and ".join(dict.fromkeys(cell.get("engine", plan["engine"]) for cell in plan["cells"])) or plan["engine"]
    )
    rows = [
        ("Run", f"{plan['run_id']}, {summary['state']}"),
        ("Started", str(plan["created"]).replace("T", " ").replace("Z", " UTC")),
        ("Nodes", f"{naming.both(hosts)}, {ranks}"),
        ("Hardware", f"{hardware.get('gpu') or '?'} ({hardware.get('name', '?')})"),
        ("Model", models or "none"),
        ("Inventory", plan["inventory"]),
        (
            "Started by",
            f"{engines} over {plan['backend']}, {plan['scaling']} scaling, shakedown {plan['version']}",
        ),
    ]
    if plan.get("passed_over"):
        rows.append(("Passed over", "; ".join(failures.node_lines(plan["passed_over"]))))
    for swap in summary.get("replaced", ()):
        by = f"; {naming.long(swap['by'])} took its place" if swap["by"] else ""
        rows.append(("Given up", f"{naming.long(swap['host'])} in {swap['cell']}: {swap['reason']}{by}"))
    if attempts := summary.get("attempts"):
        again = (f"{cell} ({counted(tries, 'attempt')})" for cell, tries in attempts.items())
        rows.append(("Run again", ", ".join(again)))
    return rows


def _sections(runs: Mapping[str, sections.Measured], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The page's section of each test that the run has cells of."""
    shown = []
    for name, tables in sections.tables(summary).items():
        section = sections.sections()[name]
        shown.append(
            {
                "title": section.TITLE,
                "anchor": section.ANCHOR,
                "charts": section.charts(runs[name]),
                "tables": tables,
            }
        )
    return shown


# --- tables -----------------------------------------------------------------------------------------------


def _environment(facts: findings.Facts, naming: Naming) -> dict[str, Any]:
    """Properties that differ, each with its values and the nodes that have them; and properties that are the same."""
    differing, same = [], []
    hosts: set[str] = set()
    for row in findings.properties(facts):
        hosts |= set(row["values"])
        name = row["property"].removeprefix("packages.").removeprefix("env.")
        if not row["differs"]:
            same.append((name, next(iter(row["values"].values())) or "absent"))
            continue
        groups: dict[str, list[str]] = defaultdict(list)
        for host, value in row["values"].items():
            groups[value or "absent"].append(host)
        values = [
            {"value": value, "who": naming.fold(group), "odd": set(group) <= set(row["minority"])}
            for value, group in sorted(groups.items(), key=lambda item: -len(item[1]))
        ]
        differing.append({"name": name, "values": values, "majority": row["majority"] is not None})
    return {"hosts": naming.fold(hosts), "count": len(hosts), "differing": differing, "same": same}


def _unfinished(cells: Sequence[Mapping[str, Any]], status: Mapping[str, Any], naming: Naming) -> list[dict[str, Any]]:
    found = []
    for cell in cells:
        if cell["state"] == "complete":
            continue
        error = status.get("cells", {}).get(cell["id"], {}).get("error")
        for one in each_error(error) or [{}]:
            found.append(
                {
                    "id": cell["id"],
                    "state": cell["state"],
                    "message": one.get("message") or "",
                    "who": naming.long(one.get("host")),
                    "stderr": list(one.get("stderr") or [])[-12:],
                }
            )
    return found
