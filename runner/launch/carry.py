"""Carries out an accepted plan: whatever ends it, its run directory records how it ended."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Inventory
from runner.errors import InfrastructureError, Interrupted, RunnerError, UsageError, disk_kind, os_error_text
from runner.launch.preflight import NodeAccess, Problems
from runner.launch.run import Policy, Run
from runner.launch.signals import deferred
from runner.launch.slurm import commands
from runner.launch.supply import Data
from runner.launch.transport import Transport
from runner.plan.engines.registry import ENGINES
from runner.plan.plan import Cell, Plan
from runner.report.progress import Display
from runner.report.terminal import to_finish
from runner.results.rundir import NameTaken, RunDir, new_id
from runner.system import process
from runner.system.clock import now
from runner.system.files import disk_errors
from runner.system.locks import hold_nodes
from runner.system.places import cache_dir, state_dir
from runner.workloads.registry import trains

NOT_BEGUN = "the run has not begun: it has no directory"
NAMES = 20  # how many names are tried before the error is reported


def prepare_data(plan: Plan, cells: Sequence[Cell], display: Display) -> Data | None:
    """The training data of `cells`; None if none of them trains.

    What is not cached is prepared now; but later, beside the imports of ranks, if the cell that runs first trains and
    starts here. While other cells measure, nothing is prepared.
    """
    cell = next((cell for cell in cells if trains(cell.test)), None)
    if cell is None:
        return None
    from runner.workloads.data import prepare as data

    display.note("preparing data")
    cache = cache_dir() / "data"
    asked = {name: cell.params[name] for name in ("seq_len", "tokenizer", "samples")} | {"seed": plan.seed}
    folder = cache / data.resolve(cell.params["dataset"], **asked)[2]

    def later(stopped: Callable[[], bool]) -> None:
        def on_progress(done: int, total: int) -> None:
            if stopped():
                raise Interrupted("interrupted while data was prepared")
            display.at(done, total, "preparing data")

        prepared = data.prepare(cell.params["dataset"], **asked, cache_dir=cache, on_progress=on_progress)
        if prepared.path != folder:
            raise UsageError(f"data {cell.params['dataset']!r} changed before it was read; start again")

    made = Data(str(folder), None if data.cached(folder) else later)
    if not trains(cells[0].test) or BACKENDS[plan.backend].scheduled:
        made.complete(lambda: False)
    return made


@dataclass(frozen=True)
class Dependencies:
    """What a run depends on; each can be replaced, so that a test needs no node.

    `make_id` names runs, `state` is the folder of locks, `hold` takes them, `access` makes the access to nodes, `data`
    prepares the cells' data, and `folder` is the class of the run's directory.
    """

    make_id: Callable[[], str] = new_id
    state: Path = field(default_factory=state_dir)
    hold: Callable[[Path, Mapping[str, str], str], AbstractContextManager[None]] = hold_nodes
    access: Callable[..., NodeAccess] = NodeAccess
    data: Callable[[Plan, Sequence[Cell], Display], Data | None] = prepare_data
    folder: type[RunDir] = RunDir


@dataclass(frozen=True)
class RunResult:
    """A run that was carried out, and its summary."""

    run: RunDir
    summary: Mapping[str, Any]


# --- what ended it ------------------------------------------------------------------------------------


@contextmanager
def before_directory() -> Iterator[None]:
    """While there is no run directory: every exception says that there is none."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted before the run began: it has no directory") from None
    except RunnerError:
        raise
    except OSError as error:
        raise InfrastructureError(f"{os_error_text(error)}; {NOT_BEGUN}", disk_kind(error)) from error
    except Exception as error:
        error.add_note(NOT_BEGUN)
        raise


@contextmanager
def run_directory(
    made: Callable[[str], Plan], run_id: str, dependencies: Dependencies
) -> Iterator[tuple[Plan, RunDir]]:
    """Lock the nodes, create the run directory, and record in it an exception that ends the run.

    `made` plans a run of a given name, another one than `run_id` if that is taken. Raises InfrastructureError if nodes
    are in use or the directory cannot be created; then nothing is left of it.
    """
    for _ in range(NAMES):
        plan = made(run_id)
        with ExitStack() as stack:
            with deferred():
                try:
                    with before_directory():
                        stack.enter_context(dependencies.hold(dependencies.state, endpoints(plan), plan.run_id))
                        run = _created(plan, dependencies.folder)
                except NameTaken:
                    run_id = dependencies.make_id()
                    continue
                stack.enter_context(failures_recorded(run))
                stack.enter_context(run.alive())
            yield plan, run
            return
    raise InfrastructureError(f"no run directory was created: {NAMES} names are taken in {Path(plan.run_dir).parent}")


