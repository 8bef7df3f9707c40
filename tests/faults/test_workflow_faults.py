"""Faults of a workflow on this machine, with the real Ray: exit code, node, kind, and that nothing is left.

What is missing before anything starts is told without Ray, and nothing is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import verl_environment
from conftest import ROOT
from fakes import hub
from faults.conftest import assert_no_orphan, assert_nothing_half_written, error_of
from runner.errors import EXIT_INFRASTRUCTURE, EXIT_USAGE
from runner.node import place
from runner.plan.engines import ray
from runner.system import process
from testbed.benches import RUNNER, Bench

pytestmark = pytest.mark.local

PLANTED = ROOT / "tests" / "fakes" / "planted"
HERE = "localhost"


class Workflow(Bench):
    """`runner workflow ppo`, its first stage alone, on this machine."""

    program = (RUNNER, "workflow", "ppo", "--stages", "ppo", "--steps", "1")

    def failed(self) -> tuple[int, str, dict]:
        """The exit code, what was printed, and the stage's error; nothing of the run is left over."""
        code, output = self.end()
        error = error_of(self.run, "ppo")
        assert_no_orphan(self.marker)
        assert not Path(ray.folder(self.marker)).exists()
        assert_nothing_half_written(self.run)
        return code, output, error

    def said(self) -> str:
        """What this machine's supervisor of Ray has printed."""
        return self.run.cell(HERE, "ppo").engine_stdout.read_text()


@pytest.fixture
def workflow(this_machine: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Workflow]]:
    """A function that starts one; `planted` is one of tests/fakes/planted."""
    try:
        verl_environment.python()
    except LookupError as error:
        pytest.skip(f"no profile with Ray: {error}")
    inventory = this_machine()
    begun = []

    def start(*arguments: str, planted: str = "") -> Workflow:
        if planted:
            words = f"runner_env: {{PLANTED: {planted}, PYTHONPATH: {json.dumps(str(PLANTED))}}}\n"
            with open(inventory / "group_vars" / "all.yml", "a") as file:
                file.write(words)
        begun.append(Workflow(inventory, tmp_path / "results", *arguments))
        return begun[-1]

    yield start
    for each in begun:
        each.leave()


@contextlib.contextmanager
def thief(run: Workflow) -> Iterator[list[ray.Ports]]:
    """Somebody who takes the port of Ray's GCS as soon as `run` has claimed a block; the block, once that is done."""
    robbed, over = [], threading.Event()

    def steal() -> None:
        while not (run.results / "latest" / "status.json").exists():
            if over.wait(0.02):
                return
        claims = {ports["claim"]: ports for ports in ray.blocks(place.ephemeral())}
        while not (claimed := listened(run.marker) & claims.keys()):
            if over.wait(0.02):
                return
        ports = claims[claimed.pop()]
        over.wait(0.3)  # the claim is listened on before the others are looked at
        with socket.create_server(("", ports["gcs"])):
            robbed.append(ports)
            over.wait()

    thread = threading.Thread(target=steal)
    thread.start()
    try:
        yield robbed
    finally:
        over.set()
        thread.join()


