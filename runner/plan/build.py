"""From a request to a plan: its cells, the nodes of each, and the commands that start it. Pure."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import PurePath
from typing import Any, get_args

from runner.cluster import nccl, slurm
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.errors import UsageError
from runner.plan import fit, tuned
from runner.plan.batch import batch_of, with_batch
from runner.plan.engines.ranks import PORTS, Launch, Ranks
from runner.plan.engines.registry import ENGINES, obstacle
from runner.plan.plan import CELL_ENV, Cell, Plan
from runner.plan.request import Request
from runner.results.celldir import LAUNCHER
from runner.system.process import cell_marker
from runner.system.wording import counted
from runner.workloads.registry import TESTS

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def engine_of(test: str, backend: str, chosen: str) -> str:
    """The engine that starts the ranks of `test` over `backend`; `chosen` is the one for torch's programs."""
    return BACKENDS[backend].mpi if TESTS[test].mpi else TESTS[test].engine or chosen


def build(request: Request, nodes: tuple[Node, ...]) -> Plan:
    """The plan of `request` on `nodes`, which are those to choose from, in inventory order.

    Raises UsageError when there are too few nodes, the engine cannot run on them or over this backend, a batch does
    not divide, a sequence is longer than the model allows, or a model does not fit into the GPUs' memory.
    """
    most = max(request.node_counts)
    if most > len(nodes):
        raise UsageError(
            f"{counted(most, 'node')} asked for: the inventory {request.inventory} has {len(nodes)} to choose from"
        )
    for engine in dict.fromkeys(engine_of(name, request.backend, request.engine) for name in request.test_names):
        _refuse_engine(engine, request, nodes[:most])
    if request.chain and request.job_array:
        raise UsageError("tasks of an array do not wait for each other, and the cells of a chain do: omit --job-array")
    request = _split(request)
    cells = _chain(request, nodes[:most]) if request.chain else _measurements(request, nodes[:most])
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
        models={request.model["name"]: request.model} if any(TESTS[name].model for name in request.test_names) else {},
        targets=request.targets,
        cells=tuple(cells),
        passed_over=request.passed_over,
        spares=nodes[most:] if request.spares and request.named else (),
        slurm=request.slurm,
        named=request.named,
        one_allocation=request.one_allocation,
        job_array=request.job_array,
        nccl=request.nccl,
        nccl_root=request.nccl_root,
        tuned=request.tuned,
        shared=request.shared,
    )


def _measurements(request: Request, nodes: tuple[Node, ...]) -> list[Cell]:
    """The cells of the tests of `request` on the first of `nodes`, for each node count."""
    cells = []
    shape = fit.shape_of(nodes, request.gpus_per_node)
    for name, given in request.tests.items():
        params = _params(request, name, given, nodes[0])
        _refuse_settings(request, name, params)
        settled, chosen = fit.settle(request, params, shape) if TESTS[name].trains else (params, "")
        for num_nodes in request.node_counts:
            variants = TESTS[name].cells(settled, num_nodes, request.gpus_per_node)
            for repeat, (suffix, own) in product(range(1, request.repeats + 1), variants.items()):
                cell = _cell(request, nodes[:num_nodes], name, suffix, own, repeat)
                if cell.batch is not None:
                    fit.refuse(request, params, own, shape, num_nodes, cell.batch)
                    expected = fit.expect(request, own, shape, num_nodes, cell.batch)
                    how = "; ".join(text for text in (tuned.chosen(request), chosen) if text)
                    cell = replace(cell, chosen=how, expected=expected)
                cells.append(cell)
    return cells


def _chain(request: Request, nodes: tuple[Node, ...]) -> list[Cell]:
    """The cells of the chain of `request`, each after the one before it, on `nodes` or the first of them."""
    cells: list[Cell] = []
    for link in request.chain:
        params = _params(request, link.test, link.params, nodes[0])
        here = nodes[:1] if TESTS[link.test].runs == "one" else nodes
        cell = replace(_cell(request, here, link.test, "", params, 1, link.name), inputs=link.inputs)
        cells.append(replace(cell, after=cells[-1].id if cells else None))
    return cells


def _refuse_engine(engine: str, request: Request, nodes: Sequence[Node]) -> None:
    """Refuse an engine that cannot start ranks on `nodes` over this backend, and ways to nodes that the controller has,
    and other nodes or the engine's launcher have not.
    """
    if BACKENDS[request.backend].scheduled and ENGINES[engine].headed:
        raise UsageError(
            f"engine {engine} reaches nodes over ssh, backend {request.backend} does not: {ENGINES[engine].instead}"
        )
    if reason := obstacle(engine, nodes):
        raise UsageError(reason)
    if not BACKENDS[request.backend].by_ssh:
        return
    for node in nodes:
        if "%" in node.address and len(nodes) > 1:
            raise UsageError(
                f"{node.name}: ansible_host {node.address} has a zone, an interface of this machine: give an address "
                "by which the other nodes reach it as well"
            )
        if node.become and ENGINES[engine].headed:
            raise UsageError(
                f"{node.name}: ansible_become: engine {engine} starts ranks as the user that logs in: "
                f"log in as that user (ansible_user), or {ENGINES[engine].instead}"
            )


def _split(request: Request) -> Request:
    """`request` with the tensor parallelism of its settings in the DeepSpeed configuration, where it takes effect."""
    for name, params in request.tests.items():
        if TESTS[name].trains and params.get("tensor_parallel", 1) > 1:
            parts = params["tensor_parallel"]
            request = replace(request, deepspeed=TESTS[name].load_refusals().with_split(request.deepspeed, parts))
    return request


