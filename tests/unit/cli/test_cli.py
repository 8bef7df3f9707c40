"""The command line: fast, frozen, and one line with the right exit code for each mistake."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from conftest import NAMES, ROOT
from runner.cli.bench import bench
from runner.cli.main import cli
from runner.workloads.registry import TESTS, offered

RUNNER = Path(sys.executable).with_name("runner")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RUNNER, *arguments], capture_output=True, text=True, cwd=cwd, timeout=60)


def test_the_options_of_bench_are_frozen():
    """Everything else is a setting in configs/ and --set."""
    options = sorted(o for p in bench.params for o in p.opts)
    # fmt: off
    assert options == sorted([
        "-i", "--inventory", "--results", "--nodes", "--sweep", "--hosts", "--skip-bad-nodes", "--model", "--weights",
        "--test", "--engine", "--backend", "--scaling", "--repeats", "--seed", "--set", "--dry-run", "--json",
        "--retries", "--replace-bad-nodes", "--resume", "--accept-drift", "--one-allocation", "--job-array",
        "--tune",
    ])
    # fmt: on


def test_help_imports_neither_torch_nor_ansible():
    script = "import sys; sys.argv[1:] = ['--help']; from runner.cli.main import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "click" in modules
    assert not {"torch", "ansible", "ansible_runner", "pydantic", "numpy", "polars"} & set(modules)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["benhc"], 2, "unknown command 'benhc'; did you mean 'bench'?"),
        (["runs", "lst"], 2, "unknown command 'lst'; did you mean 'list'?"),
        (["testbed", "dwn"], 2, "did you mean 'down'?"),
        (["workflow", "sft-po"], 2, "unknown workflow 'sft-po'"),
        (["bench", "--nods", "3"], 2, "--nods"),
        (["bench", "--nodes", "0"], 2, "--nodes"),
        (["bench", "--nodes", "2", "--sweep", "1,2"], 2, "exclude each other"),
        (["bench", "--sweep", "1,x"], 2, "such as 1,2,4,8"),
        (["bench", "--engine", "deepsped"], 2, "did you mean 'deepspeed'"),
        (["bench", "--backend", "shh"], 2, "did you mean 'ssh'"),
        (["bench", "--scaling", "week"], 2, "did you mean 'weak'"),
        (["bench", "--test", "stf"], 2, "did you mean 'sft'"),
        (["bench", "--model", "tinny"], 2, "did you mean 'tiny'"),
        (["bench", "--set", "sft.steps=many"], 2, "steps"),
        (["bench", "--nodes", "9", "--dry-run"], 2, "9 nodes asked for: the inventory"),
        (["bench", "--hosts", "node[001-002]", "--nodes", "3", "--dry-run"], 2, "names 2"),
        (["bench", "--backend", "local", "--dry-run"], 2, "for backend ssh"),
        (
            ["bench", "--model", "llama-2-13b", "--set", "sft.gradient_accumulation=16", "--dry-run"],
            2,
            "--set sft.gradient_accumulation=8",
        ),
        (
            [
                *("bench", "--nodes", "1", "--model", "llama-2-70b", "--dry-run"),
                *("--set", "deepspeed.zero_optimization.offload_optimizer.device=none"),
                *("--set", "deepspeed.zero_optimization.offload_param.device=none"),
            ],
            2,
            "141 GiB; what fits: --nodes 2",
        ),
        (["bench", "-i", "inventory/lcal"], 2, "did you mean 'inventory/local'"),
        (["bench", "-i", "/nope"], 2, "no inventory /nope"),
        (["bench", "-i", "", "--dry-run"], 2, "-i is empty"),
        (["bench", "--hosts", "", "--dry-run"], 2, "--hosts names no node"),
        (["bench", "--test", "torch", "--set", "sft.bogus=1"], 2, "unknown key 'bogus'"),
        (["report", "/nowhere/at/all"], 2, "no run '/nowhere/at/all'"),
        (["report", "**"], 2, "no run '**'"),
        (["runs", "show", "nothing"], 2, "no run 'nothing'"),
        (["runs", "tail"], 2, "start one with `runner bench`"),
        (["runs", "list", "--limit", "0"], 2, "--limit"),
        (["report", "nothing"], 2, "no run 'nothing'"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(arguments, code, said, tmp_path):
    results = ["--results", str(tmp_path)] if arguments[0] in ("runs", "report") else []
    done = run(*arguments, *results)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("runner: ")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["benhc"], 2, "unknown command"),
        (["bench", "--nods", "3"], 2, "--nods"),
        (["bench", "--engine", "deepsped"], 2, "did you mean 'deepspeed'"),
        (["report", "nothing"], 2, "no run 'nothing'"),
        (["inventory", "--ssh-config", "/dev/null/here"], 3, "Not a directory"),
    ],
)
def test_with_json_an_error_is_one_object_on_stdout_and_the_same_line_on_stderr(arguments, code, said):
    done = run(*arguments, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"], error["kind"], error["nodes"]) == (code, code, None, [])
    assert said in error["message"] and done.stderr == f"runner: {error['message']}\n"


def test_a_dry_run_says_what_each_node_would_run_and_writes_nothing(tmp_path):
    before = set(tmp_path.iterdir())
    done = run("bench", "--nodes", "8", "--model", "llama-2-7b", "--dry-run", "--results", str(tmp_path / "results"))
    assert done.returncode == 0 and done.stderr == ""
    for index in range(8):
        assert f"node{index + 1:03d}  /opt/shakedown/env/bin/python -m torch.distributed.run --nnodes=8" in done.stdout
    assert "--node-rank=7" in done.stdout
    assert set(tmp_path.iterdir()) == before


def test_json_of_a_dry_run_is_the_plan():
    done = run("bench", "--sweep", "1,8", "--test", "sft", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert [c["num_nodes"] for c in plan["cells"]] == [1, 8]
    assert plan["cells"][1]["hosts"] == NAMES


def test_the_inventory_of_ansible_cfg_holds_without_i():
    nodes = json.loads(run("inventory", "--json").stdout)
    assert [n["name"] for n in nodes] == NAMES


@pytest.mark.parametrize("arguments", [[], ["runs"], ["data"]])
def test_a_group_without_a_command_shows_its_help_and_nothing_else(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Usage: runner") and "--help`)" not in done.stderr


def test_every_command_has_help():
    for name in cli.list_commands(click.Context(cli)):
        done = run(name, "--help")
        assert done.returncode == 0 and "Usage: runner" in done.stdout


MODELS = ("tiny", "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.2-1b")


@pytest.mark.parametrize(("option", "names"), [("--model", MODELS), ("--test", offered())])
def test_models_and_tests_are_listed_by_help_error_and_completion(option, names):
    shown = " ".join(run("bench", "--help").stdout.split())
    said = run("bench", option, f"{names[0]}y", "--dry-run").stderr
    (param,) = [param for param in bench.params if option in param.opts]
    for name in names:
        assert name in shown and name in said
    completed = {item.value for item in param.shell_complete(click.Context(bench), "")}
    assert completed == set(names)
    assert names[0] in {item.value for item in param.shell_complete(click.Context(bench), names[0][:2])}


@pytest.mark.parametrize(
    ("asked", "planned"),
    [
        ((), ["torch", "sft"]),
        (("--test", "gpu"), ["gpu"]),
        (("--test", "torch", "--test", "gpu", "--test", "torch"), ["torch", "gpu"]),
    ],
    ids=["none is named", "on request", "several"],
)
def test_a_run_has_the_tests_that_are_named_or_the_usual_ones(asked, planned):
    cells = json.loads(run("bench", "-i", "inventory/local", *asked, "--dry-run", "--json").stdout)["cells"]
    assert [cell["test"] for cell in cells] == planned
    assert {cell["model"] for cell in cells if TESTS[cell["test"]].model} <= {"tiny"}


@pytest.mark.parametrize("on_path", [True, False])
def test_the_command_that_repeats_a_run_can_be_pasted(on_path, tmp_path):
    """With the program where no PATH finds it, and with what came from the environment."""
    (tmp_path / "in ventory").symlink_to(ROOT / "inventory" / "local")
    path = f"{RUNNER.parent}:{os.environ['PATH']}" if on_path else "/usr/bin:/bin"
    env = {**os.environ, "PATH": path, "RUNNER_INVENTORY": "in ventory"}
    arguments = ("bench", "--test", "torch", "--set", "torch.collectives=[all_reduce, barrier]", "--dry-run", "--json")
    done = subprocess.run([RUNNER, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    command = json.loads(done.stdout)["command"]
    assert command == f"RUNNER_INVENTORY='in ventory' {shlex.join(['runner' if on_path else str(RUNNER), *arguments])}"
    again = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PATH": path}
    )
    assert json.loads(again.stdout)["cells"][0]["params"]["collectives"] == ["all_reduce", "barrier"]


def test_completion_scripts_are_printed():
    assert "_RUNNER_COMPLETE" in run("completion", "bash").stdout


SCRIPT = """
import click, sys
from runner import errors
from runner.cli.main import cli, main

