"""What test `sft` does itself because a DeepSpeed of the role's locks does not."""

from __future__ import annotations

import pytest

deepspeed_comm = pytest.importorskip("deepspeed.comm")
torch = pytest.importorskip("torch")

from runner.workloads.sft import versions  # noqa: E402


class Handle:
    """STAND-IN for a gather over gloo: its data arrives when it is waited for, the latest that is allowed."""

    def __init__(self, output, values) -> None:
        self.output, self.values = output, values

    def wait(self) -> None:
        self.output.copy_(self.values)


def gather(output, values, async_op=False):
    handle = Handle(output, values)
    return handle if async_op else handle.wait()


def test_every_weight_has_arrived_though_deepspeed_waits_for_the_last_alone(monkeypatch):
    monkeypatch.setattr(deepspeed_comm, "all_gather_into_tensor", gather)
    versions.finish_gathers()
    weights = [torch.full([4], float("nan")) for _ in range(3)]
    handles = [deepspeed_comm.all_gather_into_tensor(weight, torch.ones(4), async_op=True) for weight in weights]
    handles[-1].wait()
    assert [weight.tolist() for weight in weights] == [[1.0] * 4] * 3


def test_a_gather_that_is_not_asynchronous_has_nothing_to_wait_for(monkeypatch):
    monkeypatch.setattr(deepspeed_comm, "all_gather_into_tensor", gather)
    versions.finish_gathers()
    weight = torch.zeros(4)
    assert deepspeed_comm.all_gather_into_tensor(weight, torch.ones(4)) is None
    assert weight.tolist() == [1.0] * 4
