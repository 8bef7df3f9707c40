"""A DeepSpeed configuration judged by DeepSpeed itself, before a node is used.

DeepSpeed takes seconds to import, with torch: it judges in a process of its own (`python -m
runner.workloads.deepspeed_config`), only where the configuration is not one that comes with the product, and once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.system import process
from runner.system.files import write_json_atomic

# DeepSpeed judges a single rank: the batch is the planner's matter, which has judged it already.
_BATCH = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
_TIMEOUT_S = 120.0
# The sections whose keys DeepSpeed's models judge, or whoever is called with them, although some are asked for as well.
_JUDGED_OTHERWISE = ("zero_optimization.", "optimizer.params.", "scheduler.params.")
# The digests of the files of configs/deepspeed as they come with the product, which a test judges.
SHIPPED = frozenset(
    {"9607932257a1e2af", "284e78152f39705f", "85b334eb56e9f5d8", "1ee8830d2f690e96", "7f50839004cb9f4d"}
)
_SHOWN = 12
_ABSENT = "DeepSpeed is not installed"


def refuse(config: Mapping[str, Any], where: str, cache: Path | None = None) -> None:
    """Raise UsageError of one line for what DeepSpeed would refuse in `config`, or ignore; `where` names it.

    Verdicts are kept in the folder `cache`. Where the controller has no DeepSpeed, ranks judge it.
    """
    text = json.dumps({**config, **_BATCH}, sort_keys=True, default=str)
    if digest(config) in SHIPPED:
        return
    kept = cache / f"{digest(config)}-{_judge()}.json" if cache else None
    verdict = None
    if kept is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            verdict = str(json.loads(kept.read_text())["verdict"])
    if verdict is None:
        argv = [sys.executable, "-P", "-m", "runner.workloads.deepspeed_config", text]
        outcome = process.run(argv, timeout_s=_TIMEOUT_S)
        if outcome.rc != 0 or not outcome.stdout.strip():
            raise UsageError(f"{where}: DeepSpeed does not read it: {outcome.last_line}")
        verdict = str(json.loads(outcome.stdout.splitlines()[-1])["verdict"])
        if verdict == _ABSENT:
            return
        if kept is not None:
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json_atomic(kept, {"verdict": verdict})
    if verdict:
        raise UsageError(f"{where}: {verdict}")


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The section `name` of a DeepSpeed configuration, empty where it is not there or no section."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def split(config: Mapping[str, Any]) -> int:
    """The number of ranks that share each layer, and so the same data, by AutoTP; 1 without."""
    return int(section(config, "tensor_parallel").get("autotp_size") or 1)


def unresolved(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a DeepSpeed configuration whose value is still "auto"."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from unresolved(value, f"{prefix}{key}.")
        elif value == "auto" or (isinstance(value, list) and "auto" in value):
            yield prefix + key


def digest(config: Mapping[str, Any]) -> str:
    """What a configuration is known by, whatever its batch."""
    text = json.dumps({**config, **_BATCH}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _judge() -> str:
    """What a verdict depends on besides the configuration: DeepSpeed's version, and what is asked here."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        version = "none"
    return hashlib.sha256(version.encode() + Path(__file__).read_bytes()).hexdigest()[:16]


# --- in the process that imports DeepSpeed ---------------------------------------------------------


class _Section(dict[str, Any]):
    """A section that remembers which of its keys were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: _Section(v) if isinstance(v, Mapping) else v for k, v in values.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        """The keys; whether one is among them counts as asking for it."""
        return _Keys(self)

    def __copy__(self) -> _Section:
        return self


class _Keys:
    def __init__(self, section: _Section) -> None:
        self._section = section

    def __contains__(self, key: object) -> bool:
        return key in self._section

    def __iter__(self) -> Iterator[str]:
        return iter(self._section)

    def __len__(self) -> int:
        return len(self._section)


def _verdict(config: Mapping[str, Any]) -> str:
    """What is wrong with `config` in one line; "" for nothing."""
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
    except ImportError:
        return _ABSENT
    from pydantic import ValidationError

    read = _Section(config)
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        return _of_model(error, config)
    except KeyError as error:
        return f"{error.args[0]} is missing"
    except Exception as error:  # assertions, and types of its own
        if type(error) in (AttributeError, TypeError) and (key := _blamed(config)):
            return f"{key} is {json.dumps(config[key])}: DeepSpeed expects another kind of value there, or none"
        return _one_line(str(error))
    judges = (_untyped, lambda _: _unread(read), _texts, _lacking, _parameters)
    return next((fault for judge in judges for fault in judge(config)), "")


def _blamed(config: Mapping[str, Any]) -> str | None:
    """The key without which DeepSpeed would read the configuration."""
    from deepspeed.runtime.config import DeepSpeedConfig

    for key in config:
        with contextlib.suppress(Exception):
            DeepSpeedConfig({name: value for name, value in config.items() if name != key})
            return key
    return None


def _one_line(text: str) -> str:
    return text.strip().splitlines()[0].removeprefix("DeepSpeedConfig: ").rstrip(". ") if text.strip() else "not valid"


def _unknown(path: str, known: Any) -> str:
    name = path.rpartition(".")[2]
    near = difflib.get_close_matches(name, sorted(known), 1, 0.6)
    few = sorted(known) if len(known) <= _SHOWN else []
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(few)}" if few else ""
    return f"DeepSpeed knows no {path}{hint}"


def _of_model(error: Any, config: Mapping[str, Any]) -> str:
    """The first error of one of DeepSpeed's pydantic models, with the key's full path."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    # A model knows the path below its section, which is the one that has it.
    section = next((name for name, value in config.items() if _has(value, path)), None)
    full = ".".join([*([section] if section else []), *path])
    if first["type"] == "extra_forbidden":
        return _unknown(full, _fields(error.title, path[:-1]))
    return f"{full}: {first['msg'].removeprefix('Value error, ').removeprefix('Assertion failed, ')}"


