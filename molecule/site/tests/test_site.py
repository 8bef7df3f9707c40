"""What a site is good for, after one run: every node the same, and usable for a job over all of them."""

import json

import pytest


@pytest.mark.parametrize("fact", ["cuda", "roce", "conda", "nccl", "slurm"])
def test_every_role_publishes_what_it_found(host, fact):
    assert json.loads(host.file(f"/etc/ansible/facts.d/{fact}.fact").content_string)


def test_nccl_uses_the_nics_that_roce_qos_found(host):
    hca = json.loads(host.file("/etc/ansible/facts.d/roce.fact").content_string)["hca"]
    assert f"NCCL_IB_HCA=={','.join(hca)}" in host.file("/etc/nccl.conf").content_string.splitlines()


def test_the_environment_has_this_product(host):
    assert host.check_output("/opt/shakedown/env/bin/python -c 'import runner; print(runner.__version__)'")


def test_a_node_reaches_another_by_alias(host):
    assert host.check_output("ssh -o BatchMode=yes node003 hostname").endswith("0003")


def test_a_job_of_all_nodes_starts_through_the_prolog_with_all_gpus(host):
    job = host.run("srun -N3 --gres=gpu:8 --immediate=60 printenv SLURM_GPUS_ON_NODE")
    assert job.stdout.split() == ["8"] * 3, job.stderr
