"""Test gpu on real nodes, over ssh and as a job: every rank meets the others by the launcher's store, on CPUs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testbed.benches import Bench
from testbed.conftest import Testbed

pytestmark = pytest.mark.testbed
CELL = ("--nodes", "2", "--model", "tiny", "--test", "gpu", "--set", "gpu.soak_s=0.5")


@pytest.mark.parametrize("way", [(), ("--backend", "slurm")], ids=["ssh", "slurm"])
def test_every_device_of_every_node_is_measured(slurm3: Testbed, tmp_path: Path, way: tuple[str, ...]):
    assert slurm3.share
    results = slurm3.share / tmp_path.name if way else tmp_path
    bench = Bench(slurm3.inventory, results, *way, *CELL)
    code, output = bench.end()
    assert code == 0, output
    records = [record for record in bench.run.read_records() if record.metric == "matmul_tflop_per_s"]
    hosts = {node["name"] for node in slurm3.nodes[:2]}
    assert {record.host for record in records} == hosts and {record.rank for record in records} == set(
        range(len(hosts))
    )
    summary = json.loads(bench.run.summary.read_text())
    assert summary["verdict"] == "not_judged" and summary["findings"] == []
    [cell] = summary["cells"]
    assert cell["state"] == "complete" and cell["metrics"]["wrong_values"] == 0
