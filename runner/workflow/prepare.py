"""Everything that a workflow needs, found or fetched before anything is submitted: model, data, reward, disk space.

What is missing or does not fit is reported all at once. What nodes do not see is copied to where they do, whole and
checked; every checksum is in a manifest.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from runner.errors import InfrastructureError, RunnerError, UsageError, disk_kind, os_error_text
from runner.system import manifest
from runner.system.manifest import Manifest
from runner.system.wording import are, counted, size_text
from runner.workflow import models, publish
from runner.workflow.models import Model
from runner.workflow.progress import Progress, told
from runner.workflow.stages import ENVIRONMENT, MODEL, RL_DATA, SFT_DATA, Program, stages_of
from runner.workloads import weights
from runner.workloads.data import verl as data
from runner.workloads.data.verl import DataSet, Schema

SCHEMAS: Mapping[str, Schema] = {SFT_DATA: Schema.MESSAGES, RL_DATA: Schema.PROMPTS}
PLACED = "inputs"  # the folder in `Asked.work` of what is copied there
# Bytes for each parameter: a checkpoint has weights in 16 and in 32 bits and Adam's two moments, a model has 16 bits.
CHECKPOINT_BYTES, MODEL_BYTES = 16, 2
# Checkpoints that a program writes each time: PPO those of actor and critic.
CHECKPOINTS: Mapping[Program, int] = {Program.SFT: 1, Program.PPO: 2, Program.GRPO: 1}
REWARD = "compute_score"
MARGIN = 64  # tokens for what a chat template adds to a sample
# Expressions that make nothing that can be called; a name or a call may make anything.
_VALUES = (
    ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp, ast.Compare, ast.UnaryOp,
)  # fmt: skip
_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")  # verl names them in its call


@dataclass(frozen=True)
class Asked:
    """What a workflow is asked for, as far as it has to be found or fetched.

    `profile` is the environment's name, `lock` its lock file on this machine. `model` is a name, a folder or a hub id
    (None: the tiny Llama), `data` and `rl_data` are files, folders, hub ids or `gsm8k` (None: the arithmetic set;
    `rl_data` None: as `data`). `reward` is a file with `compute_score`, `publish` a target of `workflow.publish`.

    `work` is a folder that all nodes see, in which what they need is placed; what lies in one of the folders `seen`,
    which all nodes see as this machine does, stays where it is: `(Path("/"),)` where ranks run on this machine. `cache`
    is for what can be made again. `saves` is how many checkpoints a stage keeps, `max_tokens` how long a sample of
    fine-tuning may be (None: verl cuts longer ones).
    """

    workflow: str
    profile: str
    lock: Path
    work: Path
    cache: Path
    model: str | None = None
    data: str | None = None
    rl_data: str | None = None
    reward: Path | None = None
    publish: str | None = None
    seen: tuple[Path, ...] = ()
    seed: int = 0
    samples: int = 512
    saves: int = 1
    max_tokens: int | None = None


@dataclass(frozen=True)
class Files:
    """A data set in one of verl's schemas: files of Parquet; `val` None: it has no part for validation.

    `rows` are those to train on, None: not known yet.
    """

    train: Path
    val: Path | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Prepared:
    """What was found: paths as all nodes see them.

    `data` is by artefact (`stages.SFT_DATA`, `stages.RL_DATA`), `checksums` by artefact what `stages.inputs` takes as
    `prepared`. `reward_sha256` belongs to the settings of the stage that uses it. `question` is one of the data, to be
    asked of a trained model; `parameters` are the model's; `notes` are lines for the user, such as the licence.
    """

    model: Path
    data: Mapping[str, Files]
    checksums: Mapping[str, str]
    question: str
    parameters: int
    reward: Path | None = None
    reward_sha256: str | None = None
    notes: tuple[str, ...] = ()


def prepare(asked: Asked, on_progress: Progress | None = None) -> Prepared:
    """Find or fetch everything; what nodes would not see is copied below `asked.work`.

    Raises UsageError or InfrastructureError with all reasons at once, each a line; then nothing was copied there.
    """
    reasons: list[RunnerError] = []
    sets: dict[str, DataSet] = {}
    model, checksum, reward = None, None, None
    with _collected(reasons):
        environment = _environment(asked)
    with _collected(reasons):
        model = models.find(asked.model, asked.cache, told(on_progress, "fetching the model"))
        checksum = _checksum(model, asked.cache, told(on_progress, "reading the model's checksums"))
    for artefact in _needed(asked):
        with _collected(reasons):
            source = data.open_source(_source(asked, artefact), asked.samples, asked.seed)
            rewarded, cache = _rewarded(asked, artefact), asked.cache / "verl-data"
            sets[artefact] = data.prepare(
                source, SCHEMAS[artefact], cache, rewarded, told(on_progress, f"checking {artefact}")
            )
    with _collected(reasons):
        reward = _reward(asked)
    with _collected(reasons):
        _target(asked)
    if model is not None and SFT_DATA in sets and asked.max_tokens is not None:
        with _collected(reasons):
            _require_short(model, sets[SFT_DATA], asked.max_tokens)
    if model is not None and checksum is not None:
        with _collected(reasons):
            _require_space(asked, _parameters(model), [(model.folder, checksum), *_contents(sets)])
    _raise(reasons)
    assert model is not None and checksum is not None
    copying = told(on_progress, "copying the model")
    folder = _placed(model.folder, _place(model.folder, model.name, checksum, asked), checksum, asked, copying)
    files = {}
    for artefact, one in sets.items():
        place = _placed(one.path, _place(one.path, artefact, one.manifest, asked), one.manifest, asked)
        rows = one.manifest.about.get("train_rows")
        files[artefact] = Files(place / one.train.name, place / one.val.name if one.val else None, rows)
    digests = {artefact: one.manifest.digest for artefact, one in sets.items()}
    return Prepared(
        model=folder,
        data=files,
        checksums={ENVIRONMENT: environment, MODEL: checksum.digest, **digests},
        question=next((str(one.manifest.about["question"]) for one in sets.values()), ""),
        parameters=_parameters(model),
        reward=_reward_placed(asked, reward) if reward is not None else None,
        reward_sha256=reward,
        notes=model.notes,
    )


def preview(asked: Asked) -> Prepared:
    """What `prepare` would find, for a dry run: nothing is contacted, fetched or written.

    A checksum that only reading or fetching can tell is "". Raises UsageError with all reasons that are known without.
    """
    reasons: list[RunnerError] = []
    found: dict[str, tuple[Files, str, str]] = {}
    model, reward, environment = None, None, ""
    with _collected(reasons):
        environment = _environment(asked)
    with _collected(reasons):
        model = models.preview(asked.model, asked.cache, asked.work / PLACED)
    for artefact in _needed(asked):
        with _collected(reasons):
            found[artefact] = _previewed(asked, artefact)
    with _collected(reasons):
        reward = _reward(asked)
    with _collected(reasons):
        _target(asked)
    _raise(reasons)
    assert model is not None
    known = manifest.complete(model.folder) or _recorded(model.folder, asked.cache)
    there = model.folder.exists()
    return Prepared(
        model=_place(model.folder, model.name, known, asked),
        data={artefact: files for artefact, (files, _, _) in found.items()},
        checksums={
            ENVIRONMENT: environment,
            MODEL: known.digest if known else "",
            **{artefact: digest for artefact, (_, digest, _) in found.items()},
        },
        question=next((question for _, _, question in found.values()), ""),
        parameters=_parameters(model) if there else 0,
        reward=_place_of_reward(asked, reward) if reward is not None else None,
        reward_sha256=reward,
        notes=model.notes,
    )


# ---- reasons ----


@contextmanager
def _collected(reasons: list[RunnerError]) -> Iterator[None]:
    """Keep a reason, to find the others as well."""
    try:
        yield
    except RunnerError as error:
        reasons.append(error)
    except OSError as error:
        reasons.append(InfrastructureError(os_error_text(error), disk_kind(error)))


def _raise(reasons: list[RunnerError]) -> None:
    reasons = list({str(reason): reason for reason in reasons}.values())  # one source may be data of two stages
    if not reasons:
        return
    if len(reasons) == 1:
        raise reasons[0]
    infrastructure = all(isinstance(reason, InfrastructureError) for reason in reasons)
    kinds = {reason.kind for reason in reasons}
    raise (InfrastructureError if infrastructure else UsageError)(
        "\n  ".join([f"{counted(len(reasons), 'reason')} not to start:", *map(str, reasons)]),
        kinds.pop() if len(kinds) == 1 else None,
    )


# ---- what is needed ----


def _needed(asked: Asked) -> list[str]:
    """The artefacts of data that this workflow's stages need."""
    return [name for stage in stages_of(asked.workflow) for name in stage.leaves if name in SCHEMAS]


