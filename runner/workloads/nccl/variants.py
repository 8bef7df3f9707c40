"""The cells of test `nccl`: one for each launch of nccl-tests, since a process takes part in one MPI job only. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.errors import UsageError
from runner.system.wording import counted


def variants(params: Mapping[str, Any], num_nodes: int, gpus_per_node: int) -> dict[str, dict[str, Any]]:
    """The suffix of a cell's id -> its settings, with the cell's own `collective`, `split` and `rail`.

    Without several nodes of several GPUs, the splits are what split `none` is. A rail has the GPUs of that local index:
    nccl-tests prints the times of rank 0's group, so each rail has a launch in which it is that group, while all others
    carry as much at the same time. A hypercube is defined for powers of two. Raises UsageError where no cell is left.
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
    if not cells:
        splits = ",".join(params["splits"])
        raise UsageError(
            f"nccl.splits=[{splits}] with nccl.collectives=[{','.join(params['collectives'])}] leaves nothing to "
            f"measure on {counted(num_nodes, 'node')} of {counted(gpus_per_node, 'GPU')}: add none, or all_reduce"
        )
    smallest = min(params["split_min_bytes"], params["max_bytes"])
    return {
        suffix: {**params, **cell, "min_bytes": params["min_bytes"] if cell["split"] == "none" else smallest}
        for suffix, cell in cells.items()
    }
