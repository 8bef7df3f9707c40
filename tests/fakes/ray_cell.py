"""A cell of engine `ray` on this machine, whose nodes are addresses of loopback, each with its supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from role_modules import ROOT
from runner.plan.engines import ray
from runner.plan.engines.ranks import Ranks
from runner.results.celldir import CellDir
from runner.system import process

FAKES = Path(__file__).parent


@dataclass(frozen=True)
class Host:
    """A node of the cell."""

    name: str
    address: str
    python: str

    @property
    def alias(self) -> str:
        """Its name."""
        return self.name


def stand_in(folder: Path) -> str:
    """The path of a Python in `folder` beside which `ray` is the stand-in."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(os.path.realpath(sys.executable))
    script = programs / "ray"
    script.write_text(f"#!{programs}/python\n" + (FAKES / "ray_stand_in.py").read_text())
    script.chmod(0o755)
    return str(programs / "python")


def free_port() -> int:
    """A port that nobody has; below those of outgoing connections."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise AssertionError("no port is free")


class Cell:
    """`params` are those of the test `ray_probe`; `wrong` is RAY_STAND_IN; `env` is added to the environment."""

    def __init__(
        self,
        folder: Path,
        python: str,
        nodes: int = 2,
        params: Mapping[str, Any] | None = None,
        wrong: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        gpus: int = 1,
    ) -> None:
        self.hosts = [Host(f"n{index}", f"127.0.0.{2 + index}", python) for index in range(nodes)]
        self.marker = process.cell_marker(f"run-{secrets.token_hex(4)}", "c")
        self.folder, self.gpus, self.port = folder, gpus, free_port()
        self.token = secrets.token_hex(32)
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text("import ray_probe\n")
        path = os.pathsep.join(map(str, (site, FAKES, ROOT)))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        stand_ins = {"RAY_STAND_IN": json.dumps(wrong or {}), "RAY_ADDRESS": "192.0.2.1:6379"}
        self.env = {**kept, "PYTHONPATH": path, process.MARKER: self.marker, **stand_ins, **(env or {})}
        self.params = {"join_s": 60.0, **(params or {})}
        self.children: dict[int, subprocess.Popen[bytes]] = {}

    def cell(self, index: int) -> CellDir:
        """The cell's folder on a node."""
        return CellDir(self.folder / f"n{index}")

    def start(self, *indices: int, token: str | None = None) -> None:
        """Start the supervisors of these nodes, or of all."""
        for index in indices or range(len(self.hosts)):
            folder = self.cell(index)
            folder.create()
            job = {
                "run_id": "run",
                "cell": "c",
                "test": "ray_probe",
                "num_nodes": len(self.hosts),
                "gpus_per_node": self.gpus,
                "world_size": 1,
                "device": "cpu",
                "seed": 0,
                "params": self.params,
                "env": {"GREETING": "hello there"},
            }
            folder.job.write_text(json.dumps(job))
            ranks = Ranks(
                nodes=self.hosts,
                gpus_per_node=self.gpus,
                master_address=self.hosts[0].address,
                master_port=self.port,
                cell_dir=str(folder.path),
                launcher_dir="",
                ssh_config=None,
                marker=self.marker,
            )
            argv = ray.launch(ranks).argv[index]
            assert argv
            with open(folder.engine_stdout, "ab") as out, open(folder.engine_stderr, "ab") as err:
                self.children[index] = subprocess.Popen(
                    argv,
                    env={**self.env, ray.TOKEN: token or self.token},
                    cwd=folder.path,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )

    def wait(self, seconds: float = 60) -> list[int]:
        """The statuses of all supervisors in the order of their nodes, once they have ended by themselves."""
        until = time.monotonic() + seconds
        return [child.wait(max(0.1, until - time.monotonic())) for _, child in sorted(self.children.items())]

    def fault(self, index: int) -> dict[str, Any] | None:
        """Why a supervisor gave up."""
        path = self.cell(index).fault
        return json.loads(path.read_text()) if path.exists() else None

    def said(self, index: int) -> str:
        """What a supervisor wrote."""
        return self.cell(index).engine_stdout.read_text() + self.cell(index).engine_stderr.read_text()

    def until(self, index: int, words: str, seconds: float = 60) -> None:
        """Wait until a supervisor has written `words`."""
        until = time.monotonic() + seconds
        while words not in self.said(index):
            assert time.monotonic() < until and self.children[index].poll() is None, self.said(index)
            time.sleep(0.02)

    def processes(self, words: str = "") -> list[int]:
        """The processes of the cell whose command line has `words`."""
        found = []
        for pid in process.marked(self.marker):
            with contextlib.suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(pid)
        return found

    def left_over(self) -> Sequence[object]:
        """What of the cell is still there: processes, the folder of sessions, ports."""
        folder = Path(ray.folder(self.marker))
        held = [port for port in (self.port, *self._ports()) if not _free(port)]
        return [*process.marked(self.marker), *([folder] if folder.exists() else []), *held]

    def _ports(self) -> list[int]:
        head = self.cell(0).ray_head
        if not head.exists():
            return []
        first = json.loads(head.read_text())["gcs"] - ray.SERVICES.index("gcs")
        return list(ray.Ports(first).all)

    def close(self) -> None:
        """End whatever a failed test has left."""
        process.stop_marked(self.marker, 1)
        for child in self.children.values():
            child.wait(10)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