def _source(asked: Asked, artefact: str) -> str:
    named = asked.rl_data if artefact == RL_DATA and asked.rl_data is not None else asked.data
    return data.ARITHMETIC if named is None else named


def _rewarded(asked: Asked, artefact: str) -> bool:
    return artefact == RL_DATA and asked.reward is not None


def _environment(asked: Asked) -> str:
    """The checksum of the profile's lock."""
    try:
        return hashlib.sha256(asked.lock.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"profile {asked.profile}: its lock cannot be read: {os_error_text(error)}") from error


def _previewed(asked: Asked, artefact: str) -> tuple[Files, str, str]:
    """Where a data set would be, its checksum and its question as far as they are known; local rows are checked."""
    schema, rewarded, cache = SCHEMAS[artefact], _rewarded(asked, artefact), asked.cache / "verl-data"
    source = data.open_source(_source(asked, artefact), asked.samples, asked.seed, contact=False)
    found = data.cached(source, schema, cache, rewarded)
    if found is None:
        question, files = data.check(source, schema, rewarded)
        names, rows = set(files), files[data.TRAIN_FILE]
        folder, digest = cache / data.key(source, schema, rewarded), ""
        known = None
    else:
        question = str(found.manifest.about["question"])
        names, rows = {file.path for file in found.manifest.files}, found.manifest.about.get("train_rows")
        folder, digest, known = found.path, found.manifest.digest, found.manifest
    place = _place(folder, artefact, known, asked)
    val = place / data.VAL_FILE if data.VAL_FILE in names else None
    return Files(place / data.TRAIN_FILE, val, rows), digest, question


