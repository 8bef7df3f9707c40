"""Runs without nodes: a stand-in for what carries cells to them, and for the preflight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plans

from runner.cluster import nccl
from runner.cluster.inventory import Inventory, Node
from runner.failures import Problem
from runner.launch import blame, preflight
from runner.launch import run as bench
from runner.launch.agents import Agents
from runner.node.protocol import Outcome
from runner.plan import build, plan
from runner.report.progress import Display
from runner.results.rundir import RunDir

NAMES = [f"fukushimadc-02-hgx-{number:04d}" for number in (1, 2, 3, 4, 5, 6, 7, 9)]


FACTS = {"hostname": "n", "boot_id": "b", "kernel": "6.1", "packages": {"torch": "2.13.0"}, "env": {}}


class Nodes(Agents):
    """A stand-in for the nodes: fails what it is told to fail, and writes what ranks would have written."""

    def __init__(self, run: RunDir, *faults: tuple[str, str, str | None] | dict[str, Any]) -> None:
        super().__init__(run, "/tmp/ssh_config")
        # (part of a cell's id, kind, host or None), or the whole error of the next attempt
        self.faults = [fault for fault in faults if isinstance(fault, tuple)]
        self.errors = [fault for fault in faults if isinstance(fault, dict)]
        self.tried: list[tuple[str, tuple[str, ...], int]] = []
        self.sent: list[str] = []
        self.facts = FACTS

    def adopt(self, planned, cell, entry, ledger):
        return None  # as a Slurm that does not answer

    def data_on_nodes(self, planned, data):
        return data

    def send(self, planned, nodes, data, stopped):
        self.sent += [node.name for node in nodes]
        return {}

    def converse(self, planned, cell, watch, data, context):
        self.tried.append((cell.id, cell.hosts, cell.master_port))
        for host in cell.hosts:
            folder = self.run.cell(host, cell.id).path
            folder.mkdir(parents=True)
            (folder / "facts.json").write_text(json.dumps(self.facts))
            context = {"collective": "all_reduce", "size_bytes": 8}
            value = {"event": "value", "rank": 0, "metric": "busbw_gb_per_s", "value": 1.0, "context": context}
            (folder / "rank0.jsonl").write_text(json.dumps(value) + "\n")
        for number, (part, kind, host) in enumerate(self.faults):
            if part in cell.id and (host is None or host in cell.hosts):
                if host is None:  # once
                    del self.faults[number]
                return blame.error(kind, f"planted {kind}", host)
        if self.errors:
            return self.errors.pop()
        watch.sessions = [ended_session(host) for host in cell.hosts]
        watch.outcomes = {host: Outcome(rc=0) for host in cell.hosts}
        return None

    def gather(self, planned, cell):
        return {}

    def clean(self, planned, nodes):
        pass


def ended_session(host: str):
    from runner.launch.talk import AgentSession

    return AgentSession(host, (), {}, rc=0)


class NodeAccess:
    """A stand-in for the preflight: says which nodes are no good, and what `built` of NCCL all have."""

    def __init__(self, built: nccl.Built | None = None, **problems: Problem) -> None:
        self.built, self.problems = built, problems

    def ask(self, nodes: Sequence[Node]) -> preflight.Answers:
        found = {node.name: [self.problems[node.alias]] for node in nodes if node.alias in self.problems}
        return preflight.Answers(found, {}, {node.name: self.built for node in nodes if self.built})


def planned(cluster: Inventory, tmp_path: Path, counts=(2,), spares: int = 0, **changes) -> plan.Plan:
    asked = plans.request(
        cluster,
        node_counts=counts,
        run_dir=str(tmp_path / "20260102-030405-abcd"),
        tests={"torch": plan_settings()},
        spares=spares > 0,
        **changes,
    )
    return build.build(asked, cluster.nodes[: max(counts) + spares])


def plan_settings() -> dict:
    from runner.plan import config

    return config.load_test("torch", {}).model_dump()


def carry_out(
    built: plan.Plan, *faults, retries: int = 0, replace_bad: bool = False, access: NodeAccess | None = None, bad=None
) -> tuple[Nodes, dict, plan.Plan]:
    run = RunDir(Path(built.run_dir))
    if not run.plan.exists():
        RunDir.create(run.path.parent, built.to_dict())
    nodes = Nodes(run, *faults)
    policy = bench.Policy(retries, replace_bad)
    carried = bench.Run(built, run, nodes, Display(quiet=True), None, policy, access or NodeAccess())
    carried.stop.wait = lambda seconds: None  # nobody waits in a test
    carried.execute(bad or {})
    return nodes, run.read_status(), plan.Plan.from_dict(run.read_plan())


def states(status: dict) -> dict[str, str]:
    return {cell: entry["state"] for cell, entry in status["cells"].items()}


def missing(run: RunDir, cell: str, kind: str = "hung") -> None:
    status = run.read_status()
    status["cells"][cell].update(state="incomplete", error=blame.error(kind, "planted"))
    run.write_status(status)
