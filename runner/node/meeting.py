"""The supervisors of a cell meet on its first node: each proves that it has the cell's secret, and stays connected.

A connection is a leash: its end means that the other side has gone. Lines of JSON, of which all after the first three
carry a seal that only the two sides can make. The standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

PATIENCE_S = 10.0  # for a line of the other side, before it has proved who it is
_RETRY_S = 0.2
_LONGEST = 1 << 16  # bytes of a line
# A connection whose other side is cut off is noticed after 10 + 3 × 5 s.
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class Refused(Exception):
    """The other side has another secret than this one."""


class Unreachable(Exception):
    """Nobody was met in time; the message says what happened last."""


# What a peer sends, with the peer: {} when it has come, None when it has gone.
Inbox = queue.Queue[tuple["Peer", Mapping[str, Any] | None]]


class Peer:
    """The other side of a connection, after both have proved the secret. `node` is its place in rank order."""

    def __init__(self, connection: socket.socket, lines: BinaryIO, key: bytes, node: int, inbox: Inbox) -> None:
        self.node = node
        self._connection, self._lines, self._key, self._inbox = connection, lines, key, inbox
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        inbox.put((self, {}))
        threading.Thread(target=self._receive, daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; one that cannot be sent is lost with the peer."""
        text = json.dumps(message)
        with contextlib.suppress(OSError):
            _write(self._connection, {"text": text, "seal": _proof(self._key, text)})

    def close(self) -> None:
        """End the connection."""
        _close(self._connection, None)  # its thread closes the lines, which it may be reading

    def _receive(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                line = _read(self._lines)
                text = str(line.get("text"))
                if not hmac.compare_digest(_proof(self._key, text), str(line.get("seal"))):
                    break
                self._inbox.put((self, json.loads(text)))
        _close(self._connection, self._lines)
        self._inbox.put((self, None))


class Meeting:
    """The first node's side: takes in whoever proves the secret, on `port` of every interface. Raises OSError."""

    def __init__(self, port: int, secret: str, inbox: Inbox) -> None:
        self._secret, self._inbox = secret.encode(), inbox
        self._listening = listener(port)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take in nobody any more."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # else accept() holds the port
        self._listening.close()

    def _accept(self) -> None:
        while self._listening.fileno() >= 0:
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EBADF):  # closed
                    return
                time.sleep(_RETRY_S)  # this one has gone, or no more files may be open
                continue
            threading.Thread(target=self._take_in, args=(connection,), daemon=True).start()

    def _take_in(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        lines = connection.makefile("rb")
        try:
            first = _read(lines)
            node, theirs, own = int(first["node"]), str(first["nonce"]), secrets.token_hex(16)
            _write(connection, {"nonce": own, "proof": _proof(self._secret, "host", theirs, own)})
            if not hmac.compare_digest(_proof(self._secret, f"guest {node}", theirs, own), str(_read(lines)["proof"])):
                raise ValueError("another secret")
            Peer(connection, lines, _key(self._secret, theirs, own), node, self._inbox)
        except (OSError, ValueError, KeyError, TypeError):  # a stranger
            _close(connection, lines)


def meet(address: str, port: int, secret: str, node: int, inbox: Inbox, deadline: float) -> Peer:
    """Connect to the first node, as often as it takes until `deadline` (time.monotonic).

    Raises Refused where that has another secret, Unreachable where it is not met in time.
    """
    said = "nobody answers"
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((address, port), timeout=min(PATIENCE_S, left_s))
        except OSError as error:
            said = error.strerror or str(error)
        else:
            lines = connection.makefile("rb")
            try:
                return _introduced(connection, lines, secret.encode(), node, inbox)
            except (OSError, ValueError, KeyError, TypeError) as error:  # not yet, or not the one
                said = f"it answers with {error}" if str(error) else said
                _close(connection, lines)
            except Refused:
                _close(connection, lines)
                raise
        time.sleep(_RETRY_S)
    raise Unreachable(said)


def _introduced(connection: socket.socket, lines: BinaryIO, secret: bytes, node: int, inbox: Inbox) -> Peer:
    own = secrets.token_hex(16)
    _write(connection, {"node": node, "nonce": own})
    answer = _read(lines)
    theirs = str(answer["nonce"])
    if not hmac.compare_digest(_proof(secret, "host", own, theirs), str(answer["proof"])):
        raise Refused
    _write(connection, {"proof": _proof(secret, f"guest {node}", own, theirs)})
    return Peer(connection, lines, _key(secret, own, theirs), 0, inbox)


def listener(port: int, families: Callable[[], bool] = socket.has_dualstack_ipv6) -> socket.socket:
    """A socket that listens on `port` of every interface. Raises OSError if another does on any."""
    family = socket.AF_INET6 if families() else socket.AF_INET
    found = socket.socket(family)
    try:
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier attempt may linger
        found.bind(("", port))
        found.listen(512)
    except OSError:
        found.close()
        raise
    return found


def _close(connection: socket.socket, lines: BinaryIO | None) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    if lines is not None:
        lines.close()


def _key(secret: bytes, guest: str, host: str) -> bytes:
    return hmac.digest(secret, f"key {guest} {host}".encode(), "sha256")


def _proof(secret: bytes, *words: str) -> str:
    return hmac.digest(secret, " ".join(words).encode(), "sha256").hex()


def _write(connection: socket.socket, line: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(line).encode() + b"\n")


def _read(lines: BinaryIO) -> dict[str, Any]:
    """The next line. Raises OSError, and ValueError for its absence or anything that is no object in JSON."""
    line = lines.readline(_LONGEST)
    value = json.loads(line) if line.endswith(b"\n") else None
    if not isinstance(value, dict):
        raise ValueError("not a line of this protocol")
    return value
