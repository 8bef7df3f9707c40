"""Data for verl's trainers: the arithmetic set, conversion into verl's two schemas, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.errors import InfrastructureError, UsageError
from runner.system import manifest
from runner.workloads.data import arithmetic, verl
from runner.workloads.data.verl import ASK_FOR_RESULT, GSM8K, Schema, open_source

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PROMPT = {
    "data_source": GSM8K,
    "prompt": [{"role": "user", "content": "What is 1 + 2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 7},
}
QUESTION = {"question": "What is 1,000 + 2?", "answer": "It is <<1000+2=1002>>1002.\n#### 1,002"}
ALPACA = {"instruction": "Sort.", "input": "b, a", "output": "a, b"}


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def made(tmp_path: Path, source: str, schema: Schema, **options: Any) -> list[dict[str, Any]]:
    """The rows for training that verl would read."""
    found = verl.prepare(open_source(source), schema, tmp_path / "cache", **options)
    return pyarrow.parquet.read_table(found.train).to_pylist()


# ---- the built-in set ----

STEP = re.compile(r"(\d+) ([+*-]) (\d+) = <<(\d+)([+*-])(\d+)=(\d+)>>(\d+)")


@given(st.integers(1, 300), st.integers(0, 2**32))
@settings(max_examples=40)
def test_every_arithmetic_row_is_right_and_of_gsm8ks_shape(samples, seed):
    rows = arithmetic.generate(samples, seed)
    assert len({row["question"] for row in rows}) == len(rows) == samples
    for row in rows:
        *steps, last = row["answer"].splitlines()
        for line in steps:
            [(a, sign, b, *again, result, shown)] = STEP.findall(line)
            assert (again, shown) == ([a, sign, b], result)
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result) > 0
        assert last == f"#### {result}"
        assert row["question"].endswith("?") and str(a) in row["answer"]


def test_the_seed_alone_decides_the_rows():
    assert arithmetic.generate(50, 3) == arithmetic.generate(50, 3) != arithmetic.generate(50, 4)
    # Fixed forever: another set needs another VERSION, or caches keep the old one.
    assert (arithmetic.VERSION, arithmetic.generate(1, 0)[0]["answer"]) == (1, PINNED)


PINNED = "At first Priya has 6 * 11 = <<6*11=66>>66 apples.\nThen Priya has 66 - 4 = <<66-4=62>>62 apples.\n#### 62"


@pytest.mark.parametrize("samples", [0, -1, arithmetic.MOST + 1])
def test_a_number_of_rows_that_there_are_not_is_one_line(samples):
    with pytest.raises(UsageError, match=rf"data: samples is {samples}; give 1 to 50,000"):
        open_source("arithmetic", samples)


def test_validation_asks_nothing_that_was_trained_on(tmp_path):
    found = verl.prepare(open_source("arithmetic", 200, 1), Schema.PROMPTS, tmp_path)
    train, val = (
        {row["prompt"][0]["content"] for row in pyarrow.parquet.read_table(path).to_pylist()}
        for path in (found.train, found.val)
    )
    assert (len(train), len(val), train & val) == (175, 25, set())
    assert {key: found.manifest.about[key] for key in ("train_rows", "val_rows", "source")} == {
        "train_rows": 175,
        "val_rows": 25,
        "source": "arithmetic",
    }
    assert found.manifest.about["question"] in train


# ---- what becomes of rows ----


def test_a_row_of_gsm8k_becomes_a_chat_and_a_prompt_that_ask_the_same(tmp_path):
    source = write(tmp_path / "gsm8k.jsonl", [QUESTION])
    [chat] = made(tmp_path, source, Schema.MESSAGES)
    [prompt] = made(tmp_path, source, Schema.PROMPTS)
    asked = {"role": "user", "content": QUESTION["question"] + ASK_FOR_RESULT}
    assert chat == {"messages": [asked, {"role": "assistant", "content": QUESTION["answer"]}]}
    assert prompt == {
        "data_source": GSM8K,
        "prompt": [asked],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1002"},
        "extra_info": {"split": "train", "index": 0},
    }


def test_a_row_of_alpaca_becomes_a_chat(tmp_path):
    source = write(tmp_path / "a.jsonl", [ALPACA, {"instruction": "Say hi.", "output": "hi"}])
    asked = ["Sort.\n\nb, a", "Say hi."]
    assert [row["messages"][0]["content"] for row in made(tmp_path, source, Schema.MESSAGES)] == asked
    [first, _] = made(tmp_path, source, Schema.PROMPTS, rewarded=True)  # a file of the user's judges it
    assert (first["data_source"], first["reward_model"]["ground_truth"]) == (source, "a, b")


def test_a_chat_becomes_a_prompt_of_all_before_its_last_answer(tmp_path):
    turns = [*CHAT, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "#### 4"}]
    [row] = made(tmp_path, write(tmp_path / "a.jsonl", [{"messages": turns}]), Schema.PROMPTS)
    assert (row["prompt"], row["reward_model"]["ground_truth"]) == (turns[:3], "4")


@pytest.mark.parametrize(
    ("schema", "row"),
    [
        (Schema.MESSAGES, {"messages": CHAT, "tools": "[]", "enable_thinking": True}),
        (Schema.PROMPTS, {**PROMPT, "agent_name": "tool_agent", "extra_info": {"index": 7, "tools_kwargs": {"a": 1}}}),
    ],
)
def test_what_is_in_the_schema_keeps_its_further_columns(tmp_path, schema, row):
    folder = tmp_path / "set"
    for name in ("train-0.parquet", "train-1.parquet"):
        write(folder / name, [row])
    assert made(tmp_path, str(folder), schema) == [row, row]


def test_a_prompt_of_verls_own_conversion_of_gsm8k_has_its_answer_for_fine_tuning(tmp_path):
    row = {**PROMPT, "extra_info": {"index": 7, "answer": "1 + 2 = 3\n#### 3", "question": "What is 1 + 2?"}}
    [chat] = made(tmp_path, write(tmp_path / "a.parquet", [row]), Schema.MESSAGES)
    assert chat["messages"] == [*PROMPT["prompt"], {"role": "assistant", "content": "1 + 2 = 3\n#### 3"}]


def test_a_file_of_both_schemas_is_used_as_it_is_for_each(tmp_path):
    row = {**PROMPT, "messages": CHAT}
    source = write(tmp_path / "a.parquet", [row])
    assert made(tmp_path, source, Schema.MESSAGES) == made(tmp_path, source, Schema.PROMPTS) == [row]


def test_files_of_different_shapes_make_one_set(tmp_path):
    folder = tmp_path / "set"
    write(folder / "a.parquet", [{"messages": CHAT, "id": 1}])
    write(folder / "b.jsonl", [ALPACA, QUESTION])
    rows = made(tmp_path, str(folder), Schema.MESSAGES)
    assert [row["messages"][0]["content"] for row in rows] == [
        "Hi",
        "Sort.\n\nb, a",
        QUESTION["question"] + ASK_FOR_RESULT,
    ]


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train.jsonl", "test.jsonl"], 1, 1),
        (["train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"], 1, 1),
        (["a.jsonl", "b.jsonl", "val_1.jsonl"], 2, 1),
        (["test.jsonl"], 1, 0),  # it is what there is
        (["train.jsonl", "testimonials.jsonl", "evaluated.jsonl", "developers.jsonl"], 4, 0),
    ],
)
def test_the_files_of_a_folder_are_for_training_or_validation_by_their_names(tmp_path, names, train, val):
    for name in names:
        write(tmp_path / "set" / name, [QUESTION])
    found = verl.prepare(open_source(str(tmp_path / "set")), Schema.MESSAGES, tmp_path / "cache")
    assert pyarrow.parquet.read_table(found.train).num_rows == train
    assert (pyarrow.parquet.read_table(found.val).num_rows if found.val else 0) == val


# ---- properties ----

texts = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=20).map(lambda text: f"a{text}")
numbers = st.integers(-(10**9), 10**9)
questions = st.builds(
    lambda question, answer, number, comma: {
        "question": question,
        "answer": f"{answer}\n#### {number:,}" if comma else f"{answer}\n#### {number}",
    },
    texts, texts, numbers, st.booleans(),
)  # fmt: skip
alpacas = st.builds(lambda a, b, c: {"instruction": a, "input": b, "output": c}, texts, st.just("") | texts, texts)


def verl_extracts(answer: str) -> str | None:
    """What verl's reward function takes from an answer to compare; tests with the real verl ask itself."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", answer)
    return found[-1].replace(",", "") if found else None


