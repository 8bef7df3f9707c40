"""report.html, report.md and the terminal's summary: what a run says, for people.

The page is one file without scripts or network: charts are inline SVG, and everything that came from a
node (host names, log lines, versions) is escaped. It shows the numbers of summary.json and computes
none but medians over repeats.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner import failures, figures
from runner.figures import complete_cells, nodes_text, number
from runner.judge import analysis, findings, metrics
from runner.results.records import Record
from runner.results.rundir import RunDir
from runner.system.files import write_text_atomic

SIGNS = {"pass": "✓", "fail": "✕", "inconclusive": "?", "not_judged": "–"}
VERDICTS = {"pass": "pass", "fail": "fail", "inconclusive": "inconclusive", "not_judged": "not judged"}
HEADLINES = {
    "pass": "The cluster meets its targets",
    "fail": "The cluster misses what is asked of it",
    "inconclusive": "Not settled: more repeats are needed",
    "not_judged": "It works; its speed was not judged",
}
TITLES = {
    **{name: kind.title for name, kind in failures.KINDS.items()},
    "rank_died": "A rank died",  # what runs say that recorded no kinds yet
    "node_unreachable": "A node stopped answering",
    "wrong_values": "Wrong results",
    "no_records": "Nothing was measured",
    "environment": "Nodes are set up differently",
}
FINDINGS_HEADLINES = {
    "environment": "Nodes are not set up the same",
    "wrong_values": "Collectives return wrong results",
}
# metric -> what it means; docs/metrics.md has the formulas and sources.
GLOSSARY = {
    "tokens_per_s": "Tokens that count in the loss, of all ranks, per second of measured steps. "
    "A step lasts as long as its slowest rank.",
    "tokens_per_s_per_gpu": "tokens_per_s ÷ number of GPUs (ranks).",
    "processed_tokens_per_s": "All real tokens, prompts included and padding excluded, per second.",
    "scaling_efficiency": "tokens_per_s_per_gpu on N nodes ÷ that on the smallest node count, median over repeats, "
    "with a 95 % bootstrap interval over repeats and steps.",
    "step_time_s": "One optimizer step, all accumulation included; p50, p95 and MAD (median absolute deviation) "
    "over measured steps.",
    "mfu": "Model FLOP utilisation: useful arithmetic ÷ the GPUs' dense bf16 peak. Recomputation counts for nothing.",
    "gpu_util_pct_mean": "Share of time in which NVML saw a kernel on the GPU, over measured steps. "
    "It does not say how well the kernel used the GPU: read MFU beside it.",
    "peak_memory_gib": "Largest memory of any rank: allocated GPU memory, or resident memory on a CPU.",
    "packing_utilisation_pct": "Real tokens ÷ positions of the packed sequences.",
    "busbw_gb_per_s": "Bus bandwidth: message size ÷ time, scaled by what the wires carry, so that collectives and "
    "sizes compare with a link's rate. 1 GB = 10⁹ B.",
    "latency_us": "Time of one operation at the smallest size (8 bytes, or one element a rank), the slowest rank's. "
    "For ping_pong half of a round trip.",
    "ceiling": "The highest bus bandwidth that the node's NICs or NVLink allow for any algorithm.",
    "wrong_values": "Elements of a collective's result that differ from the exact answer.",
}


def write(
    run_dir: Path,
    plan: Mapping[str, Any],
    status: Mapping[str, Any],
    summary: Mapping[str, Any],
    records: Iterable[Record],
    facts: findings.Facts,
    telemetry: analysis.Telemetry | None = None,
) -> None:
    """Write report.md and report.html of a run, each as a whole or not at all."""
    page = _page(plan, status, summary, list(records), facts)
    run = RunDir(run_dir)
    write_text_atomic(run.report_md, _render("report.md.j2", page, _markdown_text))
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


def _markdown_text(value: Any) -> Any:
    """Text of a run as plain text of Markdown: no tag, cell border, link or emphasis comes from outside."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(value.split())) if isinstance(value, str) else value


# --- the page ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str = ""
    verdict: str = ""


