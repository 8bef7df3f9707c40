"""Runs whose controller is killed at a random moment, and the result of --resume.

    .venv/bin/python benchmarks/resume.py --runs 50
    .venv/bin/python benchmarks/resume.py --runs 10 -i inventory/testbed --nodes 2

Each run is started, its controller is killed with SIGKILL after a random time, and it is resumed; one time in three
the resumed one is killed as well. Every run must end complete with the cells and the records (by cell, rank, metric and
context) of an undisturbed run, each once, every JSON file of its directory valid, and no process left.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.results.rundir import RunDir
from runner.system import process

RUNNER = Path(sys.executable).with_name("runner")
SMALL = ("--test", "torch", "--set", "torch.max_bytes=64", "--set", "torch.collectives=[all_reduce, barrier]")
MOST_ATTEMPTS = 20


@dataclass
class Soak:
    """Runs in the folder `results`, and the times in s after which controllers were killed.

    `arguments` choose the inventory and the nodes; `repeats` is the number of cells of each run.
    """

    arguments: Sequence[str]
    results: Path
    repeats: int = 2
    seed: int = 0
    kills: list[float] = field(default_factory=list)

    def undisturbed(self) -> None:
        """Run once without a kill, and keep its duration in s and its fingerprint."""
        started = time.monotonic()
        code = self._start("calm", "--repeats", str(self.repeats)).wait()
        self.seconds = time.monotonic() - started
        assert code == 0, f"the undisturbed run ended with {code}"
        self.expected = fingerprint(RunDir.find(self.results / "calm", None))

    def disturbed(self, number: int) -> list[str]:
        """Kill and resume one run until it is complete; returns its problems, none if all is well."""
        chance = random.Random(f"{self.seed}/{number}")
        name = f"run{number:03d}"
        self._kill_after(self._start(name, "--repeats", str(self.repeats)), chance.uniform(0, self.seconds))
        for _ in range(MOST_ATTEMPTS):
            if not (self.results / name).is_dir() or not RunDir.all(self.results / name):  # no directory yet
                started = self._start(name, "--repeats", str(self.repeats))
            else:
                started = self._start(name, "--resume", "latest")
            if chance.random() < 1 / 3:
                self._kill_after(started, chance.uniform(0, self.seconds))
            elif started.wait() == 0:
                break
            else:
                return [f"--resume ended with {started.returncode}: see {self.results / name}.log"]
        return self.problems(RunDir.find(self.results / name, None))

    def problems(self, run: RunDir) -> list[str]:
        """What differs from a complete, undisturbed run; empty if nothing does."""
        found = []
        if run.read_status()["state"] != "complete":
            found.append(f"its state is {run.read_status()['state']}")
        if (got := fingerprint(run)) != self.expected:
            found.append(f"records differ: missing {self.expected - got}, too many {got - self.expected}")
        for path in run.path.rglob("*.json"):
            try:
                json.loads(path.read_text())
            except ValueError:
                if "attempts" not in path.parts:  # files of a killed attempt are kept unchanged
                    found.append(f"{path} is not valid JSON")
        if leftovers := [path for path in run.path.rglob("*.partial") if "attempts" not in path.parts]:
            found.append(f"half-written {leftovers[0]}")
        if left := [c for c in run.read_status()["cells"] if process.marked(f"{run.run_id}/{c}")]:
            found.append(f"processes of {left} are left")
        return found

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        argv = [str(RUNNER), "bench", "--results", str(self.results / name)]
        resumed = "--resume" in arguments
        argv += [*([] if resumed else SMALL), *arguments]
        argv += [word for word in self.arguments] if not resumed else [*self.arguments[:2]]
        log = open(self.results / f"{name}.log", "ab")  # noqa: SIM115
        return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _kill_after(self, child: subprocess.Popen[bytes], seconds: float) -> None:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            self.kills.append(seconds)


def fingerprint(run: RunDir) -> collections.Counter[tuple[str, str, str, str]]:
    """The number of records by (cell, rank, metric, context as JSON); their values are not compared."""
    return collections.Counter(
        (record.cell, str(record.rank), record.metric, json.dumps(dict(record.context), sort_keys=True))
        for record in run.read_records()
    )


def main() -> int:
    """Run all of them and print the problems of each; returns 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-i", "--inventory", default="inventory/local")
    parser.add_argument("--nodes", type=int, default=1)
    chosen, more = parser.parse_known_args()
    results = Path(tempfile.mkdtemp(prefix="shakedown-resume-"))
    arguments = ["-i", chosen.inventory, "--nodes", str(chosen.nodes), *more]
    soak = Soak(arguments, results, chosen.repeats, chosen.seed)
    soak.undisturbed()
    print(f"undisturbed: {soak.seconds:.1f} s, {sum(soak.expected.values())} records; runs in {results}", flush=True)
    bad = 0
    started = time.monotonic()
    for number in range(1, chosen.runs + 1):
        problems = soak.disturbed(number)
        bad += bool(problems)
        left = (time.monotonic() - started) / number * (chosen.runs - number)
        result = "; ".join(problems) or "complete"
        print(f"{number}/{chosen.runs}: {result}; {len(soak.kills)} kills so far, {left / 60:.0f} min left", flush=True)
    print(f"{chosen.runs - bad} of {chosen.runs} runs complete and equal, {len(soak.kills)} controllers killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
