"""What several tests need: the two clusters as data, without Ansible and without a network."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "fakes"))

import role_modules  # noqa: F401  # puts plugins/module_utils where Ansible puts it
from runner.cluster import inventory
from runner.results.rundir import RunDir

# Ignored by who is started in the background of a script, it would be so by every program that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

with suppress(ImportError):  # a machine that runs the tests marked `gpu` alone need not have it
    import hypothesis

    # A deadline measures who else uses the machine.
    hypothesis.settings.register_profile("patient", hypothesis.settings(), deadline=None)
    hypothesis.settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--release", help="release of the distribution for nodes with Slurm, e.g. trixie; default: this machine's"
    )


ROOT = Path(__file__).resolve().parent.parent
NAMES = [f"fukushimadc-02-hgx-{number:04d}" for number in (1, 2, 3, 4, 5, 6, 7, 9)]


def listing(hostvars: dict[str, dict]) -> dict:
    """What `ansible-inventory --list` prints for these hosts."""
    return {"_meta": {"hostvars": hostvars}, "all": {"children": ["gpu_nodes"]}, "gpu_nodes": {"hosts": list(hostvars)}}


@pytest.fixture
def cluster() -> inventory.Inventory:
    """Eight H200 nodes behind SSH port 44222; node008 is ...-0009."""
    hostvars = {
        name: {
            "ansible_host": f"10.2.201.{position}",
            "ansible_port": 44222,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": "/home/a b/.ssh/id_ed25519",
            "runner_alias": f"node{position:03d}",
            "runner_host_key": f"ssh-ed25519 AAAAC3Nza{position}",
            "runner_python": "/opt/shakedown/env/bin/python",
            "runner_gpus_per_node": 8,
            "runner_device": "cuda",
            "runner_hardware": "h200-sxm",
            "runner_nics_per_node": 2,
            "runner_nic_gbit_per_s": 400,
            "runner_env": {"NCCL_IB_HCA": "mlx5_0,mlx5_1"},
        }
        for position, name in enumerate(NAMES, start=1)
    }
    return inventory.parse("inventory/fukushimadc-02", listing(hostvars))


@pytest.fixture
def machine() -> inventory.Inventory:
    """This machine, on a path that a shell would trip over."""
    hostvars = {"localhost": {"ansible_connection": "local", "runner_python": "/home/o'neill/$(env) é/bin/python"}}
    return inventory.parse("inventory/local", listing(hostvars))


@pytest.fixture
def beating(monkeypatch):
    """As if a controller on another machine, whose lock is not seen here, showed that it lives; known within 1 s."""
    beats = RunDir.beats
    monkeypatch.setattr(RunDir, "beats", lambda run: beats(run, 1.0))

    @contextmanager
    def alive(run: RunDir) -> Iterator[None]:
        over = threading.Event()

        def beat() -> None:
            while not over.wait(0.1):
                (run.path / ".alive").touch()

        (run.path / ".alive").touch()
        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    return alive


@pytest.fixture
def held():
    """A process of this machine that carries out a run, as far as anybody can see."""
    script = (
        "import sys, time, pathlib; from runner.results.rundir import RunDir\n"
        "with RunDir(pathlib.Path(sys.argv[1])).alive(): print('held', flush=True); time.sleep(60)"
    )

    @contextmanager
    def controller(run: RunDir) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen([sys.executable, "-c", script, run.path], stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline()
            try:
                yield process
            finally:
                process.kill()

    return controller


@pytest.fixture
def this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """A function that copies an inventory of this machine, by default inventory/local, with a scratch folder and locks
    of its own: a machine has one run at a time, and tests in two processes are to be two machines.
    """

    def copied(source: Path = ROOT / "inventory" / "local") -> Path:
        own = shutil.copytree(source, tmp_path / "this-machine")
        (own / "group_vars").mkdir()
        (own / "group_vars" / "all.yml").write_text(f"runner_scratch: {tmp_path / 'scratch'}\n")
        return own

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return copied
