"""From the start of Ray to "N nodes ALIVE": supervisors of engine `ray` beside bare `ray start`, in pairs.

    .venv/bin/python benchmarks/ray_ready.py --nodes 2 4 --pairs 3

The nodes are addresses of loopback, so that all of them share this machine's cores: the numbers compare two ways of one
machine, and are no measure of a cluster's start. Both ways give `ray start` the same options and the same token.

- bare: the head, then, once its API answers, all workers; both are asked for every 0.1 s, as a patient person's script
  would, and a worker that gives up (Ray waits for the head's GCS a few seconds only) is started again.
- ours: `runner.node.ray` on each node, until that of the head has counted all nodes and their GPUs. It claims ports,
  meets the others, proves the token, and starts each worker as soon as the head's GCS answers.

Templates for Slurm sleep instead of asking: Ray's own guide and those of trainers 10 s after the head, and as long
again for the workers. Seconds are on the clock, and `busy` is the load of the machine, per core, when a pair began.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from runner.plan.engines import ray
from runner.plan.engines.ranks import Ranks
from runner.results.celldir import CellDir
from runner.system import process
from runner.system.places import ROOT

PAGE = ROOT / "benchmarks" / "results" / "ray_ready.md"
SLEEPS_S = 20.0  # of a template, for head and workers
PROBE_S = 0.1
LIMIT_S = 300.0
STORE_BYTES = 100 << 20
JOIN = "joined"


@dataclass(frozen=True)
class Host:
    """A node: an address of loopback."""

    name: str
    address: str
    python: str

    @property
    def alias(self) -> str:
        """Its name."""
        return self.name


@dataclass(frozen=True)
class Pair:
    """One start in each way, in s; `busy` is the load per core before it."""

    nodes: int
    bare_s: float
    ours_s: float
    busy: float


def hosts(count: int, python: str) -> list[Host]:
    """So many nodes."""
    return [Host(f"n{index}", f"127.0.0.{2 + index}", python) for index in range(count)]


def bare(nodes: Sequence[Host], folder: Path) -> float:
    """Seconds until all nodes are ALIVE that `ray start` alone has started."""
    marker = f"bare/{secrets.token_hex(4)}"
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    blocks = ray.in_order(marker, range(32768, 61000))
    kept = {name: value for name, value in os.environ.items() if name not in ray.CLEARED} | {process.MARKER: marker}
    children: list[subprocess.Popen[bytes]] = []
    workers: list[tuple[list[str], ray.Ports]] = []

    def start(argv: list[str], ports: ray.Ports) -> subprocess.Popen[bytes]:
        with open(folder / f"ray{ports.first}.log", "ab") as log:
            env = kept | ray.environment(ports, str(token))
            return subprocess.Popen(argv, env=env, stdout=log, stderr=log)

    def ask(path: str) -> dict | None:
        connection = http.client.HTTPConnection(nodes[0].address, blocks[0]["dashboard"], timeout=5)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {token.read_text()}"})
            answer = connection.getresponse()
            return json.loads(answer.read()) if answer.status == 200 else None
        except OSError:
            return None
        finally:
            connection.close()

    def alive() -> bool:
        for index, child in enumerate(children):
            if index and child.poll() is not None:
                children[index] = start(*workers[index - 1])
        answer = ask("/api/v0/nodes?limit=10000&detail=false")
        try:
            return len(ray.joined(answer or {}).gpus) == len(nodes)
        except ValueError:
            return False

    began = time.monotonic()
    try:
        grant = ray.Grant(1, 1)
        head = ray.head(nodes[0].python, nodes[0].address, blocks[0], grant, marker, STORE_BYTES)
        children.append(start(head, blocks[0]))
        until(lambda: ask("/api/version") is not None, began)
        gcs = ray.endpoint(nodes[0].address, blocks[0]["gcs"])
        for node, ports in zip(nodes[1:], blocks[1:], strict=False):
            workers.append((ray.worker(node.python, node.address, ports, grant, gcs, STORE_BYTES), ports))
            children.append(start(*workers[-1]))
        until(alive, began)
        return time.monotonic() - began
    finally:
        for child in reversed(children):
            child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait(60)
        process.stop_marked(marker, 1)
        shutil.rmtree(ray.folder(marker), ignore_errors=True)


def ours(nodes: Sequence[Host], folder: Path) -> float:
    """Seconds until the head's supervisor has counted all nodes; the job after that is none."""
    marker = f"ours/{secrets.token_hex(4)}"
    secret = secrets.token_hex(32)
    began = time.monotonic()
    children = []
    for index, node in enumerate(nodes):
        cell = CellDir(folder / node.name)
        cell.create()
        cell.job.write_text(json.dumps({"device": "cpu", "params": {"join_s": LIMIT_S}}))
        ranks = Ranks(nodes, 1, nodes[0].address, 29000 + os.getpid() % 900, str(cell.path), "", None, marker)
        argv = ray.launch(ranks).argv[index]
        assert argv
        env = {**os.environ, "PYTHONPATH": str(ROOT), process.MARKER: marker, ray.TOKEN: secret}
        with open(cell.engine_stdout, "wb") as log:
            children.append(subprocess.Popen(argv, env=env, cwd=cell.path, stdout=log, stderr=log))
    try:
        said = CellDir(folder / nodes[0].name).engine_stdout
        until(lambda: f" {JOIN}, " in said.read_text(), began, step_s=0.02)
        return time.monotonic() - began
    finally:
        for child in reversed(children):
            child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait(60)
        process.stop_marked(marker, 1)


