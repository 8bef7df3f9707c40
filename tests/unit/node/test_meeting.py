"""The supervisors of a cell meet: who has the secret is taken in, who has not learns nothing, and nobody leaves unseen."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from runner.node import meeting
from runner.node.meeting import Inbox, Meeting, Peer, Refused, Unreachable, meet

SECRET = "5" * 64


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def host(port: int) -> Iterator[Inbox]:
    """The inbox of a meeting on `port`."""
    inbox: Inbox = queue.Queue()
    held = Meeting(port, SECRET, inbox)
    yield inbox
    held.close()


@pytest.fixture(autouse=True)
def guests() -> Iterator[None]:
    """Ends the connections of the test's guests."""
    yield
    while GUESTS:
        GUESTS.pop().close()
    until = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(0.01)


GUESTS: list[Peer] = []


def guest(port: int, secret: str = SECRET, node: int = 1, seconds: float = 10) -> tuple[Peer, Inbox]:
    inbox: Inbox = queue.Queue()
    peer = meet("127.0.0.1", port, secret, node, inbox, time.monotonic() + seconds)
    GUESTS.append(peer)
    assert inbox.get(timeout=10) == (peer, {})
    return peer, inbox


def test_both_sides_hear_each_other_and_that_one_has_gone(port, host):
    there, heard = guest(port, node=3)
    here, first = host.get(timeout=10)
    assert (here.node, first) == (3, {}) and there.node == 0
    there.send({"address": "10.0.0.9"})
    assert host.get(timeout=10) == (here, {"address": "10.0.0.9"})
    here.send({"gcs": "x", "é": 1})
    assert heard.get(timeout=10) == (there, {"gcs": "x", "é": 1})
    there.close()
    assert host.get(timeout=10) == (here, None)
    here.send({"too": "late"})  # is no error


def test_another_secret_is_refused_at_once_and_nobody_is_taken_in(port, host):
    with pytest.raises(Refused):
        guest(port, secret="6" * 64)
    with pytest.raises(queue.Empty):
        host.get(timeout=0.2)


def test_who_comes_before_the_host_waits_for_it(port):
    inbox: Inbox = queue.Queue()
    held: list[Meeting] = []
    later = threading.Timer(0.5, lambda: held.append(Meeting(port, SECRET, inbox)))
    later.start()
    guest(port)
    later.join()
    held[0].close()


def test_who_meets_nobody_says_what_happened(port):
    with pytest.raises(Unreachable, match="Connection refused"):
        guest(port, seconds=0.3)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\n",
        b"[]\n",
        b"{}\n",
        b'{"node": "x", "nonce": 1}\n',
        b"",
        b"x" * 100_000,
    ],
)
def test_a_stranger_is_turned_away_and_harms_nobody(port, host, said):
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert b"proof" not in stranger.recv(4096)
    guest(port)
    assert host.get(timeout=10)[1] == {}


def test_who_knows_no_secret_is_not_taken_in_with_what_it_has_overheard(port, host):
    """Proofs are of nonces that each side chooses anew."""
    lines = []
    for proof in ("0" * 64, None):
        with socket.create_connection(("127.0.0.1", port)) as stranger, contextlib.ExitStack() as closed:
            stream = closed.enter_context(stranger.makefile("rw"))
            stream.write(json.dumps({"node": 1, "nonce": "a"}) + "\n")
            stream.flush()
            lines.append(json.loads(stream.readline()))
            stream.write(json.dumps({"proof": proof or lines[0]["proof"]}) + "\n")
            stream.flush()
            assert stream.readline() == ""
    assert lines[0]["nonce"] != lines[1]["nonce"] and host.empty()


def test_a_line_that_was_changed_on_its_way_ends_the_connection(port, host, monkeypatch):
    there, _ = guest(port)
    here, _ = host.get(timeout=10)
    write = meeting._write
    monkeypatch.setattr(
        meeting, "_write", lambda connection, line: write(connection, {**line, "text": json.dumps({"end": 0})})
    )
    there.send({"address": "10.0.0.9"})
    assert host.get(timeout=10) == (here, None)


def test_a_port_that_another_has_is_an_error(port):
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError):
        Meeting(port, SECRET, queue.Queue())


def test_a_connection_that_is_gone_before_it_is_taken_in_keeps_nobody_out(port, host, monkeypatch):
    accept, failed = socket.socket.accept, []

    def flaky(self):
        found = accept(self)
        if not failed:
            failed.append(found[0].close())
            raise ConnectionAbortedError(103, "Software caused connection abort")
        return found

    monkeypatch.setattr(meeting.socket.socket, "accept", flaky)
    guest(port)  # wakes the thread that had called the real one before
    guest(port, node=2)
    assert failed and {host.get(timeout=10)[0].node for _ in range(2)} == {1, 2}
