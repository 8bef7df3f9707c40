"""Selective recompute: what a decoder layer keeps for its backward pass, and what it computes again.

Matrix products and attention cost nearly all of a layer's time, so their outputs are kept. What lies between them
(norms, rotary embeddings, the gated activation) takes a third as much memory again and costs little: it is computed
again, by kernels that are bound by memory, not by arithmetic. `cluster.limits.kept_bytes` counts what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from runner.errors import UsageError

# The products of a linear layer, in 16 and in 8 bits. `bmm` is not among them: eager attention computes its scores
# with it, of which there are tokens².
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm")


def selective(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a decoder layer, whose backward pass has the outputs of products and attention, and no others.

    Raises UsageError with a torch that cannot choose.
    """
    try:
        from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    except ImportError:
        raise UsageError("sft.recompute=selective needs torch 2.4 or newer: set sft.recompute=full") from None

    return partial(
        checkpoint,
        forward,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a layer is random
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    # torch's attention, torch_attn::_varlen_attn and the operations of flash-attn; under torch.compile an operation
    # may be a higher-order one, which has no overloads.
    name = str(operation.name() if callable(getattr(operation, "name", None)) else operation).partition(".")[0]
    costly = name in _PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
