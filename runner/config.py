"""Configuration files under configs/: read, checked, and refused with the file, the field and the nearest name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from runner.errors import UsageError, unknown
from runner.system.places import CONFIGS

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 1e-4 is a string in YAML 1.1
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(value: Any) -> Any:
    """Bytes of `8`, `64K`, `1MiB`, `8G` (powers of 1024, as nccl-tests reads them)."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
    return value


PositiveInt = Annotated[int, Field(gt=0, strict=True)]  # strict: YAML's `yes` is no number
Size = Annotated[PositiveInt, BeforeValidator(parse_size)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(_File):
    """The architecture of a Llama-style decoder, and how it is fine-tuned by default."""

    name: str
    hf_id: str | None = None
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    vocab_size: PositiveInt
    max_seq_len: PositiveInt
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    seq_len: PositiveInt
    deepspeed: str = Field(description="file name in configs/deepspeed/, without .json")

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("hidden_size must be a multiple of num_heads, and num_heads of num_kv_heads")
        if self.seq_len > self.max_seq_len:
            raise ValueError("seq_len must not exceed max_seq_len")
        return self


class Hardware(_File):
    """Ceilings of one node; None where there is nothing to judge against."""

    gpu: str
    gpu_memory_gib: float
    bf16_peak_tflop_per_s: float | None
    fp8_peak_tflop_per_s: float | None
    hbm_gb_per_s: float | None
    nvlink_busbw_gb_per_s: float | None


class Target(_File):
    """A value that a metric must reach; num_nodes None: at every node count that was measured."""

    name: str
    test: Literal["torch", "sft"]
    metric: str
    num_nodes: PositiveInt | None
    direction: Literal["min", "max"]
    value: float
    source: str
    scaling: Literal["weak", "strong"] | None = None
    collective: Collective | None = None
    min_bytes: Size | None = None
    max_bytes: Size | None = None


class Targets(_File):
    targets: tuple[Target, ...]


Collective = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv", "ping_pong", "barrier"
]


class TorchTest(_File):
    """Collectives over torch.distributed: the same code on NCCL and gloo."""

    collectives: Annotated[tuple[Collective, ...], Field(min_length=1)]
    min_bytes: Size
    max_bytes: Size | None = Field(description="None: 8 GiB on GPUs, 1 MiB on CPUs")
    factor: Annotated[int, Field(ge=2)]
    warmup: Annotated[int, Field(ge=0)]
    iters: PositiveInt
    dtype: Literal["float32", "bfloat16", "float16"]
    timeout_s: PositiveFloat

    @model_validator(mode="after")
    def _ordered(self) -> TorchTest:
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes {self.max_bytes} is below min_bytes {self.min_bytes}")
        return self


class SftTest(_File):
    """DeepSpeed supervised fine-tuning. What is left out comes from the model's DeepSpeed file."""

    steps: PositiveInt
    warmup_steps: Annotated[int, Field(ge=0)]
    lr: PositiveFloat | None
    dataset: str
    tokenizer: str | None
    samples: PositiveInt
    seq_len: PositiveInt | None
    global_batch: PositiveInt | None
    micro_batch: PositiveInt | None
    gradient_accumulation: PositiveInt | None
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"]
    activation_checkpointing: bool
    liger: Literal["auto", "true", "false"]
    compile: bool
    timeout_s: PositiveFloat


TESTS: dict[str, type[_File]] = {"torch": TorchTest, "sft": SftTest}

