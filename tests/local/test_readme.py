"""Every command of the README runs: as it stands, or as a dry run where it needs the real cluster.

`make test` is what runs this; the testbed's block is run for real unless a testbed of that name is up.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

BLOCK = re.compile(r"^```sh( cluster)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = [
    (line, bool(cluster))
    for cluster, block in BLOCK.findall((ROOT / "README.md").read_text())
    for line in block.splitlines()
    if line.strip()
]
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def shell(line: str, home: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """The line as a reader would paste it, with a home folder of its own."""
    env = {**ENV, "RUNNER_RESULTS": str(home / "results")}
    line = line.replace("~", str(home))
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)


def test_the_readme_has_its_commands():
    lines = [line for line, _ in COMMANDS]
    assert "make bench" in lines and "make test" in lines and any("testbed up" in line for line in lines)


@pytest.mark.local
@pytest.mark.parametrize("line", [line for line, cluster in COMMANDS if "testbed" not in line and not cluster])
def test_a_command_of_the_readme(line, tmp_path):
    if line == "make test":
        return  # it is running
    done = shell(line, tmp_path, 280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.local
@pytest.mark.parametrize("line", [line for line, cluster in COMMANDS if cluster])
def test_a_command_for_the_real_cluster_plans(line, tmp_path):
    done = shell(f"{line} --dry-run", tmp_path, 60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.testbed
def test_the_testbed_of_the_readme(tmp_path):
    """Slow: eight nodes train, then a sweep."""
    if os.geteuid() != 0 or not shutil.which("podman"):
        pytest.skip("needs root and podman")
    if (
        subprocess.run(
            [sys.executable, "-m", "runner.cli", "testbed", "status"], cwd=ROOT, capture_output=True
        ).returncode
        == 0
    ):
        pytest.skip("a testbed of the README's name is up: it is yours, and would be taken down")
    block = [line for line, _ in COMMANDS if "testbed" in line]
    try:
        for line in block:
            done = shell(line, tmp_path, 400)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    finally:
        shell("runner testbed down", tmp_path, 60)
