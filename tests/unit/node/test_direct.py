"""Ranks without a launcher: what each is told, and how the others end when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from runner.node import direct


def test_each_rank_is_told_its_place():
    places = direct.variables(nodes=2, ranks=2, node=1, address="10.0.0.1", port=20000)
    assert [(place["RANK"], place["LOCAL_RANK"]) for place in places] == [("2", "0"), ("3", "1")]
    common = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20000"}
    assert all(place.items() >= common.items() for place in places)


def supervise(body: str, ranks: int = 2) -> int:
    return direct.supervise([sys.executable, "-c", body], direct.variables(1, ranks, 0, "127.0.0.1", 20000), 1.0)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 0),
        ("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)", 7),
        ("import os, time\nif os.environ['RANK'] == '0': os.kill(os.getpid(), 9)\ntime.sleep(60)", 137),
    ],
)
def test_the_first_rank_that_fails_gives_the_status_and_ends_the_others(body, status):
    began = time.monotonic()
    assert supervise(body) == status
    assert time.monotonic() - began < 30


def test_a_rank_that_ignores_term_is_killed(capfd):
    stubborn = (
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\n"
        "time.sleep(1 if os.environ['RANK'] == '1' else 60)\nsys.exit(3)"
    )
    assert supervise(stubborn) == 3
    pids = [int(word) for word in capfd.readouterr().out.split()]
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_the_rank_that_failed_first_is_named_as_torchrun_names_it(capfd):
    supervise("import os, sys\nsys.exit(int(os.environ['RANK']) and 5)")
    from runner.launch import blame
    from runner.node.protocol import Outcome

    told = capfd.readouterr().err.splitlines()
    outcome = Outcome.from_json({"rc": 5, "engine_stderr": told, "ranks": {}})
    error = blame.blame([blame.AgentSession("a", (), {}, rc=0)], {"a": outcome})
    assert "status 5" in error["message"]


def test_a_signal_goes_on_to_every_rank():
    body = "import sys, time; print('up', flush=True); time.sleep(60)"
    script = (
        "import sys; from runner.node import direct\n"
        f"sys.exit(direct.supervise([sys.executable, '-c', {body!r}], direct.variables(1, 2, 0, 'a', 1)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE) as child:
        assert child.stdout and [child.stdout.readline(), child.stdout.readline()] == [b"up\n", b"up\n"]
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 128 + signal.SIGTERM
