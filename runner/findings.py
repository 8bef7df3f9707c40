"""Findings: faults attributed to a node, a setting or nobody, each with its evidence. Pure.

A finding is {"host", "kind", "where", "evidence", "confidence", "fault"}. `fault` separates whose it is:
`node`, `configuration`, `user`, `tool`, or `not identifiable`, which is said rather than guessed; `host` is None
where no single node can be named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner import facts as facts_of
from runner.records import Record

Facts = Mapping[str, Mapping[str, Mapping[str, Any]]]  # cell id -> host -> facts.json


def find(
    cells: Sequence[Mapping[str, Any]],
    status: Mapping[str, Any],
    by_cell: Mapping[str, Sequence[Record]],
    facts: Facts,
) -> list[dict[str, Any]]:
    """Every finding of a run, the gravest first. `cells` are those of summary.json."""
    return [
        *_failures(cells, status),
        *_wrong_values(by_cell),
        *_silent(cells),
        *_environment_findings(environment(facts)),
    ]


@dataclass(frozen=True)
class Kind:
    """A kind of failure: whose fault it is, whether another try may end better, and what to do.

    `retry` is for what infrastructure may do better the next time, never for a user's or a configuration's fault.
    """

    title: str
    fault: str
    retry: bool = False
    advice: str = ""


NODE, CONFIGURATION, USER, TOOL, NOBODY = "node", "configuration", "user", "tool", "not identifiable"

# Every kind of failure that agents, backends and `blame` tell of.
KINDS: Mapping[str, Kind] = {
    # reaching a node
    "unreachable": Kind("A node cannot be reached", NODE, True, "see that it is up and its sshd and network answer"),
    "host_key_changed": Kind(
        "A host key is not the pinned one", CONFIGURATION, False, "compare it before you trust it"
    ),
    "refused_key": Kind("A node refuses the key", CONFIGURATION, False, "authorize the key there (role ssh_mesh)"),
    "lost_connection": Kind("A node was lost", NODE, True, "see whether it was restarted or lost its network"),
    "hung": Kind("A node stopped answering", NODE, True, "look at its console and its network"),
    # what is found before anything starts
    "environment_missing": Kind(
        "Software is missing", CONFIGURATION, False, "install the environment on this node as on the others"
    ),
    "version_mismatch": Kind("Versions differ", CONFIGURATION, False, "install the controller's version there"),
    "in_use": Kind("A node is in use", CONFIGURATION, False, "wait for that run or choose other nodes"),
    "clock": Kind("A clock is wrong", CONFIGURATION, False, "let chrony or NTP set the node's clock"),
    "disk_full": Kind("A disk is full", NODE, True, "free some disk"),
    "port_taken": Kind("A port is taken", NOBODY, True, "see what holds it there; another try takes the next port"),
    "gpu_failed": Kind("A GPU failed", NODE, True, "drain the node and reset the GPU"),
    # how ranks end
    "rank_killed": Kind("A rank was killed", NOBODY, True, "look in the node's log for who killed it"),
    "out_of_memory": Kind("A node ran out of memory", NODE, True, "see what else uses its memory, or offload less"),
    "cuda_out_of_memory": Kind("GPU memory ran out", USER, False, "lower the micro batch or use more nodes"),
    "rank_hung": Kind("A rank hung", NODE, True, "look at the node, and at where the rank stands"),
    "rank_crashed": Kind("A rank crashed", NOBODY, False, "read its last lines"),
    "lost_peers": Kind("Ranks lost each other", NOBODY, True, "look at the network between these nodes"),
    "timed_out": Kind("A cell ran out of time", NOBODY, False, "raise the test's timeout_s, or see what was slow"),
    "launcher_failed": Kind("The launcher failed", TOOL, False, "read its last lines"),
    # the controller
    "not_gathered": Kind("Artefacts were not gathered", NODE, True, "they lie on the node still"),
    "controller_disk_full": Kind("The controller's disk is full", CONFIGURATION, False, "free some disk and resume"),
    "interrupted": Kind("A cell was interrupted", USER, False, "finish it with --resume"),
    # Slurm
    "time_limit": Kind("Slurm's time limit passed", CONFIGURATION, False, "ask for more time, or for less work"),
    "node_failed": Kind("Slurm lost a node", NODE, True, "see `scontrol show node` for the reason"),
    "job_cancelled": Kind("The job was cancelled", USER, False, "finish it with --resume"),
    "not_in_slurm": Kind(
        "Slurm does not know a node", CONFIGURATION, False, "add it to slurm.conf, or name nodes that Slurm has"
    ),
    "not_started": Kind("The job did not start", NOBODY, False, "see the queue's reason"),
    "slurm_unreachable": Kind("Slurm does not answer", NOBODY, True, "see that slurmctld runs and answers here"),
    "preempted": Kind("The job was preempted", NOBODY, True, "choose a QoS or partition that is not preempted"),
    "prolog_failed": Kind("A prolog failed", NODE, True, "see the node's slurmd log"),
    "unknown": Kind(
        "A cell failed", NOBODY, False, "read benchmark.log"
    ),  # also what runs say that recorded no kinds yet
}


@dataclass(frozen=True)
class Problem:
    """Why a node cannot be used: a kind of KINDS, and one line for people."""

    kind: str
    message: str


def node_lines(bad: Iterable[Mapping[str, str] | str]) -> list[str]:
    """A line for each node in `bad`, which has {"host", "alias", "kind", "message"} for each problem of each.

    Plans of earlier versions have such lines already.
    """
    nodes: dict[str, list[str]] = defaultdict(list)
    for one in bad:
        if isinstance(one, str):
            node, _, message = one.partition(": ")
        else:
            node, message = f"{one['alias']} ({one['host']})", one["message"]
        nodes[node].append(message)
    return [f"{node}: {'; '.join(messages)}" for node, messages in nodes.items()]


def _finding(
    kind: str, where: str, evidence: str, confidence: str, fault: str, host: str | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "host": host,
        "kind": kind,
        "where": where,
        "evidence": evidence,
        "confidence": confidence,
        "fault": fault,
        **more,
    }


def _failures(cells: Sequence[Mapping[str, Any]], status: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for cell in cells:
        error = status.get("cells", {}).get(cell["id"], {}).get("error") or {}
        if cell["state"] != "failed" and not (cell["state"] == "incomplete" and error):
            continue
        kind = str(error.get("kind"))
        kind = kind if kind in KINDS else "unknown"
        known, host = KINDS[kind], error.get("host")
        fault = NOBODY if known.fault == NODE and not host else known.fault  # a node that is not known is not blamed
        message = str(error.get("message") or "failed without saying why")
        yield _finding(
            kind,
            where=cell["id"],
            evidence=f"{message}; {known.advice}" if known.advice else message,
            confidence="high" if fault != NOBODY else NOBODY,
            fault=fault,
            host=host,
            stderr=[str(line) for line in error.get("stderr") or []],
        )


def _wrong_values(by_cell: Mapping[str, Sequence[Record]]) -> Iterable[dict[str, Any]]:
    for cell, records in by_cell.items():
        wrong: dict[str, dict[int, float]] = defaultdict(dict)
        for record in records:
            if record.metric == "wrong_values" and record.value > 0:
                context = record.context
                wrong[str(context.get("collective", "collective"))][int(context.get("size_bytes", 0))] = record.value
        for collective, sizes in wrong.items():
            yield _finding(
                "wrong_values",
                where=f"{cell}: {collective}, {', '.join(f'{size:,} B' for size in sorted(sizes))}",
                evidence=f"{sum(sizes.values()):,.0f} elements of the result of {collective} are wrong",
                confidence="not identifiable",  # every rank took part: the values do not say who erred
                fault="not identifiable",
            )


def _silent(cells: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for cell in cells:
        if cell["state"] == "complete" and not cell["metrics"]:
            yield _finding(
                "no_records",
                where=cell["id"],
                evidence=f"{cell['id']} ended well but left no complete measurement",
                confidence="high",
                fault="tool",
            )


# A difference in these changes what is measured or breaks it; any other difference is only marked.
JUDGED_PROPERTIES = frozenset(
    {"driver", "cuda", "nccl"}
    | {f"packages.{name}" for name in ("torch", "deepspeed", "transformers", "accelerate", "shakedown")}
)


def environment(facts: Facts) -> list[dict[str, Any]]:
    """One row per observed property: {"property", "values": {host: text or None}, "differs", "majority",
    "minority": [hosts]}. The majority is what more than half of the hosts have; without one, `majority` is
    None and nobody is the odd one out. What must be unique (hostname, boot id, addresses, UUIDs) is left out.
    """
    hosts: dict[str, dict[str, str]] = {}
    for per_host in facts.values():
        for host, observed in per_host.items():
            hosts.setdefault(host, facts_of.environment(observed))
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


def _environment_findings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One finding per odd node with all that it differs in, and one per property that has no majority."""
    odd: dict[str, list[tuple[str, str]]] = defaultdict(list)
    findings = []
    hosts: set[str] = set()
    for row in rows:
        hosts |= set(row["values"])
        name = row["property"]
        if not row["differs"] or not (name in JUDGED_PROPERTIES or name.startswith("env.NCCL_")):
            continue
        if row["minority"]:
            rest = len(row["values"]) - len(row["minority"])
            for host in row["minority"]:
                mine, theirs = row["values"][host] or "absent", row["majority"] or "absent"
                odd[host].append((name, f"{name} is {mine} here, {theirs} on {rest} other nodes"))
            continue
        groups: dict[str, list[str]] = defaultdict(list)
        for host, value in row["values"].items():
            groups[value or "absent"].append(host)
        text = "; ".join(f"{value} on {', '.join(group)}" for value, group in groups.items())
        findings.append(
            _finding(
                "environment",
                name,
                f"{name} differs and no value has a majority: {text}",
                confidence="not identifiable",
                fault="configuration",
            )
        )
    for host, differences in sorted(odd.items()):
        findings.append(
            _finding(
                "environment",
                where=", ".join(name for name, _ in differences),
                evidence="; ".join(text for _, text in differences),
                confidence="high" if 4 * len(odd) <= len(hosts) else "medium",
                fault="configuration",
                host=host,
            )
        )
    return findings
