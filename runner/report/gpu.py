"""Test `gpu` in the report: its numbers, a row for each GPU with the slowest first, and where one stands out."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runner.report import chart
from runner.report.figures import Figure, Row, nodes_text, number
from runner.report.sections import Charts, Measured, Tile
from runner.report.tables import Table, cell_number, median, state, took, without_empty
from runner.results.records import Record
from runner.system.wording import counted
from runner.workloads.gpu import compare
from runner.workloads.gpu.condition import USUAL

TITLE, ANCHOR = "GPUs", "gpus"

GLOSSARY = {
    "gpu_matmul": "Rate of matrix products in the model's shapes on random numbers, in bf16 or fp8, over 20 s "
    "(soak_s). 1 TFLOP = 10¹² operations.",
    "hbm_copy_gb_per_s": "Bytes that a GPU copies within its memory, per second: each is read and written, so each "
    "counts twice.",
    "gpu_distance": "How far a GPU is from the median of all GPUs, in %. More than 5 % under is worth knowing.",
    "gpu_peak": "Share of the peak that the hardware file has from the vendor's data sheet. No GPU reaches it: on "
    "random numbers a healthy H200 reaches 71 to 79 % of its bf16 and about 87 % of its memory's.",
    "gpu_drift": "How much faster (+) or slower (−) products were in the last fifth of the time than in the first.",
    "gpu_throttled": "Share of the time in which the driver kept the clock down because of heat or power supply. "
    "The usual power cap is left out: every healthy GPU reaches it under matrix products.",
    "peer_gb_per_s": "Bytes copied from one GPU's memory to another's in its node, per second, one pair at a time.",
    "gpu_far": "The same copy with the host's memory on the NUMA node that the GPU is not attached to.",
}
COLUMNS = {
    "cell": "cell",
    "state": "state",
    "bf16, TFLOP/s (slowest)": "bf16, TFLOP/s",
    "fp8, TFLOP/s (slowest)": "fp8, TFLOP/s",
    "memory, GB/s (slowest)": "memory, GB/s",
    "float32, TFLOP/s": "float32, TFLOP/s",
    "wrong values": "wrong",
}
TERMS = (("gpu_matmul", "bf16, fp8"), ("hbm_copy_gb_per_s", "memory"), ("peer_gb_per_s", "GPU to GPU"))
RATES = {
    "bf16": "bf16, TFLOP/s",
    "fp8": "fp8, TFLOP/s",
    "float32": "float32, TFLOP/s",
    "hbm": "memory, GB/s",
    "to_gpu": "host to GPU, GB/s",
    "to_host": "GPU to host, GB/s",
    "peer": "to other GPUs, GB/s",
}
GPU_COLUMNS = {
    "GPU": "GPU",
    "bf16, TFLOP/s": "bf16",
    "memory, GB/s": "memory",
    "host to GPU, GB/s": "to GPU",
    "°C": "°C",
    "wrong values": "wrong",
}
GPU_TERMS = (
    ("gpu_distance", "distance from the median"),
    ("gpu_peak", "of the peak"),
    ("gpu_far", "far NUMA node"),
    ("gpu_drift", "drift"),
    ("gpu_throttled", "throttled"),
)
SHOWN = 8  # rows of GPUs that are not folded away
NOTABLE = -5.0  # % from the median
PEERS_SHOWN = 4  # matrices


def tables(cells: Sequence[Row]) -> list[Table]:
    """A row per cell with medians over its GPUs, then a row per GPU of the largest node count, the slowest first."""
    rows = []
    for cell in cells:
        m = cell["metrics"]
        rows.append(
            {
                "cell": cell["id"],
                "state": state(cell),
                "bf16, TFLOP/s (slowest)": _with_lowest(m, "matmul_bf16_tflop_per_s"),
                "fp8, TFLOP/s (slowest)": _with_lowest(m, "matmul_fp8_tflop_per_s"),
                "float32, TFLOP/s": cell_number(m, "matmul_float32_tflop_per_s"),
                "memory, GB/s (slowest)": _with_lowest(m, "hbm_copy_gb_per_s"),
                "host to GPU, GB/s (slowest)": _with_lowest(m, "host_to_device_gb_per_s"),
                "GPU to host, GB/s (slowest)": _with_lowest(m, "device_to_host_gb_per_s"),
                "GPU to GPU, GB/s (slowest)": _with_lowest(m, "peer_gb_per_s"),
                "wrong values": f"{m['wrong_values']:,.0f}" if "wrong_values" in m else "",
                "took": took(cell),
            }
        )
    found = [Table(without_empty(rows), COLUMNS, TERMS, "medians over GPUs.", faults=("wrong values",))]
    gpus = _merged(_with_gpus(cells))
    if len(gpus) > 1:
        found.append(_gpu_table(gpus))
    return found


def _with_gpus(cells: Iterable[Row]) -> list[Row]:
    """The cells of the largest node count that say something of their GPUs."""
    known = [cell for cell in cells if cell.get("details", {}).get("gpus")]
    return [cell for cell in known if cell["num_nodes"] == max(one["num_nodes"] for one in known)]


def _with_lowest(metrics: Mapping[str, float], name: str) -> str:
    lowest = f" ({number(metrics[f'{name}_min'])})" if f"{name}_min" in metrics else ""
    return cell_number(metrics, name) + lowest


Gpu = Mapping[str, Any]  # an entry of `details`


def _merged(cells: Iterable[Row]) -> list[Gpu]:
    """One entry per GPU: its medians over cells, the worst of the rest, the slowest GPU first."""
    same: dict[tuple[str, int], list[Gpu]] = defaultdict(list)
    for cell in cells:
        for gpu in cell["details"]["gpus"]:
            same[gpu["host"], gpu["gpu"]].append(gpu)
    merged = []
    for each in same.values():
        entry = dict(each[-1])
        for group in ("rates", "distance_pct", "peak_pct", "far"):
            values = [one.get(group, {}) for one in each]
            keys = {key for one in values for key in one}
            entry[group] = {key: statistics.median(one[key] for one in values if key in one) for key in keys}
        entry["wrong_values"] = sum(one.get("wrong_values", 0) for one in each)
        entry["throttled"] = {
            reason: max(one.get("throttled", {}).get(reason, 0.0) for one in each)
            for reason in {reason for one in each for reason in one.get("throttled", {})}
        }
        merged.append(entry)
    return sorted(merged, key=lambda gpu: (not gpu["wrong_values"], _worst(gpu)))


def _worst(gpu: Gpu) -> float:
    return min(gpu["distance_pct"].values(), default=0.0)


def _gpu_table(gpus: Sequence[Gpu]) -> Table:
    peaks = [key for key in RATES if any(key in gpu["peak_pct"] for gpu in gpus)]
    rows = [
        {
            "GPU": f"{gpu['host']} {_name(gpu)}",
            **{title: _with_distance(gpu, key) for key, title in RATES.items()},
            "of the peak, %": " · ".join(f"{gpu['peak_pct'][key]:.0f}" for key in peaks if key in gpu["peak_pct"]),
            "far NUMA node, GB/s": number(gpu["far"]["to_gpu"]) if "to_gpu" in gpu["far"] else "",
            "drift, %": _signed(gpu["drift_pct"]) if "drift_pct" in gpu else "",
            "throttled": _throttled(gpu.get("throttled") or {}),
            "clock, MHz": f"{gpu['clock_mhz']:,.0f}" if "clock_mhz" in gpu else "",
            "°C": f"{gpu['temperature_c']:.0f}" if "temperature_c" in gpu else "",
            "wrong values": f"{gpu['wrong_values']:,.0f}" if gpu["wrong_values"] else "",
        }
        for gpu in gpus
    ]
    notable = sum(_worst(gpu) < NOTABLE or bool(gpu["wrong_values"]) for gpu in gpus)
    shown = max(SHOWN, notable)
    shown = shown if len(gpus) > shown + SHOWN // 2 else 0
    rest = ""
    if shown:
        furthest = -min(_worst(gpu) for gpu in gpus[shown:])
        rest = f"{counted(len(gpus) - shown, 'more GPU')}, none more than {max(0.0, furthest):.1f} % under the median"
    rows = without_empty(rows)
    words = " ".join(rows[0])
    return Table(
        rows,
        GPU_COLUMNS,
        [(term, text) for term, text in GPU_TERMS if term == "gpu_distance" or text in words],
        "the slowest GPU first; in brackets its distance from the median of all"
        + (f"; of the peak: {' · '.join(RATES[key].partition(',')[0] for key in peaks)}." if peaks else "."),
        faults=("wrong values",),
        shown=shown,
        rest=rest,
    )


def _name(gpu: Gpu) -> str:
    return f"GPU {gpu['gpu']}" if gpu.get("uuid") else f"rank {gpu['gpu']}"


def _with_distance(gpu: Gpu, key: str) -> str:
    if key not in gpu["rates"]:
        return ""
    distance = gpu["distance_pct"].get(key)
    sign = "✕ " if distance is not None and distance < NOTABLE and gpu.get("uuid") else ""
    return f"{sign}{number(gpu['rates'][key])}" + (f" ({_signed(distance)} %)" if distance is not None else "")


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _throttled(shares: Mapping[str, float]) -> str:
    """The reasons that healthy GPUs do not have."""
    unusual = sorted((reason, share) for reason, share in shares.items() if reason not in USUAL and share >= 1)
    return ", ".join(f"{reason.replace('_', ' ')} {share:.0f} %" for reason, share in unusual)


def tiles(run: Measured) -> list[Tile]:
    """The rate of matrix products of the median GPU, and how far the slowest is under it."""
    measured = run.groups()
    if not measured:
        return []
    (_, nodes), cells = max(measured.items(), key=lambda item: item[0][1])
    found = []
    if (rate := median(cells, "matmul_bf16_tflop_per_s")) is not None:
        share = median(cells, "matmul_bf16_tflop_per_s_pct_of_peak")
        note = f"median GPU, {nodes_text(nodes)}" + (f", {share:.0f} % of the peak" if share is not None else "")
        found.append(Tile("matrix products, bf16", f"{number(rate)} TFLOP/s", note))
    gpus = _merged(_with_gpus(cells))
    slowest = min(gpus, key=_worst, default=None)
    if slowest is not None and len(gpus) > 1:
        distances = slowest["distance_pct"]
        of = f", {RATES[min(distances, key=distances.__getitem__)].partition(',')[0]}" if distances else ""
        note = f"{run.short(slowest['host'])} {_name(slowest)}{of}, from the median"
        found.append(Tile("slowest GPU", f"{_signed(_worst(slowest))} %", note))
    return found


def charts(run: Measured) -> Charts:
    """GPUs by node, the rate over the soak, and matrices of pairs: of the largest node count."""
    measured = run.groups()
    if not measured:
        return Charts()
    (model, nodes), cells = max(measured.items(), key=lambda item: item[0][1])
    records = [record for cell in cells for record in run.by_cell.get(cell["id"], ())]
    gpus = _merged(_with_gpus(cells))
    found = [figure for key in ("bf16", "fp8", "hbm", "to_gpu") if (figure := _strip(run, gpus, key))]
    soak = _soak(run, gpus, records)
    found += ([soak] if soak else []) + _peers(run, records)
    why = cells[0].get("not_judged")
    notes = [f"Not judged: {why}."] if why else []
    if cells[0]["device"] == "cpu":
        notes.append("Each rank, on processors of its node, takes the place of a GPU.")
    return Charts(found, f"{nodes_text(nodes)}" + (f", {model}" if model else ""), " ".join(notes))


def _strip(run: Measured, gpus: Sequence[Gpu], key: str) -> Figure | None:
    """A row per node with a point per GPU: how far it is from the median of all."""
    by_host: dict[str, list[chart.Point]] = defaultdict(list)
    for gpu in sorted(gpus, key=lambda gpu: str(gpu["host"])):
        if key in gpu["distance_pct"]:
            far = gpu["distance_pct"][key]
            title = f"{run.short(gpu['host'])} {_name(gpu)}: {number(gpu['rates'][key])} ({_signed(far)} %)"
            label = _name(gpu) if far < NOTABLE and gpu.get("uuid") else ""
            by_host[gpu["host"]].append(chart.Point(far, 0.0, title, label=label))
    if not by_host:
        return None
    values = [point.x for points in by_host.values() for point in points]
    x = chart.linear("% from the median", [*values, NOTABLE, 5.0])
    limit = chart.Rule(NOTABLE, "5 % under the median")
    rows = [(run.short(host), points) for host, points in by_host.items()]
    title = RATES[key].partition(",")[0]
    about = "A point per GPU, a bar at each node's median. Dashed: 5 % under the median of all."
    lowest = min(((p.x, p.title) for points in by_host.values() for p in points), default=(0.0, ""))
    if lowest[0] < NOTABLE:
        about = f"Lowest: {lowest[1]}. {about}"
    return Figure(f"GPUs by {title}", chart.strips(rows, x, f"GPUs by {title}", limit), about)


def _soak(run: Measured, gpus: Sequence[Gpu], records: Sequence[Record]) -> Figure | None:
    """The rate of products block by block: the median GPU, the slowest one, and the one that loses most."""
    measure = next((m for m in compare.RATES if any(m.key in gpu["rates"] for gpu in gpus)), None)
    if measure is None or len(gpus) < 2:
        return None
    cell = records[0].cell
    values = {
        (gpu.host, gpu.number): {block: value for (of, block), value in own.items() if of == cell}
        for gpu, own in compare.by_gpu(records, measure).items()
    }
    blocks = sorted({block for own in values.values() for block in own})
    if len(blocks) < 2:
        return None

    def line(name: str, own: Mapping[int, float], colour: int) -> chart.Series:
        points = [chart.Point(block, own[block], f"{name}: {number(own[block])}") for block in blocks if block in own]
        return chart.Series(name, points, colour)

    middle = {block: compare.middle(own[block] for own in values.values() if block in own) for block in blocks}
    series = [line("median of all", middle, 0)]
    slowest = min(gpus, key=lambda gpu: gpu["distance_pct"].get(measure.key, 0.0))
    drifting = min(gpus, key=lambda gpu: gpu.get("drift_pct", 0.0))
    for colour, gpu in enumerate((slowest,) if slowest is drifting else (slowest, drifting), start=1):
        series.append(line(f"{run.short(gpu['host'])} {_name(gpu)}", values[gpu["host"], gpu["gpu"]], colour))
    x = chart.linear("block", [float(block) for block in blocks], pad=0.02)
    y = chart.linear("", [p.y for s in series for p in s.points], pad=0.12)
    title = f"{measure.name} while it lasts, {measure.unit}"
    svg = chart.lines(series, x, y, title, name_ends=False)
    about = "Each block is a part of the time. The slowest GPU, and the one that becomes slower most."
    return Figure(title, svg, about, [(s.colour, s.name) for s in series])


def _peers(run: Measured, records: Sequence[Record]) -> list[Figure]:
    """The matrix of each node in which a pair is slow, else one of medians over nodes."""
    rates: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for pair, series in compare.by_pair(records).items():
        rates[pair.host][pair.source, pair.target] = statistics.median(series.values())
    if not rates:
        return []
    middle = statistics.median(value for own in rates.values() for value in own.values())
    slow = sorted(
        (host for host, own in rates.items() if min(own.values()) < middle * (1 + NOTABLE / 100)),
        key=lambda host: min(rates[host].values()),
    )[:PEERS_SHOWN]
    about = "Row: the GPU that is read; column: the one that is written. Orange: under the median."
    if not slow:
        every = {pair for own in rates.values() for pair in own}
        own = {pair: statistics.median(o[pair] for o in rates.values() if pair in o) for pair in every}
        title = "GPU to GPU, GB/s" + (f", median of {nodes_text(len(rates))}" if len(rates) > 1 else "")
        return [Figure(title, chart.heat(own, middle, title), about)]
    return [
        Figure(title := f"GPU to GPU of {run.short(host)}, GB/s", chart.heat(rates[host], middle, title), about)
        for host in slow
    ]
