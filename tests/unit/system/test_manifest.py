"""Manifests: a folder that has one is complete, and what differs from it is named."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.system import manifest
from runner.system.manifest import NAME, File, Manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.bin").write_bytes(b"weights" * 100)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text("{}")
    return tmp_path


def test_a_manifest_has_every_file_with_its_size_and_checksum_and_is_read_back(folder):
    made = manifest.write(folder, {"verl": "0.9.1"})
    contents = {"b.bin": b"weights" * 100, "sub/a.json": b"{}"}
    assert made.files == tuple(
        File(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()
    )
    assert made.bytes == 702
    assert manifest.read(folder) == made
    assert manifest.complete(folder) == made
    assert list(manifest.faults(folder, made)) == []
    assert json.loads((folder / NAME).read_text())["digest"] == made.digest


def test_the_digest_is_of_names_and_contents_alone(folder, tmp_path_factory):
    made = manifest.write(folder, {"torch": "2.13"})
    other = tmp_path_factory.mktemp("copy")
    (other / "sub").mkdir()
    for name in ("sub/a.json", "b.bin"):  # made in another order, at another time, by another version
        (other / name).write_bytes((folder / name).read_bytes())
    assert manifest.write(other, {"torch": "2.14"}).digest == made.digest
    (other / "b.bin").rename(other / "c.bin")
    assert manifest.measure(other).digest != made.digest


def truncate(folder):
    os.truncate(folder / "b.bin", 12)


def flip(folder):
    (folder / "b.bin").write_bytes(b"Weights" * 100)


@pytest.mark.parametrize(
    ("damage", "fault", "seen_by_size"),
    [
        (truncate, "b.bin has 12 bytes, not 700", True),
        (flip, "b.bin has another content", False),
        (lambda folder: (folder / "sub" / "a.json").unlink(), "sub/a.json is missing", True),
    ],
)
def test_what_differs_is_named(folder, damage, fault, seen_by_size):
    made = manifest.write(folder)
    damage(folder)
    assert list(manifest.faults(folder, made)) == [fault]
    assert (manifest.complete(folder) is None) == seen_by_size


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"schema": 1}', '{"schema": 1, "files": [1], "about": {}, "digest": ""}']
)
def test_what_is_no_manifest_is_as_if_there_were_none(folder, text):
    (folder / NAME).write_text(text)
    assert manifest.read(folder) is None
    assert manifest.complete(folder) is None


def test_a_manifest_whose_digest_does_not_fit_its_files_is_none(folder):
    manifest.write(folder)
    (folder / NAME).write_text((folder / NAME).read_text().replace('"bytes": 700', '"bytes": 701'))
    assert manifest.read(folder) is None


def test_hidden_files_are_no_part_of_an_artefact_and_links_are_what_they_lead_to(folder, tmp_path_factory):
    made = manifest.measure(folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "objects").write_text("x")
    (folder / ".gitattributes").write_text("x")
    assert manifest.measure(folder) == made
    elsewhere = tmp_path_factory.mktemp("blobs") / "blob"
    (folder / "b.bin").rename(elsewhere)
    (folder / "b.bin").symlink_to(elsewhere)
    assert manifest.measure(folder) == made


def test_a_broken_link_is_an_error_and_leaves_no_manifest(folder):
    (folder / "c").symlink_to("nowhere")
    with pytest.raises(OSError):
        manifest.write(folder)
    assert not (folder / NAME).exists()


def test_the_progress_ends_at_the_whole_and_what_is_known_is_not_read(folder):
    seen = []
    made = manifest.measure(folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (702, 702)
    (folder / "b.bin").chmod(0)
    known = {file.path: file.sha256 for file in made.files}
    assert manifest.measure(folder, known=lambda path, _: known[path.relative_to(folder).as_posix()]) == made


def test_an_artefact_is_made_once_and_again_where_it_is_damaged(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "a").write_text("x" * 9)
        return {"made": len(calls)}

    folder, locks = tmp_path / "of" / "artefacts" / "one", tmp_path / "locks"
    first, made = manifest.made(folder, build, locks)
    assert (made, first.about, manifest.made(folder, build, locks)) == (True, {"made": 1}, (first, False))
    (folder / "a").write_text("x")
    assert manifest.made(folder, build, locks)[0].about == {"made": 2}
    assert [path.name for path in folder.parent.iterdir()] == ["one"], "nothing is left beside it"


def test_what_was_not_finished_is_not_there(tmp_path):
    def build(folder):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manifest.made(tmp_path / "one", build)
    assert [path.name for path in tmp_path.iterdir()] == ["one.lock"]


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(0, 9), st.text("0123456789abcdef", max_size=4)), max_size=6))
@settings(max_examples=30)
def test_two_lists_of_files_have_one_digest_only_if_they_are_the_same(rows):
    files = tuple(File(*row) for row in rows)
    assert Manifest(files).digest == Manifest(files, {"x": 1}).digest
    if files:
        assert Manifest(files[1:]).digest != Manifest(files).digest
