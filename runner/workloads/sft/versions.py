"""What differs between the versions of transformers, DeepSpeed and torch that the locks of `conda_env` have.

Each function asks the installed library what it can do, never which version it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def read_rope(config: Any) -> None:
    """Give a LlamaConfig that was read from a checkpoint the rotary embeddings that a newer transformers wrote into it.

    transformers before 5 keeps that field as any unknown one, and computes with its own default.
    """
    written = getattr(config, "rope_parameters", None)
    if "rope_parameters" in inspect.signature(type(config).__init__).parameters or not written:
        return  # transformers 5 converts the fields of earlier versions itself
    scaling = {name: value for name, value in written.items() if name != "rope_theta"}
    config.rope_theta = written["rope_theta"]
    config.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling


def dtype(value: torch.dtype) -> dict[str, Any]:
    """The argument with which transformers makes a model of this type; it is `torch_dtype` before 4.56."""
    from transformers.models.llama.configuration_llama import LlamaConfig

    return {"dtype" if hasattr(LlamaConfig(), "dtype") else "torch_dtype": value}


@contextmanager
def without_weights() -> Iterator[None]:
    """A context in which transformers builds a model whose weights are not drawn: somebody else writes them.

    Under ZeRO-3 version 5 gathers every parameter to draw it, after the model was built.
    """
    from transformers import modeling_utils
    from transformers.integrations import deepspeed

    drawing = getattr(deepspeed, "initialize_weights_zero3", None)
    if drawing is None:
        with modeling_utils.no_init_weights():  # type: ignore[attr-defined]
            yield
        return
    from transformers.initialization import no_init_weights

    deepspeed.initialize_weights_zero3 = lambda model: None
    try:
        with no_init_weights():
            yield
    finally:
        deepspeed.initialize_weights_zero3 = drawing


def has_fused_adamw(device: str) -> bool:
    """Whether torch updates all parameters on `device` ("cuda", "cpu") by one kernel; on CPUs torch 2.3 does not."""
    import torch

    try:
        torch.optim.AdamW([torch.zeros(1, device=device, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True


def checkpoint(config: Mapping[str, Any]) -> Callable[..., Any]:
    """The function (function, *inputs) that recomputes activations instead of keeping them.

    DeepSpeed's, so that the section `activation_checkpointing` of its configuration applies. That of 0.14 begins by
    making a stream of the device, and a CPU has none: there it is torch's.
    """
    import deepspeed

    if hasattr(deepspeed.checkpointing, "transport_stream") and deepspeed.get_accelerator().Stream is None:
        from torch.utils.checkpoint import checkpoint

        # The other implementation compares shapes, and ZeRO-3 changes those of the weights.
        return partial(checkpoint, use_reentrant=True)
    deepspeed.checkpointing.configure(None, deepspeed_config=config)
    return deepspeed.checkpointing.checkpoint  # type: ignore[no-any-return]


def finish_gathers() -> None:
    """Have DeepSpeed finish each gather of a weight before it begins the next; for gloo, once in a process.

    DeepSpeed 0.14 begins one for each small weight after a step, and waits for the last alone. NCCL runs them in order;
    gloo's threads do not, and the next step may read a weight that has not arrived: whatever was in that memory, NaN at
    times. Later versions wait for each.
    """
    import deepspeed.comm

    begin = deepspeed.comm.all_gather_into_tensor

    def gather(*arguments: Any, **settings: Any) -> Any:
        handle = begin(*arguments, **settings)
        if handle is not None:  # it is asynchronous
            handle.wait()
        return handle

    deepspeed.comm.all_gather_into_tensor = gather
