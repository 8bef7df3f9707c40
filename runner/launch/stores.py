"""The user's folders sent to nodes, each content once a node: what `launch.code` lists, `node.code` keeps there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.cluster.inventory import Node
from runner.errors import InfrastructureError, UsageError
from runner.failures import Problem
from runner.launch import copy
from runner.launch.code import Folder
from runner.launch.talk import ask
from runner.node import code
from runner.node.protocol import Stored
from runner.node.requests import StoreRequest
from runner.system import process
from runner.system.places import state_dir
from runner.system.tree import Tree
from runner.system.wording import counted, size_text

# A slow disk reads so many bytes in a second, and a slow network carries so many: what takes longer has stopped.
_READ_PER_S, _SENT_PER_S = 50e6, 5e6
_LEAST_S = 60.0
_TRIES = 2  # a copy that arrived torn is sent again, once


@dataclass(frozen=True)
class Part:
    """A folder of this machine that is to be in the folder `root` of nodes, called by the digest of its `tree`, and as
    a working copy at the path `work` there ("": none). `name` is what it is to the user: code, data.
    """

    name: str
    folder: Folder
    tree: Tree
    root: str
    work: str = ""

    @property
    def on_nodes(self) -> str:
        """Where nodes have it."""
        return f"{self.root}/{self.tree.digest}"

    def request(self, arrived: bool) -> StoreRequest:
        """What a node is asked; `arrived`: after it was sent."""
        return StoreRequest(self.root, self.tree.digest, arrived, self.work)

    @property
    def read_s(self) -> float:
        """The time within which a node has read it, in s."""
        return _LEAST_S + self.tree.bytes / _READ_PER_S

    @property
    def sent_s(self) -> float:
        """The time within which it was sent, in s."""
        return max(1800.0, self.tree.bytes / _SENT_PER_S)


def send(
    part: Part,
    nodes: Sequence[Node],
    ssh_config: str,
    note: Callable[[str], object],
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Problem]:
    """See that every node has `part` whole, sending it over ssh where it is not there; returns failures by node.

    `note` is told what is sent. Ends early once `stopped` returns True.
    """
    answers, problems = _ask(part, nodes, ssh_config, False, stopped)
    for _ in range(_TRIES):
        lacking = [node for node in nodes if node.name in answers and not answers[node.name].whole
                   and node.name not in problems]  # fmt: skip
        if not lacking or stopped():
            break
        have = f", {counted(len(nodes) - len(lacking), 'node')} of {len(nodes)} have it" * (len(lacking) < len(nodes))
        note(f"sending the {part.name} ({size_text(part.tree.bytes)}) to {counted(len(lacking), 'node')}{have}")
        with _options(part) as options:
            target = str(code.incoming(Path(part.on_nodes)))
            root = str(part.folder.root)
            failed = copy.send(lacking, ssh_config, root, target, part.sent_s, stopped, options)
        problems |= failed
        # A full disk is not left full of what is of no use.
        reached = [node for node in lacking if node.name not in failed or failed[node.name].kind == "disk_full"]
        again, silent = _ask(part, reached, ssh_config, True, stopped)
        problems = silent | problems
        answers = {name: answer for name, answer in answers.items() if answer.whole} | again
    for name, answer in answers.items():
        if not answer.whole and name not in problems:
            problems[name] = _differs(part, answer.found)
    if stopped():
        return {name: problem for name, problem in problems.items() if problem.kind != "copy_differs"}
    return problems


def send_here(part: Part, note: Callable[[str], object]) -> None:
    """See that a folder which all nodes see has `part` whole. Raises InfrastructureError."""
    locks = state_dir() / "stores"  # what machines share may have no locks
    answer = code.store(part.request(False), locks)
    for _ in range(_TRIES):
        if answer.whole or answer.problem:
            break
        note(f"copying the {part.name} ({size_text(part.tree.bytes)}) to {part.root}")
        target = code.incoming(Path(part.on_nodes))
        with _options(part) as options:
            command = ["rsync", "-a", "-s", "--mkpath", *options, f"{part.folder.root}/", f"{target}/"]
            outcome = process.run(command, timeout_s=part.sent_s)
        if outcome.rc:
            raise InfrastructureError(f"the {part.name} cannot be copied to {part.root}: {outcome.last_line}")
        answer = code.store(part.request(True), locks)
    if answer.problem:
        raise InfrastructureError(f"the {part.name} cannot be kept in {part.root}: {answer.problem}", answer.kind)
    if not answer.whole:
        raise InfrastructureError(f"{part.root}: {_differs(part, answer.found).message}", "copy_differs")


def _ask(
    part: Part, nodes: Sequence[Node], ssh_config: str, arrived: bool, stopped: Callable[[], bool]
) -> tuple[dict[str, Stored], dict[str, Problem]]:
    """The answers of nodes, and the problems of those that have none or cannot keep it."""
    if not nodes or stopped():
        return {}, {}
    said, problems = ask(nodes, "ssh", ssh_config, part.request(arrived), part.read_s, stopped)
    answers = {}
    for name, answer in said.items():
        if not isinstance(answer, Stored):
            problems[name] = Problem("version_mismatch", "its agent does not know what is asked")
        elif answer.problem:
            problems[name] = Problem(answer.kind, answer.problem)
        else:
            answers[name] = answer
    return answers, problems


def _differs(part: Part, found: str) -> Problem:
    has = f"has {found[:12]}" if found else "has none"
    return Problem("copy_differs", f"its copy of the {part.name} is not {part.tree.digest[:12]}: it {has}")


@contextmanager
def _options(part: Part) -> Iterator[list[str]]:
    """rsync's options for exactly the files of a part, whatever their names are."""
    with tempfile.TemporaryDirectory(prefix="shakedown-sync-") as folder:
        names = Path(folder, "files")
        # Whatever is first in a name (rsync takes `;` and `#` for a comment), it is not first in the line.
        names.write_bytes(b"".join(b"./" + os.fsencode(entry.path) + b"\0" for entry in part.tree.entries))
        # What owns a file here means nothing there; a folder that cannot be written could not be filled.
        yield ["--from0", f"--files-from={names}", "--no-owner", "--no-group", "--chmod=Du=rwx"]


def refuse_empty(folder: Folder) -> None:
    """Raise UsageError for a folder without a file to send."""
    if not folder.paths:
        raise UsageError(f"{folder.option or 'the code'}: {folder.root} has no file that is sent")
