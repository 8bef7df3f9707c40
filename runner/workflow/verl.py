"""What verl's trainers are told: overrides of their Hydra configurations. Pure but for the file of verl's settings.

`verl_settings` knows which settings there are and writes them as words, and `workloads.rl` what a CPU needs beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any

from runner.errors import UsageError, unknown
from runner.system.wording import counted
from runner.workflow import verl_settings
from runner.workflow.parallelism import FSDP, MEGATRON, Split
from runner.workflow.stages import Program
from runner.workflow.verl_settings import Trainer
from runner.workloads import rl

Overrides = Mapping[str, Any]

# The trainer of verl that runs a program.
TRAINERS: Mapping[Program, str] = {Program.SFT: "sft", Program.PPO: "ppo", Program.GRPO: "ppo"}

# What Shakedown decides itself -> how a user asks for it.
OWN: Mapping[str, str] = {
    "trainer.nnodes": "--nodes",
    "trainer.n_gpus_per_node": "runner_gpus_per_node in the inventory",
    "trainer.default_local_dir": "--results",
    "trainer.resume_mode": "--resume RUN",
    "trainer.resume_from_path": "--resume RUN",
    "trainer.device": "runner_device in the inventory",
    "actor_rollout_ref.model.path": "--model",
    "critic.model.path": "--model",
    "model.path": "--model",
    "data.train_files": "--data",
    "data.val_files": "--data",
    "algorithm.adv_estimator": "`runner workflow ppo` or `grpo`",
    "actor_rollout_ref.rollout.name": "--profile",
    "reward.custom_reward_function.path": "--reward",
    "custom_reward_function.path": "--reward",
}


ALWAYS = ("console", "file")  # where verl writes metrics in any case: records are made of its file
LOGGERS = (*ALWAYS, "wandb", "tensorboard", "mlflow", "swanlab", "trackio", "clearml", "vemlp_wandb", "rl_insight")
_LOGGER = "trainer.logger"
_BATCH, _ACTOR = "data.train_batch_size", "actor_rollout_ref.actor"


@dataclass(frozen=True)
class Profile:
    """An environment in which verl runs: `rollout` is its engine of rollout, `strategies` are those of training that it
    has the packages for.
    """

    device: str
    rollout: str
    strategies: tuple[str, ...]


PROFILES: Mapping[str, Profile] = {
    "gpu-vllm": Profile("cuda", "vllm", (FSDP,)),
    "cpu-smoke": Profile("cpu", "hf", (FSDP,)),
}


KEEP = 2  # checkpoints of a stage: the newest, and the one before should that be damaged
MICRO = 4  # sequences that a GPU computes at a time, where nothing else is asked for


@dataclass(frozen=True)
class Training:
    """What a stage that trains is asked for.

    `model`, `train`, `val` and `folder` (of checkpoints) are paths that every node sees; lengths are in tokens, batches
    in sequences: `batch` of a step, `mini_batch` of an update (None: the whole step), `micro_batch` of a GPU (None: the
    largest up to MICRO that divides). `steps` None: `epochs` of the data. `group` is how many answers GRPO compares.
    `reward` is the path of a file with `compute_score`, None: the one that verl has for the data. `rows` are those to
    train on, None: not known yet.
    """

    model: str
    train: str
    val: str | None
    folder: str
    nodes: int
    gpus_per_node: int
    split: Split
    profile: Profile
    project: str
    experiment: str
    batch: int = 256
    mini_batch: int | None = None
    micro_batch: int | None = None
    steps: int | None = None
    epochs: int = 1
    save_every: int = 50
    keep: int = KEEP
    prompt_tokens: int = 512
    response_tokens: int = 512
    learning_rate: float | None = None
    group: int = 5
    reward: str | None = None
    rows: int | None = None
    loggers: tuple[str, ...] = ALWAYS
    timeout_s: int | None = None
    trust_remote_code: bool = False
    recompute: bool = True
    offload: bool = False
    reshard: bool = True  # also gather parameters again for the backward pass: ZeRO-3
    settings: Overrides = field(default_factory=dict)  # the user's, which come last


# --- trainers ------------------------------------------------------------------------------------------------


def trainer(program: Program, strategy: str) -> Trainer:
    """verl's trainer of `program` with its engine for `strategy` (`parallelism`)."""
    return verl_settings.trainer(TRAINERS[program], engine(strategy))


