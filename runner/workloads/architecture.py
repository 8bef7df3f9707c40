"""The architecture of a model as transformers' LlamaConfig has it, and how that of weights differs.

transformers takes seconds to import: the controller compares in a process of its own (`python -m
runner.workloads.architecture`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.system import process

_TIMEOUT_S = 120.0
_ABSENT = "transformers is not installed"
# What of a configuration changes nothing in a training step, or is compared elsewhere. Every other field is compared.
IRRELEVANT = frozenset((
    "self", "kwargs",
    # how a model is called, labelled and stored
    "transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype",
    "torch_dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "name_or_path",
    # the tokenizer's, and of generation: training data have their own ids
    "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
    # of a random start; of how a product is split, not what it is
    "initializer_range", "pretraining_tp",
))  # fmt: skip


def arguments(model: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a LlamaConfig for `model` of configs/models/; `known` are the parameters of this version's."""
    scaling = model.get("rope_scaling")
    values = {
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["intermediate_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "vocab_size": model["vocab_size"],
        "tie_word_embeddings": model["tie_embeddings"],
        "max_position_embeddings": model["max_seq_len"],
        "rms_norm_eps": model["rms_norm_eps"],
    }
    if "rope_parameters" in known:
        rope = {"rope_type": "default", **(scaling or {}), "rope_theta": model["rope_theta"]}
        return {**values, "rope_parameters": rope}
    return {**values, "rope_theta": model["rope_theta"], "rope_scaling": scaling}


def difference(model: Mapping[str, Any], found: Any) -> str | None:
    """How the LlamaConfig `found` of weights differs from `model`, as the end of a sentence about them, else None."""
    kind = type(found)
    known = inspect.signature(kind.__init__).parameters
    expected = kind(**arguments(model, known))
    for field in known:
        if field in IRRELEVANT:
            continue
        has, wants = (_plain(getattr(config, field, None)) for config in (found, expected))
        if has != wants:
            shown = [json.dumps(value) if isinstance(value, dict) else value for value in (has, wants)]
            return f"have {field} {shown[0]}, model {model['name']} has {shown[1]}: choose the --model that matches"
    return None


def _plain(value: Any) -> Any:
    """A field as it is compared: a dictionary without what is not set, and with one name for the type of rope."""
    if not isinstance(value, Mapping):
        return value
    plain = {key: each for key, each in value.items() if each is not None}
    if "type" in plain:
        plain.setdefault("rope_type", plain.pop("type"))
    return plain


def refuse(weights: str, model: Mapping[str, Any]) -> None:
    """Raise UsageError where the folder `weights`, which is on this machine, has another architecture than `model`.

    Where the controller has no transformers, ranks compare.
    """
    request = json.dumps({"weights": str(Path(weights).absolute()), "model": dict(model)})
    argv = [sys.executable, "-P", "-m", "runner.workloads.architecture", request]
    outcome = process.run(argv, timeout_s=_TIMEOUT_S)
    if outcome.rc != 0 or not outcome.stdout.strip():
        raise UsageError(f"--weights {weights}: cannot be read: {outcome.last_line}", "weights_unusable")
    verdict = json.loads(outcome.stdout.splitlines()[-1])["verdict"]
    if verdict and verdict != _ABSENT:
        raise UsageError(f"--weights {weights}: they {verdict}", "weights_unusable")


def _verdict(weights: str, model: Mapping[str, Any]) -> str | None:
    try:
        from transformers.models.llama.configuration_llama import LlamaConfig
    except ImportError:
        return _ABSENT
    from runner.workloads.sft import versions

    raw = json.loads(Path(weights, "config.json").read_text())
    kind = raw.get("model_type")
    if kind != "llama":
        return f"are of type {kind!r}, test sft trains Llama architectures"
    try:
        found = LlamaConfig.from_pretrained(weights)
    except Exception as error:  # its own checks raise many types
        text = " ".join(str(error).split())
        return f"have a config.json that transformers does not read: {text}"
    versions.read_rope(found)
    return difference(model, found)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        told = _verdict(**json.loads(sys.argv[1]))
    print(json.dumps({"verdict": told}))
