"""What the model of `sft` computes with the transformers and torch that run this file, for comparing versions.

    python tests/model_probe.py CHECKPOINTS DATA ANSWER

CHECKPOINTS is a folder with checkpoints of MODELS, DATA one of `ranks.write_packed_data`. ANSWER is an .npz with

    <attention>        float32 [3 · SEQ_LEN, VOCAB_SIZE], logits of three packed rows
    <attention>-alone  the same, each sample by itself, with sdpa and without a mask
    <attention>-loss   float32 [], their loss
    <checkpoint>       float32 [SEQ_LEN, VOCAB_SIZE], logits with the weights of that checkpoint

It prints the version of transformers.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

import ranks
from runner.workloads.sft.data import PackedData
from runner.workloads.sft.model import build_model, inputs, labels, token_loss

if TYPE_CHECKING:
    import torch

MODEL = {
    "name": "test",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": ranks.VOCAB_SIZE,
    "max_seq_len": ranks.SEQ_LEN,
    "rope_theta": 500000.0,  # unlike transformers' default
    "rms_norm_eps": 1e-5,
    "tie_embeddings": False,
}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# The checkpoints, by the name of their folder.
MODELS = {
    "plain": MODEL,
    "scaled": {**MODEL, "rope_scaling": {**SCALING, "original_max_position_embeddings": 32}},
}


def probe(checkpoints: Path, data: Path) -> dict[str, np.ndarray]:
    """The arrays above, by name."""
    import torch

    cpu = torch.device("cpu")
    batch = PackedData(data).read(0, 3, seed=0)
    ids = torch.from_numpy(batch.input_ids).to(torch.int64)
    divisor = torch.tensor(float(batch.loss_tokens))
    answer = {}
    with torch.no_grad():
        for attention in ("sdpa", "eager", "flash_attention_2"):
            flash = attention == "flash_attention_2"
            model = build_model(MODEL, attention="sdpa" if flash else attention, dtype=torch.float32, seed=5).eval()
            alone = [
                model(input_ids=ids.reshape(-1)[begin:end][None], use_cache=False).logits[0]
                for begin, end in itertools.pairwise(batch.bounds)
            ]
            if flash:
                with_flash_attention(model)
            logits = model(**inputs(batch, flash=flash, device=cpu, dtype=torch.float32)).logits
            loss = token_loss(logits, labels(batch, flash=flash, device=cpu), divisor)
            answer[attention] = logits.flatten(0, 1).numpy()
            answer[f"{attention}-alone"] = torch.cat(alone).numpy()
            answer[f"{attention}-loss"] = loss.numpy()
        for folder in sorted(checkpoints.iterdir()):
            of = MODELS[folder.name]
            model = build_model(of, attention="sdpa", dtype=torch.float32, weights=str(folder)).eval()
            answer[folder.name] = model(input_ids=ids[:1], use_cache=False).logits[0].numpy()
    return answer


def with_flash_attention(model: Any) -> None:
    """Have `model` call flash-attn, for which a STAND-IN on CPUs is put in its place: sdpa between the boundaries."""
    from transformers import modeling_flash_attention_utils as flash

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func = package.flash_attn_with_kvcache = _without_boundaries
    package.flash_attn_varlen_func = _between_boundaries
    padding.pad_input = padding.unpad_input = _without_boundaries
    sys.modules |= {"flash_attn": package, "flash_attn.bert_padding": padding}
    flash.is_flash_attn_2_available = lambda: True
    model.config._attn_implementation_internal = "flash_attention_2"  # the setter looks for a GPU


def _without_boundaries(*_: Any, **__: Any) -> Any:
    raise AssertionError("attention over a whole packed row")


def _between_boundaries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **_: Any,
) -> torch.Tensor:
    """flash_attn_varlen_func on [tokens, heads, head_dim], for equal queries and keys."""
    import torch

    bounds = cu_seqlens_q.tolist()
    assert bounds == cu_seqlens_k.tolist() and causal and not dropout_p
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in itertools.pairwise(bounds))
    groups = q.shape[1] // k.shape[1]
    pieces = []
    for begin, end in itertools.pairwise(bounds):
        queries, keys, values = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        keys, values = (x.repeat_interleave(groups, dim=0) for x in (keys, values))
        piece = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=softmax_scale
        )
        pieces.append(piece.transpose(0, 1))
    return torch.cat(pieces)


if __name__ == "__main__":
    import transformers
    from transformers import masking_utils

    # As transformers 4 does with torch before 2.6: it does not look for samples in the position ids.

    if hasattr(masking_utils, "_is_torch_greater_or_equal_than_2_6"):
        masking_utils._is_torch_greater_or_equal_than_2_6 = False
    checkpoints, data, answer = map(Path, sys.argv[1:])
    np.savez(answer, **probe(checkpoints, data))
    print(transformers.__version__)
