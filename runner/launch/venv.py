"""`--env-from`: the Python environment of a user's program, of a lock that each node makes it from once.

`of_option` reads what is given; `Lock.ensure` has all nodes make it, at once. A name instead of a file is a profile
that `runner setup` installs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.cluster import pip, profiles
from runner.cluster.inventory import Node
from runner.errors import InfrastructureError, UsageError
from runner.failures import Problem
from runner.launch import talk
from runner.node import venv
from runner.node.protocol import Environment, Making, Message
from runner.node.requests import EnvironmentRequest
from runner.system import process
from runner.system.folders import alone
from runner.system.nodeset import fold
from runner.system.places import cache_dir

_EXPORT_S = 120.0
_UV_S = 600.0
_PYPI = re.compile(r"https://pypi\.org/simple/?")
_PATHS = ("./", "../", "~/")

# Called with the share of the work that is done, of all nodes together, and what is done now.
OnProgress = Callable[[float, str], object]


@dataclass(frozen=True)
class Lock:
    """What an environment is made from: the `tool` that makes it and its `files` (`node.requests.EnvironmentRequest`).

    `source` is what the user has named, `python` the oldest version that it requires, "" for any.
    """

    source: str
    tool: str
    files: Mapping[str, str] = field(repr=False)
    python: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of what it is made from, by which it is called on nodes and in a plan."""
        made_from = [self.tool, self.python, sorted(self.files.items())]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    def python_on(self, node: Node) -> str:
        """The path of the environment's Python on `node`."""
        return venv.python_of(_root(node), self.digest)

    def ensure(self, nodes: Sequence[Node], ssh_config: str | None, on_progress: OnProgress) -> dict[str, Problem]:
        """See that all `nodes` have it whole; each makes what it lacks. Returns failures by node.

        Raises InfrastructureError if a command cannot be started.
        """

        def request(node: Node) -> EnvironmentRequest:
            return EnvironmentRequest(_root(node), self.digest, self.tool, self.files, self.python, node.env)

        sessions = talk.sessions(nodes, nodes[0].backend, ssh_config, request)
        aliases = {node.name: node.alias for node in nodes}
        answers: dict[str, Environment] = {}
        shares = dict.fromkeys(aliases, 0.0)

        def note(session: talk.AgentSession, message: Message) -> None:
            if isinstance(message, Environment):
                answers[session.name], shares[session.name] = message, 1.0
                step = "failed" if message.problem else "made" if message.made else "is whole"
            elif isinstance(message, Making):
                shares[session.name] = message.done / message.total if message.total else shares[session.name]
                step = message.step
            else:
                return
            on_progress(sum(shares.values()) / len(shares), f"{aliases[session.name]}: {step}")

        talk.converse(sessions, note)
        refused = {
            name: Problem(answer.kind, f"{self.source}: {answer.problem}")
            for name, answer in answers.items()
            if answer.problem
        }
        problems = talk.unanswered(nodes, sessions, answers) | refused
        return problems | _other_versions(nodes, answers, self.source)


@dataclass(frozen=True)
class Profile:
    """An environment that `runner setup` has made, by its name; `digest` is that of its locks."""

    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the locks of which it is one."""
        return hashlib.sha256(json.dumps(sorted(profiles.locks(self.source))).encode()).hexdigest()

    def python_on(self, node: Node) -> str:
        """The path of its Python on `node`. Raises UsageError where the inventory has none."""
        return node.of_profile(self.source).python


def of_option(text: str, cwd: Path) -> Lock | Profile:
    """What `--env-from` names: a file, relative to the folder `cwd`, or a profile. Raises UsageError."""
    if text in profiles.LOCKS:
        return Profile(text)
    path = cwd / text
    if path.is_dir():
        raise UsageError(f"--env-from {text} is a folder: name its uv.lock, requirements.txt or environment.yml")
    if not path.is_file():
        known = ", ".join(profiles.LOCKS)
        raise UsageError(f"--env-from {text}: no such file, and no profile either: those are {known}")
    try:
        if path.name == "uv.lock":
            return _of_uv(path, text)
        if path.suffix in (".yml", ".yaml"):
            return Lock(text, venv.CONDA, {venv.CONDA_FILE: _conda_text(path)})
        if path.suffix in (".txt", ".in"):
            return _of_requirements(path, text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--env-from {text} cannot be read: {error}") from None
    raise UsageError(f"--env-from {text}: a uv.lock, a requirements.txt or an environment.yml is needed")


def _root(node: Node) -> str:
    return f"{node.scratch}/env"


def _other_versions(nodes: Sequence[Node], answers: Mapping[str, Environment], source: str) -> dict[str, Problem]:
    """Nodes whose environment has another Python than most: what one of them pickles, another cannot read."""
    found: dict[str, list[Node]] = {}
    for node in nodes:
        if node.name in answers and not answers[node.name].problem:
            found.setdefault(".".join(answers[node.name].version.split(".")[:2]), []).append(node)
    if len(found) < 2:
        return {}
    usual = max(found, key=lambda version: len(found[version]))
    most = f"{usual} on {fold([node.alias for node in found[usual]])}"
    return {
        node.name: Problem("version_mismatch", f"{source}: its environment has Python {version}, but {most}")
        for version, those in found.items()
        if version != usual
        for node in those
    }


# --- requirements.txt ---------------------------------------------------------------------------------


def _of_requirements(path: Path, source: str) -> Lock:
    constraints: list[str] = []
    lines = list(_requirements(path, constraints, (path.resolve(),)))
    files = {venv.REQUIREMENTS: "".join(f"{line}\n" for line in lines)}
    if constraints:
        files[venv.CONSTRAINTS] = "".join(f"{line}\n" for line in constraints)
    return Lock(source, venv.PIP, files)


def _requirements(path: Path, constraints: list[str], within: tuple[Path, ...]) -> Iterator[str]:
    """The lines of a requirements file with those of the files that it names in their place; paths become absolute.

    Those of constraints are added to `constraints`; `within` are the files that are read.
    """
    for number, line in _lines(path.read_text(encoding="utf-8-sig")):
        option, value = _option(line)
        if option in ("-r", "--requirement", "-c", "--constraint"):
            if re.match(r"[a-z]+://", value):
                raise UsageError(f"{path} line {number}: {line}: what is at a URL changes unseen; save it as a file")
            file = (path.parent / value).resolve()
            if file in within:
                raise UsageError(f"{path} line {number}: {line}: that file is being read already")
            if not file.is_file():
                raise UsageError(f"{path} line {number}: {line}: no such file")
            nested = _requirements(file, constraints, (*within, file))
            if option in ("-r", "--requirement"):
                yield from nested
            else:
                constraints.extend(nested)
        elif option in ("-e", "--editable", "-f", "--find-links") and (value == "." or value.startswith(_PATHS)):
            yield f"{option} {_absolute(path, value)}"
        elif _is_path(line):
            yield _absolute(path, line)
        elif option in ("-i", "--index-url", "--extra-index-url") and re.match(r"[a-z]+://[^/@]+@", value):
            raise UsageError(
                f"{path} line {number}: {option} has a password or a token, which would be written on every node: put "
                "it into the ~/.netrc of the nodes"
            )
        else:
            yield line


def _is_path(line: str) -> bool:
    if line.startswith(("-", "/")) or "://" in line or "@" in line:
        return False
    return line == "." or line.startswith(_PATHS) or "/" in line or line.endswith(".whl")


def _absolute(path: Path, value: str) -> str:
    return str((path.parent / Path(value).expanduser()).resolve())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that say something, with their numbers; those that end with a backslash go on, as pip reads them."""
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        first = first or number
        if line.endswith("\\") and not line.lstrip().startswith("#"):
            joined += line[:-1].strip() + " "
            continue
        whole = re.sub(r"(^|\s)#.*$", "", joined + line.strip()).strip()
        if whole:
            yield first, whole
        joined, first = "", 0
    if joined.strip():
        yield first, joined.strip()


