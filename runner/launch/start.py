"""A run from what the user asked for to its report: `prepare` checks and plans, `start` carries out.

`prepare` contacts no node. What it returns holds the plan that a dry run shows and that `start` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner import failures
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Inventory, Node, select
from runner.cluster.ssh import rendered
from runner.errors import UsageError, unknown
from runner.launch import carry, preflight
from runner.launch.carry import Ended, Means, new_id
from runner.launch.run import Policy
from runner.plan import build, config
from runner.plan.engines.registry import ENGINES
from runner.plan.plan import Plan
from runner.plan.request import Request
from runner.report.progress import Display
from runner.system.clock import now
from runner.workloads.registry import TESTS

SCALING = ("weak", "strong")
# What all chosen nodes must agree on: the node's field and the inventory's variable.
RESOURCES = (
    ("gpus", "runner_gpus_per_node"),
    ("device", "runner_device"),
    ("hardware", "runner_hardware"),
    ("scratch", "runner_scratch"),
    ("min_free_disk_gib", "runner_min_free_disk_gib"),
)


@dataclass(frozen=True)
class Asked:
    """What a user asks of `runner bench`; `prepare` checks it.

    `inventory` is a path, or None for Ansible's default. Empty `node_counts` mean all nodes that are chosen, empty
    `tests` all tests, and a `backend` of None what the inventory says. `settings` are `TEST.KEY=VALUE`. `command` is
    the command line as text, for plan.json and the report.
    """

    results: Path
    command: str
    inventory: str | None = None
    node_counts: tuple[int, ...] = ()
    hosts: str | None = None
    skip_bad_nodes: bool = False
    model: str = "tiny"
    weights: str | None = None
    tests: tuple[str, ...] = ()
    engine: str = "torchrun"
    backend: str | None = None
    scaling: str = "weak"
    retries: int = 0
    replace_bad_nodes: bool = False
    one_allocation: bool = False
    job_array: bool = False
    repeats: int = 1
    seed: int = 0
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A request that was checked: the planner's input, and the nodes that may be chosen among.

    `plan` is the plan on the first of these nodes, before any of them was contacted.
    """

    asked: Asked
    inventory: Inventory
    nodes: tuple[Node, ...]
    request: Request
    plan: Plan


@dataclass(frozen=True)
class Chosen:
    """The nodes of a run, its spares, what was passed over and why, and how nodes are asked and reached."""

    reach: preflight.Reach
    nodes: tuple[Node, ...]
    spares: tuple[Node, ...] = ()
    passed_over: tuple[Mapping[str, str], ...] = ()


# --- what is known without a node ---------------------------------------------------------------------


def prepare(asked: Asked, read: Callable[[str | None], Inventory], make_id: Callable[[], str] = new_id) -> Prepared:
    """Check every name and value, and plan; no node is contacted.

    `read` gives the inventory at a path. Raises UsageError for whatever cannot be planned.
    """
    tests, overrides = _checked(asked)
    loaded = {name: config.load_test(name, overrides.get(name, {})).model_dump() for name in tests}
    architecture = config.load_model(asked.model).model_dump()
    deepspeed = config.load_deepspeed(architecture["deepspeed"], overrides.get("deepspeed", {}))
    slurm_only = [f for f, on in (("--one-allocation", asked.one_allocation), ("--job-array", asked.job_array)) if on]
    if len(slurm_only) > 1:
        raise UsageError(f"{' and '.join(slurm_only)} exclude each other: give one of them")

    inventory = read(asked.inventory)
    nodes = select(inventory, asked.hosts)
    counts = asked.node_counts or (len(nodes),)
    nodes, slurm = _over(asked.backend, nodes, inventory, overrides, slurm_only)
    _refuse_too_few(asked, inventory, nodes, counts)
    gpus_per_node, device, hardware = _resources(nodes)
    run_id = make_id()
    request = Request(
        run_id=run_id,
        created=now(),
        command=asked.command,
        inventory=inventory.source,
        run_dir=_run_dir(asked, run_id),
        tests=loaded,
        model=architecture,
        deepspeed=deepspeed,
        deepspeed_files=config.deepspeed_files(overrides.get("deepspeed", {})),
        hardware={"name": hardware, **config.load_hardware(hardware).model_dump()},
        targets=config.load_targets(),
        node_counts=counts,
        engine=asked.engine,
        backend=nodes[0].backend,
        scaling=asked.scaling,
        repeats=asked.repeats,
        gpus_per_node=gpus_per_node,
        device=device,
        ssh_config="SSH_CONFIG" if BACKENDS[nodes[0].backend].remote else None,  # of the real one only a place is known
        weights=asked.weights,
        seed=asked.seed,
        spares=asked.replace_bad_nodes,
        slurm=slurm,
        named=slurm is None or asked.hosts is not None,
        one_allocation=asked.one_allocation,
        job_array=asked.job_array,
    )
    return Prepared(asked, inventory, nodes, request, build.build(request, nodes))


