"""The inputs of a build of NCCL: the archives in the settings, and the node's CUDA, GPUs, compiler and MPI."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile

from ansible.module_utils.nvidia import query, version
from ansible.module_utils.phase import read, write

# Of the archives of GitHub's tags, as others have published them: 2.30.7 in TensorFlow's third_party/nccl, 2.27.7 there
# and in Spack, all others in Spack's packages nccl and nccl-tests. `git archive` of a tag and `gzip -n` give the same.
KNOWN_SHA256 = {
    ("nccl", "2.30.7"): "292a7f7a27b6754acaf46b5506a60758ca7b18cc1dfbd3d1d4e1e229d0863b4e",
    ("nccl", "2.27.7"): "98e6262bd55932c51e7c8ffc50cc764f019e4b94a8fd6694d839ae828ec8d128",
    ("nccl", "2.26.2"): "74c6ab40c864d79c2139508e9419de5970cb406ec85f001d5f834d5f5c0c4f3b",
    ("nccl", "2.22.3"): "45151629a9494460e73375281e8b0fe379141528879301899ece9b776faca024",
    ("nccl", "2.21.5"): "1923596984d85e310b5b6c52b2c72a1b93da57218f2bc5a5c7ac3d59297a3303",
    ("nccl-tests", "2.17.6"): "38974e70342150ede0e3fb8fd24bfe60ccbde90fa20241716ba8bb338e6b61a0",
    ("nccl-tests", "2.16.3"): "ec373552e216c0df03414718bd588585a1719971b20a5939a2f9488c8ce767eb",
    ("nccl-tests", "2.13.6"): "52b472a58a4918d3221a9b8c4bd9335382643d7e241983918b64692d685cc3d1",
}


# --- settings ---


def pair(nccl, cuda):
    """Whether this version of NCCL builds with this version of CUDA: ("refused" | "unknown" | "fine", reason).

    Sources: 2.26.2 was tried with CUDA 13.0 and does not compile, 2.30.7 does; NVIDIA publishes nvidia-nccl-cu13
    from 2.27.7 on (PyPI), and 2.30.7 built with CUDA 12.9 and 13.3; CUDA 11 is no longer tested since 2.22
    (NVIDIA/nccl#1408).
    """
    nccl_version, cuda_version = version(nccl), version(cuda)
    if cuda_version < (11,):
        return "refused", "CUDA 11.0 or newer"
    if cuda_version >= (13,) and nccl_version < (2, 27):
        return "refused", "CUDA older than 13, whose headers it does not compile with, or NCCL 2.27.7 or newer"
    if cuda_version >= (13,) and nccl_version < (2, 27, 7):
        return "unknown", "NVIDIA supports CUDA 13 from NCCL 2.27.7 on"
    if cuda_version < (12, 2) and nccl_version >= (2, 22):
        return "unknown", "NVIDIA tests NCCL 2.22 and newer with CUDA 12.2 and newer"
    if cuda_version >= (14,) or nccl_version >= (2, 33):
        return "unknown", "this table ends with NCCL 2.32 and CUDA 13"
    return "fine", ""


def library_version(code):
    """The version that ncclGetVersion encodes: 22602 -> "2.26.2", and 2804 -> "2.8.4" (nccl.h, NCCL_VERSION)."""
    major, rest = divmod(code, 1000) if code < 10000 else divmod(code, 10000)
    return "{}.{}.{}".format(major, *divmod(rest, 100))


def sources(want):
    """The archives to build: [(name, version, url, sha256)]; sha256 is "" where it is neither given nor known."""
    found = [("nccl", want["version"], want["url"], want["sha256"])]
    if want["tests"]:
        found.append(("nccl-tests", want["tests_version"], want["tests_url"], want["tests_sha256"]))
    return [(name, ver, url, (sha or KNOWN_SHA256.get((name, ver), "")).lower()) for name, ver, url, sha in found]


def fixed_inputs(want):
    """The inputs of a build that the settings determine; the others, CUDA and architectures, are the node's."""
    archives = {name: {"version": ver, "sha256": sha} for name, ver, _, sha in sources(want)}
    return {"archives": archives, "mpi": want["tests"] and want["mpi"]}


def build_name(inputs, cuda, archs):
    """The name of a build's folder, with a hash of all inputs: builds that differ in any of them have other names."""
    made_from = json.dumps([inputs, cuda, archs], sort_keys=True)
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:8]
    return f"{inputs['archives']['nccl']['version']}-cuda{cuda}-sm{'_'.join(archs)}-{digest}"


def gencode(archs):
    """nvcc's options for the architectures: ["90"] -> "-gencode=arch=compute_90,code=sm_90"."""
    return " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)


# --- the node ---


