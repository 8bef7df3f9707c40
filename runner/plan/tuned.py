"""Which settings tuning may change, what holds each of them, and what tuning found applied to a request. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runner.errors import UsageError
from runner.plan.plan import Batch
from runner.plan.request import Request
from runner.plan.speed import Rate
from runner.results.tuned import Subject, Tuned, architecture
from runner.system.schema import check
from runner.system.wording import counted
from runner.workloads.registry import TESTS

SECTION = next(name for name, test in TESTS.items() if test.trains)
FILE = "deepspeed"  # the section of --set for the DeepSpeed configuration
_ZERO = f"{FILE}.zero_optimization"
MICRO_BATCH, ACCUMULATION = f"{SECTION}.micro_batch", f"{SECTION}.gradient_accumulation"
RECOMPUTE, COMPILE, PRECISION = f"{SECTION}.recompute", f"{SECTION}.compile", f"{SECTION}.precision"
STAGE, HPZ = f"{_ZERO}.stage", f"{_ZERO}.zero_hpz_partition_size"
QUANTIZED = f"{_ZERO}.zero_quantized_weights"
REDUCE_BUCKET, PREFETCH_BUCKET = f"{_ZERO}.reduce_bucket_size", f"{_ZERO}.stage3_prefetch_bucket_size"
DEEPCOMPILE = f"{FILE}.compile.deepcompile"
TUNABLE = (MICRO_BATCH, ACCUMULATION, RECOMPUTE, COMPILE, STAGE, REDUCE_BUCKET, PREFETCH_BUCKET, HPZ, QUANTIZED,
           DEEPCOMPILE, PRECISION)  # fmt: skip

_OF_FILE = {MICRO_BATCH: "train_micro_batch_size_per_gpu", ACCUMULATION: "gradient_accumulation_steps"}
# What does not change which settings are the fastest. Lengths are a field of the subject.
_NEUTRAL = {"steps", "warmup_steps", "lr", "dataset", "tokenizer", "samples", "seq_len", "global_batch", "timeout_s"}
_NEUTRAL_OF_FILE = {"train_batch_size", *_OF_FILE.values(), "gradient_clipping", "steps_per_print", "scheduler"}
_NEUTRAL_OF_OPTIMIZER = {"lr", "betas", "eps", "weight_decay"}


def subject(request: Request) -> Subject | None:
    """What the settings of `request` are tuned for: its largest number of nodes; None where it trains nothing."""
    params = request.tests.get(SECTION)
    if params is None:
        return None
    # Precision is not a setting to be left open: which one was asked for decides what is comparable.
    names = {f"{SECTION}.{name}": name for name in params if name not in _NEUTRAL}
    most = max(request.node_counts)
    return Subject(
        model=request.model["name"],
        architecture=architecture(request.model),
        hardware=request.hardware["name"],
        device=request.device,
        num_nodes=most,
        world_size=most * request.gpus_per_node,
        seq_len=params["seq_len"] or request.model["seq_len"],
        given={key: params[name] for key, name in names.items() if key == PRECISION or key not in TUNABLE},
        training=_training(request.deepspeed),
    )


def held(
    overrides: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    where: str,
    shipped: bool,
) -> dict[str, str]:
    """The tunable settings that are decided already, each with what decides it.

    `overrides` are those of --set by section, `params` and `config` the contents of the test's file and of the
    DeepSpeed configuration, `where`, without them. The numbers of a `shipped` configuration are the product's defaults
    and hold nothing; those of a user's own do.
    """
    found = {}
    for key in TUNABLE:
        section, _, name = key.partition(".")
        if _given(overrides.get(section, {}), name) or _given(overrides.get(FILE, {}), _OF_FILE.get(key, "")):
            found[key] = "--set"
        elif section == SECTION and params.get(name) not in (None, "auto", False):
            found[key] = f"configs/tests/{SECTION}.yaml"
        elif not shipped and _value(config, _OF_FILE.get(key) or (name if section == FILE else "")) not in (
            None,
            "auto",
        ):
            found[key] = where
    for one, other in ((MICRO_BATCH, ACCUMULATION), (ACCUMULATION, MICRO_BATCH)):
        if one in found:  # the other follows, since the global batch is kept
            found.setdefault(other, f"{one} of {found[one]}")
    return found


def _given(overrides: Mapping[str, Any], name: str) -> bool:
    """Whether `name`, a dotted key, or a section around it has a value among `overrides`."""
    return bool(name) and any(
        value not in (None, "auto") and (name == key or name.startswith(f"{key}.")) for key, value in overrides.items()
    )


def apply(request: Request, found: Tuned, holds: Mapping[str, str], batch: Batch) -> Request:
    """`request` with the settings of `found` where nothing in `holds` decides them; its global batch stays.

    `batch` is that of the largest number of nodes without them. What is used and what is not, with the reason, is in
    the field `tuned` of the result. Raises UsageError for a setting that tuning does not change, or another value.
    """
    _refuse(found.settings, request.tests[SECTION])
    used: dict[str, Any] = {}
    left: dict[str, str] = {}
    for key, value in found.settings.items():
        if key in holds:
            left[f"{key}={_text(value)}"] = holds[key]
        elif key not in (MICRO_BATCH, ACCUMULATION):
            used[key] = value
    micro, sequences = found.settings.get(MICRO_BATCH), batch.micro_batch * batch.gradient_accumulation
    if micro and MICRO_BATCH not in holds:
        if sequences % micro:
            left[f"{MICRO_BATCH}={micro}"] = f"it does not divide {counted(sequences, 'sequence')} a GPU and step"
        else:
            used = {MICRO_BATCH: micro, ACCUMULATION: sequences // micro, **used}
    params, config = dict(request.tests[SECTION]), dict(request.deepspeed)
    for key, value in used.items():
        section, _, name = key.partition(".")
        if section == SECTION:
            params[name] = value
        else:
            config = _with(config, name.split("."), value)
    if request.scaling != "weak" and len(request.node_counts) > 1 and ACCUMULATION in used:
        params[ACCUMULATION.partition(".")[2]] = None  # it differs from one number of nodes to the next
        config[_OF_FILE[ACCUMULATION]] = "auto"
        del used[ACCUMULATION]
    return replace(
        request,
        tests={**request.tests, SECTION: params},
        deepspeed=config,
        tuned={
            "created": found.created,
            "command": found.command,
            "digest": found.subject.digest,
            "settings": used,
            "overridden": left,
            "tokens_per_s_per_gpu": found.tokens_per_s_per_gpu,
            "matmul_tflop_per_s": found.matmul_tflop_per_s,
            "versions": dict(found.versions),
        },
    )


def chosen(request: Request) -> str:
    """What tuning has decided in `request`, with the day on which it was found; empty for nothing."""
    if request.tuned is None or not request.tuned["settings"]:
        return ""
    return f"{named(request.tuned['settings'])}: found by runner tune on {request.tuned['created'][:10]}"


def _refuse(settings: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    if strange := [key for key in settings if key not in TUNABLE]:
        raise UsageError(f"it has {strange[0]}, which runner tune does not change")
    given = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{SECTION}.")}
    check(TESTS[SECTION].load_settings(), {**params, **given}, SECTION)


def rates(found: Tuned, request: Request) -> tuple[Rate, ...]:
    """What the probes of a result have measured, those with the compiler and the precision of `request` alone; of a
    micro-batch, recompute and stage the best.
    """
    params = request.tests[SECTION]
    best: dict[tuple[int, str, int], float] = {}
    for probe in found.probes:
        same = probe.settings.get(COMPILE, False) == params["compile"] and probe.settings.get(
            PRECISION, found.subject.given.get(PRECISION)
        ) == params.get(PRECISION.partition(".")[2])
        if same and probe.positions_per_s_per_gpu and {MICRO_BATCH, RECOMPUTE, STAGE} <= probe.settings.keys():
            key = (probe.settings[MICRO_BATCH], probe.settings[RECOMPUTE], probe.settings[STAGE])
            best[key] = max(best.get(key, 0.0), probe.positions_per_s_per_gpu)
    source = f"measured by runner tune on {found.date}"
    return tuple(Rate(*key, rate, source) for key, rate in best.items())


def typed(settings: Mapping[str, Any]) -> str:
    """Settings as options: `--set sft.micro_batch=4 --set …`."""
    return " ".join(f"--set {key}={_text(value)}" for key, value in settings.items())


def named(settings: Mapping[str, Any]) -> str:
    """Settings in a line: `sft.micro_batch=4 sft.recompute=none`."""
    return " ".join(f"{key}={_text(value)}" for key, value in settings.items())


def short(settings: Mapping[str, Any]) -> str:
    """Settings in a line without their sections: `micro_batch=4 recompute=none stage=3`."""
    return named({key.rpartition(".")[2]: value for key, value in settings.items()})


def value_in(config: Mapping[str, Any], key: str) -> Any:
    """The value of a tunable setting of the section FILE in a DeepSpeed configuration; None where it is absent."""
    return _value(config, key.partition(".")[2])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _with(config: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    inner = config.get(first)
    return {**config, first: _with(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def _training(config: Mapping[str, Any]) -> str:
    """A digest of what speed depends on in a DeepSpeed configuration and tuning does not change."""
    rest = {key: value for key, value in config.items() if key not in _NEUTRAL_OF_FILE}
    optimizer = rest.get("optimizer")
    if isinstance(optimizer, Mapping) and isinstance(params := optimizer.get("params"), Mapping):
        kept = {key: value for key, value in params.items() if key not in _NEUTRAL_OF_OPTIMIZER}
        rest["optimizer"] = {**optimizer, "params": kept}
    tunable = {key.partition(".")[2] for key in TUNABLE if key.startswith(f"{FILE}.")}

    def fixed(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found = {}
        for key, value in section.items():
            if f"{prefix}{key}" not in tunable:
                inner = fixed(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
                if inner != {}:
                    found[key] = inner
        return found

    return hashlib.sha256(json.dumps(fixed(rest, ""), sort_keys=True, default=str).encode()).hexdigest()[:16]