def until(condition: Callable[[], bool], began: float, step_s: float = PROBE_S) -> None:
    """Wait for it. Raises TimeoutError LIMIT_S after `began`."""
    while not condition():
        if time.monotonic() - began > LIMIT_S:
            raise TimeoutError(f"not within {LIMIT_S:g} s")
        time.sleep(step_s)


def measured(count: int, python: str, first: bool) -> Pair:
    """One pair, bare Ray first or last."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    ways: list[Callable[[Sequence[Host], Path], float]] = [bare, ours] if first else [ours, bare]
    took = {}
    for way in ways:
        with tempfile.TemporaryDirectory(prefix="ray-ready-") as folder:
            took[way] = way(hosts(count, python), Path(folder))
    return Pair(count, took[bare], took[ours], busy)


def table(pairs: Sequence[Pair]) -> list[str]:
    """The lines of the table: medians by number of nodes, and each pair's difference."""
    lines = [
        "| nodes | pairs | bare, s | ours, s | ours − bare, s (each pair) | sooner than fixed sleeps | busy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count in sorted({pair.nodes for pair in pairs}):
        own = [pair for pair in pairs if pair.nodes == count]
        bare_s, ours_s = (statistics.median(values) for values in ([p.bare_s for p in own], [p.ours_s for p in own]))
        differences = ", ".join(f"{pair.ours_s - pair.bare_s:+.1f}" for pair in own)
        busy = statistics.median(pair.busy for pair in own)
        lines.append(
            f"| {count} | {len(own)} | {bare_s:.1f} | {ours_s:.1f} | {differences} | "
            f"{SLEEPS_S / ours_s:.1f} × | {busy:.1f} |"
        )
    return lines


def main() -> int:
    """Measure and print; returns 1 if ours took more than 2 s longer than bare in the median of any number of nodes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every Ray is ended
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--python", help="a Python beside which `ray` is; default: that of the profile cpu-smoke")
    parser.add_argument("--save", action="store_true", help=f"append the table to {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    python = options.python
    if python is None:
        sys.path.insert(0, str(ROOT / "tests"))
        import verl_environment  # type: ignore[import-not-found]

        python = str(verl_environment.python())
    pairs = []
    for count in options.nodes:
        for number in range(options.pairs):
            pairs.append(measured(count, python, first=number % 2 == 0))
            print(pairs[-1], flush=True)
    lines = table(pairs)
    print("\n".join(lines))
    if options.save:
        when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
        with open(PAGE, "a") as page:
            page.write("\n".join(["", f"{when}, {os.cpu_count()} cores:", "", *lines, ""]))
    late = [
        count
        for count in options.nodes
        if statistics.median(pair.ours_s - pair.bare_s for pair in pairs if pair.nodes == count) > 2
    ]
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
