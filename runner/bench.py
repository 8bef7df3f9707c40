"""`runner bench`: from a plan to its records, summary and report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner import __version__, backends, node, process, records, telemetry
from runner.backends import Talk
from runner.blame import LAUNCHER
from runner.cells import CellRun, Stop
from runner.display import Display
from runner.errors import InfrastructureError, Interrupted
from runner.inventory import Node, fold
from runner.plan import Cell, Plan, environment, job
from runner.rundir import RunDir, disk_errors, hold_nodes, now, write_json_atomic, write_text_atomic

GRACE_S = 3.0
SFT_PACKAGES = {"torch", "deepspeed", "transformers", "accelerate"}
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")


# --- before anything starts -----------------------------------------------------------------------


def preflight(
    nodes: Sequence[Node], device: str, engine: str, tests: Sequence[str], ssh_config: str | None
) -> dict[str, str]:
    """Ask every node, at once, for whatever would stop a cell: problems by node name, none for a good one."""
    backend = nodes[0].backend
    request = {
        "kind": "check",
        "version": __version__,
        "scratch": nodes[0].scratch,
        "min_free_disk_gib": nodes[0].min_free_disk_gib,
        "packages": sorted({"torch", engine} - {"torchrun"} | (SFT_PACKAGES if "sft" in tests else set())),
        "programs": ["rsync"] if backend == "ssh" else [],
        "gpus": nodes[0].gpus if device == "cuda" else 0,
    }
    if backend == "local":  # this process is on the node already
        answers = {nodes[0].name: node.check(request)}
        problems: dict[str, str] = {}
    else:
        answers, problems = backends.ask(nodes, backend, ssh_config, request)
    for name, answer in answers.items():
        if answer["problems"]:
            problems[name] = "; ".join(answer["problems"])
    return problems


def choose(
    nodes: Sequence[Node], count: int, problems: Mapping[str, str], skip_bad: bool
) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """The first `count` nodes, or with `skip_bad` the first good ones and what was passed over and why.

    Raises InfrastructureError naming every bad node at once.
    """
    wanted = nodes if skip_bad else nodes[:count]
    bad = [f"{n.alias} ({n.name}): {problems[n.name]}" for n in wanted if n.name in problems]
    good = tuple(n for n in wanted if n.name not in problems)[:count]
    if len(good) < count:
        hint = "" if skip_bad else "; mend them, or let others take their place with --skip-bad-nodes"
        what = (
            f"{len(good)} of {len(wanted)} nodes are good, {count} wanted"
            if skip_bad
            else f"{len(bad)} of {count} nodes are bad"
        )
        raise InfrastructureError("\n  ".join([f"{what}{hint}", *bad]))
    last = max(wanted.index(n) for n in good)
    passed = [f"{n.alias} ({n.name}): {problems[n.name]}" for n in wanted[: last + 1] if n.name in problems]
    return good, tuple(passed)


# --- the run --------------------------------------------------------------------------------------


class Run:
    """Carries out a plan in its run directory."""

    def __init__(self, plan: Plan, run: RunDir, ssh_config: str | None, display: Display, data: str | None) -> None:
        self.plan, self.run, self.ssh_config, self.display = plan, run, ssh_config, display
        self.data = data
        self.nodes = {n.name: n for n in plan.nodes}
        self.stop = Stop(display)
        self.status = run.read_status()
        self.records: list[records.Record] = []
        self.not_gathered: set[str] = set()
        self.log = open(run.log, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115

    def execute(self) -> dict[str, Any]:
        """Run every cell, then judge and report; returns the summary. Measured values are never lost."""
        with self.stop.listening(), disk_errors(self.run.path):
            self._save("running")
            self.log.write(f"{now()} {self.plan.command}\n")
            with self.display.progress(len(self.plan.cells)):
                try:
                    self._send_data()
                except InfrastructureError:
                    self._save("failed")
                    raise
                for index, cell in enumerate(self.plan.cells):
                    if self.stop.asked:
                        self._cell_state(cell, "cancelled")
                        continue
                    self._run_cell(index, cell)
            states = {c["state"] for c in self.status["cells"].values()}
            final = next((s for s in ("failed", "incomplete", "cancelled") if s in states), "complete")
            self._save(final)
            self._clean()
            return self._judge()

    def _note(self, text: str) -> None:
        """One line for the person and for the log."""
        self.display.note(text)
        self.log.write(f"{now()} {text}\n")

    def _save(self, state: str) -> None:
        self.status["state"] = state
        self.run.write_status(self.status)

    def _cell_state(self, cell: Cell, state: str, error: dict[str, Any] | None = None) -> None:
        entry = self.status["cells"][cell.id]
        entry.update(state=state, error=error)
        entry["started" if state == "running" else "ended"] = now()
        self.run.write_status(self.status)

    def _send_data(self) -> None:
        """Prepared data goes to each node once; rsync finds what is there already."""
        if self.data is None or self.plan.backend == "local":
            return
        first = self.plan.nodes[0]
        target = f"{first.scratch}/data/{Path(self.data).name}"
        self.display.at(0, 1, "sending data")
        failures = backends.send(
            self.plan.nodes, str(self.ssh_config), self.data, target, stopped=lambda: self.stop.asked
        )
        if self.stop.asked:
            return
        if failures:
            raise InfrastructureError(
                "\n  ".join(["sending the data failed", *(f"{n}: {r}" for n, r in failures.items())])
            )
        self.data = target

    def _run_cell(self, index: int, cell: Cell) -> None:
        total = len(self.plan.cells)

        def on_progress(fraction: float, phase: str) -> None:
            self.display.at(index + fraction, total, f"{cell.id} {phase}")

        remote = self.plan.backend != "local"
        streams: dict[tuple[str, str], Any] = {}

        def on_line(host: str, file: str, line: str) -> None:
            if remote and host != LAUNCHER:  # what a dying node said is kept even if nothing can be gathered
                if (host, file) not in streams:
                    folder = self.run.cell(host, cell.id)
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    streams[host, file] = open(folder / Path(file).name, "w", encoding="utf-8")  # noqa: SIM115
                streams[host, file].write(line + "\n")
            if not file.endswith(".jsonl"):
                alias = self.nodes[host].alias if host in self.nodes else host
                self.log.write(f"{now()} {cell.id} {alias} {file}: {line}\n")

        self._cell_state(cell, "running")
        self.display.at(index, total, f"{cell.id} starting")
        run = CellRun(cell, self.stop, on_progress, on_line, deadline=time.monotonic() + cell.params["timeout_s"])
        run.talks = self._talks(cell)
        try:
            backends.converse(run.talks, run.hear, run.word, patience_s=4 * GRACE_S + 5)
        finally:
            for stream in streams.values():
                stream.close()
            self._sweep([talk for talk in run.talks if talk.name not in run.outcomes])
        state, error = run.state()
        for name, reason in self._gather(cell).items():
            self.not_gathered.add(name)
            self._note(f"{cell.id}: artefacts of {self.nodes[name].alias} were not gathered, they stay there: {reason}")
            if state == "complete":
                state = "incomplete"
                error = {"message": f"its artefacts were not gathered: {reason}", "host": name, "stderr": []}
        self._collect(cell)
        self._cell_state(cell, state, error)
        seconds = f" after {time.monotonic() - run.deadline + cell.params['timeout_s']:.0f} s"
        self._note(f"{cell.id}: {state}{seconds}")
        if error:
            where = f" on {self.nodes[error['host']].alias} ({error['host']})" if error["host"] in self.nodes else ""
            self._note(f"  {error['message']}{where}")
            for line in error["stderr"][-8:]:
                self.display.note(f"    {line}")

    def _talks(self, cell: Cell) -> list[Talk]:
        common = {
            "kind": "cell",
            "run_id": self.plan.run_id,
            "cell": cell.id,
            "marker": f"{self.plan.run_id}/{cell.id}",
            "heartbeat_timeout_s": backends.SILENCE_S,
            "telemetry_interval_s": 1.0,
            "grace_s": GRACE_S,
        }
        reach = backends.BACKENDS[self.plan.backend]
        secrets = {key: os.environ[key] for key in SECRETS if key in os.environ}
        talks = []
        for index, host in enumerate(cell.hosts):
            request = {
                **common,
                "host": host,
                "scratch": self.nodes[host].scratch,
                "cell_dir": cell.cell_dir,
                "job": job(self.plan, cell, self.nodes[host], self.data),
                "argv": cell.launch.argv[index],
                "env": environment(cell, self.nodes[host]),
                "secrets": secrets,
                "rendezvous_port": cell.master_port if index == 0 else None,
            }
            talks.append(Talk(host, reach(self.nodes[host], backends.AGENT, self.ssh_config), request))
        if cell.launch.head:
            folder = self.run.launcher(cell.id)
            folder.mkdir(mode=0o700, parents=True)
            for name, content in cell.launch.files.items():
                write_text_atomic(folder / name, content)
            first = self.nodes[cell.hosts[0]]
            request = {
                **common,
                "host": LAUNCHER,
                "scratch": None,
                "cell_dir": str(folder),
                "argv": cell.launch.head,
                "env": dict(cell.launch.head_env),
                "isolated": True,
                "hold": True,
            }
            talks.append(Talk(LAUNCHER, backends.local(first, backends.AGENT, None), request))
        return talks

    def _sweep(self, lost: Sequence[Talk]) -> None:
        """End what an agent that was itself killed left on its node; a node that is gone gives no answer."""
        for talk in lost:
            if self.plan.backend == "local" or talk.name == LAUNCHER:
                process.stop_marked(talk.request["marker"], GRACE_S)
        nodes = [self.nodes[talk.name] for talk in lost if talk.name != LAUNCHER]
        if nodes and self.plan.backend != "local":
            request = {"kind": "sweep", "marker": lost[0].request["marker"], "grace_s": GRACE_S}
            backends.ask(nodes, self.plan.backend, self.ssh_config, request, timeout_s=15)

    def _gather(self, cell: Cell) -> dict[str, str]:
        if self.plan.backend == "local":
            return {}
        targets = {}
        for host in cell.hosts:
            folder = self.run.cell(host, cell.id)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            targets[host] = str(folder)
        nodes = [self.nodes[host] for host in cell.hosts]
        return backends.gather(nodes, str(self.ssh_config), cell.cell_dir, targets)

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
        for host in cell.hosts:
            for path in sorted(self.run.cell(host, cell.id).glob("rank*.jsonl")):
                events = records.parse_jsonl(path.read_text(errors="replace"))
                self.records.extend(records.from_events(events, base, host))
        write_text_atomic(self.run.records, "".join(f"{record.to_json()}\n" for record in self.records))

    def _clean(self) -> None:
        """Remove what was gathered from the nodes; one that could not be gathered from keeps it all."""
        if self.plan.backend == "local":
            return
        request = {"kind": "clean", "scratch": self.plan.nodes[0].scratch, "run_id": self.plan.run_id}
        gathered = [node for node in self.plan.nodes if node.name not in self.not_gathered]
        backends.ask(gathered, self.plan.backend, self.ssh_config, request, timeout_s=15)

    def _judge(self) -> dict[str, Any]:
        self.display.at(1, 1, "writing the report")
        telemetry.compact(self.run.telemetry_streams(asdict(self.plan)), self.run.telemetry)
        return judge(self.run)


def judge(run: RunDir) -> dict[str, Any]:
    """Summary and report of a run from what its directory holds; repeatable at any time."""
    from runner import analysis, report  # not on the way to the first step

    plan, status = run.read_plan(), run.read_status()
    recorded = records.load(run.records.read_text(errors="replace")) if run.records.exists() else []
    facts = run.read_facts(plan)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (cell, host), stream in run.telemetry_streams(plan).items():
        samples.setdefault(cell, {})[host] = telemetry.read(stream)
    summary = analysis.summarise(plan, status, recorded, facts, telemetry=samples)
    with disk_errors(run.path):
        write_json_atomic(run.summary, summary)
        report.write(run.path, plan, status, summary, recorded, facts, telemetry=samples)
    return summary


def execute(
    plan: Plan, results: Path, state: Path, transport: str | None, display: Display, data: str | None
) -> tuple[RunDir, dict[str, Any]]:
    """Create the run directory, keep others off the nodes, and run. `transport` is the ssh_config's path."""
    with hold_nodes(state / "nodes", [n.name for n in plan.nodes], plan.run_id):
        run = RunDir.create(results, json.loads(json.dumps(plan.to_dict())))
        with run.alive():
            if transport:
                with disk_errors(run.path):
                    write_text_atomic(run.path / "ssh_config", Path(transport).read_text())
            try:
                return run, Run(plan, run, transport, display, data).execute()
            except KeyboardInterrupt:
                status = run.read_status()
                status["state"] = "incomplete"
                for cell in status["cells"].values():
                    if cell["state"] in ("planned", "running"):
                        cell["state"] = "cancelled"
                run.write_status(status)
                raise Interrupted(f"left at once; what was written lies in {run.path}") from None


def summary_line(nodes: Sequence[Node]) -> str:
    return f"{len(nodes)} nodes: {fold([n.alias for n in nodes])} = {fold([n.name for n in nodes])}"
