"""The engines: how ranks are started on the chosen nodes, one row each.

An engine is a pure function from a cell's ranks to a Launch: what each node runs, what (if anything) the controller
runs, and which files those commands need. It does not know how its commands reach the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from runner.plan.engines import deepspeed, torchrun
from runner.plan.engines.ranks import Host, Launch, Ranks


@dataclass(frozen=True)
class Engine:
    """One engine: its function, and its requirements.

    `headed`: one command on the controller starts all ranks and connects to the nodes itself, over ssh, with the same
    Python path on all of them. `packages` must be installed on every node.
    """

    launch: Callable[[Ranks], Launch]
    headed: bool = False
    packages: tuple[str, ...] = ()


ENGINES: Mapping[str, Engine] = {
    "torchrun": Engine(torchrun.launch),
    "deepspeed": Engine(deepspeed.launch, headed=True, packages=("deepspeed",)),
}


def obstacle(engine: str, nodes: Sequence[Host]) -> str | None:
    """Why `engine` cannot start on these nodes, in one line, or None."""
    pythons = sorted({node.python for node in nodes})
    if ENGINES[engine].headed and len(pythons) > 1:
        return (
            f"engine {engine} starts every node's ranks with one Python, the inventory has {' and '.join(pythons)}: "
            "install alike, or use --engine torchrun"
        )
    return None
