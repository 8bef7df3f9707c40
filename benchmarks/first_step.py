"""The time to the first step of `sft`, of this checkout beside another one: pairs in alternating order.

    git worktree add ../before COMMIT
    .venv/bin/python benchmarks/first_step.py --against ../before --pairs 5

One rank on the CPU trains one step of a few tokens, so that almost all of it is the start: the tiny model, where that
is imports, and one of 244 M parameters, which also has to be built. Seconds of CPU are those of the rank and of
torchrun together, which other processes on the machine hardly change; the others are the rank's own records, on the
clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from runner.results.celldir import CellDir
from runner.system.places import ROOT

SEQ_LEN = 64
MODELS = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_layers": 4, "num_heads": 4, "vocab_size": 2048},
    "244M": {"hidden_size": 768, "intermediate_size": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32000},
}
DEEPSPEED = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
    "zero_optimization": {"stage": 3},
}


def job(name: str, data: Path) -> dict[str, Any]:
    """The contents of job.json for one step of this model."""
    model = {**MODELS[name], "name": name, "max_seq_len": SEQ_LEN, "rope_theta": 10000.0, "rms_norm_eps": 1e-5}
    model |= {"num_kv_heads": model["num_heads"], "tie_embeddings": False}
    cell = {"run_id": "run", "cell": "sft", "test": "sft", "num_nodes": 1, "gpus_per_node": 1, "world_size": 1}
    params = {"steps": 1, "warmup_steps": 0, "lr": None, "attention": "auto", "recompute": "none"}
    return {
        **cell, "device": "cpu", "seed": 0, "params": params, "model": model, "deepspeed": DEEPSPEED, "data": str(data)
    }  # fmt: skip


def write_data(folder: Path) -> None:
    """Prepared data of four sequences of one sample each."""
    folder.mkdir()
    ids = np.arange(4 * SEQ_LEN, dtype=np.int32).reshape(4, SEQ_LEN) % 1000
    positions = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (4, 1))
    lengths = np.full(4, SEQ_LEN, np.int32)
    for name, array in (("input_ids", ids), ("labels", ids), ("position_ids", positions), ("n_tokens", lengths)):
        np.save(folder / f"{name}.npy", array)
    (folder / "manifest.json").write_text(json.dumps({"vocab_size": 1000, "packing_utilisation_pct": 100.0}))


def start(checkout: Path, described: dict[str, Any]) -> dict[str, float]:
    """Run a rank of `checkout` once; returns its seconds: of CPU, and those that it recorded."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = CellDir(Path(scratch))
        folder.job.write_text(json.dumps(described))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "runner.workloads")
        env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *launch, scratch], cwd=checkout, env=env, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(done.stderr)
        events = [json.loads(line) for line in folder.events(0).read_text().splitlines()]
    values = {event["metric"]: event["value"] for event in events if event["event"] == "value"}
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    named = {"imports": "import_time_s", "building": "build_time_s", "first step": "time_to_first_step_s"}
    return {"CPU": cpu_s, **{name: values[metric] for name, metric in named.items() if metric in values}}


def main() -> None:
    """Measure, and print a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="another checkout")
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    checkouts = {"before": asked.against.resolve(), "now": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write_data(data)
        print("| model | checkout | CPU, s | imports, s | building, s | first step, s |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in MODELS:
            found: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
            for number in range(asked.pairs):
                for which in ("before", "now") if number % 2 == 0 else ("now", "before"):
                    found[which].append(start(checkouts[which], job(name, data)))
            for which, runs in found.items():
                columns = []
                for value in ("CPU", "imports", "building", "first step"):
                    values = [run[value] for run in runs if value in run]
                    spread = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
                    columns.append(spread if values else "")
                print(f"| {name} | {which} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
