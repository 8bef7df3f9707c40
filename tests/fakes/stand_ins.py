"""Stand-ins for libraries and programs that need hardware, compiled on the spot."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TREES = Path(__file__).resolve().parents[2] / "molecule" / "resources" / "stand-ins" / "nccl"


def library(path: Path, source: str) -> None:
    """Compile C to a shared library at `path`, with the file's name as its SONAME."""
    argv = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c", "-", "-o", str(path)]
    subprocess.run(argv, input=source, text=True, check=True)


def version_source(code: int) -> str:
    return f"int ncclGetVersion(int *version) {{ *version = {code}; return 0; }}\n"


def nccl(root: Path, code: int) -> str:
    """STAND-IN for the NCCL that role nccl_build builds, in the role's layout: it knows its version and nothing else."""
    lib, link = root / "a-build" / "lib", root / "python" / "nvidia" / "nccl" / "lib"
    for folder in (lib, link):
        folder.mkdir(parents=True)
    library(lib / "libnccl.so.2", version_source(code))
    (root / "current").symlink_to("a-build")
    (link / "libnccl.so.2").symlink_to("../../../../current/lib/libnccl.so.2")
    return str(root)


def mpi_home() -> str | None:
    """The folder with include/mpi.h and lib of this machine's MPI, None where programs cannot be compiled with it."""
    if not shutil.which("mpicc"):
        return None
    shown = subprocess.run(["mpicc", "--showme:incdirs"], capture_output=True, text=True, check=False)
    folders = (Path(word) for word in shown.stdout.split())
    return next((str(folder.parent) for folder in folders if (folder / "mpi.h").exists()), None)


def nccl_tests(root: Path, mpi: str | None = None) -> str:
    """STAND-IN for nccl-tests and the NCCL that they need, in the role's layout: its trees, built by their make.

    `mpi` is what `mpi_home` found; without it, for one process. What a program does and can be told: its perf.c.
    """
    nccl(root, 0)
    work, build = root / "work", root / "a-build"
    make = ["make", "-s", "CXX=cc"]
    (tree,) = TREES.glob("nccl-[0-9]*")
    (build / "lib" / "libnccl.so.2").unlink()
    for target in ("src.build", "install"):
        argv = [*make, "-C", tree, target, f"BUILDDIR={work}/nccl", f"PREFIX={build}"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    (tree,) = TREES.glob("nccl-tests-*")
    words = ["MPI=1", f"MPI_HOME={mpi}"] if mpi else []
    argv = [*make, "-C", tree, f"NCCL_HOME={build}", f"BUILDDIR={build}/bin", f"LD_RUN_PATH={build}/lib", *words]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(work)
    return str(root)
