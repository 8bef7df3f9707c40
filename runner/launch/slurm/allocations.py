"""Runs cells as Slurm jobs: renders, submits, waits, follows, gathers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.cluster import slurm as slurm_settings
from runner.cluster import slurm_names
from runner.cluster.inventory import Node, by_word
from runner.errors import InfrastructureError, UsageError, unknown
from runner.failures import Problem
from runner.launch import agents, blame, copy, stores
from runner.launch.slurm import answers, commands, job_log
from runner.launch.slurm import follow as following
from runner.launch.slurm.capacity import Partition, SlurmNode, memory, node_kind, refused
from runner.launch.slurm.ledger import JobShare, Ledger
from runner.launch.slurm.script import STARTUP_S, BatchJob, Step, cells_of, render
from runner.launch.talk import AgentSession
from runner.launch.watch import CellContext, CellRun
from runner.node import slurm_step
from runner.node.protocol import Stopped
from runner.node.requests import CheckRequest, StepRequest
from runner.plan.engines.registry import ENGINES
from runner.plan.plan import Cell, Plan, job, rank_environment
from runner.results.rundir import RunDir
from runner.results.status import joined
from runner.system import process
from runner.system.files import write_text_atomic

END_S = 45.0  # Slurm's KillWait is 30 s
DRAIN_S = 3.0  # Slurm 24.11 cancels a job before it drains the node whose prolog failed


def settings_of(plan: Plan) -> slurm_settings.Settings:
    """Slurm's settings in the plan. Raises UsageError for wrong ones."""
    return slurm_settings.settings(dict(plan.slurm or {}), f"slurm of run {plan.run_id}")


def slurm_name(node: Node, known: Sequence[str]) -> str:
    """Slurm's name of the node, one of `known` if possible: its name, the first word of that, or its alias.

    The alias comes last: it is a position in the inventory, which Slurm may have as another node's name.
    """
    return next((word for word in _words(node) if word in known), node.alias)


def _words(node: Node) -> tuple[str, ...]:
    return node.name, node.name.partition(".")[0], node.alias


def cluster(settings: slurm_settings.Settings, nodes: Sequence[Node], ssh_config: str | None) -> commands.SlurmClient:
    """The client for Slurm's commands, here or on the login node of the settings.

    Raises UsageError if that is not one of `nodes`.
    """
    login = None
    if settings.login is not None:
        login = by_word(nodes).get(settings.login)
        if login is None:
            raise unknown("host", settings.login, [node.name for node in nodes], "slurm.login")
    return commands.SlurmClient(settings, login, ssh_config)


def problems(cluster: commands.SlurmClient, nodes: Sequence[Node]) -> dict[str, Problem]:
    """Why Slurm would not use each of `nodes`, by name; only nodes with a problem."""
    known = {node.name: node for node in cluster.look()[1]}
    found = {}
    for node in nodes:
        seen = known.get(slurm_name(node, tuple(known)))
        if seen is None:
            found[node.name] = Problem("not_in_slurm", "Slurm does not know it")
        elif not seen.usable:
            text = f"Slurm says {seen.state}" + (f" ({seen.reason})" if seen.reason else "")
            found[node.name] = Problem(node_kind(seen.reason), text)
    return found


def with_slurm_state(error: Mapping[str, Any], found: Mapping[str, Problem]) -> dict[str, Any]:
    """`error` with the problems of its nodes in its message: a single bad node becomes its host, and its kind is
    prolog_failed if all problems are. A job that was cancelled with its nodes was not by the user.
    """
    kinds = {one.kind for one in found.values()}
    if kinds == {"prolog_failed"} or (kinds and error["kind"] == "job_cancelled"):
        error = {**error, "kind": "prolog_failed" if kinds == {"prolog_failed"} else "node_failed"}
    return {
        **error,
        "host": next(iter(found)) if len(found) == 1 else error["host"],
        "message": "; ".join([error["message"], *(f"{host}: {one.message}" for host, one in found.items())]),
    }


