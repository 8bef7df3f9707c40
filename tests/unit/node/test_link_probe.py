"""What a node says of its links: real sockets on the loopback, settings of power in a folder of the test."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from runner.node import links
from runner.node.protocol import Linked, Reached, Word, read_message
from runner.node.requests import LinksRequest


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start(request: LinksRequest) -> subprocess.Popen[str]:
    """An agent as a controller starts it."""
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "runner.node"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin
    child.stdin.write(json.dumps(request.to_json()) + "\n")
    child.stdin.flush()
    return child


def test_an_agent_listens_until_it_is_told_to_stop_and_tries_the_others_in_between(port):
    agent = start(LinksRequest([port], {"itself": "127.0.0.1", "nobody": "127.0.0.2", "unknown": "no.such.invalid"}))
    assert agent.stdin and agent.stdout
    linked = read_message(agent.stdout.readline())
    assert isinstance(linked, Linked) and not linked.taken
    socket.create_connection(("127.0.0.1", port), 5).close()  # both kinds of addresses
    agent.stdin.write(f"{Word.GO}\n")
    agent.stdin.flush()
    reached = read_message(agent.stdout.readline())
    assert isinstance(reached, Reached) and set(reached.failed) == {"unknown"}, "the loopback has 127.0.0.2 as well"
    assert "not known there" in reached.failed["unknown"][str(port)]
    socket.create_connection(("127.0.0.1", port), 5).close()
    agent.stdin.write(f"{Word.STOP}\n")
    agent.stdin.close()
    assert agent.wait(10) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    agent.stdout.close()


def test_an_agent_whose_controller_is_gone_ends(port):
    agent = start(LinksRequest([port]))
    agent.communicate(timeout=20)
    assert agent.returncode == 0


def test_a_port_that_another_process_has_is_named_and_no_fault_of_this(port):
    with socket.create_server(("127.0.0.1", port)):
        listeners, taken = links.listen([port])
    assert listeners == [] and taken == [port]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(), links.NO_ANSWER), (ConnectionRefusedError(111, "refused"), links.REFUSED),
        (OSError(113, "x"), links.NO_ROUTE), (OSError(101, "x"), links.NO_ROUTE), (OSError(22, "x"), links.NO_ROUTE),
        (PermissionError(1, "x"), links.NOT_PERMITTED), (OSError(99, "something else"), "something else"),
    ],
)  # fmt: skip
def test_the_reason_of_a_connection_that_failed_is_in_words(monkeypatch, error, reason):
    def fail(*_):
        raise error

    monkeypatch.setattr(links.socket, "create_connection", fail)
    assert links.connect({"b": "10.0.0.2"}, [29500]) == {"b": {"29500": reason}}


def test_a_way_that_loses_the_first_packet_is_open(monkeypatch):
    tries = iter([TimeoutError(), None])

    def once(*_):
        if error := next(tries):
            raise error
        return io.BytesIO()

    monkeypatch.setattr(links.socket, "create_connection", once)
    assert links.connect({"b": "10.0.0.2"}, [29500]) == {}


def cpu(root: Path, number: int, **values: str) -> None:
    folder = root / f"sys/devices/system/cpu/cpu{number}/cpufreq"
    folder.mkdir(parents=True)
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")


FREQ = "/sys/devices/system/cpu/cpu{}/cpufreq"


@pytest.mark.parametrize(
    ("cpus", "found"),
    [
        ([], {}),
        ([{"scaling_driver": "acpi-cpufreq", "scaling_governor": "performance"}], {}),
        ([{"scaling_driver": "acpi-cpufreq", "scaling_governor": "schedutil"}], {}),
        ([{"scaling_driver": "acpi-cpufreq", "scaling_governor": "powersave"}],
         {f"{FREQ.format(0)}/scaling_governor": "powersave"}),
        # One core that is left out of a script is slow as all are.
        ([{"scaling_driver": "acpi-cpufreq", "scaling_governor": "performance"},
          {"scaling_driver": "acpi-cpufreq", "scaling_governor": "powersave"}],
         {f"{FREQ.format(1)}/scaling_governor": "powersave"}),
        ([{"scaling_driver": "intel_pstate", "scaling_governor": "powersave",
           "energy_performance_preference": "balance_performance"}], {}),
        ([{"scaling_driver": "amd-pstate-epp", "scaling_governor": "powersave",
           "energy_performance_preference": "power"}],
         {f"{FREQ.format(0)}/energy_performance_preference": "power"}),
        ([{"scaling_driver": "intel_cpufreq", "scaling_governor": "powersave"}],
         {f"{FREQ.format(0)}/scaling_governor": "powersave"}),
    ],
)  # fmt: skip
def test_what_holds_the_cpus_back_is_named_with_the_file_that_shows_it(tmp_path, cpus, found):
    for number, values in enumerate(cpus):
        cpu(tmp_path, number, **values)
    assert links.slow_settings(tmp_path) == found


def test_a_laptops_profile_is_one_of_them(tmp_path):
    file = tmp_path / "sys/firmware/acpi/platform_profile"
    file.parent.mkdir(parents=True)
    file.write_text("low-power\n")
    assert links.slow_settings(tmp_path) == {"/sys/firmware/acpi/platform_profile": "low-power"}
    file.write_text("balanced\n")
    assert links.slow_settings(tmp_path) == {}


@pytest.mark.parametrize(
    ("programs", "answer", "found"),
    [
        ({}, "", ("", "")),
        ({"iptables"}, "", ("iptables", "")),
        ({"nft", "iptables"}, '{"nftables": [{"metainfo": {}}, {"chain": {"family": "ip", "table": "t", "name": "o", '
         '"hook": "output"}}, {"chain": {"family": "inet", "table": "fw", "name": "IN", "hook": "input"}}]}',
         ("nft", "inet fw IN")),
        ({"nft"}, "", ("nft", "")),  # not permitted
    ],
)  # fmt: skip
def test_the_firewall_is_named_by_the_program_that_shows_it(tmp_path, monkeypatch, programs, answer, found):
    for name in programs:
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ncat <<'E'\n{answer}\nE\n")
        program.chmod(0o755)
    which = links.shutil.which
    monkeypatch.setattr(links.shutil, "which", lambda name, path=None: which(name, path=str(tmp_path)))
    monkeypatch.setattr(links, "Path", lambda path: Path(f"{tmp_path}{path}"))
    assert links._firewall() == found
    assert os.environ["PATH"]
