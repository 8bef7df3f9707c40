"""A trained model taken to where others find it: to a folder, to the Hugging Face hub, or by rsync; then read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner.workflow.prepare import Progress


@dataclass(frozen=True)
class Published:
    """Where a model is now, as text for the user, how many bytes were sent, and the digest of its manifest."""

    where: str
    bytes: int
    digest: str


def check(target: str) -> None:
    """Refuse a target that could not be published to, before anything runs: `dir:PATH`, `hf:OWNER/NAME`,
    `rsync:[[USER@]HOST:]PATH`.

    The hub is not contacted. Raises UsageError.
    """
    raise NotImplementedError  # the body follows


def publish(model: Path, target: str, on_progress: Progress | None = None) -> Published:
    """Publish the folder `model` to `target`; what is there already and the same remains.

    Raises UsageError for a model that was not loaded and asked a question after it was merged, and for a target that
    holds something else; InfrastructureError where it cannot be reached or written, or does not read back the same.
    """
    raise NotImplementedError  # the body follows