@dataclass
class Naming:
    """Aliases of nodes, since names are long, and their folded lists."""

    alias: Mapping[str, str] = field(default_factory=dict)

    def short(self, host: str | None) -> str:
        return self.alias.get(host or "", host or "")

    def long(self, host: str | None) -> str:
        return f"{self.alias[host]} ({host})" if host and host in self.alias else host or ""

    def fold(self, hosts: Iterable[str]) -> str:
        from runner.system.nodeset import fold

        names = sorted(self.short(host) for host in hosts)
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
    not_judged = [row["reason"] for row in summary["scaling"] if row["verdict"] == "not_judged"]
    return {
        "plan": plan,
        "summary": summary,
        "verdict": VERDICTS[summary["verdict"]],
        "sign": SIGNS[summary["verdict"]],
        "signs": SIGNS,
        "verdicts": VERDICTS,
        "headline": headline(summary),
        "reason": _with_aliases(summary["reason"], naming),
        "tiles": _tiles(summary),
        "about": _about(plan, summary, naming),
        "targets": [
            {**t, "text": _with_aliases(t["reason"], naming)} for t in summary["targets"] if t["measured"] is not None
        ],
        "unmeasured": [t for t in summary["targets"] if t["measured"] is None],
        "target_text": target_text,
        "scaling": summary["scaling"],
        "scaling_reason": not_judged[-1] if not_judged and len(not_judged) == len(summary["scaling"]) else "",
        "scaling_figures": figures.scaling(summary),
        "busbw_figures": figures.busbw(summary, by_cell),
        "no_ceiling": figures.no_ceiling(plan),
        "training_figures": figures.training(plan, summary, by_cell, naming.short),
        "sft_rows": _sft_rows(summary["cells"]),
        "torch_rows": _torch_rows(summary["cells"]),
        "environment": _environment(facts, naming),
        "findings": [
            {**f, "title": TITLES.get(f["kind"], f["kind"]), "who": naming.long(f["host"])} for f in summary["findings"]
        ],
        "unfinished": _unfinished(summary["cells"], status, naming),
        "glossary": GLOSSARY,
        "number": number,
        "svg": Markup,
    }


def headline(summary: Mapping[str, Any]) -> str:
    """The verdict in plain words."""
    lost = sum(cell["state"] != "complete" for cell in summary["cells"])
    if summary["state"] == "failed":
        return f"The run failed: {lost} of {len(summary['cells'])} cells did not finish"
    if summary["state"] == "incomplete":
        return f"The run is incomplete: {lost} of {len(summary['cells'])} cells did not finish"
    if summary["state"] == "cancelled":
        return f"The run was stopped: {lost} of {len(summary['cells'])} cells did not finish"
    kinds = {finding["kind"] for finding in summary["findings"]}
    if len(kinds) == 1:
        return FINDINGS_HEADLINES.get(kinds.pop(), HEADLINES[summary["verdict"]])
    return HEADLINES[summary["verdict"]]


def _plus_minus(value: float, spread: float) -> str:
    """A value with as many decimals as its spread has meaning."""
    decimals = max(0, 1 - math.floor(math.log10(spread))) if spread > 0 else 3
    return f"{value:.{min(decimals, 3)}f} ± {spread:.{min(decimals, 3)}f}"


def target_text(target: Mapping[str, Any]) -> str:
    """`at least 98 %`, `at most 50 µs`."""
    word = "at least" if target["direction"] == "min" else "at most"
    return f"{word} {target['value']:g} {metrics.unit(target['metric'])}".strip()


def _with_aliases(text: str, naming: Naming) -> str:
    """Long node names in a sentence as aliases, longest first so that no name is cut inside another."""
    for name in sorted(naming.alias, key=len, reverse=True):
        text = text.replace(name, naming.alias[name])
    return text


def _median(cells: Iterable[Mapping[str, Any]], metric: str) -> float | None:
    values = [cell["metrics"][metric] for cell in cells if metric in cell["metrics"]]
    return statistics.median(values) if values else None


