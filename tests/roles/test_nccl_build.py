"""The role nccl_build: a build on a disk, from archives to its stamp, with small trees that have NCCL's make interface."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import stand_ins
import yaml
from hypothesis import given
from hypothesis import strategies as st

from role_modules import ROOT, carry_out, load
from runner.cluster import nccl
from runner.cluster.tools import nccl_log

module = load("nccl_build")
nccl_inputs = importlib.import_module("ansible.module_utils.nccl_inputs")
nccl_prefix = importlib.import_module("ansible.module_utils.nccl_prefix")

CAPTURED = Path(__file__).resolve().parents[3] / "shared" / "captured"
STAND_INS = ROOT / "molecule" / "resources" / "stand-ins"
PROGRAMS = (
    "all_gather", "all_reduce", "alltoall", "alltoallv", "broadcast", "gather", "hypercube", "reduce", "reduce_scatter", "scatter",
    "sendrecv",
)  # fmt: skip
MPI = stand_ins.mpi_home()
ROCE = {"hca": ["mlx5_0:1", "mlx5_1:1"], "gid_index": 3, "traffic_class": 106}


def defaults():
    """The role's settings as the lookup gives them; those that are Jinja are set by `settings`."""
    raw = yaml.safe_load((ROOT / "roles" / "nccl_build" / "defaults" / "main.yml").read_text())
    return {name.removeprefix("nccl_build_"): value for name, value in raw.items()}


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """The stand-ins for NCCL's trees as archives: {name: (url, sha256)}."""
    folder, found = tmp_path_factory.mktemp("archives"), {}
    for tree in ("nccl-2.30.7-1", "nccl-tests-2.19.6"):
        path = folder / f"{tree}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(STAND_INS / "nccl" / tree, arcname=tree)
        found[tree.rpartition("-2.")[0]] = (path.as_uri(), nccl_prefix.digest(str(path)))
    return found


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """The folder of every test's node: a build knows the path that it lies in, so one can serve them all."""
    return tmp_path_factory.mktemp("node")


@pytest.fixture
def settings(tmp_path, archives, node):
    """A bare node with a toolkit and no GPU, and settings that keep below its folder."""
    shutil.rmtree(node)
    node.mkdir()
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    shutil.copy2(STAND_INS / "nccl" / "nvcc", nvcc)
    (url, sha), (tests_url, tests_sha) = archives["nccl"], archives["nccl-tests"]
    return defaults() | {
        "root": str(node / "nccl"), "etc": str(node / "etc"), "cuda_home": str(tmp_path / "cuda"),
        "url": url, "sha256": sha, "tests_url": tests_url, "tests_sha256": tests_sha,
        "mpi": bool(MPI), "cxx": "gcc", "archs": ["90"], "free_gib": 0.001, "jobs": 1, "builds": True, "host_known": True,
    }  # fmt: skip


def install(settings, step, check=False, **more):
    return carry_out(module.PHASES, "install", settings | {"step": step, "prefer": ""} | more, check)


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "node"


@pytest.fixture
def built(settings, node, kept):
    """`current` of a node that has the build and its configuration; one build serves all tests."""
    if not kept.exists():
        answer = install(settings, "build")
        assert answer.ok, answer.msg
        assert carry_out(module.PHASES, "configure", settings).ok
        shutil.copytree(node, kept, symlinks=True)
    shutil.rmtree(node)
    shutil.copytree(kept, node, symlinks=True)
    return Path(settings["root"]) / "current"


def only(answer):
    """The one problem of an answer, as (what, expected, found)."""
    assert not answer.ok
    (problem,) = answer.problems
    return problem["what"], problem["expected"], problem["found"]


# --- NCCL and CUDA ---


