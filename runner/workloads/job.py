"""The input of a cell's ranks (job.json) and their output (events)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.results.celldir import CellDir

DATA_VARIABLE = "SHAKEDOWN_DATA"  # where a user's program finds the data that were sent for it
WAIT_S = 0.05  # between two looks whether the data are there
AGENT_S = 120.0  # without a sample in the agent's telemetry: it has ended


@dataclass(frozen=True)
class RankJob:
    """The contents of job.json: what one cell's ranks are to measure.

    `params` are the test's settings (configs/tests/<test>.yaml after `--set`); `model` is the
    architecture of configs/models/<model>.yaml; `env` holds NCCL_*, GLOO_* and the like, set before
    torch is imported.
    """

    run_id: str
    cell: str
    test: str
    num_nodes: int
    gpus_per_node: int
    world_size: int
    device: str  # "cuda" or "cpu"
    seed: int
    params: Mapping[str, Any]
    model: Mapping[str, Any] | None = None
    weights: str | None = None  # Hugging Face id or path; None: random initial weights
    deepspeed: Mapping[str, Any] | None = None  # a complete DeepSpeed configuration
    data: str | None = None  # folder that `workloads.data` prepared
    held: bool = False  # the data are not there before the agent writes `CellDir.go`
    hardware: Mapping[str, Any] | None = None
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def comm_backend(self) -> str:
        """The backend of torch.distributed for the device: `nccl` or `gloo`."""
        return "nccl" if self.device == "cuda" else "gloo"

    @classmethod
    def load(cls, cell_dir: Path) -> RankJob:
        """The job in `cell_dir`/job.json. Raises OSError where it is missing, TypeError where its keys do not fit."""
        return cls(**json.loads(CellDir(cell_dir).job.read_text()))


class Events:
    """Writes events to `rank<K>.jsonl`, one JSON object per line, each flushed so that a killed rank loses none.

    `folder` is the cell's. `start` is the first event and `end` the last: a file without `end` is incomplete, never
    zero. Calling the object writes an event with any fields; it raises ValueError for a NaN or infinite value.
    """

    def __init__(self, cell_dir: Path, rank: int) -> None:
        self.rank = rank
        self.folder = CellDir(cell_dir)
        self._file = open(self.folder.events(rank), "w", buffering=1)  # noqa: SIM115

    def __call__(self, event: str, **fields: Any) -> None:
        line = {"event": event, "rank": self.rank, "time_s": round(time.time(), 6), **fields}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def start(self, **fields: Any) -> None:
        """Write the first event, with what the rank observed: world size, host, process id, device."""
        self("start", **fields)

    def progress(self, done: int, total: int, phase: str, detail: str = "", result: str = "") -> None:
        """Write that `done` of `total` units of the cell's work are done; ignored on all ranks but 0.

        `phase` is one of few names, by which durations are remembered. For people are `detail`, what is done now, and
        `result`, what the last units gave.
        """
        if self.rank == 0:
            more = {name: text for name, text in (("detail", detail), ("result", result)) if text}
            self("progress", done=done, total=total, phase=phase, **more)

    def notice(self, text: str) -> None:
        """Write one line that the user is shown at once."""
        self("notice", text=text)

    def value(self, metric: str, value: float, **context: Any) -> None:
        """Write a measured value with its context; the metric's name includes the unit (`busbw_gb_per_s`)."""
        self("value", metric=metric, value=value, context=context)

    def wait_for_data(self, job: RankJob) -> float:
        """Wait until the data of a held job are there; returns the seconds that it took.

        The agent ends who waits in vain. Exits with a message where the agent itself has ended, and there may be nobody
        left to end its ranks.
        """
        began = moved = time.monotonic()
        size = -1
        while job.held and not self.folder.go.exists():
            telemetry = self.folder.telemetry
            before, size = size, telemetry.stat().st_size if telemetry.exists() else 0
            if size != before:
                moved = time.monotonic()
            elif time.monotonic() - moved > AGENT_S:
                sys.exit(f"rank {self.rank}: waits for its data, and the agent of its node has ended")
            time.sleep(WAIT_S)
        return time.monotonic() - began

    def end(self) -> None:
        """Write the last event and close the file."""
        self("end")
        self._file.close()


# By what MPI's launchers call them: rank, number of ranks, rank on its node. Open MPI's own, then those under srun.
_OF_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMIX_RANK", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def rank_from_env() -> int:
    """The rank from the variable RANK, which torchrun and DeepSpeed set, or else from those of mpirun and srun, which
    are then set under torch's names as well; exits with a message where there is none.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    for theirs in _OF_MPI:
        if "RANK" not in os.environ and all(os.environ.get(name, "").isdigit() for name in theirs):
            os.environ.update({name: os.environ[their] for name, their in zip(names, theirs, strict=True)})
    if "RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        sys.exit(
            "accelerate launch started this process alone, as it does with --cpu whatever --num_processes says: "
            "set ACCELERATE_USE_CPU=true and distributed_type MULTI_GPU instead, as --engine accelerate does"
        )
    try:
        return int(os.environ["RANK"])
    except (KeyError, ValueError):
        sys.exit("RANK is not set: start workloads with torchrun, deepspeed, mpirun or srun, not by hand")
