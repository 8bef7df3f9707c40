"""One cell under Slurm: this node's part of it, from what Slurm says of the step."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.node.agent import NodeCell
from runner.node.output import say
from runner.plan.engines.ranks import Ranks
from runner.plan.engines.registry import ENGINES
from runner.results.celldir import MESSAGES
from runner.system.nodeset import expand


def run(request: Mapping[str, Any]) -> int:
    """One cell under Slurm: this node's part of it, told in a file of the cell's folder."""
    try:
        own = placed(request, os.environ)
        folder = Path(own["cell_dir"])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / MESSAGES).unlink(missing_ok=True)  # an earlier job's
        stream = os.open(folder / MESSAGES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except (OSError, ValueError) as error:
        print(f"runner.node: {request['cell']}: {error}", file=sys.stderr)
        return 1
    os.dup2(stream, 1)
    os.close(stream)
    say("placed", job=own_id(os.environ), hosts=own["hosts"], host=own["host"])
    return NodeCell(own).run()


def placed(request: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """A node's own request, from the one that all nodes of a step get and what Slurm told this task.

    Of the common request: `hosts` are Slurm names in rank order (none: Slurm's order); `names`,
    `addresses` and `node_env` have the inventory's names, addresses and variables of hosts by Slurm name;
    `shared_root` is the folder of all hosts' artefacts where nodes share it, else `cell_dir` is on each node.
    Raises ValueError saying what Slurm did not tell.
    """
    in_order, index = placement(environ)
    own = in_order[index]
    hosts = tuple(request.get("hosts") or in_order)
    if own not in hosts:
        raise ValueError(f"Slurm started it on {own}, which is none of {', '.join(hosts)}")
    index = hosts.index(own)
    names = [request.get("names", {}).get(host, host) for host in hosts]
    root = request.get("shared_root")
    cell_dir = str(Path(root, names[index], request["cell"])) if root else request["cell_dir"]
    launch = ENGINES[request["engine"]].launch(
        Ranks(
            nodes=[_Host(name, sys.executable) for name in names],
            gpus_per_node=request["gpus_per_node"],
            master_address=request.get("addresses", {}).get(hosts[0], hosts[0]),
            master_port=request["master_port"],
            cell_dir=cell_dir,
            launcher_dir=cell_dir,
            ssh_config=None,
            marker=request["marker"],
        )
    )
    env = {**request["env"], **request.get("node_env", {}).get(own, {})}
    return {
        **request,
        "host": names[index],
        "hosts": names,
        "cell_dir": cell_dir,
        "env": env,
        "job": {**request["job"], "env": env},
        "argv": launch.argv[index],
        "rendezvous_port": request["master_port"] if index == 0 else None,
    }


@dataclass(frozen=True)
class _Host:
    alias: str
    python: str


def own_id(environ: Mapping[str, str]) -> str | None:
    """The id of the job that this is a task of, as Slurm tells it to others: "123", or "123_4" in an array."""
    array, number = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{number}" if array and number else environ.get("SLURM_JOB_ID")


def placement(environ: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """The hosts of this step in Slurm's order, and which of them this is, from the environment of a task.

    Raises ValueError saying what is missing.
    """
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise ValueError("SLURM_STEP_NODELIST is not set: this is no task of srun")
    hosts, name, index = expand(nodelist), environ.get("SLURMD_NODENAME"), environ.get("SLURM_NODEID", "")
    if name in hosts:
        return hosts, hosts.index(name)
    if name:
        raise ValueError(f"SLURMD_NODENAME {name} is not in the step's node list {nodelist}")
    if not index.isdigit() or int(index) >= len(hosts):
        raise ValueError(f"neither SLURMD_NODENAME nor SLURM_NODEID says which of {nodelist} this is")
    return hosts, int(index)
