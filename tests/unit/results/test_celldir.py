"""The folder of one cell on one node: names that runs before have, and that people know from the guide."""

from __future__ import annotations

from runner.results import celldir
from runner.results.celldir import CellDir


def test_the_names_are_those_of_runs_before(tmp_path):
    folder = CellDir(tmp_path)
    paths = [
        folder.job, folder.facts, folder.outcome, folder.messages, folder.telemetry, folder.engine_stdout,
        folder.engine_stderr, folder.events(3), folder.stream(3, "stdout"), celldir.stderr_of(folder.events(3)),
    ]  # fmt: skip
    assert {path.parent for path in paths} == {tmp_path}
    assert " ".join(path.name for path in paths) == (
        "job.json facts.json outcome.json messages.jsonl telemetry.jsonl engine.stdout engine.stderr "
        "rank3.jsonl rank3.stdout rank3.stderr"
    )


def test_ranks_are_those_that_have_begun(tmp_path):
    folder = CellDir(tmp_path / "cell")
    assert folder.all_events() == []
    folder.create()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    for path in (folder.events(0), folder.events(10), folder.stream(2, "stderr"), folder.telemetry):
        path.touch()
    assert [path.stem for path in folder.all_events()] == ["rank0", "rank10"]
    assert celldir.holds_events("rank0.jsonl") and not celldir.holds_events("rank0.stdout")
