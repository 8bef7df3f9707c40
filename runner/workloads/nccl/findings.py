"""What the records of test `nccl` show to be wrong: values, transports, settings that had no effect, slow rails. Pure.

A node that does otherwise than most is named. What all nodes do alike is a fault of none of them, and is one only on
GPUs: containers have no RDMA. A setting that was asked for is never a fault; that it was not obeyed is one.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from runner.failures import NOBODY, Suspect
from runner.results.records import Record
from runner.system.wording import counted, size_text
from runner.workloads.nccl import command, metrics

Cells = Sequence[Mapping[str, Any]]
ByHost = Mapping[str, list[Record]]

POOR = 0.5  # of the ceiling at every size at which bytes count: a fault, where less than metrics.LOW is an observation
SLOW_RAIL = 0.85  # of the fastest rail's busbw
RAIL_BYTES = 64 << 20  # from this size on, a rail's time is that of its bytes


def find(
    plan: Mapping[str, Any],
    cells: Cells,
    by_cell: Mapping[str, Sequence[Record]],
    facts: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> Iterable[Suspect]:
    """Wrong values first, then what NCCL used in place of what it should have, then what is slow."""
    planned = {cell["id"]: cell for cell in plan["cells"]}
    yield from _wrong_values(cells, by_cell)
    yield from _lost_rows(cells, by_cell)
    # The nodes' transports are judged where all of them take part; each rail and each node use fewer.
    across = [cell for cell in cells if planned[cell["id"]]["params"]["split"] == "none"]
    explained = False
    for suspect in _transports(plan, across, by_cell):
        explained = explained or not suspect.observation
        yield suspect
    yield from _settings(planned, cells, by_cell)
    yield from _slow_rails(planned, cells, by_cell)
    yield from _shares(plan, planned, cells, by_cell, explained)


# --- values -----------------------------------------------------------------------------------------------


def _wrong_values(cells: Cells, by_cell: Mapping[str, Sequence[Record]]) -> Iterator[Suspect]:
    for cell in cells:
        wrong: Counter[int | None] = Counter()  # by size, None where the row was lost
        for record in by_cell.get(cell["id"], ()):
            if record.metric == "wrong_values" and record.value > 0:
                wrong[record.context.get("size_bytes")] += round(record.value)
        if wrong:
            sizes = [size_text(size) for size in sorted(size for size in wrong if size is not None)]
            lost = "" if sizes else "at least "
            yield Suspect(
                "wrong_values",
                where=f"{cell['id']}: {', '.join(sizes) or 'in rows that did not arrive whole'}",
                evidence=f"nccl-tests counted {lost}{counted(wrong.total(), 'wrong element')} in results",
                confidence=NOBODY,  # every rank took part: the values do not show which one is at fault
            )


def _lost_rows(cells: Cells, by_cell: Mapping[str, Sequence[Record]]) -> Iterator[Suspect]:
    for cell in cells:
        lost = sum(record.value for record in by_cell.get(cell["id"], ()) if record.metric == "lost_rows")
        if lost:
            yield Suspect(
                "torn_output",
                where=cell["id"],
                evidence=f"{counted(round(lost), 'row')} of the table of nccl-tests did not arrive whole: left out",
                confidence="high",
            )


# --- transports -------------------------------------------------------------------------------------------


def _transports(plan: Mapping[str, Any], cells: Cells, by_cell: Mapping[str, Sequence[Record]]) -> Iterator[Suspect]:
    """What the nodes used, over all cells: one suspect for each kind and node."""
    hosts: dict[str, list[Record]] = defaultdict(list)
    where: list[str] = []
    for cell in cells:
        if any(record.metric in _EVIDENCE for record in by_cell.get(cell["id"], ())):
            where.append(cell["id"])
        for record in by_cell.get(cell["id"], ()):
            if record.host and record.metric in _EVIDENCE:
                hosts[record.host].append(record)
    if not hosts:
        return
    place = _places(where)
    on_gpu = any(cell["device"] != "cpu" for cell in cells)
    asked = next(cell["params"] for cell in plan["cells"] if cell["id"] in where)
    yield from _networks(hosts, asked, on_gpu, place)
    yield from _rails(plan, hosts, asked, on_gpu, place)
    yield from _gpudirect(hosts, asked, on_gpu, place)
    yield from _nvls(plan, hosts, asked, on_gpu, place)


def _places(cells: Sequence[str]) -> str:
    return cells[0] + (f" and {counted(len(cells) - 1, 'more cell')}" if len(cells) > 1 else "")


_EVIDENCE = ("channels", "gpudirect", "nvls", "nics")


def _odd(values: Mapping[str, Any], good: Callable[[Any], bool]) -> list[str]:
    """The hosts whose value is not good while others' are; none where all are alike."""
    bad = sorted(host for host, value in values.items() if not good(value))
    return bad if len(bad) < len(values) else []


