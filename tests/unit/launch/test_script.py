"""`runner launch`: what is refused, what is planned, and with which code it ends."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden_files import check as golden
from runner.errors import UsageError
from runner.launch import blame, prepare, resume, script
from runner.launch.talk import AgentSession
from runner.node.protocol import Outcome
from runner.plan import build, describe
from runner.plan.engines.registry import ENGINES, offered
from runner.plan.plan import Plan, job
from runner.report.progress import Display
from runner.results.rundir import RunDir
from runner.system import nodeset
from runner.system.files import write_json_atomic
from runner.workloads.script.rank import command


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text("")
    (tmp_path / "plain").write_text("")
    (tmp_path / "dir").mkdir()
    return tmp_path


def options(folder: Path, *words: str, nodes: int = 1, engine: str = "torchrun", **more) -> script.Options:
    run = prepare.Options(folder / "results", "runner launch", node_counts=(nodes,), engine=engine)
    return script.Options(run, words, folder, **more)


def planned(folder, source, *words, **more):
    return script.planned(options(folder, *words, **more), lambda _: source)


@pytest.mark.parametrize(
    ("words", "more", "says"),
    [
        ([], {}, "nothing to start: give the program after --"),
        ([" "], {}, "nothing to start"),
        (["gone.py"], {}, "gone.py: there is no such file in"),
        (["dir/"], {}, "dir/ is a folder"),
        (["./plain"], {}, r"./plain is not executable: chmod \+x"),
        (["train.py"], {"engine": "torchrum"}, "unknown engine 'torchrum'; did you mean 'torchrun'"),
        (["train.py"], {"env": ("A",)}, "--env A: write it as KEY=VALUE"),
        (["train.py"], {"env": ("A B=1",)}, "--env A B=1: write it"),
        (["train.py"], {"env_pass": ("NOT_SET_HERE",)}, "NOT_SET_HERE: it is not set here"),
        (["train.py"], {"env_pass": ("K=secret",)}, "^--env-pass K: give the name of a variable, without its value$"),
        (["train.py"], {"env_pass": ("HOME",), "env": ("HOME=/",)}, "HOME is given by --env and by --env-pass"),
        (
            ["train.py"],
            {"env": ("RANK=3",)},
            "^RANK is how a rank knows its place: leave it out of --env and --env-pass$",
        ),
        (["train.py"], {"env": ("SHAKEDOWN_CELL=x",)}, "SHAKEDOWN_CELL is how a rank knows its place"),
        (["train.py"], {"resume_arg": "it's"}, "--resume-arg it's: no closing quotation: quote it as for a shell"),
        (["train.py"], {"settings": ("slurm.partition=a",)}, "--set slurm: runner launch has the settings"),
        (["train.py"], {"settings": ("script.timeout=1",)}, "timeout"),
    ],
)
def test_what_cannot_be_started_is_one_line(folder, machine, words, more, says):
    with pytest.raises(UsageError, match=says) as error:
        planned(folder, machine, *words, **more)
    assert "\n" not in str(error.value)


WORDS = st.lists(st.one_of(st.text(), st.binary().map(os.fsdecode)).filter(lambda word: "\0" not in word))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(words=WORDS)
def test_the_users_words_reach_ranks_as_they_were_typed(tmp_path_factory, machine, words):
    here = tmp_path_factory.mktemp("words")
    (here / "train.py").touch()
    made = planned(here, machine, "train.py", *words)
    write_json_atomic(here / "plan.json", made.run.plan.to_dict())
    saved = Plan.from_dict(json.loads((here / "plan.json").read_text()))
    write_json_atomic(here / "job.json", json.loads(json.dumps(job(saved, saved.cells[0], machine.nodes[0], None))))
    found = json.loads((here / "job.json").read_text())["params"]["argv"]
    assert command(found, "/bin/python", {}) == ["/bin/python", "train.py", *words]
    text = describe.describe(made.run.plan, nodeset.fold) + "\n".join(made.lines)
    text.encode()  # what a terminal takes
    assert shlex.join(words).encode(errors="backslashreplace").decode() in text


@pytest.mark.parametrize("backend", ["local", "ssh"])
@pytest.mark.parametrize("engine", offered())
def test_every_engine_on_every_backend(cluster, machine, monkeypatch, tmp_path, engine, backend):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_TOKEN", "hush-hush")
    monkeypatch.setattr(script, "new_id", lambda: "20260102-030405-abcd")
    here = tmp_path / "code"
    here.mkdir()
    (here / "train.py").write_text("print(1)\n")
    source = machine if backend == "local" else cluster
    nodes = 1 if backend == "local" else 2
    passed = () if ENGINES[engine].headed else ("MY_TOKEN",)
    asked = options(here, "train.py", "--name", "a b", nodes=nodes, engine=engine, env=("K=v $w",), env_pass=passed)
    made = script.planned(replace(asked, run=replace(asked.run, results=Path("/srv/results"))), lambda _: source)
    text = "\n".join([describe.describe(made.run.plan, nodeset.fold), "", *made.lines, ""])
    assert "hush-hush" not in text
    golden(f"launch/{engine}-{backend}.txt", text.replace(str(tmp_path), "/home/me"))


def test_a_run_whose_secret_is_not_set_any_more_is_not_gone_on_with(folder, machine, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hush-hush")
    made = planned(folder, machine, "train.py", env_pass=("MY_TOKEN",))
    run = RunDir.create(folder / "results", made.run.plan.to_dict())
    run.write_status(run.read_status() | {"launch": {"cwd": str(folder)}})
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(UsageError, match="--env-pass MY_TOKEN: it is not set here"):
        script.again(resume.Options(run), None, lambda _: machine, Display(quiet=True))


def test_a_launch_is_a_run_of_one_cell_whose_program_is_in_its_settings(folder, machine):
    made = planned(folder, machine, "train.py", "a b", "$(x)", env=("K=v=w",), resume_arg="--last")
    (cell,) = made.run.plan.cells
    assert (cell.id, cell.test, cell.params["timeout_s"]) == ("script", "script", None)
    assert cell.params["argv"] == ("train.py", "a b", "$(x)") and cell.params["folder"] == str(folder)
    assert cell.params["env"] == {"K": "v=w"}
    assert "$(x)" not in str(cell.launch), "words of the user are in no command"


def test_nodes_run_a_copy_of_the_code_in_a_folder_of_the_run(folder, cluster):
    made = planned(folder, cluster, "train.py", nodes=2)
    (cell,) = made.run.plan.cells
    assert cell.params["folder"] == f"{cluster.nodes[0].scratch}/work/{made.run.plan.run_id}"
    assert set(cell.inputs) == {"code"} and len(cell.hosts) == 2


def test_a_secret_is_in_no_plan(folder, machine, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hush-hush")
    made = planned(folder, machine, "train.py", env_pass=("MY_TOKEN",))
    (cell,) = made.run.plan.cells
    assert "hush-hush" not in str(made.run.plan.to_dict())
    assert "hush-hush" not in str(job(made.run.plan, cell, machine.nodes[0], None))
    from runner.launch.agents import secrets

    assert secrets([cell])["MY_TOKEN"] == "hush-hush"


def test_the_launcher_of_a_users_python_starts_ranks_in_the_nodes_own(folder, cluster):
    made = planned(folder, cluster, "train.py", nodes=2)
    (cell,) = made.run.plan.cells
    nodes = [made.run.plan.node(name) for name in cell.hosts]
    own = replace(cell, params={**cell.params, "python": "/envs/mine/bin/python"})
    for before, after in zip(cell.launch.argv, build.place(own, nodes, made.run.plan, "c").launch.argv, strict=True):
        assert after[0] == "/envs/mine/bin/python" and after[-5:-3] == ("--no-python", before[0])
        assert after[-3:] == before[-3:]


# --- how it ends --------------------------------------------------------------------------------------------


def outcome(**codes: tuple[int, float]) -> Outcome:
    ranks = {
        name: {"started": True, "ended": code == 0, "stderr": ["ValueError: x"] if code == 7 else [], "code": code}
        | {"ended_s": ended_s}
        for name, (code, ended_s) in codes.items()
    }
    return Outcome.from_json({"rc": int(any(code for code, _ in codes.values())), "ranks": ranks})


@pytest.mark.parametrize(
    ("nodes", "code"),
    [
        ([{"rank0": (0, 9.0)}, {"rank1": (0, 9.5)}], 0),
        ([{"rank0": (1, 9.2)}, {"rank1": (7, 9.1)}], 7),
        ([{"rank0": (143, 9.0), "rank1": (137, 9.1)}], 137),
        ([{"rank0": (143, 9.0)}], 143),
        ([{"rank0": (0, 9.0)}, {}], 0),
        ([{}], None),
    ],
)
def test_the_code_is_that_of_the_rank_that_failed_first(nodes, code):
    assert blame.exit_code({str(index): outcome(**each) for index, each in enumerate(nodes)}) == code


def test_a_program_that_fails_is_the_users_fault_and_the_first_rank_says_why():
    found = outcome(rank0=(1, 9.5), rank1=(7, 9.0))
    sessions = [AgentSession("a", (), {}, rc=0), AgentSession("b", (), {}, rc=0)]
    error = blame.blame(sessions, {"a": found, "b": outcome(rank2=(0, 9.0))})
    assert (error["kind"], error["host"]) == ("script_failed", "a")
    assert error["message"] == "rank1 died with status 7: ValueError: x"


@pytest.mark.parametrize(
    ("state", "code", "otherwise", "ends", "says"),
    [
        ("complete", 0, 1, 0, "the program ended with code 0"),
        ("failed", 7, 3, 7, "the program ended with code 7"),
        ("failed", 139, 3, 139, r"code 139 \(signal 11\)"),
        ("cancelled", 143, 130, 130, "stopped by the user"),
        ("failed", None, 3, 3, "exit code 3 is runner's: the program has not ended by itself"),
        ("incomplete", 0, 3, 3, "exit code 3 is runner's: the program's own code is 0"),
    ],
)
def test_runner_launch_ends_as_the_program_and_says_so(folder, machine, state, code, otherwise, ends, says):
    made = planned(folder, machine, "train.py")
    run = RunDir.create(folder / "results", made.run.plan.to_dict())
    status = run.read_status()
    status["cells"]["script"].update(state=state, exit_code=code)
    run.write_status({**status, "state": state})
    found, text = script.exit_code(run, otherwise)
    assert found == ends
    import re

    assert re.search(says, text)


def test_what_ranks_write_is_shown_as_it_comes_and_to_the_last_line(tmp_path):
    lines: list[str] = []
    display = Display(quiet=True)
    display.note = lines.append
    run = RunDir(tmp_path)
    run.log.write_text("2026-11-28T07:00:00Z script node001 rank0.stdout: of an attempt before\n")
    with script._Output(display) as output:
        output.begin(run)
        with open(run.log, "a") as log:
            for rank in (0, 1):
                log.write(f"2026-11-28T07:58:11Z script node001 rank{rank}.stdout: step 7\n")
            log.write("2026-11-28T07:58:11Z script node001 engine.stderr: what a launcher says\n")
            log.write("2026-11-28T07:58:12Z script: complete after 3 s\n")
    assert lines == ["07:58:11 script node001 rank[0-1].stdout: step 7"]