def _has(value: Any, path: list[str]) -> bool:
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return bool(path)


def _fields(model: str, path: list[str]) -> set[str]:
    """The fields of the model at `path` below the one that is called `model`."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from pydantic import BaseModel

    classes: dict[str, Any] = {each.__name__: each for each in _subclasses(DeepSpeedConfigModel)}
    found: type[BaseModel] | None = classes.get(model)
    for part in path:
        annotation = found.model_fields[part].annotation if found and part in found.model_fields else None
        inner = [kind for kind in (annotation, *getattr(annotation, "__args__", ())) if isinstance(kind, type)]
        found = next((kind for kind in inner if issubclass(kind, BaseModel)), None)
    return set(found.model_fields) if found else set()


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    each: type[Any]
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _unread(section: _Section, prefix: str = "") -> Iterator[str]:
    """The keys that DeepSpeed did not ask for, where it asks key by key; its models have judged the other sections."""
    if section.asked and prefix not in _JUDGED_OTHERWISE:
        for key in dict.keys(section) - section.asked:
            yield _unknown(prefix + key, section.asked)
    for key, value in section.items():
        if isinstance(value, _Section):
            yield from _unread(value, f"{prefix}{key}.")


def _untyped(config: Mapping[str, Any]) -> Iterator[str]:
    """The optimizer and the scheduler without a type, of which DeepSpeed would read nothing."""
    for name in ("optimizer", "scheduler"):
        section = config.get(name)
        if isinstance(section, Mapping) and section and section.get("type") is None:
            yield f"{name}.type is missing"


def _texts(config: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that are texts, where no model of DeepSpeed turns them into numbers."""
    from deepspeed.runtime.config import DeepSpeedConfig

    defaults = vars(DeepSpeedConfig(dict(_BATCH)))
    found = {key: value for key, value in config.items() if isinstance(defaults.get(key), int | float)}
    for name in ("optimizer", "scheduler"):
        params = (config.get(name) or {}).get("params") or {}
        found |= {f"{name}.params.{key}": value for key, value in params.items() if _is_number(value)}
    for path, value in found.items():
        if isinstance(value, str):
            yield f"{path} is the text {value!r}: write it without quotes, as 0.0001 or true"


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (ValueError, TypeError):
        return False
    return True


