"""A model published to a folder, by rsync and to the hub: whole, read back, and never over something else."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from fakes import hub
from runner.errors import InfrastructureError, UsageError
from runner.system import manifest, places
from runner.workflow import publish as module
from runner.workflow.publish import check, publish

# Of the hub's own library, in its LFS path.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ASKED = {"question": "What is 1 + 2?", "answer": "#### 3", "versions": {"verl": "0.9.1"}}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "a model's"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "sub dir" / "extra $(x) 'é'.txt").write_text("x")
    manifest.write(folder, ASKED)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is published ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / manifest.NAME).unlink(), "has no manifest: it is no model that a merge has finished"),
        (lambda folder: manifest.write(folder, {}), "was not loaded and asked a question after it was merged"),
        (lambda folder: manifest.write(folder, {"question": "1 + 2?"}), "was not loaded and asked a question"),
        (
            lambda folder: (folder / "config.json").write_text("{ }"),
            "is not what was merged: config.json has 3 bytes, not 2",
        ),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            "is not what was merged: config.json has another content",
        ),
        (lambda folder: shutil.rmtree(folder / "sub dir"), "'é'.txt is missing; run the merge again"),
    ],
)
def test_a_model_that_was_not_loaded_or_has_changed_is_not_published(model, tmp_path, spoil, says):
    spoil(model)
    with pytest.raises(UsageError) as caught:
        publish(model, f"dir:{tmp_path}/out")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_answer_is_one(model, tmp_path):
    manifest.write(model, {**ASKED, "answer": ""})
    publish(model, f"dir:{tmp_path}/out")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("/srv/models", "--publish /srv/models: write it as dir:PATH, hf:OWNER/NAME or rsync:[[USER@]HOST:]PATH"),
        ("ftp:x", "--publish ftp:x: unknown target 'ftp'; known: dir, hf, rsync"),
        ("rsycn:x", "did you mean 'rsync'?"),
        ("dir:", "--publish dir:: say where to: dir:PATH"),
        ("dir:{here}/file", "file: that is a file; name a folder"),
        ("dir:{here}/file/below", "nothing can be written below "),
        ("dir:{here}/a\nb", "is no path of one line"),
        ("dir:{here}/full", "full: the folder is not empty and holds no published model; name another"),
        ("hf:one", "--publish hf:one: write the repository as OWNER/NAME"),
        ("hf:a/b/c", "--publish hf:a/b/c: write the repository as OWNER/NAME"),
        ("hf:a/b", "--publish hf:a/b: set HF_TOKEN to a token that may write"),
        ("rsync:-oProxyCommand=x:/y", "'-oProxyCommand=x' is no host; write rsync:[[USER@]HOST:]PATH"),
        ("rsync:a b:/y", "'a b' is no host"),
        ("rsync:host:", "say to which folder"),
        ("rsync:-x", "say to which folder"),
        ("rsync:host::module", "a daemon of rsync is not supported"),
        ("rsync://host/module", "a daemon of rsync is not supported"),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_anything_runs(tmp_path, monkeypatch, target, says):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError) as caught:
        check(target.format(here=tmp_path))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "target", ["dir:x", "dir:~/x y", "rsync:user@host.example:/srv/a b", "rsync:rel/a:b", "rsync:/x"]
)
def test_a_target_that_may_be_is_not_contacted(target):
    check(target)


# --- a folder and rsync do the same ----------------------------------------------------------------------------


@pytest.fixture(params=["dir", "rsync"])
def target(request, tmp_path):
    """(target, the folder that it names): a name that a shell would read as something else."""
    if request.param == "rsync" and shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    folder = tmp_path / "to" / "my $(touch x); 'best' model"
    return f"{request.param}:{folder}", folder


def test_a_model_arrives_whole_and_its_progress_ends_at_the_whole(model, target):
    to, folder = target
    seen = []
    found = publish(model, to, lambda *at: seen.append(at))
    assert contents(folder) == contents(model)
    assert (found.bytes, found.digest) == (256003, manifest.read(model).digest)
    assert str(folder) in found.where
    assert seen[-1][1:] == (256003, 256003)
    assert list(folder.parent.iterdir()) == [folder], "nothing is left beside it"


def test_the_same_model_is_published_twice_without_harm(model, target):
    to, folder = target
    publish(model, to)
    before = (folder / "model.safetensors").stat().st_ino
    (folder / "README.md").write_text("mine")
    assert publish(model, to).where
    assert (folder / "model.safetensors").stat().st_ino == before
    assert (folder / "README.md").read_text() == "mine"


def test_another_model_is_not_written_over(model, target):
    to, folder = target
    publish(model, to)
    first = contents(folder)
    (model / "config.json").write_text('{"a": 1}')
    manifest.write(model, ASKED)
    with pytest.raises(UsageError, match=r"another model is there \(digest \w{12}\); name another folder"):
        publish(model, to)
    assert contents(folder) == first


@pytest.mark.parametrize("name", ["thesis.tex", "config.json"])
def test_something_else_is_not_written_over(model, target, name):
    to, folder = target
    folder.mkdir(parents=True)
    (folder / name).write_text("years of work")
    with pytest.raises(UsageError, match="no published model; name another"):
        publish(model, to)
    assert contents(folder) == {name: b"years of work"}


def test_an_empty_folder_is_filled(model, target):
    to, folder = target
    folder.mkdir(parents=True)
    publish(model, to)
    assert contents(folder) == contents(model)


def test_a_target_that_cannot_be_written_is_one_line(model, target):
    to, folder = target
    folder.parent.mkdir(exist_ok=True)
    folder.parent.joinpath("file").touch()
    with pytest.raises((InfrastructureError, UsageError)) as caught:  # a folder of this machine: before anything runs
        publish(model, f"{to.partition(':')[0]}:{folder.parent}/file/below")
    assert str(caught.value).startswith("--publish ") and "\n" not in str(caught.value)


# --- a folder --------------------------------------------------------------------------------------------------


def test_a_copy_that_does_not_read_back_the_same_is_not_called_published(model, tmp_path, monkeypatch):
    real = manifest.copy

    def bad_disk(source, files, target, on_progress=None):
        real(source, files, target, on_progress)
        (target / "config.json").write_text("[]")

    monkeypatch.setattr(module.manifest, "copy", bad_disk)
    with pytest.raises(InfrastructureError, match="the copy does not read back the same: see the disk of"):
        publish(model, f"dir:{tmp_path}/out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"), [("[]", "config.json has another content"), ("", "config.json has 0 bytes, not 2")]
)
def test_a_published_model_that_was_damaged_since_is_named_and_left_as_it_is(model, tmp_path, text, said):
    publish(model, f"dir:{tmp_path}/out")
    (tmp_path / "out" / "config.json").write_text(text)
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=f"what is there is damaged: {said}"):
        publish(model, f"dir:{tmp_path}/out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_folder_of_the_user_with_a_name_like_ours_is_left_alone(model, tmp_path):
    mine = tmp_path / "out.tmp-2025"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    publish(model, f"dir:{tmp_path}/out")
    assert contents(mine) == {"thesis.tex": b"years of work"}


def test_nothing_of_an_interrupted_copy_is_left_whatever_the_folder_is_called(model, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(module.manifest, "copy", killed)
    with pytest.raises(Killed):
        publish(model, f"dir:{tmp_path}/to/[best] model*")
    assert list((tmp_path / "to").iterdir()) == []


def test_the_lock_is_in_a_folder_that_nobody_else_can_have_made(model, tmp_path):
    publish(model, f"dir:{tmp_path}/out")
    assert module._locks().is_relative_to(places.cache_dir())


# --- rsync -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rsync(tmp_path, monkeypatch):
    """A function that puts a script before the real rsync, which is "$REAL"."""
    real = shutil.which("rsync")
    if real is None:
        pytest.skip("rsync is not installed")

    def wrap(script: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin" / "rsync"
        program.write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{__import__('os').environ['PATH']}")

    return wrap


def test_what_was_interrupted_goes_on_and_is_whole(model, tmp_path, rsync):
    rsync(
        'case "$*" in *model.safetensors*) echo "rsync: connection unexpectedly closed" >&2; exit 12;; esac; exec $REAL "$@"'
    )
    with pytest.raises(InfrastructureError, match=r"--publish rsync:.*: rsync: connection unexpectedly closed"):
        publish(model, f"rsync:{tmp_path}/out")
    assert not (tmp_path / "out" / manifest.NAME).exists(), "what has a manifest is whole"
    rsync('exec $REAL "$@"')
    publish(model, f"rsync:{tmp_path}/out")
    assert contents(tmp_path / "out") == contents(model)


def test_what_another_model_left_half_is_not_written_over(model, tmp_path, rsync):
    rsync('case "$*" in *model.safetensors*) exit 12;; esac; exec $REAL "$@"')
    with pytest.raises(InfrastructureError):
        publish(model, f"rsync:{tmp_path}/out")
    rsync('exec $REAL "$@"')
    (model / "config.json").write_text('{"a": 1}')
    manifest.write(model, ASKED)
    with pytest.raises(UsageError, match="another model is there"):
        publish(model, f"rsync:{tmp_path}/out")


def test_what_does_not_read_back_the_same_on_the_other_side_is_not_called_published(model, tmp_path, rsync):
    rsync(f'case "$*" in *--dry-run*) printf "[]" >"{tmp_path}/out/config.json";; esac; exec $REAL "$@"')
    with pytest.raises(InfrastructureError, match=r"config\.json does not read back the same: see the disk there"):
        publish(model, f"rsync:{tmp_path}/out")


def test_a_full_disk_on_the_other_side_has_its_kind(model, tmp_path, rsync):
    rsync("""case "$*" in *--list-only*) exec $REAL "$@";; esac
