"""What a controller and the agents on its nodes send each other: words and messages, and how both are encoded.

A controller sends an agent one request (`node.requests`), then words, one per line; the agent sends messages, one JSON
object per line. Under Slurm the request is part of the sbatch file, words are signals, and messages go to a file. No
other modules than these two know the encoding. Readers ignore unknown keys, and every key that an earlier version may
not have written has a default: a job may have waited in Slurm's queue while the controller was updated.

Imported on both sides, and on the path to the first step: the standard library only.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar

from runner.system import process

# --- timings ------------------------------------------------------------------------------------------

POLL_S = 0.1  # polling interval of both sides
HEARTBEAT_S = 2.0  # interval of the heartbeats that a controller sends to its agents
ALIVE_S = 5.0  # interval of the `Alive` messages that an agent sends to its controller
# Either side counts as gone after this time without input; several heartbeats may be lost or late.
SILENCE_S = 30.0
SAMPLE_S = 1.0  # between two samples of telemetry
GRACE_S = 3.0  # the time ranks have to end after INT, and again after TERM, before KILL
# The time an agent has to end after "stop" or "done": INT, TERM and KILL of the ranks, the same for an engine that
# still runs, and the transfer of its outcome.
PATIENCE_S = 4 * GRACE_S + 5
STACKS_ANSWER_S = 1.0  # the time ranks have to write their stacks
STACKS_S = 2 * STACKS_ANSWER_S  # from "stacks" to "stop": the agent has read the stacks within it


# --- words --------------------------------------------------------------------------------------------


class Word(StrEnum):
    """What a controller sends an agent whose cell runs. An empty line is a heartbeat."""

    # What it waited for is there: to a launcher, that every node has its job file; to a node, the data of held ranks.
    GO = "go"
    STACKS = "stacks"  # read the stack of each rank
    STOP = "stop"  # end the ranks
    DONE = "done"  # the launcher has ended, so its ranks have


LAST_WORDS = (Word.STOP, Word.DONE)  # after which an agent ends


class Stopped(StrEnum):
    """Why an agent ended its ranks, beside the last words and names of signals."""

    TIME_LIMIT = "time limit"  # Slurm signals that the job's is near
    TIMED_OUT = "timed out"  # the cell's own, under Slurm
    CONTROLLER_GONE = "controller gone"


# What Slurm's signals mean. It sends them to every process of a step: scancel's own TERM ends ranks at once, so the
# controller sends "stop" as a signal that ranks ignore, and they are interrupted as without Slurm.
SLURM_WORDS: Mapping[signal.Signals, Word | Stopped] = {
    signal.SIGUSR1: Stopped.TIME_LIMIT,
    signal.SIGUSR2: Word.STOP,
    signal.SIGTERM: Word.STOP,
    process.STACKS: Word.STACKS,
}


def slurm_signal(word: Word | Stopped) -> str:
    """The name of the signal that stands for `word` under Slurm, as its commands take it, such as "USR2"."""
    return next(number.name.removeprefix("SIG") for number, meant in SLURM_WORDS.items() if meant == word)


# --- encoding ------------------------------------------------------------------------------------------


@cache
def field_names(kind: Any) -> tuple[str, ...]:
    """The names of the fields of the dataclass `kind`."""
    return tuple(each.name for each in fields(kind))


def known(kind: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `value` that are fields of the dataclass `kind`."""
    return {name: value[name] for name in field_names(kind) if name in value}


