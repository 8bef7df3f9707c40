"""What a user asks of a run, checked and planned: no node is contacted, and a dry run shows the plan."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.cluster import nccl
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Inventory, Node, select
from runner.errors import UsageError, unknown
from runner.launch import tuned
from runner.launch.carry import new_id
from runner.plan import build, config
from runner.plan import tuned as tuning
from runner.plan.engines.registry import offered
from runner.plan.plan import Plan
from runner.plan.request import Request
from runner.system.clock import now
from runner.system.places import state_dir
from runner.system.schema import check
from runner.system.wording import counted
from runner.workloads import architecture, deepspeed_config, weights
from runner.workloads.registry import TESTS, trains, usual

SCALING = ("weak", "strong")


# What all chosen nodes must agree on: the node's field and the inventory's variable.
RESOURCES = (
    ("gpus", "runner_gpus_per_node"),
    ("device", "runner_device"),
    ("hardware", "runner_hardware"),
    ("scratch", "runner_scratch"),
    ("shared", "runner_shared"),
    ("modules", "runner_modules"),
    ("min_free_disk_gib", "runner_min_free_disk_gib"),
    ("nccl", "runner_nccl"),
    ("nccl_root", "nccl_build_root"),
)


@dataclass(frozen=True)
class Options:
    """The options of `runner bench`, not checked yet; `prepare` checks them.

    `inventory` is a path, or None for Ansible's default. Empty `node_counts` mean all nodes that are chosen, empty
    `tests` those that are not on request, and a `backend` of None what the inventory says. `settings` are
    `TEST.KEY=VALUE` or `nccl=VALUE`. `command` is the command line as text, for plan.json and the report.
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
class Selected:
    """The nodes to choose among, in the inventory's order, and what they have in common; none was contacted.

    `counts` are the numbers of nodes to run on, `gpus` is the number of ranks of a node, and `slurm` are Slurm's
    settings (None: the run does not use it).
    """

    inventory: Inventory
    nodes: tuple[Node, ...]
    counts: tuple[int, ...]
    gpus: int
    device: str
    hardware: str
    slurm: Mapping[str, Any] | None


@dataclass(frozen=True)
class Prepared:
    """Checked options: the planner's input, and the nodes to choose among.

    `plan` is the plan on the first of these nodes, before any of them was contacted, `untuned` the request without what
    `runner tune` found (`tuned`), and `notes` are lines for the user about that. `located` puts in what of a request
    depends on the run's directory: it is called once that is known.
    """

    options: Options
    inventory: Inventory
    nodes: tuple[Node, ...]
    request: Request
    plan: Plan
    untuned: Request
    tuned: tuned.Asked
    notes: tuple[str, ...] = ()
    located: Callable[[Request], Request] = lambda request: request

    @property
    def weights_on_nodes(self) -> str | None:
        """The folder that nodes must have, if the run loads weights from a path that means the same there."""
        given = self.options.weights
        training = any(trains(cell.test) for cell in self.plan.cells)
        return given if given and training and Path(given).is_absolute() else None


def prepare(options: Options, read: Callable[[str | None], Inventory], make_id: Callable[[], str] = new_id) -> Prepared:
    """Check every name and value, and plan; no node is contacted.

    `read` returns the inventory at a path. Raises UsageError for options that cannot be planned.
    """
    tests, overrides = _checked(options)
    loaded = {name: config.load_test(name, overrides.get(name, {})).model_dump() for name in tests}
    model = config.load_model(options.model).model_dump()
    deepspeed = config.load_deepspeed(model["deepspeed"], overrides.get("deepspeed", {}))
    found = selected(options, read, overrides)
    nodes = found.nodes
    wanted = overrides[config.RUN].get("nccl", nodes[0].nccl)
    request = replace(
        requested(options, found, model, deepspeed, make_id()),
        tests=loaded,
        deepspeed_files=config.deepspeed_files(overrides.get("deepspeed", {})),
        targets=config.load_targets(values=overrides.get(config.TARGETS)),
        nccl=wanted,
        nccl_root=nodes[0].nccl_root if wanted == nccl.BUILT else None,
    )
    asked = _asked_of_tuning(options, overrides, model["deepspeed"], request)
    settled = tuned.settle(request, nodes, asked, {})
    plan = settled.plan
    changes = ["--set deepspeed"] if overrides.get("deepspeed") else []
    if settled.request.deepspeed != deepspeed:
        changes.append("what runner tune found, which --set tuned=false leaves out")
    _judge_deepspeed(plan, model["deepspeed"], changes)
    if options.weights and any(trains(cell.test) for cell in plan.cells):
        _judge_weights(options.weights, model, remote=BACKENDS[request.backend].remote)
    return Prepared(options, found.inventory, nodes, settled.request, plan, request, asked, settled.notes)


