"""The backends: how commands reach nodes, one row each.

Code that depends on the backend reads the properties of its row; it never compares its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """One backend.

    `remote`: nodes are other machines, reached with an ssh_config. `scheduled`: a scheduler starts the cells as its
    jobs, which outlive their controller; it allocates nodes exclusively and may choose them. `mpi` is the engine that
    starts MPI programs. `also`: further backends that can be used for nodes which the inventory declares for this one.
    """

    name: str
    remote: bool
    mpi: str = "mpirun"
    scheduled: bool = False
    also: tuple[str, ...] = ()

    @property
    def by_ssh(self) -> bool:
        """Whether the controller itself has a connection to each node."""
        return self.remote and not self.scheduled


LOCAL, SSH, SLURM = "local", "ssh", "slurm"

BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(LOCAL, remote=False),
        Backend(SSH, remote=True, also=(SLURM,)),
        Backend(SLURM, remote=True, mpi="srun", scheduled=True),
    )
}