# What DeepSpeed reads beside what the shipped files hold.
DEEPSPEED_SECTIONS = (
    "aio", "amp", "comms_logger", "communication_data_type", "compression_training", "csv_monitor", "data_efficiency",
    "data_types", "disable_allgather", "dump_state", "flops_profiler", "fp16", "memory_breakdown",
    "prescale_gradients", "gradient_predivide_factor", "scheduler", "sparse_gradients", "tensorboard",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip

AnyFile = TypeVar("AnyFile", bound=BaseModel)


def check(schema: type[AnyFile], values: Any, where: str) -> AnyFile:
    """`values` as `schema`; the first thing wrong becomes one line with file, field and nearest name."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: expected a mapping of settings, found {type(values).__name__}")
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        # A misspelt key also leaves the right one missing: the misspelling is the news.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            place = ".".join([where, *(str(part) for part in first["loc"][:-1])])
            raise unknown("key", str(first["loc"][-1]), _fields_at(schema, first["loc"]), place) from None
        if first["type"] == "missing":
            raise UsageError(f"{where}: {field} is missing") from None
        if first["type"] == "literal_error":
            expected = re.findall(r"'([^']+)'", first.get("ctx", {}).get("expected", ""))
            raise unknown("value", str(first["input"]), expected, f"{where}: {field}") from None
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {field} = {first['input']!r}: {said}" if field else f"{where}: {said}") from None


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> Iterable[str]:
    """The field names of the model that holds the last part of `location`."""
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = schema.model_fields[part].annotation
            nested = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
            schema = next(kind for kind in nested if issubclass(kind, BaseModel))
    return schema.model_fields


def read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None


def names(kind: str, suffix: str = ".yaml") -> list[str]:
    return sorted(path.name.removesuffix(suffix) for path in (CONFIGS / kind).glob(f"*{suffix}"))


def load_model(name: str) -> ModelConfig:
    if name not in names("models"):
        raise unknown("model", name, names("models"))
    path = CONFIGS / "models" / f"{name}.yaml"
    return check(ModelConfig, read_yaml(path), str(path))


def load_hardware(name: str) -> Hardware:
    if name not in names("hardware"):
        raise unknown("hardware", name, names("hardware"))
    path = CONFIGS / "hardware" / f"{name}.yaml"
    return check(Hardware, read_yaml(path), str(path))


def load_test(name: str, overrides: Mapping[str, Any]) -> Any:
    """The settings of a test after `--set`; returns an instance of TESTS[name]."""
    if name not in TESTS:
        raise unknown("test", name, TESTS)
    path = CONFIGS / "tests" / f"{name}.yaml"
    values = check(TESTS[name], read_yaml(path), str(path)).model_dump()
    return check(TESTS[name], {**values, **overrides}, f"--set {name}" if overrides else str(path))


def load_deepspeed(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration with dotted `overrides` (zero_optimization.stage) applied."""
    if name not in names("deepspeed", ".json"):
        raise unknown("DeepSpeed configuration", name, names("deepspeed", ".json"))
    path = CONFIGS / "deepspeed" / f"{name}.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(config).__name__}")
    for key, value in overrides.items():
        # DeepSpeed takes an unknown section without a word, and without effect.
        if key.partition(".")[0] not in {*config, *DEEPSPEED_SECTIONS}:
            raise unknown("DeepSpeed setting", key, {*config, *DEEPSPEED_SECTIONS}, "--set deepspeed")
        *parents, last = key.split(".")
        target = config
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UsageError(f"--set deepspeed.{key}: {parent} is not a section")
        target[last] = value
    return config


def load_targets() -> list[dict[str, Any]]:
    path = CONFIGS / "targets" / "default.yaml"
    targets = check(Targets, read_yaml(path), str(path)).targets
    return [target.model_dump(exclude_unset=True) for target in targets]


def parse_settings(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`--set sft.steps=20` as {"sft": {"steps": 20}}; values are read as YAML."""
    import yaml

    parsed: dict[str, dict[str, Any]] = {}
    sections = [*TESTS, "deepspeed", "slurm"]
    for setting in settings:
        key, equals, text = setting.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise UsageError(f"--set {setting}: write it as TEST.KEY=VALUE, for example --set sft.steps=20")
        if section not in sections:
            raise unknown("section", section, sections, f"--set {setting}")
        try:
            value = float(text) if _EXPONENT.fullmatch(text) else yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {setting}: {text!r} is not a valid value") from None
        parsed.setdefault(section, {})[name] = value if not isinstance(value, bool) or name != "liger" else text
    return parsed
