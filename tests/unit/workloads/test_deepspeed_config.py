"""DeepSpeed's own models judge a configuration on the controller, before a node is used."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from runner.errors import UsageError
from runner.plan import config
from runner.workloads import deepspeed_config

# One process for all cases: DeepSpeed takes seconds to import.
JUDGE = """
import contextlib, json, sys
from runner.workloads import deepspeed_config as judge
with contextlib.redirect_stdout(sys.stderr):
    verdicts = [judge._verdict(case) for case in json.load(sys.stdin)]
    sections = sorted(judge.sections())
print(json.dumps([verdicts, sections]))
"""

WRONG = {
    "fp16 with bf16": ({"fp16.enabled": True}, "bfloat16 and fp16 modes cannot be simultaneously enabled"),
    "nvme without a path": (
        {"zero_optimization.offload_param.device": "nvme"},
        "zero_optimization.offload_param goes to nvme without a path: set zero_optimization.offload_param.nvme_path",
    ),
    "the optimizer's nvme without a path": (
        {"zero_optimization.offload_optimizer.device": "nvme"},
        "zero_optimization.offload_optimizer goes to nvme without a path",
    ),
    "parameters offloaded at stage 2": (
        {"zero_optimization.stage": 2, "zero_optimization.offload_param.device": "cpu"},
        "zero_optimization.offload_param to cpu needs zero_optimization.stage 3 or more, it is 2",
    ),
    "a misspelt key": (
        {"zero_optimization.overlap_com": True},
        "DeepSpeed knows no zero_optimization.overlap_com; did you mean 'overlap_comm'?",
    ),
    "a misspelt key deeper down": (
        {"zero_optimization.offload_param.devise": "cpu"},
        "DeepSpeed knows no zero_optimization.offload_param.devise; did you mean 'device'?",
    ),
    "a misspelt key that is asked for": (
        {"activation_checkpointing.cpu_chekpointing": True},
        "DeepSpeed knows no activation_checkpointing.cpu_chekpointing; did you mean 'cpu_checkpointing'?",
    ),
    "a misspelt key of the optimizer": (
        {"optimizer.params.weigth_decay": 0.1},
        "DeepSpeed knows no optimizer.params.weigth_decay; did you mean 'weight_decay'?",
    ),
    "a misspelt key of a monitor": ({"tensorboard.enable": True}, "did you mean 'enabled'?"),
    "a scheduler that is none": ({"scheduler.type": "WarmupLinear"}, "scheduler.type 'WarmupLinear'"),
    "a misspelt key of the scheduler": (
        {"scheduler.type": "WarmupLR", "scheduler.params": {"warmup_num_step": 5}},
        "DeepSpeed knows no scheduler.params.warmup_num_step; did you mean 'warmup_num_steps'?",
    ),
    "a stage that is none": ({"zero_optimization.stage": 7}, "zero_optimization.stage: Input should be 0, 1, 2"),
    "words for a size": (
        {"zero_optimization.reduce_bucket_size": "lots"},
        "zero_optimization.reduce_bucket_size: Input should be a valid integer",
    ),
    "a section that DeepSpeed has no more": ({"amp.enabled": True}, "Apex AMP integration has been removed"),
    "a misspelt key of LAMB": (
        {"optimizer.type": "Lamb", "optimizer.params": {"lr": 1e-4, "max_coef": 0.3}},
        "DeepSpeed knows no optimizer.params.max_coef; did you mean 'max_coeff'?",
    ),
    "a misspelt key of Lion": (
        {"optimizer.type": "Lion", "optimizer.params": {"lr": 1e-4, "weight_dacay": 0.1}},
        "DeepSpeed knows no optimizer.params.weight_dacay; did you mean 'weight_decay'?",
    ),
    "clipping as an optimizer's": (
        {"optimizer.params.max_grad_norm": 1.0},
        "optimizer.params.max_grad_norm is not supported by DeepSpeed: set gradient_clipping",
    ),
    "an optimizer without its type": (
        {"optimizer": {"params": {"lr": 1e-4}}},
        "optimizer.type is missing",
    ),
    "a scheduler without its type": ({"scheduler.params": {"warmup_num_steps": 5}}, "scheduler.type is missing"),
    "a scheduler without what it needs": (
        {"scheduler.type": "WarmupDecayLR", "scheduler.params": {"warmup_num_steps": 100}},
        "scheduler.params.total_num_steps is missing",
    ),
    "an empty section": ({"scheduler": None}, "scheduler is null: DeepSpeed expects another kind of value there"),
    "a section that is a word": ({"optimizer": "AdamW"}, 'optimizer is "AdamW": DeepSpeed expects another kind'),
    "a section that is a flag": ({"bf16": True}, "bf16 is true: DeepSpeed expects another kind of value there"),
    "a number that is a text": ({"optimizer.params.lr": "1e-4"}, "optimizer.params.lr is the text '1e-4': write it"),
    "clipping that is a text": ({"gradient_clipping": "1.0"}, "gradient_clipping is the text '1.0': write it"),
    "a rate below 0": ({"optimizer.params.lr": -1}, "optimizer.params: Invalid learning rate: -1"),
    "one beta of two": ({"optimizer.params.betas": [0.9]}, "optimizer.params: "),
    "steps that are words": (
        {"scheduler.type": "WarmupLR", "scheduler.params": {"warmup_num_steps": "few"}},
        "scheduler.params: warmup_num_steps must be a positive integer",
    ),
    "a type that is none": (
        {"data_types.grad_accum_dtype": "float64"},
        "data_types.grad_accum_dtype 'float64' is none of DeepSpeed's types: fp16",
    ),
    "a master copy without ZeRO": (
        {"zero_optimization.stage": 0, "bf16.bf16_master_weights_and_grads": True},
        "only supported with ZeRO Stage 1, 2, or 3",
    ),
}  # fmt: skip
RIGHT = {
    "wandb": {"wandb.enabled": False},
    "checkpoint": {"checkpoint.tag_validation": "Warn"},
    "data_types": {"data_types.grad_accum_dtype": "fp32"},
    "torch_autocast": {"torch_autocast.enabled": True},
    "aio": {"aio.block_size": 1048576, "zero_optimization.offload_param.device": "nvme",
            "zero_optimization.offload_param.nvme_path": "/nvme"},
    "scheduler": {"scheduler.type": "WarmupLR", "scheduler.params": {"warmup_num_steps": 5}},
    "another optimizer": {"optimizer.type": "SGD", "optimizer.params": {"lr": 0.1, "momentum": 0.9}},
    "Muon": {"optimizer.type": "Muon", "optimizer.params": {"lr": 1e-4, "momentum": 0.9, "muon_lr": 1e-3, "adam_lr": 1e-4}},
    "LAMB": {"optimizer.type": "Lamb", "optimizer.params": {"lr": 1e-4, "max_coeff": 0.3, "min_coeff": 0.01}},
    "a type by another name": {"data_types.grad_accum_dtype": "torch.bfloat16"},
    "pipeline": {"pipeline.stages": "auto"},
    "compile": {"compile.deepcompile": False},
    "flops_profiler": {"flops_profiler.enabled": True, "flops_profiler.profile_step": 3},
}  # fmt: skip


def configured(overrides: dict) -> dict:
    return config.load_deepspeed("ds_config_7b", overrides) | deepspeed_config._BATCH


@pytest.fixture(scope="module")
def judged() -> tuple[dict[str, str], list[str]]:
    cases = {name: configured(overrides) for name, (overrides, _) in WRONG.items()}
    cases |= {name: configured(overrides) for name, overrides in RIGHT.items()}
    cases |= {
        name: config.load_deepspeed(name, {}) | deepspeed_config._BATCH for name in config.names("deepspeed", ".json")
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", JUDGE],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        check=True,
    )
    verdicts, sections = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(cases, verdicts, strict=True)), sections


@pytest.mark.parametrize("name", WRONG)
def test_what_deepspeed_would_refuse_or_ignore_is_refused_now(judged, name):
    assert WRONG[name][1] in judged[0][name] and "\n" not in judged[0][name]


@pytest.mark.parametrize("name", [*RIGHT, *config.names("deepspeed", ".json")])
def test_what_deepspeed_reads_is_not_refused(judged, name):
    assert judged[0][name] == ""


def test_the_sections_are_those_that_deepspeed_asks_for(judged):
    """A newer DeepSpeed's new section makes this fail; those that it has no more are kept for what it says of them."""
    assert {*judged[1]} <= {*config.DEEPSPEED_SECTIONS}