@pytest.mark.parametrize(
    ("nccl", "cuda", "verdict"),
    [
        ("2.26.2", "12.8", "fine"),
        ("2.26.2", "13.0", "refused"),  # tried: does not compile
        ("2.30.7", "13.0", "fine"),  # tried: compiles
        ("2.30.7", "12.8", "fine"),
        ("2.27.7", "13.0", "fine"),
        ("2.27.5", "13.0", "unknown"),
        ("2.26.2", "11.8", "unknown"),
        ("2.18.3", "11.8", "fine"),
        ("2.26.2", "10.2", "refused"),
        ("2.40.1", "13.0", "unknown"),
        ("2.30.7", "14.0", "unknown"),
    ],
)
def test_the_pair_of_nccl_and_cuda_is_judged_before_a_build(nccl, cuda, verdict):
    assert nccl_inputs.pair(nccl, cuda)[0] == verdict


def test_a_refused_pair_stops_with_the_reason_and_nothing_is_built(settings, monkeypatch):
    nvcc = Path(settings["cuda_home"], "bin", "nvcc")
    nvcc.write_text(nvcc.read_text().replace("echo 12.8", "echo 13.0"))
    old = settings | {"version": "2.26.2"}
    what, expected, found = only(carry_out(module.PHASES, "validate", old))
    assert what == "toolkit for NCCL 2.26.2"
    assert "older than 13" in expected
    assert found == f"CUDA 13.0 in {settings['cuda_home']}"
    assert only(install(old, "build"))[0] == what
    assert [path.name for path in Path(settings["root"]).iterdir()] == [".lock"]


def test_an_untried_pair_is_a_warning(settings):
    nvcc = Path(settings["cuda_home"], "bin", "nvcc")
    nvcc.write_text(nvcc.read_text().replace("echo 12.8", "echo 12.0"))
    answer = carry_out(module.PHASES, "validate", settings)
    assert answer.ok
    assert "NCCL 2.30.7 with CUDA 12.0 is untried" in answer.warnings[0]


def test_an_architecture_that_nvcc_does_not_know_is_found_by_compiling_for_it(settings):
    nvcc = Path(settings["cuda_home"], "bin", "nvcc")
    nvcc.write_text(nvcc.read_text().replace("echo 12.8", "echo 12.4"))
    what, _, found = only(carry_out(module.PHASES, "validate", settings | {"archs": ["100"]}))
    assert (what, found) == ("nvcc with gcc for sm_100", "nvcc fatal   : Unsupported gpu architecture 'compute_100'")


@pytest.mark.skipif(not os.path.exists("/usr/local/cuda/bin/nvcc"), reason="no CUDA toolkit on this machine")
def test_the_real_nvcc_is_found_and_compiles_the_probe(settings):
    real = settings | {"cuda_home": "", "cxx": "g++", "sha256": "0" * 64}
    answer = carry_out(module.PHASES, "validate", real)
    assert answer.ok, answer.msg
    unknown = only(carry_out(module.PHASES, "validate", real | {"archs": ["35"]}))
    assert "Unsupported gpu architecture 'compute_35'" in unknown[2]


# --- what a build is made from ---


def test_a_known_checksum_is_taken_and_an_unknown_one_is_asked_for(settings):
    unknown = settings | {"sha256": "", "tests_sha256": "", "tests_version": "2.19.6"}
    answer = carry_out(module.PHASES, "validate", unknown)
    assert only(answer) == ("checksum of nccl-tests 2.19.6", "a SHA-256", "none given and none known")
    assert "curl -L" in answer.problems[0]["remedy"]
    assert nccl_inputs.sources(unknown)[0][3].startswith("292a7f7a")
    assert carry_out(module.PHASES, "validate", unknown | {"allow_unverified": True}).ok


def test_all_reasons_come_at_once(settings):
    wrong = {"version": "2.26", "archs": ["9.0"], "conf": {"DEBUG": "1", "NCCL_X": True}, "sharp": "/nowhere"}
    answer = carry_out(module.PHASES, "validate", settings | wrong)
    assert [problem["what"] for problem in answer.problems] == [
        "version of nccl", "nccl_build_conf DEBUG", "nccl_build_conf NCCL_X", "nccl_build_archs", "SHARP plugin",
    ]  # fmt: skip


