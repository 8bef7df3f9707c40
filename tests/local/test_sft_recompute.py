"""Activations that a layer keeps for its backward pass: how many bytes, and that gradients are the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from model_probe import MODEL
from runner.cluster import limits
from runner.workloads.sft.layers import arrange
from runner.workloads.sft.model import build_model

TOKENS = 64


class Live(TorchDispatchMode):
    """The memory of all results of operations that still exist, except that of `weights`."""

    def __init__(self, weights) -> None:
        super().__init__()
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._weights:
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self._storages.values() if not storage.expired())


@pytest.fixture(scope="module")
def kept() -> dict[str, tuple[float, list[torch.Tensor]]]:
    """(bytes per token and layer between forward and backward pass, gradients) of each kind."""
    found = {}
    for recomputed in ("none", "selective", "full"):
        sizes = {}
        for num_layers in (1, 3):
            model = build_model({**MODEL, "num_layers": num_layers}, attention="sdpa", dtype=torch.bfloat16, seed=1)
            model.train()
            arrange(model, recomputed=recomputed, compiled=False, checkpoint=partial(checkpoint, use_reentrant=False))
            ids = torch.arange(TOKENS)[None]
            with Live(model.parameters()) as live:
                out = model(input_ids=ids, use_cache=False).logits
            sizes[num_layers] = live.bytes()
            out.float().square().mean().backward()
        found[recomputed] = (sizes[3] - sizes[1]) / 2 / TOKENS, [weight.grad for weight in model.parameters()]
    return found


def test_selective_keeps_less_than_none_and_more_than_full(kept):
    assert kept["none"][0] > 1.3 * kept["selective"][0] > 1.3 * 3 * kept["full"][0]
    assert kept["full"][0] == pytest.approx(limits.kept_bytes(MODEL, "full"), rel=0.05)


def test_selective_keeps_what_the_estimate_of_memory_counts(kept):
    """Besides, attention keeps a 32-bit number per head and token."""
    statistics = 4 * MODEL["num_heads"]
    assert kept["selective"][0] == pytest.approx(limits.kept_bytes(MODEL, "selective") + statistics, rel=0.05)


@pytest.mark.parametrize("recomputed", ["selective", "full"])
def test_gradients_are_the_same(kept, recomputed):
    for found, expected in zip(kept[recomputed][1], kept["none"][1], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
