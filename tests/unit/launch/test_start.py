"""Every way out of `runner bench` leaves a run directory with a state, or one line that says why there is none."""

from __future__ import annotations

import errno
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from runs import NAMES, NodeAccess, Nodes

from runner.cli import main
from runner.cluster import nccl
from runner.cluster.inventory import Inventory
from runner.errors import InfrastructureError, UsageError
from runner.launch import carry, prepare, resume, start
from runner.launch.supply import Data
from runner.report import page
from runner.report.progress import Display
from runner.report.runs import describe
from runner.results.rundir import RunDir
from runner.results.status import FINAL_STATES
from runner.system import locks

ERRORS: dict[str, tuple[Callable[[], BaseException], int | None]] = {
    "infrastructure": (lambda: InfrastructureError("planted", "hung"), 3),
    "usage": (lambda: UsageError("planted"), 2),
    "full disk": (lambda: OSError(errno.ENOSPC, "No space left on device", "planted"), 3),
    "signal": (KeyboardInterrupt, 130),
    "bug": (lambda: RuntimeError("planted"), None),
}
BEFORE = ("preflight", "refusal", "hold", "reserve", "write_status", "write_plan", "become_latest")
AFTER = ("alive", "data", "transport", "keep_transport", "send", "converse", "gather", "records", "judge", "report")


def failing(error: Callable[[], BaseException]) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error()

    return fail


def kept(_run: RunDir, _ssh_config: Path) -> None:
    """Instead of `keep_transport`: there is no ssh_config."""


@dataclass
class Bench:
    """`runner bench` on two nodes of a cluster that is not there, with what it uses replaced."""

    cluster: Inventory
    path: Path
    folder: type[RunDir] = RunDir
    fails: Callable[..., None] | None = None
    step: str = ""
    built: nccl.Built | None = None
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.ids = iter(f"20260102-030405-{number:04x}" for number in range(100))
        self.results, self.state = self.path / "results", self.path / "state"
        attributes: dict[str, object] = {"keep_transport": kept}
        method = {"records": "read_records", "judge": "telemetry_streams"}.get(self.step, self.step)
        if hasattr(RunDir, method):
            attributes[method] = self.fails
        self.folder = type("Folder", (self.folder,), attributes)

    def read(self, _: str | None) -> Inventory:
        return self.cluster

    def make_id(self) -> str:
        return next(self.ids)

    def access(self, *_: object, nccl_root: str | None = None, **__: object) -> SimpleNamespace:
        asked = 0
        self.required = nccl_root  # of the access that the run goes on with

        def transport(run: RunDir, first: object, expected: object) -> Nodes:
            nonlocal asked
            asked += 1
            if self.step == ("refusal", "transport")[min(asked, 2) - 1]:
                self.fails()
            nodes = Nodes(run)
            if self.step in ("send", "converse", "gather"):
                setattr(nodes, self.step, self.fails)
            return nodes

        ask = self.fails if self.step == "preflight" else NodeAccess(self.built).ask
        return SimpleNamespace(ask=ask, transport=transport)

    @property
    def dependencies(self) -> carry.Dependencies:
        return carry.Dependencies(
            make_id=self.make_id,
            state=self.state,
            hold=self.fails if self.step == "hold" else locks.hold_nodes,
            access=self.access,
            data=self.fails if self.step == "data" else lambda *_: Data("/data/x"),
            folder=self.folder,
        )

    def asked(self) -> prepare.Options:
        return prepare.Options(self.results, "runner bench", node_counts=(2,), tests=("torch",), settings=self.settings)

    def run(self) -> int:
        """The exit code."""

        def bench() -> None:
            prepared = prepare.prepare(self.asked(), self.read, self.make_id)
            start.start(prepared, Display(quiet=True), self.dependencies)

        return main.run(click.Command("bench", callback=bench), [])

    def resume(self) -> int:
        def bench() -> None:
            asked = resume.Options(self.folder(RunDir.find(self.results, None).path))
            resume.resume(asked, self.read, Display(quiet=True), self.dependencies)

        return main.run(click.Command("bench", callback=bench), [])

    def runs(self) -> list[Path]:
        return [path for path in self.results.glob("*") if not path.is_symlink()] if self.results.exists() else []


@contextmanager
def free(bench: Bench) -> Iterator[None]:
    """No lock is left: another run can have the nodes."""
    yield
    with locks.hold_nodes(bench.state, {node.endpoint: node.name for node in bench.cluster.nodes}, "another"):
        pass


def carried(bench: Bench, code: int | None) -> list[str]:
    """Run it; returns what a bug prints last, if it is one."""
    with free(bench):
        if code is not None:
            assert bench.run() == code
            return []
        with pytest.raises(RuntimeError, match="planted") as bug:
            bench.run()
        return traceback.format_exception_only(bug.value)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("step", BEFORE)
