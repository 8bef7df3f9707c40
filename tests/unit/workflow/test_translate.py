"""The second document's file: each of its lines is translated and shown, or refused. Nothing is dropped in silence."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden_files import check
from runner.errors import UsageError
from runner.workflow.parallelism import FSDP, MEGATRON, split
from runner.workflow.stages import Program
from runner.workflow.translate import Document, translate
from runner.workflow.verl import PROFILES, Profile, Training, overrides

BOTH = Profile("cuda", "vllm", (FSDP, MEGATRON))
FILE = "config/multinode_ppo.yaml"
DOCUMENT = {
    "parallelism": {"data_parallel_size": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 1},
    "distributed": {"backend": "nccl", "init_method": "env://", "timeout": 1800},
    "model": {"path": "models/qwen2.5-70b", "trust_remote_code": True},
    "training": {"batch_size": 128, "micro_batch_size": 4, "gradient_accumulation_steps": 8},
    "inference": {"backend": "vllm", "tensor_parallel_size": 2, "pipeline_parallel_size": 1},
}
MEMORY = {"gradient_checkpointing": True, "cpu_offload": True, "zero_stage": 2}


def start(profile=BOTH, nodes=2, gpus=4):
    return Training(
        model="", train="/data/train.parquet", val=None, folder="/runs/r1/checkpoints", nodes=nodes, gpus_per_node=gpus,
        split=split(nodes, gpus), profile=profile, project="p", experiment="e",
    )  # fmt: skip


def changed(**sections):
    document = deepcopy(DOCUMENT)
    for section, keys in sections.items():
        document[section].update(keys)
    return document


def shown(translation):
    return "".join(f"{line}\n" for line in translation.lines)


def test_the_documents_file_on_its_two_nodes_of_four():
    check("workflow/translated.txt", shown(translate(DOCUMENT, FILE, start())))


def test_the_documents_file_with_its_section_on_memory():
    document = changed(
        parallelism={"data_parallel_size": 8, "tensor_parallel_size": 1},
        training={**MEMORY, "gradient_accumulation_steps": 4},
    )
    check("workflow/translated-memory.txt", shown(translate(document, FILE, start(PROFILES["gpu-vllm"]))))


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1), (2, 4, 1), (2, 2, 2)],
)
def test_the_documents_other_sets_are_accepted(sizes):
    names = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size")
    asked = translate(
        {"parallelism": dict(zip(names, sizes, strict=True)), "model": {"path": "m"}}, FILE, start()
    ).asked
    assert (asked.split.data, asked.split.tensor, asked.split.pipeline) == sizes
    assert asked.split.rollout_tensor == 1, "never what training has"


@given(st.data())
def test_every_line_of_a_file_is_shown(data):
    document = changed(training={"gradient_checkpointing": False, "cpu_offload": False})
    kept = {
        section: {key: keys[key] for key in data.draw(st.sets(st.sampled_from(sorted(keys))), label=section)}
        for section, keys in document.items()
    }
    try:
        translation = translate(kept, FILE, start())
    except UsageError as error:
        assert str(error).startswith(f"{FILE}: ")
        return
    assert [line.key for line in translation.lines] == [
        f"{section}.{key}" for section, keys in kept.items() for key in keys
    ]
    told = overrides(Program.PPO, translation.asked)
    for line in translation.lines:
        assert line.overrides or line.remark, f"{line.key} was dropped"
        assert {word.partition("=")[0] for word in line.overrides} <= set(told)


def test_every_key_of_the_schema_has_a_translation():
    """A key that is added to the schema is translated, or this fails."""
    values = {
        section: {key: 1 for key in field.annotation.model_fields} for section, field in Document.model_fields.items()
    } | {"distributed": DOCUMENT["distributed"], "model": DOCUMENT["model"]}
    values["inference"]["backend"] = "vllm"
    values["training"] |= {"batch_size": 8, "gradient_checkpointing": True, "cpu_offload": True, "zero_stage": 3}
    values["parallelism"]["data_parallel_size"] = 8
    for line in translate(values, FILE, start()).lines:
        assert line.overrides or line.remark, line.key


def test_a_section_without_lines_is_as_one_that_is_absent():
    for empty in ({}, None):
        assert translate({**DOCUMENT, "distributed": empty}, FILE, start()).asked.timeout_s is None


@pytest.mark.parametrize("content", [None, [], "text", 1])
def test_a_file_of_another_kind_is_refused(content):
    with pytest.raises(UsageError, match=f"^{FILE}: expected a mapping of settings"):
        translate(content, FILE, start())


# --- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (changed(training={"zero_stag": 2}), "training: unknown key 'zero_stag'; did you mean 'zero_stage'"),
        ({**DOCUMENT, "optimizer": {}}, "unknown key 'optimizer'"),
        (changed(parallelism={"data_parallel_size": 8}), "DP 8 × TP 2 × PP 1 = 16 is not the 8 GPUs of 2 nodes with 4 each: nearest"),
        (changed(inference={"tensor_parallel_size": 8}), "tensor parallelism 8 in rollout is more than the 4 GPUs of a node"),
        (changed(inference={"pipeline_parallel_size": 2}), "pipeline parallelism 2 in rollout: verl 0.9.1 has none"),
        (changed(inference={"backend": "sglang"}), "inference.backend sglang: this profile has vllm"),
        (changed(distributed={"backend": "gloo"}), "distributed.backend gloo: on cuda verl uses nccl"),
        (changed(distributed={"init_method": "tcp://10.0.0.1:29500"}), "distributed.init_method tcp://.*: Ray tells"),
        (changed(training={"zero_stage": 2}), r"training.zero_stage 2 with DP 4 × TP 2 × PP 1: verl's megatron"),
        (changed(training={"zero_stage": 4}), "training.zero_stage = 4"),
        (changed(training={"batch_size": 100}), r"micro_batch_size 4 × gradient_accumulation_steps 8 × DP 4 = 128 .* give batch_size 128"),
        (changed(training={"micro_batch_size": None}), "gradient_accumulation_steps says nothing without micro_batch_size"),
        (changed(model={"path": None}), "model.path is missing: add it, or name the model with --model"),
        (changed(training={"batch_size": "many"}), "training.batch_size = 'many'"),
        (changed(model={"path": "${oc.env:HF_TOKEN}"}), None),
    ],
)  # fmt: skip
def test_what_has_no_equivalent_is_refused_with_what_to_do(document, line):
    if line is None:  # refused where it is written
        from runner.workflow.verl import words

        with pytest.raises(UsageError, match="give that value itself"):
            words(Program.PPO, overrides(Program.PPO, translate(document, FILE, start()).asked))
        return
    with pytest.raises(UsageError, match=f"^{FILE}(: |.).*{line}"):
        translate(document, FILE, start())


def test_the_profile_that_is_there_has_no_megatron_and_says_so():
    with pytest.raises(UsageError, match="takes verl's strategy megatron, which gpu-vllm has not: no profile has it"):
        translate(DOCUMENT, FILE, start(PROFILES["gpu-vllm"]))


@pytest.mark.parametrize(("stage", "reshard"), [(2, False), (3, True)])
def test_zero_stages_are_what_fsdp_does_with_gathered_parameters(stage, reshard):
    document = {"model": {"path": "m"}, "training": {"zero_stage": stage}}
    told = overrides(Program.PPO, translate(document, FILE, start()).asked)
    assert told["actor_rollout_ref.actor.fsdp_config.reshard_after_forward"] is reshard
    assert told["critic.fsdp.reshard_after_forward"] is reshard


@pytest.mark.parametrize("stage", [0, 1])
def test_a_zero_stage_that_fsdp_has_not_is_refused(stage):
    with pytest.raises(UsageError, match=rf"training.zero_stage {stage}: verl's fsdp2 divides gradients too"):
        translate({"model": {"path": "m"}, "training": {"zero_stage": stage}}, FILE, start())
