"""The cost of many nodes for the controller: planning them, and receiving their output in a simulation.

    .venv/bin/python benchmarks/scale.py plan --nodes 512
    .venv/bin/python benchmarks/scale.py fleet --agents 25,50,100,200

`plan` takes each step from an inventory's listing to the commands, job files, Slurm scripts and gather
targets of a sweep 1,2,4,…,N with the tests torch and sft, and times it. Every repeat is a fresh process, so
nothing is cached; imports are a separate row. Half of the nodes are measured too: a step that grows by 2 is linear,
one that grows by 4 is quadratic.

`fleet` starts N agents (`python -m runner.node`) on this machine under one controller: `talk.converse` with
`watch.CellRun`, lines written to files as a run over ssh does. Below each agent one small program writes what
8 ranks of a fine-tuning cell write: per step and rank four values and on rank 0 also loss and progress, and
per rank a line of log each tenth step. All nodes step at the same moment, as synchronous training does, so
lines come in bursts. The agents' sampler takes a sample a second. Lag is the time from a line's own time stamp
to the call of the handler; it includes up to 0.1 s of the agent's polling.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

GPUS_PER_NODE = 8
LIMIT_S = 600
RUN_ID = "20261121-120000-abcd"


# --- planning ---------------------------------------------------------------------------------------


def listing(num_nodes: int) -> dict[str, Any]:
    """The output of `ansible-inventory --list` for hosts whose numbers have gaps: every eighth is missing."""
    numbers = [n for n in range(1, 2 * num_nodes + 2) if n % 8][:num_nodes]
    hostvars = {
        f"fukushimadc-02-hgx-{number:04d}": {
            "ansible_host": f"10.2.{number // 250}.{number % 250 + 1}",
            "ansible_port": 44222,
            "runner_host_key": f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{number:043d}",
            "runner_python": "/opt/shakedown/env/bin/python",
            "runner_gpus_per_node": GPUS_PER_NODE,
            "runner_device": "cuda",
            "runner_hardware": "h200-sxm",
            "runner_nics_per_node": 2,
            "runner_nic_gbit_per_s": 400,
            "runner_env": {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_SOCKET_IFNAME": "bond0"},
        }
        for number in numbers
    }
    return {"_meta": {"hostvars": hostvars}, "all": {"children": ["gpu_nodes"]}, "gpu_nodes": {"hosts": list(hostvars)}}


def request(num_nodes: int) -> Any:
    """A request for a sweep over the powers of two up to `num_nodes`; the global batch divides at each."""
    from runner.plan import config
    from runner.plan.request import Request

    model = config.load_model("llama-2-7b").model_dump()
    deepspeed = config.load_deepspeed(model["deepspeed"], {})
    batch = num_nodes * GPUS_PER_NODE * 16
    return Request(
        run_id=RUN_ID,
        created="2026-11-21T12:00:00Z",
        command="runner bench --sweep 1,2,4,8",
        inventory="inventory/large",
        run_dir=f"/srv/results/{RUN_ID}",
        tests={
            "torch": config.load_test("torch", {}).model_dump(),
            "sft": config.load_test("sft", {"global_batch": batch}).model_dump(),
        },
        model=model,
        deepspeed=deepspeed,
        hardware={"name": "h200-sxm", **config.load_hardware("h200-sxm").model_dump()},
        targets=config.load_targets(),
        node_counts=tuple(1 << power for power in range(num_nodes.bit_length())),
        engine="torchrun",
        backend="ssh",
        scaling="weak",
        repeats=1,
        gpus_per_node=GPUS_PER_NODE,
        device="cuda",
        ssh_config="/run/user/0/shakedown/ssh_config",
    )


def gather_targets(planned: Any) -> dict[tuple[str, str], Path]:
    """(cell id, host) -> the controller's folder for its artefacts."""
    from runner.results.rundir import RunDir

    run = RunDir(Path(planned.run_dir))
    return {(cell.id, host): run.cell(host, cell.id).path for cell in planned.cells for host in cell.hosts}


