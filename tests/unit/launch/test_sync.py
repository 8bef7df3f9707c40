"""The user's folders in one run: where nodes have them, what is refused, and what a resume says has changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from plans import request
from runs import NodeAccess
from runs import Nodes as Ranks
from runs import planned as planned_run

from runner.errors import UsageError
from runner.failures import Problem
from runner.launch import run as bench
from runner.launch import sync
from runner.plan import build
from runner.report.progress import Display
from runner.results.rundir import RunDir

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "code"
    (made / "scripts").mkdir(parents=True)
    (made / "scripts" / "train.py").write_text("print(1)\n")
    (made / "run").write_text("true\n")
    (made / ".gitignore").write_text("ignored.py\n")
    (made / "ignored.py").write_text("")
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / "0").write_text("0")
    return made


def where(tmp_path: Path, backend: str = "ssh", **slurm: object) -> SimpleNamespace:
    """What a request and a plan say of a run."""
    return SimpleNamespace(
        backend=backend, run_id="run-1", run_dir=str(tmp_path / "results" / "run-1"), slurm=slurm or None
    )


def test_what_is_sent_its_size_and_its_digest_are_known_before_any_node_is_asked(source, tmp_path):
    made = sync.planned(["scripts/train.py"], True, source, sync_data="../data")
    assert made.inputs.keys() == {"code", "data"} and all(len(digest) == 64 for digest in made.inputs.values())
    assert made.lines == [
        f"code: {source}: 3 files, 25 B, {made.inputs['code'][:12]}",
        f"data: {tmp_path}/data: 1 file, 1 B, {made.inputs['data'][:12]}",
    ]


def test_each_backend_has_its_places(source, tmp_path, cluster):
    node = cluster.nodes[0]
    made = sync.planned(["train.py"], True, source / "scripts", "..", "../../data")
    code, data = made.inputs["code"], made.inputs["data"]
    places = made.places(where(tmp_path), node)
    assert places.work == f"{node.scratch}/work/run-1/scripts"
    assert places.env == {"SHAKEDOWN_DATA": f"{node.scratch}/data-sets/{data}"}
    assert [part.on_nodes for part in made.parts(where(tmp_path), node)] == [
        f"{node.scratch}/code/{code}",
        f"{node.scratch}/data-sets/{data}",
    ]
    assert made.places(where(tmp_path, "slurm", shared=False, login="head"), node) == places
    shared = made.places(where(tmp_path, "slurm", shared=True), node)
    results = tmp_path / "results"
    assert shared == sync.Places(f"{results}/run-1/work/scripts", f"{results}/.data-sets/{data}")


def test_on_this_machine_nothing_is_sent_and_the_folders_are_used_in_place(source, tmp_path, machine):
    made = sync.planned(["ignored.py"], False, source, ".", "../data")
    assert made.inputs == {} and made.lines == [] and made.supply(where(tmp_path, "local"), Display(quiet=True)) is None
    places = made.places(where(tmp_path, "local"), machine.nodes[0])
    assert places == sync.Places(str(source), str(tmp_path / "data")) and places.env
    assert sync.planned(["x.py"], False, source).places(where(tmp_path, "local"), machine.nodes[0]).env == {}
    with pytest.raises(UsageError, match=r"--sync .*nowhere: there is no such folder"):
        sync.planned(["x.py"], False, source, "nowhere")


@pytest.mark.parametrize(
    ("words", "cwd", "given", "says"),
    [
        (["ignored.py"], "", None, r"ignored\.py would not be sent: \.gitignore leaves it out"),
        (
            ["scripts/train.py"],
            "",
            "../data",
            "is not in .*data, which is sent: name the folder that has it with --sync",
        ),
        (["x.py"], "", "empty", "has no file that is sent"),
        (["x.py"], "", "run", "there is no such folder"),
    ],
)
def test_what_could_not_run_on_nodes_is_refused_here(source, words, cwd, given, says):
    (source / "empty").mkdir()
    with pytest.raises(UsageError, match=says) as caught:
        sync.planned(words, True, source / cwd, given)
    assert "\n" not in str(caught.value)


def test_a_script_that_is_named_by_its_whole_path_here_has_its_place_there(source):
    made = sync.planned([f"{source}/scripts/train.py", "--x"], True, source, ".")
    assert made.words([f"{source}/scripts/train.py", "--x"]) == ("scripts/train.py", "--x")
    inside = sync.planned([f"{source}/run"], True, source / "scripts", "..")
    assert inside.words([f"{source}/run"]) == ("../run",)
    assert made.words([f"{source}/run"]) == ("./run",)
    for other in (["/usr/bin/env", "x"], ["scripts/train.py"], ["python", f"{source}/run"], []):
        assert made.words(other) == tuple(other), "what comes after the program is the user's"


class Nodes:
    """A stand-in for a transport: what it is asked to store, and who fails."""

    def __init__(self, *fail: str) -> None:
        self.fail, self.stored = fail, list[tuple[str, list[str]]]()

    def store(self, plan, nodes, part, note, stopped):
        self.stored.append((part.name, [node.name for node in nodes]))
        return {name: Problem("disk_full", "full") for name in self.fail if part.name == "code"}


def started(made: sync.Sync, tmp_path: Path, nodes: list) -> tuple[RunDir, sync.Data]:
    run = RunDir(tmp_path / "results" / "run-1")
    run.path.mkdir(parents=True, exist_ok=True)
    plan = where(tmp_path)
    plan.nodes = nodes
    supplied = made.supply(plan, Display(quiet=True))
    assert supplied is not None
    return run, supplied


def test_a_node_that_cannot_have_the_code_is_not_sent_the_data(source, tmp_path, cluster):
    made = sync.planned(["run"], True, source, ".", "../data")
    _, supplied = started(made, tmp_path, cluster.nodes[:2])
    first, second = (node.name for node in cluster.nodes[:2])
    nodes = Nodes(first)
    problems = supplied.send(nodes, None, cluster.nodes[:2], lambda: False)
    assert problems.keys() == {first} and nodes.stored == [("code", [first, second]), ("data", [second])]
    assert supplied.ready and supplied.needed("script") and supplied.what == "the code and the data"
    assert supplied.send(Nodes(), None, cluster.nodes[:2], lambda: True) == {}


def test_a_resume_with_the_same_folders_sends_the_same(source, tmp_path, cluster):
    (source / os.fsdecode(b"\xff")).write_text("")
    made = sync.planned(["train.py"], True, source / "scripts", "..", "../../data")
    run, _ = started(made, tmp_path, cluster.nodes[:1])
    again = sync.resumed(run, tmp_path)
    assert again.inputs == made.inputs
    assert again.places(where(tmp_path), cluster.nodes[0]) == made.places(where(tmp_path), cluster.nodes[0])


def test_a_resume_says_what_has_changed_and_sends_it_only_where_that_is_accepted(source, tmp_path, cluster):
    made = sync.planned(["run"], True, source, ".", "../data")
    run, _ = started(made, tmp_path, cluster.nodes[:1])
    (source / "scripts" / "train.py").write_text("print(2)\n")
    (source / "new.py").write_text("")
    (tmp_path / "data" / "shards" / "0").unlink()
    (tmp_path / "data" / "shards" / "1").write_text("1")
    with pytest.raises(UsageError) as caught:
        sync.resumed(run, source)
    assert str(caught.value) == (
        f"since run-1 was started, 2 files of {source} changed (new.py, scripts/train.py); 2 files of {tmp_path}/data "
        "changed (shards/0, shards/1): restore it, or add --accept-drift, which sends what is here now"
    )
    again = sync.resumed(run, source, accept=True)
    assert again.inputs != made.inputs


def test_what_was_sent_and_is_gone_or_cannot_be_read_is_said(source, tmp_path, cluster):
    run, _ = started(sync.planned(["run"], True, source), tmp_path, cluster.nodes[:1])
    content = run.sync.read_text()
    for broken in ("", "[", '{"code": 1}', '{"code": {"root": "/"}}'):
        run.sync.write_text(broken)
        with pytest.raises(UsageError, match="was damaged"):
            sync.resumed(run, source)
    run.sync.write_text(content)
    shutil.rmtree(source)
    with pytest.raises(UsageError, match="which is not there now"):
        sync.resumed(run, tmp_path)
    run.sync.unlink()
    assert sync.resumed(run, tmp_path).inputs == {}


def test_nothing_of_what_is_sent_is_in_the_record_but_names_and_digests(source, tmp_path, cluster):
    (source / "key").write_text("SECRET")
    run, _ = started(sync.planned(["run"], True, source), tmp_path, cluster.nodes[:1])
    assert "SECRET" not in run.sync.read_text() and json.loads(run.sync.read_text())["code"]["root"] == str(source)


def test_a_renewed_plan_has_todays_inputs_and_place_of_data(source, tmp_path, cluster):
    made = sync.planned(["run"], True, source, ".", "../data")
    plan = build.build(request(cluster), cluster.nodes)
    renewed = made.renewed(plan)
    assert {cell.inputs["code"] for cell in renewed.cells} == {made.inputs["code"]}
    assert {cell.params["env"]["SHAKEDOWN_DATA"] for cell in renewed.cells} == {
        f"{cluster.nodes[0].scratch}/data-sets/{made.inputs['data']}"
    }
    assert sync.Sync(source, {}).renewed(plan) == plan


class Cluster(Ranks):
    """A stand-in for nodes that run anything, of which some cannot keep what they are sent."""

    def __init__(self, run: RunDir, problems: dict[str, Problem]) -> None:
        super().__init__(run)
        self.problems, self.stored = problems, list[str]()

    def store(self, plan, nodes, part, note, stopped):
        self.stored += [node.name for node in nodes]
        return {node.name: self.problems[node.name] for node in nodes if node.name in self.problems}


@pytest.mark.parametrize(("kind", "replaced"), [("copy_differs", False), ("copy_differs", True), ("disk_full", True)])
def test_a_program_does_not_begin_where_its_code_is_another(source, tmp_path, cluster, kind, replaced):
    """No test but a program needs it: the cells here train nothing."""
    built = planned_run(cluster, tmp_path, spares=2)
    run = RunDir.create(tmp_path, built.to_dict())
    data = sync.planned(["run"], True, source).supply(built, Display(quiet=True))
    bad = built.nodes[1].name
    nodes = Cluster(run, {bad: Problem(kind, "its copy is another")})
    carried = bench.Run(built, run, nodes, Display(quiet=True), data, bench.Policy(0, replaced), NodeAccess())
    carried.stop.wait = lambda seconds: None
    carried.execute({})
    entry = run.read_status()["cells"]["torch-2n-r1"]
    if replaced:
        assert entry["state"] == "complete" and bad not in nodes.tried[-1][1]
        assert set(nodes.tried[-1][1]) <= set(nodes.stored), "a spare is sent it first"
        return
    assert (entry["state"], entry["error"]["kind"], entry["error"]["host"]) == ("incomplete", kind, bad)
    assert entry["error"]["message"] == "the code cannot be sent to it: its copy is another"
    assert not nodes.tried
