"""Sources of training data: rows as prompts and responses, and the tokenizer that encodes them.

Rows have Alpaca's `instruction`, `input` and `output`, or chat `messages`; they come from the built-in
set, from JSON, JSON-lines or Parquet files, or from the Hugging Face hub. An error in a file is one line
with the file, the row and the reason.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.errors import InfrastructureError, RunnerError, UsageError
from runner.workloads.data import instructions
from runner.workloads.weights import is_pointer

BUILTIN_VOCAB_SIZE = 2048
SUFFIXES = (".json", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
# Alpaca at a fixed commit, so that results of different months train on the same rows.
_ALIASES = {"alpaca": "tatsu-lab/alpaca@dce01c9b08f87459cf36a430d809084718273017"}

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

# The fields that are read, of a row and of a message. Others may hold anything, even what Python has no value for.
_FIELDS = ("messages", "instruction", "input", "output")
_MESSAGE_FIELDS = ("role", "content")

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
    source = _ALIASES.get(source, source)
    path = Path(source)
    if os.path.exists(source):  # unlike Path.exists, False for an invalid file name
        files = _files(path)
        return Content(_digest(files), lambda: [s for file in files for s in _samples_of_file(file)])
    if path.suffix in SUFFIXES or not _HUB_ID.fullmatch(source):
        raise UsageError(
            f"data source {source!r}: neither a file or folder nor a hub id; give one, 'alpaca' or 'builtin'"
        )
    repo, commit = _pinned("data set", source)
    return Content(f"hub {repo} {commit}", lambda: _samples_of_hub(repo, commit))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise UsageError(f"{path}: data files end in {', '.join(SUFFIXES)}; rename or convert it")
        return [path]
    try:
        # Hidden files are other programs': macOS leaves a ._NAME beside each file on foreign disks.
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        files = sorted(file for file in visible if file.suffix in SUFFIXES and file.is_file())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if not files:
        raise UsageError(f"{path}: the folder has no {', '.join(SUFFIXES)} file")
    return files


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 of the suffixes and contents of `files`; their names do not affect the result."""
    total = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as opened:
                total.update(file.suffix.encode() + hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    return total.hexdigest()


def _samples_of_file(file: Path) -> list[Sample]:
    if is_pointer(file):
        raise UsageError(f"{file}: a Git LFS pointer, not the data: run `git lfs pull` there")
    read = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[file.suffix]
    samples = [_sample(row, f"{file}: {where}") for where, row in read(file)]
    if not samples:
        raise UsageError(f"{file}: no rows; give at least one")
    return samples


def _text(file: Path) -> str:
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{file}: line {line} is not UTF-8 (byte {error.start}); convert the file") from error


def _json(text: str) -> Any:
    """The value of a JSON text. An integer with more digits than Python converts is read as a float."""

    def integer(digits: str) -> float:
        try:
            return int(digits)
        except ValueError:
            return float(digits)

    return json.loads(text, parse_int=integer)


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    text = _text(file)
    if not text.strip():
        return
    try:
        rows = _json(text)
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if it has one object a line" if error.msg == "Extra data" else ""
        raise UsageError(f"{file}: line {error.lineno} is not JSON: {error.msg}{hint}") from error
    except RecursionError as error:
        raise UsageError(f"{file}: nested too deeply to be rows of data") from error
    if not isinstance(rows, list):
        raise UsageError(f"{file}: contains one {type(rows).__name__}; a .json file must be one array of rows")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    # not splitlines(): it also splits at U+2028 and others, which JSON allows inside strings
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", _json(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UsageError(f"{file}: line {number} is not JSON: {reason}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            table = opened.read(columns=[name for name in _FIELDS if name in names])
    except Exception as error:  # the library raises many types
        raise UsageError(f"{file}: not readable as Parquet: {_first_line(error)}") from error
    yield from _rows(table, names, str(file))


def _rows(
    table: Any, names: Iterable[str], source: str, decode: Callable[[str, Any], Any] = lambda _, value: value
) -> Iterator[tuple[str, Any]]:
    """The rows of an Arrow table of _FIELDS; of its other columns, `names`, only that they are there.

    `decode` takes a column's name and a value to the value that is meant.
    """
    unread, read = dict.fromkeys(names), [name for name in _FIELDS if name in table.column_names]
    for number in range(table.num_rows):
        where = f"row {number + 1}"
        row: dict[str, Any] = {}
        for name in read:
            try:
                row[name] = decode(name, _value(table.column(name)[number]))
            except Exception as error:  # the library raises many types
                raise UsageError(f"{source}: {where}: {name} cannot be read: {_first_line(error)}") from error
            if row.get("messages") is not None:  # then nothing else of the row is used
                break
        yield where, {**unread, **row}


def _value(scalar: Any) -> Any:
    """The Python value of an Arrow scalar; of a list of messages only the fields that are read."""
    import pyarrow

    kind = getattr(scalar.type, "value_type", None)
    if kind is None or not pyarrow.types.is_struct(kind) or not scalar.is_valid:
        return scalar.as_py()
    fields = [field.name for field in kind if field.name in _MESSAGE_FIELDS]
    messages = scalar.values
    columns = {name: messages.field(name).to_pylist() for name in fields}
    return [
        {name: columns[name][number] for name in fields} if messages[number].is_valid else None
        for number in range(len(messages))
    ]


def _samples_of_hub(repo: str, commit: str) -> list[Sample]:
    _ask_hub("data set", repo, commit)
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(repo, revision=commit, split="train")
    except Exception as error:
        raise _hub_error("data set", repo, error) from error
    return [_sample(row, f"{repo}: {where}") for where, row in _hub_rows(rows, repo)]


def _hub_rows(rows: Any, repo: str) -> Iterator[tuple[str, Any]]:
    """The rows of a `datasets.Dataset`, of which nothing else is decoded than what is read."""
    import datasets

    names = [name for name in _FIELDS if name in rows.column_names]
    if not names:
        yield "row 1", dict.fromkeys(rows.column_names)
        return
    features = datasets.Features({name: _of_messages(rows.features[name]) for name in names})
    table = rows.select_columns(names).with_format("arrow")[:]
    yield from _rows(table, rows.column_names, repo, lambda name, value: features.decode_example({name: value})[name])


def _of_messages(feature: Any) -> Any:
    """A column's feature in `datasets`; of a list of messages only the fields that are read."""
    fields = getattr(feature, "feature", None)
    if not isinstance(fields, dict):
        return feature
    return replace(feature, feature={name: fields[name] for name in fields if name in _MESSAGE_FIELDS})


def _pinned(kind: str, source: str) -> tuple[str, str]:
    """The repository and commit of `id` or `id@revision`; queries the hub unless the revision is a full commit."""
    repo, _, revision = source.partition("@")
    return repo, revision if _COMMIT.fullmatch(revision) else _ask_hub(kind, repo, revision or None)


def _ask_hub(kind: str, repo: str, revision: str | None) -> str:
    """The commit of a revision, by one request: without a network, the loaders would retry for a minute."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE and revision and _COMMIT.fullmatch(revision):
        return revision  # the loaders find it in their own cache, or report that it is missing
    try:
        ask = HfApi().dataset_info if kind == "data set" else HfApi().model_info
        return str(ask(repo, revision=revision, timeout=20).sha)
    except Exception as error:
        raise _hub_error(kind, repo, error) from error


def _hub_error(kind: str, repo: str, error: Exception) -> RunnerError:
    """InfrastructureError where the hub did not answer, else UsageError; the hub's libraries raise many types."""
    instead = "give a local file or folder, or use 'builtin'"
    link: BaseException | None = error
    while link is not None:
        # by name: the HTTP library that is used, and its types, differ between releases
        if re.search("Connect|Timeout|Offline|LocalEntryNotFound", type(link).__name__):
            return InfrastructureError(f"{kind} {repo!r}: the Hugging Face hub does not answer; {instead}")
        link = link.__cause__ or link.__context__
    return UsageError(f"{kind} {repo!r}: {_first_line(error)}; {instead}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;")


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
        return Content(_digest(files), lambda: _huggingface_tokens(str(folder)))
    if not _HUB_ID.fullmatch(tokenizer):
        raise UsageError(f"tokenizer {tokenizer!r}: neither a folder nor a hub id; give one, or 'builtin'")
    repo, commit = _pinned("tokenizer", tokenizer)
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
    rows = instructions.generate(4096, seed=0)
    texts = (text for row in rows for text, _ in _builtin_sample(row))
    tokenizer.train_from_iterator(texts, trainer)
    return Tokens(tokenizer, pad=0, eos=1)


def _huggingface_tokens(name: str, commit: str | None = None) -> Tokens:
    """The tokenizer of a hub id at `commit`, or of a folder (`commit` None)."""
    if commit:
        _ask_hub("tokenizer", name, commit)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, revision=commit or "main")
    except Exception as error:
        raise _hub_error("tokenizer", name, error) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or loaded.eos_token_id is None:
        lacks = "an end-of-sequence token" if backend is not None else "a tokenizer.json"
        raise UsageError(f"tokenizer {name!r} lacks {lacks}; use another, or 'builtin'")
    backend.no_truncation()
    backend.no_padding()
    pad = loaded.eos_token_id if loaded.pad_token_id is None else loaded.pad_token_id
    return Tokens(backend, eos=loaded.eos_token_id, pad=pad, bos=loaded.bos_token_id)
