"""Every Molecule scenario, as `molecule test` runs it: check, converge, idempotence, verify, and a broken node."""

from __future__ import annotations

import os
import sys

import pytest

from role_modules import ROOT
from runner import process

SCENARIOS = sorted(path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml"))


@pytest.mark.molecule
@pytest.mark.skipif(os.geteuid() != 0, reason="containers with addresses of their own need root")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario, tmp_path):
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "MOLECULE_EPHEMERAL_DIRECTORY": str(tmp_path / scenario)}
    argv = ["molecule", "test", "--scenario-name", scenario, "--destroy=always"]
    outcome = process.run([f"{sys.prefix}/bin/{argv[0]}", *argv[1:]], timeout_s=590, cwd=str(ROOT), env=env)
    assert outcome.rc == 0, outcome.stdout[-12000:] + outcome.stderr[-4000:]
