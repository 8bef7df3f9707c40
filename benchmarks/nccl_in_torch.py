"""Which NCCL torch loads: `python benchmarks/nccl_in_torch.py [--torch VERSION …] [--built VERSION …] [--folder DIR]`.

No GPU is needed; each torch of a profile with CUDA is downloaded with all that it needs (3 to 7 GB of disk each, below
`--folder`, by default a temporary folder that is removed). NVIDIA's own wheels of NCCL stand for the build of role
nccl_build, in a folder laid out as the role does. torch is then imported

    as it is            without any of it
    LD_LIBRARY_PATH     as the role's env.sh sets it
    LD_PRELOAD          alone
    rendered            in the environment that a plan with `nccl: built` has for the ranks

and asked which libraries are mapped into the process (/proc/self/maps), and each of them for its ncclGetVersion.
`foretold` is what `runner.cluster.nccl.obstacle`, which runs before ranks are started, says of the pair. Last, NCCL
reads a file of settings, and its variables are compared with `runner.cluster.nccl.settings`. Fails where a rendered
environment has another library than the built one, or what was foretold or read is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from runner.cluster import inventory, nccl
from runner.plan import build, config
from runner.plan.plan import rank_environment
from runner.plan.request import Request

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "roles" / "conda_env" / "files" / "profiles"
BUILT = ("2.26.2", "2.30.7")  # an older one, and the role's default
ASK = """
import json, sys
sys.path.append(sys.argv[1])
from runner.cluster import nccl
error = None
try:
    import torch
except ImportError as problem:
    error = str(problem).rpartition(": ")[0].rpartition("/")[2] + ": " + str(problem).rpartition(": ")[2]
print(json.dumps({"loaded": nccl.loaded(), "error": error, "compiled": None if error else torch.cuda.nccl.version()}))
"""
SETTINGS = "NCCL_IB_TC=106\nNCCL_BUFFSIZE=1\n#NCCL_DEBUG=INFO\nNCCL_IB_HCA==mlx5_0,mlx5_1\nNCCL_IB_TC=107\nno setting\n"
READ = """
import ctypes, json, sys
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
ctypes.CDLL(sys.argv[1]).ncclGetUniqueId(ctypes.create_string_buffer(128))
values = {name: libc.getenv(name.encode()) for name in sys.argv[2:]}
print(json.dumps({name: value.decode() for name, value in values.items() if value is not None}))
"""
FORETELL = """
import sys
sys.path.append(sys.argv[1])
from runner.cluster import nccl
print(nccl.obstacle(sys.argv[2]) or "usable")
"""


def torches() -> list[str]:
    """The versions of torch in the profiles that have one for CUDA."""
    texts = [text for path in sorted(PROFILES.glob("*.txt")) if "# cuda: none" not in (text := path.read_text())]
    return sorted({match[1] for text in texts if (match := re.search(r"^torch==([\d.]+)", text, re.MULTILINE))})


def environment_with(torch: str, folder: Path) -> Path:
    """The Python of a virtual environment with that torch below `folder`; made unless it is there."""
    python = folder / f"torch-{torch}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        pip(python, f"torch=={torch}", "numpy<2" if torch < "2.4" else "numpy")
    return python


def pip(python: Path, *words: str) -> None:
    """Install with pip, without this machine's constraints."""
    subprocess.run([python, "-m", "pip", "install", "--isolated", "-q", "--no-cache-dir", *words], check=True)


def built(version: str, major: str, folder: Path) -> str:
    """The root of a folder with that NCCL, as role nccl_build lays it out."""
    root = folder / f"nccl-{version}-cuda{major}"
    if not root.exists():
        target = root / version
        pip(Path(sys.executable), "--no-deps", "--target", str(target), f"nvidia-nccl-cu{major}=={version}")
        (target / "lib").symlink_to("nvidia/nccl/lib")
        (root / "current").symlink_to(version)
        link = root / "python" / "nvidia" / "nccl" / "lib" / nccl.LIBRARY
        link.parent.mkdir(parents=True)
        link.symlink_to(f"../../../../current/lib/{nccl.LIBRARY}")
    return str(root)


