"""The time that Shakedown adds to plain `torchrun`, in seconds to the first training step on one node.

    .venv/bin/python benchmarks/layer_cost.py --pairs 5

Each pair runs the same job twice, in alternating order: `runner bench` on this machine, and plain
torchrun on a copy of the job.json that it wrote. Both are timed from the start of the command to
the end of the first optimizer step, as rank 0 recorded it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent


def first_step(folder: Path) -> float:
    """The time (Unix, s) at which rank 0 finished its first optimizer step; exits where `folder` has no step."""
    for line in (folder / "rank0.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event.get("metric") == "step_time_s":
            return event["time_s"]
    raise SystemExit(f"no step in {folder}")


def with_runner(results: Path) -> tuple[float, Path]:
    """(seconds to the first step with `runner bench`, the cell's folder)."""
    command = [BIN / "runner", "bench", "-i", "inventory/local", "--test", "sft", "--model", "tiny"]
    started = time.time()
    subprocess.run([*command, "--set", "sft.steps=2", "--results", results], cwd=ROOT, check=True, capture_output=True)
    cell = next((results / "latest" / "nodes").glob("*/sft-*"))
    return first_step(cell) - started, cell


def by_hand(cell: Path, folder: Path) -> float:
    """Seconds to the first step with plain torchrun, in a new `folder` with the job.json of `cell`."""
    folder.mkdir()
    shutil.copy(cell / "job.json", folder)
    ranks = json.loads((cell / "job.json").read_text())["gpus_per_node"]
    command = [BIN / "torchrun", f"--nproc-per-node={ranks}", "-m", "runner.workloads", str(folder)]
    started = time.time()
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return first_step(folder) - started


def main() -> None:
    """Measure the pairs, and print each and the median difference in seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch, "results")
        _, cell = with_runner(results)  # warm: data prepared, files in the page cache
        by_hand(cell, Path(scratch, "warm"))
        rows = []
        for pair in range(pairs):
            if pair % 2:
                hand, (layer, cell) = by_hand(cell, Path(scratch, f"hand{pair}")), with_runner(results)
            else:
                (layer, cell), hand = with_runner(results), by_hand(cell, Path(scratch, f"hand{pair}"))
            rows.append((layer, hand))
            print(f"pair {pair + 1}: runner {layer:.2f} s, torchrun {hand:.2f} s, difference {layer - hand:+.2f} s")
    differences = [layer - hand for layer, hand in rows]
    print(
        f"median difference {statistics.median(differences):+.2f} s"
        f" (smallest {min(differences):+.2f}, largest {max(differences):+.2f}, {pairs} pairs;"
        f" {os.cpu_count()} cores, Python {platform.python_version()})"
    )


if __name__ == "__main__":
    main()
