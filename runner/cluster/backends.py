"""The backends: how commands reach nodes, one row each.

What depends on the backend asks its row what it does, never what it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """One backend.

    `remote`: nodes are other machines, which an ssh_config reaches. `scheduled`: a scheduler starts the cells as its
    jobs; these outlive their controller, are kept apart by the scheduler, and may be placed by it. `also`: the backends
    by which nodes that the inventory declares for this one can be reached as well.
    """

    name: str
    remote: bool
    scheduled: bool = False
    also: tuple[str, ...] = ()

    @property
    def by_ssh(self) -> bool:
        """Whether this controller itself holds a connection to each node."""
        return self.remote and not self.scheduled


LOCAL, SSH, SLURM = "local", "ssh", "slurm"

BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(LOCAL, remote=False),
        Backend(SSH, remote=True, also=(SLURM,)),
        Backend(SLURM, remote=True, scheduled=True),
    )
}
