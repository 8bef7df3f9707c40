"""What an `nccl` cell shows beside its numbers: which sizes have which verdict, and how NCCL carried them. Pure.

`details` in summary.json has

- `collective`, `split` and `rail` of the cell;
- `verdicts`: {"verdict", "from_bytes", "to_bytes", "pct"} for each run of sizes with the same verdict, from the
  smallest size up, `pct` being the lowest and the highest share of the ceiling among them in %, or None;
- `algorithms`: {"algorithm", "protocol", "from_bytes", "to_bytes"} for each run of sizes that NCCL chose the same for;
- `transport`: {"hosts", "net", "link", "nics", "gpudirect", "nvls", "collnet", "via"} for each group of hosts with the
  same evidence: networks, what they speak, the adapters that channels use, whether "all", "some" or "none" of these
  have GPUDirect RDMA, whether NVLink SHARP and the switches' SHARP were used, and the ways of channels inside a node;
- `settings`: {"setting", "asked", "read"} of each setting of NCCL that the cell has: its variables as they were asked
  for, and what NCCL says it read, None where it does not say.

None is what was not observed; the lists are empty where nothing was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from runner.results.records import Record
from runner.workloads.nccl import command, metrics

# The verdict of a size whose two places have different ones: the first of these.
_WORST = ("low", "above", "good", "not_judged")


def details(plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """The `details` of a cell, as the module's docstring describes them."""
    params = cell["params"]
    return {
        **{name: params[name] for name in ("collective", "split", "rail")},
        **_by_size(metrics.rows(plan, cell, records)),
        "transport": transport(records),
        "settings": _settings(params, records),
    }


def _by_size(rows: Iterable[metrics.Row]) -> dict[str, list[dict[str, Any]]]:
    sizes = [list(places) for _, places in groupby(rows, key=lambda row: row.size_bytes)]

    def verdict(places: Sequence[metrics.Row]) -> str:
        return min((row.verdict for row in places), key=_WORST.index)

    def chosen(places: Sequence[metrics.Row]) -> tuple[str | None, str | None]:
        return places[0].algorithm, places[0].protocol

    verdicts, algorithms = [], []
    for name, several in groupby(sizes, key=verdict):
        run = [row for places in several for row in places]
        shares = [100 * row.share for row in run if row.share is not None]
        pct = [min(shares), max(shares)] if shares and name != "not_judged" else None
        verdicts.append({"verdict": name, **_range(run), "pct": pct})
    for (algorithm, protocol), several in groupby(sizes, key=chosen):
        if algorithm:
            run = [row for places in several for row in places]
            algorithms.append({"algorithm": algorithm, "protocol": protocol, **_range(run)})
    return {"verdicts": verdicts, "algorithms": algorithms}


def _range(rows: Sequence[metrics.Row]) -> dict[str, int]:
    return {"from_bytes": rows[0].size_bytes, "to_bytes": rows[-1].size_bytes}


_HAVE = {frozenset({True}): "all", frozenset({True, False}): "some", frozenset({False}): "none"}
_EVIDENCE = ("channels", "nics", "nvls", "collnet")


def transport(records: Iterable[Record]) -> list[dict[str, Any]]:
    """How the ranks of each host reached their peers, by what NCCL said; hosts with the same evidence are one entry."""
    by_host: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.metric in _EVIDENCE and record.host:
            by_host[record.host].append(record)
    alike: list[tuple[dict[str, Any], list[str]]] = []
    for host, said in by_host.items():
        evidence = _evidence(said)
        hosts = next((hosts for known, hosts in alike if known == evidence), None)
        if hosts is None:
            alike.append((evidence, [host]))
        else:
            hosts.append(host)
    return [{"hosts": hosts, **evidence} for evidence, hosts in alike]


def _evidence(said: Iterable[Record]) -> dict[str, Any]:
    """The evidence of one host's ranks. A yes holds where all of them say so."""
    used, found, links, nics, via = set(), set(), set(), set(), set()
    direct: set[bool] = set()
    answers: dict[str, list[bool]] = defaultdict(list)
    for record in said:
        context = record.context
        if record.metric == "nics":
            found.add(str(context["net"]))
            links |= {str(context["link"])} if context.get("link") else set()
        elif record.metric != "channels":
            answers[record.metric].append(bool(record.value))
        elif context.get("net"):
            used.add(str(context["net"]))
            nics |= {str(context["nic"])} if context.get("nic") else set()
            direct.add(bool(context.get("gpudirect")))
        else:
            via.add(str(context["via"]))
    answer = {name: all(each) for name, each in answers.items()}
    return {
        "net": sorted(used or found),
        "link": sorted(links),
        "nics": sorted(nics),
        "gpudirect": _HAVE.get(frozenset(direct)),
        "nvls": answer.get("nvls"),
        "collnet": answer.get("collnet"),
        "via": sorted(via),
    }


def _settings(params: Mapping[str, Any], records: Iterable[Record]) -> list[dict[str, Any]]:
    read: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.metric == "settings":
            for name, value in record.context["values"].items():
                read[name].add(str(value))
    return [
        {"setting": name, "asked": value, "read": ", ".join(sorted(read[name])) if name in read else None}
        for name, value in command.variables(params).items()
    ]
