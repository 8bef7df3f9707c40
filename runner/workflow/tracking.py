"""Where the metrics of a workflow were kept beside its records, and how they are sent or looked at."""

from __future__ import annotations

import shlex

from runner.results.rundir import RunDir


def kept(run: RunDir) -> list[str]:
    """A line for each tracker that has metrics of `run`, with the command for a shell in the current folder."""
    cells = run.cells()
    offline = [str(path) for cell in cells for path in cell.offline_runs]
    lines = [f"Weights & Biases: nothing was sent; to send it: wandb sync {shlex.join(offline)}"] if offline else []
    if any(cell.tensorboard.is_dir() for cell in cells):
        lines.append(f"TensorBoard: tensorboard --logdir {shlex.quote(str(run.path / 'nodes'))}")
    return lines