@given(st.lists(questions, min_size=1, max_size=5), st.sampled_from([".jsonl", ".parquet"]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_right_answer_is_judged_right_and_nothing_is_lost(tmp_path_factory, rows, suffix):
    tmp_path = tmp_path_factory.mktemp("set")
    source = write(tmp_path / f"a{suffix}", rows)
    prompts, chats = made(tmp_path, source, Schema.PROMPTS), made(tmp_path, source, Schema.MESSAGES)
    for row, prompt, chat in zip(rows, prompts, chats, strict=True):
        assert prompt["reward_model"]["ground_truth"] == verl_extracts(row["answer"])
        assert prompt["prompt"] == chat["messages"][:1]
        assert chat["messages"][0]["content"].startswith(row["question"])
        assert chat["messages"][1] == {"role": "assistant", "content": row["answer"]}
    # What was converted is in the schema: to convert it again changes nothing.
    again = str(next((tmp_path / "cache").glob("prompts-*/train.parquet")))
    assert made(tmp_path, again, Schema.PROMPTS) == prompts


@given(st.lists(questions | alpacas, min_size=1, max_size=5))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_rows_are_the_same_set_in_any_kind_of_file(tmp_path_factory, rows):
    tmp_path = tmp_path_factory.mktemp("set")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lines, array = write(tmp_path / "a.jsonl", rows), str(tmp_path / "a.json")
    every = {name for row in rows for name in row}  # fields that a row lacks are null
    table = write(tmp_path / "a.parquet", [dict.fromkeys(every) | row for row in rows])
    assert made(tmp_path, lines, Schema.MESSAGES) == made(tmp_path, array, Schema.MESSAGES)
    assert made(tmp_path, lines, Schema.MESSAGES) == made(tmp_path, table, Schema.MESSAGES)


# ---- the cache ----


def test_the_same_content_is_prepared_once_under_any_name(tmp_path):
    first = verl.prepare(open_source(write(tmp_path / "a.jsonl", [QUESTION])), Schema.PROMPTS, tmp_path / "cache")
    assert (
        verl.cached(open_source(write(tmp_path / "b.jsonl", [QUESTION])), Schema.PROMPTS, tmp_path / "cache") == first
    )
    assert list(manifest.faults(first.path, first.manifest)) == []
    other = open_source(write(tmp_path / "c.jsonl", [QUESTION, QUESTION]))
    assert verl.cached(other, Schema.PROMPTS, tmp_path / "cache") is None
    assert verl.cached(open_source(str(tmp_path / "a.jsonl")), Schema.MESSAGES, tmp_path / "cache") is None
    assert verl.prepare(other, Schema.PROMPTS, tmp_path / "cache").manifest.digest != first.manifest.digest


def test_a_cache_that_cannot_be_written_is_an_infrastructure_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InfrastructureError, match=r"cannot prepare data in .*/file/cache: Not a directory"):
        verl.prepare(open_source("arithmetic"), Schema.PROMPTS, tmp_path / "file" / "cache")


def test_progress_ends_at_the_whole(tmp_path):
    seen: list[tuple[int, int]] = []
    source = open_source("arithmetic", 2000)
    verl.prepare(source, Schema.MESSAGES, tmp_path, on_progress=lambda *at: seen.append(at))
    assert seen[:3] == [(500, 1750), (1000, 1750), (1500, 1750)]


# ---- bad rows: one line that says where, what, and what to do ----


def with_(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changed = {**row, **changes}
    return {name: value for name, value in changed.items() if value is not ...}


BAD_FOR_BOTH = [
    ("7", "line 2 is a int; it must be an object"),
    ({"text": "a"}, "line 2 has the fields text; it needs messages, prompt with reward_model, question and answer, or"),
    ({}, "line 2 has the fields (none); it needs messages"),
    (with_(QUESTION, answer=None), "line 2 has the fields question, answer; it needs"),
    (with_(QUESTION, question=" "), "line 2: question is empty"),
    (with_(QUESTION, question=5), "line 2: question is int; it must be text"),
    (with_(ALPACA, output=["a"]), "line 2: output is list; it must be text"),
    (with_(ALPACA, instruction="b\ud800"), "line 2: instruction has a character that is not Unicode at position 1"),
    ({"messages": "Hi"}, "line 2: messages must be a list of objects with role and content"),
    ({"messages": []}, "line 2: messages is empty; it needs at least one message"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "line 2: message 1 of messages has the role 'bot'; use system, user"),
    ({"messages": [{"role": "user"}]}, "line 2: the content of message 1 of messages is missing; it must be text"),
    ({"messages": [*CHAT, {"role": "system", "content": "a"}]}, "line 2: message 3 of messages is the system's; only the"),
]  # fmt: skip
BAD_CHATS = [
    ({"messages": CHAT[:1]}, "line 2: messages have no turn of the assistant, so there is nothing to learn"),
    (PROMPT, "line 2 has a prompt without an answer, for PPO and GRPO; fine-tuning needs messages"),
]
BAD_PROMPTS = [
    (with_(PROMPT, prompt="What?"), "line 2: prompt must be a list of objects with role and content"),
    (with_(PROMPT, prompt=...), "line 2: prompt must be a list of objects with role and content"),
    (with_(PROMPT, prompt=CHAT), "line 2: prompt ends with a turn of the assistant; it must end with what is asked"),
    (with_(PROMPT, data_source=...), "line 2: data_source is missing; it must be text"),
    (with_(PROMPT, data_source="gsm8k"), "line 2: data_source 'gsm8k' is none that verl's own reward function judges; did "
                                         "you mean 'openai/gsm8k'? Else give a file with compute_score (--reward)"),
    (with_(PROMPT, data_source="mine"), "line 2: data_source 'mine' is none that verl's own reward function judges; give a"),
    (with_(PROMPT, reward_model=...), "line 2: reward_model has no ground_truth to judge answers by"),
    (with_(PROMPT, reward_model={"style": "rule"}), "line 2: reward_model has no ground_truth to judge answers by"),
    (with_(PROMPT, reward_model={"ground_truth": "1,002"}), "line 2: ground_truth '1,002' of openai/gsm8k must be text, "),
    (with_(PROMPT, reward_model={"ground_truth": 3}), "line 2: ground_truth 3 of openai/gsm8k must be text, digits"),
    (with_(QUESTION, answer="#### three"), "line 2: the answer ends with `#### three`, which is no number"),
    (with_(QUESTION, answer="3"), "line 2: the answer has no `#### result`, which verl's own reward function judges by"),
    (ALPACA, "line 2: the answer has no `#### result`, which verl's own reward function judges by: give a file with"),
    ({"messages": CHAT[:1]}, "line 2: messages have no answer of the assistant to judge others by"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "row", "says"),
    [
        *((schema, *bad) for schema in Schema for bad in BAD_FOR_BOTH),
        *((Schema.MESSAGES, *bad) for bad in BAD_CHATS),
        *((Schema.PROMPTS, *bad) for bad in BAD_PROMPTS),
    ],
)
def test_a_row_that_does_not_fit_is_one_line_with_file_and_row(tmp_path, schema, row, says):
    good = QUESTION
    source = write(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(UsageError) as caught:
        made(tmp_path, source, schema)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl: {says}")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/*")), "half a set was left"


@pytest.mark.parametrize("row", [with_(PROMPT, data_source="mine"), with_(QUESTION, answer="3"), ALPACA,
                                 with_(PROMPT, reward_model={"ground_truth": "1,002"})])  # fmt: skip
def test_a_reward_file_of_ones_own_may_judge_anything(tmp_path, row):
    assert len(made(tmp_path, write(tmp_path / "a.jsonl", [row]), Schema.PROMPTS, rewarded=True)) == 1


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such.parquet", "data 'no/such.parquet': neither a file or folder nor a hub id; give a local file or"),
        ("arithmetik", "data 'arithmetik': neither a file or folder nor a hub id; give a local file or folder, or use"),
        ("$(rm -r x)", "neither a file or folder nor a hub id"),
    ],
)
def test_a_source_that_is_none_is_one_line(source, says):
    with pytest.raises(UsageError) as caught:
        open_source(source)
    assert says in str(caught.value)


def test_columns_that_cannot_be_one_are_one_line(tmp_path):
    write(tmp_path / "set" / "a.parquet", [{"messages": CHAT, "id": {"deep": 1}}])
    write(tmp_path / "set" / "b.parquet", [{"messages": CHAT, "id": "x"}])
    with pytest.raises(UsageError, match=r"a\.parquet, .*b\.parquet: columns of different types: ") as caught:
        made(tmp_path, str(tmp_path / "set"), Schema.MESSAGES)
    assert "\n" not in str(caught.value)