def test_before_the_plan_is_accepted_one_line_says_why_there_is_no_directory(cluster, tmp_path, capsys, step, kind):
    error, code = ERRORS[kind]
    bench = Bench(cluster, tmp_path, fails=failing(error), step=step)
    printed = carried(bench, code)
    assert bench.runs() == [] and not (bench.results / "latest").is_symlink()
    lines = capsys.readouterr().err.splitlines() or printed[-1:]
    [line] = lines
    said = {"signal": "interrupted before the run began", "bug": "the run has not begun"}.get(kind, "planted")
    assert said in line or "is full: free some space" in line


def assert_says_how_it_is_finished(lines: list[str], run: Path) -> None:
    """What ended the run is one line, and the last one is the command that finishes it."""
    assert len(lines) == 2
    assert lines[-1].strip() == f"to finish it: runner bench --resume {run.name} --results {run.parent}"


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("step", AFTER)
def test_after_it_the_run_directory_says_what_ended_the_run(cluster, tmp_path, capsys, monkeypatch, step, kind):
    error, code = ERRORS[kind]
    bench = Bench(cluster, tmp_path, fails=failing(error), step=step)
    if step == "report":
        monkeypatch.setattr(page, "write", failing(error))
    printed = carried(bench, code)
    assert not any("no directory" in line for line in printed)
    [path] = bench.runs()
    run, status = RunDir(path), json.loads((path / "status.json").read_text())
    assert (bench.results / "latest").resolve() == path.resolve() and run.controller() is None
    assert run.read_plan()["run_id"] == path.name
    before = step in ("alive", "data", "transport", "keep_transport", "records")
    if before and kind != "signal":
        assert status["state"] == "failed"
    elif before:
        assert status["state"] in ("cancelled", "incomplete")
    assert status["state"] in FINAL_STATES and status == run.read_status() | {"error": status["error"]}
    assert not {cell["state"] for cell in status["cells"].values()} & {"waiting", "running"}
    message = status["error"]["message"]
    said = {"signal": "what was written is in", "full disk": "planted: no space left"}.get(kind, "planted")
    assert said in message or message == "interrupted" or "is full: free some space" in message
    assert message.splitlines()[-1] in run.log.read_text()
    assert_says_how_it_is_finished(capsys.readouterr().err.splitlines() or printed, path)


def test_an_undisturbed_run_has_no_error(cluster, tmp_path):
    bench = Bench(cluster, tmp_path)
    carried(bench, 0)
    [path] = bench.runs()
    status = json.loads((path / "status.json").read_text())
    assert status["state"] == "complete" and "error" not in status
    assert list(status["cells"]) == ["torch-2n-r1"] and status["cells"]["torch-2n-r1"]["hosts"] == NAMES[:2]


def test_nodes_that_another_run_holds_are_one_line_and_no_directory(cluster, tmp_path, capsys):
    bench = Bench(cluster, tmp_path)
    with locks.hold_nodes(bench.state, {cluster.nodes[1].endpoint: NAMES[1]}, "run-1"):
        assert bench.run() == 3
    [line] = capsys.readouterr().err.splitlines()
    assert f"{NAMES[1]} is in use by run run-1" in line and bench.runs() == []


def test_a_name_that_is_taken_in_the_same_second_is_another_runs(cluster, tmp_path):
    bench = Bench(cluster, tmp_path)
    first = bench.results / "20260102-030405-0000"
    first.mkdir(parents=True)
    (first / "plan.json").write_text("another run's")
    assert bench.run() == 0
    assert sorted(path.name for path in bench.runs()) == ["20260102-030405-0000", "20260102-030405-0001"]
    assert (first / "plan.json").read_text() == "another run's"
    planned = json.loads((bench.results / "20260102-030405-0001" / "plan.json").read_text())
    assert planned["run_id"] == "20260102-030405-0001" and planned["run_dir"].endswith("20260102-030405-0001")
    assert all(planned["run_id"] in cell["cell_dir"] for cell in planned["cells"])


def test_without_a_free_name_one_line_says_so(cluster, tmp_path, capsys):
    bench = Bench(cluster, tmp_path)
    bench.make_id = lambda: "20260102-030405-0000"
    assert bench.run() == 0
    assert bench.run() == 3
    assert "no run directory was created: 20 names are taken in" in capsys.readouterr().err
    assert len(bench.runs()) == 1


def test_what_a_killed_run_left_of_its_link_is_in_nobodys_way(cluster, tmp_path):
    """Process ids come again."""
    bench = Bench(cluster, tmp_path)
    bench.results.mkdir()
    (bench.results / f".latest.{os.getpid()}").symlink_to("20250101-000000-dead")
    assert bench.run() == 0
    assert (bench.results / "latest").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_directory_is_created_finds_it_whole(cluster, tmp_path, capsys, number):
    class Signalled(RunDir):
        def write_plan(self, plan):
            os.kill(os.getpid(), number)
            super().write_plan(plan)

    def leave(_number, _frame):  # as `main` has it
        raise KeyboardInterrupt

    before = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        bench = Bench(cluster, tmp_path, folder=Signalled)
        with free(bench):
            assert bench.run() == 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    [path] = bench.runs()
    assert RunDir(path).read_status()["state"] == "cancelled"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"runner: interrupted; what was written is in {path}"
    assert_says_how_it_is_finished(lines, path)


