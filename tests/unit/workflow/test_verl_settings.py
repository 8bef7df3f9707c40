"""verl's settings: known ones become Hydra's arguments, and every other is refused with the nearest name, without verl."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UsageError
from runner.system.places import CONFIGS
from runner.workflow import verl_settings
from runner.workflow.stages import Program
from runner.workflow.verl import TRAINERS
from runner.workloads import rl

EVERY = [("ppo", "fsdp"), ("ppo", "megatron"), ("sft", "fsdp"), ("sft", "megatron")]
ACTOR = "actor_rollout_ref"


@pytest.fixture
def ppo():
    return verl_settings.trainer("ppo")


def refusal(trainer, key, value=1):
    with pytest.raises(UsageError) as error:
        trainer.overrides({key: value})
    message = str(error.value)
    assert message.startswith(f"--set verl.{key}: ") and "\n" not in message
    return message


# --- names ---


def test_the_configuration_is_that_of_the_verl_of_the_profiles():
    content = json.loads((CONFIGS / "verl" / f"{rl.VERL}.json").read_text())
    assert content["verl"] == rl.VERL == verl_settings.VERSION


def test_a_setting_of_the_configuration_is_written_as_it_is(ppo):
    settings = {"trainer.nnodes": 2, f"{ACTOR}.actor.optim.lr": 1e-6, "data.train_files": "/data/a.parquet"}
    assert ppo.overrides(settings) == [
        "trainer.nnodes=2",
        f"{ACTOR}.actor.optim.lr=1e-06",
        "data.train_files=/data/a.parquet",
    ]


@pytest.mark.parametrize(
    "key",
    [
        f"{ACTOR}.model.override_config.attn_implementation",  # an open dictionary
        f"{ACTOR}.rollout.engine_kwargs.vllm.max_model_len",
        f"{ACTOR}.rollout.engine_kwargs.vllm.compilation_config.level",
        f"{ACTOR}.actor.fsdp_config.mixed_precision",  # a field of the class that the file leaves out
        f"{ACTOR}.actor.fsdp_config.mixed_precision.param_dtype",
    ],
)
def test_what_the_configuration_lacks_but_verl_takes_gets_a_plus(ppo, key):
    value = {"param_dtype": "bf16"} if key.endswith("mixed_precision") else "x"
    (word,) = ppo.overrides({key: value})
    assert word.startswith((f"+{key}=", f"+{key}.param_dtype="))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("trainer.nnode", "did you mean 'nnodes'?"),
        ("trainer.nnodes.x", "did you mean"),
        ("triner.nnodes", "did you mean 'trainer.nnodes'?"),
        (f"{ACTOR}.rollout.tensor_parallel_size", "did you mean 'moe_tensor_parallel_size'?"),
        (f"{ACTOR}.rollout.tensor_model_parallel_sizes", "did you mean 'tensor_model_parallel_size'?"),
        ("critic.model.fsdp_config.param_offload", "did you mean 'critic.fsdp.param_offload'?"),  # its name before 0.9
        ("lr", f"one of critic.optim.lr, {ACTOR}.actor.optim.lr?"),
        ("algorithm.adv_estimatr", "did you mean 'adv_estimator'?"),
        ("zzz", "known: "),
        ("", "known: "),
        ("trainer.", "known: "),
        (".", ""),
        ("trainer..nnodes", ""),
        ("trainer._target_", ""),
        (f"{ACTOR}.model.override_config.a b", ""),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(ppo, key, hint):
    message = refusal(ppo, key)
    assert f"verl {verl_settings.VERSION}" in message and hint in message


def test_a_setting_of_the_other_engine_is_unknown():
    key = f"{ACTOR}.actor.megatron.tensor_model_parallel_size"
    assert verl_settings.trainer("ppo", "megatron").overrides({key: 2})[-1] == f"{key}=2"
    assert "unknown setting" in refusal(verl_settings.trainer("ppo"), key)


def test_the_engine_is_chosen_first_and_not_by_a_setting():
    megatron = verl_settings.trainer("sft", "megatron")
    assert megatron.overrides({"trainer.nnodes": 2}) == ["engine=megatron", "optim=megatron", "trainer.nnodes=2"]
    for key in ("engine", "optim"):
        assert "the training engine decides it" in refusal(verl_settings.trainer("sft"), key, "megatron")
    assert "the training engine decides it" in refusal(verl_settings.trainer("ppo"), "model_engine", "megatron")


@pytest.mark.parametrize(("name", "engine", "meant"), [("pp", "fsdp", "ppo"), ("ppo", "fsdp3", "fsdp")])
def test_an_unknown_trainer_or_engine_is_refused(name, engine, meant):
    with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
        verl_settings.trainer(name, engine)


@pytest.mark.parametrize(("name", "engine"), EVERY)
def test_every_default_is_a_value_of_its_setting(name, engine):
    trainer = verl_settings.trainer(name, engine)
    places = {path: trainer.place(path) for path in trainer.paths}
    given = {path: place.default for path, place in places.items() if place.present}
    given = {path: value for path, value in given.items() if not str(value).startswith("${")}
    assert len(given) > 190
    wrong = {path: places[path] for path, value in given.items() if verl_settings.mismatch(places[path], value)}
    assert not {path for path in wrong if given[path] != verl_settings.MANDATORY}


@pytest.mark.parametrize("name", rl.SETTINGS)
def test_what_a_cpu_needs_is_known_to_verl(name):
    trainer = verl_settings.trainer(TRAINERS[Program(name)])
    words = trainer.overrides(rl.SETTINGS[name])
    assert len(words) == len(rl.SETTINGS[name])


def test_what_has_no_default_is_asked_for(ppo):
    assert ppo.missing({}, f"{ACTOR}.") == [f"{ACTOR}.rollout.name"]
    assert ppo.missing({f"{ACTOR}.rollout.name": "vllm"}, f"{ACTOR}.") == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (f"{ACTOR}.actor.optim", {"lr": 1e-5}, [f"{ACTOR}.actor.optim.lr=1e-05"]),
        (f"{ACTOR}.model.override_config", {"a": {"b": 1}, "c": "x"}, ["+{}.a.b=1", "+{}.c=x"]),
        (f"{ACTOR}.model.override_config", {}, ["{}={{}}"]),
        (
            f"{ACTOR}.model.override_config.rope",
            {"type": "yarn", "l": [1, {"d": 2}]},
            ["+{}.type=yarn", "+{}.l=[1,{{d:2}}]"],
        ),
        ("trainer", {"nnodes": 4, "logger": ["console"]}, ["trainer.nnodes=4", "trainer.logger=[console]"]),
    ],
)
def test_a_dictionary_is_the_settings_in_it(ppo, key, value, words):
    assert ppo.overrides({key: value}) == [word.format(key) for word in words]


def test_a_setting_in_a_dictionary_is_checked_as_one_that_is_written_out(ppo):
    assert "did you mean 'lr'" in refused(ppo, f"{ACTOR}.actor.optim", {"lrx": 1e-5}, f"{ACTOR}.actor.optim.lrx")
    assert "a number is needed" in refused(ppo, f"{ACTOR}.actor.optim", {"lr": "fast"}, f"{ACTOR}.actor.optim.lr")
    assert "a dictionary is needed, got null" in refusal(ppo, f"{ACTOR}.actor.optim", None)


def refused(trainer, key, value, at):
    with pytest.raises(UsageError) as error:
        trainer.overrides({key: value})
    assert str(error.value).startswith(f"--set verl.{at}: ")
    return str(error.value)


# --- values ---


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("trainer.nnodes", "two", "a whole number is needed, got two"),
        ("trainer.nnodes", 1.5, "a whole number is needed, got 1.5"),
        ("trainer.nnodes", True, "a whole number is needed, got true"),
        ("trainer.nnodes", [1], "a whole number is needed, got [1]"),
        (f"{ACTOR}.actor.optim.lr", "fast", "a number is needed, got fast"),
        ("trainer.val_before_train", 1, "true or false is needed, got 1"),
        ("trainer.val_before_train", None, "true or false is needed, got null"),
        (f"{ACTOR}.actor.optim", 3, "a dictionary is needed, got 3"),
        (f"{ACTOR}.actor.strategy", ["fsdp"], "a text is needed, got [fsdp]"),
        ("trainer.default_local_dir", {"a": 1}, "a text or a list is needed, got {a:1}"),
    ],
)
def test_a_value_of_another_type_is_refused(ppo, key, value, needed):
    assert refusal(ppo, key, value).endswith(needed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{ACTOR}.actor.optim.lr", 1),
        ("data.train_files", ["/a.parquet", "/b.parquet"]),
        ("trainer.logger", "console"),
        ("trainer.total_training_steps", None),
        ("trainer.experiment_name", 7),
        ("reward.custom_reward_function.path", "/rewards/mine.py"),
    ],
)
def test_what_verl_takes_is_taken(ppo, key, value):
    assert ppo.overrides({key: value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("1e-6", 1e-6),
        ("1_000", 1000),
        ("1_", "1_"),
        ("1__0", "1__0"),
        ("٣", "٣"),
        ("0.5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("on", "on"),
        ("'1'", "1"),
        ("fsdp2", "fsdp2"),
        ("/a/b.parquet", "/a/b.parquet"),
        ("[console,wandb]", ["console", "wandb"]),
        ("[1e-6, 2]", [1e-6, 2]),
        ("{a: 1e-6, b: [x]}", {"a": 1e-6, "b": ["x"]}),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_text_is_read_as_hydra_reads_it(text, value):
    found = verl_settings.value_of(text)
    assert found == value and type(found) is type(value)


def test_a_bracket_that_is_open_is_refused_in_one_line():
    with pytest.raises(UsageError) as error:
        verl_settings.value_of("[a,")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-6, "1e-06"),
        ("plain/path.txt", "plain/path.txt"),
        ("true", "'true'"),
        ("12", "'12'"),
        ("", "''"),
        ("it's", "'it\\'s'"),
        ("a b,c=d", "'a b,c=d'"),
        ("a\\", "'a\\\\'"),
        (["a", 1], "[a,1]"),
        ({"a": {"b": 0.5}}, "{a:{b:0.5}}"),
    ],
)
def test_a_value_is_written_in_hydras_grammar(value, text):
    assert verl_settings.literal(value) == text


def test_what_hydra_cannot_write_is_refused():
    for value in (
        "a\nb",
        "a\x00b",
        "\u2028",
        "\ud800",
        {"a b": 1},
        "${trainer.nnodes}",
        "a${b}",
        ["${oc.env:HF_TOKEN}"],
    ):
        with pytest.raises(UsageError):
            verl_settings.literal(value, "x")


@given(st.text(), st.text())
def test_no_setting_breaks_the_check(key, text):
    trainer = verl_settings.trainer("sft")
    try:
        words = trainer.overrides({key: verl_settings.value_of(text)})
    except UsageError as error:
        assert str(error)
    else:
        assert len(words) == 1
