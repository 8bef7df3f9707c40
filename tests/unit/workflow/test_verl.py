"""What verl is told, as goldens, and what is refused before it would be told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden_files import check
from runner.errors import UsageError
from runner.workflow.parallelism import FSDP, MEGATRON, Split, split
from runner.workflow.stages import Program
from runner.workflow.verl import PROFILES, Profile, Training, overrides, trainer, words
from runner.workloads import rl

GPU, CPU = PROFILES["gpu-vllm"], PROFILES["cpu-smoke"]
BOTH = Profile("cuda", "vllm", (FSDP, MEGATRON))

ON_GPUS = Training(
    model="/data/models/llama-3.2-1b-instruct", train="/data/gsm8k/train.parquet", val="/data/gsm8k/test.parquet",
    folder="/runs/r1/checkpoints", nodes=2, gpus_per_node=8, split=split(2, 8, rollout_tensor=2), profile=GPU,
    project="gsm8k", experiment="r1", batch=256, mini_batch=64, micro_batch=4, steps=100,
)  # fmt: skip
ON_CPUS = replace(
    ON_GPUS, gpus_per_node=1, split=split(2, 1), profile=CPU, batch=8, mini_batch=4, micro_batch=2, prompt_tokens=64,
    response_tokens=24, steps=2, save_every=2, recompute=False,
)  # fmt: skip
ON_MEGATRON = replace(ON_GPUS, split=split(2, 8, tensor=4, pipeline=2, rollout_tensor=4), profile=BOTH, offload=True)


@pytest.mark.parametrize("program", [Program.SFT, Program.PPO, Program.GRPO])
@pytest.mark.parametrize(("name", "asked"), [("gpu", ON_GPUS), ("cpu", ON_CPUS), ("megatron", ON_MEGATRON)])
def test_what_a_trainer_is_told(program, name, asked):
    asked = replace(asked, group=4)
    module = trainer(program, asked.split.strategy).module
    told = ["/opt/shakedown/env/bin/python", "-m", module, *words(program, overrides(program, asked))]
    check(f"workflow/{program}-{name}.txt", "\n".join(told) + "\n")


def test_only_ppo_has_a_critic_and_only_grpo_has_groups():
    ppo, grpo = overrides(Program.PPO, ON_GPUS), overrides(Program.GRPO, ON_GPUS)
    assert [key for key in grpo if key.startswith("critic.")] == []
    assert ppo["critic.model.path"] == ppo["actor_rollout_ref.model.path"]
    assert (ppo["actor_rollout_ref.rollout.n"], grpo["actor_rollout_ref.rollout.n"]) == (1, 5)
    assert ppo["algorithm.use_kl_in_reward"], "else verl would load no reference"
    assert grpo["actor_rollout_ref.actor.use_kl_loss"], "else verl would load no reference"


# --- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [Program.SFT, Program.PPO, Program.GRPO])
def test_tensor_parallelism_in_training_is_refused_by_a_profile_without_megatron_and_never_made_into_rollouts(program):
    asked = replace(ON_GPUS, split=split(2, 8, tensor=2))
    with pytest.raises(UsageError) as refused:
        overrides(program, asked)
    assert str(refused.value) == (
        "DP 8 × TP 2 × PP 1 in training takes verl's strategy megatron, which gpu-vllm has not: no profile has it, or "
        "train with TP 1 × PP 1 (DP 16); tensor parallelism in rollout is a setting of its own"
    )
    told = overrides(program, replace(asked, profile=BOTH))
    prefix = "engine" if program is Program.SFT else "actor_rollout_ref.actor.megatron"
    assert told[f"{prefix}.tensor_model_parallel_size"] == 2
    assert told.get("actor_rollout_ref.rollout.tensor_model_parallel_size", 1) == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mini_batch": 512}, "mini_batch 512 is larger than the batch 256 of a step"),
        ({"mini_batch": 96}, "batch 256 does not divide into mini batches of 96: nearest that does: 192 or 288"),
        ({"batch": 24, "mini_batch": 24}, "mini_batch 24 does not divide into 16 data-parallel ranks: .*: 16 or 32"),
        ({"micro_batch": 3}, "mini_batch of a rank 4 does not divide into micro batches of 3: .*that does: 2 "),
        ({"micro_batch": 8}, "mini_batch of a rank 4 does not divide into micro batches of 8: .*that does: 4 "),
        ({"batch": 24, "mini_batch": None}, r"batch 24 does not .*: 16 or 32 \(verl\.data\.train_batch_size\)"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_the_nearest_that_do(changes, line):
    with pytest.raises(UsageError, match=line):
        overrides(Program.PPO, replace(ON_GPUS, **changes))


@pytest.mark.parametrize("program", [Program.SFT, Program.PPO, Program.GRPO])
@pytest.mark.parametrize(
    ("rows", "what"),
    [(255, "give --set verl.data.train_batch_size=240 at most, or more data"), (15, "give more data")],
)
def test_a_batch_that_the_data_do_not_fill_is_refused(program, rows, what):
    with pytest.raises(UsageError, match=f"batch 256 is more than the {rows} rows to train on: {what}"):
        overrides(program, replace(ON_GPUS, rows=rows))
    assert overrides(program, replace(ON_GPUS, rows=256)) == overrides(program, ON_GPUS)


@pytest.mark.parametrize(("nodes", "micro"), [(1, 4), (8, 4), (16, 2), (32, 1)])
@pytest.mark.parametrize("program", [Program.SFT, Program.PPO])
def test_a_micro_batch_that_was_left_open_is_one_that_divides(program, nodes, micro):
    asked = replace(ON_GPUS, nodes=nodes, split=split(nodes, 8), batch=256, mini_batch=None, micro_batch=None)
    told = overrides(program, asked)
    key = "data.micro_batch_size_per_gpu" if program is Program.SFT else "critic.ppo_micro_batch_size_per_gpu"
    assert told[key] == micro


def test_what_is_named_as_near_works_for_groups_too():
    asked = replace(ON_GPUS, nodes=3, split=split(3, 8), batch=256, mini_batch=None, micro_batch=None, group=5)
    near = r"batch 256, with 5 answers each, does not divide into 24 data-parallel ranks: nearest that does: 240 or 264"
    with pytest.raises(UsageError, match=near):
        overrides(Program.GRPO, asked)
    for batch in (240, 264):
        overrides(Program.GRPO, replace(asked, batch=batch))


def test_answers_of_a_group_count_in_the_batch():
    asked = replace(ON_GPUS, batch=4, mini_batch=4, group=8, micro_batch=2)
    assert overrides(Program.GRPO, asked)["data.train_batch_size"] == 4  # 4 × 8 answers on 16 ranks
    with pytest.raises(UsageError, match="mini_batch 4 does not divide into 16"):
        overrides(Program.PPO, asked)


@pytest.mark.parametrize(
    ("program", "key", "value", "line"),
    [
        (Program.PPO, "trainer.save_frq", 1, r"--set verl\.trainer\.save_frq: unknown .*did you mean 'save_freq'\?"),
        (Program.SFT, "critic.optim.lr", 1e-5, r"--set verl\.critic\.optim\.lr: unknown setting of verl .* \(sft\)"),
        (Program.PPO, "critic.optim.lr", "fast", "a number is needed, got fast"),
        (Program.GRPO, "model_engine", "megatron", "the training engine decides it"),
        (Program.PPO, "trainer.project_name", "${oc.env:HF_TOKEN}", "give that value itself"),
    ],
)
def test_a_setting_that_verl_has_not_is_refused_before_anything_runs(program, key, value, line):
    with pytest.raises(UsageError, match=line):
        overrides(program, replace(ON_GPUS, settings={key: value}))


@pytest.mark.parametrize("key", ["trainer.nnodes", "actor_rollout_ref.model.path", "trainer.resume_mode"])
def test_what_shakedown_decides_is_no_setting(key):
    with pytest.raises(UsageError, match=rf"verl\.{key} is set by Shakedown: use "):
        overrides(Program.PPO, replace(ON_GPUS, settings={key: 1}))


@pytest.mark.parametrize("program", [Program.SFT, Program.PPO, Program.GRPO])
@pytest.mark.parametrize("asked", [ON_GPUS, ON_CPUS, ON_MEGATRON])
def test_words_are_for_the_engine_of_the_split_and_every_override_is_one_of_them(program, asked):
    told = overrides(program, asked)
    written = words(program, told)
    assert [word.lstrip("+").partition("=")[0] for word in written] == list(told)
    assert any(word.endswith("engine=megatron") for word in written) == (asked is ON_MEGATRON)


@pytest.mark.parametrize("program", [Program.SFT, Program.PPO, Program.GRPO])
def test_what_a_cpu_needs_is_told_on_cpus_alone(program):
    on_cpus, on_gpus = overrides(program, ON_CPUS), overrides(program, ON_GPUS)
    assert rl.SETTINGS[program].items() <= on_cpus.items()
    assert not set(rl.SETTINGS[program]) & set(on_gpus)


# --- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [{"trainer": {"nnodes": 4}}, {"actor_rollout_ref": {"model": {"path": "/mine"}}}])
def test_what_shakedown_decides_is_no_setting_inside_a_dictionary_either(section):
    with pytest.raises(UsageError, match=r"verl\.[\w.]+ is set by Shakedown: use "):
        overrides(Program.PPO, replace(ON_GPUS, settings=section))


def test_a_users_setting_inside_a_dictionary_replaces_ours():
    given = {"actor_rollout_ref.model.override_config": {"attn_implementation": "sdpa"}}
    told = words(Program.PPO, overrides(Program.PPO, replace(ON_CPUS, settings=given)))
    key = "actor_rollout_ref.model.override_config.attn_implementation"
    assert [word for word in told if key in word] == [f"+{key}=sdpa"]


def test_a_users_setting_comes_last():
    told = overrides(Program.SFT, replace(ON_GPUS, settings={"optim.lr": 1e-4, "trainer.logger": ["console", "wandb"]}))
    assert told["optim.lr"] == 1e-4 and told["trainer.logger"] == ("console", "file", "wandb")


@pytest.mark.parametrize("logger", ["wandb", ["wandb"], ("tensorboard",), [], "console"])
def test_whatever_a_user_sets_verl_writes_the_file_that_records_are_made_of(logger):
    told = overrides(Program.PPO, replace(ON_GPUS, settings={"trainer.logger": logger}))
    own = {logger} if isinstance(logger, str) else set(logger)
    assert (
        told["trainer.logger"][:2] == ("console", "file") and set(told["trainer.logger"]) == {"console", "file"} | own
    )


@given(data=st.integers(1, 8), micro=st.integers(1, 8), updates=st.integers(1, 4), times=st.integers(1, 4))
def test_batches_made_of_their_parts_are_accepted(data, micro, updates, times):
    mini = data * micro * times
    asked = replace(
        ON_GPUS,
        nodes=1,
        gpus_per_node=data,
        split=Split(data),
        batch=mini * updates,
        mini_batch=mini,
        micro_batch=micro,
    )
    assert overrides(Program.PPO, asked)["actor_rollout_ref.actor.ppo_mini_batch_size"] == mini
