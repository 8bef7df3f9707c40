"""Cells over local and ssh agents: sending data, conversing, sweeping, gathering, cleaning up."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.failures import Problem
from runner.launch import copy, stores
from runner.launch.slurm.ledger import Ledger
from runner.launch.talk import AGENT, COMMANDS, AgentSession, ask, converse
from runner.launch.watch import CellContext, CellRun
from runner.node import leftovers
from runner.node.protocol import GRACE_S, PATIENCE_S
from runner.node.requests import CellRequest, CleanRequest, SweepRequest
from runner.plan.engines.registry import ENGINES
from runner.plan.plan import Cell, Plan, job, rank_environment
from runner.results.celldir import LAUNCHER
from runner.results.rundir import RunDir
from runner.system import process
from runner.system.files import write_text_atomic

SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
# What belongs to the user and not to a run either: to whom metrics are sent, and whether.
_OF_USER = ("WANDB_ENTITY", "WANDB_BASE_URL", "WANDB_MODE")


def cell_fields(plan: Plan, cell: Cell) -> dict[str, Any]:
    """The fields that `CellRequest` and `StepRequest` of a cell have in common."""
    return {
        "run_id": plan.run_id,
        "cell": cell.id,
        "attempt": cell.attempt,
        "marker": process.cell_marker(plan.run_id, cell.id),
        "profile": cell.profile,
        "modules": list(plan.nodes[0].modules),
    }


def secrets(cells: Iterable[Cell]) -> dict[str, str]:
    """The user's tokens from the environment, whose they are, and new ones for the engines of `cells`, by name.

    They are sent beside a plan and never part of it.
    """
    cells = list(cells)
    own = {name for cell in cells for name in ENGINES[cell.engine].secrets}
    passed = [name for cell in cells for name in cell.params.get("env_pass", ())]
    return {key: os.environ[key] for key in (*SECRETS, *_OF_USER, *passed) if key in os.environ} | {
        name: token_hex(32) for name in sorted(own)
    }


def gather(
    run: RunDir, plan: Plan, cell: Cell, ssh_config: str | None, silent: Collection[str] = ()
) -> dict[str, Problem]:
    """Fetch a cell's folder from each of its nodes over ssh; returns failures by node. `silent` as in `copy.gather`."""
    targets = {}
    for host in cell.hosts:
        folder = run.cell(host, cell.id)
        folder.create()
        targets[host] = str(folder.path)
    nodes = [plan.node(host) for host in cell.hosts]
    return copy.gather(nodes, str(ssh_config), cell.cell_dir, targets, silent=silent)


def clean(plan: Plan, nodes: Sequence[Node], ssh_config: str | None) -> None:
    """Remove the run's files from `nodes` over ssh."""
    ask(nodes, "ssh", ssh_config, CleanRequest(plan.nodes[0].scratch, plan.run_id), timeout_s=15)


