"""`runner launch`: a program of the user's as a run of one cell, planned, carried out and resumed."""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Inventory
from runner.errors import UsageError, unknown
from runner.launch import prepare, resume, start, sync
from runner.launch.carry import Dependencies, RunResult, new_id
from runner.launch.supply import Data
from runner.plan import config
from runner.plan.engines.registry import ENGINES, offered
from runner.plan.plan import Cell, Plan
from runner.plan.request import Link, Request
from runner.report.progress import Display
from runner.results import logs
from runner.results.rundir import RunDir
from runner.system import process
from runner.system.schema import check
from runner.workloads.registry import TESTS

NAME = "script"  # of the test, and of its cell
_LATE_S = 5.0  # the time that the last lines of a run have to be shown
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Of other values a world is never whole, or what a rank has started is not found when it is to end.
_OF_RANKS = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    process.MARKER,
}

Read = Callable[[str | None], Inventory]


@dataclass(frozen=True)
class Options:
    """What `runner launch` was asked for: `words` are all that follows `--`, `cwd` is the folder in which it was typed.

    `env` are `KEY=VALUE`, `env_pass` names of variables whose values are taken from this environment and written
    nowhere. `sync` and `sync_data` are folders that are sent, and `settings` are `script.KEY=VALUE`.
    """

    run: prepare.Options
    words: tuple[str, ...]
    cwd: Path
    env: tuple[str, ...] = ()
    env_pass: tuple[str, ...] = ()
    resume_arg: str = ""
    sync: str | None = None
    sync_data: str | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A program on nodes that were not contacted, and what of the user's folders is sent to them."""

    run: prepare.Prepared
    sync: sync.Sync

    @property
    def lines(self) -> list[str]:
        """What ranks start, and what is sent for it, for the user."""
        (cell,) = self.run.plan.cells
        given = cell.params
        variables = [f"{name}={shlex.quote(value)}" for name, value in given["env"].items()]
        lines = [f"each rank runs  {' '.join([*variables, shlex.join(given['argv'])])}", f"  in {given['folder']}"]
        if given["env_pass"]:
            lines.append(f"  with {', '.join(given['env_pass'])} of this environment, whose values are written nowhere")
        # What is no text is shown as such: a terminal takes none of it.
        return [line.encode(errors="backslashreplace").decode() for line in (*lines, *self.sync.lines)]


def planned(options: Options, read: Read) -> Planned:
    """Check and plan a launch; no node is contacted. Raises UsageError for what cannot be planned."""
    if options.run.engine not in offered():
        raise unknown("engine", options.run.engine, offered())
    settings = config.parse_settings(options.settings, (NAME,))
    if other := [section for section in settings if section != NAME]:
        raise UsageError(f"--set {other[0]}: runner launch has the settings script.KEY=VALUE")
    env = _environment(options.env, options.env_pass)
    if options.env_pass and ENGINES[options.run.engine].headed:  # nothing of an agent's environment goes that way
        raise UsageError(
            f"--env-pass does not reach ranks of engine {options.run.engine}, whose launcher connects to nodes itself: "
            "use --engine torchrun, or give the nodes their own file with it"
        )
    _words(options.resume_arg)
    selected = prepare.selected(options.run, read, {})
    backend = BACKENDS[selected.nodes[0].backend]
    if backend.scheduled:
        raise UsageError(
            f"runner launch submits no jobs yet: nodes of backend {selected.nodes[0].backend} that can be reached over "
            "ssh take --backend ssh"
        )
    _refuse_program(options.words, options.cwd, backend.remote)
    sent = sync.planned(options.words, backend.remote, options.cwd, options.sync, options.sync_data)

    def located(request: Request) -> Request:
        places = sent.places(request, selected.nodes[0])
        given = {
            "argv": sent.words(options.words),
            "folder": places.work,
            "env": {**env, **places.env},
            "env_pass": options.env_pass,
            "resume_arg": options.resume_arg,
            **settings.get(NAME, {}),
        }
        params = check(TESTS[NAME].load_settings(), given, "--set script").model_dump()
        return replace(request, chain=(Link(NAME, NAME, params, sent.inputs),))

    request = prepare.requested(options.run, selected, {"name": ""}, {}, new_id())
    request = located(replace(request, targets=()))
    run = prepare.of_chain(options.run, selected, request, located)
    return Planned(run, sent)