def _networks(hosts: ByHost, asked: Mapping[str, Any], on_gpu: bool, place: str) -> Iterator[Suspect]:
    nets = {
        host: next((str(r.context["net"]) for r in records if r.metric == "nics"), None)
        for host, records in hosts.items()
    }
    nets = {host: net for host, net in nets.items() if net}
    slow = _odd(nets, lambda net: net != "Socket")
    for host in slow:
        others = next(net for net in nets.values() if net != "Socket")
        evidence = f"NCCL uses sockets over {_names(hosts[host])} here, {others} on other nodes"
        yield Suspect("socket_fallback", place, evidence, "high", host)
    if on_gpu and len(hosts) > 1 and not slow and asked["net"] != "Socket" and {*nets.values()} == {"Socket"}:
        evidence = f"NCCL uses sockets over {_names(next(iter(hosts.values())))} on all nodes, no RDMA"
        yield Suspect("socket_fallback", place, evidence, "high")


def _names(records: Iterable[Record]) -> str:
    """The adapters or interfaces that NCCL found."""
    found = {str(name) for record in records if record.metric == "nics" for name in record.context["names"]}
    return _list(found)


def _list(names: Iterable[str]) -> str:
    *first, last = sorted(names) or ["no adapter"]
    return f"{', '.join(first)} and {last}" if first else last


def _used(records: Iterable[Record]) -> frozenset[str]:
    """The adapters that channels between nodes go over; one that NCCL has made of several counts as these."""
    return frozenset(
        name
        for record in records
        if record.metric == "channels"
        and record.context.get("net") not in (None, "Socket")
        and record.context.get("nic")
        for name in str(record.context["nic"]).split("+")
    )


def _rails(
    plan: Mapping[str, Any], hosts: ByHost, asked: Mapping[str, Any], on_gpu: bool, place: str
) -> Iterator[Suspect]:
    used = {host: nics for host, records in hosts.items() if (nics := _used(records))}
    if not used:
        return
    declared = {node["name"]: node.get("nics") or 0 for node in plan["nodes"]}
    most = _usual([len(nics) for nics in used.values()], max(declared.get(host, 0) for host in used))
    few = _odd(used, lambda nics: len(nics) >= most)
    full = Counter(nics for nics in used.values() if len(nics) == most).most_common(1)[0][0]
    for host in few:
        lacks = _list(full - used[host]) if used[host] < full else counted(most - len(used[host]), "rail")
        evidence = f"NCCL uses {_list(used[host])} here, {_list(full)} on other nodes: {lacks} carries nothing"
        yield Suspect("rail_missing", place, evidence, "high", host)
    gpus = next(iter(plan["cells"]))["gpus_per_node"]
    expected = min(min(declared.get(host, 0), gpus) for host in used)
    if on_gpu and not few and most < expected and not asked["hca"]:
        evidence = f"NCCL uses {_list(full)} on every node, which the inventory gives {counted(expected, 'NIC')}"
        yield Suspect("rail_missing", place, evidence, "high")
    common, count = Counter(used.values()).most_common(1)[0]
    same = not few and 1 < count < len(used) and 2 * count > len(used)
    for host, nics in used.items():
        if len(nics) > most or (same and nics != common):
            alike = sum(nics == full for nics in used.values())
            evidence = f"NCCL uses {_list(nics)} here, {_list(full)} on {counted(alike, 'other node')}"
            yield Suspect("wrong_nic", place, evidence, "medium", host, observation=True)