def selected(
    options: Options, read: Callable[[str | None], Inventory], overrides: Mapping[str, Mapping[str, Any]]
) -> Selected:
    """The nodes that `options` choose among; `overrides` are the settings by section, of which `slurm` is used.

    `read` returns the inventory at a path. Raises UsageError for a backend or node that there is not, too few nodes,
    and nodes that are not alike.
    """
    if options.backend is not None and options.backend not in BACKENDS:
        raise unknown("backend", options.backend, BACKENDS)
    slurm_only = [
        f for f, on in (("--one-allocation", options.one_allocation), ("--job-array", options.job_array)) if on
    ]
    if len(slurm_only) > 1:
        raise UsageError(f"{' and '.join(slurm_only)} exclude each other: give one of them")
    inventory = read(options.inventory)
    nodes = select(inventory, options.hosts)
    counts = options.node_counts or (len(nodes),)
    nodes, slurm = _over(options.backend, nodes, inventory, overrides, slurm_only)
    _refuse_too_few(options, inventory, nodes, counts)
    return Selected(inventory, nodes, counts, *_resources(nodes), slurm)


def requested(
    options: Options, found: Selected, model: Mapping[str, Any], deepspeed: Mapping[str, Any], run_id: str
) -> Request:
    """A request on the nodes `found`, without tests yet. `model` and `deepspeed` are the contents of their files."""
    backend = found.nodes[0].backend
    return Request(
        run_id=run_id,
        created=now(),
        command=options.command,
        inventory=found.inventory.source,
        run_dir=run_dir(options, run_id),
        tests={},
        model=model,
        deepspeed=deepspeed,
        hardware={"name": found.hardware, **config.load_hardware(found.hardware).model_dump()},
        targets=config.load_targets(),
        node_counts=found.counts,
        engine=options.engine,
        backend=backend,
        scaling=options.scaling,
        repeats=options.repeats,
        gpus_per_node=found.gpus,
        device=found.device,
        ssh_config="SSH_CONFIG" if BACKENDS[backend].remote else None,  # a placeholder: there is no file yet
        weights=options.weights,
        seed=options.seed,
        spares=options.replace_bad_nodes,
        slurm=found.slurm,
        named=found.slurm is None or options.hosts is not None,
        one_allocation=options.one_allocation,
        job_array=options.job_array,
    )


def of_chain(
    options: Options,
    found: Selected,
    request: Request,
    located: Callable[[Request], Request],
    notes: tuple[str, ...] = (),
) -> Prepared:
    """The run of a chain of cells, of which nothing was tuned. `request` is one that `located` has been through.

    Raises UsageError for what cannot be planned.
    """
    return Prepared(
        options=options,
        inventory=found.inventory,
        nodes=found.nodes,
        request=request,
        plan=build.build(request, found.nodes),
        untuned=request,
        tuned=tuned.Asked(options.results, "", use=False),
        notes=notes,
        located=located,
    )


def _asked_of_tuning(
    options: Options, overrides: Mapping[str, Mapping[str, Any]], name: str, request: Request
) -> tuned.Asked:
    """Where results of tuning are, what holds a setting against them, and the command that makes them."""
    file = config.load_deepspeed(name, {})
    own = deepspeed_config.digest(file) not in deepspeed_config.SHIPPED
    defaults = config.load_test(tuning.SECTION, {}).model_dump()
    where = f"configs/deepspeed/{name}.json"
    holds = tuning.held(overrides, defaults, file, where, shipped=not own)
    words = ["runner", "tune"]
    if options.inventory is not None:
        words += ["-i", options.inventory]
    if options.results != Path("results"):
        words += ["--results", str(options.results)]
    words += ["--nodes", str(max(request.node_counts)), "--model", options.model]
    if options.hosts:
        words += ["--hosts", options.hosts]
    if options.backend:
        words += ["--backend", options.backend]
    for setting in options.settings:
        key = setting.partition("=")[0]
        of_training = key.startswith((f"{tuning.SECTION}.", f"{tuning.FILE}.", "slurm."))
        if of_training and (key not in tuning.TUNABLE or key == tuning.PRECISION):
            words += ["--set", setting]
    return tuned.Asked(options.results, shlex.join(words), holds, overrides[config.RUN].get("tuned", True))


