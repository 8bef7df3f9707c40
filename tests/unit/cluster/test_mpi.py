"""What MPI there is on a machine, told by the programs themselves."""

from __future__ import annotations

import pytest

from runner.cluster import mpi

# `srun --mpi=list` of 22.05 and later, of 21.08 and earlier, and of a Slurm that was built without PMIx.
NEW = "MPI plugin types are...\n\tnone\n\tpmix\n\tcray_shasta\n\tpmi2\nspecific pmix plugin versions available: pmix_v5"
OLD = "srun: MPI types are...\nsrun: none\nsrun: pmix_v2\nsrun: pmi2\nsrun: pmix_v3"
WITHOUT = "MPI plugin types are...\n\tnone\n\tpmi2\n\tcray_shasta"


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [(NEW, "pmix"), (OLD, "pmix_v3"), (WITHOUT, "pmi2"), ("MPI types are...\nnone", None), ("", None)],
)
def test_the_plugin_is_one_that_slurm_offers(answer, chosen):
    assert mpi.plugin(mpi.named_plugins(answer)) == chosen


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes programs on PATH, which has no others: each prints a text."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def made(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}\nEND\n")
        (tmp_path / name).chmod(0o755)

    return made


@pytest.mark.parametrize("said", ["mpirun (Open MPI) 4.1.4\n\nReport bugs to", "mpirun (Open MPI) 5.0.7rc1"])
def test_open_mpi_says_its_version(program, said):
    program("mpirun", said)
    assert mpi.version() == said.split()[3]
    assert "lacks orted and prted" in str(mpi.obstacle())
    program("prted", "")
    assert mpi.obstacle() is None


def test_another_mpirun_or_none_is_told_with_what_to_install(program):
    assert mpi.version() is None and str(mpi.obstacle()).startswith("lacks mpirun: install Open MPI")
    program("mpirun", "HYDRA build details:\n    Version: 4.0.2")
    assert mpi.version() is None and "HYDRA build details" in str(mpi.obstacle())


def test_a_slurm_that_cannot_start_mpi_programs_is_told_with_what_it_answers(program):
    assert str(mpi.step_obstacle()).startswith("lacks srun")
    program("srun", "MPI types are...\nnone")
    assert "(srun --mpi=list: none): install Slurm's PMIx plugin" in str(mpi.step_obstacle())
    program("srun", NEW)
    assert mpi.step_obstacle() is None
