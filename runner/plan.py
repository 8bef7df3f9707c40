"""The plan: everything decided before anything runs. Pure data, made by pure functions.

`--nodes 8` becomes `num_nodes` of a cell here, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any

from runner import __version__, engines, failures
from runner.cluster.inventory import Node
from runner.errors import UsageError

SCHEMA = 1
# Rendezvous ports lie below the kernel's ephemeral range and differ between runs, cells and attempts.
PORTS = range(20000, 30000)
# What every rank gets beside its node's own environment.
CELL_ENV = {"OMP_NUM_THREADS": "1"}
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Batch:
    """global_batch = micro_batch × gradient_accumulation × world size, in sequences."""

    global_batch: int
    micro_batch: int
    gradient_accumulation: int


@dataclass(frozen=True)
class Cell:
    """One (test, model, num_nodes, repeat). `hosts[0]` is the rendezvous.

    Where Slurm places a cell, `hosts` is empty until it has.
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
    launch: engines.Launch
    attempt: int = 1


@dataclass(frozen=True)
class Plan:
    """A whole run. What its execution decides, such as another node for a bad one, is written back into it."""

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
    passed_over: tuple[Mapping[str, str], ...] = ()  # as in `kinds.node_lines`
    spares: tuple[Node, ...] = ()
    slurm: Mapping[str, Any] | None = None
    named: bool = True  # False: Slurm chooses the nodes
    one_allocation: bool = False
    job_array: bool = False
    schema: int = SCHEMA
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` gave, after a way through JSON.

        Raises UsageError where it was written by a version that plans otherwise.
        """

        def made(kind: Any, values: Mapping[str, Any], **given: Any) -> Any:
            known = {field.name for field in fields(kind)}
            return kind(**{key: value for key, value in values.items() if key in known} | given)

        try:
            cells = [
                made(
                    Cell,
                    cell,
                    hosts=tuple(cell["hosts"]),
                    batch=made(Batch, cell["batch"]) if cell["batch"] else None,
                    launch=made(engines.Launch, cell["launch"], argv=tuple(cell["launch"]["argv"])),
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
                f"({__version__}) cannot take up ({error}): start a new run"
            ) from None

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in (*self.nodes, *self.spares)}

    def node(self, name: str) -> Node:
        """The node or spare of that name."""
        return self._by_name[name]


@dataclass(frozen=True)
class Request:
    """What the user asked for, every name and value already checked against the files."""

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
    passed_over: tuple[Mapping[str, str], ...] = ()  # as in `kinds.node_lines`
    spares: bool = False  # whether nodes beyond those needed may take the place of bad ones
    slurm: Mapping[str, Any] | None = None
    named: bool = True  # False: Slurm chooses the nodes
    one_allocation: bool = False
    job_array: bool = False


def build(request: Request, nodes: tuple[Node, ...]) -> Plan:
    """The plan of `request` on `nodes` (chosen and in inventory order).

    Raises UsageError when there are too few nodes or a batch does not divide.
    """
    most = max(request.node_counts)
    if most > len(nodes):
        raise UsageError(f"{most} nodes asked for: the inventory {request.inventory} has {len(nodes)} to choose from")
    if request.backend == "slurm" and request.engine in engines.HEADED:
        raise UsageError(
            f"engine {request.engine} reaches nodes over ssh, backend slurm does not: use --engine torchrun: it runs "
            "every test, DeepSpeed's too"
        )
    if reason := engines.obstacle(request.engine, nodes[:most]):
        raise UsageError(reason)
    cells = []
    for test, params in request.tests.items():
        for num_nodes in request.node_counts:
            for repeat in range(1, request.repeats + 1):
                cells.append(_cell(request, nodes[:num_nodes], test, params, repeat))
    return Plan(
        run_id=request.run_id,
        created=request.created,
        command=request.command,
        run_dir=request.run_dir,
        inventory=request.inventory,
        backend=request.backend,
        engine=request.engine,
        scaling=request.scaling,
        seed=request.seed,
        weights=request.weights,
        nodes=nodes[:most] if request.named else nodes,
        hardware=request.hardware,
        models={request.model["name"]: request.model} if "sft" in request.tests else {},
        targets=request.targets,
        cells=tuple(cells),
        passed_over=request.passed_over,
        spares=nodes[most:] if request.spares and request.named else (),
        slurm=request.slurm,
        named=request.named,
        one_allocation=request.one_allocation,
        job_array=request.job_array,
    )


def _cell(request: Request, nodes: tuple[Node, ...], test: str, params: Mapping[str, Any], repeat: int) -> Cell:
    num_nodes = len(nodes)
    world_size = num_nodes * request.gpus_per_node
    model = request.model["name"] if test == "sft" else None
    parts = [test, *([_UNSAFE.sub("_", model)] if model else []), f"{num_nodes}n", f"r{repeat}"]
    cell_id = "-".join(parts)
    port = PORTS[zlib.crc32(f"{request.run_id}/{cell_id}".encode()) % len(PORTS)]
    batch, deepspeed = None, None
    if test == "sft":
        params = {**params, "seq_len": params["seq_len"] or request.model["seq_len"]}
        if params["seq_len"] > request.model["max_seq_len"]:
            raise UsageError(
                f"sft.seq_len {params['seq_len']}: model {model} takes at most {request.model['max_seq_len']} tokens"
            )
        batch = _batch(request, params, num_nodes, world_size)
        deepspeed = _deepspeed(request.deepspeed, batch)
    elif params.get("max_bytes") is None:
        params = {**params, "max_bytes": (8 << 30) if request.device == "cuda" else (1 << 20)}
    cell = Cell(
        id=cell_id,
        test=test,
        model=model,
        num_nodes=num_nodes,
        repeat=repeat,
        hosts=(),
        gpus_per_node=request.gpus_per_node,
        world_size=world_size,
        device=request.device,
        params=params,
        batch=batch,
        deepspeed=deepspeed,
        env=CELL_ENV,
        cell_dir="",
        master_port=port,
        launch=engines.Launch(argv=()),
    )
    placed = place(cell, nodes, request, request.ssh_config)
    return placed if request.named else replace(placed, hosts=())


def place(cell: Cell, nodes: Sequence[Node], where: Request | Plan, ssh_config: str | None) -> Cell:
    """`cell` on `nodes`, with all that depends on them. Under Slurm the agents ask the engine, once they are placed."""
    hosts = tuple(node.name for node in nodes)
    first = nodes[0]
    if where.backend == "slurm":
        shared = (where.slurm or {}).get("shared", True)
        cell_dir = PurePath(where.run_dir, "nodes") if shared else PurePath(first.scratch, where.run_id, cell.id)
        return replace(cell, hosts=hosts, cell_dir=str(cell_dir))
    local = where.backend == "local"
    base = PurePath(where.run_dir, "nodes", first.name) if local else PurePath(first.scratch, where.run_id)
    ranks = engines.Ranks(
        nodes=tuple(nodes),
        gpus_per_node=cell.gpus_per_node,
        master_address="127.0.0.1" if local else first.address,
        master_port=cell.master_port,
        cell_dir=str(base / cell.id),
        launcher_dir=str(PurePath(where.run_dir, "launcher", cell.id)),
        ssh_config=ssh_config,
        marker=f"{where.run_id}/{cell.id}",
    )
    return replace(cell, hosts=hosts, cell_dir=ranks.cell_dir, launch=engines.ENGINES[where.engine](ranks))


def fingerprint(plan: Plan, cell: Cell) -> str:
    """A hash of all that defines what this cell measures; where it runs and when are not part of it."""
    measured = {
        "test": cell.test,
        "model": plan.models.get(cell.model) if cell.model else None,
        "weights": plan.weights,
        "engine": plan.engine,
        "scaling": plan.scaling,
        "seed": plan.seed,
        **{
            name: getattr(cell, name)
            for name in ("num_nodes", "gpus_per_node", "repeat", "device", "params", "deepspeed", "env")
        },
    }
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]


def _batch(request: Request, params: Mapping[str, Any], num_nodes: int, world_size: int) -> Batch:
    """The batch of one cell.

    Weak scaling keeps the work per GPU: the configured global batch is that of the sweep's largest
    node count and shrinks with the nodes. Strong scaling keeps the global batch.
    """
    configured = request.deepspeed
    global_batch = params["global_batch"] or _number(configured, "train_batch_size")
    micro_batch = params["micro_batch"] or _number(configured, "train_micro_batch_size_per_gpu")
    accumulation = params["gradient_accumulation"] or _number(configured, "gradient_accumulation_steps") or 1
    most = max(request.node_counts)
    if global_batch and request.scaling == "weak" and num_nodes != most:
        if global_batch * num_nodes % most:
            raise UsageError(
                f"weak scaling to {num_nodes} of {most} nodes: a global batch of {global_batch} does not divide; "
                f"use a multiple of {most}, such as --set sft.global_batch={_nearest_multiple(global_batch, most)}"
            )
        global_batch = global_batch * num_nodes // most
    return resolve_batch(global_batch, micro_batch, accumulation, world_size)


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None or value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f'DeepSpeed configuration: {key} = {value!r} is neither a whole number above 0 nor "auto"')
    return value


def resolve_batch(global_batch: int | None, micro_batch: int | None, accumulation: int, world_size: int) -> Batch:
    """The batch sizes that satisfy micro × accumulation × world = global, or the nearest that would."""
    if global_batch is None:
        micro_batch = micro_batch or 1
        return Batch(micro_batch * accumulation * world_size, micro_batch, accumulation)
    if micro_batch is None and global_batch % (accumulation * world_size) == 0:
        return Batch(global_batch, global_batch // (accumulation * world_size), accumulation)
    if micro_batch and micro_batch * accumulation * world_size == global_batch:
        return Batch(global_batch, micro_batch, accumulation)
    step = (micro_batch or 1) * world_size
    options = []
    if global_batch % step == 0:
        whole = global_batch // step  # accumulation × micro-batch, or accumulation alone where that is given
        near = whole if micro_batch else min(_divisors(whole), key=lambda n: (abs(n - accumulation), -n))
        options.append(f"sft.gradient_accumulation={near}")
    product = step * accumulation
    options.append(f"sft.global_batch={product if micro_batch else _nearest_multiple(global_batch, product)}")
    micro = micro_batch or "a whole micro-batch"
    raise UsageError(
        f"global batch {global_batch} is not {micro} × accumulation {accumulation} × {world_size} GPUs; "
        f"nearest that work: {' or '.join(f'--set {option}' for option in options)}"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest_multiple(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def _deepspeed(config: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """The DeepSpeed configuration with the batch filled in."""
    return {
        **config,
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.gradient_accumulation,
    }


def environment(cell: Cell, node: Node) -> dict[str, str]:
    """What the ranks of a cell get on this node: NICs and the like may be named differently on each."""
    return {**cell.env, **node.env}


def job(plan: Plan, cell: Cell, node: Node, data: str | None) -> dict[str, Any]:
    """`job.json` of a cell on a node: what its ranks read (runner.workloads.Job)."""
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
        "weights": plan.weights if cell.test == "sft" else None,
        "deepspeed": dict(cell.deepspeed) if cell.deepspeed else None,
        "data": data,
        "hardware": dict(plan.hardware),
        "env": environment(cell, node),
    }


def describe(plan: Plan, fold: Any) -> str:
    """The plan for a person: cells, hosts, the exact command of each node, and what would be written.

    `fold` turns a list of host names into a folded set.
    """
    lines = [f"run {plan.run_id}: {len(plan.cells)} cells, backend {plan.backend}, engine {plan.engine}"]
    lines.append(f"  writes {plan.run_dir}, and on the nodes {', '.join(sorted({n.scratch for n in plan.nodes}))}")
    lines += [f"passed over {line}" for line in failures.node_lines(plan.passed_over)]
    aliases = {node.name: node.alias for node in plan.nodes}
    for cell in plan.cells:
        lines += [
            "",
            f"cell {cell.id}: {cell.world_size} ranks ({cell.num_nodes} × {cell.gpus_per_node}, {cell.device})",
        ]
        hosts = f"{fold([aliases[h] for h in cell.hosts])} = {fold(cell.hosts)}" if cell.hosts else "placed by Slurm"
        lines.append(f"  hosts  {hosts}")
        if cell.batch:
            b = cell.batch
            lines.append(
                f"  batch  {b.global_batch} sequences = {b.micro_batch} × {b.gradient_accumulation} × {cell.world_size}"
                f" of {cell.params['seq_len']} tokens"
            )
            lines.append(f"  data   {cell.params['dataset']}, prepared once and sent to each node once")
        chosen = set(cell.hosts or aliases)
        on_node = {n.name: environment(cell, n) for n in plan.nodes if n.name in chosen}
        for key in dict.fromkeys(key for env in on_node.values() for key in env):
            by_value: dict[str | None, list[str]] = {}
            for name, env in on_node.items():
                by_value.setdefault(env.get(key), []).append(aliases[name])
            for value, names in by_value.items():
                where = "" if len(by_value) == 1 else f" on {fold(names)}"
                lines.append(f"  env    {key}={value}{where}" if value is not None else f"  env    no {key}{where}")
        if cell.launch.head:
            extra = [f"{k}={v}" for k, v in cell.launch.head_env.items()]
            lines.append(f"  controller runs  {shlex.join([*extra, *cell.launch.head])}")
            for name, content in cell.launch.files.items():
                lines += [f"  {name}:", *(f"    {line}" for line in content.splitlines())]
        for host, argv in zip(cell.hosts, cell.launch.argv, strict=False):  # under Slurm the agents ask the engine
            lines.append(f"  {aliases[host]}  {shlex.join(argv) if argv else '(ranks started by the controller)'}")
        lines.append(f"  writes {cell.cell_dir} on each node")
    return "\n".join(lines)
