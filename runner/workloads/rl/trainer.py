"""One of verl's trainers in the process of a rank, and how far it is.

The trainer is imported and called, not started: its errors are the rank's, and its output goes where a rank's goes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.workloads.job import Events, RankJob
from runner.workloads.rl import phases
from runner.workloads.rl.details import outputs
from runner.workloads.rl.record import Follower, Recorder, newest_step

# Hydra's own folder of each start and its log: what it would write there, words and output have as well.
_HYDRA = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout")
_LENGTH = re.compile(r"\+*trainer\.total_training_steps=(\d+)")


def environment(events: Events) -> dict[str, str]:
    """The variables with which the trainer of the rank of `events` writes into its cell's folder, and asks no hub.

    Of Weights & Biases nothing leaves the node unless WANDB_MODE says so; its key is not among these.
    """
    folder, mode = events.folder, os.environ.get("WANDB_MODE") or "offline"
    return {
        "VERL_FILE_LOGGER_PATH": str(folder.verl_metrics(events.rank)),
        "TENSORBOARD_DIR": str(folder.tensorboard),
        "WANDB_DIR": str(folder.path),
        "WANDB_MODE": mode,
        **({"WANDB_SILENT": "true"} if mode == "offline" else {}),  # what it would say, the run says at its end
        "HF_HUB_OFFLINE": "1",  # everything is there before a stage starts
        "HYDRA_FULL_ERROR": "1",  # else Hydra ends the process, and says nothing of where
    }


def run(module: str, job: RankJob, events: Events, change: Callable[[Any], None] | None = None) -> None:
    """Run verl's trainer `module` with the overrides of `job`; `change` may alter it after its import.

    An attempt that finds the last step's checkpoint does nothing: verl would do a step more. Raises whatever the
    trainer does.
    """
    words, folder, checkpoint = job.params["words"], events.folder, Path(job.params["checkpoint"])
    # Each rank has a file of its own: verl chooses which one writes, and the others find nothing.
    asked = total_of(words)
    recorder = Recorder(events, checkpoint, asked or expected(words))
    if asked is not None and newest_step(checkpoint) >= asked:
        recorder.begin()
        return
    os.environ.update(environment(events))
    if "wandb" in outputs(words):
        events("used", wandb=os.environ["WANDB_MODE"])
    loaded = import_module(module)
    if change:
        change(loaded)
    sys.argv = [module, *_HYDRA, *words]
    with Follower(folder.verl_metrics(events.rank), recorder, lambda: phases.read(folder.phase)):
        loaded.main()


def total_of(words: Sequence[str]) -> int | None:
    """The number of steps that `words` ask for, None where it depends on the data."""
    found = [int(match[1]) for word in words if (match := _LENGTH.fullmatch(word))]
    return found[-1] if found else None


def expected(words: Sequence[str]) -> int | None:
    """The number of steps that the epochs of the data have, by their Parquet; None where that cannot be told.

    Prompts that are too long are among them: verl may leave these out, and do less.
    """
    try:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from pyarrow import parquet

        told = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(list(words))}
        files = told["data.train_files"]
        rows = sum(parquet.read_metadata(file).num_rows for file in ([files] if isinstance(files, str) else files))
        most = told.get("data.train_max_samples", -1)
        rows = rows if most < 0 else min(rows, most)
        return int(rows // told["data.train_batch_size"] * told["trainer.total_epochs"]) or None
    except (ImportError, OSError, LookupError, ValueError, TypeError, ZeroDivisionError):
        return None
