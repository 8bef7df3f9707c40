"""Stand-ins for libraries that need hardware, compiled on the spot."""

from __future__ import annotations

import subprocess
from pathlib import Path


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
