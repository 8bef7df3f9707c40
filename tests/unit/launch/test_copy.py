"""Copying to and from nodes: how rsync's end becomes a problem of a node."""

from __future__ import annotations

import pytest

from runner.launch import copy
from runner.system.process import Outcome

FULL = 'rsync: [receiver] write failed on "/data/a": No space left on device (28)'


@pytest.mark.parametrize(
    ("ends", "kinds", "tries"),
    [
        ([(11, ""), (11, FULL)], {"disk_full"}, 2),  # the receiver's last words were lost
        ([(11, FULL)], {"disk_full"}, 1),
        ([(11, ""), (0, "")], set(), 2),
        ([(11, ""), (11, "")], {"unknown"}, 2),
        ([(-15, "")], {"unknown"}, 1),  # ended here: not begun again
    ],
)
def test_an_error_of_a_file_without_a_word_is_asked_about_once_more(cluster, monkeypatch, ends, kinds, tries):
    left = iter(ends)
    calls = []

    def run(argv, **_):
        calls.append(argv)
        rc, stderr = next(left)
        return Outcome(tuple(argv), rc, 0.0, "", stderr)

    monkeypatch.setattr(copy.process, "run", run)
    problems = copy.send(cluster.nodes[:1], "F", "/from", "/to")
    assert {problem.kind for problem in problems.values()} == kinds and len(calls) == tries