def engine(strategy: str) -> str:
    """verl's training engine of a strategy: it is what writes checkpoints, and what a merge must know."""
    return "megatron" if strategy == MEGATRON else "fsdp"


def overrides(program: Program, asked: Training) -> dict[str, Any]:
    """All overrides of the trainer of `program`, the user's last; those that choose its engine are among them.

    Raises UsageError where the profile has no strategy for the split, batches do not divide, or a setting is unknown,
    of another type, or not the user's to make.
    """
    asked = settled(program, asked)
    used = trainer(program, asked.split.strategy)
    given = used.leaves(asked.settings)
    for key in given:
        if key in OWN:
            raise UsageError(f"verl.{key} is set by Shakedown: use {OWN[key]}")
    used.overrides(given)
    made = _sft(asked) if program is Program.SFT else _rl(asked, program)
    device = rl.SETTINGS[program] if asked.profile.device == "cpu" else {}
    told = {**used.selected, **made, **device, **asked.settings}
    return {**told, _LOGGER: tuple(dict.fromkeys((*ALWAYS, *_loggers(told[_LOGGER]))))}


def _loggers(value: Any) -> list[str]:
    """The names of loggers in a setting's value: one, or a list of them."""
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else [str(value)]
    for name in names:
        if name not in LOGGERS:
            raise unknown("logger of verl", str(name), LOGGERS, f"--set verl.{_LOGGER}")
    return names


def words(program: Program, told: Overrides) -> list[str]:
    """Overrides of the trainer of `program` as words for Hydra, first those that choose its engine.

    Raises UsageError as `verl_settings.Trainer.overrides`.
    """
    used = next(one for one in map(partial(trainer, program), (MEGATRON, FSDP)) if one.selected.items() <= told.items())
    return used.overrides({key: value for key, value in told.items() if key not in used.selected})


def require_strategy(asked: Training) -> None:
    """Refuse a split that the profile has no strategy for; it is never made into something else."""
    if asked.split.strategy in asked.profile.strategies:
        return
    name = next((name for name, one in PROFILES.items() if one == asked.profile), "this profile")
    others = [name for name, one in PROFILES.items() if asked.split.strategy in one.strategies]
    where = f"use profile {' or '.join(others)}" if others else "no profile has it"
    raise UsageError(
        f"{asked.split} in training takes verl's strategy {asked.split.strategy}, which {name} has not: {where}, or "
        f"train with TP 1 × PP 1 (DP {asked.split.world_size}); tensor parallelism in rollout is a setting of its own"
    )