def jobs(planned: Any) -> dict[tuple[str, str], str]:
    """(cell id, host) -> the text of its job.json, as sent to the agent."""
    from runner.plan import plan

    return {
        (cell.id, host): json.dumps(plan.job(planned, cell, planned.node(host), "/var/tmp/shakedown/data/builtin"))
        for cell in planned.cells
        for host in cell.hosts
    }


def sbatch_files(planned: Any) -> dict[str, str]:
    """Cell id -> its Slurm script, for a plan for backend slurm; named hosts give the longest kind of script."""
    from runner.cluster import slurm as slurm_settings
    from runner.launch.slurm import allocations
    from runner.launch.slurm import script as slurm

    settings = slurm_settings.Settings(partition="batch", account="perf")
    known = tuple(node.alias for node in planned.nodes)

    def script(cell: Any) -> str:
        name = f"shakedown-{planned.run_id}-{cell.id}-1"
        job = allocations.prepare(planned, name, [cell], "/srv/data/builtin", True, known, {}, {})
        return slurm.render(job, settings)

    return {cell.id: script(cell) for cell in planned.cells}


def failed_everywhere(planned: Any) -> tuple[list[Any], dict[str, Any]]:
    """Sessions and outcomes of the largest cell after one rank died and every other rank lost its peers."""
    from runner.launch.talk import AgentSession
    from runner.node.protocol import Outcome, RankEnd

    hosts = max(planned.cells, key=lambda cell: cell.num_nodes).hosts
    lost = [f"frame {n} of a traceback, as long as such lines usually are: /opt/env/lib/python" for n in range(19)]
    outcomes = {}
    for host in hosts:
        last = "CUDA error: out of memory" if host == hosts[-1] else "RuntimeError: Connection reset by peer"
        ranks = {f"rank{rank}": RankEnd(started=True, stderr=[*lost, last]) for rank in range(GPUS_PER_NODE)}
        outcomes[host] = Outcome(rc=1, ranks=ranks, engine_stderr=lost)
    return [AgentSession(host, (), {}) for host in hosts], outcomes


class Steps:
    """All steps from a listing to the first connection; keeps each result, and its time in `seconds`."""

    def __init__(self, num_nodes: int) -> None:
        self.seconds: dict[str, float] = {}
        given = listing(num_nodes)
        self._timed("imports: runner, pydantic, ClusterShell", self._imports)
        from runner.cluster import inventory, ssh
        from runner.launch import blame
        from runner.plan import build, describe
        from runner.system import nodeset

        requested = self._timed("configuration files", lambda: request(num_nodes))
        self.inventory = self._timed("inventory.parse", lambda: inventory.parse("inventory/large", given))
        self._timed("ssh_config", lambda: ssh.ssh_config(self.inventory, "/run/known_hosts"))
        self._timed("known_hosts", lambda: ssh.known_hosts(self.inventory))
        folded = self._timed("fold: names and aliases", self._fold)
        nodes = self._timed("select: the folded set", lambda: inventory.select(self.inventory, folded))
        self.plan = self._timed("plan.build", lambda: build.build(requested, nodes))
        self.json = self._timed("plan.json: to_dict and dumps", lambda: json.dumps(self.plan.to_dict()))
        self.text = self._timed("describe", lambda: describe.describe(self.plan, nodeset.fold))
        self.jobs = self._timed("job.json of each cell and node", lambda: jobs(self.plan))
        self.targets = self._timed("gather targets of each cell and node", lambda: gather_targets(self.plan))
        by_slurm = replace(requested, backend="slurm", slurm={"shared": True})
        slurm_plan = self._timed("plan.build for Slurm", lambda: build.build(by_slurm, nodes))
        self.scripts = self._timed("sbatch files of all cells", lambda: sbatch_files(slurm_plan))
        sessions, outcomes = failed_everywhere(self.plan)
        self.blamed = self._timed("blame: all nodes of one cell", lambda: blame.blame(sessions, outcomes))

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        value = call()
        self.seconds[name] = time.perf_counter() - started
        return value

    def _imports(self) -> None:
        from ClusterShell.NodeSet import NodeSet  # noqa: F401

        from runner.cluster import inventory, ssh  # noqa: F401
        from runner.launch import blame  # noqa: F401
        from runner.launch.slurm import allocations, script  # noqa: F401
        from runner.plan import build, config, describe, plan  # noqa: F401
        from runner.results import rundir  # noqa: F401
        from runner.system import nodeset  # noqa: F401

    def _fold(self) -> str:
        from runner.system.nodeset import fold

        fold([node.alias for node in self.inventory.nodes])
        return fold([node.name for node in self.inventory.nodes])


