"""Environment modules: loaded in a login shell, read back, and named where they are missing.

`module` is a stand-in: a shell function that does what those of Environment Modules 5 and Lmod do with LOADEDMODULES,
exit status and stderr. `tests/local/test_real_modules.py` has the real one.
"""

from __future__ import annotations

import json
import os

import pytest

from conftest import listing
from runner.cluster import facts, inventory, modules
from runner.errors import InfrastructureError, UsageError
from runner.launch import preflight
from runner.launch.slurm import commands
from runner.node import check, environment
from runner.node.requests import CellRequest, CheckRequest
from runner.system import process

STAND_IN = r"""
echo "Welcome to the cluster"
module() {
    case $2 in
    cuda|cuda/12.4) export CUDA_HOME=/opt/cuda-12.4 PATH=/opt/cuda-12.4/bin:$PATH
        export LOADEDMODULES=${LOADEDMODULES:+$LOADEDMODULES:}cuda/12.4; echo "loading cuda" ;;
    text) export ODD=$'two\nlines = 2' LOADEDMODULES=${LOADEDMODULES:+$LOADEDMODULES:}text/1 ;;
    *) echo "ERROR: Unable to locate a modulefile for '$2'" >&2; return 1 ;;
    esac
}
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home whose login shell has modules."""
    (tmp_path / ".bash_profile").write_text(STAND_IN)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOADEDMODULES", raising=False)
    modules.load.cache_clear()
    yield tmp_path
    modules.load.cache_clear()


def test_what_modules_do_to_the_environment_is_read_back_with_their_versions():
    loaded = modules.load(("cuda", "text"))
    assert loaded.names == ("cuda/12.4", "text/1")
    assert loaded.environment["CUDA_HOME"] == "/opt/cuda-12.4"
    assert loaded.environment["PATH"].startswith("/opt/cuda-12.4/bin:")
    assert loaded.environment["ODD"] == "two\nlines = 2"
    assert not {"_", "SHLVL", "PWD"} & loaded.environment.keys()


@pytest.mark.parametrize("names", [("nope/1",), ("cuda/12.4", "nope/1"), ("cuda/11",)])
def test_a_module_that_is_not_there_is_named_with_what_was_said(names):
    with pytest.raises(
        InfrastructureError, match=rf"cannot load the module {names[-1]}: ERROR: Unable to locate"
    ) as caught:
        modules.load(names)
    assert caught.value.kind == "module_missing"


def test_a_login_shell_without_modules_is_said(home):
    (home / ".bash_profile").write_text("unset -f module\n")
    with pytest.raises(InfrastructureError, match="cannot load the module cuda: no command module in a login shell"):
        modules.load(("cuda",))


def test_a_name_is_never_a_command(home):
    with pytest.raises(UsageError, match="runner_modules has"):
        inventory.parse("inv", listing({"a": {"runner_modules": ["cuda; touch /tmp/x"]}}))
    with pytest.raises(InfrastructureError):
        modules.load((f"$(touch {home}/made)",))
    assert not (home / "made").exists()


def test_ranks_start_with_the_modules_and_their_own_python_first(tmp_path):
    request = CellRequest(
        run_id="r", cell="c", marker="r/c", host="h", scratch=str(tmp_path), cell_dir="/c", env={"CUDA_HOME": "/own"},
        argv=("/opt/env-rl/bin/python",), profile="rl", modules=["cuda"],
    )  # fmt: skip
    env = environment.of_engine(request)
    assert env["PATH"].startswith("/opt/env-rl/bin:/opt/cuda-12.4/bin:")
    assert env["CUDA_HOME"] == "/own"  # the inventory has the last word
    assert env[process.MARKER] == "r/c"


def test_a_check_names_what_is_missing_and_notes_what_was_loaded(tmp_path):
    good, bad = (check.check(CheckRequest("0", str(tmp_path), 0.0, modules=names)) for names in (["cuda"], ["nope"]))
    assert "module_missing" not in good.kinds and "module_missing" in bad.kinds
    assert facts.comparable(json.loads(json.dumps(good.facts)))["modules"] == "cuda/12.4"
    assert "modules" not in facts.comparable(bad.facts)


def test_every_node_is_asked_for_the_modules_of_the_inventory():
    node, other = inventory.parse("inv", listing({"a": {"runner_modules": ["cuda/12.4"]}, "b": {}})).nodes
    assert (node.name, node.modules, other.modules) == ("a", ("cuda/12.4",), ())
    assert preflight.checks(node, "cpu", "torchrun", ("sft",)).modules == ("cuda/12.4",)


def test_slurms_login_host_names_a_missing_module_before_anything_is_submitted(monkeypatch):
    from runner.cluster import slurm

    ran = []

    def run(argv, **given):
        ran.append(argv)
        return process.run(argv, timeout_s=30, env=dict(os.environ))

    client = commands.SlurmClient(slurm.Settings(), run=run)
    client.require_modules(("cuda",))
    with pytest.raises(UsageError, match=r"this machine cannot load the module nope: .*runner_modules") as caught:
        client.require_modules(("cuda", "nope"))
    assert caught.value.kind == "module_missing"
    assert all(argv[:2] == ["bash", "--login"] for argv in ran)
