"""`python -m runner.node.direct CELL_DIR …`: the ranks of this node without a launcher, one for each GPU.

Started by the node's agent as torchrun is. Ranks get the variables by which torch and others know their place. When one
fails the others of the node are ended; those of other nodes the controller ends, or Slurm.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from runner.node.protocol import GRACE_S
from runner.system import process

POLL_S = 0.05  # between two looks at the ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks; returns the exit status of the one that failed first, 128 + n after signal n, or 0."""
    parser = argparse.ArgumentParser(prog="runner.node.direct", allow_abbrev=False)
    for name in ("--nnodes", "--nproc-per-node", "--node-rank", "--master-port"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("cell_dir")
    asked = parser.parse_args(argv)
    places = variables(asked.nnodes, asked.nproc_per_node, asked.node_rank, asked.master_addr, asked.master_port)
    return supervise([sys.executable, "-m", "runner.workloads", asked.cell_dir], places)


def variables(nodes: int, ranks: int, node: int, address: str, port: int) -> list[dict[str, str]]:
    """What each of the `ranks` of the node with the index `node` is told of its place."""
    common = {
        "WORLD_SIZE": nodes * ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    own = ({"RANK": node * ranks + local, "LOCAL_RANK": local} for local in range(ranks))
    return [{name: str(value) for name, value in {**each, **common}.items()} for each in own]


def supervise(command: Sequence[str], places: Sequence[Mapping[str, str]], grace_s: float = GRACE_S) -> int:
    """Run `command` once with each of `places` in its environment; signals go on to all.

    Of the first that fails the status is returned, and its rank said on stderr as torchrun does; the others get TERM,
    and KILL after `grace_s`.
    """
    stops: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        stops.append(number)

    failed: tuple[str, int] | None = None
    kill_at: float | None = None
    with process.handling(process.STOPS, hand_on):
        running = {place["RANK"]: process.beside(command, env={**os.environ, **place}) for place in places}
        while running:
            ended = {rank: child.returncode for rank, child in running.items() if child.poll() is not None}
            running = {rank: child for rank, child in running.items() if rank not in ended}
            first = next(((rank, status) for rank, status in ended.items() if status), None)
            if first and failed is None:
                failed = first
                stops.append(signal.SIGTERM)
            if stops:
                number = stops.pop(0)
                for child in running.values():
                    process.signal_group(child, number)
                if kill_at is None:
                    kill_at = time.monotonic() + grace_s
            if kill_at is not None and time.monotonic() > kill_at:
                for child in running.values():
                    process.kill_group(child)
            time.sleep(POLL_S if running else 0)
    if failed is None:
        return 0
    rank, status = failed
    print(f"Root Cause (first observed failure):\n  rank      : {rank}\n  exitcode  : {status}", file=sys.stderr)
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