def plan_command(options: argparse.Namespace) -> None:
    """Time each step of planning in fresh processes, and print a Markdown table in ms."""
    if options.once:
        print(json.dumps(Steps(options.nodes).seconds))
        return
    if options.profile:
        import cProfile

        cProfile.runctx("Steps(n)", {"Steps": Steps, "n": options.nodes}, {}, sort="tottime")
        return
    sizes = (options.nodes // 2, options.nodes)
    taken: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(options.repeats):
        for size in sizes:
            argv = [sys.executable, __file__, "plan", "--once", "--nodes", str(size)]
            taken[size].append(json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout))
    print(f"{machine()}\n{options.repeats} repeats, each a fresh process; milliseconds, median (least–most)\n")
    print(f"| step | {sizes[1]} nodes | {sizes[0]} nodes | growth |\n| --- | ---: | ---: | ---: |")
    names = list(taken[options.nodes][0])
    imports = next(name for name in names if name.startswith("imports"))
    for name in names:
        print(_row(name, [[once[name] for once in taken[size]] for size in reversed(sizes)]))
    for label, left_out in (("**all, without imports**", {imports}), ("**all**", set())):
        totals = [
            [sum(s for name, s in once.items() if name not in left_out) for once in taken[size]]
            for size in reversed(sizes)
        ]
        print(_row(label, totals))


def _row(name: str, seconds: Sequence[Sequence[float]]) -> str:
    medians = [statistics.median(values) for values in seconds]
    cells = [
        f"{1e3 * median:.1f} ({1e3 * min(values):.1f}–{1e3 * max(values):.1f})"
        for median, values in zip(medians, seconds, strict=True)
    ]
    return f"| {name} | {' | '.join(cells)} | {medians[0] / medians[1]:.1f} |"


# --- receiving output -------------------------------------------------------------------------------

# Writes what 8 ranks write, without torch. SIGINT, with which the agents stop it, ends it immediately.
RANKS = r"""
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
ranks, step_s = int(sys.argv[1]), float(sys.argv[2])
events = [open(f"rank{r}.jsonl", "w", buffering=1) for r in range(ranks)]
prints = [open(f"rank{r}.stdout", "w", buffering=1) for r in range(ranks)]
def emit(rank, event, **fields):
    events[rank].write(json.dumps({"event": event, "rank": rank, "time_s": round(time.time(), 6), **fields}) + "\n")
for rank in range(ranks):
    emit(rank, "start", world_size=ranks, host="localhost", pid=0, device="cpu")
step = 0
while True:
    time.sleep(step_s - time.time() % step_s)
    context = {"step": step, "measured": True}
    for rank in range(ranks):
        emit(rank, "value", metric="step_time_s", value=step_s, context={**context, "started_s": time.time()})
        for metric in ("tokens", "loss_tokens", "positions"):
            emit(rank, "value", metric=metric, value=65536, context=context)
        if step % 10 == 0:
            prints[rank].write(f"{time.time():.6f} step {step}: NCCL INFO a line of log of the usual length\n")
    emit(0, "value", metric="loss", value=2.5, context=context)
    emit(0, "progress", done=step + 1, total=1000000, phase="training")
    step += 1
"""
EVENT_TIME = re.compile(r'"time_s": ([0-9.]+)')
LOG_TIME = re.compile(r"([0-9]+\.[0-9]{6}) step ")


