"""The plan: everything decided before anything runs, as plain data. `plan/build` makes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from runner import __version__
from runner.cluster import nccl
from runner.cluster.inventory import Node
from runner.errors import UsageError
from runner.plan.engines import ranks
from runner.workloads.registry import TESTS

SCHEMA = 1
# Environment of every rank, in addition to its node's.
CELL_ENV = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Batch:
    """global_batch = micro_batch × gradient_accumulation × world size, in sequences."""

    global_batch: int
    micro_batch: int
    gradient_accumulation: int


@dataclass(frozen=True)
class Prediction:
    """What one step of a cell takes at best, in seconds, and what binds it (`plan/speed` says how that is computed).

    `compute_s`, `host_s`, `nvlink_s` and `nic_s` (None: rate unknown) are what the step needs of GPU, host, NVLink and
    network each; `hidden_s` is communication behind computation. `positions_per_s_per_gpu` counts every token that is
    computed, padding included. `efficiency` (0…1) is that rate to the one on `base_nodes` nodes.
    `ways` are settings under which this does not bind, as they are typed.
    """

    compute_s: float
    host_s: float
    nvlink_s: float
    nic_s: float | None
    hidden_s: float
    step_s: float
    positions_per_s_per_gpu: float
    binds: str
    efficiency: float | None
    base_nodes: int
    rate_source: str
    ways: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One (test, model, num_nodes, repeat) of a plan. Ranks rendezvous on `hosts[0]`, port `master_port`.

    `hosts` is empty as long as Slurm has not placed the cell. `params` are the test's settings, `cell_dir` is the
    cell's folder on every node, `engine` starts its ranks, and `attempt` counts from 1. `chosen` says how the planner
    decided what was left open, and `expected` is what it predicts, None where it cannot. `profile` is that of the
    Python in which its ranks run (`Node.pythons`), empty for the node's own.

    A cell of a chain runs once the cell `after` is complete, and `inputs` say by name what it is made from, as digests.
    """

    id: str
    test: str
    model: str | None
    num_nodes: int
    repeat: int
    hosts: tuple[str, ...]
    gpus_per_node: int
    world_size: int
    device: str
    params: Mapping[str, Any]
    batch: Batch | None
    deepspeed: Mapping[str, Any] | None
    env: Mapping[str, str]
    cell_dir: str
    master_port: int
    launch: ranks.Launch
    engine: str
    attempt: int = 1
    chosen: str = ""
    expected: Prediction | None = None
    profile: str = ""
    after: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All that is decided about a run before it starts; the contents of plan.json.

    A decision during the run, such as a spare for a bad node, is made in a changed copy.
    """

    run_id: str
    created: str
    command: str
    run_dir: str
    inventory: str
    backend: str
    engine: str
    scaling: str
    seed: int
    weights: str | None
    nodes: tuple[Node, ...]
    hardware: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    targets: Sequence[Mapping[str, Any]]
    cells: tuple[Cell, ...]
    passed_over: tuple[Mapping[str, str], ...] = ()  # as in `failures.node_lines`
    spares: tuple[Node, ...] = ()
    slurm: Mapping[str, Any] | None = None
    named: bool = True  # False: Slurm chooses the nodes
    one_allocation: bool = False
    job_array: bool = False
    nccl: str | None = None  # "torch" or "built"; None: as each node has it
    nccl_root: str | None = None  # the folder of the built one, None: torch's own
    tuned: Mapping[str, Any] | None = None  # settings that `runner tune` found: `plan.tuned.apply`
    shared: str | None = None  # a folder that this machine and all nodes must see
    schema: int = SCHEMA
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """The plan as dicts and sequences that JSON can hold: the contents of plan.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan from the contents of plan.json; unknown keys are ignored.

        Raises UsageError where another version wrote it and a key that this version needs is missing.
        """

        def made(kind: Any, values: Mapping[str, Any], **given: Any) -> Any:
            known = {each.name for each in fields(kind)}
            return kind(**{key: value for key, value in values.items() if key in known} | given)

        def expected(values: Mapping[str, Any] | None) -> Any:
            return made(Prediction, values, ways=tuple(values["ways"])) if values else None

        try:
            cells = [
                made(
                    Cell,
                    {"engine": data["engine"], **cell},  # once, all cells had the plan's
                    hosts=tuple(cell["hosts"]),
                    batch=made(Batch, cell["batch"]) if cell["batch"] else None,
                    launch=made(ranks.Launch, cell["launch"], argv=tuple(cell["launch"]["argv"])),
                    expected=expected(cell.get("expected")),
                )
                for cell in data["cells"]
            ]
            return made(
                cls,
                data,
                cells=tuple(cells),
                nodes=tuple(made(Node, node) for node in data["nodes"]),
                spares=tuple(made(Node, node) for node in data.get("spares", ())),
            )
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"run {data.get('run_id')} was planned by shakedown {data.get('version')}, whose plans this version "
                f"({__version__}) cannot read ({error}): start a new run"
            ) from None

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in (*self.nodes, *self.spares)}

    def node(self, name: str) -> Node:
        """The node or spare with this name. Raises KeyError if there is none."""
        return self._by_name[name]


def changed_inputs(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """The names of the inputs that have another digest than before, or are only on one side."""
    return [name for name in {**now, **before} if now.get(name) != before.get(name)]


def fingerprint(plan: Plan, cell: Cell) -> str:
    """16 hexadecimal digits of a SHA-256 over all that defines what this cell measures, not where or when it runs."""
    measured = {
        "test": cell.test,
        "model": plan.models.get(cell.model) if cell.model else None,
        "weights": plan.weights,
        "engine": cell.engine,
        "scaling": plan.scaling,
        "seed": plan.seed,
        **{
            name: getattr(cell, name)
            for name in ("num_nodes", "gpus_per_node", "repeat", "device", "params", "deepspeed", "env")
        },
        **({"profile": cell.profile} if cell.profile else {}),  # without one as before there were any
    }
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]


def rank_programs(cells: Iterable[Cell]) -> list[str]:
    """The paths of the programs on the nodes that ranks of these cells run (`registry.RankCommand`)."""
    found = (TESTS[cell.test].rank_command(cell.params, cell.gpus_per_node, cell.device == "cuda") for cell in cells)
    return list(dict.fromkeys(each[0][0] for each in found if each))


def rank_environment(cell: Cell, node: Node) -> dict[str, str]:
    """Environment variables of the cell's ranks on this node; the node's own replace those of the cell, or extend them
    (`nccl.joined`).
    """
    return nccl.joined(cell.env, node.env)


def job(plan: Plan, cell: Cell, node: Node, data: str | None) -> dict[str, Any]:
    """The contents of a cell's job.json on `node`, which its ranks read (runner.workloads.job.RankJob).

    `data` is the folder of the prepared data on that node, None for a test that needs none.
    """
    return {
        "run_id": plan.run_id,
        "cell": cell.id,
        "test": cell.test,
        "num_nodes": cell.num_nodes,
        "gpus_per_node": cell.gpus_per_node,
        "world_size": cell.world_size,
        "device": cell.device,
        "seed": plan.seed,
        "params": dict(cell.params),
        "model": dict(plan.models[cell.model]) if cell.model else None,
        "weights": plan.weights if cell.deepspeed else None,
        "deepspeed": dict(cell.deepspeed) if cell.deepspeed else None,
        "data": data,
        "hardware": dict(plan.hardware),
        "env": {**kernel_caches(node), **rank_environment(cell, node)},
    }


def kernel_caches(node: Node) -> dict[str, str]:
    """Where ranks on `node` keep the kernels that are compiled for them: on a disk of its own, for the next cell."""
    return {
        "TRITON_CACHE_DIR": f"{node.scratch}/kernels/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{node.scratch}/kernels/inductor",
    }
