"""Sources of training data: rows as prompts and responses, and the tokenizer that encodes them.

Rows have Alpaca's `instruction`, `input` and `output`, or chat `messages`; they come from the built-in
set, from JSON, JSON-lines or Parquet files, or from the Hugging Face hub. An error in a file is one line
with the file, the row and the reason.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.workloads.data import hub, instructions, rows

BUILTIN_VOCAB_SIZE = 2048
# Alpaca at a fixed commit, so that results of different months train on the same rows.
ALIASES = {"alpaca": "tatsu-lab/alpaca@dce01c9b08f87459cf36a430d809084718273017"}

# The prompt templates of Stanford Alpaca.
_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_ASK = "### Instruction:\n{}\n\n"
_INPUT = "### Input:\n{}\n\n"
_ANSWER = "### Response:"
TEMPLATE = (_PREAMBLE, _PREAMBLE_INPUT, _ASK, _INPUT, _ANSWER)

_FIELDS = ("messages", "instruction", "input", "output")

# One sample: (text, whether it is a response and so in the loss), in order.
Sample = list[tuple[str, bool]]


@dataclass(frozen=True)
class Content:
    """Content with a digest for the cache key; `load` reads it only when the cache has no result for it."""

    digest: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Tokens:
    """A tokenizer and the ids of its special tokens; `bos` is None for a tokenizer without it."""

    tokenizer: Any  # tokenizers.Tokenizer
    eos: int
    pad: int
    bos: int | None = None


# ---- sources ----


def open_source(source: str, samples: int, seed: int) -> Content:
    """Open a source of `workloads.data.prepare`; its `load` returns a list of samples.

    `samples` and `seed` apply to "builtin" only. Raises UsageError for an unknown or unreadable source, and
    InfrastructureError for a hub that does not answer; so does `load`, for invalid rows too.
    """
    if source == "builtin":
        return Content(
            f"builtin {instructions.VERSION} {samples} {seed}",
            lambda: [_builtin_sample(row) for row in instructions.generate(samples, seed)],
        )
    source = ALIASES.get(source, source)
    path = Path(source)
    if os.path.exists(source):  # unlike Path.exists, False for an invalid file name
        files = rows.files(path)
        return Content(rows.digest(files), lambda: [s for file in files for s in _samples_of_file(file)])
    if path.suffix in rows.SUFFIXES or not hub.ID.fullmatch(source):
        raise UsageError(
            f"data source {source!r}: neither a file or folder nor a hub id; give one, 'alpaca' or 'builtin'"
        )
    repo, commit = hub.pinned("data set", source)
    return Content(f"hub {repo} {commit}", lambda: _samples_of_hub(repo, commit))


def _samples_of_file(file: Path) -> list[Sample]:
    return [_sample(row, where) for where, row in rows.of_file(file, _FIELDS)]


def _samples_of_hub(repo: str, commit: str) -> list[Sample]:
    hub.ask("data set", repo, commit)
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(repo, revision=commit, split="train")
    except Exception as error:
        raise hub.error_of("data set", repo, error) from error
    return [_sample(row, where) for where, row in rows.of_hub(found, repo, _FIELDS)]


def _sample(row: Any, where: str) -> Sample:
    """The prompts and responses of one row; `where` names the row in errors. Raises UsageError."""
    if not isinstance(row, dict):
        raise UsageError(f"{where} is a {type(row).__name__}; it must be an object")
    if row.get("messages") is not None:
        return _chat(row["messages"], where)
    if "instruction" not in row or "output" not in row:
        raise UsageError(
            f"{where} has the fields {', '.join(map(str, row)) or '(none)'}; "
            "it needs instruction and output (input is optional), or messages"
        )
    ask, context, answer = (_string(row.get(name), where, name) for name in ("instruction", "input", "output"))
    if not ask.strip():
        raise UsageError(f"{where} has an empty instruction")
    return [((_PREAMBLE_INPUT if context else _PREAMBLE) + _prompt(ask, context), False), (answer, True)]


def _builtin_sample(row: instructions.Row) -> Sample:
    """A built-in row without Alpaca's preamble, which would be half of a short sample."""
    return [(_prompt(row["instruction"], row["input"]), False), (row["output"], True)]