def _usual(numbers: Sequence[int], declared: int) -> int:
    """How many adapters a node should use by what all use: the most, and not what only one node has too many, such as
    the one of its storage. `declared` is what the inventory gives a node, which says 1 where nobody has said anything.
    """
    most = max(numbers)
    if declared > 1:
        return declared if declared in numbers else most
    others = {number for number in numbers if number != most}
    return others.pop() if len(numbers) > 3 and numbers.count(most) == 1 and len(others) == 1 else most


def _gpudirect(hosts: ByHost, asked: Mapping[str, Any], on_gpu: bool, place: str) -> Iterator[Suspect]:
    if asked["gpudirect"] is False:
        return
    # By host: channels over RDMA, and those of them that read and write the GPUs' memory themselves.
    shares: dict[str, tuple[int, int]] = {}
    for host, records in hosts.items():
        rdma = [r for r in records if r.metric == "channels" and r.context.get("net") not in (None, "Socket")]
        if rdma and (total := round(sum(r.value for r in rdma))):
            shares[host] = round(sum(r.value for r in rdma if r.context.get("gpudirect"))), total
    without = _odd(shares, lambda share: share[0] == share[1])
    for host in without:
        direct, total = shares[host]
        evidence = f"{_direct(direct, total)} GPUDirect RDMA here, every one has it on other nodes"
        yield Suspect("no_gpudirect", place, evidence, "high", host)
    if on_gpu and not without and shares and all(direct < total for direct, total in shares.values()):
        direct, total = (sum(each) for each in zip(*shares.values(), strict=True))
        evidence = f"{_direct(direct, total)} GPUDirect RDMA, on any node: data goes through host memory"
        yield Suspect("no_gpudirect", place, evidence, "high")


def _direct(direct: int, total: int) -> str:
    if not direct:
        return "no channel of NCCL between nodes has"
    return f"only {direct} of {total} channels of NCCL between nodes have"


def _nvls(
    plan: Mapping[str, Any], hosts: ByHost, asked: Mapping[str, Any], on_gpu: bool, place: str
) -> Iterator[Suspect]:
    if asked["nvls"] is False:
        return
    said = {
        host: all(r.value for r in found)
        for host, records in hosts.items()
        if (found := [r for r in records if r.metric == "nvls"])
    }
    without = _odd(said, bool)
    for host in without:
        evidence = "NCCL has no NVLink SHARP (NVLS) here, and has it on other nodes"
        yield Suspect("no_nvls", place, evidence, "high", host)
    if on_gpu and said and not any(said.values()) and plan.get("hardware", {}).get("nvls") and _many_gpus(plan):
        evidence = f"NCCL has no NVLink SHARP (NVLS) on any node, which {plan['hardware']['gpu']} has"
        yield Suspect("no_nvls", place, evidence, "high")


def _many_gpus(plan: Mapping[str, Any]) -> bool:
    return any(cell["gpus_per_node"] > 2 for cell in plan["cells"])  # NCCL does without NVLS for two


# --- settings ---------------------------------------------------------------------------------------------


def _settings(
    planned: Mapping[str, Mapping[str, Any]], cells: Cells, by_cell: Mapping[str, Sequence[Record]]
) -> Iterator[Suspect]:
    """What was asked for and is not what NCCL says it used, one suspect a setting."""
    found: dict[str, tuple[str, list[str]]] = {}
    for cell in cells:
        params, records = planned[cell["id"]]["params"], by_cell.get(cell["id"], [])
        for setting, evidence in (
            *_not_used(params, records),
            *_not_chosen(params, records),
            *_not_read(params, records),
        ):
            found.setdefault(setting, (evidence, []))[1].append(cell["id"])
    for setting, (evidence, where) in found.items():
        yield Suspect("setting_ignored", _places(where), f"--set nccl.{setting}: {evidence}", "high")


_MEANS = {
    "nvls": ("NVLink SHARP", "it needs NVSwitches, their fabric manager, and more than two GPUs of a node"),
    "collnet": (
        "SHARP of the switches",
        "it needs the plugin nccl-rdma-sharp-plugins on every node, and the fabric's aggregation manager",
    ),
    "gpudirect": ("GPUDirect RDMA", "it needs nvidia_peermem or DMA-BUF on every node"),
}


