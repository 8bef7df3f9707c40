"""Every test that has Slurm, on nodes of one release of the distribution: which Slurm it was, and what failed.

    make slurm RELEASE=trixie

The result is a row in benchmarks/results/slurm_releases.md; rows of other releases remain, and those of
other tests where only some were asked for. Needs root and podman, as the testbed does, and takes about half an hour on
two idle cores; `make test` runs a selection.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection
from pathlib import Path

from tabulate import tabulate

from runner.provision.testbed import containers, layout
from runner.system import process
from runner.system.places import ROOT

RESULT = ROOT / "benchmarks" / "results" / "slurm_releases.md"
TESTS = (
    "tests/faults/test_resume.py",
    "tests/faults/test_slurm_faults.py",
    "tests/roles/test_scenarios.py::test_scenario[slurm_cluster]",
    "tests/roles/test_scenarios.py::test_scenario[slurm_prolog]",
    "tests/testbed/test_backends.py",
    "tests/testbed/test_mpi.py",
    "tests/testbed/test_newer_slurm.py",
    "tests/testbed/test_slurm.py",
)
COLUMNS = ("release", "Slurm", "systemd", "Python", "MariaDB", "tests", "passed", "failed", "skipped", "minutes", "on")
INTRODUCTION = """# Slurm of several releases

    make slurm RELEASE=trixie

Every test that has Slurm, on nodes of that release: jobs and arrays followed, faults, resume, accounting, and the
scenarios of the roles `slurm_cluster` and `slurm_prolog`; a row of its own for what was run apart from the others.
Versions are those of the nodes; minutes are of the machine that ran them, beside whatever else it did. A test that
failed is named below the table.
"""


def versions(release: str) -> list[str]:
    """The versions of Slurm, systemd, Python and MariaDB on a node of `release`."""
    name = "slurm-releases"
    try:
        state = containers.up(layout.Options(nodes=1, name=name, release=release))
        script = (
            "apt-cache policy slurmctld mariadb-server | sed -n 's/ *Candidate: //p';"
            " systemctl --version | sed -n '1s/^systemd \\([0-9]*\\).*/\\1/p'; /usr/bin/python3 --version"
        )
        argv = ["podman", "exec", state["nodes"][0]["container"], "bash", "-c", script]
        slurm, mariadb, systemd, python = process.run(argv, timeout_s=60, check=True).stdout.splitlines()
    finally:
        containers.down(name)
    return [slurm, systemd, python.split()[-1], mariadb.partition(":")[2]]


def outcome(report: Path) -> tuple[dict[str, int], dict[str, bool]]:
    """How many tests of pytest's JUnit `report` passed, failed and were skipped, and for each whether it failed."""
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        failed[case.attrib["name"]] = kind == "failed"
    return counts, failed


def kept(release: str, tests: str, names: Collection[str]) -> tuple[list[list[str]], list[str]]:
    """The rows and the failures of the last result that remain beside that of these `tests` with these `names`."""
    text = RESULT.read_text() if RESULT.exists() else ""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in re.findall(r"^\| [a-z]+ .*\|$", text, re.M)
    ]
    failures = re.findall(r"^- .*$", text, re.M)
    return (
        [row for row in rows if row[0] != "release" and not (row[0] == release and tests in ("all", row[5]))],
        [line for line in failures if line not in {f"- {release}: `{name}`" for name in names}],
    )


def main() -> int:
    """Run the tests; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", required=True, help="code name, e.g. trixie")
    parser.add_argument("tests", nargs="*", help="only these files; default: every test that has Slurm")
    options = parser.parse_args()
    release, tests = options.release, options.tests or TESTS
    words = (
        "all" if tests is TESTS else " ".join(re.sub(r".*/(test_)?|\.py(::test_scenario)?", "", test) for test in tests)
    )
    row = [release, *versions(release), words]
    with tempfile.TemporaryDirectory() as folder:
        report, started = Path(folder) / "report.xml", time.monotonic()
        argv = [sys.executable, "-m", "pytest", "-m", "testbed or molecule", f"--release={release}"]
        code = subprocess.run([*argv, f"--junitxml={report}", *tests], timeout=7200, cwd=ROOT).returncode
        counts, failed = outcome(report)
    row += [*map(str, counts.values()), f"{(time.monotonic() - started) / 60:.0f}", time.strftime("%Y-%m-%d")]
    rows, failures = kept(release, words, failed)
    failures += [f"- {release}: `{name}`" for name, has in failed.items() if has]
    table = tabulate(sorted([*rows, row]), COLUMNS, tablefmt="github", disable_numparse=True)
    RESULT.write_text("\n".join([INTRODUCTION, table, "", *sorted(failures)]).rstrip() + "\n")
    print(f"{release}: {counts}; see {RESULT.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