def test_the_shipped_files_are_known_and_need_no_judge():
    files = {deepspeed_config.digest(config.load_deepspeed(name, {})) for name in config.names("deepspeed", ".json")}
    assert files == deepspeed_config.SHIPPED


def test_it_is_asked_once(tmp_path, monkeypatch):
    values = configured({"fp16.enabled": True})
    for _ in range(2):
        with pytest.raises(UsageError, match=r"^here: bfloat16 and fp16 modes cannot be simultaneously enabled$"):
            deepspeed_config.refuse(values, "here", tmp_path)
        monkeypatch.setattr(deepspeed_config.process, "run", lambda *a, **k: pytest.fail("asked again"))
    deepspeed_config.refuse(config.load_deepspeed("ds_config_7b", {}), "here", tmp_path)


def test_another_deepspeed_is_asked_again(tmp_path, monkeypatch):
    """A verdict of before an upgrade says nothing about what the new version reads."""
    values, verdicts = configured({"comms_logger.enabled": True}), iter(["it knows no comms_logger", ""])

    def answer(*_, **__):
        return SimpleNamespace(rc=0, stdout=json.dumps({"verdict": next(verdicts)}), last_line="")

    monkeypatch.setattr(deepspeed_config.process, "run", answer)
    monkeypatch.setattr(deepspeed_config.metadata, "version", lambda _: "0.14.0")
    with pytest.raises(UsageError, match="it knows no comms_logger"):
        deepspeed_config.refuse(values, "here", tmp_path)
    monkeypatch.setattr(deepspeed_config.metadata, "version", lambda _: "0.19.8")
    deepspeed_config.refuse(values, "here", tmp_path)


def test_auto_is_found_in_lists_as_well():
    values = {"optimizer": {"params": {"betas": ["auto", 0.95], "lr": 0.1}}, "zero_optimization": {"stage": "auto"}}
    assert [*deepspeed_config.unresolved(values)] == ["optimizer.params.betas", "zero_optimization.stage"]
