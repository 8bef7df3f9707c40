"""What a controller asks of the agent on a node: one request, the first that it sends. `node.protocol` has the rest.

Imported on both sides, and on the path to the first step: the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Self, get_args

from runner.node.protocol import GRACE_S, SAMPLE_S, SILENCE_S, field_names, known


class Kind(StrEnum):
    """The kinds of requests."""

    CHECK = "check"
    CELL = "cell"
    SWEEP = "sweep"
    CLEAN = "clean"
    STORE = "store"
    LINKS = "links"
    ENVIRONMENT = "environment"


class UnknownRequest(Exception):
    """A request of a kind that this version does not know."""


@dataclass(frozen=True)
class _Plain:
    """A request of one kind, whose fields are as JSON has them."""

    KIND: ClassVar[Kind]

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"kind": self.KIND, **vars(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The request in a JSON object; raises TypeError if a required key is missing."""
        return cls(**known(cls, value))


@dataclass(frozen=True)
class ProfileCheck:
    """The profile in whose Python, at the path `python`, ranks are to run (`cluster.profiles`).

    `locks` are those of which it may be, their names by the SHA-256 of their texts; none for a site's own Python, which
    must have `packages`. `remedy` is what to do where it is not as expected.
    """

    name: str
    python: str
    remedy: str
    locks: Mapping[str, str] = field(default_factory=dict)
    packages: Sequence[str] = ()


