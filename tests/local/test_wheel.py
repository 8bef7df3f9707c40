"""The built wheel, installed beside no checkout: its own files are found, and it writes into an empty folder alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.local

# What pip builds from: a clean clone, whatever lies in this checkout.
SOURCES = (
    "runner", "configs", "inventory/local", "inventory/slurm-example", "playbooks", "plugins", "roles", "testbed",
    "ansible.cfg", "site.yml", "pyproject.toml", "setup.py", "README.md",
)  # fmt: skip


def call(*argv: str | Path, cwd: Path, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, cwd=cwd, env={**ENV, **env}, capture_output=True, text=True, timeout=280)
    assert code is None or done.returncode == code, f"{argv}\n{done.stdout}{done.stderr}"
    return done


# Nothing that leads back to the checkout, or to what other runs on this machine share.
OTHERS = ("PYTHON", "ANSIBLE_", "RUNNER_", "XDG_", "VIRTUAL_ENV")
ENV = {key: value for key, value in os.environ.items() if not key.startswith(OTHERS)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    # What was deleted since an earlier build, and what an earlier build left.
    for name in ("build/lib/runner/deleted.py", "roles/ssh_mesh/tasks/__pycache__/x.pyc", "configs/models/.swp"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).touch()
    options = ("-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "wheel", *options, "-w", built, sources, cwd=built)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel, and with the packages of this one but not its project."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    options = ("-q", "--no-deps", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    links = folder / "dependencies"
    links.mkdir()
    own = {
        Path(path) for path in sys.path if Path(path).is_relative_to(Path(sys.prefix, "lib")) and Path(path).is_dir()
    }
    for entry in (entry for path in own for entry in path.iterdir()):
        if not entry.name.startswith(("__editable__", "shakedown")) and entry.suffix != ".pth":
            (links / entry.name).symlink_to(entry)
    (package(folder).parent / "dependencies.pth").write_text(f"{links}\n")
    for name in ("ansible-inventory", "ansible-playbook"):
        program = folder / "bin" / name
        program.write_text(f"#!{python}\n" + Path(sys.executable).with_name(name).read_text().partition("\n")[2])
        program.chmod(0o755)
    return folder


def package(folder: Path) -> Path:
    (found,) = folder.glob("lib/python3*/site-packages/runner")
    return found


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What is in `folder`, and when it was changed; without what Python keeps of modules that it has read."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


@pytest.fixture(scope="module")
def runner(installed, tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """The command `runner` in an empty folder; at the end nothing was written into the package."""
    empty, home = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("home")
    before = files(package(installed))

    def run(*arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return call(installed / "bin" / "runner", *arguments, cwd=empty, code=code, HOME=str(home))

    yield run
    assert files(package(installed)) == before


def test_the_wheel_holds_the_products_own_files_and_nothing_else_of_the_checkout(wheel):
    with zipfile.ZipFile(wheel) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    packed = {name.removeprefix("runner/_files/") for name in modes if name.startswith("runner/_files/")}
    assert {"site.yml", "ansible.cfg", "inventory/local/hosts.yml", "roles/ssh_mesh/tasks/main.yml"} <= packed
    assert {name.split("/")[1] for name in packed if name.startswith("inventory/")} == {"local"}
    assert not [name for name in modes if "/." in name or "__pycache__" in name or name.endswith("/deleted.py")]
    tracked = [
        path for top in ("configs", "playbooks", "plugins", "roles", "testbed") for path in (ROOT / top).rglob("*")
    ]
    kept = {path for path in tracked if path.is_file() and "__pycache__" not in path.parts}
    assert {str(path.relative_to(ROOT)) for path in kept} <= packed
    for path in kept:  # scripts stay scripts
        assert (modes[f"runner/_files/{path.relative_to(ROOT)}"] & 0o111 != 0) == os.access(path, os.X_OK), path


def test_it_is_the_wheels_package_that_runs(installed, tmp_path):
    code = "import runner; from runner.system import places; print(runner.__file__, places.ROOT)"
    told = call(installed / "bin" / "python", "-c", code, cwd=tmp_path).stdout
    assert told.split() == [str(package(installed) / "__init__.py"), str(package(installed) / "_files")]


def test_this_machine_is_benchmarked(runner, installed, tmp_path, this_machine):
    """With the shipped inventory it is planned."""
    own = this_machine(package(installed) / "_files" / "inventory" / "local")
    runner("bench", "-i", "local", "--model", "tiny", "--test", "torch", "--dry-run")
    done = runner("bench", "-i", str(own), "--model", "tiny", "--test", "torch", "--json")
    assert (tmp_path / "scratch" / "lock").exists()
    summary = json.loads(done.stdout)
    assert [cell["state"] for cell in summary["cells"]] == ["complete"]


def test_every_model_is_known(runner):
    said = runner("bench", "-i", "local", "--model", "?", code=2).stderr
    known = said.partition("known: ")[2].split(" (")[0].strip().split(", ")
    assert known == sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.yaml"))


def test_the_roles_are_played(runner):
    """On this machine some find reasons to stop; none is missing, and no module or plugin."""
    done = runner("setup", "--check", "-i", "local", "--json", code=None)
    summary = json.loads(done.stdout)
    assert done.returncode in (0, 1) and summary["error"] is None, done.stdout
    roles = {path.parents[1].name for path in (ROOT / "roles").glob("*/tasks/main.yml")}
    assert set(summary["nodes"]["node001"]["roles"]) == {*roles, "profiles"}  # made by the controller itself
    for failure in summary["failures"]:  # a role's own words, not Ansible's of what it did not find
        assert failure["remedy"] or failure["found"], failure


def test_an_inventory_is_written_and_read(runner):
    runner("inventory", "init", "mine", "--hosts", "gpu[01-04]")
    shown = json.loads(runner("inventory", "-i", "mine", "--json").stdout)
    assert [node["name"] for node in shown] == ["gpu01", "gpu02", "gpu03", "gpu04"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inventory",), "no inventory: give one with -i, such as -i local"),
        (("inventory", "-i", "lcal"), "did you mean 'local'"),
        (("inventory", "-i", "nothing/here"), "no inventory nothing/here"),
    ],
)
def test_without_an_inventory_one_line_says_what_to_do(runner, arguments, said):
    done = runner(*arguments, code=2)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
