"""Data for verl's trainers, from whatever rows a user has: Parquet in verl's two schemas, cached by content.

    messages    messages: list of {role, content}                       fine-tuning: turns of the assistant are learnt
    prompts     data_source, prompt: list of {role, content}, ability,
                reward_model: {style, ground_truth}, extra_info         PPO and GRPO: what the model answers is judged

Rows may be in either schema, of GSM8K's shape (question, answer), or Alpaca's (instruction, input, output). Files of
Parquet that are in the schema already keep their further columns. Every row is checked before anything is written.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from runner.errors import InfrastructureError, UsageError, disk_kind
from runner.system import manifest
from runner.system.manifest import Manifest
from runner.workloads.data import arithmetic, hub, rows
from runner.workloads.data.sources import ALIASES

FORMAT = 1  # increase it when the same rows give other files: it is part of the cache key
TRAIN, VAL = "train", "val"
TRAIN_FILE, VAL_FILE = (f"{name}.parquet" for name in (TRAIN, VAL))
ARITHMETIC = "arithmetic"  # the name of the built-in set
# At a fixed commit, so that runs of different months train on the same rows.
_NAMES = {**ALIASES, "gsm8k": "openai/gsm8k@e53f048856ff4f594e959d75785d2c2d37b678ee"}
_CONFIGURATIONS = {"openai/gsm8k": "main"}  # of a data set that has several
_INSTEAD = f"give a local file or folder, or use {ARITHMETIC!r}"
_VALIDATION = re.compile(r"(validation|valid|val|eval|dev|test)(?![a-z])")  # how names of files begin

GSM8K = "openai/gsm8k"
# What verl's own reward function judges: of each data source the answers to it.
JUDGED = (
    GSM8K, "lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500",
    "math_dapo", "math", "math_dapo_reasoning",
    *(f"numina_{name}" for name in
      ("aops_forum", "synthetic_math", "amc_aime", "synthetic_amc", "cn_k12", "olympiads")),
    "codecontests", "apps", "codeforces", "taco", "hiyouga/geometry3k",
    *(f"searchR1_{name}" for name in
      ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")),
)  # fmt: skip
JUDGED_PREFIX = "aime"
# Asks for the form that verl's reward function for GSM8K reads; the questions of the built-in set go without.
ASK_FOR_RESULT = ' Let\'s think step by step and output the final answer after "####".'
_RESULT = "####"
_NUMBER = re.compile(r"-?[0-9.]+")  # of what that function reads, after it has taken out commas

_ROLES = ("system", "user", "assistant", "tool")
_NEEDS = "it needs messages, prompt with reward_model, question and answer, or instruction and output"


class Schema(StrEnum):
    """One of verl's schemas, by the column that makes it one."""

    MESSAGES = "messages"
    PROMPTS = "prompts"


# The fields that are read for each, and those that a table has which is in the schema already.
_SHAPES = ("question", "answer", "instruction", "input", "output")
_FIELDS = {
    Schema.MESSAGES: ("messages", *_SHAPES, "prompt", "extra_info"),
    Schema.PROMPTS: ("prompt", "data_source", "ability", "reward_model", "messages", *_SHAPES),
}
_COLUMNS = {Schema.MESSAGES: ("messages",), Schema.PROMPTS: ("prompt", "data_source", "reward_model")}


@dataclass(frozen=True)
class Part:
    """One file or split of a source: `read(fields)` yields (where, row); `file` is the path of a file."""

    read: Callable[[Sequence[str]], Iterable[tuple[str, Any]]]
    file: Path | None = None


@dataclass(frozen=True)
class Source:
    """A source of rows: its name, the digest of its content, and the function that returns its parts by `TRAIN`, `VAL`.

    `suffix` is added to questions of GSM8K's shape; `here` says that it can be read without the hub.
    """

    name: str
    digest: str
    parts: Callable[[], Mapping[str, Sequence[Part]]]
    suffix: str = ASK_FOR_RESULT
    here: bool = True


@dataclass(frozen=True)
class DataSet:
    """A prepared folder with `train.parquet`, perhaps `val.parquet`, and its manifest.

    The manifest's `about` has source, schema, the numbers of rows, and one question.
    """

    path: Path
    manifest: Manifest

    @property
    def train(self) -> Path:
        """The rows to train on."""
        return self.path / TRAIN_FILE

    @property
    def val(self) -> Path | None:
        """The rows for validation; None where the source has none."""
        return self.path / VAL_FILE if VAL_FILE in {file.path for file in self.manifest.files} else None


# ---- sources ----


