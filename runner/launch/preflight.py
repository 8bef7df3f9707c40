"""Before anything starts: what nodes say of themselves, who may take part, and what carries cells to them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from runner import __version__
from runner.cluster import facts
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.errors import InfrastructureError
from runner.failures import Problem, node_lines
from runner.launch import blame, talk
from runner.launch.agents import Agents
from runner.launch.slurm import allocations, commands
from runner.launch.slurm.allocations import Allocations
from runner.launch.transport import Transport
from runner.node import check
from runner.node.protocol import SILENCE_S, Checked, CheckRequest
from runner.plan.engines.registry import ENGINES
from runner.plan.plan import CELL_ENV
from runner.results.rundir import RunDir
from runner.system.nodeset import fold
from runner.system.wording import are, counted
from runner.workloads.registry import TESTS

# How long agents whose controller was killed may take to notice and to leave their node.
OWN_S = SILENCE_S + 15

Problems = Mapping[str, Sequence[Problem]]  # by a node's name; good ones are left out


@dataclass(frozen=True)
class Answers:
    """What nodes say before anything starts: what is wrong with each, and what each is now."""

    problems: Problems
    environments: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Reach:
    """How a run's nodes are asked and reached. `own` is a run that may be just about to leave them."""

    backend: str
    device: str
    engine: str
    tests: Sequence[str]
    ssh_config: str | None
    cluster: commands.SlurmClient | None = None
    own: str = ""

    def ask(self, nodes: Sequence[Node]) -> Answers:
        """What would stop a cell on any of `nodes`, asked of all at once."""
        if self.cluster is not None:
            found = allocations.problems(self.cluster, nodes)
            return Answers({name: [problem] for name, problem in found.items()}, {})
        return ask_agents(nodes, checks(nodes[0], self.device, self.engine, self.tests), self.ssh_config, self.own)

    def transport(self, run: RunDir, first: Node, expected: Mapping[str, str | None]) -> Transport:
        """What carries a cell to its nodes. Under Slurm, `expected` is the environment that must be found there."""
        if self.cluster is None:
            return Agents(run, self.ssh_config)
        wanted = checks(first, self.device, self.engine, self.tests)
        return Allocations(run, self.ssh_config, self.cluster, wanted, expected)


def ask_agents(nodes: Sequence[Node], wanted: CheckRequest, ssh_config: str | None, own: str = "") -> Answers:
    """Ask the agents of all nodes, at once, for whatever would stop a cell, and for what each node is."""
    backend = nodes[0].backend
    by_name = {n.name: n for n in nodes}
    deadline = time.monotonic() + OWN_S
    while True:
        asked = time.time()
        if not BACKENDS[backend].remote:  # this process is on the node already
            answers = {nodes[0].name: check.check(wanted)}
            failures: dict[str, Problem] = {}
        else:
            found, failures = talk.ask(nodes, backend, ssh_config, wanted)
            answers = {name: answer for name, answer in found.items() if isinstance(answer, Checked)}
        heard = time.time()
        leaving = own and any(f"in use by run {own}" in p for answer in answers.values() for p in answer.problems)
        if not leaving or time.monotonic() > deadline:
            break
        time.sleep(1)
    problems = {name: [failure] for name, failure in failures.items()}
    environments = {}
    for name, answer in answers.items():
        # It read its clock at some moment in between.
        clock = blame.clock_problem(answer.time_s - min(max(answer.time_s, asked), heard))
        if bad := [*map(Problem, answer.kinds, answer.problems), *([clock] if clock else [])]:
            problems[name] = bad
        added = {**CELL_ENV, **by_name[name].env}
        seen = {**answer.facts, "env": {**answer.facts["env"], **facts.relevant(added)}}
        environments[name] = facts.environment(seen)
    return Answers(problems, environments)


def checks(first: Node, device: str, engine: str, tests: Sequence[str]) -> CheckRequest:
    """What a node must have for these tests."""
    return CheckRequest(
        version=__version__,
        scratch=first.scratch,
        min_free_disk_gib=first.min_free_disk_gib,
        packages=sorted(set(ENGINES[engine].packages).union(*(TESTS[name].packages for name in tests))),
        programs=["rsync"] if BACKENDS[first.backend].by_ssh else [],
        gpus=first.gpus if device == "cuda" else 0,
    )


def bad_nodes(nodes: Sequence[Node], problems: Problems) -> tuple[dict[str, str], ...]:
    """{"host", "alias", "kind", "message"} for each problem of each of `nodes`."""
    return tuple(
        {"host": node.name, "alias": node.alias, **asdict(problem)}
        for node in nodes
        for problem in problems.get(node.name, ())
    )


def refusal(what: str, bad: Sequence[Mapping[str, str]]) -> InfrastructureError:
    """The error that names every bad node at once, for people and for programs."""
    kinds = {one["kind"] for one in bad}
    return InfrastructureError("\n  ".join([what, *node_lines(bad)]), kinds.pop() if len(kinds) == 1 else None, bad)


def choose(
    nodes: Sequence[Node], count: int, problems: Problems, skip_bad: bool
) -> tuple[tuple[Node, ...], tuple[dict[str, str], ...]]:
    """The first `count` nodes, or with `skip_bad` the first good ones and what was passed over and why.

    Raises InfrastructureError naming every bad node at once.
    """
    wanted = nodes if skip_bad else nodes[:count]
    good = tuple(n for n in wanted if n.name not in problems)[:count]
    if len(good) < count:
        hint = "" if skip_bad else "; mend them, or let others take their place with --skip-bad-nodes"
        bad = len(wanted) - len(good)
        what = (
            f"{len(good)} of {counted(len(wanted), 'node')} {are(len(good))} good, {count} wanted"
            if skip_bad
            else f"{bad} of {counted(count, 'node')} {are(bad)} bad"
        )
        raise refusal(f"{what}{hint}", bad_nodes(wanted, problems))
    last = max(wanted.index(n) for n in good)
    return good, bad_nodes(wanted[: last + 1], problems)


def folded(nodes: Sequence[Node]) -> str:
    return f"{counted(len(nodes), 'node')}: {fold([n.alias for n in nodes])} = {fold([n.name for n in nodes])}"