def _environment(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The variables of `--env`. Raises UsageError for one that is none, and for `--env-pass` of one that is not set."""
    found = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or not _VARIABLE.fullmatch(key):
            raise UsageError(f"--env {each}: write it as KEY=VALUE; a secret by its name alone, with --env-pass KEY")
        found[key] = value
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise UsageError(f"--env-pass {name.partition('=')[0]}: give the name of a variable, without its value")
        if name in found:
            raise UsageError(f"{name} is given by --env and by --env-pass: give it once")
    _refuse_unset(names)
    if own := [name for name in (*found, *names) if name in _OF_RANKS]:
        raise UsageError(f"{own[0]} is how a rank knows its place: leave it out of --env and --env-pass")
    return found


def _refuse_unset(names: Sequence[str]) -> None:
    for name in names:
        if name not in os.environ:
            raise UsageError(f"--env-pass {name}: it is not set here: export it first")


def _words(resume_arg: str) -> tuple[str, ...]:
    """The words of `--resume-arg`, read as a shell reads them. Raises UsageError where that cannot be done."""
    try:
        return tuple(shlex.split(resume_arg))
    except ValueError as error:
        raise UsageError(f"--resume-arg {resume_arg}: {str(error).lower()}: quote it as for a shell") from None


def _refuse_program(words: Sequence[str], cwd: Path, remote: bool) -> None:
    """Raise UsageError for a program that cannot be started, as far as this machine can tell."""
    if not words or not words[0].strip():
        raise UsageError("nothing to start: give the program after --, such as runner launch --nodes 2 -- train.py")
    first = words[0]
    path = cwd / first
    script = first.endswith(".py")
    if not script and "/" not in first:
        return  # PATH of the node decides
    if remote and path.is_absolute() and Path(first).is_absolute() and not path.exists():
        return  # nodes may have it there
    if path.is_dir():
        raise UsageError(f"{first} is a folder: name the script in it")
    if not path.is_file():
        raise UsageError(f"{first}: there is no such file in {cwd}: name the script as seen from here")
    if not script and not os.access(path, os.X_OK):
        raise UsageError(f"{first} is not executable: chmod +x {shlex.quote(first)}, or put its interpreter before it")


# --- carried out ------------------------------------------------------------------------------------------


def launch(made: Planned, display: Display, dependencies: Dependencies | None = None) -> RunResult:
    """Carry out a launch; what the program writes is shown as it comes. Raises what `launch.start.start` raises."""
    with _Output(display) as output:
        return start.start(made.run, display, _recorded(made.sync, output, dependencies))


class _Output:
    """Shows on `display` what ranks write, equal lines folded as in `runner runs tail`, until the run has ended."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join(_LATE_S)

    def begin(self, run: RunDir) -> None:
        """Show what is written from now on."""
        position = run.log.stat().st_size if run.log.exists() else 0
        self._thread = threading.Thread(target=self._show, args=(run, position), daemon=True)
        self._thread.start()

    def _show(self, run: RunDir, position: int) -> None:
        def parse(raw: bytes) -> logs.Line | None:
            line = logs.parse_line(raw, (NAME,))
            return line if line.cell and line.file.startswith("rank") else None

        with suppress(OSError):  # what is not shown is in the log
            for text in logs.follow(run.log, position, parse, self._over.is_set):
                self._display.note(text)


def _recorded(sent: sync.Sync, output: _Output, dependencies: Dependencies | None) -> Dependencies:
    """Dependencies that send the user's folders, record in the run's directory that it is a launch, and begin to show
    its output.
    """

    def data(plan: Plan, cells: Sequence[Cell], display: Display) -> Data | None:
        run = RunDir(Path(plan.run_dir))
        run.write_status(run.read_status() | {"launch": {"cwd": str(sent.cwd)}})
        output.begin(run)
        return sent.supply(plan, display)

    return replace(dependencies or Dependencies(), data=data)


def again(
    asked: resume.Options,
    resume_arg: str | None,
    read: Read,
    display: Display,
    dependencies: Dependencies | None = None,
) -> RunResult:
    """Go on with a launch that has not completed: the program is started again, with the words of `resume_arg` (None:
    those of the run) behind its own.

    Raises UsageError for a run that is no launch, and what `resume.resume` raises.
    """
    found = asked.run.read_status().get("launch")
    if found is None:
        raise UsageError(
            f"{asked.run.run_id} is no run of runner launch: runner {asked.run.command} --resume {asked.run.run_id}"
        )
    _words(resume_arg or "")
    for cell in asked.run.read_plan()["cells"]:
        _refuse_unset(cell["params"]["env_pass"])
    sent = sync.resumed(asked.run, Path(found["cwd"]), asked.accept_drift)

    def replanned(plan: Plan, status: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
        def now(cell: Cell) -> Cell:
            own = tuple(cell.params["argv"])
            before = tuple(shlex.split(cell.params["resume_arg"]))
            if before and cell.params.get("resumed"):
                own = own[: len(own) - len(before)]
            words = cell.params["resume_arg"] if resume_arg is None else resume_arg
            params = {
                **cell.params,
                "argv": [*own, *shlex.split(words)],
                "resume_arg": words,
                "resumed": True,
            }
            return replace(cell, params=params)

        renewed = sent.renewed(plan)
        return replace(renewed, cells=tuple(now(cell) for cell in renewed.cells)), dict(status)

    with _Output(display) as output:
        return resume.resume(replace(asked, replanned=replanned), read, display, _recorded(sent, output, dependencies))


def exit_code(run: RunDir, otherwise: int) -> tuple[int, str]:
    """The code with which `runner launch` ends, and what it is, in one line; `otherwise` is the run's own."""
    status = run.read_status()
    entry = next(iter(status["cells"].values()))
    code, state = entry["exit_code"], entry["state"]
    if state == "complete":
        return 0, "the program ended with code 0"
    if state == "cancelled":
        return otherwise, "stopped by the user"
    if code:
        number = f" (signal {code - 128})" if code > 128 else ""
        return code, f"the program ended with code {code}{number}"
    ran = "the program's own code is 0" if code == 0 else "the program has not ended by itself"
    return otherwise, f"exit code {otherwise} is runner's: {ran}"