def _created(plan: Plan, folder: type[RunDir]) -> RunDir:
    try:
        return folder.create(Path(plan.run_dir).parent, plan.to_dict())
    except NameTaken:
        raise
    except InfrastructureError as error:
        raise InfrastructureError(f"no run directory was created: {error}", error.kind) from error


@contextmanager
def failures_recorded(run: RunDir) -> Iterator[None]:
    """Record an exception that ends a run in its status.json and benchmark.log; Ctrl-C becomes Interrupted.

    The exception has a note that says how the run is finished.
    """
    try:
        yield
    except BaseException as error:
        with suppress(KeyboardInterrupt), deferred():  # this is the end already
            _record(run, error)
        end = error
        if isinstance(error, KeyboardInterrupt):
            end = Interrupted(f"interrupted; what was written is in {run.path}")
        end.add_note(to_finish(run))
        if end is not error:
            raise end from None
        raise


def _record(run: RunDir, error: BaseException) -> None:
    """Write `error` as the end of a run; if the disk cannot be written, the run stays incomplete."""
    interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
    kind, message = None, str(error) or type(error).__name__
    lines: list[str] = []
    if isinstance(error, RunnerError):
        kind = error.kind
    elif isinstance(error, OSError):
        kind, message = disk_kind(error), os_error_text(error)
    elif interrupted:
        message = "interrupted"
    else:
        message = f"{type(error).__name__}: {error}"
        lines = "".join(traceback.format_exception(error)).splitlines()
    state = "cancelled" if interrupted else "failed"
    with suppress(OSError, RunnerError):
        run.write_end(state, {"kind": kind, "message": message, "at": now()})
    with suppress(OSError), open(run.log, "a", encoding="utf-8", errors="replace") as log:
        log.writelines(f"{now()} {line}\n" for line in (*lines, *message.splitlines()))


# --- carrying out -------------------------------------------------------------------------------------


def endpoints(plan: Plan) -> dict[str, str]:
    """The nodes to lock, endpoint -> name; none under Slurm, which separates its jobs itself."""
    if BACKENDS[plan.backend].scheduled:
        return {}
    return {node.endpoint: node.name for node in (*plan.nodes, *plan.spares)}


def cluster(
    settings: Mapping[str, Any] | None, inventory: Inventory, ssh_config: str | None
) -> commands.SlurmClient | None:
    """The client for Slurm's commands, None if the run does not use Slurm.

    Raises UsageError for wrong settings.
    """
    if settings is None:
        return None
    from runner.cluster import slurm as slurm_settings
    from runner.launch.slurm import allocations

    return allocations.cluster(slurm_settings.settings(settings, "slurm"), inventory.hosts, ssh_config)


def observed(
    settings: Mapping[str, Any] | None, inventory: Inventory, ssh_config: str | None, results: Path
) -> Mapping[str, Any] | None:
    """Slurm's settings (None: the run does not use it) with what they leave to be seen: whether nodes share `results`.

    Raises InfrastructureError if the login host does not answer.
    """
    client = cluster(settings, inventory, ssh_config)
    if settings is None or client is None or client.settings.shared is not None:
        return settings
    return {**settings, "shared": client.sees(results)}


def require_launcher(plan: Plan) -> None:
    """Raise UsageError if an engine's launcher must run on this machine and is not installed here."""
    for cell in plan.cells:
        head = cell.launch.head
        if head and shutil.which(head[0]) is None:
            raise UsageError(
                f"engine {cell.engine} starts {head[0]} on this machine, where it is not installed: "
                f"{ENGINES[cell.engine].needs}"
            )


def carry_out(
    plan: Plan,
    run: RunDir,
    transport: Transport,
    display: Display,
    data: Data | None,
    policy: Policy,
    access: NodeAccess,
    bad: Problems,
) -> dict[str, Any]:
    """Run the cells that are not complete, in a run directory that the caller has locked; returns the summary.

    `data` is that of the cells (None: they need none), `bad` the nodes not to use, with their problems.
    Raises InfrastructureError where the disk cannot be written, Interrupted on a signal.
    """
    process.allow_open_files()
    if transport.ssh_config:
        with disk_errors(run.path):
            run.keep_transport(Path(transport.ssh_config))
    carried = Run(plan, run, transport, display, data, policy, access)
    try:
        return carried.execute(bad)
    except KeyboardInterrupt:
        carried.exit_at_once()
        raise Interrupted(f"exited at once; what was written is in {run.path}") from None
