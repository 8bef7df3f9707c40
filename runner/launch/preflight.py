"""Before anything starts: checks nodes, chooses those to use, and makes the transport to them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from runner import __version__
from runner.cluster import addresses, facts, mpi, nccl, profiles
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.cluster.reasons import setup_command
from runner.errors import InfrastructureError, UsageError
from runner.failures import Problem, node_lines
from runner.launch import blame, talk
from runner.launch.agents import Agents
from runner.launch.slurm import allocations, commands
from runner.launch.slurm.allocations import Allocations
from runner.launch.transport import Transport
from runner.node import check
from runner.node.protocol import SILENCE_S, Checked
from runner.node.requests import CheckRequest, ProfileCheck
from runner.plan.build import engine_of
from runner.plan.engines.registry import ENGINES
from runner.plan.plan import CELL_ENV
from runner.results.rundir import RunDir
from runner.system.files import write_text_atomic
from runner.system.nodeset import fold
from runner.system.wording import are, counted
from runner.workloads.registry import TESTS, usual

# The time that agents whose controller was killed may take to notice and to release their node, in s.
OWN_S = SILENCE_S + 15

Problems = Mapping[str, Sequence[Problem]]  # by a node's name; good ones are left out


@dataclass(frozen=True)
class Answers:
    """The result of checking nodes: the problems of each, the environment of each (property -> value), what role
    nccl_build has built on each, and what NVML calls its first GPU.
    """

    problems: Problems
    environments: Mapping[str, Mapping[str, str]]
    nccl: Mapping[str, nccl.Built] = field(default_factory=dict)
    gpus: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeAccess:
    """Access to a run's nodes: checks them and makes the transport.

    `cluster` is None without Slurm. `own` is a run whose agents may be about to release the nodes. `nccl_root` is the
    folder of the built NCCL that ranks use, None for torch's own. `weights` is the folder on the nodes that ranks load,
    None for random weights and for those of the hub. `nccl_tests` are the programs that ranks run (`rank_programs`).
    `profile` is that of the ranks' Python, "" for the nodes' own. `shared` is a folder that this machine and all nodes
    must see, None if there is none.
    """

    backend: str
    device: str
    engine: str
    tests: Sequence[str]
    ssh_config: str | None
    cluster: commands.SlurmClient | None = None
    own: str = ""
    nccl_root: str | None = None
    weights: str | None = None
    nccl_tests: Sequence[str] = ()
    profile: str = ""
    shared: str | None = None

    def ask(self, nodes: Sequence[Node]) -> Answers:
        """Check all `nodes` at once for what would stop a cell. Raises InfrastructureError if Slurm does not answer."""
        if self.cluster is not None:
            found = allocations.problems(self.cluster, nodes)
            return Answers({name: [problem] for name, problem in found.items()}, {})
        return ask_agents(nodes, self._checks(nodes[0]), self.ssh_config, self.own, self.profile)

    def _checks(self, first: Node) -> CheckRequest:
        request = checks(first, self.device, self.engine, self.tests, self.nccl_root, self.weights, self.nccl_tests)
        proof = shared_proof(Path(self.shared)) if self.shared and BACKENDS[self.backend].remote else {}
        return replace(request, profile=profile_check(first, self.profile), shared=proof)

    def transport(self, run: RunDir, first: Node, expected: Mapping[str, str | None]) -> Transport:
        """The transport to the run's nodes. Under Slurm, `expected` is the environment that must be found there."""
        if self.cluster is None:
            return Agents(run, self.ssh_config)
        return Allocations(run, self.ssh_config, self.cluster, self._checks(first), expected)


