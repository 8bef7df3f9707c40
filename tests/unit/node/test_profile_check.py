"""What the agent says of a profile before ranks run in it: one line, with the kind and what to do."""

from __future__ import annotations

import json
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import listing
from runner.cluster import environments, inventory
from runner.cluster import profiles as known
from runner.errors import UsageError
from runner.launch import preflight
from runner.node import check, profiles
from runner.node.requests import CheckRequest, ProfileCheck

CPU, CUDA12, CUDA13 = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def there(tmp_path):
    """An environment with its stamp, whose Python is this one and has what this one has."""
    prefix = tmp_path / "env-cpu-smoke"
    info = prefix / "lib" / "python3.11" / "site-packages" / "alpha-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: alpha\nVersion: 1.0\n\n")
    (prefix / "bin").mkdir()
    (prefix / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (prefix / "bin" / "python").chmod(0o755)
    stamped(prefix, CPU, "cpu-smoke")
    return prefix


def stamped(prefix: Path, digest: str, lock: str) -> None:
    content = {"lock_sha256": digest, "profile": lock, "packages": {"alpha": "1.0"}}
    (prefix / environments.STAMP).write_text(json.dumps(content))


def asked(prefix: Path, **fields) -> ProfileCheck:
    given = {"locks": {CPU: "cpu-smoke"}, "packages": ("json",), **fields}
    return ProfileCheck("rl", str(prefix / "bin" / "python"), "run `it`", **given)


def test_a_profile_as_setup_made_it_is_good(there):
    assert profiles.problems(asked(there), "") == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / environments.STAMP).unlink(), "is incomplete in PREFIX: run `it`"),
        (lambda p: p.rename(p.with_name("elsewhere")), "is not installed in PREFIX: run `it`"),
        (lambda p: (p / "bin" / "python").unlink(), "has lost its Python in PREFIX: run `it`"),
        (
            lambda p: (p / "lib/python3.11/site-packages/alpha-1.0.dist-info/METADATA").unlink(),
            "has alpha not installed, not 1.0 in PREFIX: run `it`",
        ),
        (
            lambda p: stamped(p, CUDA12, "gpu-vllm-cuda12"),
            "has the lock gpu-vllm-cuda12 bbbbbbbbbbbb, not cpu-smoke aaaaaaaaaaaa in PREFIX: run `it`",
        ),
    ],
)
def test_what_is_not_as_setup_makes_it_is_named_with_the_command(there, damage, said):
    damage(there)
    expected = f"profile rl {said.replace('PREFIX', str(there))}"
    assert profiles.problems(asked(there), "") == [("environment_missing", expected)]


def test_a_python_that_does_not_start_or_lacks_a_package_is_named(there):
    assert profiles.problems(asked(there, packages=("json", "no_such_package")), "") == [
        ("environment_missing", f"profile rl: {there}/bin/python lacks no_such_package: run `it`")
    ]
    (there / "bin" / "python").write_text(
        "#!/bin/sh\necho 'libpython3.11.so.1.0: cannot open shared object' >&2; exit 127\n"
    )
    ((kind, said),) = profiles.problems(asked(there), "")
    assert kind == "environment_missing" and "gives no answer (libpython3.11.so.1.0: cannot open" in said


def test_a_sites_own_python_needs_no_stamp_but_the_packages(tmp_path):
    site = ProfileCheck("rl", sys.executable, "install verl there", packages=("json", "no_such_package"))
    ((_, said),) = profiles.problems(site, "")
    assert said == f"profile rl: {sys.executable} lacks no_such_package: install verl there"
    ((_, said),) = profiles.problems(replace(site, python=str(tmp_path / "bin" / "python")), "")
    assert "is not installed" in said and "install verl there" in said


GPU = {CUDA13: "gpu-vllm-cuda13", CUDA12: "gpu-vllm-cuda12"}


@pytest.mark.parametrize(
    ("driver", "digest", "said"),
    [
        ("580.65.06", CUDA13, None),
        ("560.35.03", CUDA12, None),
        # Made for another driver: setup chooses again.
        ("560.35.03", CUDA13, "has the lock gpu-vllm-cuda13, for a driver >= 580.65.06, found 560.35.03: run `it`"),
        ("470.1", CUDA12, "(gpu-vllm-cuda12) needs an NVIDIA driver >= 525.60.13, found 470.1: install a newer one"),
        ("", CUDA12, "(gpu-vllm-cuda12) needs an NVIDIA driver >= 525.60.13, found none: install a newer one"),
    ],
)
def test_the_driver_is_held_against_the_lock(there, driver, digest, said):
    stamped(there, digest, GPU[digest])
    found = profiles.problems(asked(there, locks=GPU), driver)
    assert found == ([("driver_too_old", f"profile rl {said}")] if said else [])


# --- what the controller asks for ---


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ({"ansible_connection": "local"}, "run `runner setup -i inv --tags conda_env`"),
        (
            {"runner_python": sys.executable},
            "run `runner setup -i inv --tags conda_env --set conda_env_further=[cpu-smoke]`",
        ),
        (
            {"runner_python": "/opt/shakedown/env/bin/python", "runner_profiles": ["cpu-smoke"]},
            "run `runner setup -i inv --tags conda_env`",
        ),
    ],
)
def test_the_remedy_is_the_command_that_makes_it_for_this_inventory(variables, remedy):
    (node,) = inventory.parse("inv", listing({"a": variables})).nodes
    found = preflight.profile_check(node, "cpu-smoke")
    assert found and (found.remedy, found.locks) == (remedy, known.locks("cpu-smoke"))


def test_a_site_is_told_what_to_install_and_a_cell_without_a_profile_is_not_checked_for_one():
    (node,) = inventory.parse("inv", listing({"a": {"runner_python": "/sw/bin/python"}})).nodes
    found = preflight.profile_check(node, "gpu-vllm")
    assert (
        found and found.locks == {} and "verl, vllm there, or name another Python with runner_pythons" in found.remedy
    )
    assert preflight.profile_check(node, "") is None


# --- a folder that all see ---


def request(tmp_path: Path, shared: dict[str, str]) -> CheckRequest:
    return CheckRequest("0", str(tmp_path / "scratch"), 0.0, shared=shared)


def test_a_node_proves_that_it_sees_the_controllers_folder(tmp_path):
    proof = preflight.shared_proof(tmp_path / "work")
    assert preflight.shared_proof(tmp_path / "work") == proof  # one for all runs: another may be asking at the moment
    assert "not_shared" not in check.check(request(tmp_path, proof)).kinds
    (path,) = proof
    for damage, said in (
        (lambda: Path(path).write_text("another's"), "has another"),
        (Path(path).unlink, "does not see"),
    ):
        damage()
        answer = check.check(request(tmp_path, proof))
        (line,) = [text for kind, text in zip(answer.kinds, answer.problems, strict=True) if kind == "not_shared"]
        assert said in line and str(tmp_path / "work") in line and "runner_shared" in line


def test_of_two_first_starts_in_one_folder_none_takes_the_others_proof_away(tmp_path, monkeypatch):
    work, others, real = tmp_path / "work", [], uuid.uuid4

    def another_start_meanwhile():
        monkeypatch.setattr(uuid, "uuid4", real)
        others.append(preflight.shared_proof(work))
        return real()

    monkeypatch.setattr(uuid, "uuid4", another_start_meanwhile)
    assert [preflight.shared_proof(work)] == others
    assert len(list(work.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write to"):
        preflight.shared_proof(tmp_path / "file" / "work")
