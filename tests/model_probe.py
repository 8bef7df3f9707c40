"""What the model of `sft` computes with the transformers and torch that run this file, for comparing versions.

    python tests/model_probe.py CHECKPOINTS DATA ANSWER

CHECKPOINTS is a folder with checkpoints of MODELS, DATA one of `ranks.write_packed_data`. ANSWER is an .npz with

    <attention>       float32 [3 · SEQ_LEN, VOCAB_SIZE], logits of three packed rows
    <attention>-loss  float32 [], their loss
    alone             as the logits, each sample by itself, with sdpa and without a mask
    <checkpoint>      float32 [SEQ_LEN, VOCAB_SIZE], logits with the weights of that checkpoint

It prints the version of transformers.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

import ranks
from runner.workloads.sft.attention import Attention, by_sample
from runner.workloads.sft.data import PackedData
from runner.workloads.sft.model import build_model, inputs, labels, token_loss

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
# Every way to give samples to transformers, by the name in ANSWER.
ATTENTION = {"flat": Attention("sdpa", "", by_sample), "sdpa": Attention("sdpa", ""), "eager": Attention("eager", "")}
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
        plain = build_model(MODEL, attention="sdpa", dtype=torch.float32, seed=5).eval()
        alone = [
            plain(input_ids=ids.reshape(-1)[begin:end][None], use_cache=False).logits[0]
            for begin, end in itertools.pairwise(batch.bounds)
        ]
        answer["alone"] = torch.cat(alone).numpy()
        for name, kind in ATTENTION.items():
            model = build_model(MODEL, attention=kind.register(), dtype=torch.float32, seed=5).eval()
            logits = model(**inputs(batch, flat=kind.flat, device=cpu, dtype=torch.float32)).logits
            loss = token_loss(logits, labels(batch, flat=kind.flat, device=cpu), divisor)
            answer[name] = logits.flatten(0, 1).numpy()
            answer[f"{name}-loss"] = loss.numpy()
        for folder in sorted(checkpoints.iterdir()):
            of = MODELS[folder.name]
            model = build_model(of, attention="sdpa", dtype=torch.float32, weights=str(folder)).eval()
            answer[folder.name] = model(input_ids=ids[:1], use_cache=False).logits[0].numpy()
    return answer


if __name__ == "__main__":
    import transformers
    from transformers import masking_utils

    # As transformers 4 does with torch before 2.6: it does not look for samples in the position ids.

    if hasattr(masking_utils, "_is_torch_greater_or_equal_than_2_6"):
        masking_utils._is_torch_greater_or_equal_than_2_6 = False
    checkpoints, data, answer = map(Path, sys.argv[1:])
    np.savez(answer, **probe(checkpoints, data))
    print(transformers.__version__)
