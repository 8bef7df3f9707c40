"""Locks that prevent a user's own runs and setups from using the same nodes."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path

from runner.errors import InfrastructureError


@contextlib.contextmanager
def hold_nodes(state: Path, endpoints: Mapping[str, str], run_id: str) -> Iterator[None]:
    """Lock nodes (endpoint -> name) against this user's other runs and setups while the block runs.

    `state` is the folder of the lock files; `run_id` is written into them. Raises InfrastructureError with the name of
    the run that holds a lock. The kernel releases the locks when the holder dies, so none is ever stale.
    """
    locks = state / "nodes"
    locks.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for endpoint, host in sorted(endpoints.items()):
            file = stack.enter_context(open(locks / endpoint, "a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise InfrastructureError(
                    f"{host} is in use by run {holder}: wait for it or stop it (`runner runs stop {holder}`)", "in_use"
                ) from None
            file.truncate(0)
            file.write(run_id)
            file.flush()
        yield
