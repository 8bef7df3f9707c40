"""Every Molecule scenario, as `molecule test` runs it: check, converge, idempotence, verify, and a broken node."""

from __future__ import annotations

import os
import re
import sys

import pytest

from role_modules import ROOT
from runner.system import process

SCENARIOS = sorted(path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml"))


@pytest.mark.molecule
@pytest.mark.timeout(1200)  # the whole site takes five minutes on two idle cores
@pytest.mark.skipif(os.geteuid() != 0, reason="containers with addresses of their own need root")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario, tmp_path, request):
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "MOLECULE_EPHEMERAL_DIRECTORY": str(tmp_path / scenario), "COLUMNS": "160"}
    if release := request.config.getoption("--release"):
        env["TESTBED_RELEASE"] = release
    argv = ["molecule", "test", "--scenario-name", scenario, "--destroy=always"]
    outcome = process.run([f"{sys.prefix}/bin/{argv[0]}", *argv[1:]], timeout_s=1190, cwd=str(ROOT), env=env)
    assert outcome.rc == 0, what_failed(outcome.stdout + outcome.stderr)


def what_failed(output: str) -> str:
    """The tasks that failed, and the end: Molecule tells of the nodes' removal after them, a page long."""
    tasks = re.split(r"(?=TASK \[)", re.sub(r"\x1b\[[0-9;]*m", "", output))
    return "".join(task for task in tasks if "fatal: " in task or "failed: " in task) + tasks[-1][-1000:]
