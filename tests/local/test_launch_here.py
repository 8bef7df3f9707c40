"""`runner launch` on this machine: a program that the user stops leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from runner.results.rundir import RunDir
from runner.system import process

RUNNER = Path(sys.executable).with_name("runner")
# With a child that leaves its session and heeds neither Ctrl-C nor TERM.
STUBBORN = """
import os, subprocess, sys, time
stay = "import signal, time; signal.signal(2, 1); signal.signal(15, 1); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stay], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
open("child" + os.environ["RANK"], "w").write(str(child.pid))
time.sleep(600)
"""


def test_ctrl_c_ends_a_program_with_all_that_it_has_started(tmp_path, this_machine):
    (tmp_path / "stay.py").write_text(STUBBORN)
    words = [RUNNER, "launch", "-i", this_machine(), "--results", "results", "--engine", "none", "--", "stay.py"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launched:
        deadline = time.monotonic() + 60
        children = [tmp_path / "child0", tmp_path / "child1"]
        while not all(child.exists() and child.read_text() for child in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        launched.send_signal(signal.SIGINT)
        output, _ = launched.communicate(timeout=60)
    assert launched.returncode == 130, output
    assert output.splitlines()[-1] == "stopped by the user"
    assert all(child.read_text() for child in children)
    assert {process.state(int(child.read_text())) for child in children} <= {None, "Z"}  # init may take its time
    assert process.marked(f"{RunDir.find(tmp_path / 'results', None).run_id}/script") == []
