"""`python -m runner.node.accelerate CELL_DIR …`: this node's `accelerate launch`.

Started by the node's agent as torchrun is. It writes the node's configuration, has the loader of the Accelerate that
will be started read it back, and becomes it: what the agent watches and signals is `accelerate launch` itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.node.protocol import Fault
from runner.plan.engines import accelerate
from runner.results.celldir import TORCHRUN_LOGS, CellDir
from runner.system import process
from runner.system.files import write_json_atomic
from runner.workloads.job import RankJob

LOAD_S = 300.0  # it imports torch, from a cold file system perhaps
# Accelerate's own loader, which has no other face than this; what it observed is the last line.
LOADER = """\
import json, sys
from accelerate.commands.config.config_args import load_config_from_file
found = load_config_from_file(sys.argv[1])
print(json.dumps({key: str(getattr(found, key)) for key in sys.argv[2:]}))
"""
OBSERVED = ("num_machines", "num_processes", "machine_rank", "main_process_ip", "main_process_port")


def main(argv: Sequence[str] | None = None) -> int:
    """Become `accelerate launch`; returns 1 only where it was not started, with the reason in the cell's folder."""
    parser = argparse.ArgumentParser(prog="python -m runner.node.accelerate")
    parser.add_argument("cell_dir", type=Path)
    for name in ("--machine-rank", "--machines", "--gpus", "--port"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--address", required=True)
    found = parser.parse_args(argv)
    folder = CellDir(found.cell_dir)
    try:
        job = RankJob.load(found.cell_dir)
        place = accelerate.Place(found.machine_rank, found.machines, found.gpus, found.address, found.port, job.device)
        python = str(job.params.get("python") or sys.executable)
        asked = job.params.get("accelerate") or {}
        accelerate.check(asked, job.device, "accelerate")
        config = accelerate.rendered(asked, place)
        folder.accelerate_config.write_text(accelerate.text(config), encoding="utf-8")
        read_back(python, folder.accelerate_config, config)
        program = [sys.executable, "-m", "runner.workloads", str(found.cell_dir)]
        logs = str(folder.path / TORCHRUN_LOGS)
        words = accelerate.command(python, str(folder.accelerate_config), logs, program)
        os.execve(python, words, {**os.environ, **accelerate.environment(job.device)})
    except RunnerError as error:
        fault = Fault(error.kind or "accelerate_refused", str(error))
    except OSError as error:
        fault = Fault("environment_missing", f"{error.strerror}: {error.filename or found.cell_dir}")
    write_json_atomic(folder.fault, asdict(fault))
    print(f"{fault.kind}: {fault.message}", file=sys.stderr)
    return 1


def read_back(python: str, file: Path, config: Mapping[str, Any]) -> None:
    """Have the Accelerate of `python` read the configuration. Raises RunnerError where it does not, or reads another
    place than was written.
    """
    outcome = process.run([python, "-c", LOADER, str(file), *OBSERVED], timeout_s=LOAD_S)
    if outcome.rc:
        missing = "No module named" in outcome.last_line
        what = f"{python}: {outcome.last_line or f'ended with {outcome.rc}'}"
        if missing:
            raise RunnerError(f"{what}: install accelerate in that environment", "environment_missing")
        raise RunnerError(f"Accelerate does not read its configuration: {what}", "accelerate_refused")
    observed = json.loads(outcome.stdout.strip().splitlines()[-1])
    for key in OBSERVED:
        if observed[key] != str(config[key]):
            raise RunnerError(
                f"Accelerate reads {key} as {observed[key]}, not {config[key]}, from {file}", "accelerate_refused"
            )


if __name__ == "__main__":
    sys.exit(main())
