"""Reading and checking the files under configs/. Errors name the file, the field and the nearest valid name."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import (
    Field,
    PositiveFloat,
    model_validator,
)

from runner.cluster.nccl import Choice
from runner.errors import UsageError, unknown
from runner.system.places import CONFIGS
from runner.system.schema import ConfigFile, PositiveInt, Size, check, read_yaml
from runner.workloads.collectives.settings import Collective
from runner.workloads.nccl.settings import Collective as NcclCollective
from runner.workloads.registry import TESTS, offered

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 1e-4 is a string in YAML 1.1


class ModelConfig(ConfigFile):
    """configs/models/<name>.yaml: the architecture of a Llama-style decoder, and its defaults for fine-tuning."""

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
    rope_scaling: dict[str, float | int | str] | None = Field(None, description="as in the weights' config.json")
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


RUN = "run"  # the section of settings of the whole run, which are written without one


class RunSettings(ConfigFile):
    """Settings of a whole run. `nccl`: torch's own or the built one; None: as the nodes have it. `tuned`: whether what
    `runner tune` found is used.
    """

    nccl: Choice | None = None
    tuned: bool = True


class Hardware(ConfigFile):
    """configs/hardware/<name>.yaml: rated limits of a GPU, in the unit of each name; None: unknown, not judged."""

    gpu: str
    gpu_memory_gib: float
    bf16_peak_tflop_per_s: float | None
    fp8_peak_tflop_per_s: float | None
    hbm_gb_per_s: float | None
    nvlink_busbw_gb_per_s: float | None
    nvls: bool = False  # whether its NVSwitches combine (NVLink SHARP)


if TYPE_CHECKING:
    TestName = str
    CollectiveName = str
else:
    TestName = Literal[*TESTS]
    CollectiveName = Literal[*dict.fromkeys((*get_args(Collective), *get_args(NcclCollective)))]


class Target(ConfigFile):
    """A value that a metric must reach, in the metric's unit; `num_nodes` None: at every measured node count.

    Fewer `repeats` leave it undecided. None: the usual number, by which their spread is known.
    """

    name: str
    test: TestName
    metric: str
    num_nodes: PositiveInt | None
    direction: Literal["min", "max"]
    value: float
    source: str
    scaling: Literal["weak", "strong"] | None = None
    collective: CollectiveName | None = None
    min_bytes: Size | None = None
    max_bytes: Size | None = None
    repeats: PositiveInt | None = None


class Targets(ConfigFile):
    """configs/targets/<name>.yaml."""

    targets: tuple[Target, ...]


# Sections that DeepSpeed reads; a test compares them with what the installed one asks for.
DEEPSPEED_SECTIONS = (
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet",
    "comms_logger", "communication_data_type", "compile", "compression_training", "csv_monitor",
    "curriculum_learning", "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt",
    "disable_allgather", "disable_python_gc", "dump_state", "eigenvalue", "elasticity", "expert_parallel",
    "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "graph_harvesting", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "nebula", "optimizer", "pipeline", "prescale_gradients", "progressive_layer_drop",
    "quantize_training", "scheduler", "seq_parallel_communication_data_type", "sparse_attention",
    "sparse_gradients", "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast",
    "train_batch_size", "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wall_clock_breakdown", "wandb", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip


def names(kind: str, suffix: str = ".yaml") -> list[str]:
    """The names of the files in configs/<kind>/, without `suffix`, sorted."""
    return sorted(path.name.removesuffix(suffix) for path in (CONFIGS / kind).glob(f"*{suffix}"))


def load_model(name: str) -> ModelConfig:
    """The model of configs/models/<name>.yaml, or of the file at `name`, a path that ends with .yaml or .yml.

    Raises UsageError where it does not exist or is invalid.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in names("models"):
        path = CONFIGS / "models" / f"{name}.yaml"
    else:
        raise unknown("model", name, names("models"))
    return check(ModelConfig, read_yaml(path), str(path))


def load_hardware(name: str) -> Hardware:
    """The hardware of configs/hardware/<name>.yaml. Raises UsageError where it does not exist or is invalid."""
    if name not in names("hardware"):
        raise unknown("hardware", name, names("hardware"))
    path = CONFIGS / "hardware" / f"{name}.yaml"
    return check(Hardware, read_yaml(path), str(path))


_FORMS = {"NVL", "PCIe"}  # of which a vendor's name for the common form, SXM, says nothing


