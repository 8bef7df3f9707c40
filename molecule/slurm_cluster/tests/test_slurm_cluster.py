"""A Slurm cluster as its users meet it."""

import json


def _fact(host):
    return json.loads(host.file("/etc/ansible/facts.d/slurm.fact").content_string)


def test_a_job_of_three_nodes_with_eight_gpus_each_starts_from_every_node(host):
    job = host.run("srun -N3 --gres=gpu:8 --immediate=60 printenv SLURMD_NODENAME SLURM_GPUS_ON_NODE")
    assert job.rc == 0, job.stderr
    lines = job.stdout.split()
    assert sorted(lines) == ["8"] * 3 + ["node001", "node002", "node003"]


def test_a_job_that_wants_a_ninth_gpu_is_refused(host):
    assert "not available" in host.run("srun -N1 --gres=gpu:9 --immediate=5 true").stderr


def test_slurmctld_runs_on_the_first_node_alone(host):
    is_first = _fact(host)["node"] == _fact(host)["controller"]
    assert host.service("slurmctld").is_running == is_first


def test_the_daemons_come_back_after_a_boot(host):
    assert host.service("slurmd").is_enabled and host.service("munge").is_enabled


def test_the_munge_key_is_for_munge_alone_and_in_no_journal(host):
    key = host.file("/etc/munge/munge.key")
    assert (key.user, key.group, key.mode) == ("munge", "munge", 0o600)
    encoded = host.check_output("base64 -w0 /etc/munge/munge.key")
    assert encoded[:40] not in host.check_output("journalctl --no-pager")


def test_the_fact_tells_the_running_version(host):
    assert f"SLURM_VERSION           = {_fact(host)['version']}" in host.check_output("scontrol show config")
