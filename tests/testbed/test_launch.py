"""`runner launch` over SSH, for real: a script that knows nothing of Shakedown, its words, its exit code, its end."""

from __future__ import annotations

import time

import pytest

from runner.system import process
from testbed.benches import RUNNER, Bench, inside, until

pytestmark = pytest.mark.testbed

# A plain torchrun script: gloo's world, its own words, and a child that ignores whatever ends its parent.
SCRIPT = """
import os, signal, subprocess, sys, time
import torch.distributed as dist

if sys.argv[1] == "stay":
    subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"],
                     start_new_session=True)
dist.init_process_group("gloo")
print("world", dist.get_world_size(), [os.fsencode(word) for word in sys.argv[2:]], flush=True)
dist.barrier()
if sys.argv[1] == "stay":
    open("begun", "w").close()
    time.sleep(600)
code = int(sys.argv[1])
sys.exit(code if dist.get_rank() == dist.get_world_size() - 1 else 0)
"""
WORDS = ["--json", "a b;$(id)", 'it\'s "q"', "*", "größe", "", "two\nlines", b"\xff".decode(errors="surrogateescape")]


class Launch(Bench):
    program = (RUNNER, "launch")


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    return folder / "train.py"


def test_a_plain_script_runs_on_two_nodes_and_its_code_comes_through(testbed8, tmp_path, script):
    launched = Launch(testbed8.inventory, tmp_path / "results", "--nodes", "2", "--", str(script), "7", *WORDS)
    code, output = launched.end()
    assert code == 7, output
    assert "the program ended with code 7" in output.splitlines()[-1]
    entry = launched.run.read_status()["cells"]["script"]
    assert (entry["state"], entry["exit_code"], entry["error"]["kind"]) == ("failed", 7, "script_failed")
    said = [path.read_text() for path in launched.run.path.glob("nodes/*/script/rank*.stdout")]
    assert said == [f"world 2 {[word.encode(errors='surrogateescape') for word in WORDS]}\n"] * 2
    assert process.marked(launched.marker) == []  # this kernel is the nodes': it sees every process of theirs


def test_a_program_that_is_killed_ends_everywhere_and_gives_its_signal(testbed8, tmp_path, script):
    launched = Launch(testbed8.inventory, tmp_path / "results", "--nodes", "2", "--", str(script), "stay")
    node = testbed8.container("node002")
    begun = "ls /var/tmp/shakedown/work/*/begun >/dev/null 2>&1 && echo yes || true"
    if not until(lambda: "yes" in inside(node, begun), 120):
        launched.leave()
        pytest.fail(launched.end()[1])
    inside(node, "pkill -9 -f '[t]rain.py stay'")
    killed = time.monotonic()
    code, output = launched.end(60)
    assert code == 137, output
    assert time.monotonic() - killed < 45
    error = launched.run.read_status()["cells"]["script"]["error"]
    assert error["host"] == testbed8.nodes[1]["name"] and "SIGKILL" in error["message"]
    assert until(lambda: process.marked(launched.marker) == [], 20)
