"""What a workflow needs, found before anything is submitted: all reasons at once, checksums, and where nodes see it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pyarrow.parquet
import pytest

from runner.errors import InfrastructureError, UsageError
from runner.system import manifest
from runner.workflow import models, prepare, stages
from runner.workflow.prepare import Asked, needed_bytes, preview
from runner.workflow.progress import shown
from runner.workloads.rl import tiny

GOOD_REWARD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
QUESTION = {"question": "What is 1 + 2?", "answer": "#### 3"}


@pytest.fixture
def asked(tmp_path):
    """A function that returns what is asked for, where ranks run on this machine."""
    (tmp_path / "lock.txt").write_text("torch==2.13.0\n")

    def make(workflow: str = "sft-ppo", **options) -> Asked:
        places = {"work": tmp_path / "work", "cache": tmp_path / "cache", "lock": tmp_path / "lock.txt"}
        return Asked(
            **{"workflow": workflow, "profile": "cpu-smoke", "samples": 64, "seen": (Path("/"),), **places, **options}
        )

    return make


@pytest.fixture
def elsewhere(asked, tmp_path):
    """The same where nodes see nothing but the work folder."""
    return lambda *args, **options: asked(*args, **{"seen": (tmp_path / "work",), **options})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture
def own_model(tiny_model, tmp_path):
    """A folder of weights as people have it: without a manifest of ours."""
    folder = tmp_path / "my model"
    shutil.copytree(tiny_model, folder)
    (folder / manifest.NAME).unlink()
    return folder


def lines(tmp_path, *rows, name="a.jsonl"):
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / name)


# ---- without a hub, a model or data ----


@pytest.mark.parametrize(
    ("workflow", "artefacts"),
    [("sft-ppo", {"sft-data", "rl-data"}), ("sft", {"sft-data"}), ("ppo", {"rl-data"}), ("grpo", {"rl-data"})],
)
def test_a_machine_without_a_hub_has_all_that_a_workflow_needs(asked, workflow, artefacts):
    found = prepare.prepare(asked(workflow))
    assert set(found.data) == artefacts
    assert set(found.checksums) == {"environment", "model", *artefacts}
    assert stages.inputs(workflow, {}, found.checksums)["prepare"].keys() >= set(found.checksums)
    assert manifest.complete(found.model).digest == found.checksums["model"]
    for artefact, files in found.data.items():
        assert manifest.complete(files.train.parent).digest == found.checksums[artefact]
        assert pyarrow.parquet.read_table(files.val).num_rows == 8
    assert found.question.endswith("?") and found.parameters == 102976


def test_nothing_is_made_twice_and_a_dry_run_says_the_same(asked):
    first = prepare.prepare(asked())
    assert preview(asked()) == first == prepare.prepare(asked())


def test_a_dry_run_writes_nothing_and_names_the_same_paths(asked, tmp_path):
    seen = preview(asked())
    assert not (tmp_path / "cache").exists() and not (tmp_path / "work").exists()
    found = prepare.prepare(asked())
    assert (seen.model, seen.data, seen.question) == (found.model, found.data, found.question)
    assert (seen.checksums["environment"], seen.checksums["model"]) == (found.checksums["environment"], "")


# ---- checksums: what changes which ----


def test_other_data_for_ppo_leave_those_of_fine_tuning(asked, tmp_path):
    both = prepare.prepare(asked())
    other = prepare.prepare(asked(rl_data=lines(tmp_path, QUESTION)))
    changed = {name for name in both.checksums if both.checksums[name] != other.checksums[name]}
    assert changed == {"rl-data"}


def test_each_input_has_a_checksum_of_its_content(asked, own_model, tmp_path):
    source = lines(tmp_path, QUESTION)
    ask = lambda: prepare.prepare(asked(model=str(own_model), data=source)).checksums  # noqa: E731
    first = ask()
    assert ask() == first
    (own_model / "generation_config.json").write_text("{}")
    second = ask()
    assert {name for name in first if first[name] != second[name]} == {"model"}
    lines(tmp_path, {**QUESTION, "question": "And 2 + 1?"})
    third = ask()
    assert {name for name in first if second[name] != third[name]} == {"sft-data", "rl-data"}
    (tmp_path / "lock.txt").write_text("torch==2.14.0\n")
    assert {name for name, digest in ask().items() if third[name] != digest} == {"environment"}


def test_weights_that_have_not_changed_are_not_read_again(asked, own_model):
    read = []
    at = lambda what, done, total: read.append(what)  # noqa: E731
    first = prepare.prepare(asked(model=str(own_model)), at)
    assert "reading the model's checksums" in read
    assert not (own_model / manifest.NAME).exists(), "a folder of the user's stays as it is"
    read.clear()
    assert prepare.prepare(asked(model=str(own_model)), at) == first
    assert "reading the model's checksums" not in read
    assert preview(asked(model=str(own_model))).checksums == first.checksums


# ---- where nodes see it ----


def test_what_nodes_do_not_see_is_copied_whole_to_where_they_do(elsewhere, own_model, tmp_path):
    reward = tmp_path / "my reward.py"
    reward.write_text(GOOD_REWARD)
    found = prepare.prepare(elsewhere(model=str(own_model), reward=reward))
    paths = [found.model, found.reward, *(path for files in found.data.values() for path in (files.train, files.val))]
    assert all(path.is_relative_to(tmp_path / "work") for path in paths)
    made = manifest.read(found.model)
    assert made.digest == found.checksums["model"] and list(manifest.faults(found.model, made)) == []
    assert (found.reward.read_text(), found.reward.name) == (GOOD_REWARD, "my reward.py")
    before = found.model.stat().st_ino
    assert prepare.prepare(elsewhere(model=str(own_model), reward=reward)) == found
    assert found.model.stat().st_ino == before, "copied once"
    assert preview(elsewhere(model=str(own_model), reward=reward)) == found


def test_what_nodes_see_stays_where_it_is(elsewhere, tiny_model, tmp_path):
    folder = tmp_path / "work" / "weights"
    shutil.copytree(tiny_model, folder)
    assert prepare.prepare(elsewhere(model=str(folder))).model == folder


def test_a_link_to_a_place_that_nodes_do_not_see_is_copied(elsewhere, own_model, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "weights").symlink_to(own_model)
    found = prepare.prepare(elsewhere(model=str(tmp_path / "work" / "weights")))
    assert found.model.resolve().is_relative_to(tmp_path / "work")


def test_another_model_of_the_same_name_has_another_folder(elsewhere, own_model):
    first = prepare.prepare(elsewhere(model=str(own_model))).model
    (own_model / "generation_config.json").write_text("{}")
    second = prepare.prepare(elsewhere(model=str(own_model))).model
    assert first != second and first.exists()


# ---- reasons ----


def test_all_reasons_are_told_at_once_and_nothing_is_copied(elsewhere, tmp_path):
    source = lines(tmp_path, {"text": "a"})
    options = {"model": "no-such-model", "data": source, "reward": tmp_path / "none.py", "publish": "ftp:x"}
    for ask in (prepare.prepare, preview):
        with pytest.raises(UsageError) as caught:
            ask(elsewhere(lock=tmp_path / "none.txt", **options))
        head, *reasons = str(caught.value).split("\n  ")
        assert head == "5 reasons not to start:"
        assert [reason.split()[0] for reason in reasons] == [
            "profile",
            "--model",
            f"{source}:",
            "reward",
            "--publish",
        ]
        assert not any("\n" in reason for reason in reasons)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("lama-3.2-1b-instruct", "unknown model 'lama-3.2-1b-instruct'; did you mean 'llama-3.2-1b-instruct'?"),
        ("/no/such/folder", "model /no/such/folder: its weights are not there: there is no such folder"),
        ("./none", "/none: its weights are not there: there is no such folder"),
    ],
)
def test_a_model_that_there_is_not_is_one_line(asked, model, says):
    with pytest.raises(UsageError) as caught:
        prepare.prepare(asked(model=model))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def drop(name):
    return lambda folder: (folder / name).unlink()


def no_template(folder):
    words = json.loads((folder / "tokenizer_config.json").read_text())
    del words["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop("config.json"), "its weights have no config.json"),
        (drop("model.safetensors"), "its weights are none: the folder has neither model.safetensors nor"),
        (drop("tokenizer.json"), "has no tokenizer (tokenizer.json): copy it there"),
        (no_template, "its tokenizer has no chat template, with which verl asks questions: take an instruct model, or"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\x08"),
            "its weights are not all there: model.saf",
        ),
    ],
)
def test_a_folder_that_is_no_whole_model_is_one_line(asked, own_model, damage, says):
    damage(own_model)
    for ask in (prepare.prepare, preview):
        with pytest.raises(UsageError) as caught:
            ask(asked(model=str(own_model)))
        assert says in str(caught.value) and "\n" not in str(caught.value)
        assert caught.value.kind == "weights_unusable"


@pytest.mark.parametrize("extra", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_may_be_a_file_of_its_own(asked, own_model, extra):
    no_template(own_model)
    (own_model / extra).write_text("{}")
    assert prepare.prepare(asked(model=str(own_model))).model == own_model


@pytest.mark.parametrize(
    ("name", "repo"),
    [("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"), ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
     ("some/model@main", "some/model@main")],
)  # fmt: skip
def test_a_model_of_the_hub_is_named_as_people_say(asked, tmp_path, monkeypatch, name, repo):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert models.hub_id(name) == repo
    seen = preview(asked(model=name))
    assert (seen.model.parent, seen.checksums["model"]) == (tmp_path / "work" / "inputs", "")
    assert seen.notes == (f"model {repo}: not here yet, fetched from the hub when it starts",)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "HF_TOKEN is not set" in preview(asked(model=name)).notes[0]


def test_data_of_the_hub_are_not_asked_for_in_a_dry_run(asked):
    seen = preview(asked("sft", data="gsm8k"))  # a network is not there in unit tests
    assert seen.checksums["sft-data"] == "" and seen.data["sft-data"].val is not None


# ---- the reward file ----


@pytest.mark.parametrize(
    "text",
    [
        GOOD_REWARD,
        "async def compute_score(data_source, solution_str, ground_truth, extra_info): ...",
        "def compute_score(solution_str, **other): ...",
        "def compute_score(*, data_source, solution_str, ground_truth, extra_info, mine=1): ...",
        "from mine import compute_score",
        "import functools\nscore = print\ncompute_score = functools.partial(score)",
        "try:\n    from a import compute_score\nexcept ImportError:\n    compute_score = None",
        "raise SystemExit('it is never run here')\n" + GOOD_REWARD,
        "compute_score = None\nif True:\n    " + GOOD_REWARD.replace("\n", "\n    "),
        "compute_score = lambda data_source, solution_str, ground_truth, extra_info: 1.0",
        "compute_score: object = print",
    ],
)
def test_a_file_with_compute_score_is_taken_and_not_run(asked, tmp_path, text):
    reward = tmp_path / "reward.py"
    reward.write_text(text)
    found = prepare.prepare(asked("ppo", reward=reward))
    assert (found.reward, found.reward_sha256) == (reward, hashlib.sha256(text.encode()).hexdigest())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: no such file or directory"),
        ("def compute_score(:\n", "line 1: not Python: "),
        ("x = 1\n  y = 2\n", "line 2: not Python: unexpected indent"),
        ("return 1", "line 1: not Python: 'return' outside function"),
        ("\0", "not Python: "),
        ("def score(a): ...\ndef other(): ...", "has no function compute_score; it has score, other"),
        ("", "has no function compute_score"),
        ("class A:\n    def compute_score(self): ...", "has no function compute_score"),
        ("compute_score = 3", "line 1: compute_score is no function: define it with def"),
        ("compute_score: int = 3", "line 1: compute_score is no function"),
        (GOOD_REWARD + "compute_score = 'later'", "line 3: compute_score is no function"),
        ("compute_score: object", "has no function compute_score"),
        ("def other():\n    compute_score = print", "has no function compute_score; it has other"),
        ("compute_score = lambda text: 1.0", "compute_score does not take data_source"),
        (
            "def compute_score(data_source, text): ...",
            "compute_score does not take solution_str, ground_truth, extra_info: ",
        ),
    ],
)
def test_a_reward_file_that_verl_could_not_use_is_one_line(asked, tmp_path, text, says):
    reward = tmp_path / "reward.py"
    if text is not None:
        reward.write_text(text)
    with pytest.raises(UsageError) as caught:
        prepare.prepare(asked("ppo", reward=reward))
    assert f"reward {reward}" in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_a_reward_file_is_for_ppo_alone(asked, tmp_path):
    (tmp_path / "reward.py").write_text(GOOD_REWARD)
    source = lines(tmp_path, {"instruction": "Sing.", "output": "La."})
    found = prepare.prepare(asked(data=source, reward=tmp_path / "reward.py"))
    assert set(found.data) == {"sft-data", "rl-data"}
    with pytest.raises(UsageError, match="give a file with compute_score"):
        prepare.prepare(asked(data=source))


# ---- samples that are too long ----


def test_a_sample_at_which_fine_tuning_would_stop_is_one_line(asked, tmp_path):
    rows = [{"instruction": "Say A.", "output": "A"}, {"instruction": "Count.", "output": "7 " * 60},
            {"instruction": "Count on.", "output": "7 " * 90}]  # fmt: skip
    source = lines(tmp_path, *rows)
    prepare.prepare(asked("sft", data=source))  # verl cuts
    prepare.prepare(asked("sft", data=source, max_tokens=400))
    with pytest.raises(UsageError) as caught:
        prepare.prepare(asked("sft", data=source, max_tokens=100))
    assert "\n" not in str(caught.value)
    assert f"data {source}: 2 samples of 3 are too long for fine-tuning, where verl stops (sample 2 has " in str(
        caught.value
    )
    assert "at most 100): --set verl.sft.data.max_length=" in str(caught.value)


def test_what_is_long_in_bytes_and_short_in_tokens_is_taken(asked, tmp_path):
    row = {"instruction": "Tom has 3 apples.", "output": "How many apples are left?" * 4}
    prepare.prepare(asked("sft", data=lines(tmp_path, row), max_tokens=60))
    with pytest.raises(UsageError, match="1 sample of 1 is too long"):
        prepare.prepare(asked("sft", data=lines(tmp_path, row), max_tokens=20))


# ---- disk ----


@pytest.mark.parametrize(
    ("workflow", "checkpoints", "merged"), [("sft-ppo", 3, 2), ("sft", 1, 1), ("ppo", 2, 1), ("grpo", 1, 1)]
)
def test_the_disk_that_a_workflow_takes_is_that_of_its_checkpoints_and_models(workflow, checkpoints, merged):
    assert needed_bytes(workflow, 10**9) == (checkpoints, merged, (checkpoints * 16 + merged * 2) * 10**9)
    assert needed_bytes(workflow, 10**9, saves=2)[0] == 2 * checkpoints


def test_too_small_a_disk_is_one_line_before_anything_is_copied(elsewhere, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
    with pytest.raises(InfrastructureError) as caught:
        prepare.prepare(elsewhere())
    assert caught.value.kind == "controller_disk_full" and "\n" not in str(caught.value)
    assert f"{tmp_path}/work has 1 MiB free, this workflow needs " in str(caught.value)
    assert "3 checkpoints of 16 bytes and 2 models of 2 for each of 0.000103 billion parameters" in str(caught.value)
    assert not (tmp_path / "work").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**30))
    prepare.prepare(elsewhere())


def test_a_work_folder_that_cannot_be_written_is_one_line(elsewhere, tmp_path):
    (tmp_path / "work").write_text("")
    with pytest.raises(InfrastructureError, match=r"cannot copy .* to .*/work/inputs/tiny-llama\.\w{12}: ") as caught:
        prepare.prepare(elsewhere())
    assert "\n" not in str(caught.value)


# ---- progress ----


def test_the_time_left_is_shown_from_two_seconds_on(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("runner.workflow.progress.time.monotonic", lambda: clock[0])
    said = []

    class Display:
        def progress(self, total):
            from contextlib import nullcontext

            return nullcontext()

        def at(self, done, total, text, *, left_s=None):
            said.append((text, left_s))

    with shown(Display()) as at:
        for clock[0], done in ((0.0, 0), (1.0, 10), (4.0, 40)):
            at("copying", done, 100)
        at("reading", 0, 100)
    assert said == [("copying", None), ("copying", None), ("copying", 6.0), ("reading", None)]