# --- messages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """What an agent sends. A kind that this version does not know is read as a plain `Message`."""

    MESSAGE: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"message": self.MESSAGE, **vars(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Message:
        """The message in a JSON object; missing keys have their defaults."""
        return cls(**known(cls, value))


@dataclass(frozen=True)
class Placed(Message):
    """The Slurm job and the node that this agent runs in: the first line of a file of messages."""

    MESSAGE: ClassVar[str] = "placed"
    job: str | None = None
    hosts: Sequence[str] = ()  # all of the cell's, by the inventory's names, in rank order
    host: str = ""


@dataclass(frozen=True)
class Started(Message):
    """The engine's process runs as `pid`; None where another launcher starts this node's ranks."""

    MESSAGE: ClassVar[str] = "started"
    pid: int | None = None


@dataclass(frozen=True)
class Line(Message):
    """One line of a file in the cell's folder."""

    MESSAGE: ClassVar[str] = "line"
    file: str = ""
    line: str = ""


@dataclass(frozen=True)
class Alive(Message):
    """Sent every ALIVE_S while the agent runs."""

    MESSAGE: ClassVar[str] = "alive"


@dataclass(frozen=True)
class RankEnd:
    """What a rank's file of events shows; `stderr` holds its last lines if the rank did not end.

    `code` is the exit code of the program that it started (128 + n after signal n), None for a rank without one or
    whose program has not ended; `ended_s` is when that ended, in seconds since the epoch.
    """

    started: bool = False
    ended: bool = False
    stderr: Sequence[str] = ()
    code: int | None = None
    ended_s: float = 0.0


@dataclass(frozen=True)
class RankStack:
    """Where a rank was when its stack was read: its state as the kernel names it (None: gone), `age_s` since its last
    event, and its innermost Python frames, innermost first.
    """

    state: str | None = None
    age_s: float = 0.0
    frames: Sequence[str] = ()


@dataclass(frozen=True)
class Fault:
    """Why an engine's process of our own gave up: a kind of failure, a message of one line, and the node whose failure
    it is, by its name; None: the one that says so. Without kind and message, a rank tells why it failed, there.
    """

    kind: str | None = None
    message: str | None = None
    host: str | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fault:
        """The fault in a JSON object; raises TypeError if a required key is missing."""
        return cls(**known(cls, value))


@dataclass(frozen=True)
class Outcome(Message):
    """How one node's part of a cell ended: the last message, and all of outcome.json.

    `rc` is the engine's exit status, negative after a signal; None if it is not known. `stopped` is why the agent ended
    the ranks, `error` why it could not run them, `kind` the kind of that failure, `accused` the node
    whose failure it is, None if it is this one. `oom_kills` counts the processes
    that the kernel killed meanwhile because memory was exhausted; `kernel` are its messages of GPUs that failed.
    """

    MESSAGE: ClassVar[str] = "outcome"
    schema: int = 1
    host: str = ""
    attempt: int = 1
    rc: int | None = None
    stopped: str | None = None
    error: str | None = None
    kind: str | None = None
    oom_kills: int = 0
    stacks: Mapping[str, RankStack] = field(default_factory=dict)  # by rank, such as "rank0"
    started_s: float = 0.0  # since the epoch, by the node's clock
    ended_s: float = 0.0
    ranks: Mapping[str, RankEnd] = field(default_factory=dict)
    engine_stderr: Sequence[str] = ()  # its last lines
    kernel: Sequence[str] = ()
    accused: str | None = None

    @property
    def ended_well(self) -> bool:
        """Whether the engine exited with status 0 and there was no error."""
        return self.rc == 0 and not self.error

    def to_file(self) -> dict[str, Any]:
        """The JSON object of outcome.json."""
        return asdict(self)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"message": self.MESSAGE, **self.to_file()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Outcome:
        """The outcome in a message or in outcome.json. Raises AttributeError or TypeError for any other value."""
        ranks = {name: RankEnd(**known(RankEnd, rank)) for name, rank in (value.get("ranks") or {}).items()}
        stacks = {name: RankStack(**known(RankStack, rank)) for name, rank in (value.get("stacks") or {}).items()}
        return cls(**known(cls, value) | {"ranks": ranks, "stacks": stacks})


@dataclass(frozen=True)
class Checked(Message):
    """What would stop a cell on this node: `problems`, one line each, and their `kinds`; the node's clock (`time_s`,
    seconds since the epoch), its facts, the addresses that it has for the `names` of the request, and the version of
    its Open MPI if that was asked for.
    """

    MESSAGE: ClassVar[str] = "check"
    problems: Sequence[str] = ()
    kinds: Sequence[str] = ()
    time_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    addresses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    open_mpi: str | None = None


@dataclass(frozen=True)
class Swept(Message):
    """No process with the marker is left."""

    MESSAGE: ClassVar[str] = "sweep"


@dataclass(frozen=True)
class Cleaned(Message):
    """Whether files of the run were found and removed."""

    MESSAGE: ClassVar[str] = "clean"
    removed: bool = False


@dataclass(frozen=True)
class Stored(Message):
    """Whether the node has the folder whole; `found` is the digest of what is there, "" for nothing. `problem` is why
    that could not be seen or made, of a kind of failure, both "" otherwise.
    """

    MESSAGE: ClassVar[str] = "store"
    whole: bool = False
    found: str = ""
    problem: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Linked(Message):
    """How the node is connected: the `nics` that messages of ranks take (as in facts.json), the driver's version (None
    without one), what slows its CPUs down (`power`, a setting and its value by path), the ports that another process
    has (`taken`), and the firewall that is installed there: its program, and the chain of what comes in ("" unknown).
    """

    MESSAGE: ClassVar[str] = "linked"
    nics: Sequence[Mapping[str, Any]] = ()
    driver: str | None = None
    power: Mapping[str, str] = field(default_factory=dict)
    taken: Sequence[int] = ()
    firewall: str = ""
    chain: str = ""


@dataclass(frozen=True)
class Reached(Message):
    """What became of the connections to each peer by its name: by port why there was none; nothing where all were."""

    MESSAGE: ClassVar[str] = "reached"
    failed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Making(Message):
    """What is being done of a request that takes long: `done` of `total` steps (0: not known), and which, as text."""

    MESSAGE: ClassVar[str] = "making"
    done: int = 0
    total: int = 0
    step: str = ""


@dataclass(frozen=True)
class Environment(Message):
    """The Python of an environment that is whole, its version, and whether it was made now; or why there is none, as a
    `problem` of a `kind` of failure, both "" otherwise.
    """

    MESSAGE: ClassVar[str] = "environment"
    python: str = ""
    version: str = ""
    made: bool = False
    problem: str = ""
    kind: str = ""


_MESSAGES: Mapping[str, type[Message]] = {
    each.MESSAGE: each
    for each in (
        *(Placed, Started, Line, Alive, Outcome),
        *(Checked, Swept, Cleaned, Stored, Linked, Reached, Making, Environment),
    )
}


def read_message(line: str | bytes) -> Message | None:
    """The message in one line of an agent's output; None for any other line, such as a banner or half a line."""
    try:
        value = json.loads(line)
        return _MESSAGES.get(value["message"], Message).from_json(value)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
