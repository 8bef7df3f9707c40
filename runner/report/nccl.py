"""Test `nccl` in the report: bandwidth and its verdict by size, rails, and how NCCL carried it all.

One launch of nccl-tests is one cell; the tables have a row for all launches on one number of nodes.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from runner.report import bandwidth, chart
from runner.report.bandwidth import label
from runner.report.figures import Figure, Row, node_colours, nodes_text, number
from runner.report.sections import Charts, Measured, Tile
from runner.report.tables import Table, median, without_empty
from runner.system.nodeset import fold
from runner.system.wording import counted, size_text, span_text
from runner.workloads.nccl import findings, metrics

TITLE, ANCHOR = "NCCL", "nccl"

GLOSSARY = {
    "busbw_gb_per_s": "Bus bandwidth: message size ÷ time, scaled by what the wires carry, so that collectives and "
    "sizes compare with a link's rate. 1 GB = 10⁹ B.",
    "ceiling": "The highest bus bandwidth that the node's NICs or NVLink allow for any algorithm.",
    "latency_us_mean": "Time of one operation at the smallest size, as nccl-tests prints it: the mean over "
    "its iterations and ranks.",
    "verdict_by_size": "Each message size is compared with the ceiling of the algorithm that NCCL used for it. Sizes "
    "whose time is latency, not bytes, are not judged, and no average over sizes is.",
    "wrong_values": "Elements of a collective's result that differ from the exact answer.",
    "rail": "GPU k of every node, with the NICs that it uses. All rails work at the same time, each by itself.",
    "transport": "What NCCL says it used, not what it was asked for: NCCL_DEBUG of every rank.",
}

ALL, NODE, RAIL = "none", "node", "rail"
OUT_OF = {ALL: "", NODE: ", each alone"}
BUSBW, TIME, RAILS = "busbw, GB/s", "time, µs", "rails, GB/s"
MAIN, SHOWN = ("all_reduce", "all_gather", "all_to_all"), 3  # what a terminal shows first, and has room for
FAR = 5  # % from the median of the rails: written beside the value

_ALGORITHMS = {
    "RING": "ring",
    "TREE": "tree",
    "COLLNETDIRECT": "CollNet direct",
    "COLLNETCHAIN": "CollNet chain",
    "NVLSTREE": "NVLS tree",
}


def tables(cells: Sequence[Row]) -> list[Table]:
    """A row for each number of nodes and split: bandwidth, verdict by size, time; then rails, transport, settings."""
    found = []
    groups = _groups(cells)
    good = f"{100 * metrics.LOW:.0f} %"
    whole = {group: several for group, several in groups.items() if group[1] != RAIL}
    if rows := _bandwidth(whole):
        shown = ("state", *_first(rows[0], groups), "below")
        columns = {BUSBW: "GB/s", **{key: key for key in shown}}
        terms = [("busbw_gb_per_s", "GB/s"), ("ceiling", "ceiling"), ("wrong_values", "wrong values")]
        version = ", ".join(dict.fromkeys(str(cell["used"].get("nccl_tests", "")) for cell in cells if cell["used"]))
        remark = f"the highest of all sizes, with its share of the ceiling; ✕: below {good} at some sizes. "
        remark += f"Measured by nccl-tests{f' {version}' if version else ''}."
        found.append(Table(rows, columns, terms, remark, faults=("wrong values",), words=("below",)))
    if rows := _rows("verdict", whole, _verdict):
        remark = (
            f"sizes of {good} and more of their algorithm's ceiling are good. Judged is a size that takes "
            f"{metrics.BYTES_COUNT} times as long as the smallest; no average over sizes is."
        )
        found.append(Table(rows, {}, [("verdict_by_size", "verdict by size")], remark))
    # A split begins with sizes whose time is that of their bytes.
    if rows := _rows(TIME, {group: several for group, several in groups.items() if group[1] == ALL}, _time):
        columns = {key: key for key in (TIME, *_first(rows[0], groups))}
        found.append(Table(rows, columns, [("latency_us_mean", "time of one operation")], "at the smallest size."))
    if rows := _rails({nodes: several for (nodes, split), several in groups.items() if split == RAIL}):
        columns = {key: key for key in (RAILS, "collective", "state", "median", "slowest")}
        remark = "the highest of all sizes of each GPU's rail, while all rails work; its distance from their median."
        found.append(Table(rows, columns, [("rail", "rail"), ("busbw_gb_per_s", "GB/s")], remark))
    if rows := _transports({nodes: several for (nodes, split), several in groups.items() if split == ALL}):
        columns = {key: key for key in rows[0]}
        words = ("transport", "algorithms")
        found.append(Table(rows, columns, [("transport", "transport")], "by NCCL's own words.", words=words))
    if rows := _settings([cell for (_, split), several in groups.items() if split == ALL for cell in several]):
        columns = {key: key for key in rows[0]}
        found.append(Table(rows, columns, remark="what was asked for, and what evidence shows.", words=("NCCL says",)))
    return found


Groups = Mapping[tuple[int, str], Sequence[Row]]  # by num_nodes and split


def _groups(cells: Iterable[Row]) -> dict[tuple[int, str], list[Row]]:
    """(num_nodes, split) -> the cells, from the smallest count up, all GPUs together first."""
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for cell in cells:
        groups[cell["num_nodes"], cell["details"]["split"]].append(cell)
    return dict(sorted(groups.items(), key=lambda group: (group[0][0], (ALL, NODE, RAIL).index(group[0][1]))))


def _by_collective(cells: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for cell in cells:
        found[cell["details"]["collective"]].append(cell)
    return found


def _names(groups: Groups) -> list[str]:
    """The collectives of all groups, in the order in which they are planned."""
    return list(dict.fromkeys(name for cells in groups.values() for name in _by_collective(cells)))


def _first(row: Mapping[str, str], groups: Groups) -> list[str]:
    """The columns of collectives that a terminal shows of a row."""
    measured = [name for name in _names(groups) if label(name) in row]
    return [label(name) for name in sorted(measured, key=lambda name: name not in MAIN)[:SHOWN]]


def _rows(head: str, groups: Groups, text: Callable[[str, Sequence[Row]], str]) -> list[dict[str, str]]:
    """A row for each group of which there is something to say: `text(collective, its cells)` in a column of each."""
    rows = []
    names = _names(groups)
    for (nodes, split), cells in groups.items():
        by_name = _by_collective(cells)
        shown = {label(name): text(name, by_name[name]) if name in by_name else "" for name in names}
        if any(shown.values()):
            rows.append({head: nodes_text(nodes) + OUT_OF[split], **shown})
    return without_empty(rows)


def _bandwidth(groups: Groups) -> list[dict[str, str]]:
    rows = {row[BUSBW]: row for row in _rows(BUSBW, groups, _busbw)}
    found = []
    for (nodes, split), cells in groups.items():
        head, state = nodes_text(nodes) + OUT_OF[split], _state(cells)
        if head not in rows and not state:
            continue
        by_name = _by_collective(cells)
        judged = [name for name, several in by_name.items() if _judged(several)]
        low = [label(name) for name in judged if _ranges(by_name[name], "low")]
        which = "all" if 1 < len(low) == len(judged) else ", ".join(low)
        wrong = [cell["metrics"]["wrong_values"] for cell in cells if "wrong_values" in cell["metrics"]]
        found.append(
            {
                BUSBW: head,
                "state": state,
                **{label(name): rows.get(head, {}).get(label(name), "") for name in _names(groups)},
                "below": f"✕ {which}" if low else "none" if judged else "",
                "wrong values": f"{sum(wrong):,.0f}" if wrong else "",
                "took": span_text(sum(cell.get("took_s") or 0.0 for cell in cells)),
            }
        )
    return without_empty(found)


def _state(cells: Sequence[Row]) -> str:
    """How many of the cells are in another state than complete; empty where none is."""
    states = [cell["state"] for cell in cells if cell["state"] != "complete"]
    return f"{len(states)} of {len(cells)} {'/'.join(dict.fromkeys(states))}" if states else ""


def _verdicts(cell: Row) -> list[dict[str, Any]]:
    """The runs of sizes with one verdict; none in a cell whose speed means nothing."""
    return [] if cell.get("not_judged") else cell["details"]["verdicts"]


def _judged(cells: Iterable[Row]) -> bool:
    """Whether any size of any of the cells is judged."""
    return any(run["verdict"] != "not_judged" for cell in cells for run in _verdicts(cell))


def _busbw(name: str, cells: Sequence[Row]) -> str:
    busbw, share = median(cells, f"{name}_busbw_gb_per_s_max"), median(cells, f"{name}_busbw_pct_of_limit")
    if busbw is None:
        return ""
    return ("✕ " if _ranges(cells, "low") else "") + number(busbw) + (f" ({share:.0f} %)" if share is not None else "")


def _time(name: str, cells: Sequence[Row]) -> str:
    time_us = median(cells, f"{name}_latency_us_mean")
    return "" if time_us is None else number(time_us)


def _ranges(cells: Iterable[Row], verdict: str) -> list[tuple[int, int, float, float]]:
    """(from, to, lowest %, highest %) of the sizes that have `verdict` in any of the cells; those that meet are one."""
    runs = sorted(
        (run["from_bytes"], run["to_bytes"], *run["pct"])
        for cell in cells
        for run in _verdicts(cell)
        if run["verdict"] == verdict
    )
    joined: list[tuple[int, int, float, float]] = []
    for begin, end, least, most in runs:
        if joined and begin <= joined[-1][1]:
            before = joined.pop()
            begin, end, least, most = before[0], max(end, before[1]), min(least, before[2]), max(most, before[3])
        joined.append((begin, end, least, most))
    return joined


def _sizes(begin: int, end: int) -> str:
    return size_text(begin) if begin == end else f"{size_text(begin)} – {size_text(end)}"


def _verdict(name: str, cells: Sequence[Row]) -> str:
    low = [f"{_sizes(begin, end)}: {least:.0f} %" for begin, end, least, _ in _ranges(cells, "low")]
    above = [f"{_sizes(begin, end)}: {most:.0f} %, above" for begin, end, _, most in _ranges(cells, "above")]
    if low or above:
        return f"✕ {'; '.join([*low, *above])}"
    good = _ranges(cells, "good")
    return f"✓ {'; '.join(_sizes(begin, end) for begin, end, _, _ in good)}" if good else ""


# --- rails ------------------------------------------------------------------------------------------------


def _rails_of(cells: Iterable[Row]) -> dict[str, dict[int, float]]:
    """collective -> rail -> its highest busbw in GB/s, median over repeats."""
    values: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        values[cell["details"]["collective"]][cell["details"]["rail"]].append(cell)
    found: dict[str, dict[int, float]] = {}
    for name, rails in values.items():
        measured = {rail: median(several, f"{name}_busbw_gb_per_s_max") for rail, several in sorted(rails.items())}
        found[name] = {rail: busbw for rail, busbw in measured.items() if busbw is not None}
    return {name: rails for name, rails in found.items() if rails}


def _slow(rails: Mapping[int, float], cells: Iterable[Row]) -> set[int]:
    """The rails that are slow beside the fastest one; none where speed means nothing."""
    best = 0.0 if any(cell.get("not_judged") for cell in cells) else max(rails.values())
    return {rail for rail, busbw in rails.items() if busbw < findings.SLOW_RAIL * best}


def _distance(value: float, middle: float) -> str:
    """How far a value is from the median, in brackets; empty where that is little."""
    away = 100 * (value / middle - 1) if middle else 0.0
    return f" ({away:+.0f} %)".replace("-", "−") if abs(away) >= FAR else ""


def _rails(groups: Mapping[int, Sequence[Row]]) -> list[dict[str, str]]:
    rows = []
    for nodes, cells in groups.items():
        for name, rails in _rails_of(cells).items():
            middle, slow = statistics.median(rails.values()), _slow(rails, cells)
            shown = {rail: number(busbw) + _distance(busbw, middle) for rail, busbw in rails.items()}
            last = min(rails, key=lambda rail: rails[rail])
            many = f"{len(slow)} rails, " if len(slow) > 1 else ""
            row = {
                RAILS: nodes_text(nodes),
                "collective": label(name),
                "state": _state(cells),
                "median": number(middle),
            }
            row["slowest"] = ("✕ " if slow else "") + f"{many}rail {last}: {shown[last]}"
            rows.append(row | {f"rail {rail}": ("✕ " if rail in slow else "") + text for rail, text in shown.items()})
    if len({row["collective"] for row in rows}) == 1:
        rows = [{key: value for key, value in row.items() if key != "collective"} for row in rows]
    return without_empty(rows)


# --- transport --------------------------------------------------------------------------------------------


def _network(evidence: Mapping[str, Any]) -> tuple[str, str]:
    """(how ranks reached those on other nodes, over what): `GPUDirect RDMA` and `mlx5_0 and mlx5_1 (RoCE)`."""
    net = evidence["net"]
    rdma = "RDMA" if net == ["IB"] else _listed(net)
    how = {"all": f"GPUDirect {rdma}", "some": f"{rdma}, GPUDirect on some channels only"}
    how |= {"none": f"{rdma} without GPUDirect"}
    link = f" ({_listed(evidence['link'])})" if evidence["link"] else ""
    over = _listed(evidence["nics"]) + link if evidence["nics"] else ""
    return "sockets (TCP), no RDMA" if net == ["Socket"] else how.get(evidence["gpudirect"], rdma), over


def transport_words(evidence: Mapping[str, Any], across: bool) -> str:
    """How ranks reached their peers, as a sentence: `GPUDirect RDMA over mlx5_0 and mlx5_1, NVLS inside a node`.

    `across`: the ranks are on several nodes. Empty where NCCL said nothing of it.
    """
    parts = []
    if across and evidence["net"]:
        how, over = _network(evidence)
        parts.append(f"{how}, over {over}" if over and "," in how else f"{how} over {over}" if over else how)
    if across and evidence["collnet"]:
        parts.append("SHARP in the switches")
    if evidence["nvls"]:
        parts.append("NVLS inside a node")
    elif evidence["via"]:
        kinds = dict.fromkeys(via.partition("/")[0] for via in evidence["via"])
        ways = {"P2P": "peer to peer", "SHM": "shared memory of the host"}
        parts.append(f"{_listed([ways.get(kind, kind) for kind in kinds])} inside a node")
    return ", ".join(parts)


def algorithm_words(runs: Sequence[Mapping[str, Any]]) -> str:
    """NCCL's algorithms by size, from the smallest up: `ring below 1 MiB, tree from 1 MiB`."""
    names: list[tuple[str, int]] = []
    for run in runs:
        name = _algorithm(run["algorithm"])
        if not names or names[-1][0] != name:
            names.append((name, run["from_bytes"]))
    if len(names) < 2:
        return names[0][0] if names else ""
    first = f"{names[0][0]} below {size_text(names[1][1])}"
    return ", ".join([first, *(f"{name} from {size_text(begin)}" for name, begin in names[1:])])


