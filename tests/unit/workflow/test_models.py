"""Models of the hub: fetched whole at one commit, with the licence told, or refused in one line that says what to do.

The hub is a stand-in that serves its API on this machine.
"""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from fakes import hub
from runner.errors import InfrastructureError, UsageError
from runner.workflow import models
from runner.workloads.rl import tiny

REPO = "meta-llama/Llama-3.2-1B-Instruct"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tiny.make(tmp_path_factory.mktemp("models"))[0]
    own = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    others = {"original/consolidated.00.pth": b"x" * 10, "pytorch_model.bin": b"x", ".gitattributes": b"*"}
    return {**own, **others, "README.md": b"# Llama", "LICENSE.txt": b"..."}


@pytest.fixture
def server(monkeypatch, tmp_path, files):
    with hub.serving() as found:
        found.repositories[REPO] = hub.Repository(dict(files), card={"license": "llama3.2"})
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found


def refused(model, tmp_path, kind=UsageError):
    with pytest.raises(kind) as caught:
        models.find(model, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_model_is_fetched_at_one_commit_with_its_licence_told(server, tmp_path, files):
    found = models.find("llama-3.2-1b-instruct", tmp_path / "cache")
    commit = server.repositories[REPO].sha
    assert found.notes == (f"model {REPO} at {commit[:12]}, licence: llama3.2",)
    assert found.about == {"hub": REPO, "commit": commit, "license": "llama3.2"}
    there = {path.name for path in found.folder.rglob("*")}
    assert there == {name for name in files if name[0] != "." and "/" not in name and name != "pytorch_model.bin"}
    assert (found.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_revision_is_its_own(server, tmp_path):
    server.repositories[REPO].files["generation_config.json"] = b'{"max_length": 9}'
    found = models.find(f"{REPO}@main", tmp_path / "cache")
    assert found.name == "meta-llama--Llama-3.2-1B-Instruct"
    assert (found.folder / "generation_config.json").read_bytes() == b'{"max_length": 9}'


@pytest.mark.parametrize(
    ("token", "accepted", "says"),
    [
        (None, False, "accept its licence at {endpoint}/" + REPO + " and set HF_TOKEN"),
        (
            hub.TOKEN,
            False,
            "accept its licence at {endpoint}/" + REPO + " with the account whose token is in HF_TOKEN, which",
        ),
        (
            "hf_wrong",
            True,
            "accept its licence at {endpoint}/" + REPO + " with the account whose token is in HF_TOKEN, which",
        ),
    ],
)
def test_a_gated_model_is_one_line_that_says_where_to_accept_its_licence(
    server, tmp_path, monkeypatch, token, accepted, says
):
    server.repositories[REPO].gated, server.repositories[REPO].accepted = "manual", accepted
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    error = refused("llama-3.2-1b-instruct", tmp_path)
    assert f"model {REPO!r} is gated: " + says.format(endpoint=server.endpoint) in str(error)
    assert error.kind == "weights_unusable"


def test_without_a_token_nothing_of_a_gated_model_is_asked_for(server, tmp_path):
    server.repositories[REPO].gated = True
    refused(REPO, tmp_path)
    assert not [request for request in server.requests if "/resolve/" in request]


def test_a_gated_model_with_its_licence_accepted_is_fetched(server, tmp_path, monkeypatch):
    server.repositories[REPO].gated = "auto"
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    assert models.find(REPO, tmp_path / "cache").folder.is_dir()


def test_a_model_that_the_hub_does_not_have_is_one_line(server, tmp_path):
    error = refused("meta-llama/Lama", tmp_path)
    assert str(error) == "model 'meta-llama/Lama' is not on the hub, or private: correct --model, or set HF_TOKEN"


def test_a_repository_without_weights_of_transformers_is_one_line(server, tmp_path):
    server.repositories["a/gguf"] = hub.Repository({"model.gguf": b"x", "config.json": b"{}"})
    assert "has no weights of transformers" in str(refused("a/gguf", tmp_path))


def test_a_repository_that_is_no_whole_model_is_one_line(server, tmp_path):
    del server.repositories[REPO].files["tokenizer.json"]
    assert "has no tokenizer (tokenizer.json)" in str(refused(REPO, tmp_path))


def test_a_hub_that_does_not_answer_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    error = refused(REPO, tmp_path, InfrastructureError)
    assert str(error) == f"model {REPO!r}: the Hugging Face hub does not answer; give --model a folder"
    assert error.kind == "hub_unreachable"


def test_offline_what_is_in_the_cache_is_taken_and_nothing_asked(server, tmp_path, monkeypatch):
    first = models.find(REPO, tmp_path / "cache")
    server.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert models.find(REPO, tmp_path / "cache").folder == first.folder
    assert "the Hugging Face hub does not answer" in str(refused("some/other", tmp_path, InfrastructureError))
    assert server.requests == []


def test_a_dry_run_names_what_was_fetched_and_asks_nothing(server, tmp_path):
    before = models.preview(REPO, tmp_path / "cache", tmp_path / "work")
    assert before.folder.parent == tmp_path / "work"
    found = models.find(REPO, tmp_path / "cache")
    server.requests.clear()
    after = models.preview(REPO, tmp_path / "cache", tmp_path / "work")
    assert (after.folder, after.notes, server.requests) == (found.folder, (), [])


def test_a_disk_that_is_too_small_is_one_line_before_anything_is_fetched(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**10))
    error = refused(REPO, tmp_path, InfrastructureError)
    assert "KiB are to be fetched to" in str(error) and "where 1 KiB are free: free some space, or set HF_HOME" in str(
        error
    )
    assert error.kind == "controller_disk_full"
    assert not [request for request in server.requests if "/resolve/" in request]


def test_what_has_arrived_is_told(server, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_INTERVAL_S", 0.001)
    seen = []
    models.find(REPO, tmp_path / "cache", lambda *at: seen.append(at))
    assert seen and all(done <= total == seen[0][1] for done, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
