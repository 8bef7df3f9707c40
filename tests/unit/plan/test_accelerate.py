"""Accelerate's configuration: the user's says how to train, the plan where. What would be ignored is refused."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from golden_files import check as golden
from runner.errors import UsageError
from runner.plan.engines import accelerate
from runner.plan.engines.accelerate import Place

SECOND = Place(1, 2, 8, "10.0.0.1", 29001, "cuda")
# What `accelerate config` writes for DeepSpeed on two machines, bare words included.
OF_A_USER = """
compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  deepspeed_hostfile: /etc/hosts-of-mine
  deepspeed_multinode_launcher: pdsh
  gradient_accumulation_steps: 2
  offload_optimizer_device: none
  zero3_init_flag: false
  zero_stage: 2
distributed_type: DEEPSPEED
downcast_bf16: 'no'
machine_rank: 0
main_process_ip: 192.168.1.100
main_process_port: 29500
main_training_function: main
mixed_precision: bf16
num_machines: 3
num_processes: 12
rdzv_backend: static
same_network: true
use_cpu: false
"""
FSDP = {
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_offload_params": False},
}


@pytest.mark.parametrize(
    ("name", "asked", "place"),
    [
        ("plain", {}, SECOND),
        ("cpu", {"distributed_type": "MULTI_CPU"}, Place(0, 2, 1, "127.0.0.1", 29001, "cpu")),
        ("deepspeed", yaml.safe_load(OF_A_USER), SECOND),
        ("fsdp", FSDP, SECOND),
    ],
)
def test_the_file_of_a_node(name, asked, place):
    accelerate.check(asked, place.device, "mine.yaml")
    golden(f"accelerate/{name}.yaml", accelerate.text(accelerate.rendered(asked, place)))


@given(rank=st.integers(0, 63), machines=st.integers(1, 64), gpus=st.integers(1, 16))
def test_the_number_of_processes_is_the_total_and_nothing_of_the_user_moves_a_node(rank, machines, gpus):
    place = Place(rank, machines, gpus, "fe80::1", 20000, "cuda")
    read = yaml.safe_load(accelerate.text(accelerate.rendered(yaml.safe_load(OF_A_USER), place)))
    assert (read["num_processes"], read["machine_rank"], read["num_machines"]) == (machines * gpus, rank, machines)
    assert (read["main_process_ip"], read["mixed_precision"]) == ("fe80::1", "bf16")


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(st.characters(max_codepoint=0xFFFD, exclude_categories=["Cs"])))  # fmt: skip


@given(config=st.dictionaries(st.sampled_from(["a", "b"]), SCALARS | st.dictionaries(st.sampled_from(["c"]), SCALARS)))
def test_what_is_written_is_read(config):
    assert yaml.safe_load(accelerate.text(config, ["by hand"])) == (config or None)


def test_what_the_plan_replaces_is_told():
    assert accelerate.replaced(yaml.safe_load(OF_A_USER), SECOND) == [
        "num_machines: 3 → 2",
        "num_processes: 12 → 16",
        "main_process_ip: 192.168.1.100 → 10.0.0.1",
        "main_process_port: 29500 → 29001",
        "deepspeed_multinode_launcher: pdsh → standard",
    ]
    assert accelerate.replaced({}, SECOND) == []


@pytest.mark.parametrize("word", ["no", "NO", "'NO'"])
def test_yamls_false_is_accelerates_no(word):
    asked = yaml.safe_load(f"mixed_precision: {word}\ndistributed_type: {word.upper()}")
    accelerate.check(asked, "cuda", "f")
    read = accelerate.rendered(asked, SECOND)
    assert (read["mixed_precision"], read["distributed_type"]) == ("no", "MULTI_GPU")
    assert yaml.safe_load(accelerate.text(read))["mixed_precision"] == "no"


def test_sections_may_leave_their_prefix_out_as_accelerate_does():
    accelerate.check(
        {"fsdp_config": {"version": 2}, "fp8_config": {"backend": "te"}, "mixed_precision": "fp8"}, "cuda", "f"
    )
    assert accelerate.rendered({"fsdp_config": {"version": 2}}, SECOND)["distributed_type"] == "FSDP"


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        ({"mixed_precison": "bf16"}, "cuda", "f: unknown key 'mixed_precison'; did you mean 'mixed_precision'"),
        ({"deepspeed_config": {"zero_stag": 2}}, "cuda", "unknown key of deepspeed_config 'zero_stag'; did you mean 'zero_stage'"),
        ({"fsdp_config": {"fsdp_sharding": 1}}, "cuda", "unknown key of fsdp_config 'fsdp_sharding'; did you mean 'fsdp_"),
        ({"fsdp_config": {"zero_stage": 1}}, "cuda", "unknown key of fsdp_config 'zero_stage'"),
        ({"fsdp_config": ["a"]}, "cuda", "a section of keys and values is expected"),
        ({"fsdp_config": {"version": 2}, "deepspeed_config": {"zero_stage": 2}}, "cuda", "exclude each other"),
        ({**FSDP, "distributed_type": "MULTI_GPU"}, "cuda", "fsdp_config has no effect with distributed_type MULTI_GPU: say FSDP"),
        ({"distributed_type": "NO", "deepspeed_config": {"zero_stage": 2}}, "cuda", "say DEEPSPEED"),
        ({"distributed_type": "MULTI_XPU"}, "cuda", "unknown distributed_type 'MULTI_XPU'"),
        ({"mixed_precision": "bf61"}, "cuda", "unknown mixed_precision 'bf61'; did you mean 'bf16'"),
        ({"mixed_precision": "fp8"}, "cpu", "mixed_precision fp8 needs GPUs"),
        ({"fp16": True}, "cpu", "mixed_precision fp16 needs GPUs"),
        ({"fp8_config": {"backend": "te"}, "mixed_precision": "bf16"}, "cuda", "fp8_config has no effect"),
        (FSDP, "cpu", "distributed_type FSDP needs GPUs"),
        ({"distributed_type": "DEEPSPEED"}, "cpu", "distributed_type DEEPSPEED needs GPUs"),
        ({"deepspeed_config": {"zero_stage": 4}}, "cuda", "0, 1, 2 or 3 is expected"),
        ({"deepspeed_config": {"deepspeed_config_file": "ds.json", "zero_stage": 2}}, "cuda", "zero_stage beside deepspeed_config_file"),
        ({"deepspeed_config": {"deepspeed_config_file": "ds.json"}, "mixed_precision": "bf16"}, "cuda", "mixed_precision beside"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "cuda", "only LOCAL_MACHINE"),
        ({"tpu_name": "x"}, "cuda", "tpu_name is of hardware or of a launcher"),
        ({"mpirun_config": {"mpirun_ccl": "1"}}, "cpu", "mpirun_config is of hardware or of a launcher"),
    ],
)  # fmt: skip
def test_what_accelerate_would_refuse_late_or_ignore_is_refused(asked, device, message):
    with pytest.raises(UsageError) as caught:
        accelerate.check(asked, device, "f")
    assert message in str(caught.value)
    assert str(caught.value).startswith("f: ") and "\n" not in str(caught.value)


def test_a_deepspeed_file_decides_the_precision():
    asked = {"deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    accelerate.check(asked, "cuda", "f")
    assert "mixed_precision" not in accelerate.rendered(asked, SECOND)


def test_the_effective_batch_as_far_as_it_is_known():
    known = {"deepspeed_config": {"gradient_accumulation_steps": 2}}
    assert accelerate.batch_text(known, 8, 4) == "effective batch: 4 × 8 ranks × 2 accumulated = 64"
    assert accelerate.batch_text(known, 8) == "effective batch: batch per device × 8 ranks × 2 accumulated"
    assert accelerate.batch_text({}, 8) == "effective batch: batch per device × 8 ranks × the script's accumulation"
    auto = {"deepspeed_config": {"gradient_accumulation_steps": "auto"}}
    assert accelerate.batch_text(auto, 8, 4).endswith("× the script's accumulation")


def test_all_after_the_program_is_the_programs():
    words = accelerate.command("/u/bin/python", "/c/a.yaml", "/c/t", ["/n/python", "-m", "runner.workloads", "/c"])
    assert words[:3] == ["/u/bin/python", "-m", "accelerate.commands.launch"]
    assert words[-5:] == ["--no_python", "/n/python", "-m", "runner.workloads", "/c"]
