"""What a user asks of a workflow, checked, and as each of verl's trainers is asked for it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from runner.errors import UsageError, unknown
from runner.launch.prepare import Options as RunOptions
from runner.launch.prepare import Selected
from runner.plan import config
from runner.workflow import verl_settings
from runner.workflow.parallelism import FSDP, MEGATRON, Split, split
from runner.workflow.prepare import Files
from runner.workflow.stages import Program, Stage, stages_of
from runner.workflow.translate import read, translate
from runner.workflow.verl import ALWAYS, OWN, PROFILES, TRAINERS, Profile, Training, trainer

PROFILE: Mapping[str, str] = {"cpu": "cpu-smoke", "cuda": "gpu-vllm"}  # of a device, where none is named

_VERL, _SLURM = "verl", "slurm"
_TIME, _JOIN = "timeout_s", "join_s"  # of a stage, and of one whose nodes are to join Ray
_LEAST_S, _MOST_S = 1, 365 * 86400  # below the one nothing has started; beyond the other neither Slurm nor a clock goes
_ON_CONTROLLER = (Program.PREPARE, Program.PUBLISH)  # without a time limit
_PARTS: Mapping[str, tuple[Program, ...]] = {"sft": (Program.SFT,), "rl": (Program.PPO, Program.GRPO)}


@dataclass(frozen=True)
class Options:
    """The options of `runner workflow NAME`, not checked yet.

    `run` says where it runs. `model` and `data` None: what the inventory can run; `rl_data` None: as `data`; `profile`
    None: that of the device. `stages` are names, empty for all. `settings` are `verl.KEY=VALUE`, `verl.sft.KEY=VALUE`,
    `verl.rl.KEY=VALUE`, `slurm.KEY=VALUE` or `STAGE.timeout_s=SECONDS`. `reward` is a file with `compute_score`,
    `publish` a target of `workflow.publish`, and `work` a folder that all nodes see (None: that of the runs). `track`
    are verl's names of where metrics go beside the console and files, and `project` is their project there (None: the
    workflow's name). `document` is the content of a file of `workflow.translate`, with its name.
    """

    workflow: str
    run: RunOptions
    model: str | None = None
    data: str | None = None
    rl_data: str | None = None
    profile: str | None = None
    stages: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    reward: str | None = None
    publish: str | None = None
    work: str | None = None
    track: tuple[str, ...] = ()
    project: str | None = None
    steps: int | None = None
    epochs: int | None = None
    data_parallel: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    rollout_tensor: int = 1
    document: Mapping[str, Any] | None = None
    document_name: str = ""


def refuse_unused(options: Options) -> None:
    """Raise UsageError for options that say nothing in this workflow, or each other's opposite."""
    if options.steps is not None and options.epochs is not None:
        raise UsageError("--steps and --epochs exclude each other: give one of them")
    of_rl = {
        "--rl-data": options.rl_data is not None,
        "--reward": options.reward is not None,
        "--rollout-tp": options.rollout_tensor != 1,
    }
    programs = {stage.program for stage in stages_of(options.workflow)}
    if (given := [option for option, value in of_rl.items() if value]) and not programs & {*_PARTS["rl"]}:
        raise UsageError(
            f"{', '.join(given)}: for PPO and GRPO, and workflow {options.workflow} has neither: leave out"
        )


def strategy(options: Options) -> str:
    """verl's strategy of training (`parallelism`): the one that has the parallelism that is asked for."""
    return MEGATRON if options.tensor_parallel * options.pipeline_parallel > 1 else FSDP


