"""Training with matrix products in 8 bits, by torchao: weights, gradients and optimizer remain as they are.

Only the linear layers of decoder layers are converted. The output head and a table that it shares stay in 16 bits:
the loss is the most sensitive to them. Both recipes scale what they convert anew for each product, `tensorwise` with
one scale for a tensor, the faster, `rowwise` with one for each row, the more exact.

torchao saves a view of each weight for the backward pass. Under ZeRO-3, where weights are gathered for a layer and
released after it, that view would keep every one of them; a compiled layer keeps the weight itself, which is gathered
again. So layers in 8 bits are always compiled, and every stage works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.errors import UsageError

RECIPES: Mapping[str, tuple[int, int]] = {"tensorwise": (8, 9), "rowwise": (9, 0)}  # compute capability that each needs
_MULTIPLE = 16  # of every dimension of a product in 8 bits


def refuse_shapes(model: Mapping[str, Any], seq_len: int) -> None:
    """Raise UsageError where `model` (configs/models/) or `seq_len` tokens cannot be multiplied in 8 bits."""
    kv = model["hidden_size"] * model["num_kv_heads"] // model["num_heads"]
    sizes = {
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["intermediate_size"],
        "the width of key and value heads": kv,
        "sft.seq_len": seq_len,
    }
    if wrong := [f"{name} is {size}" for name, size in sizes.items() if size % _MULTIPLE]:
        raise UsageError(f"sft.precision=fp8 needs multiples of {_MULTIPLE}: {', '.join(wrong)}")


def require_gpu(recipe: str) -> None:
    """Raise UsageError where this rank's GPU has no products of `recipe`."""
    import torch

    found, needed = torch.cuda.get_device_capability(), RECIPES[recipe]
    if found < needed:
        can = [name for name, least in RECIPES.items() if found >= least]
        raise UsageError(
            f"sft.fp8_recipe={recipe} needs a GPU of compute capability {needed[0]}.{needed[1]} or more, "
            f"{torch.cuda.get_device_name()} has {found[0]}.{found[1]}: set "
            + (f"sft.fp8_recipe={can[0]}" if can else "sft.precision=auto")
        )


def convert(model: Any, recipe: str, *, emulate: bool = False) -> None:
    """Have the linear layers of the decoder layers of `model` multiply in 8 bits by `recipe`.

    Before DeepSpeed's engine is built. With `emulate` values are rounded to 8 bits and multiplied in 32, on any device.
    """
    from dataclasses import replace

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(model.model.layers, config=replace(config, emulate=emulate))