def _tiles(summary: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    sft, torch = complete_cells(summary["cells"], "sft"), complete_cells(summary["cells"], "torch")
    if sft:
        (model, nodes), cells = max(sft.items(), key=lambda item: item[0][1])
        where = f"{model}, {nodes_text(nodes)}"
        if (rate := _median(cells, "tokens_per_s")) is not None:
            tiles.append(Tile("tokens/s in the loss", number(rate), where))
            tiles.append(
                Tile(
                    "tokens/s per GPU" if cells[0]["device"] != "cpu" else "tokens/s per rank",
                    number(_median(cells, "tokens_per_s_per_gpu")),
                    where,
                )
            )
        for row in summary["scaling"]:
            if (row["model"], row["num_nodes"]) == (model, nodes) and nodes != row["base_nodes"]:
                tiles.append(
                    Tile(
                        "scaling efficiency",
                        f"{100 * row['efficiency']:.1f} %",
                        f"{nodes_text(nodes)} against {row['base_nodes']}",
                        row["verdict"],
                    )
                )
        if (mfu := _median(cells, "mfu")) is not None:
            tiles.append(Tile("MFU", f"{100 * mfu:.1f} %", where))
        if (util := _median(cells, "gpu_util_pct_mean")) is not None:
            tiles.append(Tile("GPU utilisation", f"{util:.1f} %", where))
    if torch:
        (_, nodes), cells = max(torch.items(), key=lambda item: item[0][1])
        if (busbw := _median(cells, "all_reduce_busbw_gb_per_s_max")) is not None:
            share = _median(cells, "all_reduce_busbw_pct_of_limit")
            note = f"{nodes_text(nodes)}" + (f", {share:.0f} % of the ceiling" if share is not None else "")
            tiles.append(Tile("all-reduce busbw", f"{number(busbw)} GB/s", note))
        across = [(n, group) for (_, n), group in torch.items() if n > 1] or [(nodes, cells)]
        if (latency := _median(across[0][1], "ping_pong_latency_us_p50")) is not None:
            tiles.append(Tile("one-way latency", f"{number(latency)} µs", f"8 B, {nodes_text(across[0][0])}"))
    return tiles


def _about(plan: Mapping[str, Any], summary: Mapping[str, Any], naming: Naming) -> list[tuple[str, str]]:
    """What, when, where, and the command that does it again."""
    hardware = plan.get("hardware", {})
    used = {host for cell in plan["cells"] for host in cell["hosts"]}  # of those that Slurm had to choose from
    hosts = [node["name"] for node in plan["nodes"] if node["name"] in used or not used]
    first: Mapping[str, Any] = plan["cells"][0] if plan["cells"] else {"gpus_per_node": 0, "device": "?"}
    number = first["gpus_per_node"]
    ranks = f"{number} {'CPU rank' if first['device'] == 'cpu' else 'GPU'}{'s'[: number > 1]} each"
    models = ", ".join(plan.get("models", {}))
    rows = [
        ("Run", f"{plan['run_id']}, {summary['state']}"),
        ("Started", str(plan["created"]).replace("T", " ").replace("Z", " UTC")),
        ("Nodes", f"{len(hosts)}: {naming.fold(hosts)}, {ranks}"),
        ("Hardware", f"{hardware.get('gpu') or '?'} ({hardware.get('name', '?')})"),
        ("Model", models or "none"),
        ("Inventory", plan["inventory"]),
        (
            "Started by",
            f"{plan['engine']} over {plan['backend']}, {plan['scaling']} scaling, shakedown {plan['version']}",
        ),
    ]
    if plan.get("passed_over"):
        rows.append(("Passed over", "; ".join(failures.node_lines(plan["passed_over"]))))
    for swap in summary.get("replaced", ()):
        by = f"{naming.short(swap['by'])} took its place" if swap["by"] else "nothing took its place"
        rows.append(("Given up", f"{naming.short(swap['host'])} in {swap['cell']}: {swap['reason']}; {by}"))
    if attempts := summary.get("attempts"):
        rows.append(("Run again", ", ".join(f"{cell} ({number} attempts)" for cell, number in attempts.items())))
    return rows


# --- tables -----------------------------------------------------------------------------------------------


def _sft_rows(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row per sft cell, columns with units; columns in which no cell has anything to say are left out."""
    rows = []
    for cell in cells:
        if cell["test"] != "sft":
            continue
        m = cell["metrics"]
        step = _plus_minus(m["step_time_s_p50"], m["step_time_s_mad"]) if "step_time_s_p50" in m else ""
        loss = f"{m['loss_first']:.3f} → {m['loss_last']:.3f}" if "loss_first" in m else ""
        rows.append(
            {
                "cell": cell["id"],
                "state": _state(cell),
                "tokens/s": _cell_number(m, "tokens_per_s"),
                "per GPU" if cell["device"] != "cpu" else "per rank": _cell_number(m, "tokens_per_s_per_gpu"),
                "processed/s": _cell_number(m, "processed_tokens_per_s"),
                "step p50 ± MAD, s": step,
                "p95, s": _cell_number(m, "step_time_s_p95"),
                "memory, GiB": _cell_number(m, "peak_memory_gib"),
                "loss": loss,
                "MFU, %": f"{100 * m['mfu']:.1f}" if "mfu" in m else "",
                "GPU util, %": f"{m['gpu_util_pct_mean']:.1f}" if "gpu_util_pct_mean" in m else "",
                "first step, s": _cell_number(m, "time_to_first_step_s"),
            }
        )
    return _without_empty(rows)


def _torch_rows(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for cell in cells:
        if cell["test"] != "torch":
            continue
        m = cell["metrics"]
        share = f" ({m['all_reduce_busbw_pct_of_limit']:.0f} %)" if "all_reduce_busbw_pct_of_limit" in m else ""
        latency = _cell_number(m, "ping_pong_latency_us_p50")
        rows.append(
            {
                "cell": cell["id"],
                "state": _state(cell),
                "all-reduce, GB/s (of ceiling)": _cell_number(m, "all_reduce_busbw_gb_per_s_max") + share,
                "all-gather, GB/s": _cell_number(m, "all_gather_busbw_gb_per_s_max"),
                "all-to-all, GB/s": _cell_number(m, "all_to_all_busbw_gb_per_s_max"),
                "send/recv, GB/s": _cell_number(m, "send_recv_busbw_gb_per_s_max"),
                "ping-pong p50 / p99, µs": latency and f"{latency} / {_cell_number(m, 'ping_pong_latency_us_p99')}",
                "all-reduce p50, µs": _cell_number(m, "all_reduce_latency_us_p50"),
                "barrier p50, µs": _cell_number(m, "barrier_latency_us_p50"),
                "wrong values": f"{m['wrong_values']:,.0f}" if "wrong_values" in m else "",
            }
        )
    return _without_empty(rows)


def _state(cell: Mapping[str, Any]) -> str:
    return "" if cell["state"] == "complete" else cell["state"]


def _cell_number(values: Mapping[str, float], metric: str) -> str:
    return number(values[metric]) if metric in values else ""


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    used = {key for row in rows for key, value in row.items() if value}
    return [{key: value for key, value in row.items() if key in used} for row in rows]


def _environment(facts: findings.Facts, naming: Naming) -> dict[str, Any]:
    """Properties that differ, each with its values and who has them; and those that are the same, folded."""
    differing, same = [], []
    hosts: set[str] = set()
    for row in findings.environment(facts):
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
        error = status.get("cells", {}).get(cell["id"], {}).get("error") or {}
        found.append(
            {
                "id": cell["id"],
                "state": cell["state"],
                "message": error.get("message") or "",
                "who": naming.long(error.get("host")),
                "stderr": list(error.get("stderr") or [])[-12:],
            }
        )
    return found


# --- the terminal -----------------------------------------------------------------------------------------


def terminal(summary: Mapping[str, Any]) -> str:
    """The summary as tables of at most 100 columns, free of control characters."""
    from tabulate import tabulate

    def table(rows: list[dict[str, str]]) -> str:
        return tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True, colalign=("left",))

    first = {"cell": "cell", "state": "state"}
    sft = {
        "tokens/s": "tokens/s",
        "per GPU": "per GPU",
        "per rank": "per rank",
        "step p50 ± MAD, s": "step, s",
        "memory, GiB": "GiB",
    }
    sft |= {"loss": "loss", "MFU, %": "MFU, %"}
    torch = {"all-reduce, GB/s (of ceiling)": "all-reduce, GB/s", "send/recv, GB/s": "send/recv, GB/s"}
    torch |= {"ping-pong p50 / p99, µs": "ping-pong, µs", "wrong values": "wrong"}
    parts = []
    for rows, columns in ((_sft_rows(summary["cells"]), sft), (_torch_rows(summary["cells"]), torch)):
        if rows:
            wanted = first | columns
            parts.append(
                table([{wanted[key]: _cut(value) for key, value in row.items() if key in wanted} for row in rows])
            )
    curve = [row for row in summary["scaling"] if row["num_nodes"] != row["base_nodes"]]
    if curve:
        parts.append(
            table(
                [
                    {
                        "scaling": f"{_cut(row['model'])}, {nodes_text(row['num_nodes'])} against {row['base_nodes']}",
                        "efficiency, %": f"{100 * row['efficiency']:.1f}",
                        "95 % CI": f"{100 * row['ci'][0]:.1f} – {100 * row['ci'][1]:.1f}",
                        "target, %": f"{100 * row['target']:g}" if row["target"] else "",
                        "verdict": VERDICTS[row["verdict"]],
                    }
                    for row in curve
                ]
            )
        )
    for finding in summary["findings"]:
        who = f"{finding['host']}: " if finding["host"] else ""
        parts.append(_wrapped(f"✕ {TITLES.get(finding['kind'], finding['kind'])}: {who}{finding['evidence']}"))
    # The findings above say it already, or nothing was judged yet.
    why = "" if summary["findings"] or summary["state"] == "cancelled" else f": {summary['reason']}"
    parts.append(_wrapped(f"{SIGNS[summary['verdict']]} {headline(summary)}{why}"))
    text = "\n\n".join(parts)
    return "".join(char for char in text if char == "\n" or char.isprintable())


def _cut(text: str, width: int = 28) -> str:
    """The end of a long text: a cell's node count and repeat stand there."""
    return text if len(text) <= width else "…" + text[1 - width :]


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100, subsequent_indent="  ")
