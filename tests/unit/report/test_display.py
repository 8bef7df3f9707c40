"""Progress: an ETA where the time that the rest takes is known, and none where it is not."""

import io
import sys

import pytest

from runner.report import progress
from runner.report.progress import Display


@pytest.mark.parametrize(
    ("left_s", "shown"),
    [
        (90.4, "half: 50 %, ETA 90 s\n"),
        (None, "half: 50 %\n"),  # however fast it has been so far
        (0.0, "half: 50 %\n"),
        (-20.0, "half: 50 %\n"),  # it takes longer than it did
    ],
)
def test_an_eta_is_shown_only_where_the_rest_is_known(left_s, shown, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", -1.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Display().at(1, 2, "half", left_s=left_s)
    assert sys.stderr.getvalue() == shown
