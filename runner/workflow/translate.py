"""Translates a file with the sections parallelism, distributed, model, training and inference into what verl 0.9.1 is
told. Every line of the file has its translation, or is refused: nothing is dropped in silence. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from runner.errors import UsageError
from runner.system.schema import ConfigFile, PositiveInt, check
from runner.system.wording import counted
from runner.workflow.parallelism import FSDP, MEGATRON, Split, split
from runner.workflow.stages import Program
from runner.workflow.verl import Profile, Training, overrides, settled


class Parallelism(ConfigFile):
    """How the model is divided in training."""

    data_parallel_size: PositiveInt | None = None
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1


class Distributed(ConfigFile):
    """How processes meet and talk."""

    backend: Literal["nccl", "gloo"] | None = None
    init_method: str | None = None
    timeout: PositiveInt | None = None


class Model(ConfigFile):
    """The model to begin with."""

    path: str | None = None
    trust_remote_code: bool = False


class TrainingSection(ConfigFile):
    """Batches and memory in training."""

    batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    gradient_checkpointing: bool | None = None
    cpu_offload: bool | None = None
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)] | None = None


class Inference(ConfigFile):
    """The rollout."""

    backend: str | None = None
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1


class Document(ConfigFile):
    """The whole file; every section may be absent."""

    parallelism: Parallelism = Parallelism()
    distributed: Distributed = Distributed()
    model: Model = Model()
    training: TrainingSection = TrainingSection()
    inference: Inference = Inference()


@dataclass(frozen=True)
class Line:
    """What became of one line of the file: the overrides that it has become, and a remark where it is not plain."""

    key: str
    value: Any
    overrides: tuple[str, ...] = ()
    remark: str = ""

    def __str__(self) -> str:
        became = ", ".join(self.overrides)
        return f"{self.key}: {self.value} → {'; '.join(part for part in (became, self.remark) if part)}"


@dataclass(frozen=True)
class Translation:
    """What verl is asked for, and what became of each line, in the file's order."""

    asked: Training
    lines: tuple[Line, ...]


def translate(values: Any, where: str, start: Training) -> Translation:
    """The translation of a file's content for PPO; `start` is what is asked for without it, on the chosen nodes.

    Raises UsageError, with `where` as the file's name, for what is unknown, does not fit these nodes, or has no
    equivalent in verl.
    """
    document = read(values, where)
    try:
        asked = settled(Program.PPO, _asked(document, start))
        told = overrides(Program.PPO, asked)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    written = [(section, key) for section, keys in values.items() for key in keys or ()]
    lines = [_line(document, asked, told, f"{section}.{key}") for section, key in written]
    return Translation(asked, tuple(lines))


def read(values: Any, where: str) -> Document:
    """The document in a file's content. Raises UsageError for what is unknown in it."""
    if isinstance(values, Mapping):  # YAML has null for a section without lines
        values = {section: {} if keys is None else keys for section, keys in values.items()}
    return check(Document, values, where)


# --- what is asked for ------------------------------------------------------------------------------------


def _asked(document: Document, start: Training) -> Training:
    parallelism, training, inference = document.parallelism, document.training, document.inference
    divided = split(
        start.nodes,
        start.gpus_per_node,
        data=parallelism.data_parallel_size,
        tensor=parallelism.tensor_parallel_size,
        pipeline=parallelism.pipeline_parallel_size,
        rollout_tensor=inference.tensor_parallel_size,
        rollout_pipeline=inference.pipeline_parallel_size,
    )
    _require_backends(document, start.profile)
    if document.model.path is None and not start.model:
        raise UsageError("model.path is missing: add it, or name the model with --model")
    asked = replace(
        start,
        split=divided,
        model=document.model.path or start.model,
        trust_remote_code=document.model.trust_remote_code,
        timeout_s=document.distributed.timeout,
        batch=training.batch_size or start.batch,
        micro_batch=training.micro_batch_size or start.micro_batch,
        recompute=start.recompute if training.gradient_checkpointing is None else training.gradient_checkpointing,
        offload=bool(training.cpu_offload),
        reshard=_reshard(training.zero_stage, divided, start),
    )
    if training.gradient_accumulation_steps is None:
        return replace(asked, mini_batch=None if training.batch_size else start.mini_batch)
    return _updates(asked, training.gradient_accumulation_steps, divided.data)


def _updates(asked: Training, accumulation: int, data: int) -> Training:
    """A copy in which one update takes what is accumulated. Refused where a step is no whole number of updates."""
    if asked.micro_batch is None:
        raise UsageError("training.gradient_accumulation_steps says nothing without micro_batch_size: add it")
    mini = asked.micro_batch * accumulation * data
    if asked.batch % mini:
        product = f"micro_batch_size {asked.micro_batch} × gradient_accumulation_steps {accumulation} × DP {data}"
        raise UsageError(
            f"training: {product} = {mini} sequences an update do not divide batch_size {asked.batch}: give batch_size "
            f"{-(-asked.batch // mini) * mini}, or other gradient_accumulation_steps"
        )
    return replace(asked, mini_batch=mini)


