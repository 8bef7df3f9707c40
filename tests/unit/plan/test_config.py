"""Configuration files: every shipped one loads, and what is wrong is one line with the nearest name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UsageError
from runner.plan import config
from runner.system import schema
from runner.system.places import CONFIGS
from runner.workloads import registry


@pytest.mark.parametrize("name", config.names("models"))
def test_every_shipped_model_loads_and_names_itself(name):
    model = config.load_model(name)
    assert model.name == name
    assert config.load_deepspeed(model.deepspeed, {})["zero_optimization"]["stage"] == 3


def test_a_model_of_ones_own_is_a_file_anywhere(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text((CONFIGS / "models" / "tiny.yaml").read_text().replace("num_layers: 4", "num_layers: 2"))
    assert config.load_model(str(own)).num_layers == 2
    own.write_text(own.read_text().replace("num_layers", "layers"))
    with pytest.raises(UsageError, match=r"mine.yaml: unknown key 'layers'; did you mean 'num_layers'\?"):
        config.load_model(str(own))
    with pytest.raises(UsageError, match=r"cannot read .*absent.yml"):
        config.load_model(str(tmp_path / "absent.yml"))


@pytest.mark.parametrize("name", registry.offered())
def test_every_shipped_test_loads(name):
    assert config.load_test(name, {}).timeout_s > 0


def test_the_users_targets_are_shipped():
    values = {(t["metric"], t["num_nodes"]): t["value"] for t in config.load_targets()}
    assert [values["scaling_efficiency_pct", n] for n in (2, 4, 8)] == [98, 95, 90]
    assert values["bidirectional_gbit_per_s", 2] == 920 and values["latency_us_p50", 2] == 50
    assert values["gpu_util_pct_mean", None] == 90


def test_a_misspelt_key_of_a_target_is_named():
    wrong = {"targets": [{"name": "x", "test": "sft", "metrc": "y", "num_nodes": 1, "direction": "min", "value": 1}]}
    with pytest.raises(UsageError, match=r"t.yaml.targets.0: unknown key 'metrc'; did you mean 'metric'\?"):
        schema.check(config.Targets, wrong, "t.yaml")


@pytest.mark.parametrize("name", config.names("hardware"))
def test_every_shipped_hardware_loads(name):
    assert config.load_hardware(name).gpu


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: config.load_model("llama-2-7"), "unknown model 'llama-2-7'; did you mean 'llama-2-7b'?"),
        (lambda: config.load_test("tourch", {}), "unknown test 'tourch'; did you mean 'torch'?"),
        (lambda: config.load_test("sft", {"stpes": 3}), "--set sft: unknown key 'stpes'; did you mean 'steps'?"),
        (
            lambda: config.load_test("sft", {"attention": "spda"}),
            "--set sft: attention: unknown value 'spda'; did you mean 'sdpa'?",
        ),
        (
            lambda: config.load_test("torch", {"max_bytes": "lots"}),
            "--set torch: max_bytes = 'lots': give a number of bytes, such as 8, 64K, 1M or 8G",
        ),
        (
            lambda: config.parse_settings(["sft.steps"]),
            "--set sft.steps: write it as TEST.KEY=VALUE, for example --set sft.steps=20",
        ),
        (lambda: config.parse_settings(["nccl"]), "--set nccl: write it as TEST.KEY=VALUE"),
        (
            lambda: config.parse_settings(["ncl=built"]),
            "--set ncl=built: write it as TEST.KEY=VALUE, for example --set sft.steps=20; without TEST: nccl",
        ),
        (
            lambda: config.parse_settings(["sftt.steps=1"]),
            "--set sftt.steps=1: unknown section 'sftt'; did you mean 'sft'?",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(call, message):
    with pytest.raises(UsageError) as error:
        call()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["all_reduce, broadcast", ["all_reduce", "broadcast"]])
def test_names_with_commas_are_a_list(given):
    assert config.load_test("torch", {"collectives": given}).collectives == ("all_reduce", "broadcast")


def test_a_setting_of_the_whole_run_has_no_section():
    assert config.parse_settings(["nccl=built", "sft.steps=20"]) == {"run": {"nccl": "built"}, "sft": {"steps": 20}}


def test_an_unknown_key_in_a_file_names_file_and_field():
    with pytest.raises(
        UsageError, match=r"configs/models/x.yaml: unknown key 'hiden_size'; did you mean 'hidden_size'\?"
    ):
        schema.check(config.ModelConfig, {"hiden_size": 1}, "configs/models/x.yaml")


def test_settings_are_read_as_yaml():
    parsed = config.parse_settings(["sft.steps=20", "sft.lr=1e-3", "sft.liger=true", "torch.collectives=[all_reduce]"])
    assert parsed == {"sft": {"steps": 20, "lr": 1e-3, "liger": "true"}, "torch": {"collectives": ["all_reduce"]}}
    assert config.load_test("sft", parsed["sft"]).lr == 1e-3


@given(st.integers(1, 1000), st.sampled_from(["", "K", "M", "G", "T", "KiB", "MiB", "k"]))
def test_sizes_are_powers_of_1024(number, unit):
    assert schema.parse_size(f"{number}{unit}") == number * 1024 ** " KMGT".index(unit[:1].upper() or " ")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: config.load_test("torch", {"min_bytes": "1G", "max_bytes": 8}), "max_bytes 8 is below min_bytes"),
        (lambda: config.load_test("torch", {"collectives": []}), "collectives"),
        (lambda: config.load_test("sft", {"steps": True}), "steps = True: Input should be a valid integer"),
        (lambda: config.load_test("sft", {"steps": 0}), "steps = 0: Input should be greater than 0"),
        (lambda: config.load_test("torch", {"timeout_s": float("inf")}), "timeout_s"),
        (
            lambda: config.load_deepspeed("ds_config_7b", {"zero_optimisation.stage": 1}),
            "unknown DeepSpeed setting 'zero_optimisation.stage'; did you mean 'zero_optimization'",
        ),
        (lambda: model(num_heads=5), "hidden_size must be a multiple of num_heads"),
        (lambda: model(seq_len=99999), "seq_len must not exceed max_seq_len"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_read(call, said):
    with pytest.raises(UsageError, match=said):
        call()


def model(**changes):
    return schema.check(config.ModelConfig, {**config.load_model("tiny").model_dump(), **changes}, "m.yaml")


def test_numbers_with_an_exponent_are_numbers():
    assert config.parse_settings(["deepspeed.optimizer.params.lr=1e-4"]) == {"deepspeed": {"optimizer.params.lr": 1e-4}}


@pytest.mark.parametrize("value", [-1, 101, "much", True, None, [], float("nan"), float("inf")])
def test_a_wrong_value_of_a_target_is_told_as_the_options(value):
    with pytest.raises(UsageError) as caught:
        config.load_targets("workflow", {"idle": value})
    assert str(caught.value).startswith(f"--set targets.idle={value}: give a number from 0 to 100")


def test_a_target_takes_any_number_that_its_metric_can_have():
    for value in (0, 12.5, 100):
        assert config.load_targets("workflow", {"idle": value})[0]["value"] == value
