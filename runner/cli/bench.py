"""`runner bench`: benchmark nodes, or finish a run."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from runner import errors
from runner.cli.options import inventory_option, read_inventory, results_option, run_names
from runner.cluster.backends import BACKENDS
from runner.cluster.ssh import rendered
from runner.system.places import CONFIGS, cache_dir, state_dir
from runner.workloads.registry import TESTS, trains

if TYPE_CHECKING:
    from runner.cluster.inventory import Inventory, Node


def _names(kind: str) -> Callable[..., list[str]]:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [p.stem for p in sorted((CONFIGS / kind).glob("*.yaml")) if p.stem.startswith(incomplete)]

    return complete


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


@click.command()
@inventory_option
@results_option
@click.option("--nodes", "num_nodes", type=click.IntRange(min=1), metavar="N", help="Run on N nodes; default: all.")
@click.option("--sweep", metavar="1,2,4,8", help="Run on each of these node counts: the scaling curve.")
@click.option("--hosts", metavar="SET", help="Choose among these nodes: names, aliases, node[003-006].")
@click.option("--skip-bad-nodes", is_flag=True, help="Take the first N good nodes and say which were passed over.")
@click.option(
    "--model", default="tiny", show_default=True, help="A model of configs/models.", shell_complete=_names("models")
)
@click.option("--weights", metavar="ID_OR_PATH", help="Start from these Hugging Face weights; default: random.")
@click.option(
    "--test",
    "tests",
    multiple=True,
    help="; ".join(f"{name}: {test.summary}" for name, test in TESTS.items()) + "; default: all.",
    shell_complete=_names("tests"),
)
@click.option("--engine", default="torchrun", show_default=True, help="torchrun or deepspeed.")
@click.option("--backend", help="local, ssh or slurm; default: what the inventory says.")
@click.option(
    "--scaling", default="weak", show_default=True, help="weak: same work per GPU; strong: same global batch."
)
@click.option(
    "--retries",
    default=0,
    show_default=True,
    type=click.IntRange(0, 100),
    metavar="K",
    help="Run a cell again, K times at most, after a failure of the infrastructure.",
)
@click.option("--replace-bad-nodes", is_flag=True, help="Let spare nodes take the place of those that fail, and go on.")
@click.option("--resume", metavar="RUN", help="Finish a run: what is complete is kept.", shell_complete=run_names)
@click.option("--accept-drift", is_flag=True, help="Resume in a changed environment; old cells run again.")
@click.option("--one-allocation", is_flag=True, help="Slurm: one job for all cells instead of one each.")
@click.option("--job-array", is_flag=True, help="Slurm: one job array for the cells of each number of nodes.")
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(1, 1000), help="Repeats of each cell.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of data order and initial weights.")
@click.option("--set", "settings", multiple=True, metavar="TEST.KEY=VALUE", help="Change a setting, e.g. sft.steps=20.")
@click.option("--dry-run", is_flag=True, help="Print the plan; connect to no node, start no run.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout, nothing else.")
@click.pass_context
def bench(ctx: click.Context, **options: Any) -> None:
    """Benchmark nodes: collectives and DeepSpeed fine-tuning, with a report."""
    name, drift = options.pop("resume"), options.pop("accept_drift")
    if name is None:
        if drift:
            raise errors.UsageError("--accept-drift goes with --resume RUN")
        ctx.exit(_bench(**options))
    given = [p for p in ctx.command.params if ctx.get_parameter_source(str(p.name)) is ParameterSource.COMMANDLINE]
    if other := [max(p.opts, key=len) for p in given if p.name not in WITH_RESUME]:
        raise errors.UsageError(f"--resume takes what {name} was planned with: leave out {', '.join(other)}")
    ctx.exit(_resume(name, drift, **{key: options[key] for key in WITH_RESUME if key in options}))


# What may differ from one execution of a plan to the next.
WITH_RESUME = ("resume", "accept_drift", "source", "results", "retries", "replace_bad_nodes", "dry_run", "as_json")


def _bench(
    source: str | None,
    results: Path,
    num_nodes: int | None,
    sweep: str | None,
    hosts: str | None,
    skip_bad_nodes: bool,
    model: str,
    weights: str | None,
    tests: tuple[str, ...],
    engine: str,
    backend: str | None,
    scaling: str,
    retries: int,
    replace_bad_nodes: bool,
    one_allocation: bool,
    job_array: bool,
    repeats: int,
    seed: int,
    settings: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> int:
    from runner import failures
    from runner.cluster.inventory import select
    from runner.plan import build as building
    from runner.plan import config, plan
    from runner.plan.engines.registry import ENGINES
    from runner.plan.request import Request
    from runner.report.progress import Display
    from runner.system.clock import now

    tests = tuple(dict.fromkeys(tests)) or tuple(TESTS)
    if engine not in ENGINES:
        raise errors.unknown("engine", engine, ENGINES)
    if backend is not None and backend not in BACKENDS:
        raise errors.unknown("backend", backend, BACKENDS)
    if scaling not in ("weak", "strong"):
        raise errors.unknown("scaling", scaling, ("weak", "strong"))
    overrides = config.parse_settings(settings)
    for name in overrides.keys() - {"deepspeed", "slurm"}:  # a mistake in a test that is not run is one, too
        config.load_test(name, overrides[name])
    loaded = {name: config.load_test(name, overrides.get(name, {})).model_dump() for name in tests}
    architecture = config.load_model(model).model_dump()
    deepspeed = config.load_deepspeed(architecture["deepspeed"], overrides.get("deepspeed", {}))
    deepspeed_files = config.deepspeed_files(overrides.get("deepspeed", {}))
    counts = _counts(num_nodes, sweep)
    slurm_only = [flag for flag, on in (("--one-allocation", one_allocation), ("--job-array", job_array)) if on]
    if len(slurm_only) > 1:
        raise errors.UsageError(f"{' and '.join(slurm_only)} exclude each other: give one of them")

    inventory = read_inventory(source)
    chosen = select(inventory, hosts)
    counts = counts or (len(chosen),)
    chosen, slurm = _over(backend, chosen, inventory, overrides, slurm_only)
    if max(counts) > len(chosen):
        limit = (
            f"--hosts {hosts} names {len(chosen)}" if hosts else f"the inventory {inventory.source} has {len(chosen)}"
        )
        raise errors.UsageError(f"{max(counts)} nodes asked for: {limit}")
    gpus_per_node, device, hardware = _resources(chosen)
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    display = Display(quiet=as_json)

    def build(nodes: tuple[Node, ...], passed_over: tuple[Mapping[str, str], ...], ssh_config: str | None) -> plan.Plan:
        request = Request(
            run_id=run_id,
            created=now(),
            command=shlex.join(["runner", *sys.argv[1:]]),
            inventory=inventory.source,
            run_dir=str((results / run_id).absolute()),
            tests=loaded,
            model=architecture,
            deepspeed=deepspeed,
            hardware={"name": hardware, **config.load_hardware(hardware).model_dump()},
            targets=config.load_targets(),
            node_counts=counts,
            engine=engine,
            backend=chosen[0].backend,
            scaling=scaling,
            repeats=repeats,
            gpus_per_node=gpus_per_node,
            device=device,
            ssh_config=ssh_config,
            weights=weights,
            seed=seed,
            passed_over=passed_over,
            spares=replace_bad_nodes,
            slurm=slurm,
            named=slurm is None or hosts is not None,
            one_allocation=one_allocation,
            job_array=job_array,
            deepspeed_files=deepspeed_files,
        )
        return building.build(request, nodes)

    remote = BACKENDS[chosen[0].backend].remote
    if dry_run:
        planned = build(chosen, (), "SSH_CONFIG" if remote else None)
        click.echo(json.dumps(planned.to_dict(), indent=1) if as_json else _describe(planned, planned.cells))
        return errors.EXIT_OK

    from runner.launch import preflight
    from runner.launch.run import Policy, execute
    from runner.results.rundir import RunDir

    # Refuse what cannot be planned before anything is asked of the nodes.
    build(chosen, (), "SSH_CONFIG" if remote else None)
    with rendered(inventory) if remote else nullcontext() as ssh_config:
        cluster = _cluster(slurm, inventory, ssh_config)
        reach = preflight.Reach(chosen[0].backend, device, engine, tests, ssh_config, cluster)
        nodes, spares = chosen, chosen[:0]
        passed_over: tuple[Mapping[str, str], ...] = ()
        if cluster is None or hosts is not None:  # else Slurm chooses
            skip = skip_bad_nodes or replace_bad_nodes
            asked = chosen if skip else chosen[: max(counts)]
            display.note(f"checking {preflight.folded(asked)}")
            problems = reach.ask(asked).problems
            nodes, passed_over = preflight.choose(chosen, max(counts), problems, skip)
            for line in failures.node_lines(passed_over):
                display.note(f"passed over {line}")
            if replace_bad_nodes:
                spares = tuple(n for n in chosen if n not in nodes and n.name not in problems)
        planned = build((*nodes, *spares), passed_over, ssh_config)
        _require_launcher(planned)
        run = RunDir(results / run_id)
        carrier = reach.transport(run, nodes[0], {})
        carrier.refuse(planned, planned.cells)
        data = _prepare(planned, planned.cells, display)
        policy = Policy(retries, replace_bad_nodes)
        summary = execute(planned, run, state_dir(), carrier, display, data, policy, reach, {})
    return print_conclusion(run, summary, as_json)


def _cluster(settings: Mapping[str, Any] | None, inventory: Inventory, ssh_config: str | None) -> Any:
    """Slurm, where the run goes through it."""
    if settings is None:
        return None
    from runner.cluster import slurm as slurm_settings
    from runner.launch.slurm import allocations

    return allocations.cluster(slurm_settings.settings(settings, "slurm"), inventory.hosts, ssh_config)


def _describe(planned: Any, cells: Sequence[Any]) -> str:
    """The plan for a person; under Slurm with the files that would be submitted."""
    from runner.launch.slurm import allocations
    from runner.plan import describe
    from runner.system.nodeset import fold

    text = describe.describe(replace(planned, cells=tuple(cells)), fold)
    scripts = allocations.preview(planned, cells) if BACKENDS[planned.backend].scheduled else []
    return "\n\n".join([text, *scripts])


def _resume(
    name: str,
    accept_drift: bool,
    source: str | None,
    results: Path,
    retries: int,
    replace_bad_nodes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    from runner.launch import drift as resume
    from runner.launch import preflight
    from runner.launch.run import Policy, execute
    from runner.report.progress import Display
    from runner.results.rundir import RunDir

    run = RunDir.find(results, name)
    display = Display(quiet=as_json)
    resume.refuse_running(run, display.note)
    with ExitStack() as stack:
        if not dry_run:  # before anything is read that another controller may change
            stack.enter_context(run.alive())
        planned = resume.load(run)
        inventory = read_inventory(source if source is not None else planned.inventory)
        aliases = {node.name: node.alias for node in planned.nodes}
        remote = BACKENDS[planned.backend].remote
        ssh_config = stack.enter_context(rendered(inventory)) if remote else None
        planned = resume.renew(planned, inventory, run, ssh_config)
        status = run.read_status()
        tests = tuple(dict.fromkeys(cell.test for cell in planned.cells))
        cluster = _cluster(planned.slurm, inventory, ssh_config)
        device = planned.cells[0].device
        reach = preflight.Reach(planned.backend, device, planned.engine, tests, ssh_config, cluster, own=run.run_id)
        answers = reach.ask(planned.nodes) if cluster is None else preflight.Answers({}, {})
        before = resume.measured(run, planned, status)
        changed = resume.drift(before, answers.environments)
        again = resume.reopen(planned, status, changed)
        if changed and not accept_drift:
            raise errors.UsageError(
                f"the environment has changed since {run.run_id} was measured: {resume.describe(changed, aliases)}; "
                f"put it back, or add --accept-drift: {len(changed)} complete cells are then measured again"
            )
        for cell_id in again:
            display.note(f"{cell_id} runs again: {status['cells'][cell_id]['error']['message']}")
        pending = [cell for cell in planned.cells if status["cells"][cell.id]["state"] != "complete"]
        display.note(f"{run.run_id}: {len(planned.cells) - len(pending)} of {len(planned.cells)} cells are complete")
        if dry_run:
            click.echo(json.dumps([cell.id for cell in pending]) if as_json else _describe(planned, pending))
            return errors.EXIT_OK
        needed = {host for cell in pending for host in cell.hosts}
        bad = {host: found for host, found in answers.problems.items() if host in needed}
        if bad and not replace_bad_nodes:
            what = f"{len(bad)} nodes are bad; mend them, or use spares with --replace-bad-nodes"
            raise preflight.refusal(what, preflight.bad_nodes(planned.nodes, bad))
        if replace_bad_nodes:
            planned = replace(planned, spares=resume.spares(planned, inventory))
        _require_launcher(planned)
        data = _prepare(planned, pending, display)
        run.write_plan(planned.to_dict())
        run.write_status(status)
        policy = Policy(retries, replace_bad_nodes, accept_drift)
        carrier = reach.transport(run, planned.nodes[0], {} if accept_drift else resume.common(before))
        summary = execute(planned, run, state_dir(), carrier, display, data, policy, reach, bad)
    return print_conclusion(run, summary, as_json)


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
        raise errors.UsageError(
            f"--backend {wanted}: the inventory {inventory.source} describes nodes for backend {nodes[0].backend}"
        )
    if not BACKENDS[wanted].scheduled:
        if what := [*slurm_only, *(["--set slurm.…"] if "slurm" in overrides else [])]:
            raise errors.UsageError(f"{what[0]} goes with --backend slurm, this run's backend is {wanted}")
        return nodes, None
    from runner.cluster import slurm as slurm_settings

    settings = slurm_settings.settings(
        {**inventory.slurm, **overrides.get("slurm", {})}, f"slurm of {inventory.source}"
    )
    return tuple(replace(node, backend=wanted) for node in nodes), settings.model_dump()


def _require_launcher(planned: Any) -> None:
    head = planned.cells[0].launch.head
    if head and not os.access(head[0], os.X_OK):
        raise errors.UsageError(
            f"engine {planned.engine} starts {head[0]} on this machine, where there is none: "
            "run from a machine with the nodes' environment, or use --engine torchrun"
        )


def _counts(num_nodes: int | None, sweep: str | None) -> tuple[int, ...]:
    if sweep is None:
        return (num_nodes,) if num_nodes else ()
    if num_nodes is not None:
        raise errors.UsageError("--nodes and --sweep exclude each other: give one of them")
    try:
        counts = tuple(sorted({int(part) for part in sweep.split(",")}))
    except ValueError:
        raise errors.UsageError(f"--sweep {sweep}: write node counts with commas, such as 1,2,4,8") from None
    if counts[0] < 1:
        raise errors.UsageError(f"--sweep {sweep}: node counts start at 1")
    return counts


RESOURCES = (
    ("gpus", "runner_gpus_per_node"),
    ("device", "runner_device"),
    ("hardware", "runner_hardware"),
    ("scratch", "runner_scratch"),
    ("min_free_disk_gib", "runner_min_free_disk_gib"),
)


def _resources(nodes: tuple[Node, ...]) -> tuple[int, str, str]:
    """Ranks per node, device and hardware name: one value each for the chosen nodes."""
    first = nodes[0]
    for field, variable in RESOURCES:
        odd = [n.alias for n in nodes if getattr(n, field) != getattr(first, field)]
        if odd:
            raise errors.UsageError(
                f"{variable} differs between {first.alias} and {odd[0]}: choose alike nodes with --hosts"
            )
    if not BACKENDS[first.backend].remote:
        return _observed(first, first.device)
    if first.gpus is None or first.device == "auto":
        raise errors.UsageError(f"{first.name}: set runner_gpus_per_node and runner_device in the inventory")
    return first.gpus, first.device, first.hardware


def _prepare(planned: Any, cells: Iterable[Any], display: Any) -> str | None:
    """The folder with the data of the cells that train among `cells`, prepared now if it is not cached."""
    cell = next((cell for cell in cells if trains(cell.test)), None)
    if cell is None:
        return None
    from runner.workloads.data import prepare as data

    display.note("preparing data")
    prepared = data.prepare(
        cell.params["dataset"],
        seq_len=cell.params["seq_len"],
        tokenizer=cell.params["tokenizer"],
        cache_dir=cache_dir() / "data",
        samples=cell.params["samples"],
        seed=planned.seed,
        on_progress=lambda done, total: display.at(done, total, "preparing data"),
    )
    return str(prepared.path)


def print_conclusion(run: Any, summary: dict[str, Any], as_json: bool) -> int:
    """Print what came out; the exit code says the same."""
    from runner.report import terminal

    if as_json:
        click.echo(json.dumps(summary, indent=1, allow_nan=False))
    else:
        click.echo(terminal.terminal(summary))
        click.echo(f"\nreport: {run.report_html}")
        if any(cell["state"] != "complete" for cell in summary["cells"]):
            results = run.path.parent.absolute()
            where = "" if results == Path("results").absolute() else f" --results {shlex.quote(str(results))}"
            click.echo(f"to finish it: runner bench --resume {run.run_id}{where}")
    states = {cell["state"] for cell in summary["cells"]}
    if "cancelled" in states:
        return errors.EXIT_INTERRUPTED
    if states - {"complete"}:
        return errors.EXIT_INFRASTRUCTURE
    missed = summary["verdict"] not in ("pass", "not_judged") or summary["findings"]
    return errors.EXIT_TARGET_MISSED if missed else errors.EXIT_OK
