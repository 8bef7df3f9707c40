"""The environment in which an agent starts ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.node import environment
from runner.node.requests import CellRequest
from runner.system import process


def request(tmp_path: Path, **fields) -> CellRequest:
    given = {"argv": ("/opt/env-rl/bin/python", "-m", "x"), "env": {}, "scratch": str(tmp_path / "scratch"), **fields}
    return CellRequest(run_id="r", cell="c", marker="r/c", host="h", cell_dir=str(tmp_path / "c"), **given)


def test_ranks_of_a_profile_find_the_programs_of_their_own_python_first(tmp_path):
    assert environment.of_engine(request(tmp_path, profile="rl"))["PATH"].startswith("/opt/env-rl/bin:")
    assert environment.of_engine(request(tmp_path))["PATH"].startswith(f"{Path(sys.executable).parent}:")


def test_another_python_imports_this_package_and_nothing_else_of_the_agents_environment(tmp_path):
    env = environment.of_engine(request(tmp_path, profile="rl", env={"PYTHONPATH": "/own"}))
    code = "import runner.workloads.__main__ as own, sys; print(own.__file__); import click"
    bare = [sys.executable, "-S", "-c", code]  # without its own packages, as a profile has them
    outcome = subprocess.run(bare, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert Path(outcome.stdout.strip()).resolve() == environment.PACKAGE / "workloads" / "__main__.py", outcome.stderr
    assert "No module named 'click'" in outcome.stderr
    assert env["PYTHONPATH"].split(os.pathsep)[1:] == ["/own"]


def test_without_a_profile_nothing_is_added_to_what_python_imports(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "PYTHONPATH" not in environment.of_engine(request(tmp_path))


def test_a_second_cell_finds_the_folder_and_another_version_gets_its_own(tmp_path):
    first = environment.importable(tmp_path)
    assert environment.importable(tmp_path) == first
    (tmp_path / "new" / "runner").mkdir(parents=True)
    other = environment.importable(tmp_path, tmp_path / "new" / "runner")
    assert other != first
    assert (other / "runner").resolve() == tmp_path / "new" / "runner"


@pytest.mark.parametrize("isolated", [False, True])
def test_a_launcher_gets_a_plain_part_of_the_environment(tmp_path, monkeypatch, isolated):
    monkeypatch.setenv("LS_COLORS", "rs=0:(x)")
    env = environment.of_engine(request(tmp_path, isolated=isolated, secrets={"HF_TOKEN": "t"}))
    assert ("LS_COLORS" in env) is not isolated
    assert env["HF_TOKEN"] == "t"
    assert env[process.MARKER] == "r/c"
