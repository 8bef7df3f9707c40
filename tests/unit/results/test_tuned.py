"""What `runner tune` found is kept, found again for the same subject alone, and never a reason to crash."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from runner.errors import InfrastructureError, UsageError
from runner.plan import config
from runner.results import tuned
from runner.results.tuned import Probe, Subject, Tuned

MODEL = config.load_model("llama-2-7b").model_dump()
SUBJECT = Subject(
    model="llama-2-7b",
    architecture=tuned.architecture(MODEL),
    hardware="h200-sxm",
    device="cuda",
    num_nodes=1,
    world_size=8,
    seq_len=4096,
    given={"sft.attention": "auto"},
    training="0123456789abcdef",
)
VERSIONS = {
    "gpus": "8 × NVIDIA H200, 140 GiB",
    "packages.torch": "2.11.0+cu130",
    "packages.deepspeed": "0.19.8",
    "packages.transformers": "5.17.0",
    "driver": "580.159",
}
PROBES = (
    Probe({"sft.micro_batch": 2, "sft.recompute": "none"}, "ok", 6300.0, 6400.0, 0.01, 120.5, 61.0, run="a"),
    Probe({"sft.micro_batch": 4, "sft.recompute": "none"}, "ok", 7700.0, 7800.0, 0.01, 131.0, 63.0, run="b"),
    Probe(
        {"sft.micro_batch": 4, "sft.recompute": "none", "deepspeed.zero_optimization.stage": 1},
        "ok",
        8000.0,
        8100.0,
        0.01,
    ),
    Probe({"sft.micro_batch": 8, "sft.recompute": "none"}, "out_of_memory", note="CUDA out of memory"),
)
FOUND = Tuned(
    subject=SUBJECT,
    versions=VERSIONS,
    created="2026-01-31T12:00:00Z",
    command="runner tune",
    global_batch=1024,
    settings={"sft.micro_batch": 4, "sft.gradient_accumulation": 32, "sft.recompute": "none"},
    tokens_per_s_per_gpu=8000.0,
    probes=PROBES,
)


def test_it_is_found_again_as_it_was_saved(tmp_path):
    file = tuned.save(tmp_path, FOUND)
    assert file == tmp_path / "tuned" / f"{SUBJECT.digest}.json"
    assert tuned.find(tmp_path, SUBJECT) == FOUND
    assert FOUND.date == "2026-01-31" and [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_was_begun_is_kept_beside_a_result_and_not_used(tmp_path):
    begun = replace(FOUND, probes=PROBES[:1])
    tuned.save_begun(tmp_path, SUBJECT, begun)
    assert tuned.find(tmp_path, SUBJECT) is None and tuned.find_begun(tmp_path, SUBJECT) == begun
    assert tuned.nearest(tmp_path, replace(SUBJECT, num_nodes=2)) is None
    tuned.save(tmp_path, FOUND)
    assert tuned.find(tmp_path, SUBJECT) == FOUND and tuned.find_begun(tmp_path, SUBJECT) == begun
    tuned.save_begun(tmp_path, SUBJECT, None)
    tuned.save_begun(tmp_path, SUBJECT, None)
    assert tuned.find(tmp_path, SUBJECT) == FOUND and tuned.find_begun(tmp_path, SUBJECT) is None


OTHERS = {
    "nodes": {"num_nodes": 2},
    "ranks": {"world_size": 4},
    "hardware": {"hardware": "b200-sxm"},
    "device": {"device": "cpu"},
    "length": {"seq_len": 2048},
    "DeepSpeed": {"training": "fedcba9876543210"},
    "settings": {"given": {"sft.attention": "sdpa"}},
    "architecture": {"architecture": "another"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_it_is_for_its_subject_alone_and_the_nearest_says_what_differs(tmp_path, other):
    tuned.save(tmp_path, FOUND)
    asked = replace(SUBJECT, **OTHERS[other])
    assert tuned.find(tmp_path, asked) is None
    near = tuned.nearest(tmp_path, asked)
    assert (near is None) == (other == "architecture")
    if near:
        assert len(asked.differs(near.subject)) == 1
    assert asked.differs(asked) == []


def test_of_several_the_nearest_is_the_one_that_differs_least(tmp_path):
    far = replace(FOUND, subject=replace(SUBJECT, num_nodes=4, world_size=32, seq_len=2048))
    near = replace(FOUND, subject=replace(SUBJECT, seq_len=2048))
    for each in (far, near):
        tuned.save(tmp_path, each)
    assert tuned.nearest(tmp_path, SUBJECT) == near
    assert SUBJECT.differs(near.subject) == ["seq_len 4096, not 2048"]


def test_another_name_for_the_same_architecture_is_the_same_subject():
    renamed = {**MODEL, "name": "mine", "hf_id": "me/mine", "deepspeed": "ds_mine"}
    assert tuned.architecture(renamed) == SUBJECT.architecture
    assert tuned.architecture({**MODEL, "num_layers": 31}) != SUBJECT.architecture
    assert replace(SUBJECT, model="mine").digest == SUBJECT.digest


DAMAGED = {
    "cut": json.dumps(FOUND.to_dict())[:100],
    "empty": "",
    "no object": "[1, 2]",
    "text": '"tuned"',
    "a null": "null",
    "lacks a key": json.dumps({"schema": 1, "probes": []}),
    "another schema": json.dumps({**FOUND.to_dict(), "schema": 99}),
    "an outcome of another version": json.dumps({**FOUND.to_dict(), "probes": [{"settings": {}, "outcome": "new"}]}),
    "probes are none": json.dumps({**FOUND.to_dict(), "probes": [1]}),
}


def _with(*keys: str | int, value: object) -> str:
    data = json.loads(json.dumps(FOUND.to_dict()))
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return json.dumps(data)


DAMAGED |= {
    "settings are a list": _with("settings", value=[]),
    "a time is a number": _with("created", value=5),
    "no versions": _with("versions", value=None),
    "versions are a list": _with("versions", value=[1]),
    "a rate is a word": _with("probes", 0, "positions_per_s_per_gpu", value="fast"),
    "a probe without settings": _with("probes", 0, "settings", value=None),
    "a subject that says nothing": _with("subject", "given", value=None),
    "of another subject": _with("subject", "seq_len", value=99),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, kind):
    file = tuned.save(tmp_path, FOUND)
    file.write_text(DAMAGED[kind])
    with pytest.raises(UsageError) as error:
        tuned.find(tmp_path, SUBJECT)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert kind == "of another subject" or tuned.nearest(tmp_path, replace(SUBJECT, seq_len=1)) is None


def test_bytes_that_are_no_text_and_a_folder_in_its_place_are_one_line_too(tmp_path):
    file = tuned.save(tmp_path, FOUND)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        tuned.find(tmp_path, SUBJECT)
    file.unlink()
    file.mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        tuned.find(tmp_path, SUBJECT)


def test_unknown_keys_of_a_later_version_are_passed_over(tmp_path):
    file = tuned.save(tmp_path, FOUND)
    data = FOUND.to_dict()
    data["subject"]["new"] = data["probes"][0]["new"] = data["new"] = 1
    file.write_text(json.dumps(data))
    assert tuned.find(tmp_path, SUBJECT) == FOUND


def test_where_it_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "tuned").write_text("a file")
    with pytest.raises(InfrastructureError, match="tuned"):
        tuned.save(tmp_path, FOUND)


def test_the_rate_is_that_of_the_best_probe_of_that_micro_batch_and_recompute():
    assert FOUND.rate(2, "none") == 6400.0
    assert FOUND.rate(4, "none") == 8100.0
    assert FOUND.rate(8, "none") is None and FOUND.rate(4, "full") is None


def test_versions_that_differ_are_named_and_what_is_not_known_is_no_difference():
    assert FOUND.outdated(VERSIONS) == [] == FOUND.outdated({})
    assert FOUND.outdated({**VERSIONS, "driver": "590.1", "os": "another"}) == []
    newer = {**VERSIONS, "packages.torch": "2.13.0", "gpus": "8 × NVIDIA H100, 80 GiB"}
    assert FOUND.outdated(newer) == [
        "gpus 8 × NVIDIA H200, 140 GiB, nodes have 8 × NVIDIA H100, 80 GiB",
        "torch 2.11.0+cu130, nodes have 2.13.0",
    ]


def test_versions_are_those_that_all_nodes_have_alike():
    other = {**VERSIONS, "packages.torch": "2.13.0", "kernel": "6.8"}
    found = tuned.versions({"a": VERSIONS, "b": other})
    assert found == {key: value for key, value in VERSIONS.items() if key != "packages.torch"}
    assert tuned.versions({"a": VERSIONS}) == VERSIONS and tuned.versions({}) == {}
