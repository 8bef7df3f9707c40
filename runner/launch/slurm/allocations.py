"""Cells as Slurm jobs: rendered, submitted, waited for, followed, gathered."""

from __future__ import annotations

import re
import shlex
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
from runner.launch import agents, blame, copy
from runner.launch.slurm import answers, commands
from runner.launch.slurm import follow as following
from runner.launch.slurm.capacity import node_kind, refused
from runner.launch.slurm.ledger import JobShare, Ledger
from runner.launch.slurm.script import STARTUP_S, BatchJob, Step, cells_of, render
from runner.launch.talk import Talk
from runner.launch.watch import CellRun, Course
from runner.node.protocol import CheckRequest, StepRequest, Stopped
from runner.plan.plan import Cell, Plan, job, rank_environment
from runner.results.rundir import RunDir
from runner.system import process
from runner.system.files import write_text_atomic

END_S = 45.0  # Slurm's KillWait is 30 s
# What a job's log says of a node on which the agent could not even be started, and the kind of failure that it is.
_LAUNCH = {
    "prolog_failed": re.compile(r"Task launch for \S+ failed on node (?P<node>\S+): (?P<why>.*prolog failed.*)", re.I),
    "node_failed": re.compile(r"Task launch for \S+ failed on node (?P<node>\S+): (?P<why>.*)"),
    "environment_missing": re.compile(r"slurmstepd-(?P<node>\S+): error: execve\(\): (?P<why>.*)"),
}


def settings_of(plan: Plan) -> slurm_settings.Settings:
    return slurm_settings.settings(dict(plan.slurm or {}), f"slurm of run {plan.run_id}")


def slurm_name(node: Node, known: Sequence[str]) -> str:
    """What Slurm calls the node: its name, the first word of that, or its alias.

    The alias comes last: it is a position in the inventory, which Slurm may have as another node's name.
    """
    return next((word for word in _words(node) if word in known), node.alias)


def _words(node: Node) -> tuple[str, ...]:
    return node.name, node.name.partition(".")[0], node.alias


def cluster(settings: slurm_settings.Settings, nodes: Sequence[Node], ssh_config: str | None) -> commands.SlurmClient:
    """Slurm's commands, here or on the login node that the settings name."""
    login = None
    if settings.login is not None:
        login = by_word(nodes).get(settings.login)
        if login is None:
            raise unknown("host", settings.login, [node.name for node in nodes], "slurm.login")
    return commands.SlurmClient(settings, login, ssh_config)


def problems(cluster: commands.SlurmClient, nodes: Sequence[Node]) -> dict[str, Problem]:
    """Why Slurm would not use each of `nodes`; good ones are left out."""
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


def told_by_slurm(error: Mapping[str, Any], found: Mapping[str, Problem]) -> dict[str, Any]:
    """`error` with what Slurm says of its nodes: the only bad one is named, and it is a prolog's if all say so."""
    return {
        **error,
        "kind": "prolog_failed" if {one.kind for one in found.values()} == {"prolog_failed"} else error["kind"],
        "host": next(iter(found)) if len(found) == 1 else error["host"],
        "message": "; ".join([error["message"], *(f"{host}: {one.message}" for host, one in found.items())]),
    }


