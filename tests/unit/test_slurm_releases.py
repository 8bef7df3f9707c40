"""What benchmarks/slurm_releases.py keeps of its last results. It itself runs every test that has Slurm."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from role_modules import ROOT

spec = importlib.util.spec_from_file_location("slurm_releases", ROOT / "benchmarks" / "slurm_releases.py")
releases = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = releases
spec.loader.exec_module(releases)

RESULT = """# Slurm of several releases

| release  | Slurm   | systemd | Python | MariaDB | tests    |
|----------|---------|---------|--------|---------|----------|
| bookworm | 22.05.8 | 252     | 3.11.2 | 10.11   | all      |
| trixie   | 24.11.5 | 257     | 3.13.5 | 11.8    | backends |
| trixie   | 24.11.5 | 257     | 3.13.5 | 11.8    | slurm    |

- bookworm: `test_a`
- trixie: `test_a`
- trixie: `test_b`
"""


@pytest.mark.parametrize(
    ("release", "tests", "names", "rows", "failures"),
    [
        ("trixie", "slurm", ["test_a"], ["bookworm all", "trixie backends"], ["bookworm test_a", "trixie test_b"]),
        ("trixie", "all", ["test_a", "test_b"], ["bookworm all"], ["bookworm test_a"]),
        ("bookworm", "all", ["test_a"], ["trixie backends", "trixie slurm"], ["trixie test_a", "trixie test_b"]),
        (
            "sid",
            "all",
            ["test_a"],
            ["bookworm all", "trixie backends", "trixie slurm"],
            ["bookworm test_a", "trixie test_a", "trixie test_b"],
        ),
    ],
)
def test_what_was_not_run_again_remains(monkeypatch, tmp_path, release, tests, names, rows, failures):
    monkeypatch.setattr(releases, "RESULT", tmp_path / "result.md")
    releases.RESULT.write_text(RESULT)
    left, failed = releases.kept(release, tests, names)
    assert [f"{row[0]} {row[5]}" for row in left] == rows
    assert failed == ["- {}: `{}`".format(*line.split()) for line in failures]


def test_a_test_that_failed_in_its_set_up_failed(tmp_path):
    report = tmp_path / "report.xml"
    cases = (
        'name="a"/>',
        'name="b"><error/></testcase>',
        'name="c"><failure/></testcase>',
        'name="d"><skipped/></testcase>',
    )
    report.write_text("<testsuite>" + "".join(f"<testcase {case}" for case in cases) + "</testsuite>")
    counts, failed = releases.outcome(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failed == {"a": False, "b": True, "c": True, "d": False}
