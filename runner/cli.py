"""The command `runner`: parses, calls, and turns results into exit codes.

Everything heavier than click is imported inside the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from runner import __version__, errors
from runner.options import cache_dir, inventory_option, read_inventory, results_option, run_names, state_dir, transport

if TYPE_CHECKING:
    from runner.inventory import Inventory, Node


# Commands that live in other modules, imported when they are used: name -> (module, short help).
_ELSEWHERE = {
    "check": ("runner.provision", "Read back what nodes are now and show where they drifted."),
    "data": ("runner.data", "Prepare training data: tokenise, pack, cache."),
    "inventory": ("runner.cli_inventory", "Show the nodes as the product sees them; write an inventory to start from."),
    "runs": ("runner.runs", "Look at runs and stop them: list, show, tail, stop."),
    "setup": ("runner.provision", "Bring nodes to the wanted state: site.yml, with progress and a table."),
    "testbed": ("runner.testbed", "Start and stop a cluster of containers on this machine."),
}


BACKENDS = ("local", "ssh", "slurm")


class _Commands(click.Group):
    """A group that knows its lazy members' names and help without importing them, and suggests the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ELSEWHERE:
            return getattr(import_module(_ELSEWHERE[cmd_name][0]), cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            if name in _ELSEWHERE:
                rows.append((name, _ELSEWHERE[name][1]))
            elif command := super().get_command(ctx, name):
                rows.append((name, command.get_short_help_str(80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            raise errors.unknown("command", args[0], self.list_commands(ctx)) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="shakedown")
def cli() -> None:
    """Shakedown: bring up, benchmark and accept a multi-node GPU cluster."""


def main() -> None:
    """Entry point: one line per user error, a traceback for a bug."""

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt  # so that whatever is open is cleaned up

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        sys.exit(cli.main(standalone_mode=False) or errors.EXIT_OK)
    except errors.RunnerError as error:
        _leave(error.exit_code, str(error), error.kind, error.nodes)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        _leave(errors.EXIT_USAGE, f"{error.format_message()}{hint}")
    except BrokenPipeError:  # `runner ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(errors.EXIT_OK)
    except OSError as error:  # a disk, a folder, a file: the environment's, not the program's
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{(error.strerror or str(error)).lower()}"
        _leave(errors.EXIT_INFRASTRUCTURE, text, errors.disk_kind(error))
    except (KeyboardInterrupt, click.Abort):
        _leave(errors.EXIT_INTERRUPTED, "interrupted")


def _leave(code: int, message: str, kind: str | None = None, nodes: Sequence[Mapping[str, str]] = ()) -> NoReturn:
    """End with an error: a line for people, and for whoever asked for JSON one object, too."""
    click.echo(f"runner: {message}", err=True)
    if "--json" in sys.argv:  # a mistake may lie in the options themselves
        told = {"code": code, "message": message, "kind": kind, "nodes": list(nodes)}
        with suppress(OSError):  # nobody reads it
            click.echo(json.dumps({"error": told}, indent=1))
    sys.exit(code)


def _names(kind: str) -> Callable[..., list[str]]:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        from runner.system.places import CONFIGS

        return [p.stem for p in sorted((CONFIGS / kind).glob("*.yaml")) if p.stem.startswith(incomplete)]

    return complete


def _observed(node: Node, device: str) -> tuple[int, str, str]:
    """GPUs per node, device and hardware of this machine where the inventory says `auto`."""
    from runner import telemetry

    names = telemetry.gpu_names()
    if device == "auto":
        device = "cuda" if names else "cpu"
    hardware = node.hardware
    if device == "cuda" and hardware == "cpu":  # the inventory left it open
        hardware = "h200-sxm" if names and "H200" in names[0] and "NVL" not in names[0] else "unknown"
    return node.gpus or (len(names) if device == "cuda" else 2), device, hardware


@cli.command()
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
@click.option("--test", "tests", multiple=True, help="torch or sft; default: both.", shell_complete=_names("tests"))
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
    from runner import config, engines, kinds, plan
    from runner.display import Display
    from runner.inventory import select
    from runner.rundir import now

    tests = tuple(dict.fromkeys(tests)) or tuple(config.TESTS)
    if engine not in engines.ENGINES:
        raise errors.unknown("engine", engine, engines.ENGINES)
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
        request = plan.Request(
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
        )
        return plan.build(request, nodes)

    remote = chosen[0].backend != "local"
    if dry_run:
        planned = build(chosen, (), "SSH_CONFIG" if remote else None)
        click.echo(json.dumps(planned.to_dict(), indent=1) if as_json else _describe(planned, planned.cells))
        return errors.EXIT_OK

    from runner import allocations, preflight
    from runner import bench as benchmark
    from runner.rundir import RunDir

    # Refuse what cannot be planned before anything is asked of the nodes.
    build(chosen, (), "SSH_CONFIG" if remote else None)
    with transport(inventory) if remote else nullcontext() as ssh_config:
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
            for line in kinds.node_lines(passed_over):
                display.note(f"passed over {line}")
            if replace_bad_nodes:
                spares = tuple(n for n in chosen if n not in nodes and n.name not in problems)
        planned = build((*nodes, *spares), passed_over, ssh_config)
        _require_launcher(planned)
        run = RunDir(results / run_id)
        carrier = reach.transport(run, nodes[0], {})
        if isinstance(carrier, allocations.Allocations):
            allocations.refuse(planned, carrier, planned.cells)
        data = _prepare(planned, planned.cells, display)
        policy = benchmark.Policy(retries, replace_bad_nodes)
        summary = benchmark.execute(planned, run, state_dir(), carrier, display, data, policy, reach, {})
    return _conclude(run, summary, as_json)


def _cluster(settings: Mapping[str, Any] | None, inventory: Inventory, ssh_config: str | None) -> Any:
    """Slurm, where the run goes through it."""
    if settings is None:
        return None
    from runner import allocations, slurm

    return allocations.cluster(slurm.settings(settings, "slurm"), inventory.hosts, ssh_config)


def _describe(planned: Any, cells: Sequence[Any]) -> str:
    """The plan for a person; under Slurm with the files that would be submitted."""
    from runner import allocations, plan
    from runner.inventory import fold

    text = plan.describe(replace(planned, cells=tuple(cells)), fold)
    scripts = allocations.preview(planned, cells) if planned.backend == "slurm" else []
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
    from runner import bench as benchmark
    from runner import preflight, resume
    from runner.display import Display
    from runner.rundir import RunDir

    run = RunDir.find(results, name)
    display = Display(quiet=as_json)
    resume.refuse_running(run, display.note)
    with ExitStack() as stack:
        if not dry_run:  # before anything is read that another controller may change
            stack.enter_context(run.alive())
        planned = resume.load(run)
        inventory = read_inventory(source if source is not None else planned.inventory)
        aliases = {node.name: node.alias for node in planned.nodes}
        remote = planned.backend != "local"
        ssh_config = stack.enter_context(transport(inventory)) if remote else None
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
        policy = benchmark.Policy(retries, replace_bad_nodes, accept_drift)
        carrier = reach.transport(run, planned.nodes[0], {} if accept_drift else resume.common(before))
        summary = benchmark.execute(planned, run, state_dir(), carrier, display, data, policy, reach, bad)
    return _conclude(run, summary, as_json)


def _over(
    backend: str | None,
    nodes: tuple[Node, ...],
    inventory: Inventory,
    overrides: dict[str, dict[str, Any]],
    slurm_only: Sequence[str],
) -> tuple[tuple[Node, ...], dict[str, Any] | None]:
    """The nodes as `backend` reaches them, and Slurm's settings where it is Slurm, for which `slurm_only` was given."""
    wanted = backend or nodes[0].backend
    if wanted != nodes[0].backend and not (wanted == "slurm" and nodes[0].backend == "ssh"):
        raise errors.UsageError(
            f"--backend {wanted}: the inventory {inventory.source} describes nodes for backend {nodes[0].backend}"
        )
    if wanted != "slurm":
        if what := [*slurm_only, *(["--set slurm.…"] if "slurm" in overrides else [])]:
            raise errors.UsageError(f"{what[0]} goes with --backend slurm, this run's backend is {wanted}")
        return nodes, None
    from runner import slurm

    settings = slurm.settings({**inventory.slurm, **overrides.get("slurm", {})}, f"slurm of {inventory.source}")
    return tuple(replace(node, backend="slurm") for node in nodes), asdict(settings)


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
    if first.backend == "local":
        return _observed(first, first.device)
    if first.gpus is None or first.device == "auto":
        raise errors.UsageError(f"{first.name}: set runner_gpus_per_node and runner_device in the inventory")
    return first.gpus, first.device, first.hardware


def _prepare(planned: Any, cells: Iterable[Any], display: Any) -> str | None:
    """The folder with the data of the fine-tuning cells among `cells`, prepared now if it is not cached."""
    cell = next((cell for cell in cells if cell.test == "sft"), None)
    if cell is None:
        return None
    from runner import data

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


def _conclude(run: Any, summary: dict[str, Any], as_json: bool) -> int:
    """Print what came out; the exit code says the same."""
    from runner import report

    if as_json:
        click.echo(json.dumps(summary, indent=1, allow_nan=False))
    else:
        click.echo(report.terminal(summary))
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


@cli.command()
@results_option
@click.argument("name", metavar="[RUN]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def report(ctx: click.Context, name: str | None, results: Path, as_json: bool) -> None:
    """Judge a run again and rewrite its report; default: the newest run."""
    from runner import bench as benchmark
    from runner.rundir import RunDir

    run = RunDir.find(results, name)
    ctx.exit(_conclude(run, benchmark.judge(run), as_json))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script: eval "$(runner completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "runner", "_RUNNER_COMPLETE").source())


if __name__ == "__main__":
    main()