# --- settings --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The settings of `--set`: verl's by the program that they are for, Slurm's, the limits of stages in s, and values
    of targets by name.
    """

    verl: Mapping[Program, Mapping[str, Any]] = field(default_factory=dict)
    slurm: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    targets: Mapping[str, Any] = field(default_factory=dict)


def settings(texts: Iterable[str], workflow: str, strategy: str = FSDP) -> Settings:
    """The settings in `texts`; `verl.KEY` is for each trainer of the workflow that has it, with `strategy`.

    Raises UsageError for a section, key or value that there is not, with the nearest name.
    """
    stages = {stage.name: stage for stage in stages_of(workflow) if stage.program not in _ON_CONTROLLER}
    programs = [stage.program for stage in stages.values() if stage.program in TRAINERS]
    verl: dict[Program, dict[str, Any]] = {program: {} for program in programs}
    seconds: dict[str, dict[str, float]] = {}
    slurm: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise UsageError(f"--set {text}: write it as verl.KEY=VALUE, such as --set verl.data.train_batch_size=64")
        if section == _VERL:
            for program, setting in _of_verl(name, programs, workflow, strategy):
                used = trainer(program, strategy)
                leaves = used.leaves({setting: verl_settings.value_of(value)})
                _check(used, leaves)
                verl[program] |= leaves
        elif section == _SLURM:
            slurm |= config.parse_settings([text])[_SLURM]
        elif section == config.TARGETS:
            targets |= config.parse_settings([text])[section]
        elif section in stages:
            seconds.setdefault(section, {})[name] = _seconds(text, stages[section], name, value)
        else:
            raise unknown("section", section, [_VERL, _SLURM, config.TARGETS, *stages], f"--set {text}")
    return Settings(verl, slurm, seconds, targets)


def _of_verl(name: str, programs: Sequence[Program], workflow: str, strategy: str) -> list[tuple[Program, str]]:
    """The programs that a setting of verl is for, each with the setting's name. `sft.` and `rl.` name one of them."""
    part, dot, rest = name.partition(".")
    if dot and part in _PARTS:
        named = [program for program in programs if program in _PARTS[part]]
        if not named:
            others = " and ".join(program.value for program in programs)
            raise UsageError(f"--set verl.{name}: workflow {workflow} has no such trainer, only {others}")
        for program in named:
            trainer(program, strategy).place(rest, f"--set verl.{part}.")
        return [(program, rest) for program in named]
    found, errors = [], []
    for program in programs:
        try:
            trainer(program, strategy).place(name, "--set verl.")
            found.append((program, name))
        except UsageError as error:
            errors.append(error)
    if not found:
        raise errors[-1]
    return found


def _check(used: verl_settings.Trainer, leaves: Mapping[str, Any]) -> None:
    """Refuse values of another type, counts below 1, and a strategy that verl's chosen engine is not."""
    used.check(leaves)
    for key, value in leaves.items():
        if key in _COUNTS and not (value is None and key in _OPEN) and not (type(value) is int and value > 0):
            shown = verl_settings.literal(value, key)
            raise UsageError(f"--set verl.{key}: a whole number of at least 1 is needed, got {shown}")
        if key in _STRATEGIES and value not in _STRATEGIES_OF[used.engine]:
            known = " or ".join(_STRATEGIES_OF[used.engine])
            raise UsageError(f"--set verl.{key}={value}: --tp and --pp decide the training engine; here {known} works")


def _seconds(text: str, stage: Stage, name: str, value: str) -> float:
    known = [_TIME, *([_JOIN] if stage.program in _PARTS["rl"] else [])]
    if name not in known:
        raise unknown("setting", name, known, f"--set {text}")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not _LEAST_S <= seconds <= _MOST_S:
        raise UsageError(
            f"--set {text}: give the {name} of stage {stage.name} in seconds, from {_LEAST_S} to {_MOST_S} (a year)"
        )
    return seconds


# --- what a trainer is asked for -------------------------------------------------------------------------

# What a machine without GPUs does in seconds, with the tiny model and the arithmetic set.
_SMALL: Mapping[str, Any] = {
    "batch": 8, "steps": 2, "save_every": 1, "prompt_tokens": 96, "response_tokens": 32, "recompute": False, "group": 4,
}  # fmt: skip

# Settings of verl that others depend on -> the field of Training that decides all of these.
_BATCHES = {"data.train_batch_size": "batch", "trainer.total_training_steps": "steps", "trainer.total_epochs": "epochs"}
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_RL = {
    **_BATCHES,
    f"{_ACTOR}.ppo_mini_batch_size": "mini_batch",
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": "micro_batch",
    "data.max_prompt_length": "prompt_tokens",
    "data.max_response_length": "response_tokens",
}
_FIELDS: Mapping[Program, Mapping[str, str]] = {
    Program.SFT: {**_BATCHES, "data.micro_batch_size_per_gpu": "micro_batch"},
    Program.PPO: _RL,
    Program.GRPO: {**_RL, f"{_ROLLOUT}.n": "group"},
}
_ROLLOUT_TP, _ROLLOUT_PP = f"{_ROLLOUT}.tensor_model_parallel_size", f"{_ROLLOUT}.pipeline_model_parallel_size"
_COUNTS = {*_RL, *_FIELDS[Program.SFT], f"{_ROLLOUT}.n", _ROLLOUT_TP, _ROLLOUT_PP}
_OPEN = {"trainer.total_training_steps"}  # null: as many as the epochs have

_STRATEGIES = {"engine.strategy", f"{_ACTOR}.strategy", "actor_rollout_ref.ref.strategy", "critic.strategy"}
_STRATEGIES_OF = {"fsdp": (FSDP, "fsdp"), "megatron": (MEGATRON,)}


