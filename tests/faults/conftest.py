"""What holds after any fault, whatever the backend, and the nodes on which faults are planted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from runner.provision.testbed import containers as provision_testbed
from runner.provision.testbed import layout
from runner.results.rundir import RunDir
from runner.system import process
from testbed.benches import Bench, inside, podman, until
from testbed.conftest import Testbed, containers, pytest_runtest_call, slurm3  # noqa: F401  # fixtures, and a hook

NODES = 6
# Small enough that a fault can fill the disk of a node.
MIN_FREE_DISK_GIB = 0.001
# How a run goes through the Slurm of the nodes of `slurm3`.
SLURM = ("--backend", "slurm")


def torch(iters: int = 2, size: str = "8", **more: object) -> tuple[str, ...]:
    """One collective of one size."""
    wanted = {"min_bytes": size, "max_bytes": size, "iters": iters, "collectives": "[all_reduce]", **more}
    return ("--test", "torch", *(part for k, v in wanted.items() for part in ("--set", f"torch.{k}={v}")))


SHORT = torch()
SOME_SECONDS = torch(iters=12_000)  # 7 s on two idle cores; a fault comes a second after the first progress
ENDLESS = torch(iters=100_000_000)


@pytest.fixture(scope="module")
def bed(containers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:  # noqa: F811
    """Nodes that are broken on purpose, so that no other test has them."""
    name, folder = "pytest-faults", tmp_path_factory.mktemp("faults")
    try:
        state = provision_testbed.up(layout.Options(nodes=NODES, name=name, inventory=folder))
        hosts = folder / "hosts.yml"
        device = "runner_device: cpu\n"
        text = hosts.read_text().replace(device, f"{device}        runner_min_free_disk_gib: {MIN_FREE_DISK_GIB}\n")
        hosts.write_text(text)
        yield Testbed(name, folder, state["nodes"])
    finally:
        provision_testbed.down(name)


def error_of(run: RunDir, cell: str | None = None) -> dict:
    """What status.json says of a cell that did not end well, which the report must say as well."""
    cells = run.read_status()["cells"]
    cell = cell or next(iter(cells))
    error = cells[cell]["error"]
    findings = json.loads(run.summary.read_text())["findings"]
    (found,) = [finding for finding in findings if finding["where"] == cell]
    assert (found["kind"], found["host"]) == (error["kind"], error["host"])
    return error


def assert_nothing_half_written(run: RunDir, killed: bool = False) -> None:
    """Every file that is there is whole. Only a writer that was `killed` leaves one aside, under another name."""
    for path in run.path.rglob("*.json"):
        json.loads(path.read_text())
    assert killed or not list(run.path.rglob("*.partial"))


def assert_no_orphan(marker: str, seconds: float = 20) -> None:
    """No process of the cell is left on any node: this kernel is the nodes' and sees every process of theirs."""
    assert until(lambda: process.marked(marker) == [], seconds), process.marked(marker)


def assert_kept(run: RunDir, hosts: Sequence[str], cell: str | None = None, ranks: bool = True) -> None:
    """What healthy nodes left was gathered: their facts, how they ended, and their ranks' events if `ranks` began."""
    cell = cell or next(iter(run.read_status()["cells"]))
    for host in hosts:
        folder: Path = run.cell(host, cell).path
        names = {path.name for path in folder.iterdir()}
        assert {"facts.json", "outcome.json", "telemetry.jsonl"} <= names, (host, names)
        assert not ranks or any(name.startswith("rank") and name.endswith(".jsonl") for name in names), (host, names)


# --- nodes with Slurm -----------------------------------------------------------------------------


def slurm(bed: Testbed, *argv: str) -> str:
    """What a command of Slurm prints on the first node."""
    return inside(bed.nodes[0]["container"], shlex.join(argv)).strip()


def wait_for_job(bench: Bench, state: str, seconds: float = 60) -> str:
    """The id of the job of the run's first cell, as soon as status.json says that the cell is in `state`."""

    def entry() -> dict:
        if not (bench.results / "latest" / "status.json").exists():
            return {}
        return next(iter(bench.run.read_status()["cells"].values()))

    assert until(lambda: entry().get("state") == state and bool(entry()["job"]), seconds), entry()
    return entry()["job"]["id"]


def assert_nothing_left(bed: Testbed, run: RunDir) -> None:
    """Neither a process on any node, nor a job in the queue. A job that Slurm is still ending counts as gone."""
    for cell in run.read_plan()["cells"]:
        assert_no_orphan(f"{run.run_id}/{cell['id']}", 60)
    argv = ("squeue", "--noheader", "--states=PENDING,RUNNING,SUSPENDED", "--format=%j %T")
    assert run.run_id not in slurm(bed, *argv)


def mend(bed: Testbed) -> None:
    """All nodes as they were: running, every daemon of theirs up, no job, none drained or down."""
    for number, node in enumerate(bed.nodes):
        container = node["container"]
        state = podman("inspect", "--format", "{{.State.Status}}", container).strip()
        if state != "running":
            podman("unpause" if state == "paused" else "start", container)
        daemons = ["ssh", "munge", *(["slurmctld"] if number == 0 else []), "slurmd"]
        up = f"systemctl start {' '.join(daemons)} 2>/dev/null"
        assert until(lambda up=up, container=container: "up" in inside(container, f"{up} && echo up || true"), 30)
    assert until(lambda: "UP" in inside(bed.nodes[0]["container"], "scontrol ping || true"), 30)
    slurm(bed, "scancel", "--user=root")

    def idle() -> bool:
        states = dict(line.split() for line in slurm(bed, "sinfo", "-N", "-h", "-o", "%N %T").splitlines())
        for name, state in states.items():
            # "idle*" is one that was resumed and not asked yet: to resume it again would begin anew.
            if state not in ("idle", "idle*", "allocated", "mixed", "completing"):
                # Down first: that ends the jobs which a daemon, when it was away, was not told to end.
                slurm(bed, "scontrol", "update", f"nodename={name}", "state=down", "reason=mended")
                slurm(bed, "scontrol", "update", f"nodename={name}", "state=resume")
        return set(states.values()) == {"idle"}

    assert until(idle, 60), slurm(bed, "sinfo", "-N", "-l")
