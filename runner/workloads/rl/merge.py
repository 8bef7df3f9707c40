"""From the newest checkpoint of a trainer to a model: merged, loaded, asked a question, and only then put in place."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import traceback
from importlib import import_module, metadata
from pathlib import Path

from runner.errors import InfrastructureError
from runner.system import manifest
from runner.workloads.job import Events, RankJob
from runner.workloads.rl.ask import KIND, ask
from runner.workloads.rl.record import NEWEST, newest_step

PACKAGES = ("verl", "ray", "torch", "transformers")
# Where a program's checkpoint of a step has the model that is trained.
SHARDS = {"sft": ".", "ppo": "actor", "grpo": "actor"}


def run(job: RankJob, events: Events) -> None:
    """Leave the model in the folder `target`, complete or not at all: its manifest is written last.

    Raises InfrastructureError where there is no checkpoint, and where its model is not usable.
    """
    params, target = job.params, Path(job.params["target"])
    source = newest(Path(params["checkpoint"]), params["program"])
    work = target.with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # of an attempt that was interrupted
    work.parent.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"

    events.progress(0, 2, "merge")
    began = time.monotonic()
    _merge(source, work, params["backend"])
    events.value("merge_s", time.monotonic() - began)

    events.progress(1, 2, "question")
    began = time.monotonic()
    answer = ask(work, params["question"], job.device)
    events.value("answer_s", time.monotonic() - began, question=params["question"], answer=answer)

    about = {"made_of": str(source), "question": params["question"], "answer": answer, "versions": _versions()}
    manifest.write(work, about)
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    events.progress(2, 2, "question")


def newest(checkpoint: Path, program: str) -> Path:
    """The folder with the model's shards of the newest checkpoint that `program` wrote below `checkpoint`.

    Raises InfrastructureError where there is none.
    """
    step = newest_step(checkpoint)
    if not step:
        raise InfrastructureError(f"checkpoint unusable: {checkpoint} has no {NEWEST}: nothing was saved there", KIND)
    folder = checkpoint / f"global_step_{step}"
    found = folder / SHARDS[program]
    if not found.is_dir():
        raise InfrastructureError(f"checkpoint unusable: step {step} is the newest, and {found} is not there", KIND)
    return found


def _merge(source: Path, target: Path, backend: str) -> None:
    sys.argv = ["merge", "merge", "--backend", backend, "--local_dir", str(source), "--target_dir", str(target)]
    try:
        import_module("verl.model_merger.__main__").main()
    except ImportError:
        raise
    except Exception as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InfrastructureError(f"checkpoint unusable: {source} does not merge: {why}", KIND) from error


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
