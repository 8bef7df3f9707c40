"""What ranks tell each other: through the store by which they were started, so that a broken fabric stops nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

# Longer than the controller waits for a sign of life: by the stacks of ranks it knows which one hangs.
PATIENCE = timedelta(minutes=15)


class Meeting:
    """All ranks of a cell. Every rank calls the same methods in the same order.

    Each raises what torch.distributed raises where a rank does not come within a quarter of an hour.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, per_node: int) -> None:
        self.rank, self.size = rank, size
        self.local, self.per_node = rank % per_node, per_node
        self._store = store
        self._met = 0

    @classmethod
    def from_environment(cls, per_node: int) -> Meeting:
        """The meeting of the ranks that an engine started, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
        from torch.distributed import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        return cls(store, rank, size, per_node)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self._met += 1
        count, go = f"count{self._met}", f"go{self._met}"
        if self._store.add(count, 1) == self.size:
            self._store.set(go, "")
        self._store.wait([go], PATIENCE)

    def share(self, value: Any) -> list[Any]:
        """What each rank gives, any JSON, in the order of ranks."""
        name = f"value{self._met}"
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        self.wait()
        return [json.loads(text) for text in self._store.multi_get([f"{name}/{rank}" for rank in range(self.size)])]

    def turns(self) -> Iterator[bool]:
        """Whether it is this rank's turn, once for each rank of a node: one of each node has it at the same time."""
        for turn in range(self.per_node):
            self.wait()
            yield turn == self.local
        self.wait()
