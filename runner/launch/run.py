"""Carries out a plan: runs its cells one after the other, retries them where that may help, and judges them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.failures import KINDS, Problem
from runner.launch import blame, drift
from runner.launch.current import CurrentPlan, Progress, Turn
from runner.launch.delivery import Delivery
from runner.launch.journal import Journal, Streams
from runner.launch.preflight import NodeAccess, Problems
from runner.launch.signals import Stop
from runner.launch.slurm import answers
from runner.launch.slurm.ledger import JobShare
from runner.launch.spares import Roster
from runner.launch.supply import Data, Supply
from runner.launch.transport import Transport
from runner.launch.watch import CellContext, CellRun, read_outcomes
from runner.plan.build import place
from runner.plan.engines.ranks import PORTS
from runner.plan.plan import Cell, Plan, fingerprint
from runner.report.conclude import judge
from runner.report.progress import Display
from runner.results import telemetry
from runner.results.rundir import RunDir
from runner.results.status import each_error, joined, queued_s
from runner.results.timings import PLAN_KEYS, Clock, Timings, kind
from runner.system.clock import at, now
from runner.system.wording import are, counted, span_text
from runner.workloads.registry import TESTS

RETRY_S = 5.0


@dataclass(frozen=True)
class Policy:
    """What to do when the infrastructure fails a cell, and when the environment of nodes has changed."""

    retries: int = 0
    replace_bad_nodes: bool = False
    accept_drift: bool = False


class Run:
    """Carries out a plan in its run directory; its decisions are written back into both."""

    def __init__(
        self,
        plan: Plan,
        run: RunDir,
        transport: Transport,
        display: Display,
        data: Data | None,
        policy: Policy,
        access: NodeAccess,
    ) -> None:
        """`data` is that of the cells; None: they need none."""
        backend = BACKENDS[plan.backend]
        self.run, self.transport, self.display, self.policy = run, transport, display, policy
        self.backend = backend
        self.current = CurrentPlan(plan, run)
        self.journal = Journal(run, display, backend.scheduled)
        self.ledger = self.journal.ledger
        self.stop = Stop(display)
        self.data = Delivery(data, self.current, self.journal, transport, lambda: self.stop.asked)
        self.roster = Roster(self.current, self.journal, transport, access, self.data.onto)
        self.progress = {cell.id: Progress() for cell in plan.cells}
        self.timings = Timings(run.path.parent)
        # Where a scheduler starts cells, only a new cell shows whether nodes have changed since.
        compares = policy.accept_drift and backend.scheduled
        self.comparison = drift.Comparison(run, plan, self.journal.status) if compares else None
        self.not_gathered: set[str] = set()

    def execute(self, bad: Problems) -> dict[str, Any]:
        """Run every cell that is not complete, then judge and report; returns the summary.

        `bad` are the nodes not to use, with their problems. Measured values are never lost. Raises InfrastructureError
        if this machine's disk cannot be written.
        """
        journal = self.journal
        with self.stop.listening(), journal.opened():
            if self.ledger.outdated:
                self._cancel(self.ledger.outdated)
            journal.begin(self.current.plan.command)
            with self.display.progress(len(self.current.cells)):
                for host, problems in bad.items():
                    self._give_up(host, self.current.cells[0], blame.unusable(host, problems))
                while not self.stop.asked and (ahead := self._ahead()):
                    self.progress[ahead[0].id].enter(Turn.TAKEN)
                    self._settle(ahead[0].id)
                if self.stop.asked:
                    self._leave_rest()
                else:
                    self._tell_not_run()
            journal.save(journal.final_state())
            if not self.ledger.any_job:  # else a job that continues has its files there
                kept = self.not_gathered | self.roster.bad
                plan = self.current.plan
                self.transport.clean(plan, [node for node in plan.nodes if node.name not in kept])
            return self._judge()

    def exit_at_once(self) -> None:
        """Write the states of a run whose controller exits at once."""
        self.journal.exit_at_once()

    # --- which cell comes next ----------------------------------------------------------------------

    def _ahead(self) -> list[Cell]:
        """The cells whose turn it may be: those still to run that wait for no other."""
        return [cell for cell in self._left() if not self._waits(cell)]

    def _waits(self, cell: Cell) -> bool:
        """Whether the cell needs another that is not complete."""
        return cell.after is not None and not self.journal.complete(self.current.cell(cell.after))

    def _left(self) -> list[Cell]:
        """The cells that are still to run, as currently planned: first those with a job that continues meanwhile, last
        those that were complete.
        """

        def order(cell: Cell) -> tuple[int, bool]:
            job = self.journal.entry(cell)["job"] or {}
            return self.ledger.certainty(cell.id, job.get("id")), self.progress[cell.id].reopened

        left = [
            cell
            for cell in self.current.cells
            if not self.journal.complete(cell)
            and self.progress[cell.id].turn is Turn.AHEAD
            and not self.roster.bad & set(cell.hosts)
        ]
        return sorted(left, key=order)

    def _through(self) -> int:
        """How many cells are complete or given up, without the one that runs now."""
        taken = (each.turn is Turn.TAKEN or self.journal.cells[cell]["state"] == "complete"
                 for cell, each in self.progress.items())  # fmt: skip
        return sum(taken) - 1

    def _others_go_on(self) -> bool:
        """Whether other cells that are still to be followed have a job."""
        return any(self.progress[cell].turn is Turn.AHEAD for cell in self.ledger.cells)

    def _sharing(self, cell: Cell) -> list[Cell]:
        """The cells of the job to submit for `cell`: itself and others without a job that share it; else none."""
        if self.ledger.share(cell.id):
            return []
        if cell.id in self.ledger.inherited:
            return [cell]
        free = [each for each in self._left() if each.id != cell.id and not self.ledger.has(each.id)]
        together = self.transport.together(self.current.plan, [cell, *free])
        return [each for each in (cell, *free) if each in together]

    # --- a cell until it is settled -----------------------------------------------------------------

    def _settle(self, cell_id: str) -> None:
        """Run a cell, and again after a failure that may not recur, until it is complete or given up."""
        if self._recover(self.current.cell(cell_id)):
            return
        while True:
            for each in (self.current.cell(cell_id), *self._behind(self.current.cell(cell_id))):
                if each.id == cell_id or self.ledger.has(each.id):
                    self._adopt(each)
            self._make_room(cell_id)
            cell = self.current.cell(cell_id)
            inherited = cell_id in self.ledger.inherited
            answered = self._run_cell(cell)
            error, share = self.journal.entry(cell)["error"], self.ledger.share(cell_id)
            # If Slurm does not answer, the job may continue: it is followed, and no second one is submitted.
            unanswered = error is not None and error["kind"] == "slurm_unreachable"
            if unanswered:
                self.ledger.inherited.add(cell_id)
            else:
                self.ledger.over(cell_id)
                if error is not None:
                    self._cancel_behind(cell)
            if self.journal.complete(cell):
                self._compare(self.current.cell(cell_id), own=not inherited)
            if error is None or self.stop.asked:
                return
            retries = self.progress[cell_id].retries
            if inherited and not unanswered:  # the end of that job is known now; own attempts begin
                self._turn_never_came(cell, share, answered)
            elif not self._worth_another(cell, error, share, answered):
                return
            if cell_id not in self.ledger.inherited:
                self._set_aside(self.current.cell(cell_id))  # while it waits for another attempt, it has not failed
                self.journal.write()
            if self._others_go_on():  # at the same time it would measure their traffic: it runs after them
                self.progress[cell_id].enter(Turn.AHEAD)
                return
            if self.progress[cell_id].retries > retries:
                self.stop.wait(RETRY_S)

    def _worth_another(self, cell: Cell, error: Mapping[str, Any], share: JobShare | None, answered: bool) -> bool:
        """Whether a failed cell is to run again: without the nodes that failed it, since its step had not begun, or as
        a retry. Of several failures each counts: all of them must be such that another try may help.
        """
        failed = each_error(error)
        left = [one for one in failed if not (blame.may_retry(one) and self._replace(cell, one))]
        worth_it = all(blame.may_retry(one, TESTS[cell.test].continues) for one in failed)
        if worth_it and not left:
            return True
        if error["kind"] != "job_cancelled" and self._turn_never_came(cell, share, answered):
            return True
        progress = self.progress[cell.id]
        if not worth_it or progress.retries == self.policy.retries:
            return False
        progress.retries += 1
        later = ", after the cells whose job continues" if self._others_go_on() else ""
        self.journal.note(f"{cell.id}: retry {progress.retries} of {self.policy.retries}{later}")
        return True

    def _make_room(self, cell_id: str) -> None:
        """Move the files of earlier attempts aside, also those of cells whose job is submitted now as well."""
        cell = self.current.cell(cell_id)
        behind = self._behind(cell) if self.backend.scheduled else []
        for each in (*self._sharing(cell), *(each for each in behind if not self.ledger.has(each.id))):
            if each.id not in self.ledger.inherited:
                self._set_aside(self.current.cell(each.id))

    def _set_aside(self, cell: Cell) -> None:
        """Prepare the next attempt: keep the files of the last one elsewhere, and use another port."""
        entry = self.journal.entry(cell)
        if entry["started"] is None:
            self.journal.replan(cell)
            return
        self.run.set_aside(cell.id, entry["attempt"])
        # The old rendezvous may still hold its port.
        port = PORTS[(cell.master_port - PORTS[0] + 1) % len(PORTS)]
        moved = replace(cell, master_port=port, attempt=self.journal.next_attempt(cell))
        hosts = [self.current.plan.node(host) for host in cell.hosts]
        if not self.current.plan.named:  # others may be chosen
            moved = replace(moved, hosts=())
        elif hosts:
            moved = place(moved, hosts, self.current.plan, self.transport.ssh_config)
        self.current.amend(moved)

    def _compare(self, cell: Cell, own: bool) -> None:
        """Mark complete cells to run again if the newer `cell` shows that they were measured in another environment.

        A cell whose job was an earlier controller's (not `own`) may itself have the older environment.
        """
        if self.comparison is None:
            return
        for opened in self.comparison.reopened_by(self.current.plan, cell, self.journal.status, own):
            self.journal.note(f"{opened} runs again: {self.journal.cells[opened]['error']['message']}")
            self.progress[opened] = Progress(since=time.monotonic(), reopened=True)
            self.roster.move(self.current.cell(opened))
        self.journal.write()

    # --- nodes that fail ----------------------------------------------------------------------------

    def _replace(self, cell: Cell, error: Mapping[str, Any]) -> bool:
        """Whether the cell can run again without the node that failed it."""
        bad = error["host"]
        if not self.policy.replace_bad_nodes or KINDS[error["kind"]].fault != "node" or not self.backend.remote:
            return False
        if bad not in self.current.cell(cell.id).hosts:  # no node, or a launcher on the controller
            return False
        self._give_up(bad, cell, error)
        return bad not in self.current.cell(cell.id).hosts

    def _give_up(self, bad: str, cell: Cell, error: Mapping[str, Any]) -> None:
        """Stop using a node in `cell` and in all cells that are still to run.

        A spare replaces it; without one, cells move to good nodes if there are enough, and fail otherwise.
        """
        self.roster.give_up(bad, cell, error)
        self._leave_jobs()  # their steps are bound to their nodes
        for other in self.current.cells:
            taken = self.progress[other.id].turn is Turn.TAKEN and other.id != cell.id
            if self.journal.complete(other) or taken or self.roster.move(other) or self._waits(other):
                continue
            if self.journal.entry(other)["error"] is None:
                count = len(self.roster.good())
                why = f"needs {counted(other.num_nodes, 'node')}, {count} {are(count)} good: {error['message']}"
                self.journal.cell_state(other, "failed", {**error, "message": why, "stderr": []})

    # --- chains -------------------------------------------------------------------------------------

    def _behind(self, cell: Cell) -> list[Cell]:
        """The cells of a chain that are to run after this one, in order."""
        found, names = list[Cell](), {cell.id}
        for each in self.current.cells:
            if each.after in names and not self.journal.complete(each):
                found.append(each)
                names.add(each.id)
        return found

    def _cancel_behind(self, cell: Cell) -> None:
        """Cancel the jobs of the cells behind one that is not complete: what they need is not there."""
        behind = [each for each in self._behind(cell) if self.ledger.has(each.id)]
        for each in behind:
            self._adopt(each)
        jobs = {share.job_id for each in behind if (share := self.ledger.share(each.id)) and share.job_id}
        if jobs:
            self._cancel(jobs)

    def _tell_not_run(self) -> None:
        """Say which cells have not run because the one that they need is not complete."""
        waiting = [cell for cell in self.current.cells if self._waits(cell) and not self.journal.complete(cell)]
        if not waiting:
            return
        names = ", ".join(cell.id for cell in waiting)
        left = "; jobs for them wait in the queue" if any(self.ledger.has(cell.id) for cell in waiting) else ""
        self.journal.note(f"{names} {are(len(waiting))} not run: {waiting[0].after} is not complete{left}")

    # --- jobs that cells have -----------------------------------------------------------------------

    def _adopt(self, cell: Cell) -> None:
        """Find the job of the cell if its id was not received."""
        before = self.ledger.cells
        has_job = self.transport.adopt(self.current.plan, cell, self.journal.entry(cell), self.ledger)
        if has_job is not None:  # else running the cell reports that Slurm does not answer
            complete = [each.id for each in self.current.cells if self.journal.complete(each)]
            self.ledger.reconcile(cell.id, before, has_job, complete)

    def _turn_never_came(self, cell: Cell, share: JobShare | None, answered: bool) -> bool:
        """Whether the job that a cell shares ended before the cell's step began, and so before all later ones.

        These cells then get another job together.
        """
        job = self.journal.entry(cell)["job"] or {}
        if answered or not answers.over(job.get("state")) or not share or not share.follows_others:
            return False
        self._leave_jobs()
        return True

    def _leave_jobs(self) -> None:
        """Cancel the jobs that cells have; cells that are not complete are submitted again."""
        if self.ledger.cells:
            self._cancel(self.ledger.job_ids())

    def _leave_rest(self) -> None:
        """The user stopped the run: cancel its jobs and the cells that have not run."""
        going_on = {cell.id for cell in self.current.cells if self.ledger.has(cell.id)}
        received = self._cancel(None)
        for cell in self._left():
            # The state that an earlier controller gave a cell remains valid.
            if received if cell.id in going_on else self.journal.entry(cell)["state"] == "planned":
                self.journal.cell_state(cell, "cancelled")

    def _cancel(self, job_ids: set[str] | None) -> bool:
        """Cancel these jobs of the run, or all (None); returns whether the scheduler answered: then cells have none."""
        if not self.transport.cancel(self.current.plan, job_ids, patient=not self.stop.asked):
            self.journal.note("Slurm does not answer: jobs of this run may continue; `runner runs stop` cancels them")
            return False
        for cell_id in self.ledger.of_jobs(job_ids):
            cell = self.current.cell(cell_id)
            # No controller may have followed it to its end; over ssh checking that would take too long.
            unfollowed = self.transport.shared and self.journal.entry(cell)["started"] is None
            if not (unfollowed and self._recover(cell)):
                self.ledger.over(cell_id)
        if job_ids is None:
            self.ledger.inherited.clear()
        return True

    def _recover(self, cell: Cell) -> bool:
        """Whether the cell has completed without a controller; its measurements are then collected."""
        entry, share = self.journal.entry(cell), self.ledger.share(cell.id)
        unfollowed = entry["started"] is None
        if entry["state"] == "complete" or entry["error"] is not None or (unfollowed and not share):
            return False
        if cell.hosts:
            self.transport.gather(self.current.plan, cell)  # a node without artefacts is no failure here
        if unfollowed or not cell.hosts:  # its agents have recorded its nodes, those of an earlier job as well
            found = self._placed_by_agents(cell, share.job_id if share else (entry["job"] or {}).get("id"))
        else:
            found = cell
        if found is None or not self._ended_well(found):
            return False
        if found is not cell:
            self.current.amend(found)
        self.journal.collect(self.current.plan, found)
        self._complete(found)
        self._date(found)
        how = "it ended without a controller" if cell.id in self.ledger.inherited else "it ended before its turn came"
        self.journal.note(f"{cell.id}: complete, {how}")
        self.ledger.over(cell.id)
        self._compare(found, own=False)
        return True

    def _date(self, cell: Cell) -> None:
        """Write down when a cell that nobody followed ran, by its nodes' clocks."""
        entry, outcomes = self.journal.entry(cell), read_outcomes(self.run, cell).values()
        if all(outcome.ended_s for outcome in outcomes):
            entry["started"] = entry["started"] or at(min(outcome.started_s for outcome in outcomes))
            entry["ended"] = at(max(outcome.ended_s for outcome in outcomes))
            self.journal.write()

    def _placed_by_agents(self, cell: Cell, job_id: str | None) -> Cell | None:
        """The cell on the nodes that its agents in that job recorded; None if they recorded none."""
        nodes = {node.name: node for node in self.current.plan.nodes}
        hosts = self.run.read_placement(cell.id, job_id)
        if not hosts or not nodes.keys() >= set(hosts):
            return None
        return cell if cell.hosts else place(cell, [nodes[name] for name in hosts], self.current.plan, None)

    def _ended_well(self, cell: Cell) -> bool:
        """Whether every node has a good outcome of this attempt, not of an earlier one."""
        outcomes = read_outcomes(self.run, cell)
        return all(
            host in outcomes and outcomes[host].ended_well and outcomes[host].attempt == cell.attempt
            for host in cell.hosts
        )

    # --- one attempt at a cell ----------------------------------------------------------------------

    def _run_cell(self, cell: Cell) -> bool:
        """Run a cell once; returns whether any agent answered."""
        total, through = len(self.current.cells), self._through()
        kept_from = set(cell.hosts) if self.backend.by_ssh else set()
        aliases = {node.name: node.alias for node in self.current.plan.nodes}
        streams = Streams(self.journal, cell, aliases, kept_from)

        clock, of, others_s = Clock(), self._kind(cell), self._others_s()

        def shown(fraction: float, text: str) -> float | None:
            own_s = self.timings.left_s(of, clock)
            left_s = own_s + others_s if own_s is not None and others_s is not None else None
            self.display.at(through + fraction, total, f"{cell.id} {text}", left_s=left_s)
            return own_s

        def on_progress(fraction: float, phase: str, detail: str = "", result: str = "") -> None:
            clock.enter(phase)
            eta_s = shown(fraction, "; ".join(filter(None, (detail or phase, result))))
            progress = {"fraction": round(fraction, 3), "phase": phase, "eta_s": eta_s, "at": now()}
            self.journal.entry(cell)["progress"] = {**progress, "detail": detail, "result": result}

        def on_notice(host: str, text: str) -> None:
            alias = {node.name: node.alias for node in self.current.plan.nodes}.get(host, host)
            self.journal.note(f"{cell.id}: {alias}: {text}")

        self.journal.cell_state(cell, "running")
        entry, started = self.journal.entry(cell), time.monotonic()
        queued_before_s = queued_s(entry)

        def ran_s() -> float:
            # The moments of a queue are whole seconds.
            return max(0.0, time.monotonic() - started - (queued_s(entry) - queued_before_s))

        def on_failure(error: Mapping[str, Any]) -> None:
            self.journal.note(f"{cell.id}: {self._described(error)}; stopping the other nodes")

        live: Callable[[], None] = lambda: self.journal.live(cell, watch.nodes)  # noqa: E731

        def send(stopped: Callable[[], bool]) -> dict[str, Any] | None:
            if self.ledger.share(cell.id):  # its job was submitted after the data was sent
                return None
            begun: Callable[[], object] = lambda: shown(0.0, "sending data")  # noqa: E731
            return self.data.send(cell, self._sharing(cell), self.roster.bad, begun, stopped)

        supply = self.data.supply(cell, send)
        watch = CellRun(cell, self.stop, on_progress, streams.line, live, on_failure, supply, on_notice)
        watch.stall_s = TESTS[cell.test].silent_s
        try:
            fault = send(lambda: self.stop.asked) if supply is None else None
            if fault is None and not self.stop.asked:
                if supply is None:
                    clock.enter("starting")
                    shown(0.0, "starting")
                context = self._context(cell, through, clock)
                fault = self.transport.converse(self.current.plan, cell, watch, self.data.on_nodes, context)
            if supply is not None:
                fault = self._supplied(cell, supply) or fault
        finally:
            if supply is not None:
                supply.abandon()
            streams.close()
        if self.stop.asked:
            self._leave_jobs()  # before its next step begins
        self._end_attempt(watch, fault, ran_s, clock)
        return any(session.answered for session in watch.sessions)

    def _supplied(self, cell: Cell, supply: Supply) -> dict[str, Any] | None:
        """The error of an attempt at `cell` whose data cannot be sent. Raises what its preparation has raised: the run
        ends as if the cell had not begun.
        """
        try:
            return supply.result()
        except Exception:  # not a second Ctrl-C
            self.journal.cell_state(cell, "cancelled")
            raise

    def _end_attempt(
        self, watch: CellRun, fault: dict[str, Any] | None, ran_s: Callable[[], float], clock: Clock
    ) -> None:
        """Gather the artefacts of an attempt, after failures too, and record how it ended. `ran_s`: seconds of it so
        far, without those in a queue.
        """
        cell, alias = watch.cell, self.current.alias
        state, error = watch.state()
        if fault and state != "complete" and (state != "cancelled" or fault["kind"] == "slurm_unreachable"):
            # Whether somebody stopped the run or cancelled its job: what did not finish is nobody's fault.
            state, error = "cancelled" if fault["kind"] == "job_cancelled" else "incomplete", fault
        clock.enter("gathering")
        missing = self.transport.gather(self.current.plan, cell) if watch.sessions else {}  # else nothing began
        for name, problem in missing.items():
            self.not_gathered.add(name)
            what = f"artefacts of {alias(name)} were not gathered, they stay there: {problem.message}"
            self.journal.note(f"{cell.id}: {what}")
        if missing and state == "complete":
            found = (_not_gathered(host, problem) for host, problem in missing.items())
            state, error = "incomplete", joined(list({(one["host"], one["kind"]): one for one in found}.values()))
        self.journal.collect(self.current.plan, cell)
        self.journal.entry(cell)["nodes"] = watch.nodes()
        self.journal.entry(cell)["exit_code"] = blame.exit_code(watch.outcomes)
        if state == "complete":
            clock.enter(None)
            if watch.supply is None:  # else its start is no measure for others
                self.journal.entry(cell)["phases"] = clock.seconds
                self.timings.add(self._kind(cell), clock.seconds)
            self._complete(cell)
        else:
            self.journal.cell_state(cell, state, error)
        queue = f", {span_text(waited_s)} in the queue" if (waited_s := queued_s(self.journal.entry(cell))) else ""
        self.journal.note(f"{cell.id}: {state} after {ran_s():.0f} s{queue}")
        for one in each_error(error):
            self.journal.note(f"  {self._described(one)}")
            for line in one["stderr"][-8:]:
                self.display.note(f"    {line}")

    def _described(self, error: Mapping[str, Any]) -> str:
        """The error of one node as text, with the node."""
        host = error["host"]
        return error["message"] + (f" on {self.current.alias(host)} ({host})" if host else "")

    def _kind(self, cell: Cell) -> str:
        """The kind of cell that it is, for the time that it takes."""
        plan = self.current.plan
        return kind({key: getattr(plan, key, None) for key in PLAN_KEYS}, asdict(cell))

    def _others_s(self) -> float | None:
        """The seconds that the cells take which are still to run after this one; None if that is not known of all."""
        seconds = [self.timings.total_s(self._kind(cell)) for cell in self._left()]
        return None if None in seconds else sum(one for one in seconds if one is not None)

    def _complete(self, cell: Cell) -> None:
        self.journal.cell_state(cell, "complete", plan_hash=fingerprint(self.current.plan, cell))

    def _context(self, cell: Cell, through: int, clock: Clock) -> CellContext:
        """What the transport of `cell` may need to know, and the callbacks for its decisions."""
        total, journal = len(self.current.cells), self.journal
        reasons = set[str]()

        def on_job(info: answers.JobInfo) -> None:
            entry = journal.entry(cell)
            entry["job"] = answers.as_status(info)
            clock.enter(None if info.state == "waiting" else clock.phase or "starting")  # a queue says nothing of cells
            if info.state == "waiting":
                position = f", place {info.position}" if info.position else ""
                start = f", expected {info.start}" if info.start else ""
                # The bar's text is cut in a narrow terminal: Slurm's own reason has a line of its own.
                if info.reason and info.reason not in reasons:
                    journal.note(f"{cell.id} waits as job {info.job_id}: {info.advice or info.reason}")
                reasons.add(info.reason)
                self.display.at(through, total, f"{cell.id} waits in Slurm's queue{position}{start}")
            elif entry["state"] == "waiting":
                self.display.at(through, total, f"{cell.id} starting as job {info.job_id}")
            placed = self.current.cell(cell.id)  # perhaps placed since
            journal.cell_state(placed, "waiting" if info.state == "waiting" else "running")

        def on_placed(nodes: Sequence[Node]) -> Cell:
            new = tuple(node for node in nodes if node not in self.current.plan.nodes)
            placed = place(cell, nodes, self.current.plan, None)
            self.current.amend(placed, nodes=(*self.current.plan.nodes, *new))
            journal.cell_state(placed, "running")
            return placed

        entry, sharing = journal.entry(cell), self._sharing(cell)
        return CellContext(entry, sharing, self.ledger, on_job, on_placed, self._behind(cell), journal.write)

    def _judge(self) -> dict[str, Any]:
        self.display.at(1, 1, "writing the report")
        telemetry.compact(self.run.telemetry_streams(asdict(self.current.plan)), self.run.telemetry)
        return judge(self.run)


def _not_gathered(host: str, problem: Problem) -> dict[str, Any]:
    """The error of a node whose artefacts could not be fetched; of what failed there, if that is known."""
    kind = problem.kind if problem.kind != "unknown" else "not_gathered"
    if kind == "controller_disk_full":
        return blame.error(kind, f"artefacts were not gathered: {problem.message}")
    return blame.error(kind, f"its artefacts were not gathered: {problem.message}", host)
