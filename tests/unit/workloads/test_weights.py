"""--weights: what could not be loaded, or is another architecture, is one line before a node is used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from runner.errors import UsageError
from runner.launch import prepare
from runner.node import check
from runner.node.requests import CheckRequest
from runner.plan import config
from runner.workloads import architecture, weights

TINY = config.load_model("tiny").model_dump()
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2200119864\n"
LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip


def folder(path: Path, **changes: object) -> Path:
    """A good folder of one file, with `changes` to its config.json."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({k: v for k, v in {**LLAMA, **changes}.items() if v != "absent"}))
    save_file(tensors(int(changes.get("num_hidden_layers", 4))), path / "model.safetensors")
    return path


def tensors(layers: int) -> dict[str, np.ndarray]:
    """Every tensor of a Llama with tied embeddings, small."""
    parts = [*(f"self_attn.{one}_proj" for one in "qkvo"), *(f"mlp.{one}_proj" for one in ("gate", "up", "down"))]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = [f"layers.{layer}.{part}" for layer in range(layers) for part in parts] + ["norm", "embed_tokens"]
    return {f"model.{name}.weight": np.ones(8, np.float16) for name in names}


def renamed(pattern: str, other: str):
    """Weights whose tensors are called otherwise; of "" none is left."""

    def spoil(path: Path) -> None:
        names = {name: re.sub(pattern, other, name) for name in tensors(4)}
        save_file(
            {names[name]: value for name, value in tensors(4).items() if names[name]},
            path / "model.safetensors",
            {"format": "pt"},
        )

    return spoil


def hollow(path: Path) -> None:
    save_file({name: np.ones((0,), np.float16) for name in tensors(4)}, path / "model.safetensors")


def sharded(path: Path) -> Path:
    """A good folder of two shards."""
    folder(path)
    (path / "model.safetensors").unlink()
    where = {}
    for number in (1, 2):
        shard = f"model-0000{number}-of-00002.safetensors"
        part = {name: value for n, (name, value) in enumerate(tensors(4).items()) if n % 2 == number - 1}
        save_file(part, path / shard)
        where |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def torch_file(path: Path) -> None:
    (path / "model.safetensors").unlink()
    with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)


def replaced(name: str, content: str | bytes = LFS):
    def spoil(path: Path) -> None:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def half_archive(path: Path) -> None:
    torch_file(path)
    cut(path / "pytorch_model.bin", 500)