class Files:
    """Writes the agents' lines as a run over ssh does: a file for each node and file name, and one log."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._streams: dict[tuple[str, str], Any] = {}
        self._log = open(folder / "benchmark.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def write(self, host: str, file: str, line: str) -> None:
        """Append a line to a node's file, and to the log unless the file holds events."""
        if (host, file) not in self._streams:
            folder = self._folder / "nodes" / host
            folder.mkdir(parents=True, exist_ok=True)
            self._streams[host, file] = open(folder / file, "w", encoding="utf-8")  # noqa: SIM115
        self._streams[host, file].write(line + "\n")
        if not file.endswith(".jsonl"):
            self._log.write(f"{host} {file}: {line}\n")

    def close(self) -> int:
        """Close all files; returns their number."""
        for stream in (*self._streams.values(), self._log):
            stream.close()
        return len(self._streams) + 1


class Moment(NamedTuple):
    """Wall clock, processor time of the controller and of its agents (all in s), and lines received so far."""

    clock_s: float
    controller_s: float
    agents_s: float
    lines: int


class Fleet:
    """One controller with `num_agents` agents, measured for `window_s` seconds while all of them send lines.

    With `leave` it ends by an exception instead of a request to stop.
    """

    def __init__(self, num_agents: int, step_s: float, window_s: float, leave: bool, folder: Path) -> None:
        from runner.cluster import inventory
        from runner.launch import signals, watch
        from runner.launch import talk as backends
        from runner.plan import build
        from runner.report.progress import Display

        self.num_agents, self.window_s, self.leave, self.folder = num_agents, window_s, leave, folder
        source = inventory.parse("inventory/fleet", listing(num_agents))
        # The cell only provides its time limit and launcher; the agents get separate requests.
        cell = build.build(_only(request(1), num_agents), source.nodes).cells[0]
        self.files = Files(folder)
        self.stop = signals.Stop(Display(quiet=True))
        self.cell = watch.CellRun(cell, self.stop, lambda *_: None, self._line, deadline=time.monotonic() + 900)
        argv = [sys.executable, *backends.AGENT]
        self.cell.sessions = [backends.AgentSession(host, argv, self._request(host, step_s)) for host in cell.hosts]
        self.lags: list[float] = []
        self.lines = 0
        self.rounds: list[float] = []
        self.began: Moment | None = None
        self.ended: Moment | None = None

    def _request(self, host: str, step_s: float) -> dict[str, Any]:
        from runner.node.requests import CellRequest

        return CellRequest(
            run_id=RUN_ID,
            cell="fleet",
            # One marker per agent: all agents share this machine, and each ends the processes with its marker.
            marker=f"{RUN_ID}-{os.getpid()}/{host}",
            host=host,
            scratch=str(self.folder / "scratch" / host),
            cell_dir=str(self.folder / "scratch" / host / "cell"),
            argv=[sys.executable, "-I", "-S", "-c", RANKS, str(GPUS_PER_NODE), str(step_s)],
            env={"OMP_NUM_THREADS": "1"},
        ).to_json()

    def _line(self, host: str, file: str, line: str) -> None:
        self.lines += 1
        match = EVENT_TIME.search(line) if file.endswith(".jsonl") else LOG_TIME.match(line)
        if match and self.began and not self.ended:
            self.lags.append(time.time() - float(match[1]))
        self.files.write(host, file, line)

    def _now(self) -> Moment:
        return Moment(time.monotonic(), time.process_time(), _children_s(), self.lines)

    def _next_word(self, session: Any) -> str | None:
        if session is self.cell.sessions[0]:
            moment = time.monotonic()
            self.rounds.append(moment)
            if not self.began and len(self.cell.started) == self.num_agents:
                self.began = self._now()
            elif self.began and not self.ended and moment - self.began.clock_s >= self.window_s:
                self.ended = self._now()
                if self.leave:
                    raise KeyboardInterrupt
                self.stop.asked = True
        return self.cell.next_word(session)

    def run(self) -> dict[str, Any]:
        """Start all agents, measure for the window, stop all; returns the durations, rates and peaks by name.

        Exits where an agent failed or the run was interrupted before the window ended.
        """
        from runner.launch import talk as backends
        from runner.node.protocol import PATIENCE_S

        before_mib, started, cpu_s = _peak_mib(), time.monotonic(), time.process_time()
        with contextlib.suppress(KeyboardInterrupt):
            backends.converse(self.cell.sessions, self.cell.receive, self._next_word, patience_s=PATIENCE_S)
        began, ended, stopped = self.began, self.ended, time.monotonic()
        if not (began and ended):
            raise SystemExit(f"left before all was measured: {self.cell.reason or 'interrupted, or an agent failed'}")
        seconds, lines = ended.clock_s - began.clock_s, ended.lines - began.lines
        controller_s = ended.controller_s - began.controller_s
        stop_reasons = [outcome.stopped for outcome in self.cell.outcomes.values()]
        lags = sorted(self.lags)
        inside = [moment for moment in self.rounds if began.clock_s <= moment <= ended.clock_s]
        return {
            "agents": self.num_agents,
            "start_s": began.clock_s - started,
            "start_cpu_s": began.controller_s - cpu_s,
            "lines_per_s": lines / seconds,
            "cpu_pct": 100 * controller_s / seconds,
            "cpu_us_per_line": 1e6 * controller_s / lines if lines else float("nan"),
            "agent_cpu_pct": 100 * (ended.agents_s - began.agents_s) / seconds / self.num_agents,
            "lag_median_s": statistics.median(lags) if lags else float("nan"),
            "lag_p99_s": lags[int(0.99 * (len(lags) - 1))] if lags else float("nan"),
            "gap_s": max(later - earlier for earlier, later in itertools.pairwise(inside)),
            "stop_s": stopped - ended.clock_s,
            "rss_mib": _peak_mib(),
            "rss_before_mib": before_mib,
            "files": self.files.close(),
            "silent": sum(1 for reason in stop_reasons if reason not in ("stop", None)),
            "unheard": self.num_agents - len(stop_reasons),
            "left_over": _left_over(),
        }


