"""The folder of one cell on one node: the only module that knows the names of the files in it.

Agents and ranks write there; the controller reads it where it was gathered to. Ranks import this before torch: the
standard library only.
"""

from __future__ import annotations

from pathlib import Path

LAUNCHER = "launcher"  # takes a node's place where an engine has one command on the controller that starts all ranks
TORCHRUN_LOGS = "torchrun"  # the folder in which torchrun keeps its own

_EVENTS = ".jsonl"
STREAMS = ("stdout", "stderr")  # of every rank and of the engine


class CellDir:
    """The artefacts of one cell on one host. Nothing is created here."""

    # What grows while ranks run, and is passed on to the controller.
    RANK_FILES = (f"rank*{_EVENTS}", *(f"rank*.{stream}" for stream in STREAMS))

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def job(self) -> Path:
        """What ranks are asked for (workloads.job.RankJob)."""
        return self.path / "job.json"

    @property
    def facts(self) -> Path:
        """What the node was (cluster.facts)."""
        return self.path / "facts.json"

    @property
    def outcome(self) -> Path:
        """How it ended (node.protocol.Outcome); written last."""
        return self.path / "outcome.json"

    @property
    def messages(self) -> Path:
        """The agent's messages, where nobody reads its stdout; the first names the job and its hosts."""
        return self.path / "messages.jsonl"

    @property
    def telemetry(self) -> Path:
        """What the sampler measured, one sample a line."""
        return self.path / "telemetry.jsonl"

    @property
    def engine_stdout(self) -> Path:
        return self.path / "engine.stdout"

    @property
    def engine_stderr(self) -> Path:
        return self.path / "engine.stderr"

    def create(self) -> None:
        """Make the folder, for its owner alone."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def events(self, rank: int) -> Path:
        """The events of a rank, one JSON object a line."""
        return self.path / f"{rank_name(rank)}{_EVENTS}"

    def stream(self, rank: int, name: str) -> Path:
        """What a rank wrote to stdout or stderr; `name` is one of STREAMS."""
        return self.path / f"{rank_name(rank)}.{name}"

    def all_events(self) -> list[Path]:
        """The events of every rank that has begun; a file's stem is the rank's name."""
        return sorted(self.path.glob(f"rank*{_EVENTS}"))


def rank_name(rank: int | str) -> str:
    """What a rank is called in files and messages."""
    return f"rank{rank}"


def stderr_of(events: Path) -> Path:
    """What the rank of this file of events wrote to stderr."""
    return events.with_suffix(".stderr")


def holds_events(file: str) -> bool:
    """Whether a file of that name holds a rank's events, and not words for people."""
    return file.endswith(_EVENTS)
