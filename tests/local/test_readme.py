"""Every command of the README runs: as it stands, or as a dry run where it needs the real cluster.

`make test` is what runs this; the testbed's block is run for real unless a testbed of that name is up, and its runs are
looked at closely, since nothing else here takes as long as ranks on eight nodes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import NAMES, ROOT
from runner.results.rundir import RunDir
from testbed.conftest import containers  # noqa: F401  # fixture

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


# --- the testbed's block, and what its runs leave: eight nodes train, then a sweep ------------------


@pytest.fixture(scope="module")
def block(containers, tmp_path_factory) -> Iterator[dict[str, str]]:  # noqa: F811
    """What each command printed; all of them ended well."""
    if shell("runner testbed status", tmp_path_factory.mktemp("status"), 60).returncode == 0:
        pytest.skip("a testbed of the README's name is up: it is yours, and would be taken down")
    home, printed = tmp_path_factory.mktemp("block"), {}
    try:
        for line in (line for line, _ in COMMANDS if "testbed" in line):
            done = shell(line, home, 800)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            printed[line] = done.stdout
        yield printed
    finally:
        shell("runner testbed down", home, 60)


def told(block: dict[str, str], word: str) -> tuple[RunDir, str]:
    """The run of the only command with that word, and what it printed."""
    (printed,) = (printed for line, printed in block.items() if word in line)
    (report,) = re.findall(r"^report: (.*)/report\.html$", printed, re.MULTILINE)
    return RunDir(Path(report)), printed


@pytest.mark.testbed
@pytest.mark.timeout(1500)  # all of it, in the fixture: four minutes on two idle cores, 23 starts of a rank
def test_the_testbed_of_the_readme(block):
    assert list(block) == [line for line, _ in COMMANDS if "testbed" in line]


@pytest.mark.testbed
def test_deepspeed_trains_on_eight_nodes_over_pdsh_and_port_44222(block):
    run, _ = told(block, "deepspeed")
    summary = json.loads(run.summary.read_text())
    (cell,) = summary["cells"]
    assert (cell["state"], cell["num_nodes"], cell["world_size"]) == ("complete", 8, 8)
    assert cell["metrics"]["loss_last"] < cell["metrics"]["loss_first"] - 1
    assert cell["metrics"]["tokens_per_s"] > 0
    assert summary["verdict"] == "not_judged" and "share one kernel" in summary["reason"]
    for rank, name in enumerate(NAMES):
        folder = run.cell(name, cell["id"]).path
        assert json.loads((folder / "facts.json").read_text())["hostname"] == name
        assert json.loads((folder / "outcome.json").read_text())["rc"] == 0
        assert '"event": "end"' in (folder / f"rank{rank}.jsonl").read_text()
    assert run.report_html.stat().st_size > 10_000
    assert run.telemetry.stat().st_size > 0


@pytest.mark.testbed
def test_a_sweep_gives_the_curve_and_says_why_it_is_not_judged(block):
    run, output = told(block, "sweep")
    scaling = json.loads(run.summary.read_text())["scaling"]
    assert [(row["num_nodes"], row["verdict"]) for row in scaling] == [(n, "not_judged") for n in (1, 2, 4, 8)]
    assert all(0 < row["efficiency"] < 3 and "share one kernel" in row["reason"] for row in scaling[1:])
    assert "not judged" in output and "share one kernel" in output