@dataclass(frozen=True)
class CheckRequest(_Plain):
    """Check this node for anything that would stop a cell. Answered by `Checked`.

    `packages` are distributions that must be installed in the agent's environment, `programs` must be on its PATH;
    `gpus` is how many must answer (None: the inventory does not say). `scratch` is a folder on the node. `nccl_root` is
    the folder with the built NCCL that ranks are to use (None: torch's own), `weights` one of weights to be loaded.
    `names` are to be resolved. `nccl_tests` are programs of nccl-tests that ranks execute, by their paths; `open_mpi`:
    Open MPI's launcher starts them, `slurm_mpi`: Slurm does. `shared` are files by path, and what the controller wrote
    into each, `modules` the environment modules that are to be loaded.
    """

    KIND: ClassVar[Kind] = Kind.CHECK
    version: str  # of the controller
    scratch: str
    min_free_disk_gib: float
    packages: Sequence[str] = ()
    programs: Sequence[str] = ()
    gpus: int | None = None
    nccl_root: str | None = None
    weights: str | None = None
    names: Sequence[str] = ()
    nccl_tests: Sequence[str] = ()
    open_mpi: bool = False
    slurm_mpi: bool = False
    profile: ProfileCheck | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    modules: Sequence[str] = ()

    def fields(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        return {**vars(self), "profile": vars(self.profile) if self.profile else None}

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"kind": self.KIND, **self.fields()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CheckRequest:
        """The request in a JSON object; raises TypeError if a required key is missing."""
        profile = value.get("profile")
        made = {"profile": ProfileCheck(**known(ProfileCheck, profile)) if profile else None}
        return cls(**known(cls, value) | made)


@dataclass(frozen=True, kw_only=True)
class _OfCell:
    """The part of a cell's request that is the same over every backend. Every process of the cell carries `marker`.

    `profile` is that of the Python that runs the ranks (`cluster.profiles`), "" where it is the agent's; `modules` are
    the environment modules that are loaded for them.
    """

    run_id: str
    cell: str
    attempt: int = 1
    marker: str
    telemetry_interval_s: float = SAMPLE_S
    grace_s: float = GRACE_S
    profile: str = ""
    modules: Sequence[str] = ()


# Omitted from a request that has no such thing.
_OF_LAUNCHERS = ("isolated", "hold")
_OF_NODES = ("job", "secrets", "rendezvous_port")
_OF_STEPS = ("timeout_s", "check", "environment", "link")


@dataclass(frozen=True, kw_only=True)
class CellRequest(_OfCell):
    """Run one node's part of a cell in `cell_dir`, or a launcher on the controller (`scratch` None). Answered by
    `Started`, `Line` and `Alive` while it runs, and `Outcome`.

    Without `argv`, a launcher elsewhere starts this node's ranks: the agent only watches and ends them. `job` is what
    ranks read; `env` and `secrets` are added to the agent's own environment, or replace most of it if `isolated`.
    `hold`: start only at the word "go". `rendezvous_port` must be free on this node.

    The last four are only set under Slurm (`StepRequest`), where no controller is connected to stdin. `link` is a path
    that is to lead to `cell_dir` from when ranks may start.
    """

    heartbeat_timeout_s: float = SILENCE_S
    host: str
    scratch: str | None
    cell_dir: str
    job: Mapping[str, Any] | None = None
    argv: Sequence[str] | None = None
    env: Mapping[str, str]
    secrets: Mapping[str, str] = field(default_factory=dict)
    rendezvous_port: int | None = None
    isolated: bool = False
    hold: bool = False
    timeout_s: float | None = None
    check: CheckRequest | None = None
    environment: Mapping[str, str | None] | None = None
    link: str | None = None

    @property
    def under_slurm(self) -> bool:
        """Whether Slurm started the agent, so that no controller is connected to its stdin."""
        return self.timeout_s is not None

    def to_json(self) -> dict[str, Any]:
        """As a controller sends it to a node over stdin, or to its own launcher."""
        left_out = (*_OF_STEPS, *(_OF_NODES if self.scratch is None else _OF_LAUNCHERS))
        values = {name: getattr(self, name) for name in (*field_names(_OfCell), *field_names(CellRequest))}
        return {"kind": Kind.CELL, **{name: value for name, value in values.items() if name not in left_out}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CellRequest:
        """The request in a JSON object; raises TypeError if a required key is missing."""
        return cls(**known(cls, value))


@dataclass(frozen=True, kw_only=True)
class StepRequest(_OfCell):
    """A cell as a step of a Slurm job: all nodes get the same request, and each derives its own `CellRequest` from it
    (`slurm_step.placed`).

    `hosts` are Slurm names in rank order (none: Slurm's order); `names`, `addresses` and `node_env` have the
    inventory's names, addresses and variables of hosts by Slurm name, where they differ from the name itself and from
    `env`. `shared_root` is the folder of all hosts' artefacts where nodes share it (else `cell_dir` is on each node).
    `timeout_s` limits the cell. `check` is what no preflight has checked, `environment` the expected environment (a
    value of None: any). `nccl_if_built`: ranks use the NCCL that was built on their node, where there is one. `python`
    is the Python of the ranks on every node, None: the agent's own.
    """

    engine: str
    gpus_per_node: int
    master_port: int
    timeout_s: float
    scratch: str
    cell_dir: str = ""
    shared_root: str | None = None
    hosts: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str]
    node_env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    job: Mapping[str, Any]
    check: CheckRequest | None = None
    environment: Mapping[str, str | None] | None = None
    nccl_if_built: bool = False
    python: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object that an sbatch file contains."""
        check = self.check.fields() if self.check else {}
        return {"kind": Kind.CELL, "slurm": True, **dict(vars(self), check=check)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepRequest:
        """The request in the JSON object of an sbatch file; raises TypeError if a required key is missing."""
        check = value.get("check")
        return cls(**dict(known(cls, value), check=CheckRequest.from_json(check) if check else None))


@dataclass(frozen=True)
class SweepRequest(_Plain):
    """End every process that carries `marker`. Answered by `Swept`."""

    KIND: ClassVar[Kind] = Kind.SWEEP
    marker: str
    grace_s: float = GRACE_S


@dataclass(frozen=True)
class CleanRequest(_Plain):
    """Remove what a run left on this node. Answered by `Cleaned`."""

    KIND: ClassVar[Kind] = Kind.CLEAN
    scratch: str
    run_id: str


@dataclass(frozen=True)
class StoreRequest(_Plain):
    """Have the folder of the user whose digest this is whole in the folder `root`. Answered by `Stored`.

    `arrived`: it was just sent (`node.code.incoming`). `work` is the path of a working copy to be made, "" for none.
    """

    KIND: ClassVar[Kind] = Kind.STORE
    root: str
    digest: str
    arrived: bool = False
    work: str = ""


@dataclass(frozen=True)
class LinksRequest(_Plain):
    """Say how this node is connected and powered, listen on the TCP `ports` until any word but "go", and at the word
    "go" try those of `peers`, which are addresses by name. Answered by `Linked`, and then by `Reached`.

    `env` are the variables of the inventory, which may say what interface messages take.
    """

    KIND: ClassVar[Kind] = Kind.LINKS
    ports: Sequence[int] = ()
    peers: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EnvironmentRequest(_Plain):
    """Have the Python environment of a user's lock whole in the folder `root`, called by its `digest`. Answered by
    `Making` while it is made, and `Environment`.

    `files` are the installer's, their texts by name: of the tool `pip`, requirements.txt and constraints.txt, of
    `conda`, environment.yml. `python` is the oldest version that it may have ("" for any), `env` the variables of the
    inventory, which may say where packages are found.
    """

    KIND: ClassVar[Kind] = Kind.ENVIRONMENT
    root: str
    digest: str
    tool: str
    files: Mapping[str, str]
    python: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


_OfNode = CheckRequest | SweepRequest | CleanRequest | StoreRequest | LinksRequest | EnvironmentRequest
Request = CellRequest | StepRequest | _OfNode


def read_request(value: Mapping[str, Any]) -> Request:
    """The request in a JSON object. Raises UnknownRequest, with the kind in its message."""
    kind = value.get("kind")
    if kind == Kind.CELL:
        return StepRequest.from_json(value) if value.get("slurm") else CellRequest.from_json(value)
    asked: type[_OfNode] | None = next((each for each in get_args(_OfNode) if kind == each.KIND), None)
    if asked is None:
        raise UnknownRequest(f"unknown request {kind!r}")
    return asked.from_json(value)
