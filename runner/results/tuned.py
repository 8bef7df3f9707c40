"""What `runner tune` found, kept beside the runs: the fastest settings of one model on one kind of nodes.

A result is one file, `<results>/tuned/<digest>.json`; the digest is that of its `Subject`, which must be the same for
the result to be used. Versions are no part of it: they are compared once the nodes have said what they have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.system.files import disk_errors, write_json_atomic
from runner.system.wording import counted

SCHEMA = 1
FOLDER = "tuned"  # in the folder of runs
OK, OUT_OF_MEMORY, REFUSED, FAILED = OUTCOMES = ("ok", "out_of_memory", "refused", "failed")
# Of the properties of `cluster.facts.comparable` those without which a result is not used, and those that are kept to
# be read: torch's version names the CUDA it was built for, and a newer driver does not change what is best.
REQUIRED = ("gpus", "packages.torch", "packages.deepspeed", "packages.transformers")
VERSIONS = (*REQUIRED, "cuda", "driver")

# What says nothing of an architecture's speed.
_NAMES = {"name", "hf_id", "deepspeed", "seq_len", "max_seq_len", "rope_theta", "rope_scaling", "rms_norm_eps"}


@dataclass(frozen=True)
class Subject:
    """What settings are tuned for. `architecture` is a digest of the model's sizes, whatever its name.

    `given` are the settings that tuning does not change and speed depends on (`sft.attention`, …), and `training` is a
    digest of what it does not change in the DeepSpeed configuration. `seq_len` is in tokens.
    """

    model: str
    architecture: str
    hardware: str
    device: str
    num_nodes: int
    world_size: int
    seq_len: int
    given: Mapping[str, Any]
    training: str

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of a SHA-256 over all but the model's name."""
        return _digest({key: value for key, value in asdict(self).items() if key != "model"})

    def text(self) -> str:
        """The subject in a few words: `llama-2-7b, h200-sxm, 1 node (8 ranks), 4096 tokens`."""
        nodes = f"{counted(self.num_nodes, 'node')} ({counted(self.world_size, 'rank')})"
        return f"{self.model}, {self.hardware}, {nodes}, {self.seq_len} tokens"

    def differs(self, other: Subject) -> list[str]:
        """What is different in `other`, each as `NAME here, not there`; empty where a result of one is the other's."""
        names = [field.name for field in fields(self) if field.name not in ("model", "architecture", "given")]
        found = [] if self.architecture == other.architecture else ["another architecture"]
        for name in names:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(
                    "another DeepSpeed configuration" if name == "training" else f"{name} {mine}, not {theirs}"
                )
        for key in sorted({*self.given, *other.given}):
            if (mine := self.given.get(key)) != (theirs := other.given.get(key)):
                found.append(f"{key}={mine}, not {theirs}")
        return found


@dataclass(frozen=True)
class Probe:
    """One setting that was tried: one of OUTCOMES, and where it is "ok", what it gave.

    Rates are of one GPU: `tokens_per_s_per_gpu` counts tokens without padding, `positions_per_s_per_gpu` all of them.
    `noise` is the relative spread of its steps, 0…1, `seconds` what the whole probe took, `run` the folder of its run.
    """

    settings: Mapping[str, Any]
    outcome: str
    tokens_per_s_per_gpu: float | None = None
    positions_per_s_per_gpu: float | None = None
    noise: float | None = None
    peak_memory_gib: float | None = None
    seconds: float = 0.0
    note: str = ""
    run: str = ""