def _run_dir(asked: Asked, run_id: str) -> str:
    return str((asked.results / run_id).absolute())


def _checked(asked: Asked) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """The names of the tests and the settings that were given; raises UsageError for a name that is none."""
    if asked.engine not in ENGINES:
        raise unknown("engine", asked.engine, ENGINES)
    if asked.backend is not None and asked.backend not in BACKENDS:
        raise unknown("backend", asked.backend, BACKENDS)
    if asked.scaling not in SCALING:
        raise unknown("scaling", asked.scaling, SCALING)
    overrides = config.parse_settings(asked.settings)
    for name in overrides.keys() - {"deepspeed", "slurm"}:  # a mistake in a test that is not run is one, too
        config.load_test(name, overrides[name])
    return tuple(dict.fromkeys(asked.tests)) or tuple(TESTS), overrides


def _over(
    backend: str | None,
    nodes: tuple[Node, ...],
    inventory: Inventory,
    overrides: dict[str, dict[str, Any]],
    slurm_only: Sequence[str],
) -> tuple[tuple[Node, ...], dict[str, Any] | None]:
    """The nodes as `backend` reaches them, and Slurm's settings where it is Slurm, for which `slurm_only` was given."""
    wanted = backend or nodes[0].backend
    if wanted not in (nodes[0].backend, *BACKENDS[nodes[0].backend].also):
        raise UsageError(
            f"--backend {wanted}: the inventory {inventory.source} describes nodes for backend {nodes[0].backend}"
        )
    if not BACKENDS[wanted].scheduled:
        if what := [*slurm_only, *(["--set slurm.…"] if "slurm" in overrides else [])]:
            raise UsageError(f"{what[0]} goes with --backend slurm, this run's backend is {wanted}")
        return nodes, None
    from runner.cluster import slurm as slurm_settings

    settings = slurm_settings.settings(
        {**inventory.slurm, **overrides.get("slurm", {})}, f"slurm of {inventory.source}"
    )
    return tuple(replace(node, backend=wanted) for node in nodes), settings.model_dump()


def _refuse_too_few(asked: Asked, inventory: Inventory, nodes: Sequence[Node], counts: Sequence[int]) -> None:
    if max(counts) > len(nodes):
        limit = (
            f"--hosts {asked.hosts} names {len(nodes)}"
            if asked.hosts
            else f"the inventory {inventory.source} has {len(nodes)}"
        )
        raise UsageError(f"{max(counts)} nodes asked for: {limit}")


def _resources(nodes: tuple[Node, ...]) -> tuple[int, str, str]:
    """Ranks per node, device and hardware name: one value each for the chosen nodes."""
    first = nodes[0]
    for field, variable in RESOURCES:
        odd = [n.alias for n in nodes if getattr(n, field) != getattr(first, field)]
        if odd:
            raise UsageError(f"{variable} differs between {first.alias} and {odd[0]}: choose alike nodes with --hosts")
    if not BACKENDS[first.backend].remote:
        return _observed(first, first.device)
    if first.gpus is None or first.device == "auto":
        raise UsageError(f"{first.name}: set runner_gpus_per_node and runner_device in the inventory")
    return first.gpus, first.device, first.hardware


