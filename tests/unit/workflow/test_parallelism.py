"""DP × TP × PP is the number of GPUs, a replica of the rollout is inside a node: else refused, with what works."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UsageError
from runner.workflow.parallelism import FSDP, MEGATRON, nearest, split


def test_what_is_left_open_of_data_parallelism_is_what_is_left_of_the_gpus():
    assert split(8, 8).data == 64
    assert split(8, 8, tensor=4, pipeline=2).data == 8


def test_the_second_documents_sets_fit_two_nodes_of_four():
    assert split(2, 4, data=4, tensor=2, rollout_tensor=2).strategy == MEGATRON
    assert split(2, 4, data=8).strategy == FSDP
    assert split(2, 4, data=2, tensor=4).strategy == MEGATRON
    assert split(2, 4, data=2, tensor=2, pipeline=2).strategy == MEGATRON


def test_a_product_that_is_not_the_number_of_gpus_is_refused_with_the_nearest_that_work():
    with pytest.raises(UsageError) as refused:
        split(2, 4, data=4, tensor=4)
    assert str(refused.value) == (
        "DP 4 × TP 4 × PP 1 = 16 is not the 8 GPUs of 2 nodes with 4 each: nearest that works: "
        "DP 2 × TP 4 × PP 1; DP 4 × TP 2 × PP 1; DP 1 × TP 4 × PP 2"
    )


def test_a_division_that_leaves_a_rest_is_refused():
    with pytest.raises(UsageError, match=r"DP \? × TP 3 × PP 1 is not the 16 GPUs .*: nearest that works: DP "):
        split(2, 8, tensor=3)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"rollout_pipeline": 2}, "pipeline parallelism 2 in rollout: verl 0.9.1 has none .* up to 8$"),
        ({"rollout_tensor": 16}, "tensor parallelism 16 in rollout is more than the 8 GPUs of a node, .* 1, 2, 4, 8$"),
        ({"rollout_tensor": 3}, "tensor parallelism 3 in rollout is no divisor of the 8 GPUs of a node"),
        ({"tensor": 0}, "tensor parallelism 0: give 1 or more"),
        ({"data": -1}, "data parallelism -1: give 1 or more"),
    ],
)
def test_what_verl_cannot_do_is_refused_by_name(asked, line):
    with pytest.raises(UsageError, match=line):
        split(2, 8, **asked)


SMALL = st.integers(1, 16)


@given(nodes=SMALL, gpus=SMALL, data=SMALL, tensor=SMALL, pipeline=SMALL)
def test_every_set_is_accepted_or_refused_with_sets_that_are_accepted(nodes, gpus, data, tensor, pipeline):
    asked = {"data": data, "tensor": tensor, "pipeline": pipeline}
    fits = data * tensor * pipeline == nodes * gpus
    try:
        found = split(nodes, gpus, **asked)
        assert fits and found.world_size == nodes * gpus
        assert (found.strategy == MEGATRON) == (tensor > 1 or pipeline > 1)
    except UsageError:
        assert not fits
    for one in nearest(nodes * gpus, gpus, data, tensor, pipeline):
        assert split(nodes, gpus, data=one.data, tensor=one.tensor, pipeline=one.pipeline) == one
