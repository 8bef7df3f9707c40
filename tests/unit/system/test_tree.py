"""A folder's digest: what changes it, what does not, and that a file is read again once it has changed."""

from __future__ import annotations

import io
import os
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.system import tree

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in {".", ".."}
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "code"
    (made / "sub").mkdir(parents=True)
    (made / "train.py").write_text("print(1)\n")
    (made / "sub" / "run.sh").write_text("true\n")
    (made / "sub" / "run.sh").chmod(0o755)
    (made / "link").symlink_to("train.py")
    return made


CHANGES = {
    "a content": lambda folder: (folder / "train.py").write_text("print(2)\n"),
    "a name": lambda folder: (folder / "train.py").rename(folder / "trains.py"),
    "what is executable": lambda folder: (folder / "train.py").chmod(0o755),
    "a file more": lambda folder: (folder / ".env").write_text(""),
    "a file less": lambda folder: (folder / "train.py").unlink(),
    "where a link leads": lambda folder: ((folder / "link").unlink(), (folder / "link").symlink_to("sub/run.sh")),
    "a link that becomes a file": lambda folder: ((folder / "link").unlink(), (folder / "link").write_text("train.py")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_that_differs_has_another_digest(folder, tmp_path, change):
    cache = tmp_path / "cache.json"
    before = tree.measure(folder, cache=cache)
    change(folder)
    after = tree.measure(folder, cache=cache)
    assert after.digest != before.digest and after.changes(before)


def test_times_owners_other_modes_and_empty_folders_are_no_part_of_it(folder):
    before = tree.measure(folder)
    os.utime(folder / "train.py", (0, 0))
    (folder / "train.py").chmod(0o600)
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    assert tree.measure(folder) == before
    assert tree.Tree.from_json(before.to_json()) == before


def test_a_file_is_read_once_and_again_when_it_has_changed_even_with_its_old_size_and_time(
    folder, tmp_path, monkeypatch
):
    cache, read = tmp_path / "cache.json", []
    monkeypatch.setattr(tree, "_SETTLED_S", 0.0)
    actual = tree._sha256
    monkeypatch.setattr(tree, "_sha256", lambda path: read.append(path.name) or actual(path))
    time.sleep(0.02)
    first = tree.measure(folder, cache=cache)
    assert sorted(read) == ["run.sh", "train.py"]
    assert tree.measure(folder, cache=cache) == first and len(read) == 2
    before = (folder / "train.py").stat()
    (folder / "train.py").write_text("print(3)\n")
    os.utime(folder / "train.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.02)
    assert tree.measure(folder, cache=cache) != first and read[2:] == ["train.py"]
    for broken in ("", "[]", "{", '{"train.py": [1]}'):
        cache.write_text(broken)
        assert tree.measure(folder, cache=cache).digest == tree.measure(folder).digest


def test_a_file_that_has_just_changed_is_not_trusted_to_have_settled(folder, tmp_path):
    cache = tmp_path / "cache.json"
    tree.measure(folder, cache=cache)
    assert not cache.exists() or "train.py" not in cache.read_text()


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=20), min_size=1, max_size=5))
def test_whatever_files_are_called_a_zip_of_one_tree_has_one_form_and_all_of_it(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("named")
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError:  # a name that is too long in UTF-8
        return
    found = tree.measure(folder)
    assert {entry.path for entry in found.entries} == set(files) and found.bytes == sum(map(len, files.values()))
    forms = []
    for when in (0, 10**9):
        for name in files:
            os.utime(folder / name, (when, when))
        written = io.BytesIO()
        tree.write_zip(folder, found, written)
        forms.append(written.getvalue())
    assert forms[0] == forms[1]
    with zipfile.ZipFile(io.BytesIO(forms[0])) as archive:
        assert sorted(archive.read(info) for info in archive.infolist()) == sorted(files.values())


def test_names_that_are_no_utf_8_are_kept_and_links_are_refused_in_a_zip(tmp_path):
    name = os.fsdecode(b"\xff\xfe")
    (tmp_path / name).write_text("x")
    found = tree.measure(tmp_path)
    assert tree.Tree.from_json(found.to_json()).entries[0].path == name and found.digest
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(ValueError, match="link is a symbolic link"):
        tree.write_zip(tmp_path, tree.measure(tmp_path, ["link"]), io.BytesIO())
