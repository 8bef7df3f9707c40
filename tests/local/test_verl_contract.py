"""What the plugin for CPUs and the settings take for granted of verl, asked of the verl of the lock itself.

Red here means that verl's interface has moved: the lock, `runner.workloads.rl` and `configs/verl/` belong together.
"""

from __future__ import annotations

import json
import math
import re
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import verl_environment
from role_modules import ROOT
from runner.cluster.tools.verl_metrics import CURVES, PHASES, step_of
from runner.errors import UsageError
from runner.workflow import verl_settings
from runner.workflow.stages import Program
from runner.workflow.verl import LOGGERS, TRAINERS
from runner.workloads import rl
from runner.workloads.data import verl as data
from runner.workloads.rl import tiny

pytestmark = [pytest.mark.local, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def verl():
    """A function that runs code where verl is, and gives what it prints as JSON on its last line."""
    try:
        verl_environment.python()
    except (LookupError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no environment with verl: {error}")
    with verl_environment.Session() as session:
        yield session.ask


KEY = "0123456789abcdef0123456789abcdef01234567"


def test_verl_writes_metrics_where_it_is_told_and_the_phase_while_it_lasts_and_no_key(verl, tmp_path):
    """Of Weights & Biases nothing is sent; NaN is null; `runner.workloads.rl.mark` has the trainers' own timer."""
    phase, timers, offline, tensorboard, lines = verl(f"""
import json, os, pathlib
os.environ.pop("WANDB_MODE")
os.environ["WANDB_API_KEY"] = {KEY!r}
from runner.workloads.job import Events
from runner.workloads.rl import phases, trainer
events = Events(pathlib.Path({str(tmp_path)!r}), 0)
folder = events.folder
os.environ.update(trainer.environment(events) | phases.environment(folder.phase, os.environ))
from verl.trainer.ppo.v1 import trainer_base
timing = {{}}
with trainer_base.marked_timer("gen", timing, color="red"):
    phase = phases.read(folder.phase)
from verl.utils.tracking import Tracking
tracking = Tracking("p", "e", ["console", "file", "wandb", "tensorboard"], {{"trainer": {{}}}})
tracking.log({{"critic/rewards/mean": float("nan"), "timing_s/step": 1.0}}, 1)
tracking.finish()
lines = folder.verl_metrics(0).read_text().splitlines()
print(json.dumps([phase, list(timing), len(folder.offline_runs), folder.tensorboard.is_dir(), lines]))
""")
    assert (phase, timers, offline, tensorboard) == ("rollout", ["gen"], 1, True)
    (step,) = map(step_of, lines)
    assert step.seconds == 1.0 and step.not_numbers == ("critic/rewards/mean",)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_the_loggers_that_are_taken_are_verls(verl):
    (folder,) = verl_environment.python().parents[1].glob("lib/python3*/site-packages/verl")
    (listed,) = re.findall(r"supported_backend = \[(.*?)\]", (folder / "utils/tracking.py").read_text(), re.DOTALL)
    assert set(LOGGERS) == set(re.findall(r"\w+", listed))


def test_what_is_measured_is_what_verls_trainer_times_and_computes(verl):
    """Every name that `tools.verl_metrics` reads is written in verl's own source."""
    (folder,) = verl_environment.python().parents[1].glob("lib/python3*/site-packages/verl")
    files = ("sft_trainer.py", "ppo/metric_utils.py", "ppo/v1/trainer_base.py", "ppo/v1/trainer_sync.py")
    paths = [*(folder / "trainer" / file for file in files), folder / "utils" / "seqlen_balancing.py"]
    source = "".join(path.read_text() for path in paths)
    # As a constant, or as the end of one, where verl adds what is before it.
    names = [*(f"marked_timer({json.dumps(timer)}" for timer in PHASES.values())]
    names += [name for keys in CURVES.values() for name in keys if name.startswith(("critic/", "response_", "val/"))]
    assert [name for name in names if name not in source] == []
    assert all(part in source for part in ("balanced_max", "train/{k}", "train/global_tokens", "perf/total_num_tokens"))


def test_verl_takes_the_platform_and_the_rollout_from_the_plugin(verl):
    found = verl("""
import inspect, json, verl
from verl.plugin.platform import get_platform
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class
platform, rollout, replica = get_platform(), get_rollout_class("hf"), get_rollout_replica_class("hf")
print(json.dumps({
    "modules": [type(platform).__module__, rollout.__module__, replica.__module__],
    "abstract": [inspect.isabstract(kind) for kind in (type(platform), rollout, replica)],
    "backend": platform.communication_backend_name(),
}))""")
    module = "runner.workloads.rl"
    assert found["modules"] == [f"{module}.cpu", f"{module}.rollout", f"{module}.rollout"]
    assert found["abstract"] == [False, False, False] and found["backend"] == "gloo"


def test_verls_own_process_group_starts(verl):
    found = verl("""
import json, os
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from verl.utils import distributed
import torch
began = distributed.initialize_global_process_group()
total = torch.ones(2)
torch.distributed.all_reduce(total)
print(json.dumps([list(began), total.tolist()]))
torch.distributed.destroy_process_group()
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]""")
    assert found == [[0, 0, 1], [1.0, 1.0]]


def test_the_engines_for_fsdp_are_found_on_a_cpu(verl):
    assert verl("""
import json, verl
from verl.workers.engine import EngineRegistry
kinds = [EngineRegistry.get_engine_cls(model, "fsdp2") for model in ("language_model", "value_model")]
print(json.dumps([kind.__name__ for kind in kinds]))""")


def test_the_critic_is_loaded_by_the_function_that_is_replaced(verl):
    found = verl("""
import ast, inspect, json, verl, verl.utils.model, verl.workers.engine.fsdp.transformer_impl as engine
source = ast.parse(inspect.getsource(verl.utils.model))
theirs = next(n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == "load_valuehead_model")
ours = verl.utils.model.load_valuehead_model
print(json.dumps({
    "theirs": [a.arg for a in theirs.args.args],
    "ours": list(inspect.signature(ours).parameters),
    "module": ours.__module__,
    "used": "import load_valuehead_model" in inspect.getsource(engine),
}))""")
    assert found["theirs"] == found["ours"] and found["module"] == "runner.workloads.rl.cpu" and found["used"]


def test_the_reference_is_kept_in_memory_that_is_not_pinned(verl):
    found = verl("""
import json, verl, verl.workers.engine.fsdp.transformer_impl as engine
policy = engine.CPUOffloadPolicy(pin_memory=True)
print(json.dumps([type(policy).__name__, policy.pin_memory]))""")
    assert found == ["CPUOffloadPolicy", False]


def test_the_driver_starts_verls_controller_through_the_function_that_is_replaced(verl):
    found = verl("""
import ast, inspect, json, verl.trainer.main_ppo as main
tree = ast.parse(inspect.getsource(main))
calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "run_ppo"]
print(json.dumps([[sorted(k.arg for k in c.keywords) for c in calls], list(inspect.signature(main.run_ppo).parameters)]))
""")
    calls, parameters = found
    assert calls and all(keywords == ["task_runner_class"] for keywords in calls)
    assert parameters == ["config", "task_runner_class"]


def test_a_server_has_every_method_that_verl_calls(verl):
    called, has = verl("""
import ast, inspect, json, verl
from verl.workers.rollout import replica, llm_server
from runner.workloads.rl.rollout import Server
calls = set()
for module in (replica, llm_server):
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and node.attr == "remote" and isinstance(node.value, ast.Attribute):
            if isinstance(node.value.value, ast.Name) and node.value.value.id == "server":
                calls.add(node.value.attr)
print(json.dumps([sorted(calls), dir(Server)]))""")
    assert "generate" in called and "wake_up" in called
    assert set(called) <= set(has)


def test_without_its_environment_the_plugin_is_not_there(verl):
    outcome = verl_environment.run(
        """
import json, sys, torch.distributed
before = torch.distributed.init_process_group
import verl, runner.workloads.rl
from verl.workers.rollout import base
same = torch.distributed.init_process_group is before
print(json.dumps(["runner.workloads.rl.cpu" in sys.modules, same, ("hf", "async") in base._ROLLOUT_REGISTRY]))""",
        plugin=False,
    )
    assert json.loads(outcome.stdout.splitlines()[-1]) == [False, True, False]


def test_another_verl_is_refused_in_words(verl):
    outcome = verl_environment.run(
        "from importlib import metadata; real = metadata.version\n"
        "metadata.version = lambda name: '0.9.2' if name == 'verl' else real(name)\nimport verl"
    )
    last = outcome.stderr.strip().splitlines()[-1]
    assert outcome.returncode and f"is for verl {rl.VERL}, found 0.9.2; install the profile cpu-smoke again" in last


def test_the_settings_are_those_of_this_verl(verl):
    script = ROOT / "configs" / "verl" / "extract.py"
    text = verl(f"""
import importlib.util, json, pathlib
spec = importlib.util.spec_from_file_location("extract", {str(script)!r})
extract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extract)
place = pathlib.Path(importlib.util.find_spec("verl").origin).parents[1]
print(json.dumps(extract.text(extract.extract(place))))""")
    assert text == (ROOT / "configs" / "verl" / f"{rl.VERL}.json").read_text()


CONFIGS = {"sft": "sft_trainer_engine", "ppo": "ppo_trainer"}
COMPOSE = """
import importlib.util, json, pathlib
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
place = pathlib.Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "config"
"""


@pytest.mark.parametrize("name", rl.SETTINGS)
def test_hydra_reads_every_setting_as_it_was_meant(verl, name):
    trainer = verl_settings.trainer(TRAINERS[Program(name)])
    read = verl(f"""{COMPOSE}
with initialize_config_dir(str(place), version_base=None):
    tree = compose({CONFIGS[trainer.name]!r}, overrides={trainer.overrides(rl.SETTINGS[name])!r})
print(json.dumps({{key: OmegaConf.select(tree, key) for key in {list(rl.SETTINGS[name])!r}}}))""")
    assert read == rl.SETTINGS[name]


def test_hydra_takes_what_a_user_gives_as_a_dictionary(verl):
    model, optim = "actor_rollout_ref.model.override_config", "actor_rollout_ref.actor.optim"
    words = verl_settings.trainer("ppo").overrides({model: {"rope": {"type": "yarn"}}, optim: {"lr": 0.5}})
    assert verl(f"""{COMPOSE}
with initialize_config_dir(str(place), version_base=None):
    tree = compose("ppo_trainer", overrides={words!r})
print(json.dumps([OmegaConf.select(tree, "{model}.rope.type"), OmegaConf.select(tree, "{optim}.lr")]))""") == [
        "yarn",
        0.5,
    ]


def test_what_trainers_are_told_is_a_configuration_that_verl_itself_accepts(verl):
    goldens = {path.name: path.read_text().splitlines() for path in (ROOT / "tests/golden/workflow").glob("*-*.txt")}
    told = {name: lines for name, lines in goldens.items() if lines[1] == "-m"}
    assert {name.partition("-")[0] for name in told} == set(rl.SETTINGS)
    read = verl(f"""{COMPOSE}
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config.model import HFModelConfig
opens, HFModelConfig.__post_init__ = HFModelConfig.__post_init__, lambda self: None  # the model is not here
out = {{}}
with initialize_config_dir(str(place), version_base=None):
    for name, (_, _, module, *words) in json.loads({json.dumps(json.dumps(told))}).items():
        sft = module.endswith("sft_trainer")
        tree = compose({CONFIGS["sft"]!r} if sft else {CONFIGS["ppo"]!r}, overrides=words)
        OmegaConf.to_container(tree, resolve=True)
        if sft:
            omega_conf_to_dataclass(tree.engine), omega_conf_to_dataclass(tree.optim)
        else:
            validate_config(tree, need_reference_policy(tree), need_critic(tree))
        keys = [word.lstrip("+").partition("=")[0] for word in words]
        out[name] = {{key: OmegaConf.to_container(tree)[key] if "." not in key else OmegaConf.select(tree, key)
                     for key in keys if key not in ("engine", "optim", "model_engine")}}
HFModelConfig.__post_init__ = opens
print(json.dumps(out, default=OmegaConf.to_container))""")
    assert set(read) == set(told)
    assert read["ppo-gpu.txt"]["actor_rollout_ref.rollout.tensor_model_parallel_size"] == 2
    assert read["sft-cpu.txt"]["trainer.logger"] == ["console", "file"]


@pytest.fixture(scope="module")
def hydra(verl):
    """A function that gives the key and the value that Hydra reads in a word."""

    def read(word: str) -> object:
        return verl(f"""
import json
from hydra.core.override_parser.overrides_parser import OverridesParser
(read,) = OverridesParser.create().parse_overrides([json.loads({json.dumps(word)!r})])
print(json.dumps([read.key_or_group, read.value()]))""")

    return read


TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=1000, deadline=None)
@given(value=VALUES)
@example(value="it's")
@example(value="ends with \\")
@example(value="\\'")
@example(value="1e-6")
@example(value="null")
@example(value="a b,c=d [x] {y:1} $z %(s)s #")
def test_hydra_reads_every_value_back(hydra, value):
    try:
        written = verl_settings.literal(value, "a.b")
    except UsageError:
        return
    assert hydra(f"a.b={written}") == ["a.b", value]


@settings(max_examples=500, deadline=None)
@given(text=st.from_regex(r"[-+0-9._eE]{1,6}|true|Null|[A-Za-z0-9/_.,:=-]{1,8}", fullmatch=True))
@example(text="1E400")
def test_what_a_user_types_is_read_as_hydra_would(hydra, text):
    meant = verl_settings.value_of(text)
    try:
        written = verl_settings.literal(meant, "a.b")
    except UsageError:
        assert meant in (math.inf, -math.inf)  # a number that no float can hold
        return
    assert hydra(f"a.b={written}") == ["a.b", meant]


def test_verl_reads_the_data_and_judges_its_answers_right(verl, tmp_path):
    source = data.open_source(data.ARITHMETIC, 64)
    chats, prompts = (data.prepare(source, schema, tmp_path) for schema in (data.Schema.MESSAGES, data.Schema.PROMPTS))
    model, _ = tiny.make(tmp_path)
    found = verl(f"""
import json
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.reward_score import default_compute_score
tokenizer = AutoTokenizer.from_pretrained({str(model)!r})
chats = MultiTurnSFTDataset([{str(chats.train)!r}], tokenizer, OmegaConf.create({{"max_length": 128, "pad_mode": "no_padding"}}))
prompts = RLHFDataset([{str(prompts.train)!r}], tokenizer, OmegaConf.create({{"max_prompt_length": 64}}))
answers = [chat[-1]["content"] for chat in chats.messages]
rows = [prompts[number] for number in range(len(prompts))]
learnt = [tokenizer.decode(one["input_ids"][one["loss_mask"].bool()]) for one in (chats[n] for n in range(len(chats)))]
print(json.dumps({{
    "rows": [len(chats), len(prompts)],
    "scores": [default_compute_score(row["data_source"], answer, row["reward_model"]["ground_truth"])
               for row, answer in zip(rows, answers, strict=True)],
    "wrong": default_compute_score(rows[0]["data_source"], "#### -5", rows[0]["reward_model"]["ground_truth"]),
    "learnt": [answers, learnt],
}}))""")
    assert found["rows"] == [56, 56]
    assert (set(found["scores"]), found["wrong"]) == ({1.0}, 0.0)
    answers, learnt = found["learnt"]
    assert learnt == [f"{answer}<|eos|>" for answer in answers]


def test_the_data_sources_that_verl_judges_are_those_that_it_knows(verl):
    known = verl("""
import ast, inspect, json
from verl.utils import reward_score
tree = ast.parse(inspect.getsource(reward_score.default_compute_score))
print(json.dumps([each.value for node in ast.walk(tree) if isinstance(node, ast.Compare)
                  and isinstance(node.left, ast.Name) and node.left.id == "data_source"
                  for each in ast.walk(node.comparators[0]) if isinstance(each, ast.Constant)]))""")
    assert sorted(known) == sorted(data.JUDGED)


def test_the_tiny_model_is_whole_and_the_same_as_transformers_writes_it(verl, tmp_path):
    model, _ = tiny.make(tmp_path)
    found = verl(f"""
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, about = AutoModelForCausalLM.from_pretrained({str(model)!r}, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained({str(model)!r})
ids = tokenizer("Tom has 3 cups", return_tensors="pt")["input_ids"]
loss = model(ids, labels=ids).loss.item()
print(json.dumps([sorted(about["missing_keys"]) + sorted(about["unexpected_keys"]), loss, len(tokenizer)]))""")
    problems, loss, tokens = found
    assert problems == [] and abs(loss - math.log(tokens)) < 0.5, "random weights: every token is as likely"