def _prompt(ask: str, context: str = "") -> str:
    return _ASK.format(ask) + (_INPUT.format(context) if context else "") + _ANSWER


def _chat(messages: Any, where: str) -> Sample:
    """A chat with Alpaca's headings, for any number of turns; a system message replaces Alpaca's preamble."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UsageError(f"{where}: messages must be a list of objects with role and content")
    sample: Sample = []
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), _string(message.get("content"), where, f"message {number}'s content")
        if role == "assistant":
            sample.append((content, True))
        elif role == "user":
            lead = "\n\n" if sample and sample[-1][1] else ""
            sample.append((lead + _prompt(content), False))
        elif role == "system":
            sample.append((content + "\n\n", False))
        else:
            raise UsageError(f"{where}: message {number} has the role {role!r}; use system, user or assistant")
    if not any(in_loss for _, in_loss in sample):
        raise UsageError(f"{where}: messages have no turn of the assistant, so there is nothing to learn")
    return sample


def _string(value: Any, where: str, name: str) -> str:
    if value is None and name == "input":
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} is {'missing' if value is None else type(value).__name__}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UsageError(f"{where}: {name} has a character that is not Unicode at position {error.start}") from error
    return value


# ---- tokenizers ----


def open_tokenizer(tokenizer: str | None) -> Content:
    """Open a Hugging Face folder or id, or the built-in tokenizer (None or "builtin"); its `load` returns `Tokens`.

    Raises UsageError for an unknown or incomplete tokenizer, InfrastructureError for a hub that does not answer; so
    does `load`.
    """
    if tokenizer is None or tokenizer == "builtin":
        return Content(f"builtin {instructions.VERSION} {BUILTIN_VOCAB_SIZE}", _builtin_tokens)
    folder = Path(tokenizer)
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        names = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
        files = sorted({file for name in names for file in folder.glob(name) if file.is_file()})
        if not files:
            raise UsageError(
                f"tokenizer {tokenizer!r}: the folder has no tokenizer.json; give one that has, or a hub id"
            )
        return Content(rows.digest(files), lambda: _huggingface_tokens(str(folder)))
    if not hub.ID.fullmatch(tokenizer):
        raise UsageError(f"tokenizer {tokenizer!r}: neither a folder nor a hub id; give one, or 'builtin'")
    repo, commit = hub.pinned("tokenizer", tokenizer)
    return Content(f"hub {repo} {commit}", lambda: _huggingface_tokens(repo, commit))


@functools.cache
def _builtin_tokens() -> Tokens:
    """A byte-level BPE trained on fixed rows, so that every seed and length uses the same vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # single digits: arithmetic is learnable, and the vocabulary is not spent on numbers
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BUILTIN_VOCAB_SIZE,
        special_tokens=["<|pad|>", "<|eos|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for row in instructions.generate(4096, seed=0) for text, _ in _builtin_sample(row))
    tokenizer.train_from_iterator(texts, trainer)
    return Tokens(tokenizer, pad=0, eos=1)


def _huggingface_tokens(name: str, commit: str | None = None) -> Tokens:
    """The tokenizer of a hub id at `commit`, or of a folder (`commit` None)."""
    if commit:
        hub.ask("tokenizer", name, commit)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, revision=commit or "main")
    except Exception as error:
        raise hub.error_of("tokenizer", name, error) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or loaded.eos_token_id is None:
        lacks = "an end-of-sequence token" if backend is not None else "a tokenizer.json"
        raise UsageError(f"tokenizer {name!r} lacks {lacks}; use another, or 'builtin'")
    backend.no_truncation()
    backend.no_padding()
    pad = loaded.eos_token_id if loaded.pad_token_id is None else loaded.pad_token_id
    return Tokens(backend, eos=loaded.eos_token_id, pad=pad, bos=loaded.bos_token_id)