def test_a_node_that_does_not_build_needs_no_toolkit(settings):
    bare = settings | {"cuda_home": "/nowhere", "url": "file:///nowhere", "archs": []}
    assert carry_out(module.PHASES, "validate", bare | {"builds": False}).ok
    whats = [problem["what"] for problem in carry_out(module.PHASES, "validate", bare).problems]
    assert whats == ["CUDA toolkit", "GPU architecture", "archive of nccl 2.30.7"]


def test_mpi_is_found_through_its_compiler(settings, tmp_path, monkeypatch):
    home = tmp_path / "openmpi"
    (home / "include").mkdir(parents=True)
    (home / "include" / "mpi.h").touch()
    stand_in(tmp_path, monkeypatch, "mpicc", f'[ "$1" = --showme:incdirs ] && echo {home}/include {home}/include/sub')
    assert carry_out(module.PHASES, "validate", settings | {"mpi": True}).ok
    (home / "include" / "mpi.h").unlink()
    what, _, found = only(carry_out(module.PHASES, "validate", settings | {"mpi": True}))
    assert (what, found) == ("MPI for nccl-tests", "no include/mpi.h in the folders that mpicc reports")


@pytest.mark.parametrize(
    ("fact", "found"),
    [('{"compute_capability": "9.0"}', ["90"]), ('{"compute_capability": ["9.0", "10.0"]}', ["100", "90"]),
     ("{}", ["80"]), ("[1]", ["80"]), ("{ damaged", ["80"]), ('{"compute_capability": "[N/A]"}', ["80"])],
)  # fmt: skip
def test_the_architecture_is_that_of_the_published_fact_else_of_the_gpus(settings, tmp_path, monkeypatch, fact, found):
    facts = Path(settings["etc"]) / "ansible" / "facts.d"
    facts.mkdir(parents=True)
    (facts / "cuda.fact").write_text(fact)
    stand_in(tmp_path, monkeypatch, "nvidia-smi", "printf '8.0\n8.0\n'")
    answer = carry_out(module.PHASES, "validate", settings | {"archs": []})
    assert f"-sm{'_'.join(found)}-" in answer.facts["wanted"]


