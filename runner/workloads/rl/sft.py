"""A rank of fine-tuning: verl's trainer, which takes rank and peers from torchrun's environment."""

from __future__ import annotations

from runner.workloads.job import Events, RankJob
from runner.workloads.rl import trainer


def run(job: RankJob, events: Events) -> None:
    """Train until the last step, and leave checkpoints in the cell's folder of these."""
    trainer.run("verl.trainer.sft_trainer", job, events)
