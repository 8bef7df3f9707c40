"""The cells of test `nccl`: one for each launch of nccl-tests, since a process may be part of one MPI job only. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def variants(params: Mapping[str, Any], num_nodes: int, gpus_per_node: int) -> dict[str, dict[str, Any]]:
    """The suffix of a cell's id -> its settings, which have `collective`, `split` and `rail` in place of the lists.

    Without more than one node of several GPUs, the splits are what split `none` is. `rail` is the local index of the
    GPUs that rank 0 is one of: nccl-tests prints the times of rank 0's group, so that each rail has a launch in which it
    is that one, while all others carry their own at the same time. A hypercube is defined for a power of two of ranks.
    """
    ranks = num_nodes * gpus_per_node
    cells = {}
    for collective in params["collectives"] if "none" in params["splits"] else ():
        if collective != "hypercube" or ranks & (ranks - 1) == 0:
            cells[collective] = {"collective": collective, "split": "none", "rail": None}
    if num_nodes > 1 and gpus_per_node > 1:
        for collective in params["split_collectives"]:
            if "node" in params["splits"]:
                cells[f"{collective}-node"] = {"collective": collective, "split": "node", "rail": None}
            for rail in range(gpus_per_node) if "rail" in params["splits"] else ():
                cells[f"{collective}-rail{rail}"] = {"collective": collective, "split": "rail", "rail": rail}
    smallest = min(params["split_min_bytes"], params["max_bytes"])
    return {
        suffix: {**params, **cell, "min_bytes": params["min_bytes"] if cell["split"] == "none" else smallest}
        for suffix, cell in cells.items()
    }