def stand_in(tmp_path, monkeypatch, name, script):
    """A stand-in for a program, first on PATH."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n# STAND-IN\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


inputs = st.fixed_dictionaries(
    {
        "archives": st.fixed_dictionaries(
            {"nccl": st.fixed_dictionaries({"version": st.just("2.26.2"), "sha256": st.text("0123456789abcdef")})}
        ),
        "mpi": st.booleans(),
    }
)


@given(inputs, inputs, st.sampled_from(["12.8", "13.0"]), st.sets(st.sampled_from(["80", "90", "100"]), min_size=1))
def test_builds_have_one_name_exactly_if_they_are_made_from_the_same(one, other, cuda, archs):
    names = [nccl_inputs.build_name(made_from, cuda, sorted(archs)) for made_from in (one, other)]
    assert (names[0] == names[1]) == (one == other)
    assert "/" not in names[0]


# --- the build ---


def test_a_build_is_installed_whole_and_put_in_use(settings, built):
    stamp = json.loads((built / "stamp.json").read_text())
    assert (stamp["cuda"], stamp["archs"]) == ("12.8", ["90"])
    assert sorted(set(stamp["files"]) - {f"bin/{name}_perf" for name in PROGRAMS}) == [
        "bin/ncclras", "include/nccl.h",
        "lib/libnccl.so", "lib/libnccl.so.2", "lib/libnccl.so.2.30.7", "lib/pkgconfig/nccl.pc",
    ]  # fmt: skip
    assert {path.name for path in (built / "bin").glob("*_perf")} == {f"{name}_perf" for name in PROGRAMS}
    assert stamp["files"]["lib/libnccl.so.2"] == "-> libnccl.so.2.30.7"
    assert f"prefix={os.path.realpath(built)}\n" in (built / "lib" / "pkgconfig" / "nccl.pc").read_text()
    left = {path.name for path in built.parent.iterdir() if path.name.startswith(".")}
    assert left == {".lock"}


def test_a_second_run_builds_and_changes_nothing(settings, built):
    for phase in ("validate", "configure", "verify"):
        answer = carry_out(module.PHASES, phase, settings)
        assert answer.ok and not answer.changed, answer.msg
    answer = install(settings, "look")
    assert answer.facts["ready"] and not answer.changed


def test_check_mode_says_what_would_be_built_and_touches_nothing(settings):
    answer = install(settings, "look", check=True)
    assert answer.changed and answer.diff[0]["after_header"].endswith(answer.facts["name"])
    assert carry_out(module.PHASES, "configure", settings, check=True).changed
    assert not os.path.exists(settings["root"]) and not os.path.exists(settings["etc"])


def test_another_version_of_cuda_or_another_option_is_another_build(settings, built):
    assert install(settings, "look", archs=["80", "90"]).facts["ready"] is False
    assert install(settings, "look", tests_sha256="1" * 64).facts["ready"] is False
    nvcc = Path(settings["cuda_home"], "bin", "nvcc")
    nvcc.write_text(nvcc.read_text().replace("echo 12.8", "echo 12.9"))
    assert install(settings, "look").facts["ready"] is False
    assert install(settings, "look", cuda_home="/nowhere").facts["ready"] is True  # a node without toolkit


def test_the_previous_build_stays_and_can_be_put_in_use_again(settings, built):
    before = os.readlink(built)
    assert install(settings, "build", tests=False).ok
    assert os.readlink(built) != before
    answer = install(settings, "look")
    assert answer.changed and answer.diff[0]["after"].strip() == before == os.readlink(built)


def test_a_wrong_checksum_stops_with_both_and_leaves_nothing(settings):
    assert only(install(settings, "build", sha256="0" * 64)) == (
        "checksum of nccl 2.30.7",
        "0" * 64,
        settings["sha256"],
    )
    assert [path.name for path in Path(settings["root"]).iterdir()] == [".lock"]


def test_an_archive_that_is_none_is_one_clear_problem(settings, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<html>Not Found</html>")
    broken = settings | {"url": path.as_uri(), "sha256": nccl_prefix.digest(str(path))}
    assert only(install(broken, "build"))[:2] == ("archive of nccl 2.30.7", "a tar archive")


def test_a_build_that_fails_names_the_first_error_and_the_log(settings, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "gcc", "echo 'init.cc:12:3: error: no such member' >&2; exit 1")
    answer = install(settings, "build")
    assert only(answer) == ("build of NCCL 2.30.7", "make succeeds", "init.cc:12:3: error: no such member")
    assert ".build.log" in answer.problems[0]["remedy"]
    assert not any(path.is_dir() for path in Path(settings["root"]).iterdir())


def test_a_build_that_takes_too_long_is_ended_with_all_its_processes(settings, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "gcc", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    assert only(install(settings, "build", timeout_s=0.5))[2] == "still running"
    pid = int((tmp_path / "pid").read_text())
    assert not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_a_second_run_waits_for_a_build_that_is_going_on(settings, tmp_path):
    root = Path(settings["root"])
    root.mkdir()
    holder = subprocess.Popen(["flock", str(root / ".lock"), "sleep", "60"])
    try:
        while subprocess.run(["flock", "-n", str(root / ".lock"), "true"]).returncode == 0:
            pass
        assert only(install(settings, "build", timeout_s=0.1)) == (
            "build of NCCL",
            "no other",
            "another for over 0.1 s",
        )
    finally:
        subprocess.run(["pkill", "-P", str(holder.pid)], check=False)
        holder.terminate()
        holder.wait()


def test_a_build_that_outlives_its_run_still_holds_the_lock(settings, tmp_path, monkeypatch):
    stand_in(
        tmp_path, monkeypatch, "gcc", f"echo $$ > {tmp_path}/.pid; mv {tmp_path}/.pid {tmp_path}/pid; exec sleep 60"
    )
    run = os.fork()
    if not run:
        install(settings, "build")
        os._exit(0)
    while not (tmp_path / "pid").exists():
        time.sleep(0.02)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    locked = ["flock", "--nonblock", f"{settings['root']}/.lock", "true"]
    compiler = int((tmp_path / "pid").read_text())
    try:
        assert subprocess.run(locked).returncode == 1
    finally:
        os.killpg(os.getpgid(compiler), signal.SIGKILL)
    (tmp_path / "bin" / "gcc").unlink()
    assert install(settings, "build").ok


def test_what_an_interrupted_run_left_is_no_obstacle(settings):
    root = Path(settings["root"])
    (root / ".build" / "nccl").mkdir(parents=True)
    name = carry_out(module.PHASES, "validate", settings).facts["wanted"]
    (root / f".{name}.partial" / "lib").mkdir(parents=True)
    (root / name).mkdir()  # without a stamp it is none
    assert install(settings, "build").ok
    assert (root / "current" / "stamp.json").exists()


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "Compiling errors.cc\nx.cu(12): error: no member\nmake: *** [Makefile:25: src.build] Error 2",
            "x.cu(12): error: no member",
        ),
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_35'",
            "nvcc fatal   : Unsupported gpu architecture 'compute_35'",
        ),
        (
            "/bin/ld: cannot find -lcudart_static: No such file\ncollect2: error: ld",
            "/bin/ld: cannot find -lcudart_static: No such file",
        ),
        ("bootstrap.cc:156:86: error: too many arguments", "bootstrap.cc:156:86: error: too many arguments"),
        ("make: *** No rule to make target 'x'.  Stop.", "make: *** No rule to make target 'x'.  Stop."),
        ("Compiling all.cu\n", ""),
        ("", ""),
    ],
)
def test_the_line_of_a_log_that_says_why(log, line):
    assert nccl_inputs.first_error(log) == line


# --- to the other nodes ---


@pytest.fixture
def sent(settings, built, tmp_path):
    """(settings of another node, facts of the build, facts of its archive, which lies there)."""
    there = install(settings, "look").facts
    packed = install(settings, "pack", build=there).facts
    other = settings | {"root": str(tmp_path / "other"), "cuda_home": "/nowhere", "archs": ["90"]}
    assert install(other, "receive", build=there).facts["needs"]
    archive = Path(other["root"]) / Path(packed["archive"]).name
    shutil.copy(packed["archive"], archive)
    return other, there, packed | {"archive": str(archive)}


def test_another_node_gets_the_same_build(sent):
    other, there, packed = sent
    answer = install(other, "unpack", build=there, archive=packed)
    assert answer.ok and answer.changed, answer.msg
    assert answer.facts["stamp"] == there["stamp"]
    assert not os.path.exists(packed["archive"])
    again = install(other, "receive", build=there)
    assert not again.changed and not again.facts["needs"]


def test_a_truncated_archive_is_refused_and_the_next_run_asks_again(sent):
    other, there, packed = sent
    os.truncate(packed["archive"], 3000)
    _, expected, found = only(install(other, "unpack", build=there, archive=packed))
    assert expected.startswith(f"{packed['bytes']} bytes") and found.startswith("3000 bytes")
    assert os.listdir(other["root"]) == []
    assert install(other, "receive", build=there).facts["needs"]


def test_a_file_that_changed_on_the_node_is_replaced_by_the_next_run(sent):
    other, there, packed = sent
    kept = f"{packed['archive']}.kept"
    shutil.copy(packed["archive"], kept)
    install(other, "unpack", build=there, archive=packed)
    Path(other["root"], "current", "include", "nccl.h").write_text("other\n")
    assert install(other, "receive", build=there).facts["needs"]
    os.rename(kept, packed["archive"])
    assert install(other, "unpack", build=there, archive=packed).ok
    assert not install(other, "receive", build=there).facts["needs"]


def test_a_node_with_another_gpu_is_told_so(sent):
    other, there, _ = sent
    answer = install(other, "receive", build=there, archs=["80"])
    assert only(answer) == ("GPU architecture", "sm_90 as built", "sm_80")
    assert '["80", "90"]' in answer.problems[0]["remedy"]


# --- nccl.conf ---


def test_roce_settings_are_those_that_were_found(settings):
    assert module.conf(settings, ROCE) == {
        "NCCL_BUFFSIZE": "8388608", "NCCL_IB_GID_INDEX": "3", "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1", "NCCL_IB_TC": "106",
    }  # fmt: skip


def test_a_gid_index_is_found_and_never_assumed(settings):
    assert "NCCL_IB_GID_INDEX" not in module.conf(settings, ROCE | {"gid_index": None})
    assert "NCCL_IB_GID_INDEX" not in module.conf(settings, {})
    assert module.conf(settings | {"ib_gid_index": 0}, ROCE)["NCCL_IB_GID_INDEX"] == "0"


def test_sharp_and_the_users_own_settings(settings):
    values = module.conf(settings | {"sharp": "/opt/sharp/lib", "conf": {"NCCL_BUFFSIZE": 1, "NCCL_DEBUG": "WARN"}}, {})
    assert values == {
        "NCCL_BUFFSIZE": "1", "NCCL_COLLNET_ENABLE": "1", "NCCL_DEBUG": "WARN",
        "NCCL_NET_PLUGIN": "/opt/sharp/lib/libnccl-net.so",
    }  # fmt: skip


def test_a_damaged_fact_of_roce_is_not_taken_for_none(settings, built):
    path = Path(settings["etc"]) / "ansible" / "facts.d" / "roce.fact"
    path.write_text('{"hca": ["mlx5')
    assert only(carry_out(module.PHASES, "configure", settings))[0] == str(path)


def test_no_comment_in_the_file_can_be_taken_for_a_setting(settings, built):
    lines = Path(settings["etc"], "nccl.conf").read_text().splitlines()
    assert not any("=" in line for line in lines if line.startswith("#"))


# --- verify ---


@pytest.mark.parametrize(
    ("code", "text"), [(22602, "2.26.2"), (21805, "2.18.5"), (20900, "2.9.0"), (2804, "2.8.4"), (23007, "2.30.7")]
)
def test_the_version_that_the_library_answers(code, text):
    assert module.library_version(code) == text


def test_a_library_of_another_version_is_named_with_both(settings, built):
    library = built / "lib" / "libnccl.so.2.30.7"
    library.unlink()
    source = "int ncclGetVersion(int *v) { *v = 21803; return 0; }"
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=source, text=True, check=True)
    problems = {problem["what"]: problem for problem in carry_out(module.PHASES, "verify", settings).problems}
    answered = problems[f"ncclGetVersion of {built}/lib/libnccl.so.2"]
    assert (answered["expected"], answered["found"]) == ("2.30.7", "2.18.3")
    assert f"{built}/lib/libnccl.so.2.30.7" in problems


def test_a_library_that_cannot_be_loaded_is_a_problem_and_not_a_crash(settings, built):
    (built / "lib" / "libnccl.so.2.30.7").write_bytes(b"\x7fELF" + bytes(10))
    problems = [problem["what"] for problem in carry_out(module.PHASES, "verify", settings).problems]
    assert f"ncclGetVersion of {built}/lib/libnccl.so.2" in problems


def test_a_setting_that_was_changed_by_hand_is_drift(settings, built):
    path = Path(settings["etc"], "nccl.conf")
    path.write_text(path.read_text().replace("8388608", "1"))
    assert only(carry_out(module.PHASES, "verify", settings)) == (str(path), "NCCL_BUFFSIZE=8388608", "NCCL_BUFFSIZE=1")


@pytest.mark.parametrize("found", ["nothing", "another"])
def test_the_link_by_which_torch_finds_it_is_made_checked_and_mended(settings, built, found):
    link = Path(settings["root"]) / module.LINK
    assert link.samefile(built / "lib" / "libnccl.so.2")
    link.unlink()
    if found == "another":
        link.symlink_to("/usr/lib/libnccl.so.2")
    problems = carry_out(module.PHASES, "verify", settings).problems
    assert (str(link), f"a link to {module.TARGET}", found) in [
        (p["what"], p["expected"], p["found"]) for p in problems
    ]
    assert carry_out(module.PHASES, "configure", settings).changed
    assert link.samefile(built / "lib" / "libnccl.so.2")
    assert not carry_out(module.PHASES, "configure", settings).changed


def test_what_the_role_leaves_is_what_the_runner_puts_before_torchs_own(settings, built):
    fact = Path(settings["etc"]) / "ansible" / "facts.d" / "nccl.fact"
    told = nccl.built(fact)
    assert told == nccl.Built(settings["root"], "2.30.7", None)
    assert nccl.version_of(Path(nccl.environment(told.root)["LD_PRELOAD"])) == "2.30.7"


def test_a_build_without_its_stamp_is_no_build(settings, built):
    (built / "stamp.json").write_text("{")
    what, _, found = only(carry_out(module.PHASES, "verify", settings))
    assert (what, found) == (str(built), "none that is complete")


def test_without_a_gpu_the_collective_is_not_run_and_that_is_said(settings, built, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "nvidia-smi", "echo 'No devices were found' >&2; exit 6")
    answer = carry_out(module.PHASES, "verify", settings)
    assert answer.ok
    assert "all-reduce not run: no GPU (No devices were found)" in answer.warnings


def test_gpus_in_use_are_left_alone(settings, built, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "nvidia-smi", 'case "$1" in *compute-apps*) echo 4711;; *) echo 0;; esac')
    assert "all-reduce not run: the GPUs are in use" in carry_out(module.PHASES, "verify", settings).warnings


def test_the_collective_is_run_over_all_gpus(settings, built, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "nvidia-smi", 'case "$1" in *compute-apps*) ;; *) echo 0; echo 1;; esac')
    answer = carry_out(module.PHASES, "verify", settings)
    assert answer.ok, answer.msg
    assert answer.facts["all_reduce_busbw_gb_per_s"] > 0


@pytest.mark.skipif(not (MPI and shutil.which("mpirun")), reason="no Open MPI with its headers on this machine")
def test_what_was_built_runs_on_several_ranks_and_needs_no_environment_for_it(built):
    ranks = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]
    outcome = subprocess.run(
        [*ranks, built / "bin" / "all_reduce_perf", "-b", "1K", "-e", "1K", "-n", "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.returncode == 0 and outcome.stdout.count("#  Rank") == 2, outcome.stdout + outcome.stderr
    assert "nccl-library=23007" in outcome.stdout and "# Out of bounds values : 0 OK" in outcome.stdout


def test_the_settings_that_it_writes_are_those_of_the_ranks(settings, built, tmp_path):
    """As test nccl reads them back: of the NIC that nccl.conf leaves out no rank says that it uses it."""
    etc, planted, log = Path(settings["etc"]), tmp_path / "planted", tmp_path / "log"
    (etc / "ansible" / "facts.d" / "roce.fact").write_text(json.dumps(ROCE | {"hca": ["mlx5_1:1"]}))
    assert carry_out(module.PHASES, "configure", settings | {"conf": {"NCCL_ALGO": "Ring"}}).changed
    planted.write_text("net IB\nnics mlx5_0:1/RoCE mlx5_1:1/RoCE\n")
    files = {"NCCL_CONF_FILE": etc / "nccl.conf", "NCCL_DEBUG_FILE": log, "NCCL_TESTS_STAND_IN": planted}
    env = dict(os.environ, NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,ENV", **{k: str(v) for k, v in files.items()})
    subprocess.run(
        [built / "bin" / "all_reduce_perf", "-b", "1K", "-e", "1K", "-g", "2"], env=env, check=True, timeout=60
    )
    evidence = nccl_log.parse(log.read_text())
    assert evidence.settings == {
        "NCCL_ALGO": "Ring", "NCCL_BUFFSIZE": "8388608", "NCCL_IB_GID_INDEX": "3", "NCCL_IB_HCA": "=mlx5_1:1",
        "NCCL_IB_TC": "106",
    }  # fmt: skip
    assert (evidence.net, evidence.link, evidence.nics) == ("IB", "RoCE", ("mlx5_1",))


@pytest.mark.skipif(not MPI, reason="no Open MPI with its headers on this machine")
def test_a_library_of_mpi_that_a_node_lacks_is_named_with_what_to_install(settings, built, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "ldd", "echo 'libmpi.so.40 => not found'")
    problems = carry_out(module.PHASES, "verify", settings).problems
    (lacking,) = [problem for problem in problems if "libmpi.so.40" in problem["what"]]
    assert lacking["found"] == "not found" and "openmpi-bin" in lacking["remedy"]


OUTPUT = """\
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
     8388608       2097152     float     sum      -1    80.00  104.86  104.86  {wrong:>6}    75.00  111.85  111.85  {wrong:>6}