def ask_agents(
    nodes: Sequence[Node], request: CheckRequest, ssh_config: str | None, own: str = "", profile: str = ""
) -> Answers:
    """Ask the agents of all nodes, at once, what would stop a cell, and for each node's environment.

    The addresses that each has for the others are compared. Nodes that are still in use by the run `own` are asked
    again for up to OWN_S. Nodes with the Python of `profile` elsewhere than others are asked for it there, after these.
    """
    backend = nodes[0].backend
    by_name = {n.name: n for n in nodes}
    if len(nodes) > 1:
        request = replace(request, names=addresses.names(nodes))
    alike: dict[str, list[Node]] = {}
    for node in nodes:
        alike.setdefault(node.of_profile(profile).python if profile else "", []).append(node)
    deadline = time.monotonic() + OWN_S
    while True:
        asked = time.time()
        if not BACKENDS[backend].remote:  # this process is on the node already
            answers = {nodes[0].name: check.check(request)}
            failures: dict[str, Problem] = {}
        else:
            answers, failures = {}, {}
            for group in alike.values():
                own_request = replace(request, profile=profile_check(group[0], profile))
                found, failed = talk.ask(group, backend, ssh_config, own_request)
                answers |= {name: answer for name, answer in found.items() if isinstance(answer, Checked)}
                failures |= failed
        received = time.time()
        leaving = own and any(f"in use by run {own}" in p for answer in answers.values() for p in answer.problems)
        if not leaving or time.monotonic() > deadline:
            break
        time.sleep(1)
    problems = {name: [failure] for name, failure in failures.items()}
    headed = request.open_mpi and len(nodes) > 1 and BACKENDS[backend].by_ssh
    own_mpi = mpi.version() if headed else None
    for name in by_name.keys() - answers.keys() - failures.keys():
        problems[name] = [Problem("version_mismatch", "its agent answered in a form that this version cannot read")]
    environments = {}
    misled = addresses.wrong(nodes, {name: answer.addresses for name, answer in answers.items()})
    for name, answer in answers.items():
        # The node read its clock at some moment between request and answer.
        clock = blame.clock_problem(answer.time_s - min(max(answer.time_s, asked), received))
        texts = [text.replace(nccl.SETUP, _build_nccl(by_name[name], request.nccl_tests)) for text in answer.problems]
        pairs = zip_longest(answer.kinds, texts, fillvalue="unknown")
        address = [Problem("wrong_address", misled[name])] if name in misled else []
        other = [Problem("version_mismatch", odd)] if (odd := _other_mpi(answer.open_mpi, own_mpi)) else []
        if bad := [*(Problem(kind, text) for kind, text in pairs), *([clock] if clock else []), *address, *other]:
            problems[name] = bad
        added = {**CELL_ENV, **by_name[name].env}
        seen = {**answer.facts, "env": {**answer.facts["env"], **facts.relevant(added)}}
        environments[name] = facts.comparable(seen)
    built = {name: nccl.Built(**told) for name, answer in answers.items() if (told := answer.facts.get("nccl_built"))}
    gpus = {name: answer.facts["gpus"][0]["name"] for name, answer in answers.items() if answer.facts.get("gpus")}
    return Answers(problems, environments, built, gpus)


def _other_mpi(theirs: str | None, own: str | None) -> str | None:
    """Why a node's Open MPI and the controller's do not fit, in one line; None if they do or either is unknown."""
    if theirs is None or own is None or theirs == own:
        return None
    return f"has Open MPI {theirs}, this controller {own}, and its daemon refuses another: install the same on both"


def checks(
    first: Node,
    device: str,
    engine: str,
    tests: Sequence[str],
    nccl_root: str | None = None,
    weights: str | None = None,
    nccl_tests: Sequence[str] = (),
) -> CheckRequest:
    """The request that checks a node for these tests; `first` is any node, as all chosen ones are alike."""
    engines = [ENGINES[engine_of(name, first.backend, engine)] for name in tests]
    return CheckRequest(
        version=__version__,
        scratch=first.scratch,
        min_free_disk_gib=first.min_free_disk_gib,
        packages=sorted({p for one in engines for p in one.packages}.union(*(TESTS[name].packages for name in tests))),
        programs=["rsync"] if BACKENDS[first.backend].by_ssh else [],
        gpus=first.gpus if device == "cuda" else 0,
        nccl_root=nccl_root,
        weights=weights,
        nccl_tests=nccl_tests,
        open_mpi=any(one.mpi and not one.step for one in engines),
        slurm_mpi=any(one.step for one in engines),
        modules=tuple(first.modules),
    )


def profile_check(node: Node, profile: str) -> ProfileCheck | None:
    """What `node` is checked for where ranks run in `profile`; None for its own Python."""
    if not profile:
        return None
    python = node.of_profile(profile).python
    packages = profiles.PACKAGES.get(profile, ())
    if profile not in profiles.LOCKS or not profiles.is_of_setup(profile, python):
        remedy = f"install {', '.join(packages) or 'it'} there, or name another Python with runner_pythons"
        return ProfileCheck(profile, python, remedy, packages=packages)
    command = setup_command(node, "conda_env")
    implied = profile == profiles.ON_CPUS and not BACKENDS[node.backend].remote
    if profile not in (node.profiles or ()) and not (node.profiles is None and implied):
        command += f" --set conda_env_further=[{profile}]"
    return ProfileCheck(profile, python, f"run `{command}`", profiles.locks(profile), packages)


def shared_proof(folder: Path) -> dict[str, str]:
    """A file in `folder` by which nodes prove that they see the folder, and its content, which is nowhere else.

    Raises UsageError where it cannot be written.
    """
    file = folder / ".shakedown-shared"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            own = uuid.uuid4().hex
            made = folder / f"{file.name}.{own}"
            write_text_atomic(made, f"{own}\n")
            with suppress(FileExistsError):  # of two first starts one's is for both: the other may ask nodes for it now
                os.link(made, file)
            made.unlink()
        return {str(file): file.read_text()}
    except OSError as error:
        raise UsageError(f"cannot write to {folder}, which all nodes are to see: {error.strerror}") from None