def _reshard(stage: int | None, divided: Split, start: Training) -> bool:
    if stage is None:
        return start.reshard
    if divided.strategy == MEGATRON:
        if stage == 1:
            return start.reshard  # Megatron's distributed optimizer, which is on
        raise UsageError(
            f"training.zero_stage {stage} with {divided}: verl's {MEGATRON} divides the optimizer's state (1), not "
            "gradients or parameters; give 1, or train with TP 1 × PP 1"
        )
    if stage < 2:
        raise UsageError(
            f"training.zero_stage {stage}: verl's {FSDP} divides gradients too (2) or parameters as well (3)"
        )
    return stage == 3


_COMMUNICATION = {"cuda": "nccl", "cpu": "gloo"}


def _require_backends(document: Document, profile: Profile) -> None:
    own = _COMMUNICATION[profile.device]
    if document.distributed.backend not in (None, own):
        raise UsageError(f"distributed.backend {document.distributed.backend}: on {profile.device} verl uses {own}")
    if document.distributed.init_method not in (None, "env://"):
        raise UsageError(
            f"distributed.init_method {document.distributed.init_method}: Ray tells the ranks of each other, give env://"
        )
    backend = document.inference.backend
    if backend not in (None, profile.rollout):
        raise UsageError(f"inference.backend {backend}: this profile has {profile.rollout}; it is given by --profile")


# --- what became of each line -----------------------------------------------------------------------------

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_CRITIC = "critic"

# Line -> (ends of the overrides that it has become, where they are looked for).
_BECAME: Mapping[str, tuple[str, ...]] = {
    "parallelism.tensor_parallel_size": (
        "model_engine",
        f"{_ACTOR}.megatron.tensor_model_parallel_size",
        "actor_rollout_ref.ref.megatron.tensor_model_parallel_size",
        f"{_CRITIC}.megatron.tensor_model_parallel_size",
    ),
    "parallelism.pipeline_parallel_size": (
        "model_engine",
        f"{_ACTOR}.megatron.pipeline_model_parallel_size",
        "actor_rollout_ref.ref.megatron.pipeline_model_parallel_size",
        f"{_CRITIC}.megatron.pipeline_model_parallel_size",
    ),
    "distributed.timeout": ("actor_rollout_ref.nccl_timeout",),
    "model.path": ("actor_rollout_ref.model.path", f"{_CRITIC}.model.path"),
    "model.trust_remote_code": (
        "data.trust_remote_code",
        "actor_rollout_ref.model.trust_remote_code",
        f"{_CRITIC}.model.trust_remote_code",
    ),
    "training.batch_size": ("data.train_batch_size",),
    "training.micro_batch_size": (
        f"{_ACTOR}.ppo_micro_batch_size_per_gpu",
        f"{_CRITIC}.ppo_micro_batch_size_per_gpu",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
        f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu",
    ),
    "training.gradient_accumulation_steps": (f"{_ACTOR}.ppo_mini_batch_size",),
    "training.gradient_checkpointing": (
        "actor_rollout_ref.model.enable_gradient_checkpointing",
        f"{_CRITIC}.model.enable_gradient_checkpointing",
        f"{_ACTOR}.megatron.override_transformer_config.recompute_granularity",
        f"{_CRITIC}.megatron.override_transformer_config.recompute_granularity",
    ),
    "training.cpu_offload": tuple(
        f"{prefix}.{what}"
        for prefix in (
            f"{_ACTOR}.fsdp_config",
            "actor_rollout_ref.ref.fsdp_config",
            f"{_CRITIC}.fsdp",
            f"{_ACTOR}.megatron",
            "actor_rollout_ref.ref.megatron",
            f"{_CRITIC}.megatron",
        )
        for what in ("param_offload", "optimizer_offload")
    ),
    "training.zero_stage": (
        f"{_ACTOR}.fsdp_config.reshard_after_forward",
        f"{_CRITIC}.fsdp.reshard_after_forward",
    ),
    "inference.backend": (f"{_ROLLOUT}.name",),
    "inference.tensor_parallel_size": (f"{_ROLLOUT}.tensor_model_parallel_size",),
}


def _line(document: Document, asked: Training, told: Mapping[str, Any], key: str) -> Line:
    section, _, name = key.partition(".")
    value = getattr(getattr(document, section), name)
    made = tuple(f"{each}={_shown(told[each])}" for each in _BECAME.get(key, ()) if each in told)
    return Line(key, _shown(value), made, _remark(key, value, asked, bool(made)))


def _remark(key: str, value: Any, asked: Training, made: bool) -> str:
    gpus = asked.nodes * asked.gpus_per_node
    if value is None:
        return "no override: not set, so what the workflow takes"
    micro, data = asked.micro_batch, asked.split.data
    remarks = {
        "parallelism.data_parallel_size": f"no override: verl takes {counted(gpus, 'GPU')} / TP / PP, which is {data}",
        "distributed.backend": f"no override: on {asked.profile.device} verl uses {value}",
        "distributed.init_method": "no override: Ray tells the ranks of each other",
        "inference.pipeline_parallel_size": "no override: verl's rollout has no other",
        "training.gradient_accumulation_steps": f"micro_batch_size {micro} × {value} × DP {data}",
        "training.zero_stage": "no override: Megatron's distributed optimizer is on"
        if asked.split.strategy == MEGATRON
        else "parameters are gathered again for the backward pass"
        if value == 3
        else "parameters stay gathered until the backward pass",
    }
    return remarks.get(key, "" if made else "no override: 1 is FSDP alone")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