def listened(marker: str) -> set[int]:
    """The ports on which processes of the run with that marker listen: those of others are left alone."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    ports = {f"socket:[{words[9]}]": int(words[1].rpartition(":")[2], 16) for words in lines if words[3] == "0A"}
    found = set()
    for pid in process.marked(marker):
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(ports.get(os.readlink(link)))
    return found - {None}


# --- while it runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_port_that_another_has_taken_is_named(workflow):
    run = workflow()
    with thief(run) as robbed:
        code, output, error = run.failed()
    assert robbed and code == EXIT_INFRASTRUCTURE, output
    assert (error["kind"], error["host"]) == ("port_taken", HERE), error


@pytest.mark.slow
def test_another_try_takes_other_ports_and_the_jobs_own_failure_is_the_jobs(workflow):
    """The second try gets as far as its job, which fails."""
    run = workflow("--retries", "1", planted="fails")
    with thief(run) as robbed:
        code, output, error = run.failed()
    assert robbed and run.run.read_status()["cells"]["ppo"]["attempt"] == 2, output
    head = json.loads(run.run.cell(HERE, "ppo").ray_head.read_text())
    assert head["gcs"] not in robbed[0].all
    assert code == EXIT_INFRASTRUCTURE and (error["kind"], error["host"]) == ("rank_crashed", HERE), error
    assert "no rules today" in error["message"] and "no rules today" in output
    assert re.search(r"the job has ended with status 1$", run.said(), re.MULTILINE)


@pytest.mark.slow
def test_a_ray_with_another_token_refuses_the_run(workflow):
    code, output, error = workflow(planted="token").failed()
    assert code == EXIT_INFRASTRUCTURE, output
    assert (error["kind"], error["host"]) == ("ray_refused", HERE), error
    assert re.search(r"Ray at \S+ refuses this job's token \(HTTP 403\)", error["message"])


@pytest.mark.slow
def test_a_node_that_brings_fewer_gpus_is_named_before_the_job(workflow):
    run = workflow(planted="gpus")
    code, output, error = run.failed()
    assert code == EXIT_INFRASTRUCTURE, output
    assert (error["kind"], error["host"]) == ("gpus_missing", HERE), error
    assert "has joined Ray with 1 GPU, 2 asked for" in error["message"] and " submitted" not in run.said()


@pytest.mark.slow
def test_a_rollout_without_memory_names_the_setting_and_a_value_that_can_be_typed(workflow, tmp_path):
    run = workflow(planted="vllm")
    code, output, error = run.failed()
    assert code == EXIT_INFRASTRUCTURE, output
    assert (error["kind"], error["host"]) == ("rollout_out_of_memory", HERE), error
    assert any("is less than desired GPU memory utilization" in line for line in error["stderr"]), error
    advised = re.findall(r"--set (\S+gpu_memory_utilization=0\.\d+)", " ".join(output.split()))
    assert advised, output
    for setting in advised:
        again = Workflow(ROOT / "inventory" / "local", tmp_path / "dry", "--dry-run", "--set", setting)
        code, output = again.end()
        assert code == 0 and setting.partition("actor_")[2] in output, output


# --- before anything starts -------------------------------------------------------------------------


def torn(tmp_path: Path) -> str:
    folder = tmp_path / "torn"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(b"\x08")
    return str(folder)


def refused(inventory: Path, tmp_path: Path, *arguments: str, code: int = EXIT_USAGE, **environment: str) -> str:
    """The one line of a workflow that asks for what there is not, which ends with `code`, and no run."""
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", **environment}
    run = Workflow(inventory, tmp_path / "results", *arguments, env=own)
    ended, output = run.end()
    assert ended == code and "Traceback" not in output, output
    assert len(output.splitlines()) == 1, output
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").glob("*/plan.json"))
    return output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (lambda _: ("--model", "/no/such/folder"), "model /no/such/folder: its weights are not there"),
        (lambda place: ("--model", torn(place)), "model.safetensors"),
        (lambda _: ("--data", "/no/such/rows.parquet"), "/no/such/rows.parquet"),
    ],
)
def test_what_is_missing_is_one_line_and_nothing_starts(this_machine, tmp_path, arguments, says):
    assert says in refused(this_machine(), tmp_path, *arguments(tmp_path))


def test_a_hub_that_does_not_answer_is_one_line(this_machine, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    line = refused(this_machine(), tmp_path, "--model", "owner/name", code=EXIT_INFRASTRUCTURE, HF_ENDPOINT=endpoint)
    assert "owner/name" in line and "hub" in line


def test_a_model_behind_a_licence_says_where_to_accept_it(this_machine, tmp_path):
    with hub.serving() as server:
        server.repositories["owner/name"] = hub.Repository({"config.json": b"{}"}, gated="manual")
        line = refused(this_machine(), tmp_path, "--model", "owner/name", HF_ENDPOINT=server.endpoint)
    assert "owner/name" in line and "HF_TOKEN" in line
