"""Engines: how ranks are started on the chosen nodes. Pure functions from a cell's ranks to a Launch.

An engine knows nothing of how its commands reach the nodes; it says what each node runs, what (if
anything) the controller runs, and which files those need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Protocol

from runner.system.process import MARKER


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


def torchrun(ranks: Ranks) -> Launch:
    """One torchrun per node, static rendezvous on the first."""
    return Launch(
        argv=tuple(
            (
                node.python,
                "-m",
                "torch.distributed.run",
                f"--nnodes={len(ranks.nodes)}",
                f"--nproc-per-node={ranks.gpus_per_node}",
                f"--node-rank={index}",
                f"--master-addr={ranks.master_address}",
                f"--master-port={ranks.master_port}",
                f"--log-dir={PurePath(ranks.cell_dir, 'torchrun')}",  # else it litters /tmp
                "-m",
                "runner.workloads",
                ranks.cell_dir,
            )
            for index, node in enumerate(ranks.nodes)
        ),
    )


def deepspeed(ranks: Ranks) -> Launch:
    """DeepSpeed's own launcher on the controller: hostfile, pdsh, the inventory's port through ssh_config.

    It pastes its arguments and exports into remote shells unquoted, so it gets nothing but numbers and
    paths that the inventory has checked; everything else travels in job.json. The nodes' environment
    comes from a `.deepspeed_env` file, since it exports neither PATH nor most variables by itself.
    """
    python = ranks.nodes[0].python
    hostfile = str(PurePath(ranks.launcher_dir, "hostfile"))
    env_file = str(PurePath(ranks.launcher_dir, "deepspeed_env"))
    remote = ["--launcher=pdsh", "--force_multi"] if ranks.ssh_config else []
    exports = {"PATH": f"{PurePath(python).parent}:/usr/local/bin:/usr/bin:/bin", MARKER: ranks.marker}
    head_env = {"DS_ENV_FILE": env_file}
    if ranks.ssh_config:
        head_env["PDSH_SSH_ARGS_APPEND"] = f"-F {ranks.ssh_config}"
    return Launch(
        argv=tuple(None for _ in ranks.nodes),
        head=(
            python,
            "-m",
            "deepspeed.launcher.runner",
            f"--hostfile={hostfile}",
            *remote,
            "--no_ssh_check",
            f"--master_addr={ranks.master_address}",
            f"--master_port={ranks.master_port}",
            "--module",
            "runner.workloads",
            ranks.cell_dir,
        ),
        head_env=head_env,
        files={
            "hostfile": "".join(f"{node.alias} slots={ranks.gpus_per_node}\n" for node in ranks.nodes),
            "deepspeed_env": "".join(f"{key}={value}\n" for key, value in exports.items()),
        },
    )


ENGINES: dict[str, Callable[[Ranks], Launch]] = {"torchrun": torchrun, "deepspeed": deepspeed}


# Started by one command of the controller, which reaches the nodes by itself.
HEADED = frozenset({"deepspeed"})


def obstacle(engine: str, nodes: Sequence[Host]) -> str | None:
    """Why `engine` cannot start on these nodes, in one line, or None."""
    pythons = sorted({node.python for node in nodes})
    if engine == "deepspeed" and len(pythons) > 1:
        return (
            f"engine deepspeed starts every node's ranks with one Python, the inventory has {' and '.join(pythons)}: "
            "install alike, or use --engine torchrun"
        )
    return None