def rendered(root: str) -> dict[str, str]:
    """The environment of the ranks in a plan with `nccl: built`."""
    variables = {"ansible_connection": "local", "runner_nccl": "built", "nccl_build_root": root}
    hosts = {"_meta": {"hostvars": {"localhost": variables}}, "all": {"hosts": ["localhost"]}}
    (node,) = inventory.parse("this machine", hosts).nodes
    model = config.load_model("tiny").model_dump()
    request = Request(
        run_id="20260101-000000-aaaa", created="", command="", inventory="", run_dir="/r/20260101-000000-aaaa",
        tests={"torch": config.load_test("torch", {}).model_dump()}, model=model, deepspeed={}, targets=(),
        hardware={"name": "cpu"}, node_counts=(1,), engine="torchrun", backend=node.backend, scaling="weak", repeats=1,
        gpus_per_node=1, device="cuda", ssh_config=None, nccl=node.nccl, nccl_root=node.nccl_root,
    )  # fmt: skip
    return rank_environment(build.build(request, (node,)).cells[0], node)


def imported(python: Path, variables: dict[str, str]) -> dict:
    """What a process with these variables has loaded after `import torch`."""
    answer = subprocess.run(
        [python, "-W", "ignore", "-c", ASK, ROOT], env={**os.environ, **variables}, capture_output=True, text=True
    )
    return json.loads(answer.stdout)


def main() -> int:
    """Print the table; 1 where a rendered environment or a foretelling is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", nargs="*", default=torches())
    parser.add_argument("--built", nargs="*", default=BUILT)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    wrong = False
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(
            "| torch | its own NCCL | built | import | loaded NCCL | foretold |\n| --- | --- | --- | --- | --- | --- |"
        )
        for torch in options.torch:
            python = environment_with(torch, folder)
            plain = imported(python, {})
            compiled = ".".join(map(str, plain["compiled"]))
            print(f"| {torch} | {compiled} | – | as it is | {told(plain, folder)} | |", flush=True)
            for version in options.built:
                root = built(version, "12", folder)
                lib = f"{root}/current/lib"
                told_before = subprocess.run(
                    [python, "-c", FORETELL, ROOT, root], capture_output=True, text=True, check=True
                ).stdout.strip()
                for name, variables in {
                    "LD_LIBRARY_PATH": {"LD_LIBRARY_PATH": lib},
                    "LD_PRELOAD": {"LD_PRELOAD": f"{lib}/{nccl.LIBRARY}"},
                    "rendered": rendered(root),
                }.items():
                    found = imported(python, variables)
                    last = ""
                    if name == "rendered":
                        last = told_before.replace(f" in {root}", "")
                        wrong |= (told_before == "usable") != (found["error"] is None)
                        wrong |= list(found["loaded"].values()) != [version]
                    print(f"| {torch} | {compiled} | {version} | {name} | {told(found, folder)} | {last} |", flush=True)
        for version in options.built:
            mine, theirs = settings(built(version, "12", folder), folder / "nccl.conf")
            wrong |= mine != theirs
            print(f"\nNCCL {version} has, of these lines, {theirs}: {'as foretold' if mine == theirs else mine}")
    return int(wrong)


def settings(root: str, file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The settings of a file as `nccl.settings` reads them, and as NCCL has them; NCCL_BUFFSIZE is set beside it."""
    file.write_text(SETTINGS)
    variables = {"NCCL_CONF_FILE": str(file), "NCCL_BUFFSIZE": "2"}
    names = ("NCCL_IB_TC", "NCCL_BUFFSIZE", "#NCCL_DEBUG", "NCCL_DEBUG", "NCCL_IB_HCA")
    answer = subprocess.run(
        [sys.executable, "-c", READ, f"{root}/current/lib/{nccl.LIBRARY}", *names],
        env={**os.environ, **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    read = {**nccl.settings(variables), **variables}
    return {name: read[name] for name in names if name in read}, json.loads(answer.stdout)


def told(found: dict, folder: Path) -> str:
    """The libraries with their versions, and why the import failed."""
    libraries = [
        f"{version} ({'torch' if 'site-packages' in file else 'built'})" for file, version in found["loaded"].items()
    ]
    return " and ".join(libraries) + (f"; fails: {found['error']}" if found["error"] else "")


if __name__ == "__main__":
    sys.exit(main())