def cuda_toolkit(phase):
    """(folder, version such as "12.8", "") of the CUDA toolkit, or ("", "", reason) where there is none."""
    homes = [phase.want["cuda_home"]] if phase.want["cuda_home"] else ["/usr/local/cuda"]
    if not phase.want["cuda_home"] and (nvcc := shutil.which("nvcc")):
        homes.append(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))))
    reason = ""
    for home in homes:
        outcome = phase.run([f"{home}/bin/nvcc", "--version"], 20)
        if found := re.search(r"\brelease (\d+\.\d+)\b", outcome.stdout):
            return home, found[1], ""
        reason = reason or outcome.last_line
    return "", "", reason


def architectures(phase):
    """(architectures such as ["90"], "") from the settings, else from the node's GPUs; ([], reason) if unknown."""
    if phase.want["archs"]:
        return sorted(set(phase.want["archs"])), ""
    with contextlib.suppress(ValueError, AttributeError):  # a damaged file: query the GPUs
        fact = json.loads(read(f"{phase.want['etc']}/ansible/facts.d/cuda.fact") or "{}").get("compute_capability")
        if found := _numbers(fact if isinstance(fact, list) else [fact]):
            return found, ""
    rows, reason = query(phase, ["compute_cap"])
    found = _numbers(row["compute_cap"] for row in rows)
    return found, "" if found else reason or "no GPU"


def _numbers(capabilities):
    """["9.0", "9.0"] -> ["90"]; other values ("[N/A]") are ignored."""
    return sorted({cap.replace(".", "") for cap in map(str, capabilities) if re.fullmatch(r"\d+\.\d", cap)})


def mpi_home(phase):
    """(folder with include/mpi.h and lib/libmpi.so, "") or ("", reason)."""
    home = phase.want["mpi_home"]
    if not home:
        outcome = phase.run(["mpicc", "--showme:incdirs"], 20)  # Open MPI
        if not outcome.ok:
            outcome = phase.run(["mpicc", "-show"], 20)  # MPICH and its derivatives
        if not outcome.ok:
            return "", outcome.last_line
        folders = [word[2:] if word.startswith("-I") else word for word in outcome.stdout.split()]
        home = next((os.path.dirname(f) for f in folders if os.path.exists(f"{f}/mpi.h")), "")
    if not os.path.exists(f"{home}/include/mpi.h"):
        return "", f"no include/mpi.h in {home or 'the folders that mpicc reports'}"
    return home, ""


def check_tools(phase):
    """Record a problem for each missing requirement of a build; NCCL and CUDA are checked against each other first."""
    want = phase.want
    if not shutil.which("make"):
        phase.problem("make", "on PATH", "nothing", "install make")
    if want["tests"] and want["mpi"]:
        home, reason = mpi_home(phase)
        if not home:
            remedy = (
                "install Open MPI with its headers (Debian, Ubuntu: libopenmpi-dev), or set nccl_build_mpi_home, "
                "or nccl_build_mpi: false"
            )
            phase.problem("MPI for nccl-tests", "mpicc and mpi.h", reason, remedy)
    home, cuda, reason = cuda_toolkit(phase)
    if not home:
        remedy = "install the CUDA toolkit, or set nccl_build_cuda_home, or nccl_build_host to a node that has it"
        phase.problem("CUDA toolkit", "nvcc", reason, remedy)
    else:
        verdict, reason = pair(want["version"], cuda)
        if verdict == "refused":
            remedy = "set nccl_build_version, or nccl_build_cuda_home to another toolkit"
            phase.problem(f"toolkit for NCCL {want['version']}", reason, f"CUDA {cuda} in {home}", remedy)
        elif verdict == "unknown":
            phase.warn(f"NCCL {want['version']} with CUDA {cuda} is untried: {reason}")
    archs, unknown = architectures(phase)
    if not archs:
        remedy = 'set nccl_build_archs, e.g. ["90"] for H100 and H200'
        phase.problem("GPU architecture", "a compute capability", unknown, remedy)
    if not phase.problems:
        _check_compiles(phase, home, archs)


def _check_compiles(phase, home, archs):
    """Compile a kernel for each architecture, in seconds: nvcc must support it and the host's compiler."""
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/probe.cu", "#include <cuda_runtime.h>\n__global__ void probe(int *x) { *x = 1; }\n")
        argv = [f"{home}/bin/nvcc", "-ccbin", phase.want["cxx"], *gencode(archs).split()]
        outcome = phase.run([*argv, "-c", "-o", f"{folder}/probe.o", f"{folder}/probe.cu"], 300)
        if not outcome.ok:
            found = first_error(outcome.stderr + outcome.stdout) or outcome.last_line
            remedy = "set nccl_build_cxx to a compiler that this CUDA supports, or nccl_build_archs"
            phase.problem(f"nvcc with {phase.want['cxx']} for sm_{', sm_'.join(archs)}", "compiles", found, remedy)


def first_error(log):
    """The first line of a build's log with an error of a compiler, linker or make; "" where there is none."""
    compilers = r"\berror\s*(?:#\d+)?\s*:|\bfatal\b|undefined reference|cannot find -l|No space left on device"
    for pattern in (compilers, r"\*\*\* |: not found|Killed"):
        for line in log.splitlines():
            if re.search(pattern, line):
                return line.strip()[:300]
    return ""
