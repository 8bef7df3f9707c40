"""Engine `accelerate` with the real Accelerate on CPUs: the world is the planned one, and a smaller one is noticed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

import ranks
from runner.launch import spellings
from runner.node import accelerate as supervisor
from runner.plan.engines import accelerate
from runner.plan.engines.ranks import Ranks
from runner.results.celldir import CellDir
from runner.system import process

pytestmark = pytest.mark.local

TORCH = {
    "collectives": ["all_reduce"],
    "min_bytes": 8,
    "max_bytes": 8,
    "factor": 8,
    "warmup": 1,
    "iters": 2,
    "dtype": "float32",
}
ENV = {key: value for key, value in os.environ.items() if key != process.MARKER} | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    python: str

    @property
    def alias(self) -> str:
        return self.name


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def engine(folders, gpus):
    """Start the engine's command of each node, all on this machine; a folder is a node's."""
    nodes = [Node(f"n{index}", "127.0.0.1", sys.executable) for index, _ in enumerate(folders)]
    port = free_port()
    started = []
    for index, folder in enumerate(folders):
        asked = Ranks(nodes, gpus, "127.0.0.1", port, str(folder), str(folder), None, "run/cell")
        started.append(
            subprocess.Popen(
                accelerate.launch(asked).argv[index],
                env=ENV,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        return [(process.communicate(timeout=150)[0], process.returncode) for process in started]
    finally:
        for each in started:
            if each.poll() is None:
                each.kill()


def cell(folder, machines, gpus, test="torch", **params):
    folder.mkdir(parents=True)
    made = ranks.job(test, gpus * machines, TORCH | params) | {"num_nodes": machines, "gpus_per_node": gpus}
    CellDir(folder).job.write_text(json.dumps(made))
    return folder


def starts(folder):
    files = CellDir(folder).all_events()
    return {
        event["rank"]: event["world_size"] for file in files for event in [json.loads(file.read_text().splitlines()[0])]
    }


def test_two_nodes_of_one_rank_each_meet_and_each_has_its_own_file(tmp_path):
    folders = [cell(tmp_path / f"node{index}", 2, 1) for index in range(2)]
    ended = engine(folders, 1)
    assert [code for _, code in ended] == [0, 0], ended
    assert [starts(folder) for folder in folders] == [{0: 2}, {1: 2}]
    written = [CellDir(folder).accelerate_config.read_text() for folder in folders]
    assert ["machine_rank: 0" in written[0], "machine_rank: 1" in written[1]] == [True, True]
    assert all("num_processes: 2" in text for text in written), "the total"


SCRIPT = """
import os
import sys
import torch
from accelerate import Accelerator
accelerator = Accelerator()
total = accelerator.reduce(torch.tensor([accelerator.process_index + 1.0]), "sum").item()
line = f"{accelerator.process_index} of {accelerator.num_processes} on {accelerator.device.type}: {total}, {sys.argv[1:]}\\n"
os.write(1, line.encode())  # whole: both ranks have one pipe
accelerator.end_training()
"""


def test_a_users_script_on_one_node_of_two_ranks_computes_together_and_gets_its_own_words(tmp_path):
    script, file = tmp_path / "train it.py", tmp_path / "accelerate.yaml"
    script.write_text(SCRIPT)
    place = accelerate.Place(0, 1, 2, "127.0.0.1", free_port(), "cpu")
    file.write_text(accelerate.text(accelerate.rendered({"mixed_precision": "bf16"}, place)))
    own = ["-m", "--config_file=x", "a b", "$(id)", "é"]
    words = accelerate.command(sys.executable, str(file), str(tmp_path / "logs"), [sys.executable, str(script), *own])
    outcome = process.run(words, timeout_s=150, env=ENV | accelerate.environment("cpu"))
    assert outcome.rc == 0, outcome.stderr
    assert sorted(outcome.stdout.splitlines()) == [f"{rank} of 2 on cpu: 3.0, {own}" for rank in range(2)]


def test_cpu_and_num_processes_start_one_process_which_says_so_and_what_to_type(tmp_path):
    """Accelerate's own words for two processes on CPUs start one, and end with 0 where nobody asks for the world."""
    told = ["--cpu", "--num_processes=2", "--no_python", sys.executable]
    counted = [sys.executable, "-m", "accelerate.commands.launch", *told, "-c", "print('one process')"]
    alone = process.run(counted, timeout_s=120, env=ENV)
    assert (alone.rc, alone.stdout.count("one process")) == (0, 1), "Accelerate has changed: --cpu may be used"
    folder = cell(tmp_path / "node", 1, 2)
    words = [sys.executable, "-m", "accelerate.commands.launch", *told, "-m", "runner.workloads", str(folder)]
    noticed = process.run(words, timeout_s=120, env=ENV)
    assert noticed.rc != 0
    assert "accelerate launch started this process alone" in noticed.stderr
    assert "set ACCELERATE_USE_CPU=true and distributed_type MULTI_GPU instead" in noticed.stderr
    (line,) = [line for line in noticed.stderr.splitlines() if "started this process alone" in line]
    assert spellings.kind_of([line]) == "wrong_world_size"


