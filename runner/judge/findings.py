"""Findings: faults attributed to a node, a setting, or to nothing identifiable, each with its evidence. Pure.

A finding is {"host", "kind", "where", "evidence", "confidence", "fault"}; that of a node that was given up during the
run has `replaced_by` as well, the node that took its place or None. `kind` is one of `failures.KINDS`, which
gives the fault and the advice at the end of the evidence; `host` is None where no single node can be named. An
observation has the same shape, but proves no fault: it never fails a run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runner.cluster import facts as facts_of
from runner.failures import KINDS, NOBODY, NODE, Suspect, current
from runner.results.records import Record
from runner.results.status import each_error
from runner.system.wording import counted
from runner.workloads.registry import TESTS

Facts = Mapping[str, Mapping[str, Mapping[str, Any]]]  # cell id -> host -> facts.json


def suspects(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    by_cell: Mapping[str, Sequence[Record]],
    facts: Facts,
) -> list[Suspect]:
    """What the tests find in their own records, faults and observations.

    `plan` is the contents of plan.json, `cells` are those of summary.json, `by_cell` maps cell ids to records.
    """
    found: list[Suspect] = []
    for name, test in TESTS.items():
        own = [cell for cell in cells if cell["test"] == name]
        if own and (module := test.load_findings()):
            found += module.find(plan, own, by_cell, facts)
    return found


def find(
    cells: Sequence[Mapping[str, Any]], status: Mapping[str, Any], found: Sequence[Suspect], facts: Facts
) -> list[dict[str, Any]]:
    """Every finding of a run, the most serious first.

    `cells` are those of summary.json, `status` is the contents of status.json, `found` are the tests' suspects.
    """
    failures = list(_failures(cells, status))
    return [
        *failures,
        *_given_up(status, failures),
        *(_of(suspect) for suspect in found if not suspect.observation),
        *_without_records(cells),
        *_differences(properties(facts)),
    ]


def observations(found: Sequence[Suspect]) -> list[dict[str, Any]]:
    """What is worth knowing of a run but proves no fault, in the shape of findings."""
    return [_of(suspect) for suspect in found if suspect.observation]


def _of(suspect: Suspect) -> dict[str, Any]:
    return _finding(suspect.kind, suspect.where, suspect.evidence, suspect.confidence, host=suspect.host)


def _finding(
    kind: str, where: str, evidence: str, confidence: str, host: str | None = None, **more: Any
) -> dict[str, Any]:
    known = KINDS[kind]
    return {
        "host": host,
        "kind": kind,
        "where": where,
        "evidence": f"{evidence}; {known.advice}" if known.advice else evidence,
        "confidence": confidence,
        "fault": _fault(kind, host),
        **more,
    }


def _fault(kind: str, host: str | None) -> str:
    """The fault of a kind: `not identifiable` instead of `node` where the node is unknown."""
    fault = KINDS[kind].fault
    return NOBODY if fault == NODE and not host else fault


def _failures(cells: Sequence[Mapping[str, Any]], status: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for cell in cells:
        error = status.get("cells", {}).get(cell["id"], {}).get("error") or {}
        if cell["state"] != "failed" and not (cell["state"] == "incomplete" and error):
            continue
        for one in each_error(error) or [{}]:
            kind, host = current(one.get("kind")), one.get("host")
            yield _finding(
                kind,
                where=cell["id"],
                evidence=str(one.get("message") or "failed without an error message"),
                confidence=NOBODY if _fault(kind, host) == NOBODY else "high",
                host=host,
                stderr=[str(line) for line in one.get("stderr") or []],
            )


def _given_up(status: Mapping[str, Any], failures: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Nodes that a run did without from some cell on, unless a cell that did not end well shows the same."""
    shown = {(finding["host"], finding["kind"]) for finding in failures}
    for swap in status.get("replaced", ()):
        kind, host = current(swap.get("kind")), swap["host"]
        if (host, kind) not in shown:
            by = f", {swap['by']} took its place" if swap.get("by") else ""
            yield _finding(
                kind,
                where=swap["cell"],
                evidence=f"given up in {swap['cell']}{by}: {swap['reason']}",
                confidence="high",
                host=host,
                replaced_by=swap.get("by"),
            )


def _without_records(cells: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for cell in cells:
        if cell["state"] == "complete" and not cell["metrics"]:
            yield _finding(
                "no_records",
                where=cell["id"],
                evidence="the cell completed but recorded no complete measurement",
                confidence="high",
            )


# A difference in these changes or breaks a measurement; any other difference is only highlighted.
JUDGED_PROPERTIES = frozenset(
    {"driver", "cuda", "nccl"}
    | {f"packages.{name}" for name in ("torch", "deepspeed", "transformers", "accelerate", "shakedown")}
)


JUDGED_BEGINNINGS = ("env.NCCL_", facts_of.TRAFFIC)


def properties(facts: Facts) -> list[dict[str, Any]]:
    """One row per observed property: {"property", "values": {host: text or None}, "differs", "majority",
    "minority": [hosts]}.

    The majority is the value of more than half of the hosts; without one, `majority` is None and `minority` is empty.
    Properties that are unique to a node (hostname, boot id, addresses, UUIDs) are left out.
    """
    hosts: dict[str, dict[str, str]] = {}
    for per_host in facts.values():
        for host, observed in per_host.items():
            hosts.setdefault(host, facts_of.comparable(observed))
    names = sorted(hosts)
    rows = []
    for prop in dict.fromkeys(key for name in names for key in hosts[name]):
        values = {name: hosts[name].get(prop) for name in names}
        common, count = Counter(values.values()).most_common(1)[0]
        differs = count < len(names)
        has_majority = 2 * count > len(names)
        rows.append(
            {
                "property": prop,
                "values": values,
                "differs": differs,
                "majority": common if has_majority else None,
                "minority": [n for n in names if values[n] != common] if differs and has_majority else [],
            }
        )
    return rows


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One finding per deviating node with all its differences, and one per property without a majority."""
    deviating: dict[str, list[tuple[str, str]]] = defaultdict(list)
    findings = []
    hosts: set[str] = set()
    for row in rows:
        hosts |= set(row["values"])
        name = row["property"]
        if not row["differs"] or not (name in JUDGED_PROPERTIES or name.startswith(JUDGED_BEGINNINGS)):
            continue
        if row["minority"]:
            rest = len(row["values"]) - len(row["minority"])
            for host in row["minority"]:
                mine, theirs = row["values"][host] or "absent", row["majority"] or "absent"
                deviating[host].append((name, f"{name} is {mine} here, {theirs} on {counted(rest, 'other node')}"))
            continue
        groups: dict[str, list[str]] = defaultdict(list)
        for host, value in row["values"].items():
            groups[value or "absent"].append(host)
        text = "; ".join(f"{value} on {', '.join(group)}" for value, group in groups.items())
        findings.append(
            _finding(
                "environment",
                name,
                f"{name} differs, and no value has a majority: {text}",
                confidence=NOBODY,
            )
        )
    for host, differences in sorted(deviating.items()):
        findings.append(
            _finding(
                "environment",
                where=", ".join(name for name, _ in differences),
                evidence="; ".join(text for _, text in differences),
                confidence="high" if 4 * len(deviating) <= len(hosts) else "medium",
                host=host,
            )
        )
    return findings
