"""The model of test `sft`, the inputs of its forward pass, and its loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runner.errors import UsageError
from runner.workloads import architecture
from runner.workloads.data import IGNORED
from runner.workloads.sft import versions
from runner.workloads.sft.data import Batch

if TYPE_CHECKING:
    import numpy as np
    import torch


def build_model(
    model: Mapping[str, Any], *, attention: str, dtype: torch.dtype, weights: str | None = None, seed: int = 0
) -> Any:
    """A LlamaForCausalLM with the architecture `model` of configs/models/.

    Its weights are random, given by `seed`, or those of `weights`, a Hugging Face id or path. `attention` is
    transformers' `attn_implementation`.

    Under ZeRO-3 (an HfDeepSpeedConfig is alive) each parameter is divided among the ranks as soon as it
    exists, so no rank ever holds the whole model.

    Raises UsageError when `weights` cannot be read or are not of this architecture.
    """
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    if weights is None:
        known = inspect.signature(LlamaConfig.__init__).parameters
        config = LlamaConfig(**architecture.arguments(model, known))
        with versions.without_weights():
            built = LlamaForCausalLM._from_config(config, attn_implementation=attention, **versions.dtype(dtype))
        built.tie_weights()  # which transformers 5 does as it draws them
        _fill(built, seed)
        return built
    try:
        config = LlamaConfig.from_pretrained(weights)
    except OSError as error:
        raise UsageError(f"cannot read weights {weights!r}: {str(error).splitlines()[0]}") from error
    if config.model_type != "llama":
        raise UsageError(f"weights {weights!r} are of type {config.model_type!r}, test sft trains Llama architectures")
    versions.read_rope(config)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"weights {weights!r} are quantised: test sft trains those of 16 or 32 bits")
    if reason := architecture.difference(model, config):
        raise UsageError(f"weights {weights!r} {reason}")
    return LlamaForCausalLM.from_pretrained(
        weights, config=config, attn_implementation=attention, **versions.dtype(dtype)
    )


def _fill(model: Any, seed: int) -> None:
    """Give every weight of `model` its random start: the same with every version, world size and type.

    transformers 4 leaves what ZeRO-3 has divided as torch's layers make it, with embeddings 50 times too large. torch
    2.13 draws other bfloat16 numbers than 2.10, but the same in float32.
    """
    import torch

    for number, weight in enumerate(model.parameters()):
        with _whole(weight) as writes, torch.no_grad():
            if not writes:
                continue
            if weight.dim() == 1:  # of a norm
                weight.fill_(1.0)
                continue
            # The generator of a CPU has 32 bits of seed; the factor keeps neighbouring seeds from sharing weights.
            generator = torch.Generator(weight.device).manual_seed((seed * 0x9E3779B1 + number) % (1 << 32))
            values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            weight.copy_(values.normal_(0.0, model.config.initializer_range, generator=generator))


@contextmanager
def _whole(weight: torch.nn.Parameter) -> Iterator[bool]:
    """A context with all of `weight`, which ZeRO-3 may have divided among ranks: whether this rank writes it."""
    if not hasattr(weight, "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        yield deepspeed.comm.get_rank() == 0


def inputs(batch: Batch, *, flat: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of the model's forward pass: int64 tensors [micro_batch, seq_len] on `device`.

    Attention does not cross samples. For a `flat` kind of `attention` there is one row [1, micro_batch · seq_len] with
    the boundaries of its samples and a bound of their lengths, under transformers' names for them. Otherwise there is a
    mask to add to the scores, of the model's `dtype` [micro_batch, 1, seq_len, seq_len]: transformers finds the samples
    in the position ids only with a recent torch, and without a word takes a row for one sample with another.
    """
    import torch

    arguments: dict[str, Any] = {
        "input_ids": _on_device(batch.input_ids, flat, device),
        "position_ids": _on_device(batch.position_ids, flat, device),
        "use_cache": False,
    }
    if flat:
        arguments["cu_seq_lens_q"] = torch.from_numpy(batch.bounds).to(device, non_blocking=True)
        arguments["max_length_q"] = batch.longest
    else:
        sample = (arguments["position_ids"] == 0).cumsum(1)
        visible = (sample[:, :, None] == sample[:, None, :]).tril()
        # Not -inf: kernels that take a row piece by piece subtract the largest score of a piece.
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)
        arguments["attention_mask"] = mask[:, None]
    return arguments


def labels(batch: Batch, *, flat: bool, device: torch.device) -> torch.Tensor:
    """The labels of `inputs`, in the same shape; IGNORED where a token does not count in the loss."""
    return _on_device(batch.labels, flat, device)


def token_loss(logits: torch.Tensor, labels: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropy of each next token, divided by `divisor`; [] in float32.

    `logits` [rows, tokens, vocabulary] predict `labels` [rows, tokens], which are shifted here. Not transformers' own:
    its divisor has changed from version to version, and to begin with there was none.
    """
    import torch
    from torch.nn import functional

    # Labels are shifted, not logits, of which that would be a copy.
    following = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    total: torch.Tensor = functional.cross_entropy(
        logits.flatten(0, 1).to(torch.float32), following.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / divisor


def _on_device(array: np.ndarray, flat: bool, device: torch.device) -> torch.Tensor:
    import torch

    # Embedding and loss take 64-bit indices.
    row = array.reshape((1, -1) if flat else array.shape)
    return torch.from_numpy(row).to(device, torch.int64, non_blocking=True)