def open_source(source: str, samples: int = 512, seed: int = 0, contact: bool = True) -> Source:
    """Open a source: `arithmetic`, `gsm8k`, `alpaca`, a file, a folder of files, or a hub id, better `id@commit`.

    A folder's files whose names begin with `val`, `test` and the like are for validation. `samples` and `seed` are the
    built-in set's. Without `contact` the hub is not asked which commit a revision is: the digest is then open.

    Raises UsageError for a source that is none, InfrastructureError for a hub that does not answer.
    """
    if source == ARITHMETIC:
        arithmetic.require(samples)
        digest = f"{ARITHMETIC} {arithmetic.VERSION} {samples} {seed}"
        return Source(ARITHMETIC, digest, lambda: _arithmetic(samples, seed), "")
    if os.path.exists(source):
        files = rows.files(Path(source))
        return Source(source, rows.digest(files), lambda: _of_files(files))
    source = _NAMES.get(source, source)
    if Path(source).suffix in rows.SUFFIXES or not hub.ID.fullmatch(source):
        raise UsageError(f"data {source!r}: neither a file or folder nor a hub id; {_INSTEAD}")
    repo, commit = hub.pinned("data set", source, _INSTEAD) if contact else (source.partition("@")[::2])
    return Source(repo, f"hub {repo} {commit}", lambda: _of_hub(repo, commit), here=False)


def _arithmetic(samples: int, seed: int) -> dict[str, list[Part]]:
    """An eighth of the rows, which no question of the others repeats, is for validation."""
    every = [(f"row {number}", row) for number, row in enumerate(arithmetic.generate(samples, seed), 1)]
    first = samples - samples // 8
    return {name: [_of_rows(part)] for name, part in ((TRAIN, every[:first]), (VAL, every[first:])) if part}


def _of_rows(every: Sequence[tuple[str, Any]]) -> Part:
    return Part(lambda fields: every)


def _of_files(files: Sequence[Path]) -> dict[str, list[Part]]:
    val = [file for file in files if _VALIDATION.match(file.name.lower())]
    train = [file for file in files if file not in val]
    if not train:  # it is what there is
        train, val = val, []
    parts = {TRAIN: train, VAL: val}
    return {name: [_of_file(file) for file in each] for name, each in parts.items() if each}


def _of_file(file: Path) -> Part:
    return Part(lambda fields: rows.of_file(file, fields), file)


def _of_hub(repo: str, commit: str) -> dict[str, list[Part]]:
    hub.ask("data set", repo, commit, _INSTEAD)
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(repo, _CONFIGURATIONS.get(repo), revision=commit)
    except Exception as error:
        raise hub.error_of("data set", repo, error, _INSTEAD) from error
    if TRAIN not in found:
        raise UsageError(f"data set {repo!r} has no split {TRAIN}, but {', '.join(found)}; {_INSTEAD}")
    splits = {TRAIN: TRAIN, VAL: next((name for name in ("validation", "test") if name in found), None)}
    return {name: [_of_split(found[split], repo)] for name, split in splits.items() if split}


def _of_split(split: Any, repo: str) -> Part:
    return Part(lambda fields: rows.of_hub(split, repo, fields))


# ---- the cache ----


def key(source: Source, schema: Schema, rewarded: bool) -> str:
    """The name of the folder of a source in this schema, by content; `rewarded` as in `prepare`."""
    parts = json.dumps([FORMAT, source.digest, source.suffix, schema, rewarded])
    return f"{schema}-{hashlib.sha256(parts.encode()).hexdigest()[:24]}"


def cached(source: Source, schema: Schema, cache: Path, rewarded: bool = False) -> DataSet | None:
    """What `prepare` has made of this already; None where it has not, or it is not complete."""
    folder = cache / key(source, schema, rewarded)
    found = manifest.complete(folder)
    return DataSet(folder, found) if found else None


def check(source: Source, schema: Schema, rewarded: bool = False) -> tuple[str, dict[str, int | None]]:
    """The question, and by name the rows of the files that `prepare` would make of a source, which are checked.

    Of the hub's, which is not contacted, the question is "" and rows are None. Raises UsageError as `prepare`.
    """
    if not source.here:
        return "", dict.fromkeys((TRAIN_FILE, *((VAL_FILE,) if source.name in _CONFIGURATIONS else ())))
    question = ""
    rows: dict[str, int | None] = {}
    for name, parts in source.parts().items():
        made = _convert(parts, schema, source, name, rewarded, None)
        question = question or _question(made[0])
        rows[f"{name}.parquet"] = len(made)
    return question, rows


