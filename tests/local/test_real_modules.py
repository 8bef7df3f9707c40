"""The real Environment Modules, from the distribution's package, unpacked and not installed: what a site has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runner.cluster import modules
from runner.errors import InfrastructureError
from runner.system import process

PACKAGE = "environment-modules"


@pytest.fixture(scope="module")
def modulecmd(tmp_path_factory) -> Path:
    """Its program, which is Tcl."""
    if not (shutil.which("tclsh") and shutil.which("apt-get")):
        pytest.skip("needs tclsh and apt-get")
    folder = tmp_path_factory.mktemp("package")
    if process.run(["apt-get", "download", "-qq", PACKAGE], timeout_s=60, cwd=str(folder)).rc != 0:
        pytest.skip(f"apt-get has no {PACKAGE} here")
    (package,) = folder.glob("*.deb")
    process.run(["dpkg-deb", "-x", str(package), str(folder)], timeout_s=60, check=True)
    return next(path for path in sorted(folder.rglob("modulecmd.tcl")) if not path.is_symlink())


@pytest.fixture
def site(modulecmd, tmp_path, monkeypatch):
    """A home whose login shell has `module` and two versions of one."""
    for version in ("11.8", "12.4"):
        (tmp_path / "files" / "cuda").mkdir(parents=True, exist_ok=True)
        text = f"#%Module\nconflict cuda\nprepend-path PATH /opt/cuda-{version}/bin\nsetenv CUDA_HOME /opt/cuda-{version}\n"
        (tmp_path / "files" / "cuda" / version).write_text(text)
    (tmp_path / ".bash_profile").write_text(
        f'module() {{ eval "$(tclsh {modulecmd} bash "$@")"; }}\nexport MODULEPATH={tmp_path}/files\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LOADEDMODULES", "MODULEPATH", "_LMFILES_"):
        monkeypatch.delenv(name, raising=False)
    modules.load.cache_clear()
    yield
    modules.load.cache_clear()


def test_the_default_version_is_loaded_and_recorded(site):
    loaded = modules.load(("cuda",))
    assert loaded.names == ("cuda/12.4",)
    assert loaded.environment["CUDA_HOME"] == "/opt/cuda-12.4"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("cuda/13.0",), "cannot load the module cuda/13.0: .*cuda/13.0"),
        (("cuda/12.4", "nccl"), "cannot load the module nccl: .*nccl"),
        (("cuda/12.4", "cuda/11.8"), "cannot load the module cuda/11.8: .*cuda"),  # they are in conflict
    ],
)
def test_what_cannot_be_loaded_is_named(site, names, said):
    with pytest.raises(InfrastructureError, match=said) as caught:
        modules.load(names)
    assert caught.value.kind == "module_missing"
