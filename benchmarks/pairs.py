"""Two runs in a row, many times: every one must leave a run directory with a final state.

    .venv/bin/python benchmarks/pairs.py --pairs 200

`runner bench` is started twice, the second as soon as the first has ended, on this machine: two ranks, one collective,
one size. Runs have separate locks and scratch folders, so that other runs on this machine do not interfere. With
`--at-once` both of a pair are started within the same second: one of them may then be refused, since the other one
uses the node, with a message of one line.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from runner.results.rundir import RunDir
from runner.results.status import FINAL_STATES
from runner.system.places import ROOT

RUNNER = Path(sys.executable).with_name("runner")
SMALL = (
    *("--model", "tiny", "--test", "torch", "--set", "torch.max_bytes=8", "--set", "torch.collectives=[barrier]"),
    *("--set", "torch.warmup=0", "--set", "torch.iters=1"),
)
INVENTORY = """all: {children: {gpu_nodes: {hosts: {localhost: {
  ansible_connection: local, ansible_host: 127.0.0.1,
  ansible_python_interpreter: "{{ ansible_playbook_python }}", runner_scratch: SCRATCH}}}}}
"""


@dataclass
class Pairs:
    """Pairs of runs in the folder `work`: how often each final state occurred, and the problems found."""

    work: Path
    states: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.results = self.work / "results"
        self.inventory = self.work / "inventory.yml"
        self.inventory.write_text(INVENTORY.replace("SCRATCH", str(self.work / "scratch")))
        self.env = os.environ | {"XDG_STATE_HOME": str(self.work / "state")}

    def pair(self, number: int, at_once: bool) -> None:
        """Run one pair, and record the states and problems of the run directories that it leaves."""
        before = self._directories()
        if at_once:
            started = [self._start() for _ in range(2)]
            ended = [(process, process.communicate()) for process in started]
        else:
            ended = []
            for _ in range(2):
                process = self._start()
                ended.append((process, process.communicate()))
        new = self._directories() - before
        refused = [err for process, (_, err) in ended if process.returncode and at_once and "in use by run" in err]
        self.states["refused in one line"] += len(refused)
        for name in new:
            self.states[self._state(RunDir(self.results / name))] += 1
        if len(new) + len(refused) != 2:
            lines = [f"exit code {process.returncode}: {err.strip()}" for process, (_, err) in ended]
            self.problems.append(f"pair {number}: {len(new)} directories; {lines}")
        if not (self.results / "latest" / "plan.json").is_file():
            self.problems.append(f"pair {number}: `latest` points at no run")

    def _start(self) -> subprocess.Popen[str]:
        command = [RUNNER, "bench", "-i", self.inventory, "--results", self.results, *SMALL]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def _directories(self) -> set[str]:
        return {path.name for path in self.results.glob("2*")} if self.results.exists() else set()

    def _state(self, run: RunDir) -> str:
        state = json.loads(run.status.read_text())["state"]
        if state not in FINAL_STATES:
            self.problems.append(f"{run.run_id}: its controller has ended, its state is {state}")
        return state


def main() -> None:
    """Run the pairs and print the final states and problems; the exit code is 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--at-once", action="store_true", help="start both runs of a pair at the same time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no pair after so long")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
        pairs, started, done = Pairs(Path(folder)), time.monotonic(), 0
        while done < options.pairs and time.monotonic() - started < 60 * options.minutes:
            pairs.pair(done, options.at_once)
            done += 1
        took = time.monotonic() - started
        states = ", ".join(f"{count} {state}" for state, count in sorted(pairs.states.items()) if count)
        print(f"{done} pairs in {took / 60:.0f} min, {2 * done} runs: {states}; {len(pairs.problems)} problems")
        print("\n".join(pairs.problems))
    sys.exit(bool(pairs.problems))


if __name__ == "__main__":
    main()
