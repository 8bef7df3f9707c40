"""What of a node's facts a measurement depends on."""

from __future__ import annotations

import pytest

from runner.cluster import facts


@pytest.mark.parametrize(
    "name", ["NCCL_IB_HCA", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
)
def test_settings_are_recorded(name: str) -> None:
    assert facts.relevant({name: "1", "PATH": "/bin"}) == {name: "1"}


@pytest.mark.parametrize("name", ["NCCL_VERSION", "NCCL_HOME", "NCCL_LIB_DIR", "NV_LIBNCCL_PACKAGE", "OMPI_MCA_pml"])
def test_what_images_and_module_files_say_of_nccl_is_no_setting(name: str) -> None:
    assert facts.relevant({name: "1"}) == {}


def test_facts_of_a_run_that_recorded_such_a_variable_show_no_change() -> None:
    before = facts.comparable({"env": {"NCCL_VERSION": "2.19.3-1", "NCCL_IB_TC": "106"}})
    assert facts.changes(before, facts.comparable({"env": {"NCCL_IB_TC": "106"}})) == []


NAMES = ["bond0", "docker0", "eth0", "eth1", "ib0", "veth12"]
INTERFACES = {"mlx5_0": ["ib0"], "mlx5_bond_0": ["bond0"]}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}, {"eth0"}),
        ({"NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "eth1"}, {"eth0", "eth1"}),  # NCCL's are beginnings
        ({"NCCL_SOCKET_IFNAME": "=veth12", "GLOO_SOCKET_IFNAME": "eth0"}, {"veth12", "eth0"}),  # virtual or not
        ({"NCCL_SOCKET_IFNAME": "bond0,ib0", "GLOO_SOCKET_IFNAME": "bond0"}, {"bond0", "ib0"}),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo", "GLOO_SOCKET_IFNAME": "eth0"}, {"eth0"}),
        ({}, {"eth0"}),
        ({"NCCL_IB_HCA": "mlx5_0:1"}, {"eth0", "ib0"}),
        ({"NCCL_IB_HCA": "=mlx5_0,mlx5_bond_0"}, {"eth0", "ib0", "bond0"}),
        ({"NCCL_IB_HCA": "^mlx5_0"}, {"eth0"}),
        ({"GLOO_SOCKET_IFNAME": "gone0"}, {"eth0"}),
    ],
)
def test_interfaces_that_carry_the_traffic_are_those_that_the_libraries_are_told_to_use(environment, expected) -> None:
    assert facts.carrying(environment, NAMES, lambda hca: INTERFACES.get(hca, ()), {"eth0"}) == expected


def nic(name: str, mtu: int = 1500, carries: bool = True, driver: str | None = None) -> dict:
    return {"name": name, "speed_mbit_per_s": 10_000, "mtu": mtu, "driver": driver, "carries_traffic": carries}


def test_an_interface_that_carries_the_traffic_is_compared_though_it_has_no_driver() -> None:
    before = facts.comparable(
        {"nics": [nic("eth0"), nic("veth1", carries=False), nic("eth1", 9000, False, "mlx5_core")]}
    )
    assert before == {
        "traffic nic eth0": "10 Gbit/s, MTU 1500",
        "nic eth1": "10 Gbit/s, MTU 9000, mlx5_core",
    }
    now = facts.comparable({"nics": [nic("eth0", 1200), nic("eth1", 9000, False, "mlx5_core")]})
    assert facts.changes(before, now) == ["traffic nic eth0 10 Gbit/s, MTU 1500 -> 10 Gbit/s, MTU 1200"]


def test_the_interface_of_this_machines_own_address_carries_its_traffic() -> None:
    found = facts.collect({})["nics"]
    assert not found or any(each["carries_traffic"] for each in found)