# Out of bounds values : {bad} {verdict}
# Avg bus bandwidth    : 108.355
"""


@pytest.mark.parametrize("says, status, found, rate", [
    (OUTPUT.format(wrong=0, bad=0, verdict="OK"), 0, None, 111.85),
    (OUTPUT.format(wrong=48, bad=2, verdict="FAILED"), 1, 96, 111.85),
    (OUTPUT.format(wrong=0, bad=0, verdict="OK").split("# Out")[0], 0, "ended without a result", 111.85),
    ("host: Test CUDA failure common.cu:1030 'system not yet initialized'\n .. host pid 3018: Test failure common.cu:937\n", 2,
     "host: CUDA failure: system not yet initialized", None),
    ("", 1, "killed", None),
])  # fmt: skip
def test_what_the_collective_says_is_read_by_the_runners_parser(
    settings, built, tmp_path, monkeypatch, says, status, found, rate
):
    stand_in(tmp_path, monkeypatch, "nvidia-smi", 'case "$1" in *compute-apps*) ;; *) echo 0; echo 1;; esac')
    (tmp_path / "says").write_text(says)
    program = built / "bin" / "all_reduce_perf"
    monkeypatch.setattr(module, "_verify_links", lambda phase, binary: True)
    program.unlink()
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/says\n[ {status} = 0 ] || echo killed >&2\nexit {status}\n")
    program.chmod(0o755)
    answer = carry_out(module.PHASES, "verify", settings)
    told = [problem["found"] for problem in answer.problems if problem["what"] == "all-reduce over 2 GPUs"]
    assert told == ([] if found is None else [str(found)])
    assert answer.facts["all_reduce_busbw_gb_per_s"] == rate


@pytest.mark.parametrize("name", ["nccl_tests.py", "nccl_rows.py"])
def test_the_role_and_the_runner_read_nccl_tests_by_one_parser(name):
    there = ROOT / "plugins" / "module_utils" / name
    assert there.resolve() == ROOT / "runner" / "cluster" / "tools" / name
    tree = ast.parse(there.read_text(), feature_version=(3, 9))
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports <= {"__future__", "collections.abc", "dataclasses", "nccl_rows"}  # they are taken to nodes alone
    assert "strict=" not in there.read_text()  # of zip: Python 3.10


@pytest.mark.parametrize("name", ["etc/nccl.conf", "nccl/env.sh", "etc/ansible/facts.d/nccl.fact"])
def test_the_mode_of_each_file_is_named_by_verify_and_put_right_by_configure(settings, built, node, name):
    path = node / name
    path.chmod(0o600)  # users' jobs cannot read it
    problems = carry_out(module.PHASES, "verify", settings | {"verify_collective": False}).problems
    assert (str(path), "mode 0600") in [(p["what"], p["found"]) for p in problems]
    assert carry_out(module.PHASES, "configure", settings).changed and path.stat().st_mode & 0o777 == 0o644
