"""`runner bench` on data that are not prepared yet: ranks import meanwhile, and end with whatever ends the preparation.

The preparation lasts as long as a test likes, since it waits for the lock of the data's key, which the test holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from runner.errors import EXIT_INTERRUPTED, EXIT_USAGE
from runner.system import process
from runner.workloads.data import prepare

pytestmark = pytest.mark.local
RUNNER = Path(sys.executable).with_name("runner")
SETTINGS = {"steps": 1, "warmup_steps": 0, "seq_len": 64, "samples": 256}


class Bench:
    """One `runner bench --test sft` on the machine of an inventory, with caches of its own."""

    def __init__(self, folder: Path, machine: Path, **settings: Any) -> None:
        self.results, self.cache = folder / "results", folder / "cache" / "shakedown" / "data"
        self.cache.mkdir(parents=True)
        options = [f"--set=sft.{key}={value}" for key, value in {**SETTINGS, **settings}.items()]
        options += ["-i", str(machine), "--model", "tiny", "--test", "sft", "--results", str(self.results)]
        self.child = subprocess.Popen(
            [RUNNER, "bench", *options],
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def events(self) -> list[dict[str, Any]]:
        """What rank 0 has written so far."""
        files = list(self.results.glob("2*/nodes/*/*/rank0.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.endswith("}")]

    def importing(self) -> bool:
        return any(event["event"] == "progress" for event in self.events())

    def imported(self) -> bool:
        return any(event.get("metric") == "import_time_s" for event in self.events())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.child.poll() is None and time.monotonic() < deadline, "".join(self.child.communicate())
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Its exit code and all that it printed, once it has ended; no process of its cell is left."""
        printed = "".join(self.child.communicate(timeout=180))
        [run] = self.results.glob("2*")
        assert process.marked(process.cell_marker(run.name, "sft-tiny-1n-r1")) == []
        return self.child.returncode, printed

    def status(self) -> Mapping[str, Any]:
        [path] = self.results.glob("2*/status.json")
        return json.loads(path.read_text())


@contextmanager
def preparing(folder: Path, machine: Path) -> Iterator[Bench]:
    """A bench whose preparation lasts as long as the block."""
    key = prepare.resolve("builtin", SETTINGS["seq_len"], None, SETTINGS["samples"], 0)[2]
    bench = Bench(folder, machine)
    with open(bench.cache / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield bench
        except BaseException:
            bench.child.kill()
            raise


def test_ranks_import_while_data_is_prepared_and_read_it_once_it_is_there(tmp_path, this_machine):
    with preparing(tmp_path, this_machine()) as bench:
        bench.until(bench.imported)
        assert not list(bench.cache.glob("*/manifest.json"))
    code, printed = bench.end()
    assert code == 0, printed
    [manifest] = bench.cache.glob("*/manifest.json")
    times = {event.get("metric") or event["event"]: event["time_s"] for event in reversed(bench.events())}
    prepared = manifest.stat().st_mtime
    assert times["start"] < times["import_time_s"] < prepared < times["matmul_tflop_per_s"]
    values = {event["metric"]: event["value"] for event in bench.events() if event["event"] == "value"}
    began, waited_s = times["import_time_s"] - values["import_time_s"], prepared - times["import_time_s"]
    assert values["time_to_first_step_s"] <= times["step_time_s"] - began - waited_s, "waiting is not the rank's time"
    assert values["import_time_s"] < values["setup_time_s"] < values["time_to_first_step_s"]
    assert bench.status()["state"] == "complete"


def test_a_stop_while_data_is_prepared_ends_ranks_and_run(tmp_path, this_machine):
    with preparing(tmp_path, this_machine()) as bench:
        bench.until(bench.importing)
        bench.child.send_signal(signal.SIGINT)
        code, printed = bench.end()  # with the lock still held
    assert code == EXIT_INTERRUPTED, printed
    status = bench.status()
    assert (status["state"], status["cells"]["sft-tiny-1n-r1"]["state"]) == ("cancelled", "cancelled")


def test_data_that_cannot_be_prepared_ends_ranks_and_run_with_one_line(tmp_path, this_machine):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n{"instruction": 7}\n')
    bench = Bench(tmp_path, this_machine(), dataset=rows)
    code, printed = bench.end()
    assert code == EXIT_USAGE, printed
    assert "rows.jsonl" in printed and "Traceback" not in printed
    status = bench.status()
    assert (status["state"], status["cells"]["sft-tiny-1n-r1"]["state"]) == ("failed", "cancelled")