class Agents:
    """The transport of backends without a scheduler: one agent per node and cell, each connected to this process."""

    shared = False

    def __init__(self, run: RunDir, ssh_config: str | None) -> None:
        self.run, self.ssh_config = run, ssh_config
        self._silent: frozenset[str] = frozenset()  # the nodes that did not answer at the end of the last cell

    @staticmethod
    def _remote(plan: Plan) -> bool:
        return BACKENDS[plan.backend].remote

    def refuse(self, plan: Plan, cells: Sequence[Cell]) -> None:
        """Raises nothing: the preflight has found what nodes lack."""

    def together(self, plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
        """The first cell: each is started alone."""
        return list(cells[:1])

    def exclude(self, plan: Plan, host: str) -> Plan:
        """The plan unchanged: no scheduler chooses nodes."""
        return plan

    def adopt(self, plan: Plan, cell: Cell, entry: Mapping[str, Any], ledger: Ledger) -> bool:
        """False: no cell has a job."""
        return False

    def cancel(self, plan: Plan, job_ids: set[str] | None, *, patient: bool) -> bool:
        """True: nothing continues without this controller."""
        return True

    def send(self, plan: Plan, nodes: Sequence[Node], data: str, stopped: Callable[[], bool]) -> dict[str, Problem]:
        """Copy prepared data to each node; rsync skips what is there already. Returns failures by node."""
        if not self._remote(plan):
            return {}
        return copy.send(nodes, str(self.ssh_config), data, self.data_on_nodes(plan, data), stopped=stopped)

    def store(
        self,
        plan: Plan,
        nodes: Sequence[Node],
        part: stores.Part,
        note: Callable[[str], object],
        stopped: Callable[[], bool],
    ) -> dict[str, Problem]:
        """See that each node has a folder of the user whole; returns failures by node."""
        if not self._remote(plan):
            return {}
        return stores.send(part, nodes, str(self.ssh_config), note, stopped)

    def data_on_nodes(self, plan: Plan, data: str) -> str:
        """The path on the nodes of the data that is in the folder `data` here."""
        return f"{plan.nodes[0].scratch}/data/{Path(data).name}" if self._remote(plan) else data

    def converse(self, plan: Plan, cell: Cell, watch: CellRun, data: str | None, context: CellContext) -> None:
        """Run the cell to its end; `watch` receives messages and decides what is sent. No process is left running."""
        self._silent = frozenset()
        watch.sessions = self._sessions(plan, cell, data, watch.held)
        watch.begin()
        try:
            converse(watch.sessions, watch.receive, watch.next_word, patience_s=PATIENCE_S)
        finally:
            self._sweep(plan, cell, [session for session in watch.sessions if session.name not in watch.outcomes])

    def _sessions(self, plan: Plan, cell: Cell, data: str | None, held: bool) -> list[AgentSession]:
        common = cell_fields(plan, cell)
        command = COMMANDS[plan.backend]
        tokens = secrets([cell])
        sessions = []
        for index, host in enumerate(cell.hosts):
            node = plan.node(host)
            request = CellRequest(
                **common,
                host=host,
                scratch=node.scratch,
                cell_dir=cell.cell_dir,
                job={**job(plan, cell, node, data), "held": held},
                argv=cell.launch.argv[index],
                env=rank_environment(cell, node),
                secrets=tokens,
                rendezvous_port=cell.master_port if index == 0 else None,
            )
            sessions.append(AgentSession(host, command(node, AGENT, self.ssh_config), request.to_json()))
        if cell.launch.head:
            folder = self.run.launcher(cell.id).path
            folder.mkdir(mode=0o700, parents=True)
            for name, content in cell.launch.files.items():
                write_text_atomic(folder / name, content)
            request = CellRequest(
                **common,
                host=LAUNCHER,
                scratch=None,
                cell_dir=str(folder),
                argv=[shutil.which(cell.launch.head[0]) or cell.launch.head[0], *cell.launch.head[1:]],
                env=cell.launch.head_env,
                isolated=True,
                hold=True,
            )
            # This machine's own Python: what nodes have at the path of theirs need not be here. The program is the one
            # whose version was compared with the nodes', whatever else lies beside this Python.
            sessions.append(AgentSession(LAUNCHER, [sys.executable, *AGENT], request.to_json()))
        return sessions

    def _sweep(self, plan: Plan, cell: Cell, lost: Sequence[AgentSession]) -> None:
        """End the processes that a killed agent left on its node; a node that is down does not answer."""
        marker = process.cell_marker(plan.run_id, cell.id)
        for session in lost:
            if not self._remote(plan) or session.name == LAUNCHER:
                leftovers.remove(marker, GRACE_S)
        nodes = [plan.node(session.name) for session in lost if session.name != LAUNCHER]
        if nodes and self._remote(plan):
            failures = ask(nodes, plan.backend, self.ssh_config, SweepRequest(marker), timeout_s=15)[1]
            self._silent = frozenset(failures)

    def gather(self, plan: Plan, cell: Cell) -> dict[str, Problem]:
        """Copy the artefacts of a cell into the run directory; returns failures by node."""
        if not self._remote(plan):
            return {}
        return gather(self.run, plan, cell, self.ssh_config, self._silent)

    def clean(self, plan: Plan, nodes: Sequence[Node]) -> None:
        """Remove the gathered artefacts from `nodes`."""
        if self._remote(plan):
            clean(plan, nodes, self.ssh_config)
