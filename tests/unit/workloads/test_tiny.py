"""The tiny Llama: always the same, whole by the product's own look at weights, and it spells the arithmetic set."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest

from runner.system import manifest
from runner.workloads import weights
from runner.workloads.data import arithmetic
from runner.workloads.rl import tiny

# Fixed forever: other weights need another VERSION, or caches keep the old ones.
WEIGHTS = (1, "e7bc840c62afba13c0abb3f773e7c37e0ff8f8b3f696000423f4964f18fda9c4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models"))[0]


def test_it_is_made_once_and_always_the_same(folder, tmp_path):
    again, made = tiny.make(tmp_path)
    assert (again.name, made) == (folder.name, manifest.read(folder))
    before = (folder / "config.json").stat().st_ino
    assert tiny.make(folder.parent) == (folder, made)
    assert (folder / "config.json").stat().st_ino == before
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (tiny.VERSION, digest) == WEIGHTS


def test_its_weights_are_those_of_a_whole_llama_in_one_file(folder):
    assert weights.fault(folder) is None
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as opened:  # another reader of the format than our own
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert 90_000 < sum(tensor.size for tensor in tensors.values()) < 120_000
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)
    assert (tensors["model.norm.weight"] == 1).all()
    matrix = tensors["model.layers.0.mlp.up_proj.weight"]
    assert abs(matrix.mean()) < 0.001 and 0.019 < matrix.std() < 0.021


def test_its_tokenizer_spells_every_row_and_ends_each_answer(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.get_vocab_size(), (
        "no token without a row in the embedding, nor one too many"
    )
    words = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad", "bos", "eos"):
        assert tokenizer.token_to_id(words[f"{name}_token"]) == config[f"{name}_token_id"]
    for row in arithmetic.generate(200, seed=9):  # also rows that it was not trained on
        text = f"{row['question']}\n{row['answer']} ü山"
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert len(tokenizer.encode(row["question"]).ids) <= 40 and len(tokenizer.encode(row["answer"]).ids) <= 64


def test_its_template_marks_who_speaks(folder):
    import jinja2

    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    chat = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
    words = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    render = jinja2.Environment().from_string(template).render
    assert render(messages=chat, **words) == "<|bos|><|user|>1 + 2?<|eos|><|assistant|>3<|eos|>"
    assert render(messages=chat[:1], add_generation_prompt=True, **words) == "<|bos|><|user|>1 + 2?<|eos|><|assistant|>"


def test_no_torch_is_needed(tmp_path):
    import subprocess

    code = (
        "import sys; from pathlib import Path; from runner.workloads.rl import tiny; tiny.make(Path(sys.argv[1])); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 0
