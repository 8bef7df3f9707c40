"""The planner's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.plan.speed import Rate


@dataclass(frozen=True)
class Link:
    """One cell of a chain: it runs `test` with the settings `params`, once the one before it is complete.

    `name` is the cell's id. `inputs` say by name what it is made from, as digests.
    """

    name: str
    test: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a plan is made from: names and values that were checked against the files, and how nodes are reached.

    `run_dir` and `ssh_config` are paths on the controller; `node_counts` are the sweep, `hardware` and `model` the
    contents of their files in configs/. A request has `tests`, or a `chain`: then each cell needs what the one before
    it leaves, and all are planned once, on the largest of the node counts.
    """

    run_id: str
    created: str
    command: str
    inventory: str
    run_dir: str
    tests: Mapping[str, Mapping[str, Any]]  # name -> settings
    model: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    hardware: Mapping[str, Any]
    targets: Sequence[Mapping[str, Any]]
    node_counts: tuple[int, ...]
    engine: str
    backend: str
    scaling: str
    repeats: int
    gpus_per_node: int
    device: str
    ssh_config: str | None
    weights: str | None = None
    seed: int = 0
    passed_over: tuple[Mapping[str, str], ...] = ()  # as in `failures.node_lines`
    spares: bool = False  # whether nodes beyond those needed may take the place of bad ones
    slurm: Mapping[str, Any] | None = None
    named: bool = True  # False: Slurm chooses the nodes
    one_allocation: bool = False
    job_array: bool = False
    nccl: str | None = None  # "torch" or "built"; None: as the nodes have it
    nccl_root: str | None = None  # the folder of the built one, None: torch's own
    deepspeed_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # alternatives, by name
    rates: tuple[Rate, ...] = ()  # what was measured of this model on these GPUs
    profile: str = ""  # in whose Python the ranks of every cell run; "" in the nodes' own
    shared: str | None = None  # a folder that this machine and all nodes must see, None if they need none
    tuned: Mapping[str, Any] | None = None  # what `plan.tuned.apply` used of a result of tuning, and what it did not
    chain: tuple[Link, ...] = ()

    @property
    def test_names(self) -> tuple[str, ...]:
        """The names of the tests that are asked for, each once."""
        return tuple(dict.fromkeys((*self.tests, *(link.test for link in self.chain))))