def _algorithm(name: str) -> str:
    return _ALGORITHMS.get(metrics.plain(name), name)


def _listed(names: Sequence[str]) -> str:
    *first, last = names or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _transports(groups: Mapping[int, Sequence[Row]]) -> list[dict[str, str]]:
    """A row for each number of nodes and group of hosts that say the same."""
    rows = []
    for nodes, cells in groups.items():
        algorithms: dict[str, list[str]] = defaultdict(list)
        for name, several in _by_collective(cells).items():
            if words := algorithm_words(several[0]["details"]["algorithms"]):
                algorithms[words].append(label(name))
        said = "; ".join(f"{', '.join(names)}: {words}" for words, names in _most_last(algorithms))
        every = {host for cell in cells for host in cell["hosts"]}
        for words, hosts in _by_words(cells, nodes > 1).items():
            who = "all" if hosts == every else fold(hosts)
            rows.append({"nodes": str(nodes), "hosts": who, "transport": words, "algorithms": said})
    return without_empty(list(_alike(rows)))


def _alike(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """The rows, one for all numbers of nodes that are the same otherwise."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in row if key != "nodes")].append(row)
    for several in found.values():
        yield {**several[0], "nodes": ", ".join(row["nodes"] for row in several)}


def _most_last(algorithms: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    """(words, collectives): what most have in common is last, and said of all others."""
    ordered = sorted(algorithms.items(), key=lambda item: len(item[1]))
    for words, names in ordered:
        rest = len(names) > 2 and words == ordered[-1][0]
        yield words, [("all others" if len(ordered) > 1 else "all")] if rest else names


def _by_words(cells: Iterable[Row], across: bool) -> dict[str, set[str]]:
    """Words on transport -> hosts. A collective that uses less than others on the same hosts adds no row."""
    by_host: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for cell in cells:
        for evidence in cell["details"]["transport"]:
            if words := transport_words(evidence, across):
                for host in evidence["hosts"]:
                    by_host[host][words].add(cell["details"]["collective"])
    found: dict[str, set[str]] = defaultdict(set)
    for host, said in by_host.items():
        words, *others = sorted(said, key=lambda words: -len(said[words]))
        extra = [f"{_listed([label(name) for name in sorted(said[other])])}: {other}" for other in others]
        found["; ".join([words, *extra])].add(host)
    return found


# --- settings ---------------------------------------------------------------------------------------------

_SHOWN_BY = {
    "NCCL_NVLS_ENABLE": "nvls",
    "NCCL_COLLNET_ENABLE": "collnet",
    "NCCL_NET_GDR_LEVEL": "gpudirect",
    "NCCL_NET": "net",
    "NCCL_IB_HCA": "nics",
}


def _settings(cells: Sequence[Row]) -> list[dict[str, str]]:
    """A row for each variable of NCCL that was asked for: what NCCL says it read, and what it did."""
    read: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        for one in cell["details"]["settings"]:
            read[one["setting"], one["asked"]] |= {one["read"]} if one["read"] is not None else set()
    rows = []
    for (name, asked), values in read.items():
        shown = [f"read {_listed(sorted(values))}"] if values else []
        shown += [_used(cells, _SHOWN_BY[name])] if name in _SHOWN_BY else []
        if name == "NCCL_ALGO":
            shown.append(
                _listed(sorted({_algorithm(r["algorithm"]) for c in cells for r in c["details"]["algorithms"]}))
            )
        rows.append({"setting": name, "asked": asked, "NCCL says": "; ".join(filter(None, shown)) or "nothing of it"})
    return rows


def _used(cells: Iterable[Row], what: str) -> str:
    """What evidence shows of one answer: used, partly used, not used. Only NVLS is of cells on one node too."""
    said = [e[what] for c in cells if what == "nvls" or c["num_nodes"] > 1 for e in c["details"]["transport"]]
    if what in ("net", "nics"):
        names = sorted({name for each in said for name in each})
        return f"used {_listed(names)}" if names else ""
    answers = {each in (True, "all") for each in said if each is not None} | {None for each in said if each == "some"}
    if not answers:
        return ""
    return "used" if answers == {True} else "not used" if answers == {False} else "used by some only"


# --- tiles and charts -------------------------------------------------------------------------------------


def tiles(run: Measured) -> list[Tile]:
    """Bandwidth on the largest node count, its transport, and how many collectives are below at some size."""
    groups = {nodes: cells for (nodes, split), cells in _groups(_complete(run)).items() if split == ALL}
    if not groups:
        return []
    nodes = max(groups)
    by_name = _by_collective(groups[nodes])
    found = []
    name = next((name for name in MAIN if name in by_name), next(iter(by_name)))
    if (busbw := median(by_name[name], f"{name}_busbw_gb_per_s_max")) is not None:
        share = median(by_name[name], f"{name}_busbw_pct_of_limit")
        note = nodes_text(nodes) + (f", {share:.0f} % of the ceiling" if share is not None else "")
        found.append(Tile(f"NCCL {label(name)} busbw", f"{number(busbw)} GB/s", note))
    said = [evidence for cell in by_name[name] for evidence in cell["details"]["transport"] if evidence["net"]]
    if nodes > 1 and said:
        odd = min(said, key=lambda evidence: (len(evidence["hosts"]), evidence["gpudirect"] == "all"))
        how, over = _network(odd)
        same = all(_network(evidence) == (how, over) for evidence in said)
        if same:
            found.append(Tile("transport between nodes", how, ", ".join(filter(None, [over, nodes_text(nodes)]))))
        else:
            note = f"{fold(map(run.short, odd['hosts']))}: {how}" + (f", over {over}" if over else "")
            found.append(Tile("transport between nodes", "differs by node", note))
    if judged := {name: several for name, several in by_name.items() if _judged(several)}:
        low = [label(name) for name, several in judged.items() if _ranges(several, "low")]
        text = f"{len(low)} of {counted(len(judged), 'collective')}"
        below = f"below {100 * metrics.LOW:.0f} % of the ceiling"
        found.append(Tile(below, text, (_listed(low) or "at no size") + f", {nodes_text(nodes)}"))
    return found


def _complete(run: Measured) -> list[Row]:
    return [cell for cells in run.groups().values() for cell in cells]


def charts(run: Measured) -> Charts:
    """busbw against message size and rail by rail; `note` says how the largest number of nodes was connected."""
    groups = _groups(_complete(run))
    curves = [curve for (nodes, split), cells in groups.items() if split == ALL for curve in _curves(run, nodes, cells)]
    if not curves:
        return Charts()
    order = list(dict.fromkeys(curve.collective for curve in curves))
    figures = bandwidth.figures(curves, node_colours(run.summary), order)
    for (nodes, split), cells in groups.items():
        if split == RAIL:
            figures += [_rail_bars(name, nodes, rails, cells) for name, rails in _rails_of(cells).items()]
    nodes = max(nodes for nodes, split in groups if split == ALL)
    every = {host for cell in groups[nodes, ALL] for host in cell["hosts"]}
    said = _by_words(groups[nodes, ALL], nodes > 1)
    parts = [words if hosts == every else f"{fold(map(run.short, hosts))}: {words}" for words, hosts in said.items()]
    name = order[0]
    by_size = [algorithm_words(cell["details"]["algorithms"]) for cell in _by_collective(groups[nodes, ALL])[name]]
    several = len(parts) > 1
    parts += [f"{label(name).capitalize()}: {by_size[0]}"] if parts and by_size[0] else []
    notes = [f"{nodes_text(nodes)}{'. ' if several else ': '}{'. '.join(parts)}."] if parts else []
    notes += [] if any(figure.ceilings for figure in figures) else [bandwidth.no_ceiling(run.plan)]
    return Charts(figures, "bus bandwidth against message size", " ".join(notes))


def _curves(run: Measured, nodes: int, cells: Sequence[Row]) -> Iterator[bandwidth.Curve]:
    planned = {cell["id"]: cell for cell in run.plan["cells"]}
    for name, several in _by_collective(cells).items():
        values: dict[bool, dict[int, list[float]]] = {place: defaultdict(list) for place in (False, True)}
        measured = []
        for cell in several:
            rows = metrics.rows(run.plan, planned[cell["id"]], run.by_cell[cell["id"]])
            measured += rows
            for row in rows:
                values[row.in_place][row.size_bytes].append(row.busbw_gb_per_s)
        there, here = ({size: statistics.median(v) for size, v in values[p].items()} for p in (False, True))
        if not (there or here):
            continue
        said = {row.size_bytes: f"{_algorithm(row.algorithm)}, {row.protocol}" for row in measured if row.algorithm}
        yield bandwidth.Curve(name, nodes, there or here, here if there else {}, _ceilings(measured, nodes > 1), said)


def _ceilings(rows: Sequence[metrics.Row], across: bool) -> list[bandwidth.Ceiling]:
    """The ceilings of the judged sizes, or else of the largest, across nodes each with the algorithms that it is of."""
    largest = max(row.size_bytes for row in rows)
    judged = [row for row in rows if row.verdict != "not_judged"] or [row for row in rows if row.size_bytes == largest]
    found: dict[tuple[float, str], dict[str, None]] = defaultdict(dict)
    for row in judged:
        if row.limit:
            said = found[row.limit.gb_per_s, row.limit.binds]
            if row.algorithm and across:
                said[_algorithm(row.algorithm)] = None
    return [bandwidth.Ceiling(value, binds, _listed(list(said))) for (value, binds), said in found.items()]


def _rail_bars(name: str, nodes: int, rails: Mapping[int, float], cells: Sequence[Row]) -> Figure:
    limits = [cell["limits"][name] for cell in cells if name in cell["limits"]]
    limit = limits[0] if limits else None
    marks = []
    if limit:
        marks = [
            chart.Rule(limit["busbw_gb_per_s"], f"its share: {number(limit['busbw_gb_per_s'])} GB/s ({limit['binds']})")
        ]
    slow = _slow(rails, cells)
    bars = [
        chart.Bar(f"rail {rail}", busbw, f"{number(busbw)} GB/s", 1 if rail in slow else 0, marks)
        for rail, busbw in rails.items()
    ]
    ends = [*rails.values(), *(mark.y for mark in marks)]
    title = f"{label(name).capitalize()} of each rail, {nodes_text(nodes)}, GB/s"
    about = "GPU k of every node, all rails at the same time." + (
        " Dashed: a rail's share of the NICs." if limit else ""
    )
    return Figure(title, chart.bars(bars, chart.linear("", ends, from_zero=True), title), about)
