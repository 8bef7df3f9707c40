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