@cli.command(context_settings={"allow_interspersed_args": False} if sys.argv[1] == "plain" else {})
@click.option("--nodes", type=int)
@click.option("--json", "as_json", is_flag=True)
@click.argument("script", nargs=-1, type=click.UNPROCESSED)
def perform(nodes, as_json, script):
    raise errors.InfrastructureError(f"no node for {' '.join(script)}")

@cli.command()
@click.argument("script", nargs=-1, type=click.UNPROCESSED)
def speechless(script):
    raise errors.InfrastructureError("it has no such option")

sys.argv[:2] = ["runner"]
main()
"""


@pytest.mark.parametrize(
    ("kind", "arguments", "as_json"),
    [
        ("any", "perform -- train.py --json", False),
        ("any", "perform --json -- train.py", True),
        ("any", "perform --nodes 2 --json -- train.py --json", True),
        ("any", "perform --nods 2 -- train.py --json", False),  # a mistake in the options
        ("any", "perform --nods 2 --json -- train.py", True),
        ("any", "perform --nodes two -- train.py --json", False),
        ("any", "perform --nodes two --json -- train.py", True),
        ("plain", "perform train.py --json", False),
        ("plain", "perform --json train.py", True),
        ("plain", "perform --nods=2 --json train.py --json", True),
        ("any", "speechless -- train.py --json", False),
        ("any", "speechless --json", False),
        ("any", "lunch --json", True),  # no command at all
        ("any", "lunch -- --json", False),
        ("any", "runs shw --json", True),
        ("any", "runs show --json nothing", True),
        ("any", "runs tail nothing --json", False),
        ("any", "inventory --json init x", True),  # the group's own option, given in the wrong place
    ],
)
def test_only_a_commands_own_json_decides_how_an_error_is_printed(kind, arguments, as_json):
    """A user's script that takes `--json` itself is nothing of ours."""
    command = [sys.executable, "-c", SCRIPT, kind, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode in (2, 3) and done.stderr.startswith("runner: "), done.stderr
    assert bool(done.stdout) is as_json
    if as_json:
        assert json.loads(done.stdout)["error"]["code"] == done.returncode


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_comes_after_the_end_changes_nothing(tmp_path, number):
    """Python takes a moment to leave; what a command has printed and its exit code remain valid."""
    script = (
        "import atexit, os, signal, sys; from runner.cli.main import main; "
        f"atexit.register(os.kill, os.getpid(), signal.{number}); sys.argv[1:] = ['runs', 'list']; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
