"""Test `sft` in the report: its numbers, its table and its charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runner.plan import speed
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
    "mfu_of_matmul": "Useful arithmetic ÷ the rate of matrix products of this model's shapes on the same GPUs, taken "
    "before the first step: what is missing is the trainer's, not the GPU's.",
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

# How a cell was trained, by what its ranks reported, in the order of the columns.
USED = {
    "attention": "attention",
    "precision": "precision",
    "recompute": "recompute",
    "zero_stage": "ZeRO",
    "micro_batch": "micro-batch",
    "gradient_accumulation": "accumulation",
    "compile": "compiled",
    "liger": "Liger",
    "trainer": "trainer",
    "optimizer": "optimizer",
}

TERMS = (
    ("tokens_per_s", "tokens/s"),
    ("tokens_per_s_per_gpu", "per GPU"),
    ("tokens_per_s_per_gpu", "per rank"),
    ("processed_tokens_per_s", "processed/s"),
    ("step_time_s", "step"),
    ("peak_memory_gib", "memory"),
    ("mfu", "MFU"),
    ("mfu_of_matmul", "of matmul"),
    ("gpu_util_pct_mean", "GPU util"),
)


def tables(cells: Sequence[Row]) -> list[Table]:
    """One row per cell, without columns that are empty in every cell."""
    rows = _rows(cells)
    shown = " ".join(rows[0]) if rows else ""
    found = [Table(rows, COLUMNS, [(term, text) for term, text in TERMS if text in shown])]
    if used := _used(cells):
        chosen = dict.fromkeys(cell["chosen"] for cell in cells if cell.get("chosen"))
        found.append(Table(used, {}, remark=" ".join(f"Chosen: {text}." for text in chosen)))
    return found


def _used(cells: Sequence[Row]) -> list[dict[str, str]]:
    """How the cells were trained; one row for cells that were trained alike."""
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for cell in cells:
        if used := cell.get("used"):
            row = tuple((title, _word(used.get(key))) for key, title in USED.items())
            alike.setdefault(row, []).append(cell["id"])
    rows = [{"cell": " ".join(ids), **dict(row)} for row, ids in alike.items()]
    if len(rows) == 1:
        rows[0]["cell"] = "every cell"
    return without_empty(rows)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


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
                "of matmul, %": f"{100 * m['mfu_of_matmul']:.1f}" if "mfu_of_matmul" in m else "",
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
        of_matmul = median(cells, "mfu_of_matmul")
        note = where if of_matmul is None else f"{where}, {100 * of_matmul:.0f} % of the matmul rate"
        tiles.append(Tile("MFU", f"{100 * mfu:.1f} %", note))
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
    figures = [*_against_plan(run, groups), *_arithmetic(run, groups)]
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


def _bars(title: str, rows: Sequence[chart.Bar], about: str) -> list[Figure]:
    if not rows:
        return []
    ends = [*(row.value for row in rows), *(mark.y for row in rows for mark in row.marks)]
    return [Figure(title, chart.bars(rows, chart.linear("", ends, from_zero=True), title), about)]


def _names(groups: Iterable[tuple[str | None, int]]) -> dict[tuple[str | None, int], str]:
    several = len({model for model, _ in groups}) > 1
    return {(model, n): f"{model}, {n}n" if several else nodes_text(n) for model, n in groups}


def _against_plan(run: Measured, groups: Mapping[tuple[str | None, int], Sequence[Row]]) -> list[Figure]:
    """Rates against what the plan predicts, where it can."""
    expected = {cell["id"]: cell.get("expected") or {} for cell in run.plan["cells"]}
    names, colours, rows, notes = _names(groups), node_colours(run.summary), [], []
    for key, cells in groups.items():
        rate, plan = median(cells, "positions_per_s_per_gpu"), expected[cells[0]["id"]]
        if rate is not None and plan:
            possible = plan["positions_per_s_per_gpu"]
            mark = chart.Rule(possible, f"the plan predicts {number(possible)} positions/s per GPU")
            rows.append(
                chart.Bar(names[key], rate, f"{number(rate)} ({100 * rate / possible:.0f} %)", colours[key[1]], [mark])
            )
            notes += [f"{names[key]}: {speed.bound_by(plan)}.", f"Rates {plan['rate_source']}."]
    about = "Everything that is computed, padding included. Dashed: the plan's prediction. "
    return _bars("Rate against the plan, positions/s per GPU", rows, about + " ".join(dict.fromkeys(notes)))


def _arithmetic(run: Measured, groups: Mapping[tuple[str | None, int], Sequence[Row]]) -> list[Figure]:
    """Useful arithmetic against both ceilings, where ranks had GPUs."""
    peak = run.plan.get("hardware", {}).get("bf16_peak_tflop_per_s")
    names, colours, rows, measured = _names(groups), node_colours(run.summary), [], []
    for key, cells in groups.items():
        done, matmul = median(cells, "tflop_per_s_per_gpu"), median(cells, "matmul_tflop_per_s")
        if cells[0]["device"] != "cpu" and done is not None and matmul is not None:
            marks = [chart.Rule(matmul, f"matrix products: {number(matmul)} TFLOP/s")]
            marks += [chart.Rule(peak, f"data sheet: {number(peak)} TFLOP/s", 6)] if peak else []
            rows.append(
                chart.Bar(names[key], done, f"{number(done)} ({100 * done / matmul:.0f} %)", colours[key[1]], marks)
            )
            measured.append(matmul)
    if not rows:
        return []
    low, high = number(min(measured)), number(max(measured))
    rate = low if low == high else f"{low} to {high}"
    about = (
        "Useful arithmetic, recomputation not counted. Dashed: the rate of matrix products in this model's shapes, "
        f"measured on the same GPUs: {rate}." + (f" Grey: the data sheet's dense peak, {number(peak)}." if peak else "")
    )
    return _bars("Arithmetic, TFLOP/s per GPU", rows, about)
