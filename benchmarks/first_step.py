"""The time to the first step of `sft`, of this checkout beside another one: pairs in alternating order.

    git worktree add ../before COMMIT
    .venv/bin/python benchmarks/first_step.py --against ../before --pairs 5

One rank on the CPU trains one step of a few tokens, so that almost all of it is the start: the tiny model, where that
is imports, and one of 244 M parameters, which also has to be built. Seconds of CPU are those of the rank and of
torchrun together, which other processes on the machine hardly change; the others are the rank's own records, on the
clock.

    .venv/bin/python benchmarks/first_step.py --against ../before --pairs 4 --data 4096

With `--data`, `runner bench` trains the tiny model on so many samples, which are not prepared yet: seconds on the clock
from the command to the end of the first step; with `--cold`, for root, with an empty page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runner.results.celldir import CellDir
from runner.system.places import ROOT

SEQ_LEN = 64
CACHES = Path("/proc/sys/vm/drop_caches")
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


def start_without_data(checkout: Path, samples: int, cold: bool) -> dict[str, float]:
    """Run `runner bench` of `checkout` once, its data not prepared; returns the seconds from its start: to the end of
    the preparation, to the first output of rank 0, and to the end of its first step.
    """
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": scratch, "XDG_STATE_HOME": scratch}
        inventory = shutil.copytree(checkout / "inventory" / "local", Path(scratch, "inventory"))
        (inventory / "group_vars").mkdir()
        (inventory / "group_vars" / "all.yml").write_text(f"runner_scratch: {scratch}/scratch\n")
        options = ["-i", str(inventory), "--results", f"{scratch}/results", "--model", "tiny"]
        for setting in (f"samples={samples}", "steps=1", "warmup_steps=0", "seq_len=256"):
            options += ["--set", f"sft.{setting}"]
        # What is not measured is in the caches: the inventory and the plan.
        command = [sys.executable, "-m", "runner.cli.main", "bench", *options, "--test", "sft"]
        subprocess.run([*command, "--dry-run"], cwd=checkout, env=env, capture_output=True, check=True)
        if cold:
            os.sync()
            CACHES.write_text("1")
        began = time.time()
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        [manifest] = Path(scratch, "shakedown", "data").glob("*/manifest.json")
        [run] = (path for path in Path(scratch, "results").iterdir() if not path.is_symlink() and path.is_dir())
        [events] = run.glob("nodes/*/*/rank0.jsonl")
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        first = next(line["time_s"] for line in lines if line.get("metric") == "step_time_s")
        moments = {"data": manifest.stat().st_mtime, "rank": lines[0]["time_s"], "first step": first}
        return {name: moment - began for name, moment in moments.items()}


def compare_without_data(checkouts: Mapping[str, Path], pairs: int, samples: int, cold: bool) -> None:
    """Print the table of `--data`."""
    print("| checkout | data ready, s | rank started, s | first step, s |")
    print("| --- | --- | --- | --- |")
    found = alternating(checkouts, pairs, lambda one: start_without_data(one, samples, cold))
    for which, runs in found.items():
        columns = [spread([run[name] for run in runs]) for name in ("data", "rank", "first step")]
        print(f"| {which} | {' | '.join(columns)} |")
    saved = [before["first step"] - now["first step"] for before, now in zip(*found.values(), strict=True)]
    print(f"| saved in a pair | | | {spread(saved)} |")


def alternating(
    checkouts: Mapping[str, Path], pairs: int, measure: Callable[[Path], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    """What `measure` gives for each checkout in each pair: A B, B A, A B, …"""
    found: dict[str, list[dict[str, float]]] = {which: [] for which in checkouts}
    for number in range(pairs):
        for which in checkouts if number % 2 == 0 else reversed(checkouts):
            found[which].append(measure(checkouts[which]))
    return found


def spread(values: Sequence[float]) -> str:
    """The median, the smallest and the largest as text; nothing for none."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else ""


def main() -> None:
    """Measure, and print a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="another checkout")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--data", type=int, help="with the preparation of so many samples")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each start")
    asked = parser.parse_args()
    checkouts = {"before": asked.against.resolve(), "now": ROOT}
    if asked.data:
        compare_without_data(checkouts, asked.pairs, asked.data, asked.cold)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write_data(data)
        print("| model | checkout | CPU, s | imports, s | building, s | first step, s |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in MODELS:
            found = alternating(checkouts, asked.pairs, lambda one: start(one, job(name, data)))  # noqa: B023
            for which, runs in found.items():
                values = ("CPU", "imports", "building", "first step")
                columns = [spread([run[value] for run in runs if value in run]) for value in values]
                print(f"| {name} | {which} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
