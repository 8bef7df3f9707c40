"""What is sent of a user's folders: what Git says, on real repositories."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import UsageError
from runner.launch import code

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in {".", "..", ".git", ".gitignore", "__pycache__"} and not name.lower().startswith(".git")
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """tracked: train.py, lib/a.py, gone.py (removed here); not tracked: new.py; ignored: *.pt, runs/."""
    made = tmp_path / "repo"
    fill(made, "train.py", "lib/a.py", "gone.py")
    (made / ".gitignore").write_text("*.pt\nruns/\n")
    git(made, "init", "-q")
    git(made, "add", ".")
    git(made, "commit", "-qm", "x")
    (made / "gone.py").unlink()
    fill(made, "new.py", "model.pt", "runs/1/log", "__pycache__/train.cpython-311.pyc", "lib/__pycache__/a.pyc")
    return made


SENT = (".gitignore", "lib/a.py", "new.py", "train.py")


def test_of_a_work_tree_what_is_tracked_and_what_is_not_ignored_is_sent(repository):
    found = code.of_script(["train.py", "--x"], repository)
    assert (found.root, found.paths, found.within, found.notes) == (repository, SENT, "", ())
    assert found.bytes == sum((repository / path).stat().st_size for path in SENT)
    assert found.described() == f"{repository}: 4 files, {found.bytes} B"


@pytest.mark.parametrize(
    ("words", "cwd", "within"),
    [
        (["train.py"], "", ""),
        (["../train.py"], "lib", "lib"),
        (["a.py"], "lib", "lib"),
        (["lib/a.py"], "", ""),
        (["python", "-m", "lib.a"], "", ""),
        (["torchrun", "x"], "lib", "lib"),
        ([], "", ""),
    ],
)
def test_the_working_folder_is_the_one_in_which_the_user_is(repository, words, cwd, within):
    found = code.of_script(words, repository / cwd)
    assert (found.root, found.within, found.paths) == (repository, within, SENT)


def test_of_a_folder_that_is_no_work_tree_its_gitignore_counts_too(tmp_path):
    fill(
        tmp_path, "a/train.py", "a/x.pt", "a/.hidden", "a/sub/y.pt", "a/sub/keep.pt", "a/__pycache__/b.pyc", "other.py"
    )
    (tmp_path / "a" / ".gitignore").write_text("*.pt\n")
    (tmp_path / "a" / "sub" / ".gitignore").write_text("!keep.pt\n")
    found = code.of_script(["train.py"], tmp_path / "a")
    assert found.root == tmp_path / "a" and not (tmp_path / "a" / ".git").exists()
    assert found.paths == (".gitignore", ".hidden", "sub/.gitignore", "sub/keep.pt", "train.py")
    assert code.of_script([str(tmp_path / "a" / "train.py")], tmp_path / "a" / "sub").paths == found.paths


def test_a_program_of_the_system_with_the_name_of_a_file_here_says_nothing_of_the_code(tmp_path):
    fill(tmp_path, "a/python", "a/train.py")
    assert code.of_script(["python", "train.py"], tmp_path / "a").root == tmp_path / "a"


def test_sync_names_a_folder_in_a_work_tree_and_no_more_of_it(repository):
    found = code.of_option(repository / "lib", repository)
    assert (found.root, found.paths, found.within) == (repository / "lib", ("a.py",), "")
    assert code.of_option(repository, repository / "lib").within == "lib"


def test_data_are_all_files_whatever_git_ignores(repository):
    found = code.data_of(repository / "runs")
    assert found.paths == ("1/log",)
    (repository / "runs" / ".gitignore").write_text("*")
    assert code.data_of(repository / "runs").paths == (".gitignore", "1/log")


def test_submodules_and_repositories_in_the_tree_belong_to_it(repository, tmp_path):
    inner = tmp_path / "inner"
    fill(inner, "b.py", "deep/c.py")
    (inner / ".gitignore").write_text("*.bin\n")
    git(inner, "init", "-q")
    git(inner, "add", ".")
    git(inner, "commit", "-qm", "x")
    git(repository, "submodule", "add", "-q", str(inner), "third party")
    shutil.copytree(inner, repository / "nested")
    fill(repository, "third party/new.py", "third party/big.bin", "nested/big.bin")
    found = code.of_script(["train.py"], repository)
    own = {path for path in found.paths if path not in SENT}
    inside = {".gitignore", "b.py", "deep/c.py"}
    assert own == {
        ".gitmodules",
        "third party/new.py",
        *(f"{where}/{name}" for where in ("third party", "nested") for name in inside),
    }
    # One that is not checked out is an empty folder: the script would miss it on the nodes as it does here.
    shutil.rmtree(repository / "third party")
    (repository / "third party").mkdir()
    found = code.of_script(["train.py"], repository)
    assert "third party/b.py" not in found.paths
    assert [note for note in found.notes if "third party is empty" in note and "submodule update" in note]


def test_links_stay_links_and_those_that_lead_out_are_told(repository, tmp_path):
    fill(tmp_path, "elsewhere/data.bin")
    (repository / "inside").symlink_to("lib")
    (repository / "abs olute").symlink_to(tmp_path / "elsewhere")
    (repository / "up").symlink_to("../elsewhere/data.bin")
    (repository / "dangling").symlink_to("nowhere")
    found = code.of_script(["train.py"], repository)
    assert {"inside", "abs olute", "up", "dangling"} <= set(found.paths) and "inside/a.py" not in found.paths
    assert len(found.notes) == 1 and "abs olute -> " in found.notes[0] and "up -> " in found.notes[0]
    assert "inside" not in found.notes[0] and "dangling" not in found.notes[0]
    assert found.tree().digest


def test_a_tracked_folder_that_has_become_a_link_is_a_link(repository, tmp_path):
    (repository / "lib").rename(tmp_path / "moved")
    (repository / "lib").symlink_to(tmp_path / "moved")
    assert "lib" in (paths := code.of_script(["train.py"], repository).paths) and "lib/a.py" not in paths


def test_over_one_gigabyte_is_refused_with_what_weighs_and_sent_where_it_is_named(repository):
    (repository / "weights").mkdir()
    with open(repository / "weights" / "a.bin", "wb") as file:
        file.truncate(code.LARGEST)
    with pytest.raises(UsageError, match=r"weights/ .*--sync-data DIR, or add --sync ") as caught:
        code.of_script(["train.py"], repository)
    assert "\n" not in str(caught.value)
    assert code.of_option(repository, repository).bytes > code.LARGEST
    with open(repository / "weights" / "a.bin", "wb") as file:
        file.truncate(code.LARGEST - 10_000)
    code.of_script(["train.py"], repository)


def test_a_folder_that_the_work_tree_ignores_is_its_own(repository):
    fill(repository, "runs/mine/train.py")
    found = code.of_script(["train.py"], repository / "runs" / "mine")
    assert (found.root, found.paths) == (repository / "runs" / "mine", ("train.py",))


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, repository):
    for given_ in (tmp_path / "nowhere", repository / "train.py"):
        with pytest.raises(UsageError, match="there is no such folder"):
            code.of_option(given_, tmp_path)
        with pytest.raises(UsageError, match="there is no such folder"):
            code.data_of(given_)
    found = code.of_script(["train.py"], repository)
    (repository / "train.py").unlink()
    with pytest.raises(UsageError, match=r"train\.py: no such file"):
        found.tree()


def test_the_environment_of_a_hook_does_not_choose_the_repository(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert code.of_script(["train.py"], repository).paths == SENT


def test_without_git_everything_is_sent_and_that_is_said(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = code.of_script(["train.py"], repository)
    assert set(SENT) < set(found.paths) and "model.pt" in found.paths
    assert not [path for path in found.paths if ".git/" in path or "__pycache__" in path]
    assert "git is not installed" in found.notes[0]


@settings(max_examples=25, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_whatever_files_are_called_they_are_found(tmp_path_factory, names):
    for repository in (False, True):
        folder = tmp_path_factory.mktemp("named")
        try:
            for name in names:
                (folder / name).write_text("x")
        except OSError:  # a name that is too long in UTF-8
            return
        if repository:
            git(folder, "init", "-q")
        assert code.of_script(["x.py"], folder).paths == tuple(sorted(names))


def test_a_name_that_is_no_utf_8_is_found(tmp_path):
    name = os.fsdecode(b"-\xff\n \xfe")
    (tmp_path / name).write_text("x")
    assert code.of_script(["x.py"], tmp_path).paths == (name,)
