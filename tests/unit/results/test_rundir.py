"""The run directory: private, written whole or not at all, and honest about a controller that died."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from runner.errors import InfrastructureError, UsageError
from runner.results import records, rundir
from runner.results.rundir import RunDir
from runner.system import files, locks

PLAN = {
    "run_id": "20260102-030405-abcd",
    "nodes": [],
    "cells": [{"id": "c1", "hosts": ["h"]}, {"id": "c2", "hosts": ["h"]}],
}


def test_a_run_has_its_plan_before_anything_starts_and_is_private(tmp_path):
    run = RunDir.create(tmp_path, PLAN)
    assert run.read_plan() == PLAN
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "latest").resolve() == run.path
    assert run.read_status()["cells"]["c1"]["state"] == "planned"


def test_a_directory_is_created_as_a_whole_or_not_at_all(tmp_path):
    run = RunDir.create(tmp_path, PLAN)
    with pytest.raises(rundir.NameTaken):
        RunDir.create(tmp_path, {**PLAN, "cells": []})
    assert run.read_plan() == PLAN
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()  # nothing can be renamed to it
    with pytest.raises(InfrastructureError, match="cannot write to"):
        RunDir.create(tmp_path, {**PLAN, "run_id": "20260203-000000-ef01"})
    assert sorted(os.listdir(tmp_path)) == [PLAN["run_id"], "latest"]


def test_runs_that_begin_at_once_all_have_a_directory_and_one_is_the_latest(tmp_path):
    ids = [f"20260203-000000-{number:04x}" for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda run_id: RunDir.create(tmp_path, {**PLAN, "run_id": run_id}), ids))
    assert RunDir.find(tmp_path, None).path in [run.path for run in runs]
    assert sorted(os.listdir(tmp_path)) == [*ids, "latest"]


def test_runs_are_found_by_name_beginning_path_and_latest(tmp_path):
    first = RunDir.create(tmp_path, PLAN)
    second = RunDir.create(tmp_path, {**PLAN, "run_id": "20260203-000000-ef01"})
    assert RunDir.find(tmp_path, None).path == second.path
    assert RunDir.find(tmp_path, "20260102").path == first.path
    assert RunDir.find(tmp_path, str(first.path)).path == first.path
    assert [r.run_id for r in RunDir.all(tmp_path)] == [PLAN["run_id"], "20260203-000000-ef01"]
    with pytest.raises(UsageError, match="the name of a run is empty"):
        RunDir.find(tmp_path, "")
    with pytest.raises(UsageError, match="not unique"):
        RunDir.find(tmp_path, "2026")
    with pytest.raises(UsageError, match="no run 'x'"):
        RunDir.find(tmp_path, "x")
    with pytest.raises(UsageError, match="start one"):
        RunDir.find(tmp_path / "empty", None)


def test_a_run_whose_controller_was_killed_is_incomplete(tmp_path, held):
    run = RunDir.create(tmp_path, PLAN)
    status = run.read_status()
    status["state"] = status["cells"]["c1"]["state"] = "running"
    with held(run) as controller:
        run.write_status(status)
        assert run.read_status()["state"] == "running"
        assert run.controller() == controller.pid
        controller.kill()
    assert run.controller() is None
    assert run.read_status()["state"] == "incomplete"
    assert run.read_status()["cells"]["c1"]["state"] == "incomplete"
    assert run.read_status()["cells"]["c2"]["state"] == "planned"


def test_a_controller_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "PULSE_S", 0.1)
    run = RunDir.create(tmp_path, PLAN)
    with run.alive():
        assert run.beats(5)
    assert not run.beats(0.5)


def test_a_second_run_on_the_same_nodes_is_refused_naming_the_first(tmp_path):
    with (
        locks.hold_nodes(tmp_path, {"10.0.0.1:22": "a", "10.0.0.2:22": "b"}, "run-1"),
        pytest.raises(InfrastructureError, match="b is in use by run run-1"),
        locks.hold_nodes(tmp_path, {"10.0.0.2:22": "b", "10.0.0.3:22": "c"}, "run-2"),
    ):
        pass
    with locks.hold_nodes(tmp_path, {"10.0.0.2:22": "b", "10.0.0.3:22": "c"}, "run-3"):
        pass


def test_nodes_of_two_clusters_may_have_the_same_names(tmp_path):
    with (
        locks.hold_nodes(tmp_path, {"10.0.0.1:22": "node001"}, "run-1"),
        locks.hold_nodes(tmp_path, {"10.7.0.1:22": "node001"}, "run-2"),
    ):
        pass


def test_writes_are_whole_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    files.write_json_atomic(path, {"a": "é"})
    with pytest.raises(ValueError):
        files.write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": "é"}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(InfrastructureError, match="is full: free some space"),
        files.disk_errors(tmp_path),
        open("/dev/full", "w") as file,
    ):
        file.write("x")


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
@pytest.mark.parametrize("file", ["plan.json", "status.json"])
def test_a_damaged_run_is_one_line_and_hides_no_other(tmp_path, file, damage):
    run = RunDir.create(tmp_path, PLAN)
    (run.path / file).write_text(damage)
    with pytest.raises(UsageError, match=f"{file} is missing or damaged"):
        run.read_plan(), run.read_status()
    assert [r.run_id for r in RunDir.all(tmp_path)] == [run.run_id]


def test_records_that_are_none_are_passed_over():
    good = records.Record("r", "c", "sft", None, 1, 1, 1, "loss", 1.0).to_json()
    assert len(records.load(f'{{"schema": 1}}\n{good}\n{{"schema": 1, "torn')) == 1


@pytest.mark.parametrize("cells", [{}, [], None, {"a": 3}])
def test_a_status_without_cells_is_one_line(tmp_path, cells):
    run = RunDir.create(tmp_path, PLAN)
    run.write_status({**json.loads(run.status.read_text()), "cells": cells})
    with pytest.raises(
        UsageError, match=r"status.json is damaged, its cells are gone: restore it from a copy, or start"
    ):
        run.read_status()
