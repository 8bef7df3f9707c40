"""What the role leaves on a node."""

import json

import pytest

CURRENT = "/opt/nccl/current"


@pytest.fixture
def first(host):
    return host.ansible.get_variables()["runner_alias"] == "node001"


def test_nccl_was_built_on_the_first_node_alone(host, first):
    logs = host.run("find /opt/nccl -maxdepth 1 -name '*.build.log'").stdout.split()
    assert len(logs) == (1 if first else 0)


def test_each_node_has_the_same_build(host):
    stamp = host.file(f"{CURRENT}/stamp.json").sha256sum
    others = {
        peer.file(f"{CURRENT}/stamp.json").sha256sum
        for peer in type(host).get_hosts(["ansible://gpu_nodes"], ansible_inventory=host.backend.ansible_inventory)
    }
    assert others == {stamp}


def test_nothing_of_the_way_there_is_left(host):
    left = host.run("find /opt/nccl -maxdepth 1 -name '.*' ! -name .lock ! -path /opt/nccl").stdout
    assert left == ""


def test_a_program_gets_this_nccl_without_an_environment(host):
    run = host.run(f"{CURRENT}/bin/all_reduce_perf -b 8M -e 8M -g 8")
    assert run.rc == 0
    assert "nccl-library=23007" in run.stdout
    assert "# Out of bounds values : 0 OK" in run.stdout
    assert run.stdout.count("#  Rank") == 8


def test_on_a_node_that_never_had_mpis_headers_its_ranks_meet(host):
    run = host.run(f"mpirun --allow-run-as-root --oversubscribe -np 2 {CURRENT}/bin/all_reduce_perf -b 1K -e 1K -n 1")
    assert run.rc == 0 and run.stdout.count("#  Rank") == 2, run.stdout + run.stderr


def test_the_environment_file_names_this_nccl(host):
    line = host.check_output("sh -c '. /opt/nccl/env.sh; echo $LD_LIBRARY_PATH; command -v all_reduce_perf'")
    assert line.splitlines() == [f"{CURRENT}/lib", f"{CURRENT}/bin/all_reduce_perf"]


def test_torch_finds_it_on_the_path_of_modules(host):
    assert host.file("/opt/nccl/python/nvidia/nccl/lib/libnccl.so.2").linked_to.startswith(host.file(CURRENT).linked_to)


def test_nccl_reads_what_was_found_of_roce_and_what_the_user_set(host):
    lines = host.file("/etc/nccl.conf").content_string.splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    assert settings == {
        "NCCL_BUFFSIZE": "8388608",
        "NCCL_DEBUG": "WARN",
        "NCCL_IB_GID_INDEX": "3",
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "NCCL_IB_TC": "106",
    }


def test_the_fact_says_what_is_in_use(host):
    fact = json.loads(host.file("/etc/ansible/facts.d/nccl.fact").content_string)
    assert (fact["version"], fact["cuda"], fact["architectures"]) == ("2.30.7", "12.8", ["90"])
    assert (fact["nccl_tests"], fact["mpi"]) == ("2.19.6", True)
    assert host.file(f"{fact['prefix']}/lib/libnccl.so.2").exists
    assert host.file(CURRENT).linked_to == fact["prefix"]
