"""What a user asks of a workflow, as verl's trainers are asked for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import UsageError
from runner.launch.prepare import Options as RunOptions
from runner.launch.prepare import Selected
from runner.workflow.asked import Options, profile, settings, training
from runner.workflow.prepare import Files
from runner.workflow.stages import Program
from runner.workflow.verl import PROFILES, overrides

FILES = Files(Path("/d/train.parquet"))
RL = "actor_rollout_ref"


def options(workflow="sft-ppo", **changes):
    return Options(workflow, RunOptions(results=Path("results"), command="runner workflow"), **changes)


def selected(cluster, nodes=2, gpus=8, device="cuda"):
    return Selected(cluster, cluster.nodes, (nodes,), gpus, device, "h200-sxm", None)


def told(program, cluster, texts=(), nodes=2, gpus=8, device="cuda", **changes):
    """The overrides of a trainer for these `--set`."""
    asked = options(settings=tuple(texts), **changes)
    own = settings(texts, "sft-ppo").verl[program]
    used = PROFILES["gpu-vllm" if device == "cuda" else "cpu-smoke"]
    made = training(
        program, asked, selected(cluster, nodes, gpus, device), used, own,
        model="/m", files=FILES, folder="/c", experiment="r1",
    )  # fmt: skip
    return overrides(program, made)


# --- --set -----------------------------------------------------------------------------------------------


def test_a_setting_is_for_each_trainer_that_has_it():
    found = settings(["verl.data.train_batch_size=16", "verl.optim.lr=1e-6", "verl.algorithm.gamma=0.9"], "sft-ppo")
    assert found.verl == {
        Program.SFT: {"data.train_batch_size": 16, "optim.lr": 1e-6},
        Program.PPO: {"data.train_batch_size": 16, "algorithm.gamma": 0.9},
    }


def test_a_setting_of_one_trainer_names_it():
    found = settings(["verl.sft.data.train_batch_size=16", "verl.rl.data.train_batch_size=32"], "sft-ppo")
    assert found.verl == {Program.SFT: {"data.train_batch_size": 16}, Program.PPO: {"data.train_batch_size": 32}}


def test_slurm_and_the_time_limit_of_a_stage_are_settings_too():
    found = settings(["slurm.partition=gpu", "ppo.timeout_s=600", "ppo.join_s=30"], "sft-ppo")
    assert found.slurm == {"partition": "gpu"} and found.seconds == {"ppo": {"timeout_s": 600.0, "join_s": 30.0}}


@pytest.mark.parametrize(
    ("workflow", "text", "said"),
    [
        ("sft-ppo", "verl.data.train_batch_sise=16", "did you mean 'train_batch_size'?"),
        ("sft-ppo", "verl.rl.optim.lrr=1", "--set verl.rl.optim"),
        ("sft-ppo", "verl.sft.algorithm.gamma=1", "--set verl.sft.algorithm.gamma"),
        ("sft", "verl.rl.data.train_batch_size=16", "workflow sft has no such trainer, only sft"),
        ("sft-ppo", "verl=1", "write it as verl.KEY=VALUE"),
        ("sft-ppo", "verl.data.train_batch_size", "write it as verl.KEY=VALUE"),
        ("sft-ppo", "vrl.data.train_batch_size=1", "unknown section 'vrl'; did you mean 'verl'?"),
        ("sft-ppo", "sft.steps=1", "unknown setting 'steps'"),
        ("sft-ppo", "sft.timeout_s=nan", "give the timeout_s of stage sft in seconds"),
        ("sft-ppo", "sft.timeout_s=0", "give the timeout_s of stage sft in seconds"),
        ("sft-ppo", "sft.timeout_s=1e18", "give the timeout_s of stage sft in seconds, from 1 to 31536000 (a year)"),
        ("sft-ppo", "sft.timeout_s=inf", "give the timeout_s of stage sft in seconds"),
        ("sft-ppo", "ppo.join_s=0.0001", "give the join_s of stage ppo in seconds, from 1 to"),
        ("sft-ppo", "sft.join_s=5", "unknown setting 'join_s'"),
        ("ppo", "sft.timeout_s=5", "unknown section 'sft'"),
        ("sft-ppo", "prepare.timeout_s=5", "unknown section 'prepare'"),
        ("sft-ppo", "publish.timeout_s=5", "unknown section 'publish'"),
        ("sft-ppo", "verl.actor_rollout_ref.actor.optim.lr=1e400", "give a finite number"),
        ("sft-ppo", "verl.trainer.logger=[&a [*a]]", "neither a list nor a dictionary"),
        ("sft-ppo", "verl.trainer.logger=[2020-99-99]", "neither a list nor a dictionary"),
        ("sft-ppo", "verl.engine.strategy=megatron", "here fsdp2 or fsdp works"),
        ("sft-ppo", "verl.critic.strategy=x", "--tp and --pp decide the training engine"),
    ],
)
def test_a_setting_that_there_is_not_is_refused_by_name(workflow, text, said):
    with pytest.raises(UsageError) as refused:
        settings([text], workflow)
    assert said in str(refused.value) and "\n" not in str(refused.value)


# Those that decide others are computed with before verl is told of them.
@pytest.mark.parametrize("value", ["abc", "", "1.5", "0", "-1", "true", "[1,2]", "{a: 1}"])
@pytest.mark.parametrize(
    "key",
    [
        "data.train_batch_size",
        "data.max_response_length",
        "trainer.total_training_steps",
        "trainer.total_epochs",
        f"{RL}.actor.ppo_mini_batch_size",
        f"{RL}.actor.ppo_micro_batch_size_per_gpu",
        f"{RL}.rollout.n",
        f"{RL}.rollout.tensor_model_parallel_size",
        f"{RL}.rollout.pipeline_model_parallel_size",
    ],
)
def test_a_count_is_a_whole_number_of_at_least_one(key, value):
    with pytest.raises(UsageError, match=f"--set verl.{key}.*(number|is needed|unknown setting)"):
        settings([f"verl.{key}={value}"], "sft-ppo")


def test_a_count_in_a_dictionary_is_one_too():
    with pytest.raises(UsageError, match=r"--set verl\.data\.train_batch_size"):
        settings(["verl.data={train_batch_size: x}"], "sft-ppo")


def test_steps_may_be_left_to_the_epochs():
    found = settings(["verl.trainer.total_training_steps=null"], "sft")
    assert found.verl == {Program.SFT: {"trainer.total_training_steps": None}}


def test_what_shakedown_sets_is_refused_with_the_option_that_does(cluster):
    for key, option in ("data.train_files", "--data"), ("trainer.nnodes", "--nodes"):
        with pytest.raises(UsageError, match=f"verl.{key} is set by Shakedown: use {option}"):
            told(Program.SFT, cluster, [f"verl.{key}=1"])
    for key, option in (f"{RL}.rollout.name", "--profile"), ("reward.custom_reward_function.path", "--reward"):
        with pytest.raises(UsageError, match=f"verl.{key} is set by Shakedown: use {option}"):
            told(Program.PPO, cluster, [f"verl.{key}=/x"])


# --- what depends on each other --------------------------------------------------------------------------


def test_a_batch_that_is_set_decides_those_that_depend_on_it(cluster):
    found = told(Program.PPO, cluster, ["verl.data.train_batch_size=64"])
    assert found["data.train_batch_size"] == 64 and found[f"{RL}.actor.ppo_mini_batch_size"] == 64
    with pytest.raises(UsageError, match="60 does not divide into 16 data-parallel ranks: nearest that does: 48 or 64"):
        told(Program.PPO, cluster, ["verl.data.train_batch_size=60"])


def test_steps_are_not_cut_by_epochs(cluster):
    assert told(Program.SFT, cluster)["trainer.total_epochs"] == 1
    for given in ({"steps": 20}, {"texts": ["verl.trainer.total_training_steps=20"]}):
        found = told(Program.SFT, cluster, **given)
        assert found["trainer.total_training_steps"] == 20 and found["trainer.total_epochs"] > 20
    found = told(Program.SFT, cluster, ["verl.trainer.total_epochs=3"], device="cpu", gpus=1)
    assert found["trainer.total_epochs"] == 3 and "trainer.total_training_steps" not in found
    with pytest.raises(UsageError, match="exclude each other"):
        told(Program.SFT, cluster, ["verl.trainer.total_epochs=3", "verl.trainer.total_training_steps=20"])


def test_on_cpus_a_workflow_is_small(cluster):
    found = told(Program.PPO, cluster, nodes=2, gpus=1, device="cpu")
    assert found["trainer.total_training_steps"] == 2 and found["data.train_batch_size"] == 8


# --- profile and parallelism -----------------------------------------------------------------------------


def test_the_profile_is_that_of_the_device_and_gpus_need_a_model_and_data():
    assert profile(options(), "cpu") == "cpu-smoke"
    assert profile(options(model="m", data="gsm8k"), "cuda") == "gpu-vllm"
    with pytest.raises(UsageError, match="on GPUs a workflow needs --model and --data"):
        profile(options(), "cuda")
    with pytest.raises(UsageError, match="needs --data: "):
        profile(options(model="m"), "cuda")
    with pytest.raises(
        UsageError, match="--profile cpu-smoke is for cpu, the inventory's nodes have cuda: use gpu-vllm"
    ):
        profile(options(profile="cpu-smoke"), "cuda")
    with pytest.raises(UsageError, match="unknown profile 'gpu-vlm'; did you mean 'gpu-vllm'"):
        profile(options(profile="gpu-vlm"), "cuda")


@pytest.mark.parametrize(
    ("changes", "texts", "said"),
    [
        ({"data_parallel": 7}, [], "nearest that works: DP 16"),
        ({"tensor_parallel": 2}, [], "which gpu-vllm has not"),
        ({"pipeline_parallel": 2}, [], "which gpu-vllm has not"),
        ({"rollout_tensor": 16}, [], "more than the 8 GPUs of a node"),
        ({}, [f"verl.{RL}.rollout.tensor_model_parallel_size=3"], "no divisor of the 8 GPUs of a node"),
        ({}, [f"verl.{RL}.rollout.pipeline_model_parallel_size=2"], "pipeline parallelism 2 in rollout"),
    ],
)
def test_parallelism_that_does_not_work_is_refused(cluster, changes, texts, said):
    with pytest.raises(UsageError, match=said):
        told(Program.PPO, cluster, texts, **changes)


def test_tensor_parallelism_in_rollout_is_told(cluster):
    assert told(Program.PPO, cluster, rollout_tensor=4)[f"{RL}.rollout.tensor_model_parallel_size"] == 4


# --- where metrics go ------------------------------------------------------------------------------------------


def test_metrics_go_to_the_console_and_a_file_and_elsewhere_on_request(cluster):
    assert told(Program.PPO, cluster)["trainer.logger"] == ("console", "file")
    found = told(Program.PPO, cluster, track=("wandb", "tensorboard"))
    assert found["trainer.logger"] == ("console", "file", "wandb", "tensorboard")


@pytest.mark.parametrize("value", ["wandbb", "0", "1.5", "null", "true", "[a,{b: [c]}]", "{a: 1}", "[console,foo]"])
def test_what_is_no_logger_of_verl_is_refused(cluster, value):
    with pytest.raises(UsageError, match=r"--set verl\.trainer\.logger"):
        told(Program.SFT, cluster, [f"verl.trainer.logger={value}"])


def test_the_project_is_the_workflow_unless_it_is_named(cluster):
    assert told(Program.SFT, cluster)["trainer.project_name"] == "sft-ppo"
    assert told(Program.SFT, cluster, project="thesis")["trainer.project_name"] == "thesis"
