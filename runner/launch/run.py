"""`runner bench`: from a plan to its records, summary and report."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.errors import InfrastructureError
from runner.failures import KINDS
from runner.launch import blame, drift
from runner.launch.agents import Agents
from runner.launch.preflight import Problems, Reach
from runner.launch.signals import Stop
from runner.launch.slurm import answers, commands
from runner.launch.slurm.allocations import Allocations, as_status, together
from runner.launch.watch import CellRun, Course
from runner.plan.build import place
from runner.plan.plan import PORTS, Cell, Plan, fingerprint
from runner.report.conclude import judge
from runner.report.progress import Display
from runner.results import records, telemetry
from runner.results.celldir import LAUNCHER
from runner.results.rundir import RunDir
from runner.results.status import LIVE_STATES, cell_status
from runner.system.clock import now
from runner.system.files import disk_errors, write_text_atomic

STATUS_S = 1.0
RETRY_S = 5.0


@dataclass(frozen=True)
class Policy:
    """What to do when a cell fails for a reason that is not the user's, and when nodes are not what they were."""

    retries: int = 0
    replace_bad_nodes: bool = False
    accept_drift: bool = False


class Run:
    """Carries out a plan in its run directory; what it decides on the way is written back into both."""

    def __init__(
        self,
        plan: Plan,
        run: RunDir,
        transport: Agents | Allocations,
        display: Display,
        data: str | None,
        policy: Policy,
        reach: Reach,
    ) -> None:
        self.plan, self.run, self.transport, self.display = plan, run, transport, display
        self.source, self.policy, self.reach = data, policy, reach
        self.scheduled = BACKENDS[plan.backend].scheduled
        self.data = transport.data_on_nodes(plan, data) if data else None
        self.stop = Stop(display)
        self.status = run.read_status()
        self.inherited = self._left_to_slurm()
        self.tried: set[str] = set()
        self.retried: Counter[str] = Counter()
        # Under Slurm only a new cell shows whether nodes have changed since these were measured.
        self.compares = policy.accept_drift and self.scheduled
        self.before: dict[str, drift.Environments] = {}
        if self.compares:
            self.before |= drift.measured(run, plan, self.status)
        self.reopened: set[str] = set()
        self.records = self._kept_records()
        self.not_gathered: set[str] = set()
        self.bad: set[str] = set()
        self._written = 0.0
        self.log: TextIO

    def execute(self, bad: Problems) -> dict[str, Any]:
        """Run every cell that is not complete, then judge and report; returns the summary.

        `bad` are nodes to do without, and why. Measured values are never lost.
        """
        with (
            self.stop.listening(),
            disk_errors(self.run.path),
            open(self.run.log, "a", buffering=1, encoding="utf-8", errors="replace") as self.log,
        ):
            self.status["controller"] = {"host": socket.gethostname(), "pid": os.getpid()}
            self._save("running")
            self.log.write(f"{now()} {self.plan.command}\n")
            with self.display.progress(len(self.plan.cells)):
                for host, problems in bad.items():
                    self._give_up(host, 0, blame.unusable(host, problems))
                try:
                    self._send_data([node for node in self._needed() if node.name not in bad])
                except InfrastructureError:
                    self._save("failed")
                    raise
                while not self.stop.asked and (pending := self._pending()):
                    self.tried.add(self.plan.cells[pending[0]].id)
                    self._settle(pending[0])
                if self.stop.asked:
                    self._leave_rest()
            states = {c["state"] for c in self.status["cells"].values()}
            final = next((s for s in ("failed", "incomplete", "cancelled") if s in states), "complete")
            self._save(final)
            if not self._allocation and not self.inherited:  # else a job that goes on has its files there
                kept = self.not_gathered | self.bad
                self.transport.clean(self.plan, [node for node in self.plan.nodes if node.name not in kept])
            return self._judge()

    def _pending(self) -> list[int]:
        """The cells, as they are planned by now, that are still to run: those first that have a job which goes on
        meanwhile, those last that were complete.
        """
        left = [
            index
            for index, cell in enumerate(self.plan.cells)
            if self._entry(cell)["state"] != "complete" and cell.id not in self.tried and not self.bad & set(cell.hosts)
        ]
        ids = [cell.id for cell in self.plan.cells]
        return sorted(left, key=lambda index: (self._own_job(ids[index]), ids[index] in self.reopened))

    def _own_job(self, cell: str) -> int:
        """0: it has a job that goes on, 1: it may have one, 2: it has none."""
        noted = self._allocation.get(cell) or [(self.status["cells"][cell]["job"] or {}).get("id")]
        has = cell in self._allocation or cell in self.inherited
        return 2 if not has else 0 if noted[0] else 1

    def _through(self) -> int:
        """How many cells are complete or given up, beside the one that runs now."""
        entries = self.status["cells"].items()
        return sum(entry["state"] == "complete" or cell in self.tried for cell, entry in entries) - 1

    def left_at_once(self) -> None:
        """Note what a controller leaves that has no time: Slurm's jobs may go on, ranks over ssh end with it."""
        self.status["state"] = "incomplete"
        for cell in self.status["cells"].values():
            if cell["state"] in LIVE_STATES and self.scheduled:
                cell["state"] = "incomplete"
            elif cell["state"] in ("planned", *LIVE_STATES):
                cell["state"] = "cancelled"
        self._write_status()

    # --- states -----------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        """One line for the person and for the log."""
        self.display.note(text)
        self.log.write(f"{now()} {text}\n")

    def _entry(self, cell: Cell) -> dict[str, Any]:
        return self.status["cells"][cell.id]

    def _save(self, state: str) -> None:
        self.status["state"] = state
        self._write_status()

    def _write_status(self) -> None:
        self._written = time.monotonic()
        self.run.write_status(self.status)

    def _cell_state(self, cell: Cell, state: str, error: dict[str, Any] | None = None) -> None:
        entry = self._entry(cell)
        entry.update(state=state, error=error)
        if state == "complete":
            entry["plan_hash"] = fingerprint(self.plan, cell)
        if state in LIVE_STATES:
            entry.update(started=entry["started"] or now(), hosts=list(cell.hosts))
        else:
            entry.update(ended=now(), progress=None)
        self._write_status()

    def _amend(self, index: int, cell: Cell, **changes: Any) -> None:
        """Write into the plan what became of it, so that plan.json tells what ran where."""
        cells = (*self.plan.cells[:index], cell, *self.plan.cells[index + 1 :])
        self.plan = replace(self.plan, cells=cells, **changes)
        self.run.write_plan(self.plan.to_dict())

    def _live(self, cell: Cell, watch: CellRun) -> None:
        """Keep status.json's view of each node fresh, once a second at most."""
        if time.monotonic() - self._written < STATUS_S:
            return
        entry = self._entry(cell)
        entry["nodes"] = watch.nodes()
        self._write_status()

    # --- data and records ---------------------------------------------------------------------------

    def _needed(self) -> list[Node]:
        """The nodes that may still have work: one that was replaced may not even answer."""
        pending = [cell for cell in self.plan.cells if self._entry(cell)["state"] != "complete"]
        hosts = {host for cell in pending for host in cell.hosts}
        return [node for node in self.plan.nodes if node.name in hosts or not all(cell.hosts for cell in pending)]

    def _send_data(self, nodes: Sequence[Node]) -> None:
        if self.source is None:
            return
        self.display.at(0, 1, "sending data")
        failures = self.transport.send(self.plan, nodes, self.source, lambda: self.stop.asked)
        if isinstance(self.transport, Allocations) and not self.plan.named and len(failures) < len(nodes):
            for host, reason in failures.items():  # Slurm has others to choose
                self._note(f"{self.plan.node(host).alias} is left out, the data cannot be sent to it: {reason}")
                self.plan = self.transport.exclude(self.plan, host)
            return
        if failures and not self.stop.asked:
            raise InfrastructureError(
                "\n  ".join(["sending the data failed", *(f"{n}: {r}" for n, r in failures.items())])
            )

    def _kept_records(self) -> list[records.Record]:
        """The records of cells that are complete; those of a cell that runs again are dropped."""
        complete = {cell for cell, entry in self.status["cells"].items() if entry["state"] == "complete"}
        return [record for record in self.run.read_records() if record.cell in complete]

    def _collect(self, cell: Cell) -> None:
        """Turn the ranks' files of a cell into records."""
        base = {
            "run_id": self.plan.run_id,
            "cell": cell.id,
            "test": cell.test,
            "model": cell.model,
            "num_nodes": cell.num_nodes,
            "world_size": cell.world_size,
            "repeat": cell.repeat,
        }
        self.records = [record for record in self.records if record.cell != cell.id]
        for host in cell.hosts:
            for path in sorted(self.run.cell(host, cell.id).glob("rank*.jsonl")):
                events = records.parse_jsonl(path.read_text(errors="replace"))
                self.records.extend(records.from_events(events, base, host))
        write_text_atomic(self.run.records, "".join(f"{record.to_json()}\n" for record in self.records))

    # --- cells --------------------------------------------------------------------------------------

    def _settle(self, index: int) -> None:
        """Run a cell, again after a failure that is worth it, until it is complete or given up."""
        if self._recover(index):
            return
        while True:
            self._adopt(index)
            self._make_room(index)
            cell = self.plan.cells[index]
            inherited = cell.id in self.inherited
            heard = self._run_cell(index, cell)
            error, shared = self._entry(cell)["error"], self._allocation.get(cell.id)
            # Where Slurm is silent the job may go on: it is followed, and the cell not given a second one.
            unheard = error is not None and error["kind"] == "slurm_unreachable"
            if unheard:
                self.inherited.add(cell.id)
            else:
                self._over(cell)
            if self._entry(cell)["state"] == "complete":
                self._compare(self.plan.cells[index], own=not inherited)
            if error is None or self.stop.asked:
                return
            if inherited and not unheard:  # what became of that job is known now; own attempts begin
                self._turn_never_came(cell, shared, heard)
            elif not self._worth_another(index, cell, error, shared, heard):
                return
            if self._others_go_on():  # beside them it would measure their traffic: it comes after them
                self.tried.discard(cell.id)
                return

    def _worth_another(
        self, index: int, cell: Cell, error: Mapping[str, Any], shared: Sequence[Any] | None, heard: bool
    ) -> bool:
        """Whether a cell that failed is to run again: without the node that failed it, or since its turn had not
        come, or as a retry.
        """
        worth_it = blame.may_retry(error)
        if worth_it and self.policy.replace_bad_nodes and self._replace(index, error):
            return True
        if error["kind"] != "job_cancelled" and self._turn_never_came(cell, shared, heard):
            return True
        if not worth_it or self.retried[cell.id] == self.policy.retries:
            return False
        self.retried[cell.id] += 1
        later = ", after the cells whose job goes on" if self._others_go_on() else ""
        self._note(f"{cell.id}: retry {self.retried[cell.id]} of {self.policy.retries}{later}")
        if not later:
            self.stop.wait(RETRY_S)
        return True

    def _make_room(self, index: int) -> None:
        """Set aside what earlier attempts left, also at the cells that share the job which is submitted now."""
        for each in self._sharing(index):
            if self.plan.cells[each].id not in self.inherited:
                self._set_aside(each)

    def _sharing(self, index: int) -> list[int]:
        """The cells of the job that a cell needs: itself, and of those that have none yet all that share it."""
        cell, taken = self.plan.cells[index], {*self._allocation, *self.inherited}
        if cell.id in self._allocation:
            return []
        if cell.id in self.inherited:
            return [index]
        free = [each for each in self._pending() if each != index and self.plan.cells[each].id not in taken]
        sharing = together(self.plan, [self.plan.cells[each] for each in (index, *free)])
        return [each for each in (index, *free) if self.plan.cells[each] in sharing]

    def _compare(self, cell: Cell, own: bool) -> None:
        """Have cells run again that were complete, where a newer one shows that they were measured in another
        environment. That of one whose job was an earlier controller's (not `own`) may be the older one, too.
        """
        if not self.compares:
            return
        found = drift.measured(self.run, replace(self.plan, cells=(cell,)), self.status).get(cell.id, {})
        changed = drift.outdated(self.before, found)
        for opened in drift.reopen(self.plan, self.status, changed):
            self._note(f"{opened} runs again: {self.status['cells'][opened]['error']['message']}")
            del self.before[opened]  # once
            self.reopened.add(opened)
            self.tried.discard(opened)
            del self.retried[opened]
            self._move(next(index for index, each in enumerate(self.plan.cells) if each.id == opened))
        if not own:
            self.before[cell.id] = found
        self._write_status()

    # --- jobs of Slurm's that cells have ---------------------------------------------------------------

    @property
    def _allocation(self) -> dict[str, Any]:
        """The job, step, sbatch file and named hosts of each cell that has a job, until its end was seen."""
        return self.status.setdefault("allocation", {})

    def _others_go_on(self) -> bool:
        """Whether cells that are still to be followed have a job."""
        return not self._allocation.keys() <= self.tried

    def _adopt(self, index: int) -> None:
        """Learn what became of a job of the cell whose id was never heard."""
        if not isinstance(self.transport, Allocations):
            return
        cell, before = self.plan.cells[index], set(self._allocation)
        with suppress(commands.Silent):  # the cell's conversation will say so
            has = self.transport.adopt(self.plan, cell, self._entry(cell), self._allocation)
            found = self._allocation.keys() - before
            for each in [each for each in found if self.status["cells"][each]["state"] == "complete"]:
                del self._allocation[each]
            if cell.id in self.inherited:
                self.inherited |= found & self._allocation.keys()
            self.inherited -= before - self._allocation.keys()
            if not has:
                self.inherited.discard(cell.id)

    def _over(self, cell: Cell) -> None:
        """The end of the cell's job, or step, was seen: the next attempt has another."""
        self.inherited.discard(cell.id)
        self._allocation.pop(cell.id, None)

    def _turn_never_came(self, cell: Cell, shared: Sequence[Any] | None, heard: bool) -> bool:
        """Whether the job that a cell shares ended before the cell's step; so it did for the later ones.

        They are to have another together.
        """
        over = (self._entry(cell)["job"] or {}).get("state") in (*commands.ENDED, "unknown")
        if heard or not over or not shared or not shared[1]:  # step 0, or a task of an array, is why there is a job
            return False
        self._leave_allocation()
        return True

    def _leave_allocation(self) -> None:
        """Cancel the jobs that cells have: those that are not complete are submitted anew."""
        if isinstance(self.transport, Allocations) and self._allocation:
            ids = {job_id for job_id, *_ in self._allocation.values()}
            self._cancel(None if None in ids else ids)  # None: whether Slurm has it is not known

    def _leave_rest(self) -> None:
        """The user stopped the run: its jobs are cancelled, and the cells whose turn had not come are so, too."""
        going_on = {*self._allocation, *self.inherited}
        heard = not isinstance(self.transport, Allocations) or self._cancel(None)
        for index in self._pending():
            cell = self.plan.cells[index]
            # What an earlier controller said of a cell still holds.
            if heard if cell.id in going_on else self._entry(cell)["state"] == "planned":
                self._cell_state(cell, "cancelled")

    def _cancel(self, job_ids: set[str] | None) -> bool:
        """Cancel these jobs of the run, or all; returns whether Slurm heard it. Cells that had one have none then."""
        assert isinstance(self.transport, Allocations)
        if not self.transport.leave(self.plan, job_ids, patient=not self.stop.asked):
            self._note("Slurm does not answer: jobs of this run may go on; `runner runs stop` cancels them")
            return False
        for index, cell in enumerate(self.plan.cells):
            if cell.id not in self._allocation or not (job_ids is None or self._allocation[cell.id][0] in job_ids):
                continue
            # Nobody may have followed it to its end yet; over ssh that would take too long to see.
            unfollowed = self.transport.shared and self._entry(cell)["started"] is None
            if not (unfollowed and self._recover(index)):
                self._over(cell)
        if job_ids is None:
            self.inherited.clear()
        return True

    def _left_to_slurm(self) -> set[str]:
        """Cells whose jobs an earlier controller left behind: they go on without one, and are followed first."""
        if not self.scheduled:
            return set()
        left = {
            cell
            for cell, entry in self.status["cells"].items()
            if (entry["error"] or {}).get("kind") in (None, "slurm_unreachable")
            and entry["state"] != "complete"
            and (cell in self._allocation or (entry["started"] and entry["state"] == "incomplete"))
        }
        for cell in self._allocation.keys() - left:
            del self._allocation[cell]
        return left

    def _recover(self, index: int) -> bool:
        """Whether the cell had ended well without a controller; what it measured is taken then."""
        cell = self.plan.cells[index]
        entry, shared = self._entry(cell), self._allocation.get(cell.id)
        unfollowed = entry["started"] is None
        if entry["state"] == "complete" or entry["error"] is not None or (unfollowed and not shared):
            return False
        if cell.hosts:
            self.transport.gather(self.plan, cell)  # a node without any of it has nothing to give
        if unfollowed or not cell.hosts:  # its agents have told where it was, those of an earlier job as well
            job_id = shared[0] if shared else (entry["job"] or {}).get("id")
            nodes = {node.name: node for node in self.plan.nodes}
            told = self.run.read_placement(cell.id, job_id)
            if not told or not nodes.keys() >= set(told):
                return False
            cell = cell if cell.hosts else place(cell, [nodes[name] for name in told], self.plan, None)
        outcomes = self.run.read_outcomes(cell.hosts, cell.id)
        if not all(blame.ended_well(outcomes.get(host, {})) for host in cell.hosts):
            return False
        if any(outcome.get("attempt", 1) != cell.attempt for outcome in outcomes.values()):
            return False  # killed before this attempt had begun on the nodes, which have an earlier one's still
        if cell is not self.plan.cells[index]:
            self._amend(index, cell)
        self._collect(cell)
        self._cell_state(cell, "complete")
        self._note(f"{cell.id}: complete, it had ended without a controller")
        self._over(cell)
        self._compare(cell, own=False)
        return True

    def _set_aside(self, index: int) -> None:
        """Make room for the next attempt; what the last one left is kept beside it."""
        cell = self.plan.cells[index]
        entry = self._entry(cell)
        if entry["started"] is None:
            return
        self.run.set_aside(cell.id, entry["attempt"])
        last = {key: entry[key] for key in ("state", "started", "ended", "error", "job", "hosts")}
        self.status["cells"][cell.id] = cell_status(entry["attempt"] + 1, [*entry["attempts"], last])
        self.records = [record for record in self.records if record.cell != cell.id]
        # The old rendezvous may still hold its port.
        port = PORTS[(cell.master_port - PORTS[0] + 1) % len(PORTS)]
        moved = replace(cell, master_port=port, attempt=entry["attempt"] + 1)
        hosts = [self.plan.node(host) for host in cell.hosts]
        if self.scheduled and not self.plan.named:  # Slurm may choose others
            moved = replace(moved, hosts=())
        elif hosts:
            moved = place(moved, hosts, self.plan, self.transport.ssh_config)
        self._amend(index, moved)

    def _replace(self, index: int, error: Mapping[str, Any]) -> bool:
        """Whether the cell can run again without the node that failed it."""
        bad = error["host"]
        if KINDS[error["kind"]].fault != "node" or not BACKENDS[self.plan.backend].remote:
            return False
        if bad not in self.plan.cells[index].hosts:  # nobody, or DeepSpeed's launcher on the controller
            return False
        self._give_up(bad, index, error)
        return bad not in self.plan.cells[index].hosts

    def _give_up(self, bad: str, index: int, error: Mapping[str, Any]) -> None:
        """Do without a node in cell `index` and all that are still to run.

        A spare takes its place; where there is none, cells move to good nodes if these are enough, and fail otherwise.
        """
        self.bad.add(bad)
        spare = self._good_spare()
        if spare:
            spares = tuple(node for node in self.plan.spares if node is not spare)
            self.plan = replace(self.plan, nodes=(*self.plan.nodes, spare), spares=spares)
        good = [node for node in self.plan.nodes if node.name not in self.bad]
        by = f"{spare.alias} takes its place" if spare else f"no spare is left, {len(good)} nodes are good"
        if isinstance(self.transport, Allocations) and not self.plan.named:
            self.plan = self.transport.exclude(self.plan, bad)
            by = f"Slurm is to choose among others, {len(good)} nodes are good"
        self._note(f"{self.plan.node(bad).alias} ({bad}) is given up: {error['message']}; {by}")
        self.status["replaced"].append(
            {
                "host": bad,
                "by": spare.name if spare else None,
                "cell": self.plan.cells[index].id,
                "kind": error["kind"],
                "reason": error["message"],
                "at": now(),
            }
        )
        self._leave_allocation()  # its steps have their nodes
        for other, cell in enumerate(self.plan.cells):
            through = self._entry(cell)["state"] == "complete" or (cell.id in self.tried and other != index)
            if through or self._move(other):
                continue
            if self._entry(cell)["error"] is None:
                why = f"needs {cell.num_nodes} nodes, {len(good)} are good: {error['message']}"
                self._cell_state(cell, "failed", {**error, "message": why, "stderr": []})

    def _move(self, index: int) -> bool:
        """Place a cell on good nodes only; returns whether there are enough."""
        cell = self.plan.cells[index]
        if not self.bad & set(cell.hosts):
            return True
        keep = [self.plan.node(host) for host in cell.hosts if host not in self.bad]
        good = [node for node in reversed(self.plan.nodes) if node.name not in self.bad and node not in keep]
        nodes = [*keep, *good[: cell.num_nodes - len(keep)]]
        if len(nodes) == cell.num_nodes:
            self._amend(index, place(cell, nodes, self.plan, self.transport.ssh_config))
        return len(nodes) == cell.num_nodes

    def _good_spare(self) -> Node | None:
        for spare in self.plan.spares:
            if problems := self.reach.ask([spare]).problems.get(spare.name):
                why = blame.unusable(spare.name, problems)["message"]
            else:
                try:
                    self._send_data([spare])
                    return spare
                except InfrastructureError as error:
                    why = str(error)
            self._note(f"spare {spare.alias} is no good: {why}")
            self.plan = replace(self.plan, spares=tuple(node for node in self.plan.spares if node is not spare))
        return None

    def _run_cell(self, index: int, cell: Cell) -> bool:
        """Run a cell once; returns whether any agent was heard."""
        total, through = len(self.plan.cells), self._through()
        remote = BACKENDS[self.plan.backend].by_ssh
        streams: dict[tuple[str, str], Any] = {}

        def alias(host: str) -> str:
            return next((node.alias for node in self.plan.nodes if node.name == host), host)

        def on_progress(fraction: float, phase: str) -> None:
            self.display.at(through + fraction, total, f"{cell.id} {phase}")
            self._entry(cell)["progress"] = {"fraction": round(fraction, 3), "phase": phase}

        def on_line(host: str, file: str, line: str) -> None:
            if remote and host != LAUNCHER:  # what a dying node said is kept even if nothing can be gathered
                if (host, file) not in streams:
                    folder = self.run.cell(host, cell.id)
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    streams[host, file] = open(folder / Path(file).name, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
                streams[host, file].write(line + "\n")
            if not file.endswith(".jsonl"):
                self.log.write(f"{now()} {cell.id} {alias(host)} {file}: {line}\n")

        self._cell_state(cell, "running")
        self.display.at(through, total, f"{cell.id} starting")
        watch = CellRun(cell, self.stop, on_progress, on_line, lambda: self._live(cell, watch))
        started = time.monotonic()
        try:
            fault = self.transport.converse(self.plan, cell, watch, self.data, self._course(index, through))
        finally:
            for stream in streams.values():
                stream.close()
        cell = watch.cell
        if self.stop.asked and isinstance(self.transport, Allocations):
            self._leave_allocation()  # before its next step begins
        state, error = watch.state()
        if fault and state != "complete" and (state != "cancelled" or fault["kind"] == "slurm_unreachable"):
            state, error = "incomplete", fault
        for name, reason in self.transport.gather(self.plan, cell).items():
            self.not_gathered.add(name)
            self._note(f"{cell.id}: artefacts of {alias(name)} were not gathered, they stay there: {reason}")
            if state == "complete":
                state = "incomplete"
                error = blame.error("not_gathered", f"its artefacts were not gathered: {reason}", name)
        self._collect(cell)
        self._entry(cell)["nodes"] = watch.nodes()
        self._cell_state(cell, state, error)
        self._note(f"{cell.id}: {state} after {time.monotonic() - started:.0f} s")
        if error:
            where = f" on {alias(error['host'])} ({error['host']})" if error["host"] else ""
            self._note(f"  {error['message']}{where}")
            for line in error["stderr"][-8:]:
                self.display.note(f"    {line}")
        return any(talk.answered for talk in watch.talks)

    def _course(self, index: int, through: int) -> Course:
        cell = self.plan.cells[index]
        total = len(self.plan.cells)

        def on_job(info: answers.JobInfo) -> None:
            entry = self._entry(cell)
            entry["job"] = as_status(info)
            if info.state == "waiting":
                place = f", place {info.position}" if info.position else ""
                start = f", expected {info.start}" if info.start else ""
                self.display.at(through, total, f"{cell.id} waits: {info.reason or 'Pending'}{place}{start}")
            elif entry["state"] == "waiting":
                self.display.at(through, total, f"{cell.id} starting as job {info.job_id}")
            placed = self.plan.cells[index]  # by now perhaps
            self._cell_state(placed, "waiting" if info.state == "waiting" else "running")

        def on_placed(nodes: Sequence[Node]) -> Cell:
            new = tuple(node for node in nodes if node not in self.plan.nodes)
            placed = place(cell, nodes, self.plan, None)
            self._amend(index, placed, nodes=(*self.plan.nodes, *new))
            self._cell_state(placed, "running")
            return placed

        pending = [self.plan.cells[each] for each in self._sharing(index)]
        return Course(self._entry(cell), pending, self._allocation, on_job, on_placed)

    def _judge(self) -> dict[str, Any]:
        self.display.at(1, 1, "writing the report")
        telemetry.compact(self.run.telemetry_streams(asdict(self.plan)), self.run.telemetry)
        return judge(self.run)