def _judge_weights(given: str, model: Mapping[str, Any], remote: bool) -> None:
    """Raise UsageError for weights in a folder here that ranks could not load, or that are of another architecture.

    A folder that only nodes have is theirs to check, a name on the hub is the ranks'.
    """
    folder = Path(given)
    if not folder.exists() and (remote or not weights.is_path(given)):
        return
    if reason := weights.fault(folder):
        raise UsageError(f"--weights {given}: they {reason}", "weights_unusable")
    architecture.refuse(given, model)


def _judge_deepspeed(plan: Plan, name: str, changes: Sequence[str]) -> None:
    """Raise UsageError for a DeepSpeed configuration that DeepSpeed would refuse, or ignore in part.

    `changes` name what was applied to the file.
    """
    configs = [cell.deepspeed for cell in plan.cells if cell.deepspeed is not None]
    where = f"configs/deepspeed/{name}.json" + (f" with {' and '.join(changes)}" if changes else "")
    for config_ in configs[:1]:  # of one plan they differ in their batches only
        if left := list(deepspeed_config.unresolved(config_)):
            raise UsageError(f'{where}: {", ".join(left)} is still "auto": give a value')
        deepspeed_config.refuse(config_, where, state_dir() / "deepspeed")


def run_dir(options: Options, run_id: str) -> str:
    """Where the run of that name writes: an absolute path."""
    return str((options.results / run_id).absolute())


def _checked(options: Options) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """The names of the tests, and the settings by section; raises UsageError for an unknown name or value."""
    if options.engine not in offered():
        raise unknown("engine", options.engine, offered())
    if options.scaling not in SCALING:
        raise unknown("scaling", options.scaling, SCALING)
    overrides = config.parse_settings(options.settings)
    given = check(config.RunSettings, overrides.pop(config.RUN, {}), "--set").model_dump(exclude_unset=True)
    for name in overrides.keys() & TESTS.keys():  # an error in the settings of a test that is not run is an error, too
        config.load_test(name, overrides[name])
    overrides[config.RUN] = given
    return tuple(dict.fromkeys(options.tests)) or usual(), overrides


def _over(
    backend: str | None,
    nodes: tuple[Node, ...],
    inventory: Inventory,
    overrides: Mapping[str, Mapping[str, Any]],
    slurm_only: Sequence[str],
) -> tuple[tuple[Node, ...], dict[str, Any] | None]:
    """The nodes with their backend, and Slurm's settings if that is Slurm. `slurm_only`: given options that need it."""
    chosen = backend or nodes[0].backend
    if chosen not in (nodes[0].backend, *BACKENDS[nodes[0].backend].also):
        raise UsageError(
            f"--backend {chosen}: the inventory {inventory.source} describes nodes for backend {nodes[0].backend}"
        )
    if not BACKENDS[chosen].scheduled:
        if what := [*slurm_only, *(["--set slurm.…"] if "slurm" in overrides else [])]:
            raise UsageError(f"{what[0]} goes with --backend slurm, this run's backend is {chosen}")
        return nodes, None
    from runner.cluster import slurm as slurm_settings

    settings = slurm_settings.settings(
        {**inventory.slurm, **overrides.get("slurm", {})}, f"slurm of {inventory.source}"
    )
    return tuple(replace(node, backend=chosen) for node in nodes), settings.model_dump()


def _refuse_too_few(options: Options, inventory: Inventory, nodes: Sequence[Node], counts: Sequence[int]) -> None:
    if max(counts) > len(nodes):
        limit = (
            f"--hosts {options.hosts} names {len(nodes)}"
            if options.hosts
            else f"the inventory {inventory.source} has {len(nodes)}"
        )
        raise UsageError(f"{counted(max(counts), 'node')} asked for: {limit}")


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
    if device == "cuda" and hardware == "cpu":  # the inventory does not say
        hardware = config.hardware_of(names[0]) if names else "unknown"
    return node.gpus or (len(names) if device == "cuda" else 2), device, hardware