def together(plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
    """Those of `cells` that share the job of the first one: all cells in one allocation; in an array those with the
    same number of nodes, and the same nodes if these are named.
    """
    if plan.job_array:
        return [cell for cell in cells if _shape(plan, cell) == _shape(plan, cells[0])]
    return list(cells) if plan.one_allocation else [cells[0]]


def _shape(plan: Plan, cell: Cell) -> tuple[int, tuple[str, ...]]:
    return cell.num_nodes, cell.hosts if plan.named else ()


class Allocations:
    """One job per cell, one array per number of nodes, or one job for all.

    Slurm owns the job, so another controller can follow it if this one dies.
    """

    def __init__(
        self,
        run: RunDir,
        ssh_config: str | None,
        cluster: commands.SlurmClient,
        checks: CheckRequest | None,
        expected: Mapping[str, str | None],
    ) -> None:
        self.run, self.ssh_config, self.cluster, self.checks, self.expected = run, ssh_config, cluster, checks, expected
        self.shared = cluster.settings.sees_files
        self._seen: tuple[list[Partition], list[SlurmNode]] | None = None

    # --- before anything starts ---------------------------------------------------------------------

    def refuse(self, plan: Plan, cells: Sequence[Cell]) -> None:
        """Raise, with every reason, for cells that Slurm could never start, before anything is submitted.

        UsageError for a wrong request, InfrastructureError where only nodes that are down prevent it.
        """
        settings = self.settings(plan)
        if wanted := tuple(plan.nodes[0].modules):
            self.cluster.require_modules(wanted)
        partitions, nodes = self._look()
        largest = max(cells, key=lambda cell: cell.num_nodes)
        first = [largest, *(cell for cell in cells if cell is not largest)]
        ready = self.job(plan, "shakedown-test", together(plan, first), None)
        found, wrong = refused(ready, settings, partitions, nodes)
        if found:
            text = "\n  ".join(["Slurm cannot start this:", *found])
            raise UsageError(text) if wrong else InfrastructureError(text, "not_started")
        if why := self.cluster.test_only(render(ready, settings)):
            raise UsageError(f"Slurm refuses this: {why}")

    def together(self, plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
        """Those of `cells` that share the job of the first one."""
        return together(plan, cells)

    # --- data ---------------------------------------------------------------------------------------

    def send(self, plan: Plan, nodes: Sequence[Node], data: str, stopped: Callable[[], bool]) -> dict[str, Problem]:
        """Copy prepared data to a folder that every node sees, or to each node. Returns failures by node.

        Raises InfrastructureError if that folder cannot be written.
        """
        target = self.data_on_nodes(plan, data)
        if not self.shared:
            return copy.send(nodes, str(self.ssh_config), data, target, stopped=stopped)
        Path(target).mkdir(mode=0o700, parents=True, exist_ok=True)
        outcome = process.run(["rsync", "-a", "-s", f"{data}/", f"{target}/"], timeout_s=1800)
        if outcome.rc:
            raise InfrastructureError(f"the data cannot be copied to {target}: {outcome.last_line}")
        return {}

    def store(
        self,
        plan: Plan,
        nodes: Sequence[Node],
        part: stores.Part,
        note: Callable[[str], object],
        stopped: Callable[[], bool],
    ) -> dict[str, Problem]:
        """See that each node has a folder of the user whole, or one that every node sees; returns failures by node.

        Raises InfrastructureError if that folder cannot be written.
        """
        if not self.shared:
            return stores.send(part, nodes, str(self.ssh_config), note, stopped)
        stores.send_here(part, note)
        return {}

    def data_on_nodes(self, plan: Plan, data: str) -> str:
        """The path on the nodes of the data that is in the folder `data` here."""
        folder = self.run.path.parent / ".data" if self.shared else Path(plan.nodes[0].scratch, "data")
        return str(folder / Path(data).name)

    # --- one cell -----------------------------------------------------------------------------------

    def converse(
        self, plan: Plan, cell: Cell, watch: CellRun, data: str | None, context: CellContext
    ) -> dict[str, Any] | None:
        """Run the cell to its end; `watch` receives messages and decides what is sent.

        Returns the error if Slurm caused one, else None.

        A job that an earlier controller submitted is followed from its beginning.
        """
        try:
            job_id, step, script = self._submit(plan, cell, data, context)
            info = following.wait(self.cluster, job_id, context.on_job, stopped=lambda: watch.stop.asked)
            every = [self._node(plan, name) for name in info.nodes]
        except commands.NotStarted as error:
            return self._not_started(cell, str(error), plan)
        except commands.SlurmUnreachable as error:
            return blame.error("slurm_unreachable", str(error))
        except InfrastructureError as error:  # sbatch now refuses what it accepted at the beginning
            return blame.error("not_started", str(error))
        context.on_job(info)
        if not info.nodes:  # cancelled while it waited, or forgotten
            return None if watch.stop.asked else self._fault(info, watch, plan)
        placed = every[: cell.num_nodes]
        share = context.ledger.share(cell.id)
        asked = share.hosts if share else cell.hosts  # since then the cell may have moved
        if asked and {node.name for node in every} >= set(asked):
            placed = [plan.node(name) for name in asked]
        watch.cell = context.on_placed(placed)
        watch.sessions = [AgentSession(node.name, (), {}) for node in placed]
        watch.begin(STARTUP_S)
        log = log_path(plan, script.stem, self.shared, job_id)
        follow = following.Follow(
            slurm=self.cluster,
            job_id=job_id,
            folders={node.name: self.run.cell(node.name, cell.id) for node in placed},
            step=step,
            cell=cell.id,
            source=None if self.shared else cell.cell_dir,
            nodes=() if self.shared else placed,
            ssh_config=self.ssh_config,
            log=Path(log) if self.shared else self.run.path / "slurm" / Path(log).name,
            log_on=None if self.shared else (every[0], log),
            names=dict(zip((node.name for node in every), info.nodes, strict=True)),
            on_job=context.on_job,
        )
        try:
            info = following.converse(follow, watch.sessions, watch.receive, watch.next_word, patience_s=END_S)
        except InfrastructureError as error:
            return blame.error("slurm_unreachable", str(error))
        if watch.stop.asked:
            return None
        said = following.last_lines(follow.log)
        return self._fault(
            info, watch, plan, job_log.of_cell(said, cell.id) if share and share.step is not None else said
        )

    def cancel(self, plan: Plan, job_ids: set[str] | None, *, patient: bool) -> bool:
        """Cancel these jobs of the run, or all (None); returns whether Slurm answered. `patient`: retry if not."""
        try:
            chosen = None if job_ids is None else {answers.whole(job_id) for job_id in job_ids}
            for job_id in self.cluster.of_run(plan.run_id):  # ids are reused, names are not
                if chosen is None or job_id in chosen:
                    with following.cancelled_on_interrupt(self.cluster, job_id):
                        self.cluster.cancel(job_id, patient=patient)
        except InfrastructureError:
            return False
        return True

    def adopt(self, plan: Plan, cell: Cell, entry: Mapping[str, Any], ledger: Ledger) -> bool | None:
        """Whether the cell has a job, searched for by name if its id is not known; None if Slurm does not answer.

        `ledger` is updated with what was found.
        """
        try:
            return self._find(plan, cell, entry, ledger)
        except commands.SlurmUnreachable:
            return None

    def _find(self, plan: Plan, cell: Cell, entry: Mapping[str, Any], ledger: Ledger) -> bool:
        """Whether the cell has a job; one whose id was never received is searched for by its name.

        Its cells are then recorded in `ledger`, or removed if there is no such job. Raises SlurmUnreachable.
        """
        share = ledger.share(cell.id)
        if share.job_id if share else (entry["job"] or {}).get("id"):
            return True
        name = share.name if share else job_name(plan, cell, entry["attempt"])
        path = self.run.slurm(name)
        found = self.cluster.find(name) if path.exists() else None
        if found is None:
            ledger.drop(ledger.submitted_as(name))
            return False
        cells = {each.id: each for each in plan.cells}
        for number, each in enumerate(cells_of(path.read_text())):
            other = ledger.share(each)
            if other is None or other.name == name:  # else it has another job
                ledger.note({each: _share(plan, cells[each], name, found, number)})
        return True

    def _submit(self, plan: Plan, cell: Cell, data: str | None, context: CellContext) -> tuple[str, int | None, Path]:
        """The id of the cell's job, submitted now unless it was already, its step in that, and the sbatch file."""
        ledger = context.ledger
        name = job_name(plan, cell, context.entry["attempt"])
        if not self._find(plan, cell, context.entry, ledger):
            self._submit_job(plan, name, context.pending or [cell], data, context)
        known = (context.entry["job"] or {}).get("id")
        share = ledger.share(cell.id) or JobShare(known, None, name)
        assert share.job_id is not None
        if share.job_id != known:  # recorded before the next query to Slurm
            context.on_job(answers.JobInfo(share.job_id, share.name, "waiting", "PENDING", "", (), None))
        self._submit_behind(plan, share, data, context)
        return share.job_id, share.step, self.run.slurm(share.name)

    def _submit_job(
        self,
        plan: Plan,
        name: str,
        cells: Sequence[Cell],
        data: str | None,
        context: CellContext,
        after: str | None = None,
    ) -> None:
        """Submit `cells` as one job, which waits for the job `after`; its id is recorded.

        Raises SlurmUnreachable, and InfrastructureError if Slurm refuses it.
        """
        ledger = context.ledger
        script = render(self.job(plan, name, cells, data, after), self.settings(plan))
        path = self.run.slurm(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text_atomic(path, script)
        # Until Slurm answers, these cells must not be submitted again.
        ledger.note({each.id: JobShare(None, None, name, each.hosts) for each in cells})
        context.record()
        try:
            job_id = self.cluster.submit(script, agents.secrets(cells))
        except commands.SlurmUnreachable:
            raise
        except InfrastructureError:  # refused
            ledger.drop(each.id for each in cells)
            raise
        ledger.note({each.id: _share(plan, each, name, job_id, number) for number, each in enumerate(cells)})
        context.record()

    def _submit_behind(self, plan: Plan, share: JobShare, data: str | None, context: CellContext) -> None:
        """Submit the cells of a chain that come after that of `share`, each job after the one before: so they run
        whatever becomes of this controller. A cell that cannot be submitted now is when its turn comes.
        """
        ledger, after = context.ledger, share.job_id
        with suppress(InfrastructureError), following.cancelled_on_interrupt(self.cluster, str(share.job_id)):
            for cell in context.behind:
                if not ledger.has(cell.id) and after:
                    without = [each for each in context.behind if not ledger.has(each.id)]
                    name = f"{job_name(plan, cell, cell.attempt)}-behind-{after}"
                    self._submit_job(plan, name, together(plan, without), data, context, after)
                found = ledger.share(cell.id)
                after = found.job_id if found else None

    def job(self, plan: Plan, name: str, cells: Sequence[Cell], data: str | None, after: str | None = None) -> BatchJob:
        """The job `name` of `cells`, with Slurm's names of nodes, which waits for the job `after`. Raises
        SlurmUnreachable.
        """
        names = self._slurm_names()
        return prepare(plan, name, cells, data, self.shared, names, self.checks, self.expected, after)

    def settings(self, plan: Plan) -> slurm_settings.Settings:
        """The settings with the nodes that the plan excludes now, and the memory that a job may ask for.

        Raises SlurmUnreachable.
        """
        own = self.cluster.settings
        found = {"exclude": tuple((plan.slurm or {}).get("exclude", ())), "mem": memory(own, *self._look())}
        return own.model_copy(update=found)

    def exclude(self, plan: Plan, host: str) -> Plan:
        """The plan with `host` among the nodes that Slurm may not choose."""
        settings = dict(plan.slurm or {})
        name = slurm_name(plan.node(host), self._slurm_names())
        return replace(plan, slurm={**settings, "exclude": [*settings.get("exclude", ()), name]})

    def _slurm_names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self._look()[1])

    def _look(self) -> tuple[list[Partition], list[SlurmNode]]:
        """Slurm's partitions and nodes as they were when they were first asked for."""
        if self._seen is None:
            self._seen = self.cluster.look()
        return self._seen

    def _node(self, plan: Plan, name: str) -> Node:
        """The inventory's node with the name `name` in Slurm; a copy of the first node if the inventory has none."""
        for node in (*plan.nodes, *plan.spares):
            if name in _words(node) and slurm_name(node, self._slurm_names()) == name:
                return node
        return replace(plan.nodes[0], name=name, alias=name, address=name)

    # --- what became of it --------------------------------------------------------------------------

    def _fault(
        self, info: answers.JobInfo, watch: CellRun, plan: Plan, log: Sequence[str] = ()
    ) -> dict[str, Any] | None:
        """The error if Slurm is the reason why the cell failed, else None. `log` is the output of its job."""
        causes = {
            "time_limit": ("time_limit", "reached its time limit"),
            "cancelled": ("job_cancelled", f"was cancelled ({info.raw})"),
            "node_failed": ("node_failed", "lost a node"),
            "preempted": ("preempted", "was preempted"),
            "out_of_memory": ("out_of_memory", "ran out of memory"),
        }
        silent = [session.name for session in watch.sessions if session.name not in watch.outcomes]
        stderr = list(log) or next((session.stderr for session in watch.sessions if session.stderr), [])
        if unstarted := self._unstarted(info, watch, plan, stderr):
            return unstarted
        if any(outcome.stopped == Stopped.TIME_LIMIT for outcome in watch.outcomes.values()):
            kind, message = causes["time_limit"]
        elif info.state in causes and watch.reason is None:
            kind, message = causes[info.state]
        elif info.state == "waiting":  # its start has failed, and it was to wait until somebody releases it
            kind, message = "not_started", f"was held and cancelled: {info.reason}"
        elif not watch.outcomes and info.state in ("failed", "unknown", "complete", "ending"):
            forgotten = "is not known to Slurm any more: cancelled while it waited, or it ended long ago"
            kind, message = "not_started", f"ended as {info.raw} before any node answered" if info.raw else forgotten
        else:
            return None
        host = silent[0] if kind in ("node_failed", "out_of_memory") and len(silent) == 1 else None
        error = blame.error(kind, f"job {info.job_id} {message}", host, stderr)
        # Slurm itself cancels a job that is not to be requeued if a prolog fails before anything has started.
        if kind in ("node_failed", "not_started") or (kind == "job_cancelled" and not watch.outcomes):
            nodes = [
                node for node in (self._node(plan, name) for name in info.nodes) if node.name not in watch.outcomes
            ]
            if len(info.nodes) < watch.cell.num_nodes:  # it has also taken the node that it drained out of the job
                nodes = self._were_usable(plan)
            return self._with_slurm_state(error, nodes, DRAIN_S if kind == "job_cancelled" else 0)
        return error

    def _unstarted(
        self, info: answers.JobInfo, watch: CellRun, plan: Plan, log: Sequence[str]
    ) -> dict[str, Any] | None:
        """The error of nodes whose agent could not be started, as the job's output says; None if it says nothing."""
        unheard = {session.name for session in watch.sessions if not session.answered} - watch.outcomes.keys()
        errors = []
        for name, one in job_log.unstarted(log).items():
            node = self._node(plan, name)
            if node.name in unheard:
                error = blame.error(one.kind, f"job {info.job_id} cannot start its agent: {one.why}", node.name, log)
                errors.append(self._with_slurm_state(error, [node]))
        return joined(errors) if errors else None

    def _not_started(self, cell: Cell, message: str, plan: Plan) -> dict[str, Any]:
        """The error of a job that was given up before it ran. Where Slurm was to choose the nodes, those that it has
        stopped using since may be the reason.
        """
        nodes = [plan.node(name) for name in cell.hosts] or self._were_usable(plan)
        return self._with_slurm_state(blame.error("not_started", message), nodes)

    def _were_usable(self, plan: Plan) -> list[Node]:
        """The nodes of `plan` that Slurm could use when it was first asked; none if it has not been."""
        usable = {node.name for node in self._seen[1] if node.usable} if self._seen else set()
        return [node for node in plan.nodes if slurm_name(node, tuple(usable)) in usable]

    def _with_slurm_state(self, error: dict[str, Any], nodes: Sequence[Node], wait_s: float = 0) -> dict[str, Any]:
        """`error` with the problems that Slurm reports for `nodes`, within `wait_s`, if it answers."""
        deadline = time.monotonic() + wait_s
        with suppress(InfrastructureError):
            while not (found := problems(self.cluster, nodes) if nodes else {}) and time.monotonic() < deadline:
                time.sleep(wait_s / 10)
            return with_slurm_state(error, found)
        return error

    # --- after it -----------------------------------------------------------------------------------

    def gather(self, plan: Plan, cell: Cell) -> dict[str, Problem]:
        """Copy the artefacts of a cell into the run directory; returns failures by node."""
        if self.shared or not cell.hosts:
            return {}
        return agents.gather(self.run, plan, cell, self.ssh_config)

    def clean(self, plan: Plan, nodes: Sequence[Node]) -> None:
        """Remove the gathered artefacts from `nodes`."""
        used = {name for cell in plan.cells for name in cell.hosts}
        nodes = [node for node in nodes if node.name in used]
        if not self.shared and nodes:
            agents.clean(plan, nodes, self.ssh_config)


def job_name(plan: Plan, cell: Cell, attempt: int) -> str:
    """The unique name of the job that is submitted for `cell`."""
    kind = "array-" if plan.job_array else "all-" if plan.one_allocation else ""
    return f"{slurm_names.NAME}-{plan.run_id}-{kind}{cell.id}-{attempt}"


def _share(plan: Plan, cell: Cell, name: str, job_id: str, number: int) -> JobShare:
    """The share of `cell`, the `number`-th of the sbatch file `name`, in the job that was submitted as `job_id`."""
    task = f"{job_id}_{number}" if plan.job_array else job_id
    return JobShare(task, number if plan.one_allocation else None, name, cell.hosts)


def log_path(plan: Plan, name: str, shared: bool, job_id: str = "") -> str:
    """The path of a job's output: in the run directory, or on the job's first node, in a folder that always exists.

    That of an array's task ends with its number.
    """
    number = job_id.partition("_")[2]
    folder = f"{plan.run_dir}/slurm" if shared else slurm_names.LOGS
    return f"{folder}/{name}.log" + (f".{number}" if number else "")


def prepare(
    plan: Plan,
    name: str,
    cells: Sequence[Cell],
    data: str | None,
    shared: bool,
    known: Sequence[str],
    checks: CheckRequest | None,
    expected: Mapping[str, str | None],
    after: str | None = None,
) -> BatchJob:
    """The job of `cells`, which waits for the job `after`. `known` are Slurm's names of nodes, `expected` is the
    environment required there (empty: any), `data` the folder with prepared data on the nodes.
    """
    names = {slurm_name(node, known): node for node in plan.nodes}
    first = plan.nodes[0]
    steps = []
    for cell in cells:
        common = rank_environment(cell, first)
        request = StepRequest(
            **agents.cell_fields(plan, cell),
            engine=cell.engine,
            gpus_per_node=cell.gpus_per_node,
            master_port=cell.master_port,
            timeout_s=cell.params["timeout_s"],
            scratch=first.scratch,
            cell_dir=cell.cell_dir,
            shared_root=cell.cell_dir if shared else None,
            hosts=[slurm_name(plan.node(host), known) for host in cell.hosts],
            names={word: node.name for word, node in names.items() if word != node.name},
            addresses={word: node.address for word, node in names.items() if word != node.address},
            env=common,
            node_env={word: rank_environment(cell, node) for word, node in names.items() if node.env != first.env},
            job=job(plan, cell, first, data),
            check=checks,
            environment=dict(expected) or None,
            nccl_if_built=plan.nccl is None,
            python=first.of_profile(cell.profile).python if cell.profile else None,
        )
        hosts = tuple(request.hosts)
        inner = _inner(cell, request, request.python or first.python)
        steps.append(Step(cell.id, cell.num_nodes, request.to_json(), hosts, cell.params["timeout_s"], inner))
    return BatchJob(
        name=name,
        steps=tuple(steps),
        python=first.python,
        log=log_path(plan, name, shared),
        gpus_per_node=max(cell.gpus_per_node for cell in cells),
        device=cells[0].device,
        secrets=tuple(agents.secrets(cells)),
        array=plan.job_array,
        chain=len(cells) > 1 and any(cell.after for cell in cells),
        after=after,
    )


def _inner(cell: Cell, request: StepRequest, python: str) -> tuple[str, ...] | None:
    """The command by which the agent of the cell's first node starts all ranks, None if each starts its own."""
    engine = ENGINES[cell.engine]
    if not engine.step:
        return None
    hosts = request.hosts or [f"HOST{number}" for number in range(1, cell.num_nodes + 1)]  # as Slurm places it
    return engine.launch(slurm_step.ranks_of(request, hosts, python, slurm_step.link(request))).argv[0]


def preview(plan: Plan, cells: Sequence[Cell]) -> list[str]:
    """The sbatch files of `cells` as texts, with the inventory's aliases for Slurm's names of nodes. Of a chain each
    waits for the one before, whose id is not known yet.
    """
    settings = settings_of(plan)
    known = tuple(node.alias for node in plan.nodes)
    left, shown = list(cells), []
    planned = {cell.id for cell in cells}
    while left:
        some = together(plan, left)
        name = job_name(plan, some[0], 1)
        after = f"JOB_OF_{some[0].after}" if some[0].after in planned else None
        script = render(prepare(plan, name, some, None, settings.sees_files, known, None, {}, after), settings)
        shown.append(f"{name}.sbatch:\n{script}")
        left = [cell for cell in left if cell not in some]
    return shown
