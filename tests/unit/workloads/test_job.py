"""What a rank is told by who starts it."""

from __future__ import annotations

import os
import threading
import time

import pytest

from runner.results.celldir import CellDir
from runner.workloads import job
from runner.workloads.job import Events, RankJob, rank_from_env

MPIRUN = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
STEP = {"SLURM_PROCID": "3", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("environment", "rank", "world", "local"),
    [
        (MPIRUN, 5, "16", "1"),
        ({**STEP, "PMIX_RANK": "4"}, 4, "16", "3"),
        (STEP, 3, "16", "3"),  # pmi2
        # An agent in a step of Slurm has the step's variables, and mpirun there those of the step that it is started in.
        ({**STEP, **MPIRUN}, 5, "16", "1"),
        ({**STEP, **MPIRUN, "RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "7"}, 7, "8", "7"),
        ({**STEP, "PMIX_RANK": ""}, 3, "16", "3"),
    ],
)
def test_a_rank_is_what_its_launcher_says(monkeypatch, environment, rank, world, local):
    monkeypatch.setattr(os, "environ", dict(environment))
    assert rank_from_env() == rank
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == (world, local)


@pytest.mark.parametrize("environment", [{}, {"OMPI_COMM_WORLD_RANK": "5"}, {"RANK": "one"}])
def test_without_a_launcher_there_is_no_rank(monkeypatch, environment):
    monkeypatch.setattr(os, "environ", dict(environment))
    with pytest.raises(SystemExit, match="mpirun"):
        rank_from_env()


HELD = {
    "run_id": "r", "cell": "c", "test": "sft", "device": "cpu", "num_nodes": 1, "gpus_per_node": 1, "world_size": 1, "seed": 0,
    "params": {}, "held": True,
}  # fmt: skip


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A rank whose data are not there, and its cell's folder; an agent that is silent for 1 s has ended."""
    monkeypatch.setattr(job, "AGENT_S", 1.0)
    events = Events(tmp_path, 0)
    yield events, RankJob(**HELD), CellDir(tmp_path)
    events.end()


def test_a_held_rank_waits_as_long_as_its_agent_lives(held):
    events, asked, folder = held

    def agent():
        with open(folder.telemetry, "a", buffering=1) as telemetry:
            for _ in range(30):
                telemetry.write("{}\n")
                time.sleep(0.05)
        folder.go.touch()

    threading.Thread(target=agent).start()
    assert 1.4 < events.wait_for_data(asked) < 30


def test_a_held_rank_ends_where_its_agent_has_been_killed(held):
    """Nobody is left to end it where the controller, or its way there, has ended as well."""
    events, asked, folder = held
    folder.telemetry.write_text("{}\n")
    with pytest.raises(SystemExit, match="rank 0: waits for its data, and the agent of its node has ended"):
        events.wait_for_data(asked)
