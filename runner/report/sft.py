"""Test `sft` in the report: its numbers, its table and its charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runner.report import chart
from runner.report.figures import Figure, Row, node_colours, nodes_text, number
from runner.report.sections import Charts, Measured, Tile
from runner.report.tables import Table, cell_number, median, plus_minus, state, took, without_empty
from runner.workloads.sft import metrics as sft_metrics

TITLE, ANCHOR = "Training", "training"

GLOSSARY = {
    "tokens_per_s": "Tokens that count in the loss, of all ranks, per second of measured steps. "
    "A step lasts as long as its slowest rank.",
    "tokens_per_s_per_gpu": "tokens_per_s ÷ number of GPUs (ranks).",
    "processed_tokens_per_s": "All real tokens, prompts included and padding excluded, per second.",
    "scaling_efficiency": "tokens_per_s_per_gpu on N nodes ÷ that on the smallest node count, median over repeats, "
    "with a 95 % bootstrap interval over repeats and steps.",
    "step_time_s": "One optimizer step, all accumulation included; p50, p95 and MAD (median absolute deviation) "
    "over measured steps.",
    "mfu": "Model FLOP utilisation: useful arithmetic ÷ the GPUs' dense bf16 peak. Recomputation is not counted.",
    "gpu_util_pct_mean": "Share of time in which NVML saw a kernel on the GPU, over measured steps. "
    "It does not show how well the kernel used the GPU: compare it with MFU.",
    "peak_memory_gib": "Largest memory of any rank: allocated GPU memory, or resident memory on a CPU.",
    "packing_utilisation_pct": "Real tokens ÷ positions of the packed sequences.",
}

COLUMNS = {
    "cell": "cell",
    "state": "state",
    "tokens/s": "tokens/s",
    "per GPU": "per GPU",
    "per rank": "per rank",
    "step p50 ± MAD, s": "step, s",
    "memory, GiB": "GiB",
    "loss": "loss",
    "MFU, %": "MFU, %",
}

TERMS = (
    ("tokens_per_s", "tokens/s"),
    ("tokens_per_s_per_gpu", "per GPU"),
    ("tokens_per_s_per_gpu", "per rank"),
    ("processed_tokens_per_s", "processed/s"),
    ("step_time_s", "step"),
    ("peak_memory_gib", "memory"),
    ("mfu", "MFU"),
    ("gpu_util_pct_mean", "GPU util"),
)


def tables(cells: Sequence[Row]) -> list[Table]:
    """One row per cell, without columns that are empty in every cell."""
    rows = _rows(cells)
    shown = " ".join(rows[0]) if rows else ""
    return [Table(rows, COLUMNS, [(term, text) for term, text in TERMS if text in shown])]


def _rows(cells: Sequence[Row]) -> list[dict[str, str]]:
    rows = []
    for cell in cells:
        m = cell["metrics"]
        step = plus_minus(m["step_time_s_p50"], m["step_time_s_mad"]) if "step_time_s_p50" in m else ""
        loss = f"{m['loss_first']:.3f} → {m['loss_last']:.3f}" if "loss_first" in m else ""
        rows.append(
            {
                "cell": cell["id"],
                "state": state(cell),
                "tokens/s": cell_number(m, "tokens_per_s"),
                "per GPU" if cell["device"] != "cpu" else "per rank": cell_number(m, "tokens_per_s_per_gpu"),
                "processed/s": cell_number(m, "processed_tokens_per_s"),
                "step p50 ± MAD, s": step,
                "p95, s": cell_number(m, "step_time_s_p95"),
                "memory, GiB": cell_number(m, "peak_memory_gib"),
                "loss": loss,
                "MFU, %": f"{100 * m['mfu']:.1f}" if "mfu" in m else "",
                "GPU util, %": f"{m['gpu_util_pct_mean']:.1f}" if "gpu_util_pct_mean" in m else "",
                "first step, s": cell_number(m, "time_to_first_step_s"),
                "took": took(cell),
            }
        )
    return without_empty(rows)


def tiles(run: Measured) -> list[Tile]:
    """Rates (tokens/s), efficiency, MFU and GPU utilisation (%) on the largest node count."""
    tiles: list[Tile] = []
    trained = run.groups()
    if not trained:
        return tiles
    (model, nodes), cells = max(trained.items(), key=lambda item: item[0][1])
    where = f"{model}, {nodes_text(nodes)}"
    if (rate := median(cells, "tokens_per_s")) is not None:
        tiles.append(Tile("tokens/s in the loss", number(rate), where))
        per_gpu = "tokens/s per GPU" if cells[0]["device"] != "cpu" else "tokens/s per rank"
        tiles.append(Tile(per_gpu, number(median(cells, "tokens_per_s_per_gpu")), where))
    for row in run.summary["scaling"]:
        if (row["model"], row["num_nodes"]) == (model, nodes) and nodes != row["base_nodes"]:
            note = f"{nodes_text(nodes)} against {row['base_nodes']}"
            tiles.append(Tile("scaling efficiency", f"{100 * row['efficiency']:.1f} %", note, row["verdict"]))
    if (mfu := median(cells, "mfu")) is not None:
        tiles.append(Tile("MFU", f"{100 * mfu:.1f} %", where))
    if (util := median(cells, "gpu_util_pct_mean")) is not None:
        tiles.append(Tile("GPU utilisation", f"{util:.1f} %", where))
    return tiles


def charts(run: Measured) -> Charts:
    """Step times (s) and peak memory (GiB) per node on the largest node count, and the loss of every node count."""
    groups = run.groups()
    return Charts(_figures(run, groups)) if groups else Charts()


def _figures(run: Measured, groups: Mapping[tuple[str | None, int], Sequence[Row]]) -> list[Figure]:
    short, by_cell = run.short, run.by_cell
    (model, nodes), cells = max(groups.items(), key=lambda item: item[0][1])
    times: dict[str, list[chart.Point]] = {host: [] for host in cells[0]["hosts"]}
    memory: dict[str, list[chart.Point]] = {host: [] for host in cells[0]["hosts"]}
    for cell in cells:
        for step in sft_metrics.steps(by_cell[cell["id"]], cell["world_size"]):
            for host, seconds in step.host_time_s.items() if step.measured else ():
                title = f"{short(host)}, repeat {cell['repeat']}, step {step.index}: {number(seconds, 4)} s"
                times.setdefault(host, []).append(chart.Point(seconds, 0, title))
        for record in by_cell[cell["id"]]:
            if record.metric == "peak_memory_gib":
                title = f"{short(str(record.host))}, rank {record.rank}: {number(record.value)} GiB"
                memory.setdefault(str(record.host), []).append(chart.Point(record.value, 0, title))
    where = f"{model}, {nodes_text(nodes)}"
    figures = []
    if any(times.values()):
        axis = chart.linear("seconds", [p.x for points in times.values() for p in points])
        svg = chart.strips([(short(h), points) for h, points in times.items()], axis, f"step times, {where}")
        about = (
            f"{where}: every measured step of every repeat, each node's slowest rank. "
            "Ranks wait for each other, so one slow node moves all."
        )
        figures.append(Figure("Step time per node, s", svg, about))
    curves = []
    colours = node_colours(run.summary)
    for (name, n), group in groups.items():
        points = [
            chart.Point(step.index, step.loss, f"{name}, {nodes_text(n)}, step {step.index}: {step.loss:.3f}")
            for step in sft_metrics.steps(by_cell[group[0]["id"]], group[0]["world_size"])
            if step.loss is not None
        ]
        if points:
            curves.append(chart.Series(f"{n}n", points, colours[n]))
    if curves:
        last = max(p.x for curve in curves for p in curve.points)
        x = chart.linear("optimizer step", [0, last], pad=0.02)
        y = chart.linear("", [p.y for curve in curves for p in curve.points])
        svg = chart.lines(curves, x, y, "loss against optimizer step")
        legend = [(curve.colour, nodes_text(int(curve.name[:-1]))) for curve in curves]
        figures.append(
            Figure("Loss", svg, "Mean over the loss tokens of all ranks; first repeat, warm-up included.", legend)
        )
    if any(memory.values()):
        limit = run.plan.get("hardware", {}).get("gpu_memory_gib") if cells[0]["device"] != "cpu" else None
        values = [p.x for points in memory.values() for p in points]
        axis = chart.linear("GiB", [*values, *([limit] if limit else [])], from_zero=True)
        rule = chart.Rule(limit, f"GPU memory: {limit} GiB") if limit else None
        svg = chart.strips([(short(h), points) for h, points in memory.items()], axis, f"peak memory, {where}", rule)
        about = f"{where}: each rank's peak." + (
            f" Dashed: the GPU's {limit} GiB." if limit else " Resident memory of CPU ranks."
        )
        figures.append(Figure("Peak memory per node, GiB", svg, about))
    return figures