def together(plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
    """Which of `cells` share the job of the first: all of one allocation; of an array, whose tasks are alike, those of
    its size, and of its nodes if these are named.
    """
    if plan.job_array:
        return [cell for cell in cells if _shape(plan, cell) == _shape(plan, cells[0])]
    return list(cells) if plan.one_allocation else [cells[0]]


def _shape(plan: Plan, cell: Cell) -> tuple[int, tuple[str, ...]]:
    return cell.num_nodes, cell.hosts if plan.named else ()


class Allocations:
    """One job per cell, one array per number of nodes, or one job for all.

    Slurm holds the job, so a controller may die and follow it again.
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
        self.shared = cluster.settings.shared
        self._known: tuple[str, ...] | None = None

    # --- before anything starts ---------------------------------------------------------------------

    def refuse(self, plan: Plan, cells: Sequence[Cell]) -> None:
        """Raise for what Slurm could never start, with every reason, before anything is submitted.

        UsageError for a request that is wrong, InfrastructureError for one that only nodes which are down prevent.
        """
        settings = self.settings(plan)
        partitions, nodes = self.cluster.look()
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
        """Which of `cells` share the job of the first."""
        return together(plan, cells)

    # --- data ---------------------------------------------------------------------------------------

    def send(self, plan: Plan, nodes: Sequence[Node], data: str, stopped: Callable[[], bool]) -> dict[str, str]:
        """Prepared data to where every node sees it. Returns failures by node."""
        target = self.data_on_nodes(plan, data)
        if not self.shared:
            return copy.send(nodes, str(self.ssh_config), data, target, stopped=stopped)
        Path(target).mkdir(mode=0o700, parents=True, exist_ok=True)
        outcome = process.run(["rsync", "-a", "-s", f"{data}/", f"{target}/"], timeout_s=1800)
        return {} if outcome.rc == 0 else {"the run's folder": outcome.last_line}

    def data_on_nodes(self, plan: Plan, data: str) -> str:
        """Where ranks find the data that lies in `data` here."""
        folder = self.run.path.parent / ".data" if self.shared else Path(plan.nodes[0].scratch, "data")
        return str(folder / Path(data).name)

    # --- one cell -----------------------------------------------------------------------------------

    def converse(
        self, plan: Plan, cell: Cell, watch: CellRun, data: str | None, course: Course
    ) -> dict[str, Any] | None:
        """Run the cell to its end, told and heard by `watch`; returns what Slurm did to it, or None.

        A job that an earlier controller submitted is followed from its beginning.
        """
        try:
            job_id, step, script = self._submit(plan, cell, data, course)
            info = following.wait(self.cluster, job_id, course.on_job, stopped=lambda: watch.stop.asked)
            every = [self._node(plan, name) for name in info.nodes]
        except commands.NotStarted as error:
            return self._not_started(cell, str(error), plan)
        except commands.Silent as error:
            return blame.error("slurm_unreachable", str(error))
        except InfrastructureError as error:  # sbatch refuses by now what it would have taken at the beginning
            return blame.error("not_started", str(error))
        course.on_job(info)
        if not info.nodes:  # cancelled while it waited, or forgotten
            return None if watch.stop.asked else self._fault(info, watch, plan)
        placed = every[: cell.num_nodes]
        share = course.ledger.share(cell.id)
        asked = share.hosts if share else cell.hosts  # since then the cell may have moved
        if asked and {node.name for node in every} >= set(asked):
            placed = [plan.node(name) for name in asked]
        watch.cell = course.on_placed(placed)
        watch.talks = [Talk(node.name, (), {}) for node in placed]
        watch.begin(STARTUP_S)
        log = log_path(plan, script.stem, self.shared, job_id)
        follow = following.Follow(
            slurm=self.cluster,
            job_id=job_id,
            folders={node.name: self.run.cell(node.name, cell.id) for node in placed},
            step=step,
            source=None if self.shared else cell.cell_dir,
            nodes=() if self.shared else placed,
            ssh_config=self.ssh_config,
            log=Path(log) if self.shared else None,
            on_job=course.on_job,
        )
        try:
            info = following.converse(follow, watch.talks, watch.hear, watch.word, patience_s=END_S)
        except InfrastructureError as error:
            return blame.error("slurm_unreachable", str(error))
        if not self.shared and info.nodes:
            self._fetch_log(log, self._node(plan, info.nodes[0]), watch)
        return None if watch.stop.asked else self._fault(info, watch, plan)

    def cancel(self, plan: Plan, job_ids: set[str] | None, *, patient: bool) -> bool:
        """Cancel these jobs of the run that wait or run, or all (None); returns whether Slurm answered."""
        try:
            wanted = None if job_ids is None else {answers.whole(job_id) for job_id in job_ids}
            for job_id in self.cluster.of_run(plan.run_id):  # ids are used again, names are not
                if wanted is None or job_id in wanted:
                    with following.left_at_once(self.cluster, job_id):
                        self.cluster.cancel(job_id, patient=patient)
        except InfrastructureError:
            return False
        return True

    def adopt(self, plan: Plan, cell: Cell, entry: Mapping[str, Any], ledger: Ledger) -> bool | None:
        """Whether the cell has a job; None where Slurm does not answer. See `_find`."""
        try:
            return self._find(plan, cell, entry, ledger)
        except commands.Silent:
            return None

    def _find(self, plan: Plan, cell: Cell, entry: Mapping[str, Any], ledger: Ledger) -> bool:
        """Whether the cell has a job; one whose id was never received is looked for by its name.

        Its cells are then noted in `ledger`, or, where Slurm has no such job, no longer. Raises Silent.
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
            if other is None or other.name == name:  # else it has another by now
                ledger.note({each: _share(plan, cells[each], name, found, number)})
        return True

    def _submit(self, plan: Plan, cell: Cell, data: str | None, course: Course) -> tuple[str, int | None, Path]:
        """The id of the cell's job, submitted now unless it was already, its step in that, and the sbatch file."""
        ledger = course.ledger
        name = job_name(plan, cell, course.entry["attempt"])
        if not self._find(plan, cell, course.entry, ledger):
            cells = course.pending or [cell]
            script = render(self.job(plan, name, cells, data), self.settings(plan))
            path = self.run.slurm(name)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text_atomic(path, script)
            # Until Slurm answers nobody else may submit these.
            ledger.note({each.id: JobShare(None, None, name, each.hosts) for each in cells})
            try:
                job_id = self.cluster.submit(script, agents.secrets())
            except commands.Silent:
                raise
            except InfrastructureError:  # refused
                ledger.drop(each.id for each in cells)
                raise
            ledger.note({each.id: _share(plan, each, name, job_id, number) for number, each in enumerate(cells)})
        known = (course.entry["job"] or {}).get("id")
        share = ledger.share(cell.id) or JobShare(known, None, name)
        assert share.job_id is not None
        if share.job_id != known:  # said before Slurm is asked for anything else
            course.on_job(answers.JobInfo(share.job_id, share.name, "waiting", "PENDING", "", (), None))
        return share.job_id, share.step, self.run.slurm(share.name)

    def job(self, plan: Plan, name: str, cells: Sequence[Cell], data: str | None) -> BatchJob:
        return prepare(plan, name, cells, data, self.shared, self._slurm_names(), self.checks, self.expected)

    def settings(self, plan: Plan) -> slurm_settings.Settings:
        return self.cluster.settings.model_copy(update={"exclude": tuple((plan.slurm or {}).get("exclude", ()))})

    def exclude(self, plan: Plan, host: str) -> Plan:
        """The plan with `host` among the nodes that Slurm may not choose."""
        settings = dict(plan.slurm or {})
        name = slurm_name(plan.node(host), self._slurm_names())
        return replace(plan, slurm={**settings, "exclude": [*settings.get("exclude", ()), name]})

    def _slurm_names(self) -> tuple[str, ...]:
        if self._known is None:
            self._known = tuple(node.name for node in self.cluster.look()[1])
        return self._known

    def _node(self, plan: Plan, name: str) -> Node:
        """The inventory's node that Slurm calls `name`; one like the others where the inventory has none."""
        for node in (*plan.nodes, *plan.spares):
            if name in _words(node) and slurm_name(node, self._slurm_names()) == name:
                return node
        return replace(plan.nodes[0], name=name, alias=name, address=name)

    # --- what became of it --------------------------------------------------------------------------

    def _fault(self, info: answers.JobInfo, watch: CellRun, plan: Plan) -> dict[str, Any] | None:
        """What Slurm did to the job, where that is why the cell did not end well."""
        said = {
            "time_limit": ("time_limit", "reached its time limit"),
            "cancelled": ("job_cancelled", f"was cancelled ({info.raw})"),
            "node_failed": ("node_failed", "lost a node"),
            "preempted": ("preempted", "was preempted"),
            "out_of_memory": ("out_of_memory", "ran out of memory"),
        }
        mute = [talk.name for talk in watch.talks if talk.name not in watch.outcomes]
        stderr = next((talk.stderr for talk in watch.talks if talk.stderr), [])
        for kind, words in _LAUNCH.items():
            if mute and (found := words.search("\n".join(stderr))):
                named = self._node(plan, found["node"]).name
                return blame.error(kind, f"job {info.job_id} cannot start its agent: {found['why']}", named, stderr)
        if any(outcome.stopped == Stopped.TIME_LIMIT for outcome in watch.outcomes.values()):
            kind, message = said["time_limit"]
        elif info.state in said and watch.reason is None:
            kind, message = said[info.state]
        elif not watch.outcomes and info.state in ("failed", "unknown", "complete", "ending"):
            forgotten = "is not known to Slurm any more: cancelled while it waited, or it ended long ago"
            kind, message = "not_started", f"ended as {info.raw} before any node answered" if info.raw else forgotten
        else:
            return None
        host = mute[0] if kind in ("node_failed", "out_of_memory") and len(mute) == 1 else None
        error = blame.error(kind, f"job {info.job_id} {message}", host, stderr)
        if kind in ("node_failed", "not_started"):
            nodes = [self._node(plan, name) for name in info.nodes]
            return self._told(error, [node for node in nodes if node.name in mute])
        return error

    def _fetch_log(self, log: str, first: Node, watch: CellRun) -> None:
        """Bring the job's log from its first node; its end is what an agent says that could not be started."""
        with suppress(InfrastructureError):
            command = ["ssh", "-F", str(self.ssh_config), first.name, shlex.join(["tail", "--bytes=1M", log])]
            outcome = process.run(command, timeout_s=20)
            if outcome.rc == 0:
                write_text_atomic(self.run.path / "slurm" / Path(log).name, outcome.stdout)
                for talk in [talk for talk in watch.talks if not talk.answered][:1]:
                    talk.stderr += outcome.stdout.splitlines()[-following.LOG_LINES :]

    def _not_started(self, cell: Cell, message: str, plan: Plan) -> dict[str, Any]:
        return self._told(blame.error("not_started", message), [plan.node(name) for name in cell.hosts])

    def _told(self, error: dict[str, Any], nodes: Sequence[Node]) -> dict[str, Any]:
        """`error` with what Slurm says of those `nodes`, if it answers."""
        with suppress(InfrastructureError):
            return told_by_slurm(error, problems(self.cluster, nodes) if nodes else {})
        return error

    # --- after it -----------------------------------------------------------------------------------

    def gather(self, plan: Plan, cell: Cell) -> dict[str, str]:
        """Bring the artefacts of a cell into the run directory; returns failures by node."""
        if self.shared or not cell.hosts:
            return {}
        return agents.gather(self.run, plan, cell, self.ssh_config)

    def clean(self, plan: Plan, nodes: Sequence[Node]) -> None:
        """Remove what was gathered from `nodes`."""
        used = {name for cell in plan.cells for name in cell.hosts}
        nodes = [node for node in nodes if node.name in used]
        if not self.shared and nodes:
            agents.clean(plan, nodes, self.ssh_config)


def job_name(plan: Plan, cell: Cell, attempt: int) -> str:
    """The name of the job that is submitted for `cell`, which no other has."""
    kind = "array-" if plan.job_array else "all-" if plan.one_allocation else ""
    return f"{slurm_names.NAME}-{plan.run_id}-{kind}{cell.id}-{attempt}"


def _share(plan: Plan, cell: Cell, name: str, job_id: str, number: int) -> JobShare:
    """The share of `cell`, the `number`-th of the sbatch file `name`, in the job that was submitted as `job_id`."""
    task = f"{job_id}_{number}" if plan.job_array else job_id
    return JobShare(task, number if plan.one_allocation else None, name, cell.hosts)


def log_path(plan: Plan, name: str, shared: bool, job_id: str = "") -> str:
    """Where a job's output goes: in the run directory, or on the job's first node, in a folder that is always there.

    That of an array's task has its number at the end.
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
) -> BatchJob:
    """The job of `cells`. `known` are Slurm's names of nodes."""
    names = {slurm_name(node, known): node for node in plan.nodes}
    first = plan.nodes[0]
    steps = []
    for cell in cells:
        common = rank_environment(cell, first)
        request = StepRequest(
            **agents.cell_fields(plan, cell),
            engine=plan.engine,
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
            node_env={word: dict(node.env) for word, node in names.items() if node.env != first.env},
            job=job(plan, cell, first, data),
            check=checks,
            environment=dict(expected) or None,
        )
        hosts = tuple(request.hosts)
        steps.append(Step(cell.id, cell.num_nodes, request.to_json(), hosts, cell.params["timeout_s"]))
    return BatchJob(
        name=name,
        steps=tuple(steps),
        python=first.python,
        log=log_path(plan, name, shared),
        gpus_per_node=cells[0].gpus_per_node,
        device=cells[0].device,
        secrets=tuple(agents.secrets()),
        array=plan.job_array,
    )


def preview(plan: Plan, cells: Sequence[Cell]) -> list[str]:
    """The sbatch files of `cells` as far as they are known before Slurm has been asked for the names of nodes."""
    settings = settings_of(plan)
    known = tuple(node.alias for node in plan.nodes)
    left, shown = list(cells), []
    while left:
        some = together(plan, left)
        name = job_name(plan, some[0], 1)
        script = render(prepare(plan, name, some, None, settings.shared, known, None, {}), settings)
        shown.append(f"{name}.sbatch:\n{script}")
        left = [cell for cell in left if cell not in some]
    return shown
