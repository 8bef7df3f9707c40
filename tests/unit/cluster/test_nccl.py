"""NCCL on a node: which one a process loads and reads settings of, with a stand-in library that answers ncclGetVersion."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stand_ins
import yaml

from runner.cluster import facts, nccl
from runner.system import elf

ROLE = Path(__file__).resolve().parents[3] / "roles" / "nccl_build"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """A folder as role nccl_build leaves it, with a stand-in of 9.8.7."""
    return stand_ins.nccl(tmp_path_factory.mktemp("nccl"), 90807)


def loaded_by_a_process(variables: dict[str, str]) -> dict[str, str]:
    code = "import json; from runner.cluster import nccl; print(json.dumps(nccl.loaded()))"
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True
    )
    return json.loads(answer.stdout)


def test_a_process_in_the_environment_has_loaded_the_built_one(root):
    assert loaded_by_a_process({}) == {}
    (found,) = loaded_by_a_process(nccl.environment(root)).items()
    assert found == (str(Path(root, "current", "lib", "libnccl.so.2").resolve()), "9.8.7")


def test_what_torch_loads_by_path_is_the_same_file(root):
    """torch takes the first nvidia/nccl/lib/libnccl.so.* of sys.path: a second file would be a second NCCL."""
    variables = nccl.environment(root)
    again = Path(variables["PYTHONPATH"], "nvidia", "nccl", "lib", "libnccl.so.2")
    assert again.samefile(variables["LD_PRELOAD"])
    code = (
        f"import ctypes, json; ctypes.CDLL({str(again)!r})\nfrom runner.cluster import nccl; print(len(nccl.loaded()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert answer.stdout == "1\n"


def test_two_libraries_in_one_process_are_both_told(root, tmp_path):
    other = stand_ins.nccl(tmp_path, 22602)
    files = [nccl.environment(each)["LD_PRELOAD"] for each in (root, other)]
    assert sorted(loaded_by_a_process({"LD_PRELOAD": ":".join(files)}).values()) == ["2.26.2", "9.8.7"]


@pytest.mark.parametrize(
    "code", [(22602, "2.26.2"), (2804, "2.8.4"), (23007, "2.30.7"), (21205, "2.12.5"), (90807, "9.8.7")]
)
def test_the_code_of_a_version(code):
    assert nccl._version(code[0]) == code[1]


def test_the_version_is_the_librarys_own_answer(root, tmp_path):
    assert nccl.version_of(Path(root, "current", "lib", "libnccl.so.2")) == "9.8.7"
    (tmp_path / "libnccl.so.2").write_text("no library")
    assert nccl.version_of(tmp_path / "libnccl.so.2") is None


def test_facts_have_the_version_of_the_library_that_ranks_will_load(root):
    assert facts.collect(nccl.environment(root))["nccl"] == "9.8.7"
    assert facts.collect({})["nccl"] is None  # this torch is for CPUs


def test_variables_of_the_inventory_extend_the_lists_and_replace_the_rest():
    first = {"LD_PRELOAD": "a", "PYTHONPATH": "b", "OMP_NUM_THREADS": "1"}
    added = nccl.joined(first, {"LD_PRELOAD": "c", "OMP_NUM_THREADS": "2", "X": ""})
    assert added == {"LD_PRELOAD": "a:c", "PYTHONPATH": "b", "OMP_NUM_THREADS": "2", "X": ""}


# --- whether the built one can be used ---


def test_nothing_stands_in_the_way_of_a_complete_build(root):
    assert nccl.obstacle(root) is None


def test_where_nothing_is_built_the_line_says_what_to_do(tmp_path):
    said = nccl.obstacle(str(tmp_path))
    assert said == f"no NCCL is built in {tmp_path}: run role nccl_build, or use torch's with --set nccl=torch"


def test_a_build_without_torchs_link_is_not_taken(tmp_path):
    """Such as one of an earlier version of the role: torch would load its own as a second library."""
    root = Path(stand_ins.nccl(tmp_path, 22602))
    (link := root / "python" / "nvidia" / "nccl" / "lib" / "libnccl.so.2").unlink()
    assert str(link) in (nccl.obstacle(str(root)) or "")


@pytest.fixture
def torch_needs(tmp_path, monkeypatch):
    """As if the environment's torch were one for CUDA, whose library needs these functions."""

    def needs(*functions: str) -> None:
        folder = tmp_path / "torch"
        (folder / "lib").mkdir(parents=True)
        (folder / "__init__.py").touch()
        body = "".join(f"int {name}(void); int use_{name}(void) {{ return {name}(); }}\n" for name in functions)
        stand_ins.library(folder / "lib" / "libtorch_cuda.so", body)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "torch", raising=False)  # of which other tests may have the real one

    return needs


