"""One cell under Slurm: this node's part of it, derived from the environment of the step."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runner.cluster import mpi, nccl
from runner.node.agent import NodeCell
from runner.node.output import send_message
from runner.node.protocol import Placed
from runner.node.requests import CellRequest, StepRequest
from runner.plan.engines.ranks import Ranks
from runner.plan.engines.registry import ENGINES
from runner.results.celldir import CellDir
from runner.system.nodeset import expand


def run(step: StepRequest) -> int:
    """Run this node's part of the cell; its messages go to a file in the cell's folder. Returns the exit status."""
    try:
        request, hosts = placed(step, os.environ)
        folder = CellDir(Path(request.cell_dir))
        folder.create()
        folder.messages.unlink(missing_ok=True)  # an earlier job's
        stream = os.open(folder.messages, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except (OSError, ValueError) as error:
        print(f"runner.node: {step.cell}: {error}", file=sys.stderr)
        return 1
    os.dup2(stream, 1)
    os.close(stream)
    send_message(Placed(own_id(os.environ), hosts, request.host))
    return NodeCell(request).run()


def placed(
    step: StepRequest,
    environ: Mapping[str, str],
    built: Callable[[], nccl.Built | None] = nccl.built,
    plugins: Callable[[], Sequence[str]] = mpi.plugins,
) -> tuple[CellRequest, list[str]]:
    """This node's own request, from the step's request (the same for all nodes), the environment of this task, the NCCL
    that was `built` here and the `plugins` for MPI that Slurm has; and the names of all the cell's nodes in rank order.

    Raises ValueError, naming what is missing from Slurm's environment.
    """
    in_order, index = placement(environ)
    own = in_order[index]
    hosts = tuple(step.hosts or in_order)
    if own not in hosts:
        raise ValueError(f"Slurm started it on {own}, which is not one of {', '.join(hosts)}")
    index = hosts.index(own)
    names = [step.names.get(host, host) for host in hosts]
    cell_dir = str(Path(step.shared_root, names[index], step.cell)) if step.shared_root else step.cell_dir
    engine = ENGINES[step.engine]
    ranks = ranks_of(step, hosts, step.python or sys.executable, link(step) if engine.step else cell_dir)
    if engine.step and index == 0:  # srun starts all ranks, here
        ranks = replace(ranks, mpi_plugin=mpi.plugin(plugins()) or ranks.mpi_plugin)
    launch = engine.launch(ranks)
    env = {**step.env, **step.node_env.get(own, {})}
    if step.nccl_if_built and (here := built()) and not here.obstacle:
        env = nccl.joined(nccl.environment(here.root), env)
    request = CellRequest(
        run_id=step.run_id,
        cell=step.cell,
        attempt=step.attempt,
        marker=step.marker,
        telemetry_interval_s=step.telemetry_interval_s,
        grace_s=step.grace_s,
        profile=step.profile,
        modules=step.modules,
        host=names[index],
        scratch=step.scratch,
        cell_dir=cell_dir,
        job={**step.job, "env": {**step.job.get("env", {}), **env}},  # the folders of compiled kernels are there alone
        argv=launch.argv[index],
        env=env,
        rendezvous_port=step.master_port if index == 0 else None,
        timeout_s=step.timeout_s,
        check=step.check,
        environment=step.environment,
        link=link(step) if engine.step else None,
    )
    return request, names


def link(step: StepRequest) -> str:
    """The path that leads to the cell's folder on every node, for a launcher that starts the ranks of all with one
    command: folders that nodes share differ by node. It is there from when ranks may start until the cell has ended.
    """
    return str(Path(step.scratch, step.run_id, f"{step.cell}.{step.attempt}"))


def ranks_of(step: StepRequest, hosts: Sequence[str], python: str, cell_dir: str) -> Ranks:
    """The ranks of a cell on `hosts`, Slurm's names in rank order."""
    return Ranks(
        nodes=[_Host(step.names.get(host, host), host, step.addresses.get(host, host), python) for host in hosts],
        gpus_per_node=step.gpus_per_node,
        master_address=step.addresses.get(hosts[0], hosts[0]),
        master_port=step.master_port,
        cell_dir=cell_dir,
        launcher_dir=cell_dir,
        ssh_config=None,
        marker=step.marker,
    )


@dataclass(frozen=True)
class _Host:
    name: str
    alias: str
    address: str
    python: str


def own_id(environ: Mapping[str, str]) -> str | None:
    """The id of the job of this task, as squeue shows it: "123", or "123_4" in an array."""
    array, number = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{number}" if array and number else environ.get("SLURM_JOB_ID")


def placement(environ: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """The hosts of this step in Slurm's order, and which of them this is, from the environment of a task.

    Raises ValueError, naming what is missing.
    """
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise ValueError("SLURM_STEP_NODELIST is not set: this is not a task of srun")
    hosts, name, index = expand(nodelist), environ.get("SLURMD_NODENAME"), environ.get("SLURM_NODEID", "")
    if name in hosts:
        return hosts, hosts.index(name)
    if name:
        raise ValueError(f"SLURMD_NODENAME {name} is not in the step's node list {nodelist}")
    if not index.isdigit() or int(index) >= len(hosts):
        raise ValueError(f"neither SLURMD_NODENAME nor SLURM_NODEID tells which of {nodelist} this node is")
    return hosts, int(index)