def describes(hardware: Mapping[str, Any], gpu: str) -> bool:
    """Whether a file describes the GPU that NVML calls `gpu`: "H200 SXM" is "NVIDIA H200", not "NVIDIA H200 NVL"."""
    seen, meant = set(re.split(r"[ -]", gpu)), set(re.split(r"[ -]", hardware["gpu"]))
    return meant - {"NVIDIA", "SXM"} <= seen and seen & _FORMS <= meant


def hardware_of(gpu: str) -> str:
    """The name of the file that describes the GPU that NVML calls `gpu`, `unknown` where there is none."""
    return next((name for name in names("hardware") if describes(load_hardware(name).model_dump(), gpu)), "unknown")


def load_test(name: str, overrides: Mapping[str, Any]) -> Any:
    """The settings of a test: configs/tests/<name>.yaml with `overrides` (key -> value) from `--set` applied.

    Returns an instance of the test's settings class. Raises UsageError for an unknown test, key or value.
    """
    if name not in offered():
        raise unknown("test", name, offered())
    path, settings = CONFIGS / "tests" / f"{name}.yaml", TESTS[name].load_settings()
    values = check(settings, read_yaml(path), str(path)).model_dump()
    lists = {key for key, field in settings.model_fields.items() if get_origin(field.annotation) is tuple}
    overrides = {  # one name, or several with commas, is a list where one is asked for
        key: [part.strip() for part in value.split(",")] if key in lists and isinstance(value, str) else value
        for key, value in overrides.items()
    }
    return check(settings, {**values, **overrides}, f"--set {name}" if overrides else str(path))


def load_deepspeed(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """configs/deepspeed/<name>.json with `overrides` (dotted keys such as zero_optimization.stage) applied.

    Raises UsageError where the file does not exist or is no JSON object, or where a key names no known section.
    """
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
        # DeepSpeed silently ignores an unknown section.
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


def deepspeed_files(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> DeepSpeed configuration with `overrides` applied, for every file; unreadable files are left out."""
    found = {}
    for name in names("deepspeed", ".json"):
        with contextlib.suppress(UsageError):
            found[name] = load_deepspeed(name, overrides)
    return found


TARGETS = "targets"  # the section of `--set` for values of targets, by their name


def load_targets(name: str = "default", values: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The targets of configs/targets/<name>.yaml, as dicts with the keys that the file gives; `values` are those of
    `--set targets.NAME=VALUE`, in place of the file's.

    Raises UsageError for an unknown key, target, or an invalid value.
    """
    path = CONFIGS / "targets" / f"{name}.yaml"
    given, known = dict(values or {}), read_yaml(path)
    for target in known.get("targets", ()) if given else ():
        if target["name"] in given:
            target["value"] = _value_of_target(target["name"], target["metric"], given.pop(target["name"]))
    if given:
        raise unknown("target", next(iter(given)), [one["name"] for one in known["targets"]], f"--set {TARGETS}")
    return [target.model_dump(exclude_unset=True) for target in check(Targets, known, str(path)).targets]


def _value_of_target(name: str, metric: str, value: Any) -> float:
    """The value that a user gives for a target. No metric that has one is below 0, and a share ends at 100 %."""
    most = 100.0 if metric.endswith("_pct") else float("inf")
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value <= most and isfinite(value)):
        bounds = "from 0 to 100" if isfinite(most) else "of at least 0"
        raise UsageError(f"--set {TARGETS}.{name}={value}: give a number {bounds}, the limit of {metric}")
    return value


def parse_settings(settings: Iterable[str], tests: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Settings of `--set` by section: `sft.steps=20` gives {"sft": {"steps": 20}}. Values are read as YAML.

    `nccl=built`, a setting of the whole run, is in the section RUN. Raises UsageError for a setting without section,
    key or value, and for an unknown section. `tests` are those that may have settings, None: all that are offered.
    """
    import yaml

    parsed: dict[str, dict[str, Any]] = {}
    sections = [*(offered() if tests is None else tests), "deepspeed", "slurm", TARGETS]
    for setting in settings:
        key, equals, text = setting.partition("=")
        section, dot, name = key.partition(".")
        if equals and key in RunSettings.model_fields:
            section, name = RUN, key
        elif not (equals and dot and name):
            whole = ", ".join(RunSettings.model_fields)
            raise UsageError(
                f"--set {setting}: write it as TEST.KEY=VALUE, for example --set sft.steps=20; without TEST: {whole}"
            )
        elif section not in sections:
            raise unknown("section", section, sections, f"--set {setting}")
        try:
            value = float(text) if _EXPONENT.fullmatch(text) else yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {setting}: {text!r} is not a valid value") from None
        parsed.setdefault(section, {})[name] = value if not isinstance(value, bool) or name != "liger" else text
    return parsed