def quantised(path: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.qweight": np.ones(4, np.int32)}, path / "model.safetensors")


def gguf(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model-q4.gguf").write_bytes(b"GGUF")


SPOILT = {
    "a pointer for the weights": (folder, replaced("model.safetensors"), "model.safetensors is a Git LFS pointer; run `git lfs pull`"),
    "a pointer for config.json": (folder, replaced("config.json"), "config.json is a Git LFS pointer"),
    "a pointer for a shard": (sharded, replaced("model-00002-of-00002.safetensors"), "00002.safetensors is a Git LFS pointer"),
    "a pointer for the index": (sharded, replaced("model.safetensors.index.json"), "index.json is a Git LFS pointer"),
    "a pointer for torch's file": (folder, lambda p: (torch_file(p), replaced("pytorch_model.bin")(p)), "is a Git LFS pointer"),
    "half a file": (folder, lambda p: cut(p / "model.safetensors", -20), "bytes, its header says"),
    "a file that ends in its header": (folder, lambda p: cut(p / "model.safetensors", 20), "20 bytes and ends in its header"),
    "an empty file": (folder, replaced("model.safetensors", b""), "has 0 bytes and ends in its header"),
    "half a shard": (sharded, lambda p: cut(p / "model-00001-of-00002.safetensors", -20), "bytes, its header says"),
    "half an archive": (folder, half_archive, "pytorch_model.bin has 500 bytes and no end"),
    "a page of HTML": (folder, replaced("model.safetensors", "<!DOCTYPE html><html>"), "model.safetensors has no header of safetensors"),
    "a missing shard": (sharded, lambda p: (p / "model-00001-of-00002.safetensors").unlink(), "00001-of-00002.safetensors missing"),
    "a shard of another download": (sharded, lambda p: save_file({"x": np.ones(1)}, p / "model-00002-of-00002.safetensors"), "lacks model.embed_tokens.weight"),
    "shards without their index": (sharded, lambda p: (p / "model.safetensors.index.json").unlink(), "have shards and no index"),
    "no weights": (folder, lambda p: (p / "model.safetensors").unlink(), "are none: the folder has neither model.safetensors"),
    "a link to nowhere": (folder, lambda p: ((p / "model.safetensors").unlink(), (p / "model.safetensors").symlink_to("../blobs/x")), "is a link to ../blobs/x"),
    "GGUF": (folder, gguf, "what is there is GGUF"),
    "no config.json": (folder, lambda p: (p / "config.json").unlink(), "have no config.json"),
    "half a config.json": (folder, replaced("config.json", '{"model_type": '), "config.json that is not JSON"),
    "bitsandbytes": (lambda p: folder(p, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), lambda p: None, "are quantised (bitsandbytes, 4 bits)"),
    "gptq": (lambda p: folder(p, quantization_config={"quant_method": "gptq", "bits": 4}), lambda p: None, "are quantised (gptq, 4 bits)"),
    "awq": (lambda p: folder(p, quantization_config={"quant_method": "awq", "bits": 4}), lambda p: None, "are quantised (awq, 4 bits)"),
    "fp8": (lambda p: folder(p, quantization_config={"quant_method": "fp8"}), lambda p: None, "are quantised (fp8)"),
    "a part of the layers": (folder, lambda p: save_file(tensors(2), p / "model.safetensors"), "no tensor of layer 2 and 1 more of 4"),
    "an adapter's names": (folder, renamed("^", "base_model.model."), "no tensor of layer 0 and 3 more of 4, which config.json says there are; one that is there is called base_model.model.model"),
    "torch.compile's names": (folder, renamed("^", "_orig_mod."), "no tensor of layer 0 and 3 more of 4"),
    "DataParallel's names": (folder, renamed("^", "module."), "no tensor of layer 0 and 3 more of 4"),
    "fused projections": (folder, renamed("[qkv]_proj", "qkv_proj"), "no tensor layers.0.self_attn.q_proj.weight and 11 more"),
    "no embeddings": (folder, renamed(".*embed_tokens.*", ""), "no tensor embed_tokens.weight and 1 more"),
    "no head": (lambda p: folder(p, tie_word_embeddings=False), lambda p: None, "no tensor lm_head.weight, which a Llama has"),
    "what ZeRO-3 saves ungathered": (folder, hollow, "in model.safetensors is empty, as if ZeRO-3 had not gathered it"),
    "an older gptq": (folder, replaced("quantize_config.json", "{}"), "are quantised (quantize_config.json)"),
    "nothing but the tensors says it": (folder, quantised, "qweight in model.safetensors is I32"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_weights_that_ranks_could_not_load_are_refused_in_one_line(tmp_path, name):
    make, spoil, told = SPOILT[name]
    path = make(tmp_path / "w")
    spoil(path)
    assert told in (weights.fault(path) or "")
    with pytest.raises(UsageError) as error:
        prepare._judge_weights(str(path), TINY, remote=False)
    assert error.value.kind == "weights_unusable" and "\n" not in str(error.value)


def bare(path: Path) -> Path:
    """As `LlamaModel` saves itself, which transformers loads as well."""
    renamed("^model.", "")(folder(path))
    return path


@pytest.mark.parametrize("make", [folder, sharded, bare, lambda path: (torch_file(folder(path)), path)[1]])
def test_good_weights_have_no_fault(tmp_path, make):
    assert weights.fault(make(tmp_path / "w")) is None


def test_a_name_on_the_hub_is_not_a_folder_here_and_a_path_is(tmp_path):
    for name in ("some-org/some-model", "gpt2"):
        prepare._judge_weights(name, TINY, remote=False)
    with pytest.raises(UsageError, match=r"there is no such folder"):
        prepare._judge_weights(str(tmp_path / "gone"), TINY, remote=False)
    prepare._judge_weights(str(tmp_path / "on the nodes"), TINY, remote=True)


def test_a_node_says_what_is_wrong_with_its_own_copy(tmp_path):
    (folder(tmp_path / "w") / "model.safetensors").unlink()
    asked = CheckRequest("0", str(tmp_path / "scratch"), 0.0, weights=str(tmp_path / "w"))
    answer = check.check(asked)
    told = dict(zip(answer.kinds, answer.problems, strict=True))
    assert told["weights_unusable"].startswith(f"--weights {tmp_path}/w: they are none: the folder has neither")


# One process for all cases: transformers takes seconds to import.
COMPARE = """
import contextlib, json, sys
from runner.workloads import architecture
with contextlib.redirect_stdout(sys.stderr):
    told = [architecture._verdict(*case) for case in json.load(sys.stdin)]
print(json.dumps(told))
"""
OTHER = {
    "head_dim": ({"head_dim": 64}, "have head_dim 64, model tiny has 32"),
    "attention_bias": ({"attention_bias": True}, "have attention_bias True, model tiny has False"),
    "mlp_bias": ({"mlp_bias": True}, "have mlp_bias True"),
    "hidden_act": ({"hidden_act": "gelu"}, "have hidden_act gelu, model tiny has silu"),
    "the base of rope": ({"rope_theta": 500000.0}, "500000"),
    "the scaling of rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "llama 3's scaling": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, "llama3"),
    "the maximum length": ({"max_position_embeddings": 4096}, "have max_position_embeddings 4096, model tiny has 2048"),
    "tied embeddings": ({"tie_word_embeddings": False}, "have tie_word_embeddings False"),
    "the norm's epsilon": ({"rms_norm_eps": 1e-6}, "have rms_norm_eps 1e-06"),
    "dropout": ({"attention_dropout": 0.1}, "have attention_dropout 0.1"),
    "layers": ({"num_hidden_layers": 8}, "have num_hidden_layers 8"),
    "heads of keys": ({"num_key_value_heads": 4}, "have num_key_value_heads 4"),
    "another family": ({"model_type": "mistral"}, "are of type 'mistral'"),
}  # fmt: skip
SAME = {
    "itself": {},
    "a tokenizer's ids": {"bos_token_id": 128000, "eos_token_id": [128001, 128009], "pad_token_id": 0},
    "how it was stored": {"torch_dtype": "bfloat16", "transformers_version": "4.31.0", "_name_or_path": "/x"},
    "head_dim as it follows": {"head_dim": 32},
    "no scaling": {"rope_scaling": None, "use_cache": False, "initializer_range": 0.01, "pretraining_tp": 2},
}


# As its config.json is published.
LLAMA_3 = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "rope_theta": 500000.0, "hidden_act": "silu",
    "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "bos_token_id": 128000,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> dict[str, str | None]:
    cases = {name: changes for name, (changes, _) in OTHER.items()} | SAME
    root = tmp_path_factory.mktemp("weights")
    asked = [(str(folder(root / str(n), **changes)), TINY) for n, changes in enumerate(cases.values())]
    cases["Llama 3.2 1B"] = {}
    asked.append((str(folder(root / "llama", **LLAMA_3)), config.load_model("llama-3.2-1b").model_dump()))
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPARE], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", OTHER)
def test_every_field_that_changes_the_computation_is_compared(compared, name):
    assert OTHER[name][1] in (compared[name] or "")


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_computation_is_not_compared(compared, name):
    assert compared[name] is None


class NewerConfig:
    """Stands in for the LlamaConfig of a newer transformers, with one more field."""

    def __init__(self, *, hidden_size, attention_sinks=0, use_cache=True, rope_parameters=None, **others):
        self.hidden_size, self.attention_sinks, self.use_cache = hidden_size, attention_sinks, use_cache


def test_a_field_that_a_newer_transformers_adds_is_compared_as_well():
    found = NewerConfig(hidden_size=128, attention_sinks=4, use_cache=False)
    assert architecture.difference(TINY, found) == (
        "have attention_sinks 4, model tiny has 0: choose the --model that matches"
    )
    assert architecture.difference(TINY, NewerConfig(hidden_size=128, use_cache=False)) is None


def test_real_weights_of_the_shipped_llama_3_fit(compared):
    assert compared["Llama 3.2 1B"] is None


def test_the_controller_refuses_another_architecture_before_a_node_is_used(tmp_path):
    """A process of its own, which takes seconds: it imports transformers."""
    with pytest.raises(
        UsageError, match=r"--weights .*: they have mlp_bias True, model tiny has False: choose the --mo"
    ):
        prepare._judge_weights(str(folder(tmp_path / "w", mlp_bias=True)), TINY, remote=False)
