"""Training data: instruction rows from a source, tokenised, packed into full sequences, cached by content.

`prepare` writes a folder that the `sft` workload reads through mmap:

    input_ids.npy     int32 [n_sequences, seq_len]
    labels.npy        int32 [n_sequences, seq_len]   the token itself, or -100 where it is not in the loss
    position_ids.npy  int32 [n_sequences, seq_len]   0 starts a segment; attention must not cross it
    n_tokens.npy      int32 [n_sequences]            real tokens of each sequence, padding excluded
    tokenizer.json, tokenizer_config.json            load with AutoTokenizer.from_pretrained(folder)
    manifest.json                                    counts and file sizes; written last

Only the response and its end-of-sequence token are in the loss. The padding at the end of a sequence
is a separate segment. The first token of a segment is never in the loss, so the usual shift by one
inside the model predicts nothing across samples.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import InfrastructureError, UsageError, disk_kind
from runner.system.folders import alone, replacing
from runner.workloads.data.pack import Progress, assemble, pack, tokenise
from runner.workloads.data.sources import TEMPLATE, Content, Tokens, open_source, open_tokenizer

SCHEMA = 1
FORMAT = 1  # increase it when the same input gives other arrays: it is part of the cache key


@dataclass(frozen=True)
class Prepared:
    """A prepared folder and its manifest."""

    path: Path
    manifest: dict[str, Any]


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/shakedown/data, or ~/.cache/shakedown/data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shakedown" / "data"


def prepare(
    source: str = "builtin",
    *,
    seq_len: int,
    tokenizer: str | None = None,
    cache_dir: Path,
    samples: int = 4096,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Prepared:
    """Tokenise and pack `source`, or return the cached result for the same content.

    source: "builtin", "alpaca", a .json/.jsonl/.parquet file or a folder of them, or a hub id, better
    `id@commit`. Rows hold Alpaca's `instruction`, `input`, `output`, or chat `messages`.
    tokenizer: a Hugging Face id or folder; None is the built-in byte-level BPE.
    seq_len: tokens in a sequence, at least 8.
    samples: the number of rows of `builtin`; other sources have their own number.
    seed: of the built-in rows, and of the order of the sequences.
    on_progress: called with (samples tokenised, samples in total).

    Raises UsageError for an invalid source or row, InfrastructureError for a hub that does not answer or a
    disk that cannot be written.
    """
    rows, vocabulary, key = resolve(source, seq_len, tokenizer, samples, seed)
    folder = cache_dir / key
    if found := cached(folder):
        return found
    try:
        with alone(folder):
            if found := cached(folder):  # prepared by another process while this one waited
                return found
            with replacing(folder) as temporary:
                manifest = {"schema": SCHEMA, "hash": key, "source": source, "tokenizer": tokenizer or "builtin"}
                manifest |= {"seq_len": seq_len, "seed": seed}
                manifest |= _build(temporary, rows, vocabulary, source, seq_len, seed, on_progress)
                if resolve(source, seq_len, tokenizer, samples, seed)[2] != key:
                    raise UsageError(f"data {source!r} changed while it was read; prepare it again")
                manifest["bytes"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise InfrastructureError(
            f"cannot prepare data in {cache_dir}: {reason}; free space or choose another --cache-dir", disk_kind(error)
        ) from error
    return Prepared(folder, manifest)


# ---- the cache ----


def resolve(source: str, seq_len: int, tokenizer: str | None, samples: int, seed: int) -> tuple[Content, Content, str]:
    """The source, the tokenizer, and the cache key of their result (also the name of its folder).

    Raises UsageError and InfrastructureError as `prepare`.
    """
    for name, value, least in (("seq-len", seq_len, 8), ("samples", samples, 1), ("seed", seed, 0)):
        if value < least:
            raise UsageError(f"data: {name} is {value}; give at least {least}")
    rows, vocabulary = open_source(source, samples, seed), open_tokenizer(tokenizer)
    parts = json.dumps([FORMAT, TEMPLATE, rows.digest, vocabulary.digest, seq_len, seed])
    return rows, vocabulary, hashlib.sha256(parts.encode()).hexdigest()[:32]


def cached(folder: Path) -> Prepared | None:
    """The prepared data in `folder`, None where it is incomplete: no valid manifest, or a file of another size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["schema"] != SCHEMA or manifest["hash"] != folder.name:
            return None
        if any((folder / name).stat().st_size != size for name, size in manifest["bytes"].items()):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return Prepared(folder, manifest)


# ---- from samples to arrays ----


def _build(
    folder: Path,
    rows: Content,
    vocabulary: Content,
    source: str,
    seq_len: int,
    seed: int,
    on_progress: Progress | None,
) -> dict[str, Any]:
    """Write all files except the manifest; return the manifest's counts."""
    import numpy as np

    samples, tokens = rows.load(), vocabulary.load()
    flat = tokenise(samples, tokens, seq_len, on_progress or (lambda done, total: None))
    if not len(flat.lengths):
        raise UsageError(f"data {source!r}: no sample has a response within {seq_len} tokens; give a longer --seq-len")
    bins = pack(flat.lengths, seq_len)
    n_sequences = int(bins.max()) + 1
    bins = np.random.default_rng(seed).permutation(n_sequences)[bins]
    assemble(folder, flat, bins, seq_len, tokens.pad)
    tokens.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(tokens), indent=1) + "\n")
    n_tokens = int(flat.lengths.sum())
    return {
        "vocab_size": tokens.tokenizer.get_vocab_size(),
        "pad_token_id": tokens.pad,
        "eos_token_id": tokens.eos,
        "bos_token_id": tokens.bos,
        "n_samples": len(flat.lengths),
        "n_truncated": flat.n_truncated,
        "n_dropped": flat.n_dropped,
        "n_sequences": n_sequences,
        "n_tokens": n_tokens,
        "n_loss_tokens": int(np.count_nonzero(flat.in_loss)),
        "packing_utilisation_pct": round(100 * n_tokens / (n_sequences * seq_len), 4),
    }


def _tokenizer_config(tokens: Tokens) -> dict[str, Any]:
    names = {"eos_token": tokens.eos, "pad_token": tokens.pad, "bos_token": tokens.bos}
    special = {name: tokens.tokenizer.id_to_token(i) for name, i in names.items() if i is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **special}