def _option(line: str) -> tuple[str, str]:
    """An option and its value in a line of requirements, in each of the forms that pip knows; "" for none."""
    if match := re.match(r"(--[a-z-]+)(?:\s*=\s*|\s+)(.*)", line):
        return match[1], match[2].strip()
    if match := re.match(r"(-[a-z])\s*(.*)", line):
        return match[1], match[2].strip()
    return "", ""


# --- environment.yml ----------------------------------------------------------------------------------


def _conda_text(path: Path) -> str:
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("dependencies"), list):
        raise UsageError(f"{path} has no list `dependencies`, as an environment.yml of conda has")
    names = [re.split(r"[\s=<>!~]", str(each).rpartition("::")[2])[0] for each in content["dependencies"]]
    if "python" not in names:
        raise UsageError(f"{path}: its dependencies lack python: add it with its version, such as python=3.11")
    return text


# --- uv.lock ------------------------------------------------------------------------------------------


def _of_uv(path: Path, source: str) -> Lock:
    project = path.with_name("pyproject.toml")
    if not project.is_file():
        raise UsageError(f"--env-from {source} requires the pyproject.toml beside it, which is not there")
    try:
        lock = tomllib.loads(path.read_text(encoding="utf-8"))
        packages = lock.get("package", [])
        sources = [(each["name"], each.get("source", {})) for each in packages]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--env-from {source} is no lock of uv: {error}") from None
    for name, where in sources:
        kind = next((kind for kind in ("path", "directory") if kind in where), None)
        if kind and where[kind] != ".":
            raise UsageError(
                f"--env-from {source}: {name} comes from {where[kind]} on this machine, which nodes have not: publish "
                "it to an index, or make it a member of the workspace, whose code goes with --sync"
            )
    argv = [*_uv(), "export", "--frozen", "--no-emit-workspace", "--no-header", "--no-annotate", "--quiet"]
    outcome = process.run(
        [*argv, "--format", "requirements-txt"], timeout_s=_EXPORT_S, cwd=str(path.parent), env=pip.settings()
    )
    if outcome.rc:
        raise UsageError(f"--env-from {source}: uv cannot read it: {outcome.last_line}")
    indexes = {str(where["registry"]): None for _, where in sources if "registry" in where}
    text = "".join(f"--extra-index-url {url}\n" for url in indexes if not _PYPI.fullmatch(url) and "://" in url)
    oldest = re.search(r">=\s*(\d+\.\d+)", str(lock.get("requires-python", "")))
    return Lock(source, venv.PIP, {venv.REQUIREMENTS: text + outcome.stdout}, oldest[1] if oldest else "")


def _uv() -> list[str]:
    """The command uv on this machine, which pip installs beside the cache where there is none.

    Raises InfrastructureError where pip cannot.
    """
    if program := shutil.which("uv"):
        return [program]
    folder = cache_dir() / "uv"
    program = str(folder / "bin" / "uv")
    with alone(folder):
        if not Path(program).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            env = pip.settings()
            process.run(
                [sys.executable, "-m", "venv", "--without-pip", str(folder)], timeout_s=_UV_S, env=env, check=True
            )
            if reason := pip.install(folder, ["uv"], env, lambda done, total, step: None):
                shutil.rmtree(folder, ignore_errors=True)
                raise InfrastructureError(f"a uv.lock requires uv, which pip cannot install: {reason}: install uv")
    return [program]
