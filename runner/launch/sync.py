"""The folders of a user's program in one run: what is sent, where nodes have it, and what has changed since."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from runner.cluster import slurm
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.errors import UsageError
from runner.failures import Problem
from runner.launch import code
from runner.launch.stores import Part, refuse_empty
from runner.launch.supply import Data
from runner.launch.transport import Transport
from runner.plan.plan import Cell, Plan
from runner.plan.request import Request
from runner.report.progress import Display
from runner.results.rundir import RunDir
from runner.system.files import disk_errors, write_text_atomic
from runner.system.tree import Progress, Tree
from runner.system.wording import counted
from runner.workloads.job import DATA_VARIABLE

CODE, DATA = "code", "data"  # the names of the inputs of a cell
_SHOWN = 5  # names of files in a message


@dataclass(frozen=True)
class Places:
    """Where a run has its folders on nodes: the folder in which the script works, and that of the data, "" for none."""

    work: str
    data: str = ""

    @property
    def env(self) -> dict[str, str]:
        """The variables by which the script finds them."""
        return {DATA_VARIABLE: self.data} if self.data else {}


@dataclass(frozen=True)
class Sync:
    """What is sent for a run: code and data by name, each with its tree. Where nodes are this machine nothing is sent,
    then `cwd` and `data` are used in place.
    """

    cwd: Path
    sent: Mapping[str, tuple[code.Folder, Tree]]
    data: Path | None = None

    @property
    def inputs(self) -> dict[str, str]:
        """The digests of what is sent, by name."""
        return {name: tree.digest for name, (_, tree) in self.sent.items()}

    @property
    def lines(self) -> list[str]:
        """What is sent and what is to be known of it, for the user."""
        lines = []
        for name, (folder, tree) in self.sent.items():
            lines.append(f"{name}: {folder.described()}, {tree.digest[:12]}")
            lines += [f"{name}: {note}" for note in folder.notes]
        return lines

    def words(self, words: Sequence[str]) -> tuple[str, ...]:
        """The program as nodes start it: a script named by its whole path here is one in the working folder there."""
        if CODE not in self.sent or not words or not Path(words[0]).is_absolute():
            return tuple(words)
        folder, script = self.sent[CODE][0], Path(words[0]).resolve()
        if not script.is_relative_to(folder.root):
            return tuple(words)
        here = os.path.relpath(script, folder.root / folder.within)
        return (here if "/" in here or here.endswith(".py") else f"./{here}", *words[1:])

    def places(self, where: Request | Plan, node: Node) -> Places:
        """Where the run has its folders on nodes, of which `node` is one."""
        if not BACKENDS[where.backend].remote:
            return Places(str(self.cwd), str(self.data) if self.data else "")
        parts = {part.name: part for part in self.parts(where, node)}
        within = self.sent[CODE][0].within if CODE in self.sent else ""
        work = str(PurePath(_work(where, node), within))
        return Places(work, parts[DATA].on_nodes if DATA in parts else "")

    def parts(self, where: Request | Plan, node: Node) -> tuple[Part, ...]:
        """What is sent to nodes, of which `node` is one, in the run that `where` describes."""
        shared = _shared(where)
        roots = {
            CODE: f"{PurePath(where.run_dir).parent}/.code" if shared else f"{node.scratch}/code",
            DATA: f"{PurePath(where.run_dir).parent}/.data-sets" if shared else f"{node.scratch}/data-sets",
        }
        return tuple(
            Part(name, folder, tree, roots[name], _work(where, node) if name == CODE else "")
            for name, (folder, tree) in self.sent.items()
        )

    def renewed(self, plan: Plan) -> Plan:
        """The plan of a run that was started with what may have changed since."""
        if not self.sent:
            return plan
        env = self.places(plan, plan.nodes[0]).env

        def now(cell: Cell) -> Cell:
            params = {**cell.params, "env": {**cell.params.get("env", {}), **env}}
            return replace(cell, inputs={**cell.inputs, **self.inputs}, params=params)

        return replace(plan, cells=tuple(now(cell) for cell in plan.cells))

    def supply(self, plan: Plan, display: Display) -> Data | None:
        """What `carry.Dependencies.data` is for a run with these folders; None where nothing is sent.

        What was sent is recorded in the run directory. Raises InfrastructureError where that cannot be written.
        """
        if not self.sent:
            return None
        run = RunDir(Path(plan.run_dir))
        recorded = {
            name: {"root": str(folder.root), "option": folder.option, "within": folder.within, "tree": tree.to_json()}
            for name, (folder, tree) in self.sent.items()
        }
        with disk_errors(run.sync):
            write_text_atomic(run.sync, json.dumps(recorded))  # ASCII: names that are no UTF-8 are escaped
        for line in self.lines:
            display.note(line)
        return _Folders(self.parts(plan, plan.nodes[0]), display.note)


class _Folders(Data):
    """The folders of a user, as data that every cell of a run needs."""

    def __init__(self, parts: Sequence[Part], note: Callable[[str], object]) -> None:
        super().__init__(str(parts[0].folder.root))
        self._parts, self._note = parts, note
        self.what = " and ".join(f"the {part.name}" for part in parts)

    def needed(self, test: str) -> bool:
        """True: a program without its code is none."""
        return True

    def on_nodes(self, transport: Transport, plan: Plan) -> str | None:
        """None: the settings of a cell say where its folders are."""
        return None

    def send(
        self, transport: Transport, plan: Plan, nodes: Sequence[Node], stopped: Callable[[], bool]
    ) -> dict[str, Problem]:
        """Send all folders to `nodes`, until `stopped`; returns failures by node."""
        problems: dict[str, Problem] = {}
        for part in self._parts:
            left = [node for node in nodes if node.name not in problems]
            if left and not stopped():
                problems |= transport.store(plan, left, part, self._note, stopped)
        return problems


def planned(
    words: Sequence[str],
    remote: bool,
    cwd: Path,
    sync: str | None = None,
    sync_data: str | None = None,
    on_progress: Progress | None = None,
) -> Sync:
    """What is sent for the program `words`, which the user starts in the folder `cwd`; no node is contacted.

    `remote`: nodes are other machines; `sync` and `sync_data` are what these options name; `on_progress` is of reading
    what is sent. Raises UsageError for a folder that cannot be sent, and for a script that is not among what is.
    """
    data = code.data_of(cwd / sync_data) if sync_data is not None else None
    if not remote:
        if sync is not None:
            code.of_option(cwd / sync, cwd)
        return Sync(cwd, {}, data.root if data else None)
    folder = code.of_option(cwd / sync, cwd) if sync is not None else code.of_script(words, cwd)
    _refuse_left_out(words, cwd, folder)
    return Sync(cwd, _read({CODE: folder, **({DATA: data} if data else {})}, on_progress))


def _read(folders: Mapping[str, code.Folder], on_progress: Progress | None) -> dict[str, tuple[code.Folder, Tree]]:
    for folder in folders.values():
        refuse_empty(folder)
    return {name: (folder, folder.tree(on_progress)) for name, folder in folders.items()}


def _refuse_left_out(words: Sequence[str], cwd: Path, folder: code.Folder) -> None:
    script = cwd / words[0] if words else cwd
    if not script.is_file() or not ("/" in words[0] or words[0].endswith(".py")):
        return
    path = Path(os.path.abspath(script))
    if not path.is_relative_to(folder.root):
        path = script.resolve()
    if not path.is_relative_to(folder.root):
        if Path(words[0]).is_absolute() and not words[0].endswith(".py"):
            return  # a program that nodes have at the same path
        raise UsageError(f"{words[0]} is not in {folder.root}, which is sent: name the folder that has it with --sync")
    inside = path.relative_to(folder.root)
    if not {str(inside), *map(str, inside.parents)} & set(folder.paths):
        raise UsageError(f"{words[0]} would not be sent: .gitignore leaves it out; change that, or name it otherwise")


def _shared(where: Request | Plan) -> bool:
    return BACKENDS[where.backend].scheduled and slurm.Settings(**(where.slurm or {})).sees_files


def _work(where: Request | Plan, node: Node) -> str:
    return f"{where.run_dir}/work" if _shared(where) else f"{node.scratch}/work/{where.run_id}"


# --- resumed -----------------------------------------------------------------------------------------------


def resumed(run: RunDir, cwd: Path, accept: bool = False, on_progress: Progress | None = None) -> Sync:
    """What was sent for a run, as it is here now; a run without a record has sent nothing.

    Raises UsageError where it has changed since, with what: it is only sent then if that is accepted.
    """
    folders, before = {}, {}
    for name, (root, option, within, tree) in _recorded(run).items():
        if not root.is_dir():
            raise UsageError(f"{run.run_id} has sent {root}, which is not there now: restore it, or start another run")
        folders[name] = code.data_of(root) if name == DATA else code.listed(root, within, option)
        before[name] = tree
    made = Sync(cwd, _read(folders, on_progress))
    if (changed := _changed(made, before)) and not accept:
        raise UsageError(
            f"since {run.run_id} was started, {changed}: restore it, or add --accept-drift, which sends what is "
            "here now"
        )
    return made


def _changed(now: Sync, before: Mapping[str, Tree]) -> str:
    """What differs from what was sent before, as text; empty for nothing."""
    lines = []
    for name, (folder, tree) in now.sent.items():
        if paths := tree.changes(before[name]):
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            lines.append(f"{counted(len(paths), 'file')} of {folder.root} changed ({', '.join(paths[:_SHOWN])}{more})")
    return "; ".join(lines)


def _recorded(run: RunDir) -> dict[str, tuple[Path, str | None, str, Tree]]:
    """What a run has sent, by name: the folder, the option that named it, the working folder in it, and its files."""
    try:
        found = json.loads(run.sync.read_text(encoding="utf-8"))
        return {
            name: (Path(value["root"]), value["option"], value["within"], Tree.from_json(value["tree"]))
            for name, value in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"{run.sync} cannot be read: it was damaged; start another run") from error
