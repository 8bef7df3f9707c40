"""Engine `torchrun`: one launcher per node."""

from __future__ import annotations

from pathlib import PurePath

from runner.plan.engines.ranks import Launch, Ranks
from runner.results.celldir import TORCHRUN_LOGS


def launch(ranks: Ranks) -> Launch:
    """One torchrun per node with static rendezvous on the first node."""
    return Launch(
        argv=tuple(
            (
                ranks.launcher or node.python,
                "-m",
                "torch.distributed.run",
                f"--nnodes={len(ranks.nodes)}",
                f"--nproc-per-node={ranks.gpus_per_node}",
                f"--node-rank={index}",
                f"--master-addr={ranks.master_address}",
                f"--master-port={ranks.master_port}",
                f"--log-dir={PurePath(ranks.cell_dir, TORCHRUN_LOGS)}",  # else it litters /tmp
                *ranks.program(node),
            )
            for index, node in enumerate(ranks.nodes)
        ),
    )
