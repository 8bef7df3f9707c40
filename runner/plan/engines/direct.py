"""Engine `none`: no launcher; each node's ranks are started by a process of our own, with torch's variables."""

from __future__ import annotations

from runner.plan.engines.ranks import Launch, Ranks


def launch(ranks: Ranks) -> Launch:
    """One `runner.node.direct` per node, which needs nothing but the standard library."""
    return Launch(
        argv=tuple(
            (
                node.python,
                "-m",
                "runner.node.direct",
                f"--nnodes={len(ranks.nodes)}",
                f"--nproc-per-node={ranks.gpus_per_node}",
                f"--node-rank={index}",
                f"--master-addr={ranks.master_address}",
                f"--master-port={ranks.master_port}",
                ranks.cell_dir,
            )
            for index, node in enumerate(ranks.nodes)
        ),
    )
