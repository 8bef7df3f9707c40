"""Progress: an ETA from what has been done so far."""

from runner.report.progress import remaining_s


def test_the_rest_takes_as_long_as_what_is_done():
    assert remaining_s(30, 1, 4) == 90
    assert remaining_s(30, 4, 4) == 0
    assert remaining_s(30, 0, 4) is None
