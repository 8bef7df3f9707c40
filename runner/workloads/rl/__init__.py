"""verl on machines without a GPU, for smoke tests: what the profile `cpu-smoke` adds, through verl's own hooks.

Nothing of verl is edited. `ENVIRONMENT` makes verl import `runner.workloads.rl.cpu` wherever verl itself is imported;
without it these modules are never loaded, and on GPUs nobody sets it. They touch verl's interior, so they are written
for the version `VERL` alone and refuse any other. No torch, Ray or verl is imported here: the planner reads this.
"""

from __future__ import annotations

from collections.abc import Mapping

VERL = "0.9.1"

# For every process of a job: the driver, Ray's nodes, and torchrun's ranks.
ENVIRONMENT: Mapping[str, str] = {
    "VERL_USE_EXTERNAL_MODULES": "runner.workloads.rl.cpu",
    "VERL_PLATFORM": "cpu",
    # The FSDP engines are registered for "cuda" alone, and are found by these two, which verl itself reads.
    "VERL_ENGINE_DEVICE": "cuda",
    "VERL_ENGINE_VENDOR": "nvidia",
}

# verl counts the GPUs that Ray offers, so that each rank on a CPU takes one that `ray start --num-gpus` only declares.
# Without a kernel for packed samples attention is `eager`, with padding removed by nobody.
_MODEL = {"use_remove_padding": False, "override_config.attn_implementation": "eager"}
_ACTOR = "actor_rollout_ref"

# verl's settings without which a trainer does not start on a CPU: {trainer: {setting: value}}.
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "sft": {
        "trainer.device": "cpu",
        "engine.strategy": "fsdp2",
        "engine.use_torch_compile": False,
        "data.pad_mode": "no_padding",
        "data.use_dynamic_bsz": False,
        **{f"model.{key}": value for key, value in _MODEL.items()},
    },
    "ppo": {
        "trainer.device": "cpu",
        **{f"{model}.{key}": value for model in (f"{_ACTOR}.model", "critic.model") for key, value in _MODEL.items()},
        f"{_ACTOR}.actor.strategy": "fsdp2",
        f"{_ACTOR}.actor.use_torch_compile": False,
        f"{_ACTOR}.actor.fsdp_config.use_torch_compile": False,
        f"{_ACTOR}.ref.fsdp_config.use_torch_compile": False,
        "critic.strategy": "fsdp2",
        "critic.fsdp.use_torch_compile": False,
        f"{_ACTOR}.rollout.name": "hf",
        f"{_ACTOR}.rollout.tensor_model_parallel_size": 1,
        f"{_ACTOR}.rollout.free_cache_engine": False,
        f"{_ACTOR}.rollout.load_format": "auto",
    },
}