def prepare(
    source: Source,
    schema: Schema,
    cache: Path,
    rewarded: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataSet:
    """Convert a source into `schema` below the folder `cache`, or return what is there of the same content.

    `rewarded` says that a file of the user's judges answers: then any data source and ground truth will do.
    `on_progress` is called with (rows checked, rows in total).

    Raises UsageError naming the first row that does not fit, InfrastructureError for a disk that cannot be written.
    """
    folder = cache / key(source, schema, rewarded)

    def build(temporary: Path) -> dict[str, Any]:
        counts: dict[str, Any] = {}
        for name, parts in source.parts().items():
            made = _convert(parts, schema, source, name, rewarded, on_progress)
            counts.setdefault("question", _question(made[0]))
            counts[f"{name}_rows"] = len(made)
            _write(temporary / f"{name}.parquet", made, parts, schema)
        return {"source": source.name, "schema": str(schema), **counts}

    try:
        return DataSet(folder, manifest.made(folder, build)[0])
    except OSError as error:
        reason = error.strerror or error
        raise InfrastructureError(f"cannot prepare data in {cache}: {reason}", disk_kind(error)) from error


def _convert(
    parts: Sequence[Part],
    schema: Schema,
    source: Source,
    split: str,
    rewarded: bool,
    on_progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    read = [row for part in parts for row in part.read(_FIELDS[schema])]
    made = []
    for number, (where, row) in enumerate(read):
        if not isinstance(row, dict):
            raise UsageError(f"{where} is a {type(row).__name__}; it must be an object")
        if schema is Schema.MESSAGES:
            made.append({"messages": _messages(row, where, source.suffix)})
        else:
            made.append(_prompt(row, where, source, rewarded) | {"extra_info": {"split": split, "index": number}})
        if on_progress is not None and (number + 1) % 500 == 0:
            on_progress(number + 1, len(read))
    return made


def _question(row: Mapping[str, Any]) -> str:
    """The last thing that a user says before the first answer in a converted row."""
    asked = ""
    for message in row.get("messages") or row["prompt"]:
        if message["role"] == "assistant":
            break
        asked = message["content"]
    return asked


# ---- files ----


def _write(path: Path, made: list[dict[str, Any]], parts: Sequence[Part], schema: Schema) -> None:
    """Write converted rows; but what is in the schema already keeps its further columns."""
    import pyarrow.parquet

    tables = [_kept(part, schema) for part in parts]
    if all(table is not None for table in tables):
        try:
            table = pyarrow.concat_tables(tables, promote_options="permissive")
        except pyarrow.ArrowException as error:
            names = ", ".join(str(part.file) for part in parts)
            raise UsageError(f"{names}: columns of different types: {hub.first_line(error)}") from error
    else:
        table = pyarrow.Table.from_pylist(made, schema=_arrow(schema))
    # verl reads a file in one piece in every process: small groups of rows would serve nobody.
    pyarrow.parquet.write_table(table, path)


def _kept(part: Part, schema: Schema) -> Any:
    """The table of a file of Parquet that is in the schema; None for others."""
    import pyarrow.parquet

    if part.file is None or part.file.suffix != ".parquet":
        return None
    table = pyarrow.parquet.read_table(part.file)
    fits = all(name in table.column_names and not table.column(name).null_count for name in _COLUMNS[schema])
    return table if fits else None


def _arrow(schema: Schema) -> Any:
    """verl's schema as Arrow has it."""
    import pyarrow as pa

    text = pa.string()
    chat = pa.list_(pa.struct([("role", text), ("content", text)]))
    if schema is Schema.MESSAGES:
        return pa.schema([("messages", chat)])
    return pa.schema(
        [
            ("data_source", text),
            ("prompt", chat),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pa.struct([("split", text), ("index", pa.int64())])),
        ]
    )


# ---- one row ----


def _messages(row: Mapping[str, Any], where: str, suffix: str) -> list[dict[str, str]]:
    """A row as a chat that ends with, or has, an answer of the assistant."""
    if row.get("messages") is not None:
        chat = _chat(row["messages"], where, "messages")
        if not any(message["role"] == "assistant" for message in chat):
            raise UsageError(f"{where}: messages have no turn of the assistant, so there is nothing to learn")
        return chat
    if isinstance(row.get("prompt"), list):
        extra = row.get("extra_info")  # where verl's own conversion of GSM8K keeps the answer
        if not isinstance(extra, Mapping) or extra.get("answer") is None:
            raise UsageError(f"{where} has a prompt without an answer, for PPO and GRPO; fine-tuning needs messages")
        chat = _chat(row["prompt"], where, "prompt")
        return [*chat, {"role": "assistant", "content": _text(extra["answer"], where, "extra_info.answer")}]
    asked, answer = _asked(row, where, suffix)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _prompt(row: Mapping[str, Any], where: str, source: Source, rewarded: bool) -> dict[str, Any]:
    """A row as a prompt with what its answer is judged by."""
    if row.get("reward_model") is not None or (row.get("messages") is None and isinstance(row.get("prompt"), list)):
        return _given(row, where, rewarded)
    if row.get("messages") is not None:
        chat = _chat(row["messages"], where, "messages")
        last = next((n for n in reversed(range(len(chat))) if chat[n]["role"] == "assistant"), 0)
        if not last:
            raise UsageError(f"{where}: messages have no answer of the assistant to judge others by")
        prompt, answer = chat[:last], chat[last]["content"]
    else:
        asked, answer = _asked(row, where, source.suffix)
        prompt = [{"role": "user", "content": asked}]
    data_source, truth = GSM8K, _result(answer, where)
    if truth is None:
        if not rewarded:
            raise UsageError(
                f"{where}: the answer has no `{_RESULT} result`, which verl's own reward function judges by: give a "
                "file with compute_score (--reward), or data with reward_model.ground_truth"
            )
        data_source, truth = source.name, answer
    return {
        "data_source": data_source,
        "prompt": prompt,
        "ability": "math" if data_source == GSM8K else "general",
        "reward_model": {"style": "rule", "ground_truth": truth},
    }


def _given(row: Mapping[str, Any], where: str, rewarded: bool) -> dict[str, Any]:
    """A row that is in the schema already, checked."""
    chat = _chat(row.get("prompt"), where, "prompt")
    if chat[-1]["role"] == "assistant":
        raise UsageError(f"{where}: prompt ends with a turn of the assistant; it must end with what is asked")
    data_source = _text(row.get("data_source"), where, "data_source")
    model = row.get("reward_model")
    if not isinstance(model, Mapping) or model.get("ground_truth") is None:
        raise UsageError(f"{where}: reward_model has no ground_truth to judge answers by")
    truth = model["ground_truth"]
    if not rewarded:
        _judged(data_source, truth, where)
    return {
        "data_source": data_source,
        "prompt": chat,
        "ability": str(row.get("ability") or ""),
        "reward_model": {
            "style": str(model.get("style") or "rule"),
            "ground_truth": truth if isinstance(truth, str) else json.dumps(truth, default=str),
        },
    }


def _judged(data_source: str, truth: Any, where: str) -> None:
    """Refuse what verl's own reward function would not judge, or would never find right."""
    if data_source not in JUDGED and not data_source.startswith(JUDGED_PREFIX):
        near = difflib.get_close_matches(data_source, JUDGED, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? Else give" if near else "give"
        raise UsageError(
            f"{where}: data_source {data_source!r} is none that verl's own reward function judges; {hint} a file with "
            "compute_score (--reward)"
        )
    if data_source == GSM8K and (not isinstance(truth, str) or not _NUMBER.fullmatch(truth)):
        raise UsageError(f"{where}: ground_truth {truth!r} of {GSM8K} must be text, digits without commas or units")


def _asked(row: Mapping[str, Any], where: str, suffix: str) -> tuple[str, str]:
    """(question, answer) of a row of GSM8K's or Alpaca's shape."""
    if row.get("question") is not None and row.get("answer") is not None:
        question, answer = _text(row["question"], where, "question"), _text(row["answer"], where, "answer")
        return question + (suffix if _RESULT in answer else ""), answer
    if row.get("instruction") is None or row.get("output") is None:
        has = ", ".join(str(name) for name in row) or "(none)"
        raise UsageError(f"{where} has the fields {has}; {_NEEDS}")
    ask, answer = _text(row["instruction"], where, "instruction"), _text(row["output"], where, "output", empty=True)
    context = _text(row.get("input") or "", where, "input", empty=True)
    return f"{ask}\n\n{context}" if context else ask, answer


def _result(answer: str, where: str) -> str | None:
    """What is behind the last `####` of an answer, as verl's reward function for GSM8K compares it; None for none."""
    if _RESULT not in answer:
        return None
    said = answer.rsplit(_RESULT, 1)[1].strip()
    result = said.replace(",", "").replace("$", "")
    if not _NUMBER.fullmatch(result):
        raise UsageError(f"{where}: the answer ends with `{_RESULT} {said[:40]}`, which is no number")
    return result


def _chat(messages: Any, where: str, name: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UsageError(f"{where}: {name} must be a list of objects with role and content")
    if not messages:
        raise UsageError(f"{where}: {name} is empty; it needs at least one message")
    chat = []
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in _ROLES:
            raise UsageError(f"{where}: message {number} of {name} has the role {role!r}; use {', '.join(_ROLES)}")
        if role == "system" and number > 1:
            raise UsageError(f"{where}: message {number} of {name} is the system's; only the first may be")
        text = _text(message.get("content"), where, f"the content of message {number} of {name}", role == "assistant")
        chat.append({"role": role, "content": text})
    return chat


def _text(value: Any, where: str, name: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} is {'missing' if value is None else type(value).__name__}; it must be text")
    if not empty and not value.strip():
        raise UsageError(f"{where}: {name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UsageError(f"{where}: {name} has a character that is not Unicode at position {error.start}") from error
    return value
