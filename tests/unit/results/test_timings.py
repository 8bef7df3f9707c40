"""How long a cell takes is known from the last cells of the same kind, phase by phase, or not at all."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from runner.results import status, timings
from runner.results.rundir import RunDir
from runner.results.timings import Clock, Timings

PHASES = {"starting": 20.0, "loading": 10.0, "training": 100.0, "gathering": 5.0}
CELL = {"id": "sft-tiny-2n-r1", "test": "sft", "model": "tiny", "num_nodes": 2, "world_size": 4, "device": "cpu",
        "params": {"steps": 8}, "hosts": []}  # fmt: skip
PLAN = {"engine": "torchrun", "backend": "ssh", "inventory": "x", "nodes": [], "cells": [CELL]}


def earlier(results, number: int, state: str = "complete", phases: dict | None = None, **changed: Any) -> RunDir:
    """A run of one cell that took `phases`; `changed` are fields of its plan and of its cell."""
    cell = {key: changed.get(key, value) for key, value in CELL.items()}
    plan = {key: changed.get(key, value) for key, value in PLAN.items()} | {"cells": [cell]}
    run = RunDir.create(results, {**plan, "run_id": f"20260102-00000{number}-aaaa"})
    status = run.read_status()
    status["state"] = state
    status["cells"][CELL["id"]].update(state=state, phases=PHASES if phases is None else phases)
    run.write_status(status)
    return run


def left(of: Timings, phase: str, spent: dict[str, float] | None = None) -> float | None:
    clock = Clock()
    clock.seconds, clock.phase = spent or {}, phase
    return of.left_s(timings.kind(PLAN, CELL), clock)


def test_what_is_left_is_the_rest_of_the_phase_and_all_later_ones(tmp_path):
    earlier(tmp_path, 1)
    of = Timings(tmp_path)
    assert of.total_s(timings.kind(PLAN, CELL)) == 135
    assert left(of, "starting") == pytest.approx(135, abs=0.5)
    assert left(of, "loading") == pytest.approx(115, abs=0.5)
    assert left(of, "training", {"starting": 500.0}) == pytest.approx(105, abs=0.5), (
        "a slow start says nothing of steps"
    )
    assert left(of, "training", {"training": 400.0}) == pytest.approx(5, abs=0.5), "never negative"


def at(second: int) -> str:
    return f"2026-01-02T00:{second // 60:02}:{second % 60:02}Z"


@pytest.mark.parametrize(
    ("waits", "ended", "queued", "took"),
    [
        ([], 100, 0, 100),
        ([(0, 60)], 100, 60, 40),
        ([(10, 20), (50, 70)], 100, 30, 70),  # preempted, and queued again
        ([(5, None)], 100, 95, 5),  # cancelled in the queue
        ([(0, None)], None, 120, 0),  # it waits now
    ],
)
def test_what_a_cell_took_leaves_out_the_time_in_queues(waits, ended, queued, took):
    entry = status.cell_status(1) | {"started": at(0)}
    for since, until in waits:
        for waiting, second in ((True, since), (True, since + 1), (False, until)):
            if second is not None:
                status.note_queue(entry, waiting, at(second))
    if ended is not None:
        status.note_queue(entry, False, at(ended))
        entry["ended"] = at(ended)
    now = datetime(2026, 1, 2, 0, 2, tzinfo=UTC)
    assert (status.queued_s(entry, now), status.took_s(entry, now)) == (queued, took)
    earlier_version = {key: value for key, value in entry.items() if "queued" not in key}
    assert status.took_s(earlier_version, now) == queued + took


@pytest.mark.parametrize(
    "changed",
    [
        {"num_nodes": 4}, {"model": "llama-2-7b"}, {"params": {"steps": 9}}, {"backend": "slurm"}, {"device": "cuda"},
        {"inventory": "another"}, {"engine": "deepspeed"}, {"test": "torch"}, {"world_size": 8},
        {"state": "failed"}, {"phases": {}},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_known_from_another_kind_or_from_a_cell_that_did_not_complete(tmp_path, changed):
    earlier(tmp_path, 1, **changed)
    of = Timings(tmp_path)
    assert of.total_s(timings.kind(PLAN, CELL)) is None and left(of, "training") is None


def test_a_phase_that_no_earlier_cell_had_has_no_eta(tmp_path):
    earlier(tmp_path, 1)
    assert left(Timings(tmp_path), "compiling") is None


def test_the_newest_cells_count(tmp_path):
    for number, seconds in enumerate((1000.0, 10.0, 12.0, 11.0), start=1):
        earlier(tmp_path, number, phases={"training": seconds})
    of = Timings(tmp_path)
    assert of.total_s(timings.kind(PLAN, CELL)) == 11
    for _ in range(2):
        of.add(timings.kind(PLAN, CELL), {"training": 50.0})  # repeats of this run
    assert of.total_s(timings.kind(PLAN, CELL)) == 50


def test_runs_that_cannot_be_read_are_passed_over(tmp_path):
    earlier(tmp_path, 1).plan.write_text("{")
    earlier(tmp_path, 2).status.write_text('{"state": "complete", "cells": {}}')
    earlier(tmp_path, 3)
    assert Timings(tmp_path).total_s(timings.kind(PLAN, CELL)) == 135


def test_a_clock_adds_up_phases_and_leaves_out_what_says_nothing(monkeypatch):
    moment = [0.0]
    monkeypatch.setattr(timings.time, "monotonic", lambda: moment[0])
    clock = Clock()
    for phase, seconds in (("starting", 2.0), (None, 60.0), ("starting", 3.0), ("loading", 4.0), (None, 1.0)):
        clock.enter(phase)
        moment[0] += seconds
    assert clock.seconds == {"starting": 5.0, "loading": 4.0}
