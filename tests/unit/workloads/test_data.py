"""Training data: sources, masks, packing, and the cache."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runner.errors import InfrastructureError, UsageError
from runner.workloads.data import instructions, rows
from runner.workloads.data.pack import Flat, assemble, pack
from runner.workloads.data.prepare import prepare

EOS, PAD, IGNORED = 1, 0, -100
FIELDS = ("messages", "instruction", "input", "output")
ROWS = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
    {"instruction": "Sort the words.", "input": "pear, apple", "output": "apple, pear"},
    {"instruction": "Translate into Japanese.", "input": "mountain, river", "output": "山、川"},
]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    names = ("input_ids", "labels", "position_ids", "n_tokens")
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def segments(folder: Path) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each sample, found as a workload finds them: position 0 starts one."""
    found = []
    data = arrays(folder)
    for ids, labels, positions, n in zip(*data.values(), strict=True):
        starts = [*np.flatnonzero(positions[:n] == 0), n]
        for begin, end in itertools.pairwise(starts):
            assert positions[begin:end].tolist() == list(range(end - begin))
            found.append((ids[begin:end].tolist(), labels[begin:end].tolist()))
    return found


def texts(folder: Path) -> list[tuple[str, str]]:
    """(all of it, what is in the loss) of each sample, as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return sorted(
        (
            tokenizer.decode(ids, skip_special_tokens=False),
            tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False),
        )
        for ids, labels in segments(folder)
    )


def write(path: Path, content: str | bytes | list) -> str:
    if isinstance(content, list) and path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif isinstance(content, list):
        lines = [json.dumps(row, ensure_ascii=False) for row in content]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(seq_len=256, samples=600, cache_dir=tmp_path_factory.mktemp("cache")).path


# ---- packing ----

capacity_and_lengths = st.integers(8, 300).flatmap(
    lambda capacity: st.tuples(
        st.just(capacity), hnp.arrays(np.int64, st.integers(0, 80), elements=st.integers(1, capacity))
    )
)


@given(capacity_and_lengths)
@settings(max_examples=200)
def test_every_sample_lies_in_one_bin_and_no_bin_overflows(case):
    capacity, lengths = case
    bins = pack(lengths, capacity)
    assert bins.shape == lengths.shape
    loads = np.bincount(bins, weights=lengths)
    assert (loads <= capacity).all()
    assert (loads > 0).all(), "bin numbers have gaps"
    assert (pack(lengths, capacity) == bins).all()


@given(capacity_and_lengths)
@settings(max_examples=200)
def test_no_two_bins_could_be_one(case):
    capacity, lengths = case
    loads = np.sort(np.bincount(pack(lengths, capacity), weights=lengths))
    assert len(loads) < 2 or loads[0] + loads[1] > capacity
    assert len(loads) >= -(-lengths.sum() // capacity)


def test_an_exact_filling_is_found_where_best_fit_decreasing_misses_it():
    # best fit puts 5 beside 4 and leaves a gap; 5 + 3 + 2 and 4 + 3 + 3 have none
    assert pack(np.array([5, 4, 3, 3, 3, 2]), 10).max() + 1 == 2


@pytest.mark.parametrize("seq_len", [1024, 2048, 4096])
@pytest.mark.parametrize(("shortest", "median", "sigma"), [(45, 60, 0.9), (30, 400, 1.0)])
def test_realistic_lengths_fill_sequences(seq_len, shortest, median, sigma):
    rng = np.random.default_rng(7)
    lengths = np.minimum(shortest + rng.lognormal(np.log(median), sigma, 50_000).astype(int), seq_len)
    bins = pack(lengths, seq_len)
    assert lengths.sum() / ((bins.max() + 1) * seq_len) >= 0.995


def test_a_length_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.10, found 3\.\.11"):
        pack(np.array([3, 11]), 10)


@given(capacity_and_lengths.filter(lambda case: len(case[1])), st.integers(0, 1000))
@settings(max_examples=60)
def test_samples_come_back_whole_from_the_arrays(tmp_path_factory, case, seed):
    seq_len, lengths = case
    n = int(lengths.sum())
    ids = np.arange(100, 100 + n, dtype=np.int32)  # every token is its own
    in_loss = np.random.default_rng(seed).random(n) < 0.5
    begins = np.cumsum(lengths) - lengths
    in_loss[begins] = False
    folder = tmp_path_factory.mktemp("arrays")
    assemble(folder, Flat(ids, in_loss, lengths), pack(lengths, seq_len), seq_len, PAD)

    expected = [
        (ids[b : b + k].tolist(), np.where(in_loss[b : b + k], ids[b : b + k], IGNORED).tolist())
        for b, k in zip(begins, lengths, strict=True)
    ]
    assert sorted(segments(folder)) == sorted(expected)
    data = arrays(folder)
    for ids_, labels, positions, n_tokens in zip(*data.values(), strict=True):
        tail = seq_len - n_tokens
        assert (ids_[n_tokens:] == PAD).all()
        assert (labels[n_tokens:] == IGNORED).all()
        assert positions[n_tokens:].tolist() == list(range(tail)), "the padding is no segment of its own"
    assert all(array.dtype == np.int32 for array in data.values())


# ---- masks and templates ----


def test_alpaca_rows_are_asked_as_alpaca_asks_and_only_responses_are_in_the_loss(tmp_path):
    source = write(tmp_path / "a.json", ROWS[:2])
    head = "Below is an instruction that describes a task"
    ask = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    assert texts(prepare(source, seq_len=128, cache_dir=tmp_path).path) == [
        (
            f"{head}, paired with an input that provides further context. {ask}Sort the words.\n\n"
            "### Input:\npear, apple\n\n### Response:apple, pear<|eos|>",
            "apple, pear<|eos|>",
        ),
        (f"{head}. {ask}Add 2 and 3.\n\n### Response:5<|eos|>", "5<|eos|>"),
    ]


def test_every_assistant_turn_of_a_chat_is_in_the_loss(tmp_path):
    roles = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    source = write(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in roles]}])
    assert texts(prepare(source, seq_len=128, cache_dir=tmp_path).path) == [
        (
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:Hello<|eos|>"
            "\n\n### Instruction:\nBye\n\n### Response:See you<|eos|>",
            "Hello<|eos|>See you<|eos|>",
        )
    ]


def test_the_first_token_of_a_sample_is_never_predicted_from_the_sample_before(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "Hello there"}]}] * 3)
    for _, labels in segments(prepare(source, seq_len=64, cache_dir=tmp_path).path):
        assert labels[0] == IGNORED
        assert labels[-1] == EOS


def test_a_special_token_written_in_a_text_is_text(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"instruction": "Say <|eos|>", "output": "<|eos|><|pad|>"}])
    [(ids, _)] = segments(prepare(source, seq_len=128, cache_dir=tmp_path).path)
    assert ids.count(EOS) == 1
    assert PAD not in ids


def test_an_empty_response_is_an_end_of_sequence(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"instruction": "Say nothing.", "input": None, "output": ""}])
    [(_, labels)] = segments(prepare(source, seq_len=128, cache_dir=tmp_path).path)
    assert [label for label in labels if label != IGNORED] == [EOS]


def test_long_samples_are_cut_and_those_without_room_for_a_response_left_out(tmp_path):
    rows = [
        ROWS[0],
        {"instruction": "Count.", "output": "one two " * 200},
        {"instruction": "x y " * 200, "output": "z"},
    ]
    made = prepare(write(tmp_path / "a.json", rows), seq_len=128, cache_dir=tmp_path)
    counts = {name: made.manifest[name] for name in ("n_samples", "n_truncated", "n_dropped", "n_sequences")}
    assert counts == {"n_samples": 2, "n_truncated": 1, "n_dropped": 1, "n_sequences": 2}
    assert max(len(ids) for ids, _ in segments(made.path)) == 128


def test_a_sample_as_long_as_a_sequence_is_not_cut(tmp_path):
    source = write(tmp_path / "a.json", ROWS[:1])
    [(ids, _)] = segments(prepare(source, seq_len=256, cache_dir=tmp_path / "c").path)
    exact = prepare(source, seq_len=len(ids), cache_dir=tmp_path / "c").manifest
    short = prepare(source, seq_len=len(ids) - 1, cache_dir=tmp_path / "c").manifest
    assert (exact["n_truncated"], exact["packing_utilisation_pct"]) == (0, 100.0)
    assert (short["n_truncated"], short["n_tokens"]) == (1, len(ids) - 1)


# ---- the built-in set ----


def test_the_built_in_rows_are_the_ones_their_version_names():
    rows = list(instructions.generate(2000, seed=0))
    assert rows[:500] == list(instructions.generate(500, seed=0))
    assert rows[:500] != list(instructions.generate(500, seed=1))
    assert all(row["instruction"] and row["output"] for row in rows)
    assert len({row["instruction"] + row["input"] for row in rows}) > 1500, "too few different questions"
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    assert (instructions.VERSION, digest) == (1, "09e260e0943bdcd1"), "rows changed: raise instructions.VERSION"


def test_sums_and_dates_of_the_built_in_rows_are_right():
    checked = 0
    for row in instructions.generate(3000, seed=5):
        if found := re.fullmatch(r"(\d+) ([-+*]) (\d+) = (-?\d+)", row["output"]):
            a, sign, b, value = found.groups()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(value)
            checked += 1
        if found := re.fullmatch(r"(\d+) days after (\S+) comes (\S+)\.", row["output"]):
            days, first, last = found.groups()
            assert dt.date.fromisoformat(first) + dt.timedelta(int(days)) == dt.date.fromisoformat(last)
            checked += 1
    assert checked > 100


def test_the_manifest_counts_what_the_arrays_hold(builtin):
    manifest, data = json.loads((builtin / "manifest.json").read_text()), arrays(builtin)
    assert data["input_ids"].shape == data["labels"].shape == data["position_ids"].shape
    assert data["input_ids"].shape == (manifest["n_sequences"], 256)
    assert manifest["n_tokens"] == data["n_tokens"].sum()
    assert manifest["n_loss_tokens"] == (data["labels"] != IGNORED).sum()
    assert manifest["n_samples"] == len(segments(builtin)) == 600
    assert manifest["packing_utilisation_pct"] == pytest.approx(
        100 * data["n_tokens"].sum() / data["input_ids"].size, abs=1e-3
    )
    assert manifest["hash"] == builtin.name
    assert manifest["vocab_size"] == 2048 > data["input_ids"].max()
    assert manifest["pad_token_id"] == PAD


def test_labels_are_the_tokens_themselves_or_ignored(builtin):
    data = arrays(builtin)
    kept = data["labels"] != IGNORED
    assert (data["labels"][kept] == data["input_ids"][kept]).all()
    assert not (kept & (data["position_ids"] == 0)).any()


@pytest.mark.parametrize("seq_len", [256, 512, 2048])
def test_the_default_set_fills_its_sequences(tmp_path, seq_len):
    assert prepare(seq_len=seq_len, cache_dir=tmp_path).manifest["packing_utilisation_pct"] >= 99.5


# ---- sources and the cache ----


def test_json_json_lines_parquet_and_a_folder_give_the_same_arrays(tmp_path):
    rows = list(instructions.generate(200, seed=3))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "part-1.jsonl", rows[:120])
    write(tmp_path / "folder" / "part-2.parquet", rows[120:])
    (tmp_path / "folder" / "README.md").write_text("not data")
    sources = [write(tmp_path / f"rows.{kind}", rows) for kind in ("json", "jsonl", "parquet")]
    made = [prepare(source, seq_len=512, cache_dir=tmp_path / "c") for source in [*sources, str(tmp_path / "folder")]]
    assert len({prepared.path for prepared in made}) == 4
    first = made[0]
    for other in made[1:]:
        for name in ("input_ids.npy", "labels.npy", "position_ids.npy", "n_tokens.npy", "tokenizer.json"):
            assert (other.path / name).read_bytes() == (first.path / name).read_bytes()


def test_the_same_input_gives_the_same_bytes_anywhere(tmp_path, builtin):
    other = prepare(seq_len=256, samples=600, cache_dir=tmp_path).path
    assert other.name == builtin.name
    names = sorted(file.name for file in builtin.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert all((other / name).read_bytes() == (builtin / name).read_bytes() for name in names)


def test_every_parameter_and_the_content_are_part_of_the_key(tmp_path):
    source = write(tmp_path / "a.jsonl", ROWS)
    hashes = [
        prepare(source, seq_len=128, cache_dir=tmp_path / "c").manifest["hash"],
        prepare(source, seq_len=256, cache_dir=tmp_path / "c").manifest["hash"],
        prepare(source, seq_len=128, seed=1, cache_dir=tmp_path / "c").manifest["hash"],
        prepare(write(tmp_path / "a.jsonl", ROWS[:2]), seq_len=128, cache_dir=tmp_path / "c").manifest["hash"],
    ]
    assert len(set(hashes)) == 4
    copy = write(tmp_path / "another name.jsonl", ROWS)
    assert prepare(copy, seq_len=128, cache_dir=tmp_path / "c").manifest["hash"] == hashes[0]


def test_the_seed_orders_sequences_and_changes_none(tmp_path):
    source = write(tmp_path / "a.json", list(instructions.generate(300, seed=2)))
    one, two = (
        arrays(prepare(source, seq_len=512, seed=s, cache_dir=tmp_path / "c").path)["input_ids"] for s in (0, 1)
    )
    assert (one != two).any()
    assert sorted(map(bytes, one)) == sorted(map(bytes, two))


def test_a_second_call_tokenises_and_writes_nothing(tmp_path):
    calls: list[tuple[int, int]] = []
    first = prepare(seq_len=64, samples=50, cache_dir=tmp_path, on_progress=lambda *done: calls.append(done))
    assert calls[-1] == (50, 50)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    second = prepare(seq_len=64, samples=50, cache_dir=tmp_path, on_progress=lambda *done: calls.append(done))
    assert second == first
    assert len(calls) == 1
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def _torn_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:100])


def _manifest_of_another(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(folder.name, "0" * 32))


def _foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


def _short_array(folder: Path) -> None:
    with open(folder / "labels.npy", "r+b") as file:
        file.truncate(200)


def _missing_array(folder: Path) -> None:
    (folder / "input_ids.npy").unlink()


@pytest.mark.parametrize(
    "damage", [_torn_manifest, _manifest_of_another, _foreign_manifest, _short_array, _missing_array]
)
def test_a_damaged_folder_is_made_again(tmp_path, damage):
    first = prepare(seq_len=64, samples=50, cache_dir=tmp_path)
    whole = {file.name: file.read_bytes() for file in first.path.iterdir()}
    damage(first.path)
    again = prepare(seq_len=64, samples=50, cache_dir=tmp_path)
    assert again == first
    assert {file.name: file.read_bytes() for file in again.path.iterdir()} == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == [first.path.name, f"{first.path.name}.lock"]


def test_what_a_killed_prepare_left_is_neither_used_nor_kept(tmp_path):
    key = prepare(seq_len=64, samples=50, cache_dir=tmp_path / "other").path.name
    leftover = tmp_path / f".{key}.shakedown-abc"
    leftover.mkdir()
    (leftover / "input_ids.npy").write_bytes(b"half")
    assert prepare(seq_len=64, samples=50, cache_dir=tmp_path).path == tmp_path / key
    assert not leftover.exists()


# ---- bad input: one line that says where, what, and what to do ----

GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"", "a.json: no rows; give at least one"),
        ("a.json", "[]", "a.json: no rows; give at least one"),
        ("a.jsonl", "\n\n", "a.jsonl: no rows; give at least one"),
        ("a.parquet", b"", "a.parquet: not readable as Parquet: "),
        ("a.parquet", b"PAR1 no table PAR1", "a.parquet: not readable as Parquet: "),
        (
            "a.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a.parquet: a Git LFS pointer, not the",
        ),
        ("a.csv", "instruction,output\n", "a.csv: data files end in .json, .jsonl, .parquet; rename or convert it"),
        ("a.json", "[{", "a.json: line 1 is not JSON: "),
        ("a.json", f"{GOOD}\n{GOOD}\n", "line 2 is not JSON: Extra data; name it .jsonl if it has one object a line"),
        ("a.json", GOOD, "a.json: contains one dict; a .json file must be one array of rows"),
        ("a.json", "[" * 100_000, "a.json: nested too deeply to be rows of data"),
        ("a.jsonl", f"{GOOD}\n\n{{'a'}}\n", "a.jsonl: line 3 is not JSON: "),
        ("a.jsonl", f"{GOOD}\n" + "[" * 100_000, "a.jsonl: line 2 is not JSON: nested too deeply"),
        ("a.jsonl", f"{GOOD}\n".encode() + b'{"instruction": "\xff"}', "a.jsonl: line 2 is not UTF-8 (byte "),
        ("a.json", f"[{GOOD}, 7]", "a.json: row 2 is a int; it must be an object"),
        (
            "a.jsonl",
            '{"question": "a", "output": "b"}',
            "a.jsonl: line 1 has the fields question, output; it needs instruction and output (input is optional), or messages",
        ),
        ("a.jsonl", "{}", "a.jsonl: line 1 has the fields (none); it needs instruction"),
        (
            "a.jsonl",
            f'{GOOD}\n{{"instruction": "a", "output": null}}',
            "a.jsonl: line 2: output is missing; it must be text",
        ),
        ("a.jsonl", '{"instruction": "a", "output": 5}', "a.jsonl: line 1: output is int; it must be text"),
        ("a.jsonl", '{"instruction": " ", "output": "b"}', "a.jsonl: line 1 has an empty instruction"),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b\\ud800"}',
            "a.jsonl: line 1: output has a character that is not Unicode at position 1",
        ),
        ("a.jsonl", '{"messages": "hi"}', "a.jsonl: line 1: messages must be a list of objects with role and content"),
        (
            "a.jsonl",
            '{"messages": [{"role": "bot", "content": "hi"}]}',
            "a.jsonl: line 1: message 1 has the role 'bot'; use system, user or assistant",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user"}]}',
            "a.jsonl: line 1: message 1's content is missing; it must be text",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "hi"}]}',
            "a.jsonl: line 1: messages have no turn of the assistant, so there is nothing to learn",
        ),
    ],
)
def test_a_bad_file_is_one_line_with_its_name_and_row(tmp_path, name, content, says):
    source = write(tmp_path / name, content)
    with pytest.raises(UsageError) as caught:
        prepare(source, seq_len=128, cache_dir=tmp_path / "cache")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.suffix for file in (tmp_path / "cache").glob("*")] in ([], [".lock"]), "a half folder was left"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"source": "no/such/file.json"}, "data source 'no/such/file.json': neither a file or folder nor a hub id"),
        ({"source": "buitlin"}, "data source 'buitlin': neither a file or folder nor a hub id"),
        ({"source": "$(touch x); rm"}, "neither a file or folder nor a hub id"),
        ({"source": "a" * 5000}, "neither a file or folder nor a hub id"),
        ({"source": "."}, ".: the folder has no .json, .jsonl, .parquet file"),
        ({"tokenizer": "no such folder"}, "tokenizer 'no such folder': neither a folder nor a hub id"),
        ({"tokenizer": "."}, "tokenizer '.': the folder has no tokenizer.json"),
        ({"seq_len": 4}, "data: seq-len is 4; give at least 8"),
        ({"samples": 0}, "data: samples is 0; give at least 1"),
        ({"seed": -1}, "data: seed is -1; give at least 0"),
        (
            {"seq_len": 8, "samples": 3},
            "data 'builtin': no sample has a response within 8 tokens; give a longer --seq-len",
        ),
    ],
)
def test_a_bad_argument_is_one_line(tmp_path, arguments, says):
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = {key: str(empty) if value == "." else value for key, value in arguments.items()}
    with pytest.raises(UsageError) as caught:
        prepare(**({"seq_len": 128, "cache_dir": tmp_path / "cache"} | arguments))
    assert says.replace(".:", f"{empty}:").replace("'.'", repr(str(empty))) in str(caught.value)
    assert len(str(caught.value)) < 6000 and "\n" not in str(caught.value)


def test_names_with_spaces_and_quotes_are_only_names(tmp_path):
    source = write(tmp_path / "a 'b' \"c\"; $(d) ü.jsonl", ROWS)
    assert prepare(source, seq_len=128, cache_dir=tmp_path / "cache é").manifest["n_samples"] == 3


def test_line_separators_of_unicode_inside_a_text_split_no_row(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"instruction": "One\u2028two\x85three", "output": "four"}])
    assert prepare(source, seq_len=128, cache_dir=tmp_path).manifest["n_samples"] == 1


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    source = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
    assert prepare(source, seq_len=128, cache_dir=tmp_path).manifest["n_samples"] == 2


def test_a_cache_that_cannot_be_written_is_an_infrastructure_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InfrastructureError, match=r"cannot prepare data in .*file.*choose another --cache-dir"):
        prepare(seq_len=64, samples=10, cache_dir=tmp_path / "file" / "cache")


# ---- what nobody asked for ----


def parquet(path: Path, **columns: Any) -> str:
    """A Parquet file with two good rows and further columns."""
    good = {"instruction": ["add 1 and 2", "say yes"], "output": ["3", "yes"]}
    pyarrow.parquet.write_table(pyarrow.table(good | columns), path)
    return str(path)


def odd_columns() -> dict[str, Any]:
    """Columns whose values Python, or a library, cannot represent."""
    pa = pyarrow
    return {
        "a date after year 9999": pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()),
        "a date before year 1": pa.array([-(2**30), 0], pa.int32()).cast(pa.date32()),
        "a timestamp out of range": pa.array([2**61, 0], pa.timestamp("ms")),
        "an unknown time zone": pa.array([0, 1], pa.timestamp("us", tz="Mars/Olympus_Mons")),
        "nanoseconds": pa.array([1, 2], pa.timestamp("ns")),
        "a duration": pa.array([2**62, 1], pa.duration("s")),
        "a nested date": pa.array([{"d": 2**30}, {"d": 0}], pa.struct([("d", pa.int32())])).cast(
            pa.struct([("d", pa.date32())])
        ),
        "bytes": pa.array([b"\xff", b"\xfe"]),
    }


@pytest.mark.parametrize("column", odd_columns())
def test_a_column_that_nobody_reads_may_hold_anything(tmp_path, column):
    source = parquet(tmp_path / "a.parquet", created=odd_columns()[column])
    assert prepare(source, seq_len=256, cache_dir=tmp_path / "cache").manifest["n_samples"] == 2


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("a.jsonl", "1" + "0" * 5000), ("a.json", "-1" + "0" * 5000), ("a.jsonl", "1e999999"), ("a.jsonl", "NaN"),
        ("a.json", '{"deep": [1' + "2" * 5000 + "]}"), ("a.jsonl", '"\\ud800"'),
    ],
)  # fmt: skip
def test_a_field_that_nobody_reads_may_be_any_json(tmp_path, name, field):
    row = GOOD[:-1] + f', "id": {field}}}'
    source = write(tmp_path / name, f"[{row}]" if name.endswith(".json") else row)
    assert prepare(source, seq_len=256, cache_dir=tmp_path / "cache").manifest["n_samples"] == 1


@pytest.mark.parametrize("hidden", ["._a.jsonl", ".a.jsonl", ".ipynb_checkpoints.json"])
def test_hidden_files_of_a_folder_are_no_data(tmp_path, hidden):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "a.jsonl", GOOD)
    (tmp_path / "set" / hidden).write_bytes(b"\x00\x05\x16\x07Mac OS X")
    made = prepare(str(tmp_path / "set"), seq_len=256, cache_dir=tmp_path / "cache")
    assert made.manifest["n_samples"] == 1


def odd_messages() -> dict[str, Any]:
    """Tables of one chat each, with what Python cannot represent beside the fields that are read."""
    pa = pyarrow
    turns = [{"role": "user", "content": "hi", "at": 2**60}, {"role": "assistant", "content": "yes", "at": 1}]

    def kind(at: Any) -> Any:
        return pa.struct([("role", pa.string()), ("content", pa.string()), ("at", at)])

    plain = pa.array([[{key: turn[key] for key in ("role", "content")} for turn in turns]])
    return {
        "an unknown time zone": {
            "messages": pa.array([turns], pa.list_(kind(pa.timestamp("ms", tz="Nowhere/At_All"))))
        },
        "a time out of range": {"messages": pa.array([turns], pa.large_list(kind(pa.timestamp("us"))))},
        "a list of a fixed size": {"messages": pa.array([turns], pa.list_(kind(pa.timestamp("us")), 2))},
        "an input that is not used": {"messages": plain, "input": pa.array([2**61], pa.timestamp("us"))},
        "an output that is not used": {"messages": plain, "output": odd_columns()["a date after year 9999"][:1]},
    }


@pytest.mark.parametrize("name", odd_messages())
def test_of_messages_only_role_and_content_are_read(tmp_path, name):
    pyarrow.parquet.write_table(pyarrow.table(odd_messages()[name]), tmp_path / "a.parquet")
    assert prepare(str(tmp_path / "a.parquet"), seq_len=256, cache_dir=tmp_path / "cache").manifest["n_samples"] == 1


@pytest.mark.parametrize("name", odd_messages())
def test_of_a_hubs_messages_only_role_and_content_are_decoded(name):
    import datasets

    ((where, row),) = rows.of_hub(datasets.Dataset(pyarrow.table(odd_messages()[name])), "some/set", FIELDS)
    assert (where, row["messages"][1]) == ("some/set: row 1", {"role": "assistant", "content": "yes"})


@pytest.mark.parametrize("column", ["a date after year 9999", "an unknown time zone", "a timestamp out of range",
                                    "a nested date", "a duration"])  # fmt: skip
def test_a_column_that_is_read_and_cannot_be_is_one_line_with_file_and_row(tmp_path, column):
    table = {"instruction": ["a", "b"], "output": odd_columns()[column]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet: row 1: output (cannot be read: |is )") as caught:
        prepare(str(tmp_path / "a.parquet"), seq_len=256, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["a date after year 9999", "an unknown time zone", "nanoseconds", "bytes"])
def test_of_a_hubs_data_set_other_columns_are_not_decoded(column):
    import datasets

    made = datasets.Dataset(pyarrow.table({"instruction": ["a", "b"], "output": ["c", "d"],
                                                         "at": odd_columns()[column]}))  # fmt: skip
    assert [where for where, _ in rows.of_hub(made, "some/set", FIELDS)] == ["some/set: row 1", "some/set: row 2"]
    with pytest.raises(UsageError, match=r"^some/set: row 1: output cannot be read: "):
        bad = datasets.Dataset(pyarrow.table({"output": odd_columns()["an unknown time zone"]}))
        list(rows.of_hub(bad, "some/set", FIELDS))