def _observed(node: Node, device: str) -> tuple[int, str, str]:
    """GPUs per node, device and hardware of this machine where the inventory says `auto`."""
    from runner.node import sampler

    names = sampler.gpu_names()
    if device == "auto":
        device = "cuda" if names else "cpu"
    hardware = node.hardware
    if device == "cuda" and hardware == "cpu":  # the inventory left it open
        hardware = "h200-sxm" if names and "H200" in names[0] and "NVL" not in names[0] else "unknown"
    return node.gpus or (len(names) if device == "cuda" else 2), device, hardware


# --- carried out --------------------------------------------------------------------------------------


def start(prepared: Prepared, display: Display, means: Means | None = None) -> Ended:
    """Choose nodes, and carry the plan out on them, to the report.

    Until the plan is accepted (nodes chosen and free, nothing refused) nothing is written, and the error says why. From
    then on there is a run directory, which says how the run ended whatever ended it.

    Raises InfrastructureError naming every bad node, UsageError for what can never run, Interrupted on a signal.
    """
    means = means or Means()
    asked = prepared.asked
    with ExitStack() as stack:
        with carry.unbegun():
            remote = BACKENDS[prepared.request.backend].remote
            ssh_config = stack.enter_context(rendered(prepared.inventory) if remote else nullcontext())
            chosen = _choose(prepared, ssh_config, display, means)

            def made(run_id: str) -> Plan:
                request = replace(
                    prepared.request,
                    run_id=run_id,
                    run_dir=_run_dir(asked, run_id),
                    ssh_config=ssh_config,
                    passed_over=chosen.passed_over,
                )
                return build.build(request, (*chosen.nodes, *chosen.spares))

            _refuse(made(prepared.request.run_id), chosen, means)
        plan, run = stack.enter_context(carry.begun(made, prepared.request.run_id, means))
        data = means.data(plan, plan.cells, display)
        transport = chosen.reach.transport(run, chosen.nodes[0], {})
        policy = Policy(asked.retries, asked.replace_bad_nodes)
        return Ended(run, carry.carry_out(plan, run, transport, display, data, policy, chosen.reach, {}))


def _choose(prepared: Prepared, ssh_config: str | None, display: Display, means: Means) -> Chosen:
    """Ask the nodes, and take the good ones; under Slurm all of them, where it is to choose.

    Raises InfrastructureError naming every bad node where too few are good.
    """
    asked, request, nodes = prepared.asked, prepared.request, prepared.nodes
    cluster = carry.cluster(request.slurm, prepared.inventory, ssh_config)
    tests = tuple(request.tests)
    reach = means.reach(request.backend, request.device, request.engine, tests, ssh_config, cluster)
    if not request.named:  # Slurm chooses
        return Chosen(reach, nodes)
    skip, count = asked.skip_bad_nodes or asked.replace_bad_nodes, max(request.node_counts)
    candidates = nodes if skip else nodes[:count]
    display.note(f"checking {preflight.folded(candidates)}")
    problems = reach.ask(candidates).problems
    good, passed_over = preflight.choose(nodes, count, problems, skip)
    for line in failures.node_lines(passed_over):
        display.note(f"passed over {line}")
    spares = tuple(node for node in nodes if node not in good and node.name not in problems)
    return Chosen(reach, good, spares if asked.replace_bad_nodes else (), passed_over)


def _refuse(plan: Plan, chosen: Chosen, means: Means) -> None:
    """Raise for what could never start."""
    carry.require_launcher(plan)
    chosen.reach.transport(means.folder(Path(plan.run_dir)), chosen.nodes[0], {}).refuse(plan, plan.cells)
