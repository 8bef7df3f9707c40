"""Test `gpu` in the report: its numbers and its tables."""

from __future__ import annotations

from collections.abc import Sequence

from runner.report.figures import Row, number
from runner.report.sections import Charts, Measured, Tile
from runner.report.tables import Table, cell_number, median, state, took, without_empty

TITLE, ANCHOR = "GPUs", "gpus"

GLOSSARY = {
    "hbm_copy_gb_per_s": "Bytes that a GPU copies within its memory, per second: each is read and written, so each "
    "counts twice.",
}
COLUMNS = {
    "cell": "cell",
    "state": "state",
    "bf16, TFLOP/s": "bf16, TFLOP/s",
    "memory, GB/s": "memory, GB/s",
    "wrong values": "wrong",
}
TERMS = (("hbm_copy_gb_per_s", "memory"),)


def tables(cells: Sequence[Row]) -> list[Table]:
    """One row per cell: medians over its GPUs, without columns that are empty in every cell."""
    rows = []
    for cell in cells:
        m = cell["metrics"]
        rows.append(
            {
                "cell": cell["id"],
                "state": state(cell),
                "bf16, TFLOP/s": cell_number(m, "matmul_bf16_tflop_per_s"),
                "memory, GB/s": cell_number(m, "hbm_copy_gb_per_s"),
                "wrong values": f"{m['wrong_values']:,.0f}" if "wrong_values" in m else "",
                "took": took(cell),
            }
        )
    return [Table(without_empty(rows), COLUMNS, TERMS, "medians over GPUs.", faults=("wrong values",))]


def tiles(run: Measured) -> list[Tile]:
    """The rate of matrix products of the median GPU."""
    found = [tile for cells in run.groups().values() if (tile := median(cells, "matmul_bf16_tflop_per_s")) is not None]
    return [Tile("matrix products, bf16", f"{number(found[-1])} TFLOP/s", "median over GPUs")] if found else []


def charts(run: Measured) -> Charts:
    """None."""
    return Charts()