def _refuse_settings(request: Request, name: str, params: Mapping[str, Any]) -> None:
    if TESTS[name].trains:
        for num_nodes in request.node_counts:
            TESTS[name].load_refusals().refuse(
                params,
                request.model,
                request.deepspeed,
                device=request.device,
                gpus_per_node=request.gpus_per_node,
                world_size=num_nodes * request.gpus_per_node,
            )


def _params(request: Request, name: str, params: Mapping[str, Any], first: Node) -> Mapping[str, Any]:
    """The settings of a test with the defaults of the device, the model and the nodes; `first` is any of these."""
    test = TESTS[name]
    defaults = test.defaults.get(request.device, {})
    params = {**params, **{key: value for key, value in defaults.items() if params.get(key) is None}}
    if test.command and not params["root"]:
        params = {**params, "root": first.nccl_root}
    for key, values in test.gpu_only.items():
        if request.device != "cuda" and params.get(key) in values:
            known = get_args(test.load_settings().model_fields[key].annotation)
            works = [value for value in known if value not in values]
            raise UsageError(
                f"{name}.{key}={params[key]} needs a GPU; on the CPUs of these nodes take {' or '.join(works)}"
            )
    if not test.trains:
        return params
    params = {**params, "seq_len": params["seq_len"] or request.model["seq_len"]}
    if params["seq_len"] > request.model["max_seq_len"]:
        raise UsageError(
            f"{name}.seq_len {params['seq_len']}: model {request.model['name']} takes at most "
            f"{request.model['max_seq_len']} tokens"
        )
    return params


def _cell(
    request: Request,
    nodes: tuple[Node, ...],
    name: str,
    suffix: str,
    params: Mapping[str, Any],
    repeat: int,
    cell_id: str | None = None,
) -> Cell:
    """One cell of the test `name`; `suffix` tells it from the test's others, as `Variants` names them. `cell_id`: its
    id, None where test, model, nodes and repeat make it.
    """
    test, num_nodes = TESTS[name], len(nodes)
    gpus_per_node = 1 if test.runs == "one" else request.gpus_per_node
    world_size = num_nodes * gpus_per_node if test.runs == "ranks" else 1
    model = request.model["name"] if test.model else None
    parts = [name, suffix, _UNSAFE.sub("_", model) if model else "", f"{num_nodes}n", f"r{repeat}"]
    engine = engine_of(name, request.backend, request.engine)
    cell_id = cell_id or "-".join(part for part in parts if part)
    port = PORTS[zlib.crc32(f"{request.run_id}/{cell_id}".encode()) % len(PORTS)]
    batch = batch_of(request, params, num_nodes, world_size) if test.trains else None
    cell = Cell(
        id=cell_id,
        test=name,
        model=model,
        num_nodes=num_nodes,
        repeat=repeat,
        hosts=(),
        gpus_per_node=gpus_per_node,
        world_size=world_size,
        device=request.device,
        params=params,
        batch=batch,
        deepspeed=with_batch(request.deepspeed, batch) if batch else None,
        env={**CELL_ENV, **test.environment.get(request.device, {}), **_nccl_env(request), **_mpi_env(engine, nodes)},
        cell_dir="",
        master_port=port,
        launch=Launch(argv=()),
        engine=engine,
        profile=request.profile,
    )
    placed = place(cell, nodes, request, request.ssh_config)
    return placed if request.named else replace(placed, hosts=())


# Bridges of containers and virtual machines have the same address on every node; Open MPI would try to meet there.
_INTERFACES = {"OMPI_MCA_btl_tcp_if_exclude": "127.0.0.1/8,sppp,docker0,virbr0"}
_OWN_INTERFACES = "OMPI_MCA_btl_tcp_if_include"  # which Open MPI refuses beside the other


def _mpi_env(engine: str, nodes: Sequence[Node]) -> dict[str, str]:
    """The variables of MPI programs that `engine` starts, where the inventory does not name their interfaces itself."""
    return _INTERFACES if ENGINES[engine].mpi and not any(_OWN_INTERFACES in node.env for node in nodes) else {}


def _nccl_env(where: Request | Plan) -> dict[str, str]:
    return nccl.environment(where.nccl_root) if where.nccl_root else {}


def place(cell: Cell, nodes: Sequence[Node], where: Request | Plan, ssh_config: str | None) -> Cell:
    """A copy of `cell` with its hosts, folder and commands set for `nodes`.

    `where` gives run id, run directory and backend; `ssh_config` is the path of the OpenSSH configuration that
    reaches the nodes, None on this machine. Under Slurm there are no commands yet: the agents get them from the engine
    once Slurm has placed the job.
    """
    hosts = tuple(node.name for node in nodes)
    first = nodes[0]
    if BACKENDS[where.backend].scheduled:
        shared = slurm.Settings(**(where.slurm or {})).sees_files
        cell_dir = PurePath(where.run_dir, "nodes") if shared else PurePath(first.scratch, where.run_id, cell.id)
        return replace(cell, hosts=hosts, cell_dir=str(cell_dir))
    local = not BACKENDS[where.backend].remote
    base = PurePath(where.run_dir, "nodes", first.name) if local else PurePath(first.scratch, where.run_id)
    ranks = Ranks(
        nodes=tuple(node.of_profile(cell.profile) for node in nodes),
        gpus_per_node=cell.gpus_per_node,
        master_address="127.0.0.1" if local else first.address,
        master_port=cell.master_port,
        cell_dir=str(base / cell.id),
        launcher_dir=str(PurePath(where.run_dir, LAUNCHER, cell.id)),
        ssh_config=ssh_config,
        marker=cell_marker(where.run_id, cell.id),
        env=_nccl_env(where),
        launcher=cell.params.get("python", ""),
    )
    return replace(cell, hosts=hosts, cell_dir=ranks.cell_dir, launch=ENGINES[cell.engine].launch(ranks))