def _not_used(params: Mapping[str, Any], records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """(setting, evidence) of what was to be used or left out; nothing where NCCL said nothing of it."""
    # Whether a split has what the setting is about: no NVLS in a rail, no switches inside a node.
    about = {"nvls": params["split"] != "rail", "collnet": params["split"] != "node", "gpudirect": True}
    for setting, (name, needs) in _MEANS.items():
        wanted, used = params[setting], [record.value for record in records if record.metric == setting]
        if wanted is None or not used or not about[setting]:
            continue
        if wanted and not all(used):
            yield f"{setting}=true", f"NCCL did not use {name}: {needs}"
        elif not wanted and any(used):
            yield f"{setting}=false", f"NCCL used {name} all the same"
    nets = {str(record.context["net"]) for record in records if record.metric == "nics"}
    if params["net"] and nets - {params["net"]}:
        yield f"net={params['net']}", f"NCCL used {_list(nets)}"


def _not_chosen(params: Mapping[str, Any], records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """(setting, evidence) of what NCCL has chosen at some size in place of what it was told."""
    for setting, key in (("algo", "algorithm"), ("proto", "protocol")):
        used = {str(record.context[key]) for record in records if record.metric == "algorithm"}
        others = {each for each in used if metrics.plain(each) != metrics.plain(params[setting] or each)}
        if others:
            yield f"{setting}={params[setting]}", f"NCCL chose {_list(others)}: not every collective has every one"


def _not_read(params: Mapping[str, Any], records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """(setting, evidence) of variables that NCCL has read another value of."""
    names = {"NCCL_BUFFSIZE": "buffsize", "NCCL_IB_HCA": "hca", "NCCL_IB_QPS_PER_CONNECTION": "qps_per_connection"}
    read = [record.context["values"] for record in records if record.metric == "settings"]
    for variable, value in command.variables(params).items():
        others = {str(values[variable]) for values in read if variable in values}
        others = {other for other in others if _number(other) != _number(value)}
        if others:
            setting = names.get(variable, f"variables {variable}")
            yield f"{setting}={value}", f"NCCL read {_list(others)}"


def _number(text: str) -> int | str:
    """A value as NCCL understands it: 0x10 is 16."""
    try:
        return int(text, 0)
    except ValueError:
        return text


# --- speed ------------------------------------------------------------------------------------------------


def _slow_rails(
    planned: Mapping[str, Mapping[str, Any]], cells: Cells, by_cell: Mapping[str, Sequence[Record]]
) -> Iterator[Suspect]:
    """Rails that are slower than the fastest one at each large size, in every repeat."""
    # (collective, nodes) -> rail -> size -> busbw of each repeat
    groups: dict[tuple[str, int], dict[int, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    nics: dict[int, set[str]] = defaultdict(set)
    for cell in cells:
        params = planned[cell["id"]]["params"]
        if params["split"] != "rail" or cell.get("not_judged"):
            continue
        gpus = planned[cell["id"]]["gpus_per_node"]
        for record in by_cell.get(cell["id"], ()):
            size = int(record.context.get("size_bytes", 0))
            if record.metric == "busbw_gb_per_s" and size >= RAIL_BYTES and not record.context.get("in_place"):
                rails = groups[params["collective"], cell["num_nodes"]]
                rails[params["rail"]].setdefault(size, []).append(record.value)
            if record.metric == "channels" and record.rank is not None and record.context.get("nic"):
                # GPUs of a node are numbered from the cell's rail on.
                nics[(record.rank + params["rail"]) % gpus].add(str(record.context["nic"]))
    for (collective, nodes), rails in groups.items():
        sizes = set.intersection(*(set(found) for found in rails.values()))
        best = {size: max(statistics.median(found[size]) for found in rails.values()) for size in sizes}
        for rail, found in sorted(rails.items()):
            if sizes and all(max(found[size]) < SLOW_RAIL * best[size] for size in sizes):
                size = max(sizes)
                over = f", over {_list(nics[rail])}" if nics[rail] else ""
                yield Suspect(
                    "slow_rail",
                    where=f"{collective} on {counted(nodes, 'node')}, GPU {rail} of each{over}",
                    evidence=(
                        f"{statistics.median(found[size]):.4g} GB/s at {size_text(size)}, while the fastest rail has "
                        f"{best[size]:.4g}, and less than {100 * SLOW_RAIL:.0f} % of it at every size from "
                        f"{size_text(min(sizes))} on"
                    ),
                    confidence="high",
                )


def _shares(
    plan: Mapping[str, Any],
    planned: Mapping[str, Mapping[str, Any]],
    cells: Cells,
    by_cell: Mapping[str, Sequence[Record]],
    explained: bool,
) -> Iterator[Suspect]:
    """What is far from its ceiling, or above it: one suspect for all cells of a number of nodes and a split.

    Rails are compared with each other instead. `explained`: a transport that is at fault explains slowness.
    """
    above: _Groups = defaultdict(list)
    slow: _Groups = defaultdict(list)
    fallen: _Groups = defaultdict(list)
    for cell in cells:
        params = planned[cell["id"]]["params"]
        if cell.get("not_judged") or params["split"] == "rail":
            continue
        group = cell["num_nodes"], params["split"]
        found = metrics.rows(plan, planned[cell["id"]], by_cell.get(cell["id"], []))
        if higher := [row for row in found if row.verdict == "above"]:
            above[group].append((cell["id"], params["collective"], higher))
        judged = [row for row in found if row.verdict in ("good", "low")]
        if judged and all(row.verdict == "low" for row in judged):
            slow[group].append((cell["id"], params["collective"], judged))
        elif judged and all(row.verdict == "low" for row in judged if row.size_bytes == judged[-1].size_bytes):
            fallen[group].append((cell["id"], params["collective"], judged))
    for several in above.values():
        _, collective, rows = max(several, key=lambda one: max(map(_share, one[2])))
        worst = max(rows, key=_share)
        yield Suspect(
            "above_ceiling",
            where=_where(several),
            evidence=(
                f"{collective}: {worst.busbw_gb_per_s:.4g} GB/s at {size_text(worst.size_bytes)} is {worst.reason}"
                + _others(several, collective)
            ),
            confidence=NOBODY,
            observation=True,
        )
    for several in slow.values():
        _, collective, rows = min(several, key=lambda one: max(map(_share, one[2])))
        best = max(rows, key=_share)
        yield Suspect(
            "slow_fabric",
            where=_where(several),
            evidence=(
                f"{collective}: at best {best.busbw_gb_per_s:.4g} GB/s at {size_text(best.size_bytes)}, {best.reason}"
                + _others(several, collective)
            ),
            confidence=NOBODY,
            observation=explained or _share(best) >= POOR,
        )

    for several in fallen.values():
        _, collective, rows = min(several, key=lambda one: _share(one[2][-1]))
        best, last = max(rows, key=_share), rows[-1]
        others = dict.fromkeys(name for _, name, _ in several if name != collective)
        low = [(cell, name, [row for row in found if row.verdict == "low"]) for cell, name, found in several]
        yield Suspect(
            "slow_fabric",
            where=_where(low),
            evidence=(
                f"{collective}: {best.busbw_gb_per_s:.4g} GB/s at {size_text(best.size_bytes)} falls to "
                f"{last.busbw_gb_per_s:.4g} at {size_text(last.size_bytes)}, {last.reason}"
                + (f"; also {', '.join(others)}" if others else "")
            ),
            confidence=NOBODY,
            observation=explained or _share(last) >= POOR,
        )


_Measured = Sequence[tuple[str, str, Sequence[metrics.Row]]]  # the cell, its collective, and rows of it
_Groups = dict[tuple[int, str], list[tuple[str, str, Sequence[metrics.Row]]]]


def _share(row: metrics.Row) -> float:
    return row.share or 0.0


def _others(found: _Measured, told: str) -> str:
    """The other collectives with the highest share of each, in %."""
    shares: dict[str, float] = {}
    for _, collective, rows in found:
        if collective != told:
            shares[collective] = min(max(map(_share, rows)), shares.get(collective, math.inf))
    return "; also " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items()) if shares else ""


def _where(found: _Measured) -> str:
    """The cells, and their sizes."""
    sizes = sorted({row.size_bytes for _, _, rows in found for row in rows})
    text = size_text(sizes[0]) if len(sizes) == 1 else f"{size_text(sizes[0])} to {size_text(sizes[-1])}"
    return f"{_places([cell for cell, _, _ in found])}: {text}"
