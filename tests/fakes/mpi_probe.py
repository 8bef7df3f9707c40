"""An MPI test for tests of the launch: a row of the registry whose cells are split, with another test's settings."""

from __future__ import annotations

import pytest

from runner.workloads.registry import TESTS, Test

NAME = "probe"


def variants(params, num_nodes, gpus_per_node):
    """Two cells on one node, three on several."""
    suffixes = ("all_reduce", "alltoall", *(["all_reduce-rail"] if num_nodes > 1 else []))
    named = {suffix: suffix.partition("-") for suffix in suffixes}
    return {
        suffix: {**params, "collective": first, "split": last or "none"} for suffix, (first, _, last) in named.items()
    }


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the row while the test lasts."""
    row = Test(
        summary="meets over MPI",
        settings="runner.workloads.collectives.settings:TorchTest",
        rank="mpi_probe",
        metrics="runner.workloads.collectives.metrics",
        report="runner.report.collectives",
        packages=(),
        variants="mpi_probe:variants",
        mpi=True,
    )
    monkeypatch.setitem(TESTS, NAME, row)
