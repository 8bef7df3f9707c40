"""The input of an engine, `Ranks`, and its output, `Launch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Rendezvous ports are below the kernel's ephemeral range and differ between runs, cells and attempts.
PORTS = range(20000, 30000)

# Settings of Open MPI, whose programs use it only to meet: data goes over what they measure. Its own ways over fast
# networks are left out, which differ from node to node, pin memory and warn; names that a version lacks do not matter.
MPI_SETTINGS: Mapping[str, str] = {
    "pml": "ob1",
    "btl": "^openib,ofi,uct,usnic,smcuda",
    "btl_vader_single_copy_mechanism": "none",
    "coll": "^hcoll",
}


class Host(Protocol):
    """The properties of a node that an engine needs; under Slurm an agent knows no others of its peers."""

    @property
    def name(self) -> str:
        """The name of the node in the inventory, by which outcomes have it."""

    @property
    def alias(self) -> str:
        """The node's alias, such as `node001`; under Slurm, the name that Slurm has for it."""

    @property
    def address(self) -> str:
        """The address or name by which the other nodes reach it."""

    @property
    def python(self) -> str:
        """The path of the Python interpreter on the node."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of one cell: all that an engine may depend on.

    `cell_dir` is the cell's folder on every node, `launcher_dir` its folder on the controller, `ssh_config` the path
    of the OpenSSH configuration that reaches the nodes (None: the node is this machine), and `marker` the value of the
    environment variable that marks the cell's processes. `env` are variables that must be set before a rank's process
    starts: an agent sets them for what it starts itself, and the job file comes too late for them. `mpi_plugin` is what
    srun calls the way by which the ranks of an MPI program meet. `launcher` is the Python of the ranks' launcher where
    it is not that of the ranks: a user's program has torch's launcher and its store from one installation.
    """

    nodes: Sequence[Host]
    gpus_per_node: int
    master_address: str
    master_port: int
    cell_dir: str
    launcher_dir: str
    ssh_config: str | None
    marker: str
    env: Mapping[str, str] = field(default_factory=dict)
    mpi_plugin: str = "pmix"
    launcher: str = ""

    def program(self, node: Host) -> tuple[str, ...]:
        """What torch's launchers on `node` execute as each rank, from their option that says of what kind it is."""
        module = ("-m", "runner.workloads", self.cell_dir)
        return ("--no-python", node.python, *module) if self.launcher else module


@dataclass(frozen=True)
class Launch:
    """The commands that start a cell: `argv` by node, and `head` with its environment `head_env` on the controller.

    The ranks of a node whose argv is None are started by `head`, or by the argv of the first node.
    """

    argv: tuple[tuple[str, ...] | None, ...]
    head: tuple[str, ...] | None = None
    head_env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # name in launcher_dir -> content
