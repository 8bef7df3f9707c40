"""Profiles on the controller: made once, whole or absent, and only for those who see them."""

from __future__ import annotations

import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import listing
from runner.cluster import environments, facts, inventory
from runner.cluster import profiles as known
from runner.errors import InfrastructureError, UsageError
from runner.provision import profiles

NAME = known.ON_CPUS


def wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = '{version}'\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock of two small packages in place of the profile's, one with a local version; pip has only these."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "alpha", "1.0")
    wheel(wheels, "beta", "2.1+cpu")
    file = tmp_path / "lock.txt"
    file.write_text("# cuda: none\n# index: http://127.0.0.1:9/whl\nalpha==1.0\nbeta==2.1+cpu\n")
    for name, value in {"FIND_LINKS": str(wheels), "NO_INDEX": "1", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (known, profiles):
        monkeypatch.setattr(module, "lock", lambda name: file)
    return file


def test_a_profile_is_made_once_also_by_two_commands_at_once_and_repaired_when_it_is_torn(lock):
    seen = []
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: profiles.make(NAME, lambda *step: seen.append(step)), range(2)))
    assert sorted(made.changed for made in both) == [False, True]
    (python,) = {made.python for made in both}
    assert python.exists() and python == known.place(NAME) / "bin" / "python"
    assert all(0 <= done <= total for done, total, _ in seen)
    stamp = environments.stamp(str(known.place(NAME)))
    assert (stamp["profile"], stamp["lock_sha256"]) == (NAME, environments.Lock(lock.read_text()).sha256)
    assert {"alpha": "1.0", "beta": "2.1+cpu"}.items() <= stamp["packages"].items()

    (metadata,) = known.place(NAME).glob("lib/python3*/site-packages/alpha-1.0.dist-info/METADATA")
    metadata.unlink()
    assert profiles.fault(NAME) == "has alpha not installed, not 1.0"
    assert profiles.make(NAME).changed
    assert profiles.fault(NAME) == ""


@pytest.mark.parametrize("pin", ["gamma==3", "gamma==3+cpu"])
def test_what_pip_does_not_have_is_one_line_and_leaves_nothing(lock, pin):
    lock.write_text(f"{lock.read_text()}{pin}\n")
    with pytest.raises(InfrastructureError, match=r"lock cpu-smoke: .*gamma==3") as caught:
        profiles.make(NAME)
    assert caught.value.kind == "environment_missing" and "\n" not in str(caught.value)
    assert not known.place(NAME).exists()
    assert profiles.fault(NAME) == "is not installed"


def test_an_interrupted_one_is_incomplete(lock):
    (known.place(NAME) / "bin").mkdir(parents=True)
    assert profiles.fault(NAME) == "is incomplete"


def test_too_little_space_is_said_before_anything_is_fetched(lock, monkeypatch):
    monkeypatch.setattr(profiles, "_NEEDED_GIB", {False: 1e9})
    with pytest.raises(InfrastructureError, match=r"GiB required .*XDG_CACHE_HOME") as caught:
        profiles.make(NAME)
    assert caught.value.kind == "disk_full"


@pytest.mark.parametrize(
    ("driver", "lock_of"),
    [("580.65.06", "gpu-vllm-cuda13"), ("560.35.03", "gpu-vllm-cuda12"), ("525.60.13", "gpu-vllm-cuda12")],
)
def test_the_driver_decides_which_lock_is_installed(monkeypatch, driver, lock_of):
    monkeypatch.setattr(facts, "gpus", lambda: {"driver": driver, "gpus": [{}]})
    assert profiles._chosen("gpu-vllm") == lock_of
    assert profiles._chosen("cpu-smoke") == "cpu-smoke"


@pytest.mark.parametrize(("driver", "said"), [(None, "found none"), ("470.1", r"found 470\.1")])
def test_a_driver_that_runs_no_lock_is_named_with_what_to_do(monkeypatch, driver, said):
    monkeypatch.setattr(facts, "gpus", lambda: {"driver": driver, "gpus": []})
    with pytest.raises(InfrastructureError, match=rf"driver >= 525\.60\.13 .*{said}: install .*cpu-smoke") as caught:
        profiles.make("gpu-vllm")
    assert caught.value.kind == "driver_too_old"


# --- for whom ---


@pytest.mark.parametrize(
    ("variables", "gpus", "profiles_of"),
    [
        ({"ansible_connection": "local"}, 0, [NAME]),
        ({"ansible_connection": "local"}, 1, []),
        ({"ansible_connection": "local", "runner_profiles": ["gpu-vllm"]}, 1, ["gpu-vllm"]),
        ({"ansible_connection": "local", "runner_profiles": []}, 0, []),
        ({"runner_python": sys.executable, "runner_profiles": [NAME]}, 0, [NAME]),  # as in a testbed
        ({"runner_python": sys.executable}, 0, []),
        # These have files of their own: the role's.
        ({"runner_python": "/opt/shakedown/env/bin/python", "runner_profiles": [NAME]}, 0, []),
    ],
)
def test_the_controller_makes_what_its_nodes_see(monkeypatch, variables, gpus, profiles_of):
    monkeypatch.setattr(facts, "gpus", lambda: {"driver": None, "gpus": [{}] * gpus})
    nodes = inventory.parse("inv", listing({"a": variables})).nodes
    assert profiles.wanted(nodes, {}, to_make=True) == {name: ["a"] for name in profiles_of}
    assert profiles.wanted(nodes, {"conda_env_further": []}, to_make=True) == {}


def test_a_profile_that_nobody_asked_for_is_not_missed(lock, monkeypatch):
    monkeypatch.setattr(facts, "gpus", lambda: {"driver": None, "gpus": []})
    nodes = inventory.parse("inv", listing({"a": {"ansible_connection": "local"}})).nodes
    assert profiles.wanted(nodes, {}, to_make=False) == {}
    assert profiles.wanted([replace(node, profiles=[NAME]) for node in nodes], {}, to_make=False) == {NAME: ["a"]}
    known.place(NAME).mkdir(parents=True)
    assert profiles.wanted(nodes, {}, to_make=False) == {NAME: ["a"]}


def test_an_unknown_profile_is_refused_with_the_nearest(cluster):
    with pytest.raises(UsageError, match=r"conda_env_further.*'gpu-vlm'; did you mean 'gpu-vllm'"):
        profiles.wanted(cluster.nodes, {"conda_env_further": ["gpu-vlm"]}, to_make=True)
    with pytest.raises(UsageError, match=r"runner_profiles.*'cpusmoke'"):
        inventory.parse("inv", listing({"a": {"runner_profiles": ["cpusmoke"]}}))
