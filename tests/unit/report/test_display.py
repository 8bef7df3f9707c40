"""Progress: an ETA from what has been done so far."""

import io
import sys

import pytest

from runner.report import progress
from runner.report.progress import Display, remaining_s


def test_the_rest_takes_as_long_as_what_is_done():
    assert remaining_s(30, 1, 4) == 90
    assert remaining_s(30, 4, 4) == 0
    assert remaining_s(30, 0, 4) is None


@pytest.mark.parametrize(("eta", "shown"), [(True, "half: 50 %, ETA "), (False, "half: 50 %\n")])
def test_what_takes_nobody_knows_how_long_has_no_eta(eta, shown, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", -1.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Display().at(1, 2, "half", eta=eta)
    assert sys.stderr.getvalue().startswith(shown)
