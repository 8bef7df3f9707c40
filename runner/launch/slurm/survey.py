"""Checks in seconds, read-only, whether Slurm can start a benchmark: `runner check` for nodes under Slurm."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from runner.cluster.inventory import Node
from runner.cluster.slurm import Settings
from runner.launch.slurm import capacity, script
from runner.launch.slurm.allocations import slurm_name
from runner.launch.slurm.capacity import Partition, SlurmNode
from runner.launch.slurm.commands import SlurmClient
from runner.plan import config
from runner.system.nodeset import fold
from runner.workloads import registry


@dataclass(frozen=True)
class Survey:
    """Slurm's partitions and nodes, and why it could not start one cell on `num_nodes` nodes.

    `state` is "usable", "down" where nodes are down (one of the inventory's, or so many that nothing could start), or
    "refused" for a request that could not start with all nodes up. `down` and `unknown` are nodes of the inventory.
    """

    state: str
    num_nodes: int
    partitions: list[Partition]
    nodes: list[SlurmNode]
    down: list[str]
    unknown: list[str]
    refusals: list[str]


def ask(commands: SlurmClient, nodes: Sequence[Node], named: bool) -> Survey:
    """Ask Slurm whether it can start a cell on as many nodes as `nodes`; `named`: on exactly these.

    Raises InfrastructureError if Slurm does not answer.
    """
    partitions, seen = commands.look()
    mem = capacity.memory(commands.settings, partitions, seen)
    settings, first = commands.settings.model_copy(update={"mem": mem}), nodes[0]
    known = {node.name: node for node in seen}
    names = [slurm_name(node, tuple(known)) for node in nodes]
    longest_s = max(config.load_test(test, {}).timeout_s for test in registry.offered())
    step = script.Step("check", len(nodes), {}, tuple(names) if named else (), longest_s)
    job = script.BatchJob("shakedown-check", (step,), first.python, "/dev/null", first.gpus or 1, first.device)
    refused, wrong = capacity.refused(job, settings, partitions, seen)
    if not refused and (why := commands.test_only(script.render(job, settings))):
        refused = wrong = [f"sbatch says: {why}"]
    down = [name for name in names if name in known and not known[name].usable]
    return Survey(
        state="refused" if wrong else "down" if refused or down else "usable",
        num_nodes=len(nodes),
        partitions=partitions,
        nodes=seen,
        down=down,
        unknown=[name for name in names if name not in known],
        refusals=refused,
    )


def describe(found: Survey, settings: Settings, width: int) -> str:
    """The survey as text, in lines of at most `width` columns unless a word is longer."""
    lines = capacity.describe(found.partitions, found.nodes, settings)
    for what, names in (("not usable", found.down), ("unknown to Slurm", found.unknown)):
        lines += [f"in the inventory, {what}: {fold(names)}"] if names else []
    asked = f"bench --nodes {found.num_nodes}"
    lines += [f"{asked} is refused: {reason}" for reason in found.refusals] or [f"{asked}: Slurm can start it"]
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
        for line in lines
    )
