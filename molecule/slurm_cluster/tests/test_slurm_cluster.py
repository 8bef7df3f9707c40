"""A Slurm cluster as its users meet it."""

import json
import re


def _fact(host):
    return json.loads(host.file("/etc/ansible/facts.d/slurm.fact").content_string)


def test_a_job_of_three_nodes_with_eight_gpus_each_starts_from_every_node(host):
    job = host.run("srun -N3 --gres=gpu:8 --immediate=60 printenv SLURMD_NODENAME SLURM_GPUS_ON_NODE")
    assert job.rc == 0, job.stderr
    lines = job.stdout.split()
    assert sorted(lines) == ["8"] * 3 + ["node001", "node002", "node003"]


def test_a_job_that_names_the_type_starts_and_one_of_another_type_is_refused(host):
    job = host.run("srun -N3 --exclusive --gres=gpu:h200:8 --mem=0 --immediate=60 true")
    assert job.rc == 0, job.stderr
    assert "not available" in host.run("srun -N1 --gres=gpu:h100:8 --immediate=5 true").stderr


def test_all_memory_is_what_the_system_leaves_and_no_request_is_a_share_of_it(host):
    def memory(request):
        job = host.check_output(f"srun -N1 {request} --immediate=60 bash -c 'scontrol show job $SLURM_JOB_ID'")
        (shown,) = re.findall(r" TRES=\S*mem=(\S+?),|AllocTRES=\S*mem=(\S+?),", job)
        (text,) = filter(None, shown)
        return float(text[:-1]) * {"M": 1, "G": 1024}[text[-1]]

    node = host.check_output("scontrol --oneliner show node node001")
    size, kept, cpus = (
        int(re.search(rf"\b{name}=(\d+)", node).group(1)) for name in ("RealMemory", "MemSpecLimit", "CPUTot")
    )
    assert kept > 0
    assert abs(memory("--mem=0 --exclusive") - (size - kept)) < 64  # Slurm rounds what it shows
    assert abs(memory("--ntasks=1") - (size - kept) // cpus) < 64
    assert abs(memory("--gres=gpu:h200:4") - (size - kept) // 2) < 64


def test_a_job_has_its_container_from_the_allocation_on(host):
    assert "extern" in host.check_output(
        "srun -N1 --immediate=60 bash -c 'squeue --noheader --steps --jobs=$SLURM_JOB_ID'"
    )


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
