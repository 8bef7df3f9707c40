"""The rate of matrix products in a model's shapes."""

from __future__ import annotations

import time

import pytest
import torch

from runner.cluster import limits
from runner.plan import config
from runner.workloads.gpu import products
from runner.workloads.sft import matmul


@pytest.mark.parametrize("name", ["tiny", "llama-3.2-1b", "llama-2-7b", "llama-2-13b", "llama-2-70b"])
def test_the_products_are_those_of_all_weights_that_multiply(name):
    model = config.load_model(name).model_dump()
    weights = sum(inputs * outputs * number for inputs, outputs, number in products.weights(model))
    norms = (2 * model["num_layers"] + 1) * model["hidden_size"]
    assert weights == limits.parameters(model).non_embedding - norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_cpu_even_the_largest_model_costs_little(dtype):
    model = config.load_model("llama-2-70b").model_dump()
    started = time.process_time()
    assert 1e-5 < matmul.tflop_per_s(model, 4096, torch.device("cpu"), dtype) < 100
    assert time.process_time() - started < 3  # some hundredths: a guard against the sizes of a GPU, not a measurement


def test_a_shape_counts_by_its_share_of_the_arithmetic():
    """Twice the time for the head alone, of a fifth of the arithmetic, is a sixth less."""
    model = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    model |= {"vocab_size": 112}  # 7 matrices of 64 x 64, and one of 64 x 112: a fifth
    assert sum(i * o * n for i, o, n in products.weights(model)) * 0.2 == 64 * 112

    def seconds(shape, device, dtype):
        return shape.flop * 1e-12 * (2 if shape.outputs == 112 else 1)

    assert matmul.tflop_per_s(model, 64, torch.device("cpu"), torch.float32, seconds) == pytest.approx(1 / 1.2)