def test_a_disk_that_is_full_from_some_moment_on_is_one_line_and_an_incomplete_run(cluster, tmp_path, capsys):
    class Full(RunDir):
        written = 0

        def write_status(self, status):
            Full.written += 1
            if Full.written > 3:
                raise OSError(errno.ENOSPC, "No space left on device", str(self.status))
            super().write_status(status)

    bench = Bench(cluster, tmp_path, folder=Full)
    carried(bench, 3)
    lines = capsys.readouterr().err.splitlines()
    [path] = bench.runs()
    assert lines[0].endswith("is full: free some space and run again")
    assert_says_how_it_is_finished(lines, path)
    assert RunDir(path).read_status()["state"] == "incomplete"


# --- resume ---------------------------------------------------------------------------------------


def test_what_ended_a_run_is_forgotten_once_it_is_resumed(cluster, tmp_path):
    carried(Bench(cluster, tmp_path, fails=failing(ERRORS["usage"][0]), step="data"), 2)
    bench = Bench(cluster, tmp_path)
    run = RunDir.find(bench.results, None)
    assert run.read_status()["error"]["message"] == "planted"
    assert "\nended by: planted" in describe(run.read_plan(), run.read_status(), datetime.now(UTC), 80)
    assert bench.resume() == 0
    assert run.read_status()["state"] == "complete" and "error" not in run.read_status()


@pytest.mark.parametrize("kind", ERRORS)
def test_what_ends_a_resumed_run_is_recorded_as_well(cluster, tmp_path, kind):
    carried(Bench(cluster, tmp_path, fails=failing(ERRORS["usage"][0]), step="data"), 2)
    error, code = ERRORS[kind]
    bench = Bench(cluster, tmp_path, fails=failing(error), step="send")
    with free(bench):
        if code is None:
            with pytest.raises(RuntimeError, match="planted"):
                bench.resume()
        else:
            assert bench.resume() == code
    status = RunDir.find(bench.results, None).read_status()
    assert status["state"] in FINAL_STATES and status["error"]["at"]


def test_a_run_that_cannot_be_resumed_is_left_as_it_is(cluster, tmp_path):
    carried(Bench(cluster, tmp_path, fails=failing(ERRORS["usage"][0]), step="data"), 2)
    bench = Bench(cluster, tmp_path)
    run = RunDir.find(bench.results, None)
    before = run.status.read_bytes(), run.plan.read_bytes(), run.log.read_bytes()
    with locks.hold_nodes(bench.state, {cluster.nodes[1].endpoint: NAMES[1]}, "run-1"):
        assert bench.resume() == 3
    assert Bench(cluster, tmp_path, fails=failing(ERRORS["signal"][0]), step="preflight").resume() == 130
    assert (run.status.read_bytes(), run.plan.read_bytes(), run.log.read_bytes()) == before


# --- the NCCL of the ranks ---

GOOD = nccl.Built("/opt/nccl", "2.30.7")
TOO_OLD = nccl.Built("/opt/nccl", "2.26.2", "it is too old")
PRELOADED = {"LD_PRELOAD": "/opt/nccl/current/lib/libnccl.so.2", "PYTHONPATH": "/opt/nccl/python"}


@pytest.mark.parametrize(
    ("built", "setting", "which", "root"),
    [
        (GOOD, (), "built", "/opt/nccl"),
        (None, (), "torch", None),
        (TOO_OLD, (), "torch", None),
        (GOOD, ("nccl=torch",), "torch", None),
        (None, ("nccl=built",), "built", "/opt/nccl"),  # whether there is one is then up to the checks
    ],
)
def test_the_nccl_of_the_plan_is_asked_for_or_what_the_nodes_have(cluster, tmp_path, built, setting, which, root):
    bench = Bench(cluster, tmp_path, built=built, settings=setting)
    assert bench.run() == 0
    kept = json.loads((bench.runs()[0] / "plan.json").read_text())
    assert (kept["nccl"], kept["nccl_root"]) == (which, root)
    assert kept["cells"][0]["env"] == {"OMP_NUM_THREADS": "1"} | (PRELOADED if root else {})
    assert bench.required == root, "spares and a resumed run are checked for it as well"


def test_the_inventorys_choice_stands_unless_it_is_set(cluster, tmp_path):
    chosen = replace(cluster, nodes=tuple(replace(node, nccl="built", nccl_root="/srv/nccl") for node in cluster.nodes))
    for setting, root in (((), "/srv/nccl"), (("nccl=torch",), None)):
        bench = Bench(chosen, tmp_path / str(root), settings=setting)
        prepared = prepare.prepare(bench.asked(), bench.read, bench.make_id)
        assert prepared.plan.nccl_root == root


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("nccl=biult", "--set: nccl: unknown value 'biult'; did you mean 'built'?"),
        ("nccl=2.26.2", "--set: nccl: unknown value '2.26.2'"),
        ("nccl=yes", "--set: nccl"),
    ],
)
def test_another_nccl_is_refused_in_one_line(cluster, tmp_path, capsys, setting, said):
    assert Bench(cluster, tmp_path, settings=(setting,)).run() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
