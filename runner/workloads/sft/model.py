"""The model of test `sft`, and the inputs of its forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.errors import UsageError
from runner.workloads import architecture
from runner.workloads.sft.data import Batch

if TYPE_CHECKING:
    import numpy as np
    import torch


def build_model(model: Mapping[str, Any], *, attention: str, dtype: torch.dtype, weights: str | None = None) -> Any:
    """A LlamaForCausalLM with the architecture `model` of configs/models/.

    Its weights are random, or those of `weights`, a Hugging Face id or path. `attention` is transformers'
    `attn_implementation`.

    Under ZeRO-3 (an HfDeepSpeedConfig is alive) each parameter is divided among the ranks as soon as it
    exists, so no rank ever holds the whole model.

    Raises UsageError when `weights` cannot be read or are not of this architecture.
    """
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    if weights is None:
        known = inspect.signature(LlamaConfig.__init__).parameters
        config = LlamaConfig(**architecture.arguments(model, known))
        return LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype)
    try:
        config = LlamaConfig.from_pretrained(weights)
    except OSError as error:
        raise UsageError(f"cannot read weights {weights!r}: {str(error).splitlines()[0]}") from error
    if config.model_type != "llama":
        raise UsageError(f"weights {weights!r} are of type {config.model_type!r}, test sft trains Llama architectures")
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"weights {weights!r} are quantised: test sft trains those of 16 or 32 bits")
    if reason := architecture.difference(model, config):
        raise UsageError(f"weights {weights!r} {reason}")
    return LlamaForCausalLM.from_pretrained(weights, config=config, attn_implementation=attention, dtype=dtype)


def inputs(batch: Batch, *, flash: bool, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the model's forward pass: int64 tensors [micro_batch, seq_len] on `device`.

    Where position ids restart at 0, transformers assumes a new sample and, without an attention mask, masks attention
    between samples itself. With `flash` there is one row [1, micro_batch · seq_len] and its boundaries, as
    FlashAttention expects; otherwise it would compute them in every layer, and wait for the GPU each time.
    """
    import torch

    shape = (1, -1) if flash else batch.input_ids.shape

    def on_device(array: np.ndarray) -> torch.Tensor:
        # Embedding and loss take 64-bit indices.
        return torch.from_numpy(array.reshape(shape)).to(device, torch.int64, non_blocking=True)

    arguments: dict[str, Any] = {
        "input_ids": on_device(batch.input_ids),
        "labels": on_device(batch.labels),
        "position_ids": on_device(batch.position_ids),
        "use_cache": False,
    }
    if flash:
        bounds = batch.bounds
        longest = int((bounds[1:] - bounds[:-1]).max())
        on_gpu = torch.from_numpy(bounds).to(device, non_blocking=True)
        arguments |= {"cu_seq_lens_q": on_gpu, "cu_seq_lens_k": on_gpu}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
    return arguments