def test_a_built_one_that_lacks_what_torch_needs_is_refused_with_the_functions(root, torch_needs):
    torch_needs("ncclGetVersion", "ncclCommShrink", "ncclCommWindowRegister")
    assert nccl.obstacle(root) == (
        f"NCCL 9.8.7 in {root} is too old for the environment's torch, which needs ncclCommShrink, "
        "ncclCommWindowRegister: build a newer one (nccl_build_version), or use torch's with --set nccl=torch"
    )


def test_a_built_one_that_has_what_torch_needs_is_taken(root, torch_needs):
    torch_needs("ncclGetVersion")
    assert nccl.obstacle(root) is None


def test_what_cannot_be_read_is_not_lacking(root, torch_needs, tmp_path):
    torch_needs("ncclCommShrink")
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").write_bytes(b"\x7fELF\x02\x01 truncated")
    assert nccl.obstacle(root) is None


def test_torchs_own_is_found_beside_torch(torch_needs, tmp_path):
    torch_needs("ncclGetVersion")
    own = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    own.parent.mkdir(parents=True)
    stand_ins.library(own, stand_ins.version_source(22705))
    assert nccl.to_load({}) == own
    assert facts.collect({})["nccl"] == "2.27.5"


def test_symbols_are_read_without_loading_a_library(tmp_path):
    weak = "__attribute__((weak)) int ncclMay(void); int pncclHas(void) { return ncclMay ? ncclMay() : 0; }\n"
    library = tmp_path / "some.so"
    stand_ins.library(
        library, "int ncclHas(void) { return 1; } int ncclNeeds(void);\n" + weak + "int f(void) { return ncclNeeds(); }"
    )
    assert elf.symbols(library, "nccl") == ({"ncclNeeds"}, {"ncclHas"})
    (tmp_path / "text").write_text(
        "no library, but longer than a header is, which is 64 bytes in the format that is read"
    )
    with pytest.raises(ValueError, match="not a 64-bit library"):
        elf.symbols(tmp_path / "text", "nccl")


# --- what the role has written ---


def test_the_fact_names_root_and_version(root, tmp_path):
    fact = tmp_path / "nccl.fact"
    fact.write_text(json.dumps({"version": "9.8.7", "prefix": f"{root}/9.8.7-cuda12.8-sm90-1f3a"}))
    assert nccl.built(fact) == nccl.Built(root, "9.8.7", None)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"version": "2.26.2"}', "null"])
def test_without_a_whole_fact_nothing_is_built(tmp_path, content):
    fact = tmp_path / "nccl.fact"
    if content is not None:
        fact.write_text(content)
    assert nccl.built(fact) is None


def test_role_and_runner_agree_on_root_and_link():
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    assert defaults["nccl_build_root"] == nccl.ROOT
    role = importlib.import_module("role_modules").load("nccl_build")
    assert f"{nccl.ROOT}/{role.LINK}" == f"{nccl.environment(nccl.ROOT)['PYTHONPATH']}/nvidia/nccl/lib/{nccl.LIBRARY}"


# --- settings ---


def test_settings_are_those_that_nccl_itself_reads(tmp_path):
    """As the library does (benchmarks/results/nccl_in_torch.md): the first value of a name counts, the user's file first."""
    (tmp_path / "own.conf").write_text("NCCL_IB_TC=106\n#NCCL_DEBUG=INFO\n NCCL_X=1\nno setting\nNCCL_IB_TC=107\n")
    (tmp_path / "nccl.conf").write_text("NCCL_IB_TC=1\nNCCL_IB_HCA==mlx5_0,mlx5_1\n")
    found = nccl.settings({"NCCL_CONF_FILE": str(tmp_path / "own.conf")}, tmp_path / "nccl.conf")
    assert found == {"NCCL_IB_TC": "106", " NCCL_X": "1", "NCCL_IB_HCA": "=mlx5_0,mlx5_1"}
    assert nccl.settings({"NCCL_CONF_FILE": str(tmp_path / "none")}, tmp_path / "none") == {}
