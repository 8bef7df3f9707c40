"""Folders of weights in Hugging Face's layout: what in one of them would stop the ranks that load it.

Only headers are read, with the standard library, so that agents look on their node as the controller does on its own.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Generator, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

# As transformers looks for them: the first that is there is loaded.
_SAFETENSORS, _SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_LFS = b"version https://git-lfs.github.com/spec/"
_PICKLE = b"\x80\x02"  # how torch.save began before it wrote archives
# The tensors of a Llama, of each layer and others; those of the bare model lack the first word "model".
_LAYER = re.compile(r"layers\.(\d+)\.")
_OF_LAYER = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_METADATA = "__metadata__"  # the key of a header that is no tensor
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
_FLOATS = ("F64", "F32", "F16", "BF16")
# Files that say how weights were quantised, beside config.json's own section.
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_SECTIONS = ("quantization_config", "compression_config")
# Other layouts, and what they are.
_OTHERS = {
    "*.gguf": "GGUF, of llama.cpp",
    "consolidated*.pth": "Meta's own layout",
    "adapter_model.*": "an adapter, not the model itself",
    "*.index": "TensorFlow's",
    "tf_model.h5": "TensorFlow's",
    "flax_model.msgpack": "Flax's",
}


def is_path(given: str) -> bool:
    """Whether `given` names a folder rather than weights on the hub, which are called OWNER/NAME or NAME."""
    return given.startswith(("/", ".", "~")) or given.count("/") > 1 or given.endswith("/")


def fault(folder: Path) -> str | None:
    """What is wrong with the weights in `folder` in one line, as the end of a sentence about them; None for nothing."""
    try:
        return next(_faults(folder), None)
    except OSError as error:
        return f"cannot be read: {error.filename or folder}: {(error.strerror or str(error)).lower()}"


def parameters(folder: Path) -> int:
    """How many numbers the weights in `folder` have, which have no fault. Raises OSError.

    A file of torch.save does not say so in a header: its bytes are taken for numbers of 16 bits.
    """
    indices = (folder / _SAFETENSORS_INDEX, folder / _TORCH_INDEX)
    if (folder / _SAFETENSORS).exists():
        files = [folder / _SAFETENSORS]
    elif indices[0].exists():
        files = [folder / name for name in sorted({*json.loads(indices[0].read_text())["weight_map"].values()})]
    elif (folder / _TORCH).exists():
        return (folder / _TORCH).stat().st_size // 2
    else:
        shards = {*json.loads(indices[1].read_text())["weight_map"].values()}
        return sum((folder / name).stat().st_size for name in shards) // 2
    return sum(prod(entry["shape"]) for file in files for entry in _header(file).values())


def _header(file: Path) -> dict[str, Any]:
    """The tensors in the header of a file of safetensors without a fault."""
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: entry for name, entry in header.items() if name != _METADATA}


def _faults(folder: Path) -> Iterator[str]:
    if not folder.exists():
        yield "are not there: there is no such folder"
    elif not folder.is_dir():
        yield "are one file: give the folder that has config.json and the weights"
    else:
        config = yield from _json(folder / "config.json")
        if not isinstance(config, Mapping):
            return
        yield from _quantisation(folder, config)
        yield from _tensors(folder)
        yield from _lacking(folder, config)


def _json(file: Path) -> Generator[str, None, dict[str, Any] | None]:
    """Yield what is wrong with a JSON object's file; returns the object."""
    if not file.exists():
        yield f"have no {file.name}"
        return None
    if is_pointer(file):
        yield _pointer(file)
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        yield f"have a {file.name} that is not JSON: {error}"
        return None
    if not isinstance(value, dict):
        yield f"have a {file.name} that is not a JSON object"
        return None
    return value


def is_pointer(file: Path) -> bool:
    """Whether Git LFS has left its pointer in place of `file`. Raises OSError where it cannot be read."""
    with open(file, "rb") as opened:
        return opened.read(len(_LFS)) == _LFS


def _pointer(file: Path) -> str:
    return f"are not all there: {file.name} is a Git LFS pointer; run `git lfs pull` in that folder"


