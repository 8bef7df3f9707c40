"""The engines: how ranks are started on the chosen nodes, one row each.

An engine is a pure function from a cell's ranks to a Launch: what each node runs, what (if anything) the controller
runs, and which files those commands need. It does not know how its commands reach the nodes. A user chooses one of
those for torch's programs; an MPI program has the one of its backend (`plan.build.engine_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from runner.plan.engines import accelerate, deepspeed, direct, mpirun, ray, srun, torchrun
from runner.plan.engines.ranks import Host, Launch, Ranks


@dataclass(frozen=True)
class Engine:
    """One engine: its function, and its requirements.

    `headed`: one command on the controller starts all ranks and connects to the nodes itself, over ssh, with the same
    Python path on all of them; `needs` is what to do where its program is missing, `instead` where it cannot work.
    `packages` must be installed on every node. `mpi`: what it starts are MPI programs; by Slurm's own plugin if `step`,
    else by Open MPI's launcher, whose version must be the same wherever it runs. `asked`: only tests that cannot do
    without it have it (`workloads.registry.Test.engine`). `on_ray`: its only rank is a job of a Ray that it starts
    on all nodes. `secrets` are environment variables with a secret of its own for each attempt, the same on all nodes
    of a cell.
    """

    launch: Callable[[Ranks], Launch]
    headed: bool = False
    needs: str = ""
    instead: str = ""
    packages: tuple[str, ...] = ()
    mpi: bool = False
    step: bool = False
    asked: bool = False
    on_ray: bool = False
    secrets: tuple[str, ...] = ()


ENGINES: Mapping[str, Engine] = {
    "torchrun": Engine(torchrun.launch),
    "deepspeed": Engine(
        deepspeed.launch,
        headed=True,
        needs="run from a machine with the nodes' environment, or use --engine torchrun",
        instead="use --engine torchrun, which runs every test, DeepSpeed's too",
        packages=("deepspeed",),
    ),
    "accelerate": Engine(accelerate.launch, packages=("accelerate",)),
    "none": Engine(direct.launch),
    "mpirun": Engine(
        mpirun.launch,
        headed=True,
        needs="install Open MPI as on the nodes (Debian, Ubuntu: apt install openmpi-bin), or leave this test out",
        instead="leave this test out",
        mpi=True,
    ),
    "srun": Engine(srun.launch, mpi=True, step=True),
    "ray": Engine(ray.launch, asked=True, on_ray=True, secrets=(ray.TOKEN,)),
}


def offered() -> tuple[str, ...]:
    """The engines among which a user chooses."""
    return tuple(name for name, engine in ENGINES.items() if not engine.mpi and not engine.asked)


def obstacle(engine: str, nodes: Sequence[Host]) -> str | None:
    """Why `engine` cannot start on these nodes, in one line, or None."""
    pythons = sorted({node.python for node in nodes})
    if ENGINES[engine].headed and len(pythons) > 1:
        return (
            f"engine {engine} starts every node's ranks with one Python, the inventory has {' and '.join(pythons)}: "
            f"install alike, or {ENGINES[engine].instead}"
        )
    return None
