"""What an engine may depend on, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Host(Protocol):
    """What of an inventory's node an engine needs; under Slurm the agent knows no more of its peers."""

    @property
    def alias(self) -> str: ...

    @property
    def python(self) -> str: ...


@dataclass(frozen=True)
class Ranks:
    """The ranks of one cell: what an engine may depend on.

    `cell_dir` is the cell's folder on every node, `launcher_dir` its folder on the controller, and
    `ssh_config` the OpenSSH configuration that reaches the nodes (None: the node is this machine).
    """

    nodes: Sequence[Host]
    gpus_per_node: int
    master_address: str
    master_port: int
    cell_dir: str
    launcher_dir: str
    ssh_config: str | None
    marker: str


@dataclass(frozen=True)
class Launch:
    """What runs where. A node without argv has its ranks started by the controller's `head` command."""

    argv: tuple[tuple[str, ...] | None, ...]
    head: tuple[str, ...] | None = None
    head_env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # name in launcher_dir -> content