def _lacking(config: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed asserts only once ranks run."""
    from deepspeed.runtime.config import DtypeEnum

    types = config.get("data_types")
    for key, value in (types if isinstance(types, Mapping) else {}).items():
        if key.endswith("_dtype") and value is not None:
            try:
                DtypeEnum(value)
            except ValueError:
                known = ", ".join(kind.name for kind in DtypeEnum)
                yield f"data_types.{key} {value!r} is none of DeepSpeed's types: {known}"
    zero = config.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return
    stage = int(zero.get("stage", 0))
    for name, least in (("offload_param", 3), ("offload_optimizer", 1)):
        offload = zero.get(name)
        offload = offload if isinstance(offload, Mapping) else {}
        device = offload.get("device", "none")
        least = 3 if device == "nvme" else least
        if device == "nvme" and not offload.get("nvme_path"):
            yield f"zero_optimization.{name} goes to nvme without a path: set zero_optimization.{name}.nvme_path"
        if device != "none" and stage < least:
            yield f"zero_optimization.{name} to {device} needs zero_optimization.stage {least} or more, it is {stage}"


def _parameters(config: Mapping[str, Any]) -> Iterator[str]:
    """Wrong names and keys of the optimizer and the scheduler, which are called with them."""
    import torch
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime import lr_schedules
    from torch import nn, optim

    optimizer = config.get("optimizer")
    if isinstance(optimizer, Mapping) and optimizer:
        kind, params = str(optimizer["type"]), optimizer.get("params") or {}
        known = {*runtime.DEEPSPEED_OPTIMIZERS, *(name for name in vars(optim) if name[0].isupper())}
        if kind not in known and kind.lower() not in known:
            yield f"optimizer.type {kind!r}: " + _unknown(kind, known)
        elif "max_grad_norm" in params:
            yield "optimizer.params.max_grad_norm is not supported by DeepSpeed: set gradient_clipping"
        elif names := _of_optimizer(kind):
            yield from _called_with(optimizer, "optimizer", names)
            yield from _refused("optimizer", _of_torch(kind), [nn.Parameter(torch.zeros(1))], params)
    scheduler = config.get("scheduler")
    if isinstance(scheduler, Mapping) and scheduler:
        kinds = lr_schedules.VALID_LR_SCHEDULES
        if scheduler["type"] not in kinds:
            yield f"scheduler.type {scheduler['type']!r}: " + _unknown(str(scheduler["type"]), kinds)
        else:
            schedule = getattr(lr_schedules, scheduler["type"])
            yield from _called_with(scheduler, "scheduler", _names(schedule) - {"optimizer"})
            needed = _needed(schedule) - {"optimizer"} - set(scheduler.get("params") or {})
            yield from (f"scheduler.params.{name} is missing" for name in sorted(needed))
            of = optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
            yield from _refused("scheduler", schedule, of, scheduler.get("params") or {})


def _of_torch(kind: str) -> Any:
    """torch's optimizer of that name, however it is written; None: there is none, or DeepSpeed has another."""
    from torch import optim

    named = {name.lower(): each for name, each in vars(optim).items() if name[0].isupper()}
    return named.get(kind.lower()) if kind.lower() != "muon" else None


def _refused(name: str, kind: Any, first: Any, params: Mapping[str, Any]) -> Iterator[str]:
    """What a class says of the values among `params` that it takes."""
    if kind is not None:
        try:
            kind(first, **{key: value for key, value in params.items() if key in _names(kind)})
        except (ValueError, TypeError, IndexError) as error:  # others may be this machine's, not the values'
            yield f"{name}.params: {_one_line(str(error))}"


def _of_optimizer(kind: str) -> set[str]:
    """The parameters of an optimizer, which is DeepSpeed's own where it has one of that name; none: not known."""
    from deepspeed.ops import adagrad, adam, lamb, lion
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch import optim

    of_adam = (optim.Adam, optim.AdamW, adam.FusedAdam, adam.DeepSpeedCPUAdam)
    own = {
        "adam": of_adam,
        "adamw": of_adam,
        "adagrad": (optim.Adagrad, adagrad.DeepSpeedCPUAdagrad),
        "lamb": (lamb.FusedLamb,),
        "lion": (lion.FusedLion, lion.DeepSpeedCPULion),
    }
    flags = {"torch_adam", "adam_w_mode"}
    if kind.lower() not in runtime.DEEPSPEED_OPTIMIZERS:
        names = _names(getattr(optim, kind))
    elif kind.lower() == "muon":  # its parameters go to two optimizers
        halves = [getattr(DeepSpeedEngine, keys, ()) for keys in ("_MUON_HALF_KEYS", "_ADAM_HALF_KEYS")]
        names = {*halves[0], *halves[1], "muon_lr", "adam_lr", *flags} if all(halves) else set()
    else:
        names = _names(*own.get(kind.lower(), ()))
        names |= flags if kind.lower() in ("adam", "adamw") else set()
    return names - {"params", "model_params"}


def _names(*callables: Any) -> set[str]:
    return {name for each in callables for name in inspect.signature(each.__init__).parameters} - {"self"}


def _needed(kind: Any) -> set[str]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {one.name for one in parameters if one.default is one.empty} - {"self"}


def _called_with(section: Mapping[str, Any], name: str, known: set[str]) -> Iterator[str]:
    for key in section.get("params") or {}:
        if key not in known:
            yield _unknown(f"{name}.params.{key}", known)


def sections() -> set[str]:
    """The sections that the installed DeepSpeed asks for; imports it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read = _Section(_BATCH)
    DeepSpeedConfig(read)
    return {key for key in read.asked if re.fullmatch(r"[a-z_0-9]+", key)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout
        found = _verdict(json.loads(sys.argv[1]))
    print(json.dumps({"verdict": found}))
