"""Which cells have a job: the ledger, and how status.json keeps it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.launch.slurm.ledger import Certainty, JobShare, Ledger, jobs_left
from runner.results.status import cell_status

IDS = st.none() | st.from_regex(r"[0-9]{1,6}(_[0-9]{1,3})?", fullmatch=True)
SHARES = st.builds(
    JobShare,
    IDS,
    st.none() | st.integers(0, 9),
    st.text(min_size=1, max_size=20),
    st.lists(st.text(min_size=1, max_size=8), max_size=4).map(tuple),
)


def status(allocation: dict, **cells: dict) -> dict:
    return {"state": "incomplete", "allocation": allocation, "cells": {n: cell_status(1) | c for n, c in cells.items()}}


@given(st.dictionaries(st.text(min_size=1, max_size=8), SHARES, max_size=4))
def test_what_is_written_is_read_back(shares):
    cells = {cell: {"state": "incomplete"} for cell in shares}
    again = Ledger.from_status({"cells": {n: cell_status(1) | c for n, c in cells.items()},
                                "allocation": Ledger(shares).to_json()})  # fmt: skip
    assert {cell: again.share(cell) for cell in again.cells} == shares
    assert again.inherited == set(shares)


@given(SHARES)
def test_a_share_has_the_form_that_earlier_versions_wrote(share):
    assert share.to_json() == [share.job_id, share.step, share.name, *share.hosts]


@pytest.mark.parametrize(
    ("cell", "inherited"),
    [
        ({"state": "incomplete", "started": "2026-01-02T03:04:05Z"}, True),
        ({"state": "incomplete", "started": None}, False),
        ({"state": "complete", "started": "2026-01-02T03:04:05Z"}, False),
        ({"state": "incomplete", "started": "x", "error": {"kind": "slurm_unreachable"}}, True),
        ({"state": "incomplete", "started": "x", "error": {"kind": "node_failed"}}, False),
    ],
)
def test_a_job_whose_end_was_not_seen_is_inherited(cell, inherited):
    assert ("c" in Ledger.from_status(status({}, c=cell)).inherited) == inherited


def test_a_share_of_a_cell_that_needs_none_is_dropped():
    kept = Ledger.from_status(status({"a": ["7", 0, "all"], "b": ["7", 1, "all"]}, a={"state": "complete"}, b={}))
    assert kept.cells == {"b"} and kept.inherited == {"b"}


def test_a_job_whose_cell_has_another_plan_or_none_is_of_no_use_any_more():
    changed = {"state": "incomplete", "started": "x", "error": {"kind": "plan_changed"}}
    shares = {name: [str(number), None, "j"] for number, name in enumerate("abcd")}
    found = Ledger.from_status(status(shares, a=changed, b={}, c={"state": "complete"}))
    assert (found.cells, found.outdated) == ({"b"}, {"0", "3"})
    shared = {"a": ["7", 0, "all"], "b": ["7", 1, "all"], "c": ["8_0", None, "j"], "d": ["8_1", None, "j"]}
    found = Ledger.from_status(status(shared, a=changed, b={}, c=changed, d={}))
    assert found.outdated == set(), "others go on in it"


def test_the_job_of_a_stage_that_is_not_asked_for_any_more_is_one_that_nobody_follows():
    left = status({"ppo": ["8", None, "j"]}, sft={"state": "complete", "ended": "2026-01-02T03:04:05Z"})
    assert jobs_left(left) == ["8"]


@pytest.mark.parametrize(
    ("ledger", "job_id", "standing"),
    [
        (Ledger(), "7", Certainty.NO_JOB),
        (Ledger({"c": JobShare("7", None, "c-1")}), None, Certainty.HAS_JOB),
        (Ledger({"c": JobShare(None, None, "c-1")}), "7", Certainty.MAY_HAVE_JOB),
        (Ledger(inherited=["c"]), "7", Certainty.HAS_JOB),
        (Ledger(inherited=["c"]), None, Certainty.MAY_HAVE_JOB),
    ],
)
def test_how_sure_a_job_is(ledger, job_id, standing):
    assert ledger.certainty("c", job_id) is standing


def test_one_job_whose_id_is_unknown_makes_all_ids_unknown():
    known = {"a": JobShare("7", 0, "all"), "b": JobShare("8", None, "b-1")}
    assert Ledger(known).job_ids() == {"7", "8"}
    assert Ledger(known | {"c": JobShare(None, None, "c-1")}).job_ids() is None
    assert Ledger(known).of_jobs({"8"}) == ["b"] and Ledger(known).of_jobs(None) == ["a", "b"]


def test_a_job_that_was_found_belongs_to_all_cells_of_its_file_but_the_complete_ones():
    ledger = Ledger({"a": JobShare(None, None, "all")}, inherited=["a"])
    before = ledger.cells
    ledger.note({name: JobShare("7", step, "all") for step, name in enumerate("abc")})
    ledger.reconcile("a", before, True, complete=["c"])
    assert ledger.cells == {"a", "b"} and ledger.inherited == {"a", "b"}


def test_a_job_that_slurm_does_not_have_leaves_nothing_to_follow():
    ledger = Ledger({"a": JobShare(None, None, "all"), "b": JobShare(None, None, "all")}, inherited=["a", "b"])
    before = ledger.cells
    ledger.drop(ledger.submitted_as("all"))
    ledger.reconcile("a", before, False, complete=[])
    assert not ledger.any_job