def readiness(nodes: Sequence[Node], engine: str, ssh_config: str | None) -> Problems:
    """Why `bench` would refuse any of these `nodes`, which may differ, for any test that runs unasked, on `engine`."""
    alike: dict[tuple[Any, ...], list[Node]] = {}
    for node in nodes:
        root = node.nccl_root if node.nccl == nccl.BUILT else None
        key = (node.scratch, node.min_free_disk_gib, node.gpus, node.device, root, tuple(node.modules))
        alike.setdefault(key, []).append(node)
    problems: dict[str, Sequence[Problem]] = {}
    for (*_, root, _), group in alike.items():
        request = checks(group[0], group[0].device, engine, usual(), nccl_root=root)
        problems.update(ask_agents(group, request, ssh_config).problems)
    return problems


def _build_nccl(node: Node, programs: Iterable[str] = ()) -> str:
    """What builds NCCL on `node`, where `programs` are to be; a folder that is not the inventory's was asked for."""
    command = f"run `{setup_command(node, 'nccl_build')}`"
    folders = {str(PurePath(program).parents[2]) for program in programs} - {node.nccl_root}
    return f"{command} with nccl_build_root: {folders.pop()}, or give another --set nccl.root" if folders else command


def built_on_all(nodes: Sequence[Node], built: Mapping[str, nccl.Built]) -> tuple[str | None, str | None]:
    """The folder of the NCCL that all `nodes` have built, and None; or None, and why torch's own is used although
    some node has one (None where no node has).
    """
    have = {node.alias: built[node.name] for node in nodes if node.name in built}
    if not have:
        return None, None
    remedy = _build_nccl(nodes[0])
    if reasons := {each.obstacle: None for each in have.values() if each.obstacle}:
        return None, "; ".join(map(str, reasons)).replace(nccl.SETUP, remedy)
    if lacking := [node.alias for node in nodes if node.alias not in have]:
        return None, f"{fold(lacking)} {'has' if len(lacking) == 1 else 'have'} no built one: {remedy}"
    kinds = {(each.root, each.version) for each in have.values()}
    if len(kinds) == 1:
        return kinds.pop()[0], None
    where = {kind: fold([alias for alias, each in have.items() if (each.root, each.version) == kind]) for kind in kinds}
    told = ", ".join(f"{version} in {root} on {where[root, version]}" for root, version in sorted(kinds))
    return None, f"nodes have built different ones, {told}: {remedy}"


def bad_nodes(nodes: Sequence[Node], problems: Problems) -> tuple[dict[str, str], ...]:
    """{"host", "alias", "kind", "message"} for each problem of each of `nodes`."""
    return tuple(
        {"host": node.name, "alias": node.alias, **asdict(problem)}
        for node in nodes
        for problem in problems.get(node.name, ())
    )


def refusal(what: str, bad: Sequence[Mapping[str, str]]) -> InfrastructureError:
    """The error with the message `what` that names every bad node at once, for people and for programs."""
    kinds = {one["kind"] for one in bad}
    return InfrastructureError("\n  ".join([what, *node_lines(bad)]), kinds.pop() if len(kinds) == 1 else None, bad)


def choose(
    nodes: Sequence[Node], count: int, problems: Problems, skip_bad: bool
) -> tuple[tuple[Node, ...], tuple[dict[str, str], ...]]:
    """The first `count` nodes, or with `skip_bad` the first good ones; and the skipped nodes with their problems.

    Raises InfrastructureError naming every bad node at once.
    """
    candidates = nodes if skip_bad else nodes[:count]
    good = tuple(n for n in candidates if n.name not in problems)[:count]
    if len(good) < count:
        bad = len(candidates) - len(good)
        them = "it" if bad == 1 else "them"
        hint = "" if skip_bad else f"; fix {them}, or use other nodes with --skip-bad-nodes"
        what = (
            f"{len(good)} of {counted(len(candidates), 'node')} {are(len(good))} good, {count} required"
            if skip_bad
            else f"{bad} of {counted(count, 'node')} {are(bad)} bad"
        )
        raise refusal(f"{what}{hint}", bad_nodes(candidates, problems))
    last = max(candidates.index(n) for n in good)
    return good, bad_nodes(candidates[: last + 1], problems)


def folded(nodes: Sequence[Node]) -> str:
    """Nodes as text, by alias and by name: `2 nodes: node[001-002] = gpu[07-08]`."""
    return f"{counted(len(nodes), 'node')}: {fold([n.alias for n in nodes])} = {fold([n.name for n in nodes])}"