def _reward(asked: Asked) -> str | None:
    """The checksum of the reward file. Raises UsageError where verl could not use it; it is not run."""
    if asked.reward is None:
        return None
    file = asked.reward
    try:
        content = file.read_bytes()
        tree = ast.parse(content, str(file))
        compile(tree, str(file), "exec")
    except OSError as error:
        raise UsageError(f"reward {file}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(f"reward {file}: {line}not Python: {said}") from error
    bound = _bound(tree.body)
    if (what := bound.get(REWARD)) is None or isinstance(what, ast.ClassDef):
        functions = [name for name, one in bound.items() if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
        near = f"; it has {', '.join(functions)}" if functions else ""
        raise UsageError(f"reward {file} has no function {REWARD}{near}")
    if isinstance(what, _VALUES):
        raise UsageError(f"reward {file}: line {what.lineno}: {REWARD} is no function: define it with def")
    if isinstance(what, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        _require_arguments(file, what.args)
    return hashlib.sha256(content).hexdigest()


def _require_arguments(file: Path, arguments: ast.arguments) -> None:
    takes = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
    if arguments.kwarg is None and (lacking := [name for name in _ARGUMENTS if name not in takes]):
        raise UsageError(
            f"reward {file}: {REWARD} does not take {', '.join(lacking)}: verl calls it with "
            f"{', '.join(_ARGUMENTS)}, by name"
        )


def _bound(body: Iterable[ast.AST]) -> dict[str, ast.AST]:
    """What a module's own statements bind names to, the last of them: a definition, a value, or the statement where
    that does not tell. Of branches, what may be a function counts.
    """
    names: dict[str, ast.AST] = {}
    for node in body:
        found: dict[str, ast.AST] = {}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {one.id: node.value if one in node.targets else node for one in _stored(node)}
        elif isinstance(node, ast.AnnAssign):  # without a value it binds nothing
            found |= {one.id: node.value for one in _stored(node) if node.value is not None}
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While | ast.ExceptHandler):
            inner = _bound(ast.iter_child_nodes(node))
            found |= {name: what for name, what in inner.items() if name not in names or not isinstance(what, _VALUES)}
        else:
            found |= {one.id: node for one in _stored(node)}
        names |= found
    return names


def _stored(node: ast.AST) -> list[ast.Name]:
    return [one for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]


def _target(asked: Asked) -> None:
    if asked.publish is not None:
        publish.check(asked.publish)


def _require_short(model: Model, samples: DataSet, most: int) -> None:
    """Raise UsageError where verl would stop at a sample that is too long for certain: by its contents alone.

    A model without tokenizer.json is not asked: reading its tokenizer takes transformers.
    """
    import pyarrow.parquet

    if not (model.folder / "tokenizer.json").exists():
        return
    long: list[tuple[int, list[str]]] = []  # a token has at least one byte
    for number, chat in enumerate(pyarrow.parquet.read_table(samples.train, columns=["messages"])["messages"], 1):
        texts = [str(message["content"]) for message in chat.as_py()]
        if sum(len(text.encode()) for text in texts) > most:
            long.append((number, texts))
    if not long:
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    tokenizer.no_truncation()
    counts = {
        n: sum(len(one.ids) for one in tokenizer.encode_batch(texts, add_special_tokens=False)) for n, texts in long
    }
    over = {number: count for number, count in counts.items() if count > most}
    if over:
        number, count = next(iter(over.items()))
        rows, longest = int(samples.manifest.about["train_rows"]), max(over.values())
        raise UsageError(
            f"data {samples.manifest.about['source']}: {counted(len(over), 'sample')} of {rows:,} {are(len(over))} too "
            f"long for fine-tuning, where verl stops (sample {number} has {count:,} tokens, at most {most:,}): "
            f"--set verl.sft.data.max_length={longest + MARGIN}, or --set verl.sft.data.truncation=right to cut them"
        )


# ---- disk ----


def needed_bytes(workflow: str, parameters: int, saves: int = 1) -> tuple[int, int, int]:
    """(checkpoints, models, bytes of them all) that a workflow of a model with these parameters writes at most."""
    programs = [stage.program for stage in stages_of(workflow)]
    checkpoints = saves * sum(CHECKPOINTS.get(program, 0) for program in programs)
    merged = programs.count(Program.MERGE)
    return checkpoints, merged, parameters * (checkpoints * CHECKPOINT_BYTES + merged * MODEL_BYTES)


def _require_space(asked: Asked, parameters: int, contents: list[tuple[Path, Manifest]]) -> None:
    """Raise InfrastructureError where the work folder has too little space for what a workflow writes."""
    checkpoints, merged, needed = needed_bytes(asked.workflow, parameters, asked.saves)
    copied = sum(one.bytes for folder, one in contents if not _is_seen(folder, asked))
    work = next(folder for folder in (asked.work.absolute(), *asked.work.absolute().parents) if folder.exists())
    free = shutil.disk_usage(work).free
    if needed + copied > free:
        raise InfrastructureError(
            f"{asked.work} has {size_text(free)} free, this workflow needs {size_text(needed + copied)}: "
            f"{counted(checkpoints, 'checkpoint')} of {CHECKPOINT_BYTES} bytes and {counted(merged, 'model')} of "
            f"{MODEL_BYTES} for each of {parameters / 1e9:.3g} billion parameters"
            + (f", and {size_text(copied)} of copies" if copied else "")
            + ": free some space, or give another folder (--work)",
            "controller_disk_full",
        )


def _contents(sets: Mapping[str, DataSet]) -> list[tuple[Path, Manifest]]:
    return [(one.path, one.manifest) for one in sets.values()]


def _parameters(model: Model) -> int:
    return weights.parameters(model.folder)


# ---- checksums ----


def _checksum(model: Model, cache: Path, on_progress: manifest.Progress) -> Manifest:
    """The manifest of a model's folder, which stays as it is: its own, or one that is kept in the cache.

    A file with the size and the time of its last change that it had when it was last read is not read again.
    """
    if (own := manifest.complete(model.folder)) is not None:
        return own
    record = _record(model.folder, cache)
    before = manifest.read(record)
    times = before.about["times"] if before else {}
    sums = {file.path: file for file in before.files} if before else {}

    def known(path: Path, status: os.stat_result) -> str | None:
        name = path.relative_to(model.folder).as_posix()
        file = sums.get(name)
        same = file is not None and (file.bytes, times.get(name)) == (status.st_size, status.st_mtime_ns)
        return file.sha256 if file is not None and same else None

    found = manifest.measure(model.folder, on_progress=on_progress, known=known)
    times = {file.path: (model.folder / file.path).stat().st_mtime_ns for file in found.files}
    found = replace(found, about={**model.about, "folder": str(model.folder), "times": times})
    if found != before:
        record.mkdir(parents=True, exist_ok=True)
        manifest.save(record, found)
    return found


def _record(folder: Path, cache: Path) -> Path:
    """The folder in the cache of the manifest of a model's folder elsewhere."""
    return cache / "models" / f"at-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"


def _recorded(folder: Path, cache: Path) -> Manifest | None:
    return manifest.read(_record(folder, cache))


# ---- where nodes see it ----


def _is_seen(folder: Path, asked: Asked) -> bool:
    # Resolved: what a link leads to must be seen as well.
    return any(folder.resolve().is_relative_to(one.resolve()) for one in asked.seen)


def _place(folder: Path, name: str, content: Manifest | None, asked: Asked) -> Path:
    """Where nodes see the content of a folder; without the content the end of the name is open."""
    if _is_seen(folder, asked):
        return folder.absolute()
    return asked.work.absolute() / PLACED / (f"{name}.{content.digest[:12]}" if content else name)


def _placed(
    folder: Path, place: Path, content: Manifest, asked: Asked, on_progress: manifest.Progress | None = None
) -> Path:
    """`place`, to which the content of a folder is copied if it is elsewhere. Raises InfrastructureError."""
    if place == folder.absolute():
        return place

    def build(temporary: Path) -> Mapping[str, object]:
        manifest.copy(folder, content.files, temporary, on_progress)
        return {key: value for key, value in content.about.items() if key != "times"}

    try:
        made, _ = manifest.made(place, build, asked.cache / "locks")
    except OSError as error:
        raise InfrastructureError(
            f"cannot copy {folder} to {place}: {os_error_text(error)}", disk_kind(error)
        ) from error
    if made.digest != content.digest:
        shutil.rmtree(place, ignore_errors=True)
        raise InfrastructureError(
            f"{folder} changed while it was copied to {place}, or was not copied right: try again"
        )
    return place


def _place_of_reward(asked: Asked, sha256: str) -> Path:
    assert asked.reward is not None
    if _is_seen(asked.reward, asked):
        return asked.reward.absolute()
    return asked.work.absolute() / PLACED / f"reward.{sha256[:12]}" / asked.reward.name


def _reward_placed(asked: Asked, sha256: str) -> Path:
    assert asked.reward is not None
    place = _place_of_reward(asked, sha256)
    if place != asked.reward.absolute():
        content = manifest.Manifest((manifest.File(place.name, asked.reward.stat().st_size, sha256),))
        _placed(asked.reward.absolute().parent, place.parent, content, asked)
    return place
