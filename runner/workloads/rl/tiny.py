"""A tiny Llama with a tokenizer of its own, for machines without access to a hub: some 100,000 parameters.

It learns the form of the arithmetic set in seconds on a CPU, and shows that a cluster trains. Its weights are seeded
random numbers, written without torch, so that the controller makes it in a moment and always the same.
"""

from __future__ import annotations

import array
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from runner.system import manifest
from runner.system.manifest import Manifest
from runner.workloads.data import arithmetic

VERSION = 1  # increase it with any change below: it is part of the name of the folder
NAME = "tiny-llama"
_SPREAD = 0.02  # standard deviation of the weights, as transformers starts a Llama
_MOST_TOKENS = 512  # the rows have fewer
_SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
_PAD, _BOS, _EOS = range(3)
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": _SPREAD,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "pad_token_id": _PAD,
    "bos_token_id": _BOS,
    "eos_token_id": _EOS,
}
# Each message between its role and the end of sequence, at which an answer ends as well.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make(cache: Path) -> tuple[Path, Manifest]:
    """The folder of the model below `cache`, and its manifest; made unless it is there. Raises OSError."""
    return place(cache), manifest.made(place(cache), _build)[0]


def place(cache: Path) -> Path:
    """The folder of the model below `cache`, whether it is there or not."""
    import tokenizers

    key = json.dumps([VERSION, arithmetic.VERSION, tokenizers.__version__])
    return cache / f"{NAME}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _build(folder: Path) -> dict[str, Any]:
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = tokenizer.get_vocab_size()
    special = {"pad_token": _SPECIAL[_PAD], "bos_token": _SPECIAL[_BOS], "eos_token": _SPECIAL[_EOS]}
    length = _CONFIG["max_position_embeddings"]
    generation = {key: value for key, value in _CONFIG.items() if key.endswith("_token_id")}
    files = {
        "config.json": {**_CONFIG, "vocab_size": tokens},
        "generation_config.json": generation,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "model_max_length": length,
            "chat_template": _TEMPLATE,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(_weights(tokens))
    return {"model": NAME, "tokens": tokens}


def _tokenizer() -> Any:
    """A byte-level BPE trained on rows of the arithmetic set, with single digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MOST_TOKENS,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = arithmetic.generate(1024, seed=0)
    tokenizer.train_from_iterator((f"{row['question']}\n{row['answer']}" for row in rows), trainer)
    return tokenizer


def _shapes(tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama with tied embeddings: name and shape."""
    hidden, inner = _CONFIG["hidden_size"], _CONFIG["intermediate_size"]
    keys = _CONFIG["num_key_value_heads"] * _CONFIG["head_dim"]
    yield "model.embed_tokens.weight", (tokens, hidden)
    for layer in range(_CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def _weights(tokens: int) -> bytes:
    """A file of safetensors: the length of its header, the header, and the tensors; matrices random, norms one."""
    rng = random.Random(VERSION)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in _shapes(tokens):
        size = prod(shape)
        values = array.array("f", (rng.gauss(0.0, _SPREAD) for _ in range(size)) if len(shape) > 1 else [1.0] * size)
        if sys.byteorder == "big":
            values.byteswap()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * size]}
        data += values.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(data)
