"""The product's own files are found in a checkout and in an installed wheel, and inventories by a plain word."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import ROOT
from runner.system import places


def made(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_in_a_checkout_the_files_lie_around_the_package(tmp_path):
    made(tmp_path, "runner/__init__.py", "configs/models/tiny.yaml", "site.yml")
    assert places.find_root(tmp_path / "runner") == tmp_path


def test_in_a_wheel_they_lie_inside_it_whatever_is_beside_it(tmp_path):
    """A site-packages may hold folders of any name, `configs` among them."""
    made(tmp_path, "runner/__init__.py", "runner/_files/configs/models/tiny.yaml", "configs/of/another/package.yaml")
    assert places.find_root(tmp_path / "runner") == tmp_path / "runner" / "_files"


def test_this_is_a_checkout_and_everything_is_there():
    assert places.ROOT == ROOT and ROOT == places.IMPORT_ROOT
    assert places.ANSIBLE_CFG.is_file() and (places.ROOT / "site.yml").is_file()
    assert all(folder.is_dir() for folder in (places.CONFIGS, places.ROLES, places.TESTBED, places.INVENTORIES))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("local", "OWN/inventory/local"),  # the product's
        ("mine", "inventory/mine"),  # the user's, in ./inventory
        ("both", "inventory/both"),  # which goes before the product's
        ("here", "here"),  # a path goes before all words
        ("inventory/mine", "inventory/mine"),
        ("inventory/local", None),  # a path is taken by its letter
        ("nothing", None),
        ("..", ".."),
        ("a\x00b", None),
    ],
)
def test_a_plain_word_names_an_inventory(source, found, tmp_path, monkeypatch):
    own = made(tmp_path / "own", *(f"inventory/{name}/hosts.yml" for name in ("local", "both", "here")))
    here = made(
        tmp_path / "cwd", *(f"inventory/{name}/hosts.yml" for name in ("mine", "both", "here")), "here/hosts.yml"
    )
    monkeypatch.chdir(here)
    answer = places.inventory(source, own)
    assert answer == (None if found is None else Path(found.replace("OWN", str(own))))
    assert places.inventories(own) == ["both", "here", "local", "mine"]