def _only(requested: Any, num_nodes: int) -> Any:
    """The request for one cell of test torch on `num_nodes` nodes."""
    return replace(requested, tests={"torch": requested.tests["torch"]}, node_counts=(num_nodes,))


def _peak_mib() -> float:
    """Peak resident memory of this process image; ru_maxrss would still hold that of the parent before exec."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(match[1]) / 1024 if match else float("nan")


def _children_s() -> float:
    """Processor time in s of the running agents, without their ranks."""
    import psutil

    total = 0.0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def _left_over() -> int:
    """The number of agents, and of processes started by them, that are still running."""
    import psutil

    marker = f"SHAKEDOWN_CELL={RUN_ID}-{os.getpid()}/".encode()
    found = {child.pid for child in psutil.Process().children(recursive=True)}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if any(word.startswith(marker) for word in (entry / "environ").read_bytes().split(b"\0")):
                    found.add(int(entry.name))
    return len(found)


COLUMNS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("agents", lambda r: f"{r['agents']}"),
    ("lines/s", lambda r: f"{r['lines_per_s']:,.0f}"),
    ("controller CPU %", lambda r: f"{r['cpu_pct']:.1f}"),
    ("µs per line", lambda r: f"{r['cpu_us_per_line']:.0f}"),
    ("peak MiB (before)", lambda r: f"{r['rss_mib']:.0f} ({r['rss_before_mib']:.0f})"),
    ("files", lambda r: f"{r['files']:,}"),
    ("lag ms, median", lambda r: f"{1e3 * r['lag_median_s']:.0f}"),
    ("lag ms, p99", lambda r: f"{1e3 * r['lag_p99_s']:.0f}"),
    ("longest round ms", lambda r: f"{1e3 * r['gap_s']:.0f}"),
    ("CPU % per agent", lambda r: f"{r['agent_cpu_pct']:.2f}"),
    ("start s (CPU)", lambda r: f"{r['start_s']:.1f} ({r['start_cpu_s']:.1f})"),
    ("stop s", lambda r: f"{r['stop_s']:.1f}"),
    ("silent, unheard, left", lambda r: f"{r['silent']}, {r['unheard']}, {r['left_over']}"),
    ("load", lambda r: f"{r['load']:.1f}"),
)


def fleet_command(options: argparse.Namespace) -> None:
    """Measure each number of agents in a fresh controller process, and print a Markdown table."""
    if options.folder:  # the controller of one size, in a separate process
        fleet = Fleet(int(options.agents), options.step_s, options.seconds, options.leave, options.folder)
        print(json.dumps(fleet.run()))
        return
    how = "left immediately, as by a second Ctrl-C" if options.leave else "asked to stop"
    print(f"{machine()}\na step each {options.step_s:g} s, {options.seconds:g} s measured, then {how}\n")
    print(f"| {' | '.join(name for name, _ in COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}")
    for size in options.agents.split(","):
        with tempfile.TemporaryDirectory(prefix="shakedown-fleet-") as folder:
            argv = [sys.executable, __file__, "fleet", "--agents", size, "--folder", folder]
            argv += ["--step-s", str(options.step_s), "--seconds", str(options.seconds)]
            load = os.getloadavg()[0]
            result = _controller([*argv, *(["--leave"] if options.leave else [])])
        print(f"| {' | '.join(show({**result, 'load': load}) for _, show in COLUMNS)} |", flush=True)


def _controller(argv: list[str]) -> dict[str, Any]:
    """The result of one controller, from its output. On an interruption it gets 120 s to end its agents."""
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = child.communicate(timeout=LIMIT_S)
    except BaseException:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(120)
        except subprocess.TimeoutExpired:
            child.kill()  # its agents end on their own, since their connection is closed
            child.wait()
        raise
    if child.returncode:
        raise SystemExit(f"the controller ended with status {child.returncode}")
    return json.loads(out)


# --- both -------------------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores, load and Python version of this machine, in one line."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{cpu}, {cores} cores, load {load:.1f}; Python {platform.python_version()}"


def main() -> None:
    """Parse the command line and run `plan` or `fleet`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    plan = commands.add_parser("plan", help="time each step of planning")
    plan.add_argument("--nodes", type=int, default=512, help="a power of two")
    plan.add_argument("--repeats", type=int, default=7)
    plan.add_argument("--once", action="store_true", help="one repeat, as JSON")
    plan.add_argument("--profile", action="store_true", help="print where the time goes, by function")
    plan.set_defaults(command=plan_command)
    fleet = commands.add_parser("fleet", help="one controller and many agents on this machine")
    fleet.add_argument("--agents", default="25,50,100,200", metavar="N,N,…")
    fleet.add_argument("--step-s", type=float, default=5.0, help="between training steps; large: no lines at all")
    fleet.add_argument("--seconds", type=float, default=30.0, help="how long to measure once all have started")
    fleet.add_argument("--leave", action="store_true", help="end by an exception instead of asking to stop")
    fleet.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    fleet.set_defaults(command=fleet_command)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that open resources are cleaned up
    options.command(options)


if __name__ == "__main__":
    main()
