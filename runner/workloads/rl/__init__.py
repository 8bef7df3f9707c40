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
_ACTOR, _ROLLOUT = "actor_rollout_ref", "actor_rollout_ref.rollout"
_GRPO: Mapping[str, object] = {
    **{f"{_ACTOR}.model.{key}": value for key, value in _MODEL.items()},
    f"{_ACTOR}.actor.use_torch_compile": False,
    f"{_ACTOR}.actor.fsdp_config.use_torch_compile": False,
    f"{_ACTOR}.ref.fsdp_config.use_torch_compile": False,
    f"{_ROLLOUT}.free_cache_engine": False,
    f"{_ROLLOUT}.load_format": "auto",
    # One process of each kind, where verl starts eight.
    f"{_ROLLOUT}.agent.num_workers": 1,
    "data.dataloader_num_workers": 0,
    "reward.num_workers": 1,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
}

# verl's settings that a CPU needs, beside those that follow from a profile: {program: {setting: value}}.
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "sft": {
        "engine.use_torch_compile": False,
        "data.use_dynamic_bsz": False,
        "data.num_workers": 0,
        **{f"model.{key}": value for key, value in _MODEL.items()},
    },
    "ppo": {
        **_GRPO,
        **{f"critic.model.{key}": value for key, value in _MODEL.items()},
        "critic.fsdp.use_torch_compile": False,
    },
    "grpo": _GRPO,
}
