"""The folder of one cell on one node: the only module that knows the names of the files in it.

Agents and ranks write the files; the controller reads gathered copies. Ranks import this before torch: the standard
library only.
"""

from __future__ import annotations

from pathlib import Path

LAUNCHER = "launcher"  # used like a node's name for an engine's single command on the controller that starts all ranks
TORCHRUN_LOGS = "torchrun"  # the folder of torchrun's own logs

_EVENTS = ".jsonl"
STREAMS = ("stdout", "stderr")  # of every rank and of the engine


class CellDir:
    """The artefacts of one cell on one host. Nothing is created here."""

    # Patterns of the files that grow while ranks run, and are sent to the controller.
    RANK_FILES = (f"rank*{_EVENTS}", *(f"rank*.{stream}" for stream in STREAMS))

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def job(self) -> Path:
        """The job of the ranks (workloads.job.RankJob)."""
        return self.path / "job.json"

    @property
    def go(self) -> Path:
        """Written once the data of held ranks are there."""
        return self.path / "go"

    @property
    def facts(self) -> Path:
        """The node's hardware, software and environment (cluster.facts)."""
        return self.path / "facts.json"

    @property
    def outcome(self) -> Path:
        """How the cell ended here (node.protocol.Outcome); written last."""
        return self.path / "outcome.json"

    @property
    def messages(self) -> Path:
        """The agent's messages under Slurm, where no controller reads its stdout; the first names the job and hosts."""
        return self.path / "messages.jsonl"

    @property
    def fault(self) -> Path:
        """Why the engine's process on this node gave up, where it is our own (node.protocol.Fault)."""
        return self.path / "fault.json"

    @property
    def accelerate_config(self) -> Path:
        """The configuration of this node's `accelerate launch` (plan.engines.accelerate)."""
        return self.path / "accelerate.yaml"

    @property
    def ray_head(self) -> Path:
        """Where the head of the cell's Ray is, once it answers (plan.engines.ray.Head)."""
        return self.path / "head.json"

    @property
    def ray_output(self) -> Path:
        """The output of `ray start`."""
        return self.path / "ray.log"

    @property
    def ray_logs(self) -> Path:
        """The folder of the logs of Ray's own processes."""
        return self.path / "ray"

    @property
    def telemetry(self) -> Path:
        """The samples of telemetry, one JSON object per line."""
        return self.path / "telemetry.jsonl"

    @property
    def phase(self) -> Path:
        """The phase of a step that verl's trainer is in (workloads.rl.phases)."""
        return self.path / "phase"

    @property
    def tensorboard(self) -> Path:
        """The folder of files for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def offline_runs(self) -> list[Path]:
        """The folders of runs for Weights & Biases that were not sent to it."""
        return sorted(self.path.glob("wandb/offline-run-*"))

    @property
    def engine_stdout(self) -> Path:
        """The engine's stdout."""
        return self.path / "engine.stdout"

    @property
    def engine_stderr(self) -> Path:
        """The engine's stderr."""
        return self.path / "engine.stderr"

    def create(self) -> None:
        """Create the folder if it does not exist, accessible to its owner only. Raises OSError."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def events(self, rank: int) -> Path:
        """The events of a rank, one JSON object per line."""
        return self.path / f"{rank_name(rank)}{_EVENTS}"

    def stream(self, rank: int, name: str) -> Path:
        """The output of a rank on stdout or stderr; `name` is one of STREAMS."""
        return self.path / f"{rank_name(rank)}.{name}"

    def verl_metrics(self, rank: int) -> Path:
        """The metrics that verl writes of each step, where this rank is the one that does (tools.verl_metrics)."""
        return self.path / f"verl.{rank_name(rank)}{_EVENTS}"

    def nccl_log(self, rank: int) -> Path:
        """What NCCL says of itself to a rank that keeps it apart from its output."""
        return self.path / f"{rank_name(rank)}.nccl"

    def all_events(self) -> list[Path]:
        """The files of events of all ranks that have started; a file's stem is the rank's name."""
        return sorted(self.path.glob(f"rank*{_EVENTS}"))


def rank_name(rank: int | str) -> str:
    """The name of a rank in files and messages, such as "rank0"."""
    return f"rank{rank}"


def stderr_of(events: Path) -> Path:
    """The file with the stderr of the rank of this file of events."""
    return events.with_suffix(".stderr")


def stdout_of(events: Path) -> Path:
    """The file with the stdout of the rank of this file of events."""
    return events.with_suffix(".stdout")


def holds_events(file: str) -> bool:
    """Whether a file of that name holds a rank's events, not text for people."""
    return file.endswith(_EVENTS)