def test_what_accelerates_loader_refuses_is_one_line_and_nothing_starts(tmp_path, monkeypatch, capfd):
    folder = cell(tmp_path / "node", 1, 1)
    monkeypatch.setattr(
        accelerate, "rendered", lambda asked, place: {"distributed_type": "MULTI_GPU", "of_tomorrow": 1}
    )
    assert (
        supervisor.main([str(folder), "--machine-rank=0", "--machines=1", "--gpus=1", "--address=a", "--port=1"]) == 1
    )
    fault = json.loads(CellDir(folder).fault.read_text())
    assert fault["kind"] == "accelerate_refused"
    assert "had unknown keys (['of_tomorrow'])" in fault["message"] and "\n" not in fault["message"]
    assert not CellDir(folder).all_events()


def test_a_loader_that_reads_another_world_is_refused(tmp_path):
    file = tmp_path / "accelerate.yaml"
    place = accelerate.Place(0, 1, 2, "127.0.0.1", 29000, "cpu")
    config = accelerate.rendered({}, place)
    file.write_text(accelerate.text(config | {"num_processes": 1}))
    with pytest.raises(supervisor.RunnerError, match="Accelerate reads num_processes as 1, not 2"):
        supervisor.read_back(sys.executable, file, config)


def test_an_environment_without_accelerate_says_what_to_install(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    with pytest.raises(supervisor.RunnerError, match="install accelerate in that environment") as caught:
        supervisor.read_back(str(python), tmp_path / "x.yaml", {})
    assert caught.value.kind == "environment_missing"


def test_the_sections_have_the_options_of_accelerate_launch_and_no_others():
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    ours = {prefix + key for prefix, keys in accelerate._SECTIONS.values() for key in keys}
    groups = ("deepspeed_", "zero", "offload_", "gradient_", "fsdp_", "fp8_", "dynamo_", "parallelism_config_")
    assert ours == {name for name in options if name.startswith(groups)}


def test_every_top_level_key_of_accelerates_loader_is_known():
    from accelerate.commands.config.config_args import ClusterConfig

    known = {*accelerate.PLACED, *accelerate._PLAIN, *accelerate._SECTIONS, *accelerate._ELSEWHERE}
    assert set(ClusterConfig.__dataclass_fields__) <= known
    assert known - set(ClusterConfig.__dataclass_fields__) == {"fp16", "dynamo_backend"}, "which the loader converts"


def test_the_launcher_is_what_the_agent_signals(tmp_path):
    """The supervisor has become it: a signal to the process that was started ends the ranks."""
    folder = cell(tmp_path / "node", 1, 1, iters=10**9)
    node = Node("n0", "127.0.0.1", sys.executable)
    asked = Ranks([node], 1, "127.0.0.1", free_port(), str(folder), str(folder), None, "run/cell")
    started = subprocess.Popen(
        accelerate.launch(asked).argv[0], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 90
        while not CellDir(folder).all_events() and time.monotonic() < deadline:
            assert started.poll() is None
            time.sleep(0.2)
        (events,) = CellDir(folder).all_events()
        rank = next(json.loads(line)["pid"] for line in events.read_text().splitlines() if "pid" in line)
        started.send_signal(signal.SIGTERM)
        started.wait(60)
        while os.path.exists(f"/proc/{rank}") and time.monotonic() < deadline + 30:
            time.sleep(0.1)
        assert not os.path.exists(f"/proc/{rank}")
    finally:
        if started.poll() is None:
            started.kill()
