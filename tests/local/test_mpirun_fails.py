"""This machine's own mpirun where it cannot start ranks, whatever its version says: told as what it is, on its node."""

from __future__ import annotations

import os
import shutil

import pytest

from runner.launch.unstarted import unstarted
from runner.node import lastwords
from runner.system import process

pytestmark = [
    pytest.mark.local,
    pytest.mark.skipif(not shutil.which("mpirun"), reason="no Open MPI on this machine"),
]
# A shell where ssh would be: it reaches nothing.
REMOTE = """#!/bin/sh
for word; do case "$word" in node00*) host=$word; break;; esac; done
echo "{says}" | sed "s/HOST/$host/" >&2
exit {status}
"""


def mpirun(tmp_path, *words, says="", status=127):
    shell = tmp_path / "remote"
    shell.write_text(REMOTE.format(says=says, status=status))
    shell.chmod(0o755)
    env = {
        **os.environ,
        "OMPI_MCA_plm": "rsh",
        "OMPI_MCA_plm_rsh_agent": str(shell),
        "PRTE_MCA_plm_ssh_agent": str(shell),
        "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
        "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
    }
    outcome = process.run(["mpirun", "--allow-run-as-root", *words], timeout_s=60, env=env)
    assert outcome.rc, outcome
    return unstarted(lastwords.keep(outcome.stderr.splitlines()))


@pytest.mark.parametrize("says, status, kind", [
    ("bash: line 1: orted: command not found", 127, "environment_missing"),
    ("env: 'orted': No such file or directory", 127, "environment_missing"),
    ("orted: error while loading shared libraries: libopen-rte.so.40: cannot open shared object file", 127, "environment_missing"),
    ("ssh: connect to host HOST port 44222: Connection refused", 255, "unreachable"),
    ("root@HOST: Permission denied (publickey).", 255, "refused_key"),
])  # fmt: skip
def test_a_daemon_that_does_not_start(tmp_path, says, status, kind):
    found = mpirun(tmp_path, "--host", "node001:1,node002:1", "-np", "2", "hostname", says=says, status=status)
    assert found is not None and found.kind == kind and found.host in ("node001", "node002")


def test_a_program_that_is_missing(tmp_path):
    found = mpirun(tmp_path, "--host", "localhost:1", "-np", "1", "/nowhere/python")
    assert found is not None and found.kind == "environment_missing" and "/nowhere/python" in found.message


def test_fewer_slots_than_ranks(tmp_path):
    found = mpirun(tmp_path, "--host", "localhost:1", "-np", "2", "hostname")
    assert found is not None and found.kind == "launcher_failed" and "slots" in found.message
