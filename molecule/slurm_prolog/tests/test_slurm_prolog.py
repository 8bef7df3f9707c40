"""Prolog and epilog as a job meets them."""

import json
import time

import pytest


@pytest.fixture(scope="module")
def job(host):
    """The environments of a job's three tasks, one line a variable."""
    done = host.run("srun -N3 --gres=gpu:8 --immediate=60 env")
    assert done.rc == 0, done.stderr
    return done.stdout.splitlines()


def test_a_job_of_three_nodes_starts_through_the_prolog(job):
    nodes = [line.partition("=")[2] for line in job if line.startswith("SLURMD_NODENAME=")]
    assert sorted(nodes) == ["node001", "node002", "node003"]


def test_a_job_finds_no_variable_of_the_prolog(job):
    assert not {line.partition("=")[0] for line in job} & {"RUN_AS", "RUN_TEST", "GPUS", "NVIDIA_SMI"}


def test_every_part_is_good_and_cheap(host):
    outcomes = json.loads(host.check_output("/etc/slurm/prolog --test"))["parts"]
    assert [one["name"] for one in outcomes] == ["10-gpu-health", "20-leftover-processes", "40-gpu-cpu-affinity"]
    assert {one["verdict"] for one in outcomes} == {"good"}
    assert sum(one["seconds"] for one in outcomes) < 5


def test_the_prolog_ran_before_the_job_and_the_epilog_after_it(host, job):
    for _ in range(40):
        journal = host.check_output("journalctl -t slurm-prolog -o cat --no-pager")
        if "prolog of job" in journal and "epilog of job" in journal:
            return
        time.sleep(0.5)
    raise AssertionError(journal)


def test_affinity_gives_every_gpu_its_cpus_and_a_nic_of_its_own(host, job):
    found = json.loads(host.file("/run/shakedown/affinity.json").content_string)
    assert sorted(found) == [str(n) for n in range(8)]
    assert len({gpu["nic"] for gpu in found.values()}) == 8
    assert all(gpu["cpus"] for gpu in found.values())