def settled(program: Program, asked: Training) -> Training:
    """A copy with the batches that were left open.

    Raises UsageError where the profile has no strategy for the split, the data do not fill one batch, or batches do not
    divide, with those that do.
    """
    require_strategy(asked)
    _require_rows(asked)
    ranks = asked.split.data
    into_ranks = counted(ranks, "data-parallel rank")
    if program is Program.SFT:
        _divides(asked.batch, ranks, "batch", into_ranks, _BATCH)
        return _with_micro(asked, asked.batch // ranks, "batch of a rank", "data.micro_batch_size_per_gpu")
    mini, answers = asked.mini_batch or asked.batch, asked.group if program is Program.GRPO else 1
    if mini > asked.batch:
        raise UsageError(f"mini_batch {mini} is larger than the batch {asked.batch} of a step")
    _divides(asked.batch, mini, "batch", f"mini batches of {mini}", _BATCH)
    of_answers = f", with {answers} answers each," if answers > 1 else ""
    what, key = ("batch", _BATCH) if asked.mini_batch is None else ("mini_batch", f"{_ACTOR}.ppo_mini_batch_size")
    _divides(mini, ranks // gcd(ranks, answers), what, into_ranks, key, of_answers)
    each = f"{what} × {answers} answers" if answers > 1 else what
    micro = f"{_ACTOR}.ppo_micro_batch_size_per_gpu"
    return _with_micro(replace(asked, mini_batch=mini), mini * answers // ranks, f"{each} of a rank", micro)


def _require_rows(asked: Training) -> None:
    """Refuse a batch that the data do not fill: verl would have no step to do, and ends with a division by zero."""
    if asked.rows is None or asked.batch <= asked.rows:
        return
    most = asked.rows - asked.rows % asked.split.data
    less = f"give --set verl.data.train_batch_size={most} at most, or more data" if most else "give more data"
    raise UsageError(f"batch {asked.batch} is more than the {counted(asked.rows, 'row')} to train on: {less}")


def _with_micro(asked: Training, each: int, what: str, key: str) -> Training:
    """A copy with a micro batch that divides the `each` sequences of a rank; `key` is verl's setting of it."""
    if asked.micro_batch is None:
        return replace(asked, micro_batch=next(size for size in range(MICRO, 0, -1) if each % size == 0))
    if each % asked.micro_batch:
        most = next(size for size in range(min(each, asked.micro_batch), 0, -1) if each % size == 0)
        raise UsageError(
            f"{what} {each} does not divide into micro batches of {asked.micro_batch}: "
            f"the largest below that does: {most} (verl.{key})"
        )
    return asked


def _divides(number: int, by: int, what: str, parts: str, key: str, more: str = "") -> None:
    """Refuse a `number` that `by` does not divide, with the nearest; `key` is verl's setting of the number."""
    if number % by:
        below, above = number // by * by, -(-number // by) * by
        near = " or ".join(str(one) for one in dict.fromkeys((below, above)) if one)
        raise UsageError(f"{what} {number}{more} does not divide into {parts}: nearest that does: {near} (verl.{key})")


def _trainer(asked: Training, *kept: str) -> dict[str, Any]:
    """`kept` are the names of the settings that say how many checkpoints are kept."""
    length = (
        {"total_epochs": asked.epochs}
        if asked.steps is None
        else {"total_epochs": 10**6, "total_training_steps": asked.steps}
    )
    return {
        f"trainer.{key}": value
        for key, value in {
            "nnodes": asked.nodes,
            "n_gpus_per_node": asked.gpus_per_node,
            "device": asked.profile.device,
            "project_name": asked.project,
            "experiment_name": asked.experiment,
            "logger": asked.loggers,
            "default_local_dir": asked.folder,
            "resume_mode": "auto",  # the last checkpoint in that folder, which is the run's own
            "save_freq": asked.save_every,
            **dict.fromkeys(kept, asked.keep),
            "test_freq": -1,
            **length,
        }.items()
    }


def _engine(prefix: str, asked: Training) -> dict[str, Any]:
    """How the model is divided, and what leaves the GPU: the settings of an engine that trains."""
    if asked.split.strategy == MEGATRON:
        return {
            f"{prefix}.tensor_model_parallel_size": asked.split.tensor,
            f"{prefix}.pipeline_model_parallel_size": asked.split.pipeline,
            f"{prefix}.param_offload": asked.offload,
            f"{prefix}.optimizer_offload": asked.offload,
            **(
                {
                    f"{prefix}.override_transformer_config.recompute_granularity": "full",
                    f"{prefix}.override_transformer_config.recompute_method": "uniform",
                    f"{prefix}.override_transformer_config.recompute_num_layers": 1,
                }
                if asked.recompute
                else {}
            ),
        }
    return {
        f"{prefix}.param_offload": asked.offload,
        f"{prefix}.optimizer_offload": asked.offload,
        f"{prefix}.reshard_after_forward": asked.reshard,
    }


def _sft(asked: Training) -> dict[str, Any]:
    fsdp = asked.split.strategy == FSDP
    tokens = asked.prompt_tokens + asked.response_tokens
    return {
        **({"engine.strategy": FSDP} if fsdp else {}),
        "data.train_files": asked.train,
        "data.val_files": asked.val,
        "data.train_batch_size": asked.batch,
        "data.micro_batch_size_per_gpu": asked.micro_batch,
        "data.max_length": tokens,
        "data.max_token_len_per_gpu": tokens * (asked.micro_batch or MICRO),
        "data.truncation": "error",
        "data.pad_mode": "no_padding",
        "model.path": asked.model,
        "model.trust_remote_code": asked.trust_remote_code,
        "model.enable_gradient_checkpointing": asked.recompute,
        **_engine("engine", asked),
        "optim.lr": 1e-5 if asked.learning_rate is None else asked.learning_rate,
        **_trainer(asked, "max_ckpt_to_keep"),
    }


def _rl(asked: Training, program: Program) -> dict[str, Any]:
    megatron = asked.split.strategy == MEGATRON
    critic = program is Program.PPO
    actor, rollout, micro = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", asked.micro_batch
    made: dict[str, Any] = {
        "algorithm.adv_estimator": "gae" if critic else "grpo",
        "data.train_files": asked.train,
        "data.val_files": asked.val or asked.train,
        "data.train_batch_size": asked.batch,
        "data.max_prompt_length": asked.prompt_tokens,
        "data.max_response_length": asked.response_tokens,
        "data.filter_overlong_prompts": True,
        "data.truncation": "error",
        "data.trust_remote_code": asked.trust_remote_code,
        "actor_rollout_ref.model.path": asked.model,
        "actor_rollout_ref.model.trust_remote_code": asked.trust_remote_code,
        "actor_rollout_ref.model.enable_gradient_checkpointing": asked.recompute,
        f"{actor}.strategy": asked.split.strategy,
        f"{actor}.optim.lr": 1e-6 if asked.learning_rate is None else asked.learning_rate,
        f"{actor}.ppo_mini_batch_size": asked.mini_batch,
        f"{actor}.ppo_micro_batch_size_per_gpu": micro,
        **_engine(f"{actor}.{'megatron' if megatron else 'fsdp_config'}", asked),
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": micro,
        **_reference(asked),
        f"{rollout}.name": asked.profile.rollout,
        f"{rollout}.n": 1 if critic else asked.group,
        f"{rollout}.tensor_model_parallel_size": asked.split.rollout_tensor,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": micro,
    }
    if critic:  # the reference's distance is a part of the reward
        made |= {
            "algorithm.use_kl_in_reward": True,
            "critic.model.path": asked.model,
            "critic.model.trust_remote_code": asked.trust_remote_code,
            "critic.model.enable_gradient_checkpointing": asked.recompute,
            "critic.strategy": asked.split.strategy,
            "critic.optim.lr": 1e-5,
            "critic.ppo_micro_batch_size_per_gpu": micro,
            **_engine(f"critic.{'megatron' if megatron else 'fsdp'}", asked),
        }
    else:  # it is a part of the loss
        made |= {f"{actor}.use_kl_loss": True, f"{actor}.kl_loss_type": "low_var_kl"}
    if asked.reward is not None:
        made |= {"reward.custom_reward_function.path": asked.reward}
    if asked.timeout_s is not None:
        made |= {"actor_rollout_ref.nccl_timeout": asked.timeout_s}
    return {
        **made,
        **_trainer(asked, "max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep"),
        "trainer.val_before_train": False,
    }


def _reference(asked: Training) -> dict[str, Any]:
    """The reference only computes: it is divided as the actor is, and has no state of an optimizer."""
    if asked.split.strategy == MEGATRON:
        prefix = "actor_rollout_ref.ref.megatron"
        return {
            f"{prefix}.tensor_model_parallel_size": asked.split.tensor,
            f"{prefix}.pipeline_model_parallel_size": asked.split.pipeline,
            f"{prefix}.param_offload": asked.offload,
        }
    return {"actor_rollout_ref.ref.fsdp_config.param_offload": asked.offload}