def profile(options: Options, device: str) -> str:
    """The name of the profile for nodes with this device. Raises UsageError for one that does not run there, and for
    GPUs without a model and data: what is tiny shows nothing there.
    """
    name = options.profile or PROFILE[device]
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    if PROFILES[name].device != device:
        fitting = [other for other, one in PROFILES.items() if one.device == device]
        raise UsageError(
            f"--profile {name} is for {PROFILES[name].device}, the inventory's nodes have {device}: "
            f"use {' or '.join(fitting)}"
        )
    given = {"--model": options.model, "--data": options.data}
    if device != "cpu" and (missing := [option for option, value in given.items() if value is None]):
        raise UsageError(
            f"on GPUs a workflow needs {' and '.join(missing)}: for example --model meta-llama/Llama-3.2-1B-Instruct "
            "--data gsm8k"
        )
    return name


def divided(options: Options, selected: Selected, found: Mapping[str, Any] | None = None) -> Split:
    """How the model is divided; `found` are verl's settings of the user. Raises UsageError as `parallelism.split`."""
    found = found or {}
    return split(
        max(selected.counts),
        selected.gpus,
        data=options.data_parallel,
        tensor=options.tensor_parallel,
        pipeline=options.pipeline_parallel,
        rollout_tensor=found.get(_ROLLOUT_TP, options.rollout_tensor),
        rollout_pipeline=found.get(_ROLLOUT_PP, 1),
    )


def training(
    program: Program,
    options: Options,
    selected: Selected,
    used: Profile,
    own: Mapping[str, Any],
    *,
    model: str,
    files: Files,
    folder: str,
    experiment: str,
    reward: str | None = None,
) -> Training:
    """What the trainer of `program` is asked for; `own` are the user's settings for it, and paths are the nodes'.

    Raises UsageError for parallelism that does not fit these nodes, and for what only Shakedown sets.
    """
    for key in own:
        if key in OWN:
            raise UsageError(f"verl.{key} is set by Shakedown: use {OWN[key]}")
    asked = replace(
        _before_settings(options, selected, used),
        model=model,
        train=str(files.train),
        val=str(files.val) if files.val else None,
        rows=files.rows,
        folder=folder,
        split=divided(options, selected, own),
        experiment=experiment,
        reward=reward,
    )
    fields = {name: own[key] for key, name in _FIELDS[program].items() if key in own}
    if "epochs" in fields and fields.setdefault("steps") is not None:
        both = "verl.trainer.total_epochs and verl.trainer.total_training_steps"
        raise UsageError(f"--set {both} exclude each other: give one of them")
    rest = {key: value for key, value in own.items() if key not in {*_FIELDS[program], _ROLLOUT_TP, _ROLLOUT_PP}}
    return replace(asked, **fields, settings=rest)


def _before_settings(options: Options, selected: Selected, used: Profile) -> Training:
    """What is asked for by options and the user's document, without paths."""
    start = _start(options, selected, used)
    if options.document is None:
        return start
    return translate(options.document, options.document_name, start).asked


def _start(options: Options, selected: Selected, used: Profile) -> Training:
    asked = Training(
        model=options.model or "",
        train="",
        val=None,
        folder="",
        nodes=max(selected.counts),
        gpus_per_node=selected.gpus,
        split=divided(options, selected),
        profile=used,
        project=options.project or options.workflow,
        loggers=(*ALWAYS, *options.track),
        experiment="",
    )
    if used.device == "cpu":
        asked = replace(asked, **_SMALL)
    if options.steps is not None or options.epochs is not None:
        asked = replace(asked, steps=options.steps, epochs=options.epochs or asked.epochs)
    return asked


def with_document(options: Options, values: Any, where: str) -> Options:
    """The options of a workflow that also asks for what a user's document says; `where` is its name.

    Raises UsageError for a document that is none, and for a model that both name.
    """
    document = read(values, where)
    if options.model is not None and document.model.path is not None:
        raise UsageError(f"--model {options.model} and model.path {document.model.path} of {where}: give one of them")
    return replace(
        options,
        model=document.model.path or options.model,
        data_parallel=document.parallelism.data_parallel_size,
        tensor_parallel=document.parallelism.tensor_parallel_size,
        pipeline_parallel=document.parallelism.pipeline_parallel_size,
        rollout_tensor=document.inference.tensor_parallel_size,
        document=values,
        document_name=where,
    )


def translated(
    options: Options, selected: Selected, used: Profile, own: Mapping[str, Any] = MappingProxyType({})
) -> tuple[str, ...]:
    """What became of each line of the user's document, and which of it the user's settings `own` have changed."""
    if options.document is None:
        return ()
    lines = []
    for line in translate(options.document, options.document_name, _start(options, selected, used)).lines:
        told = {word.partition("=")[0] for word in line.overrides}
        changed = [f"{key}={verl_settings.literal(own[key], key)}" for key in own if key in told]
        lines.append(f"{line}; but by --set {', '.join(changed)}" if changed else str(line))
    return tuple(lines)