def _quantisation(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    for section in _SECTIONS:
        if (found := config.get(section)) is not None:
            yield f"are quantised ({_method(found)}): test sft trains those of 16 or 32 bits"
    for name in _QUANTISED:
        if (folder / name).exists():
            yield f"are quantised ({name}): test sft trains those of 16 or 32 bits"


def _method(section: Any) -> str:
    if not isinstance(section, Mapping):
        return "quantization_config"
    bits = [f"{n} bits" for n in (8, 4) if section.get(f"load_in_{n}bit")]
    bits += [f"{section['bits']} bits"] if "bits" in section else []
    return ", ".join([str(section.get("quant_method", "quantization_config")), *bits])


def _lacking(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Which tensors of a Llama are not there: ranks would start them from random numbers, without a word."""
    count, names = config.get("num_hidden_layers"), _names(folder)
    if config.get("model_type") != "llama" or not isinstance(count, int) or names is None:
        return
    there = {name.removeprefix("model.") for name in names}
    layers = {int(match[1]) for name in there if (match := _LAYER.match(name))}
    if lacking := sorted(set(range(count)) - layers):
        which = f"layer {lacking[0]}" + (f" and {len(lacking) - 1} more of {count}" if len(lacking) > 1 else "")
        called = "" if layers else f"; one that is there is called {min(names)}"
        yield f"are not all there: no tensor of {which}, which config.json says there are{called}"
    needed = [f"layers.{layer}.{name}" for layer in range(count) for name in _OF_LAYER] + ["norm.weight"]
    ends = ["embed_tokens.weight", "lm_head.weight"]
    needed += [] if config.get("tie_word_embeddings") and there & {*ends} else ends
    if missing := [name for name in needed if name not in there]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield f"are not all there: no tensor {missing[0]}{more}, which a Llama has"


def _names(folder: Path) -> set[str] | None:
    """The names of the tensors; None where only torch could read them. The files have no fault."""
    if (folder / _SAFETENSORS).exists():
        return {*_header(folder / _SAFETENSORS)}
    index = next((folder / name for name in (_SAFETENSORS_INDEX, _TORCH_INDEX) if (folder / name).exists()), None)
    return {*json.loads(index.read_text())["weight_map"]} if index and not (folder / _TORCH).exists() else None


def _tensors(folder: Path) -> Iterator[str]:
    if (folder / _SAFETENSORS).exists() or (folder / _SAFETENSORS).is_symlink():
        yield from _safetensors(folder / _SAFETENSORS)
    elif (folder / _SAFETENSORS_INDEX).exists():
        yield from _shards(folder, _SAFETENSORS_INDEX)
    elif (folder / _TORCH).exists() or (folder / _TORCH).is_symlink():
        yield from _archive(folder / _TORCH)
    elif (folder / _TORCH_INDEX).exists():
        yield from _shards(folder, _TORCH_INDEX)
    else:
        found = next((kind for pattern, kind in _OTHERS.items() if any(folder.glob(pattern))), None)
        shards = sorted(folder.glob("*-of-*.safetensors")) + sorted(folder.glob("*-of-*.bin"))
        if shards:
            yield f"have shards and no index ({_SAFETENSORS_INDEX}): copy it as well"
        other = f"; what is there is {found}" if found else ""
        yield f"are none: the folder has neither {_SAFETENSORS} nor {_SAFETENSORS_INDEX}, nor {_TORCH}{other}"


def _shards(folder: Path, index: str) -> Iterator[str]:
    value = yield from _json(folder / index)
    if value is None:
        return
    where = value.get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        yield f"have an {index} without a weight_map"
        return
    names: dict[str, set[str]] = {}
    for tensor, shard in where.items():
        names.setdefault(shard, set()).add(tensor)
    missing = [shard for shard in sorted(names) if not (folder / shard).exists()]
    if missing:
        more = f" and {len(missing) - 1} more of {len(names)} shards" if len(missing) > 1 else ""
        yield f"are not all there: {missing[0]}{more} missing, which {index} names"
    for shard in sorted(names):
        if shard.endswith(".safetensors"):
            yield from _safetensors(folder / shard, names[shard])
        else:
            yield from _archive(folder / shard)


def _safetensors(file: Path, expected: set[str] | None = None) -> Iterator[str]:
    """What is wrong with a file of safetensors: an 8-byte length, a JSON header of that length, then the tensors."""
    if not file.exists():  # such as a link into a cache that was cleared
        yield f"are not all there: {file.name} is a link to {os.readlink(file)}, which is missing"
        return
    if is_pointer(file):
        yield _pointer(file)
        return
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header_bytes = opened.read(length) if length <= min(_MAX_HEADER, max(0, size - 8)) else None
    if size < 8 or (header_bytes is None and length <= _MAX_HEADER):
        yield f"are not all there: {file.name} has {size} bytes and ends in its header; copy it again"
        return
    try:
        header = json.loads(header_bytes or b"")
        tensors = {name: entry for name, entry in header.items() if name != _METADATA}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        kinds = {str(entry["dtype"]): name for name, entry in tensors.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        yield f"are damaged: {file.name} has no header of safetensors"
        return
    if not tensors:
        yield f"are none: {file.name} has no tensor"
    if hollow := next((name for name, entry in tensors.items() if 0 in entry.get("shape", ())), None):
        yield f"are not all there: {hollow} in {file.name} is empty, as if ZeRO-3 had not gathered it to be saved"
    if size != end:
        more = "copy it again" if size < end else "it has been appended to"
        yield f"are not all there: {file.name} has {size} bytes, its header says {end}; {more}"
    if odd := next((kind for kind in kinds if kind not in _FLOATS), None):
        yield f"are quantised ({kinds[odd]} in {file.name} is {odd}): test sft trains those of 16 or 32 bits"
    if expected is not None and (lacking := expected - tensors.keys()):
        yield f"are not all there: {file.name} lacks {min(lacking)}, which the index says it has"


def _archive(file: Path) -> Iterator[str]:
    """What is wrong with a file of torch.save: an archive, whose directory comes last, or a pickle."""
    if not file.exists():
        yield f"are not all there: {file.name} is a link to {os.readlink(file)}, which is missing"
        return
    if is_pointer(file):
        yield _pointer(file)
        return
    with open(file, "rb") as opened:
        start = opened.read(4)
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(file):
            yield f"are not all there: {file.name} has {file.stat().st_size} bytes and no end; copy it again"
    elif not start.startswith(_PICKLE):
        yield f"are damaged: {file.name} is no file of torch.save"
