"""What a rank is told by who starts it."""

from __future__ import annotations

import os

import pytest

from runner.workloads.job import rank_from_env

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
