"""Everything that a workflow needs, found or fetched before anything is submitted: environment, model, data, reward.

What is missing or does not fit is reported all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Called with (what is done, how much is done, how much there is).
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Observed:
    """What a node answered: the SHA-256 of the lock that the profile's environment there was made from (None: it has
    none), and its NVIDIA driver's version (None: no driver).
    """

    lock: str | None
    driver: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a workflow is asked for, as far as it has to be found or fetched.

    `profile` is the environment's name, `lock` its lock file on this machine; `nodes` are the answers of the nodes by
    alias, empty where Slurm chooses them later. `model` is a folder or a hub id (None: the tiny Llama), `data` and
    `rl_data` are files, folders, hub ids or `gsm8k` (None: the arithmetic set; `rl_data` None: as `data`). `reward` is
    a file with `compute_score`, `publish` a target of `workflow.publish`.

    `work` is a folder that all nodes see, in which what they need is placed; what lies in one of the folders `seen`,
    which all nodes see as this machine does, stays where it is: `(Path("/"),)` where ranks run on this machine. `cache`
    is for what can be made again. `saves` is how many checkpoints a stage keeps.
    """

    workflow: str
    profile: str
    lock: Path
    work: Path
    cache: Path
    model: str | None = None
    data: str | None = None
    rl_data: str | None = None
    reward: Path | None = None
    publish: str | None = None
    seen: tuple[Path, ...] = ()
    nodes: Mapping[str, Observed] = field(default_factory=dict)
    seed: int = 0
    samples: int = 512
    saves: int = 1


@dataclass(frozen=True)
class Files:
    """A data set in one of verl's schemas: files of Parquet; `val` None: it has no part for validation."""

    train: Path
    val: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """What was found: paths as all nodes see them.

    `data` is by artefact (`stages.SFT_DATA`, `stages.RL_DATA`), `checksums` by artefact what `stages.inputs` takes as
    `prepared`. `reward_sha256` belongs to the settings of the stage that uses it. `question` is one of the data, to be
    asked of a trained model; `parameters` are the model's; `notes` are lines for the user, such as the licence.
    """

    model: Path
    data: Mapping[str, Files]
    checksums: Mapping[str, str]
    question: str
    parameters: int
    reward: Path | None = None
    reward_sha256: str | None = None
    notes: tuple[str, ...] = ()


def prepare(asked: Asked, on_progress: Progress | None = None) -> Prepared:
    """Find or fetch everything, with a manifest of it in `asked.work`.

    Raises UsageError or InfrastructureError with all reasons at once, each a line; then nothing has been submitted.
    """
    raise NotImplementedError  # the body follows


def preview(asked: Asked) -> Prepared:
    """What `prepare` would find, for a dry run: nothing is contacted, fetched or written.

    A checksum that only reading or fetching can tell is "". Raises UsageError with all reasons that are known without.
    """
    raise NotImplementedError  # the body follows
