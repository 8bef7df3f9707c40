"""The profile `cpu-smoke`, with the real verl, as the product makes it: once, and kept by its lock."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from role_modules import ROOT
from runner.errors import InfrastructureError
from runner.provision import profiles
from runner.workloads import rl


def python() -> Path:
    """The Python of that profile, some 2 GB: made the first time (minutes). Raises LookupError where pip cannot."""
    try:
        return profiles.make("cpu-smoke").python
    except InfrastructureError as error:
        raise LookupError(str(error)) from None


def environment(plugin: bool) -> dict[str, str]:
    """The variables of a process with verl, this checkout to import from; those of the plugin if `plugin`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "PYTHON"))}
    env = {**own, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return {**env, **(rl.ENVIRONMENT if plugin else {})}


_SERVE = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    printed, failed = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), {"__name__": "asked"})
    except BaseException:
        failed = traceback.format_exc()
    print(json.dumps([printed.getvalue(), failed]), flush=True)
"""


class Session:
    """One process with verl and the plugin, which runs pieces of code one after the other: verl is imported once.

    A context manager. What a piece changes of modules is changed for those after it.
    """

    def __enter__(self) -> Session:
        argv = [python(), "-c", _SERVE]
        pipe, env = subprocess.PIPE, environment(plugin=True)
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()

    def ask(self, code: str) -> object:
        """What `code` prints as JSON on its last line; an assertion that fails with its traceback where it raises."""
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process with verl has ended"
        printed, failed = json.loads(answer)
        assert not failed, failed
        return json.loads(printed.splitlines()[-1])


def run(code: str, plugin: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """That Python runs `code`, with this checkout to import from; with the environment of the plugin if `plugin`."""
    argv = [python(), "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, env=environment(plugin), timeout=timeout_s)
