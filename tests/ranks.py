"""Starts real ranks of one cell on this machine, as an engine would, and reads what they wrote."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.system import process

SEQ_LEN = 128
VOCAB_SIZE = 512


@dataclass(frozen=True)
class Ended:
    """How the ranks ended, and the events of each."""

    outcome: process.Outcome
    ranks: list[list[dict[str, Any]]]

    def values(self, metric: str, rank: int = 0) -> list[float]:
        return [e["value"] for e in self.ranks[rank] if e["event"] == "value" and e["metric"] == metric]

    def contexts(self, metric: str, rank: int = 0) -> list[dict[str, Any]]:
        return [e["context"] for e in self.ranks[rank] if e["event"] == "value" and e["metric"] == metric]


def start(
    folder: Path,
    job: Mapping[str, Any],
    program: Sequence[str] = ("-m", "runner.workloads"),
    env: Mapping[str, str] | None = None,
    timeout_s: float = 180,
    python: Path | str = sys.executable,
) -> Ended:
    """Run `job` on its `world_size` ranks with torchrun, until all have ended; `env` is added to the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    world = job["world_size"]
    launch = [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    kept = {name: value for name, value in os.environ.items() if name != "SHAKEDOWN_CELL"}
    every = {**kept, "OMP_NUM_THREADS": "1", **(env or {})}
    outcome = process.run([*launch, *program, str(folder)], timeout_s=timeout_s, env=every)
    files = [folder / f"rank{rank}.jsonl" for rank in range(world)]
    return Ended(
        outcome, [[json.loads(line) for line in f.read_text().splitlines()] if f.exists() else [] for f in files]
    )


def job(test: str, world_size: int, params: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    cell = {"run_id": "run", "cell": f"{test}-1n-r1", "test": test, "num_nodes": 1, "gpus_per_node": world_size}
    return {**cell, "world_size": world_size, "device": "cpu", "seed": 0, "params": dict(params), **more}


def write_packed_data(folder: Path, sequences: int = 64) -> Path:
    """A prepared folder whose answers follow from their questions: each token is the one before plus a step.

    Two or three samples a sequence, then padding. Sequences differ in padding and in how much of them is
    prompt, outside the loss, so that whoever counts or averages the wrong thing gets another number.
    """
    rng = np.random.default_rng(1)
    shape = (sequences, SEQ_LEN)
    ids, labels, positions = np.zeros(shape, np.int32), np.full(shape, -100, np.int32), np.zeros(shape, np.int32)
    n_tokens = np.zeros(sequences, np.int32)
    for row in range(sequences):
        inner = rng.choice(np.arange(20, SEQ_LEN - 20, 12), rng.integers(1, 3), replace=False)
        end_of_data = SEQ_LEN - 1 - row % 8
        cuts = [0, *sorted(inner), end_of_data, SEQ_LEN]
        for begin, end in itertools.pairwise(cuts):
            place = np.arange(end - begin)
            positions[row, begin:end] = place
            if end == SEQ_LEN:
                continue
            ids[row, begin:end] = (rng.integers(64) + 3 * place) % 64 + 2
            answer = begin + (end - begin) * (9 if row % 3 else 3) // 10
            labels[row, answer:end] = ids[row, answer:end]
            n_tokens[row] += end - begin
    folder.mkdir(parents=True)
    for name, array in {"input_ids": ids, "labels": labels, "position_ids": positions, "n_tokens": n_tokens}.items():
        np.save(folder / f"{name}.npy", array)
    manifest = {"schema": 1, "hash": "test", "seq_len": SEQ_LEN, "vocab_size": 66, "pad_token_id": 0}
    manifest |= {"n_sequences": sequences, "packing_utilisation_pct": 100 * float(n_tokens.mean()) / SEQ_LEN}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