@dataclass(frozen=True)
class Tuned:
    """What tuning found for a subject: `settings` (`sft.micro_batch`: 4, …) as `--set` takes them.

    `global_batch` is in sequences; `created` is a time as in `system.clock`, `command` what was typed. `versions` are
    by name those of VERSIONS that the nodes had.
    """

    subject: Subject
    versions: Mapping[str, str]
    created: str
    command: str
    global_batch: int
    settings: Mapping[str, Any]
    tokens_per_s_per_gpu: float | None
    probes: Sequence[Probe]
    matmul_tflop_per_s: float | None = None
    schema: int = SCHEMA

    @property
    def date(self) -> str:
        """The day on which it was tuned, such as 2026-01-31."""
        return self.created[:10]

    def rate(self, micro_batch: int, recompute: str) -> float | None:
        """Positions per second and GPU that were measured at that micro-batch (in sequences) and recompute, the best of
        all probes; None where there was none.
        """
        asked = {"sft.micro_batch": micro_batch, "sft.recompute": recompute}
        found = [
            probe.positions_per_s_per_gpu
            for probe in self.probes
            if probe.positions_per_s_per_gpu and asked.items() <= probe.settings.items()
        ]
        return max(found, default=None)

    def outdated(self, versions: Mapping[str, str]) -> list[str]:
        """The versions that nodes have another of, such as `torch 2.11.0, nodes have 2.13.0`; unknown ones are not."""
        return [
            f"{name.removeprefix('packages.')} {self.versions[name]}, nodes have {versions[name]}"
            for name in REQUIRED
            if name in self.versions and name in versions and self.versions[name] != versions[name]
        ]

    def to_dict(self) -> dict[str, Any]:
        """The result as dicts and lists that JSON can hold: the contents of its file."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> Tuned:
        """The result from the text of its file; raises ValueError for any other, where a type is wrong too."""
        from pydantic import TypeAdapter

        found = TypeAdapter(cls).validate_json(text, strict=True)
        if found.schema != SCHEMA:
            raise ValueError(f"schema {found.schema}")
        if wrong := {probe.outcome for probe in found.probes} - set(OUTCOMES):
            raise ValueError(f"outcome {wrong.pop()}")
        return replace(found, probes=tuple(found.probes))


def architecture(model: Mapping[str, Any]) -> str:
    """The digest of a model's sizes, from the contents of its file in configs/models."""
    return _digest({key: value for key, value in model.items() if key not in _NAMES})


def versions(environments: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Those of VERSIONS that all nodes have alike, from the properties of each (`cluster.facts.comparable`)."""
    found = {}
    for name in VERSIONS:
        values = {environment.get(name) for environment in environments.values()}
        if len(values) == 1 and (value := values.pop()) is not None:
            found[name] = value
    return found


def path(results: Path, subject: Subject) -> Path:
    """The file of a subject's result."""
    return results / FOLDER / f"{subject.digest}.json"


def save(results: Path, tuned: Tuned) -> Path:
    """Write a result in place of an earlier one; returns its file. Raises InfrastructureError where that cannot be."""
    return _write(results, path(results, tuned.subject), tuned)


def find(results: Path, subject: Subject) -> Tuned | None:
    """The result of a subject; None where there is none. Raises UsageError for a damaged file, or another subject's."""
    file = path(results, subject)
    found = _read(file)
    if found is not None and found.subject.digest != subject.digest:
        raise UsageError(f"{file} is of another subject: {found.subject.text()}")
    return found


def save_begun(results: Path, subject: Subject, tuned: Tuned | None) -> None:
    """Keep what a search for `subject` has measured until now, beside a result of it that remains; None: it has ended.

    Raises InfrastructureError where that cannot be written.
    """
    file = _begun(results, subject)
    if tuned is not None:
        _write(results, file, tuned)
    else:
        with disk_errors(results):
            file.unlink(missing_ok=True)


def find_begun(results: Path, subject: Subject) -> Tuned | None:
    """What an interrupted search has measured; None where there was none. Raises UsageError for a damaged file."""
    return _read(_begun(results, subject))


def nearest(results: Path, subject: Subject) -> Tuned | None:
    """The result for the same architecture that differs least from `subject`; damaged files are passed over."""
    others = []
    for file in sorted((results / FOLDER).glob("*.json")):
        try:
            found = _read(file)
        except UsageError:
            continue
        if found and found.subject.architecture == subject.architecture:
            others.append(found)
    return min(others, key=lambda other: len(other.subject.differs(subject)), default=None)


def _begun(results: Path, subject: Subject) -> Path:
    return path(results, subject).with_suffix(".begun")


def _write(results: Path, file: Path, tuned: Tuned) -> Path:
    with disk_errors(results):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json_atomic(file, tuned.to_dict())
    return file


def _read(file: Path) -> Tuned | None:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
    try:
        return Tuned.from_json(text)
    except ValueError:
        raise UsageError(f"{file} is damaged or of another version") from None


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