echo 'rsync: [receiver] write failed on "/x": No space left on device (28)' >&2; exit 11""")
    with pytest.raises(InfrastructureError, match="No space left on device") as caught:
        publish(model, f"rsync:{tmp_path}/out")
    assert caught.value.kind == "disk_full"


# --- the hub: a stand-in that serves its API on this machine -----------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    with hub.serving() as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in has the LFS API
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        yield found


def test_a_model_is_one_private_commit_on_the_hub_with_the_hubs_own_checksums_compared(model, server):
    seen = []
    found = publish(model, "hf:me/mine", lambda *at: seen.append(at))
    repository = server.repositories["me/mine"]
    assert {name: data for name, data in repository.files.items() if name != ".gitattributes"} == contents(model)
    assert repository.private
    assert found.where == f"{server.endpoint}/me/mine at {repository.sha[:12]}"
    assert [request for request in server.requests if "/commit/" in request] == ["POST /api/models/me/mine/commit/main"]
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() in server.uploaded, "by the LFS API"
    assert seen[-1] == ("uploading the model", 256003, 256003)
    assert not any(hub.TOKEN.encode() in data for data in contents(model).values()), "no secret is written"


def test_a_later_model_follows_it_and_its_old_shards_are_gone(model, server):
    (model / "model-00002.safetensors").write_bytes(b"x" * 200_000)
    manifest.write(model, ASKED)
    publish(model, "hf:me/mine")
    server.repositories["me/mine"].files["README.md"] = b"mine"
    (model / "model-00002.safetensors").unlink()
    manifest.write(model, ASKED)
    publish(model, "hf:me/mine")
    there = server.repositories["me/mine"].files
    assert set(there) == {*contents(model), ".gitattributes", "README.md"}


def test_a_repository_with_something_else_is_not_written_over(model, server):
    server.repositories["me/mine"] = hub.Repository({"config.json": b"{}"})
    with pytest.raises(UsageError, match="--publish hf:me/mine: the repository holds something else; name another"):
        publish(model, "hf:me/mine")
    assert server.repositories["me/mine"].files == {"config.json": b"{}"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sub dir/extra $(x) 'é'.txt"])
def test_what_the_hub_has_in_another_content_is_not_called_published(model, server, name):
    size = (model / name).stat().st_size
    server.damage = {name: b"y" * size}
    with pytest.raises(InfrastructureError) as caught:
        publish(model, "hf:me/mine")
    assert str(caught.value) == f"--publish hf:me/mine: {name} on the hub is not what was sent: publish again"


def test_a_token_that_may_not_write_is_one_line(model, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(UsageError) as caught:
        publish(model, "hf:me/mine")
    assert str(caught.value) == (
        "--publish hf:me/mine: the hub refuses the token (401): set HF_TOKEN to one that may write"
    )


def test_an_upload_that_the_hub_breaks_off_is_its_fault(model, server):
    server.store_refuses = True
    with pytest.raises(InfrastructureError) as caught:
        publish(model, "hf:me/mine")
    assert "'me/mine'" in str(caught.value) and "\n" not in str(caught.value)
    assert "config.json" not in server.repositories["me/mine"].files, "one commit or none"


def test_a_hub_that_does_not_answer_is_one_line(model, server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InfrastructureError) as caught:
        publish(model, "hf:me/mine")
    assert caught.value.kind == "hub_unreachable" and "\n" not in str(caught.value)
    assert "publish to a folder (dir:PATH)" in str(caught.value)


def test_rsync_is_the_real_one():
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    assert "version 3" in subprocess.run(["rsync", "--version"], capture_output=True, text=True).stdout
