"""What OpenSSH, rsync, sudo and shells say where a node is not reached, and what it means for the user.

A message is judged by the lines that these programs write themselves, each as a whole and the last one first, and by
who can have failed with that status: what a banner, a login script or a message of the day says changes nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node

GIVEN_UP = -1  # the status of a talk that did not end when requested


@dataclass(frozen=True)
class _Reason:
    """A line of a program, as a pattern of it as a whole (`host`: which host it is about), with its kind and meaning.

    `last_resort`: it follows another line that says more, where there is one.
    """

    pattern: re.Pattern[str]
    kind: str
    meaning: str
    last_resort: bool = False


def _line(pattern: str, kind: str, meaning: str, last_resort: bool = False) -> _Reason:
    return _Reason(re.compile(pattern), kind, meaning, last_resort)


_CONNECT = r"ssh: connect to host (?P<host>\S+) port \d+: "
_FORWARD = r"channel \d+: open failed: connect failed: "  # a jump host speaks of the node behind it
_CHANGED = "its host key differs from the pinned one: find out why before you trust it"
_REVOKED = "its host key is revoked in known_hosts: it must not be trusted"
_NOTHING_LISTENS, _NO_ANSWER, _NO_ROUTE = (
    "nothing listens on its SSH port",
    "no answer on its SSH port",
    "no route to it",
)
_LOST, _CLOSED = "the connection to it was lost", "it closed the connection"

_SSH = (
    # Before a session.
    _line(r"@\s+WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!\s+@", "host_key_changed", _CHANGED),
    _line(
        r"Host key for (?P<host>\S+) has changed and you have requested strict checking\.", "host_key_changed", _CHANGED
    ),
    _line(
        r"No \S+ host key is known for (?P<host>\S+) and you have requested strict checking\.",
        "host_key_unknown",
        "no host key of it is known: pin it with ssh-keyscan",
    ),
    _line(r"The \S+ host key for (?P<host>\S+) is marked as revoked\.", "host_key_changed", _REVOKED),
    _line(r"\S+ host key for (?P<host>\S+) was revoked and you have .*", "host_key_changed", _REVOKED),
    _line(r"Certificate invalid: .*", "host_key_changed", "the certificate of its host key is not valid for it"),
    _line(
        r"Host key verification failed\.",
        "host_key_changed",
        "its host key is not the pinned one: compare it, then correct the inventory",
        last_resort=True,
    ),
    _line(
        r"(?:(?:\S+@)?(?P<host>\S+): )?Permission denied \(\S*\)\.",
        "refused_key",
        "it refuses the key for this user",
    ),
    _line(
        r"Received disconnect from \S+ port \d+:2: Too many authentication failures",
        "refused_key",
        "it refuses the first keys, and lets no more be tried",
    ),
    # Of a node that is paused or overloaded the kernel still accepts connections.
    _line(
        r"Connection timed out during banner exchange",
        "hung",
        "it accepts connections, but nothing answers on its SSH port",
    ),
    *(
        _line(f"{before}(?:{after})", "unreachable", meaning)
        for before in (_CONNECT, _FORWARD)
        for after, meaning in (
            (r"Connection refused", _NOTHING_LISTENS),
            (r"(?:Connection|Operation) timed out", _NO_ANSWER),
            (r"No route to host|Network is unreachable|Host is (?:down|unreachable)", _NO_ROUTE),
        )
    ),
    _line(r"ssh: Could not resolve hostname (?P<host>\S+): .*", "unreachable", "its name does not resolve"),
    _line(
        _FORWARD + r"(?:Name or service not known|Temporary failure in name resolution|.*hostname.*)",
        "unreachable",
        "its name does not resolve on the jump host",
    ),
    _line(
        r"channel \d+: open failed: administratively prohibited: .*",
        "unreachable",
        "the jump host does not forward connections to it",
    ),
    # How a session ends.
    _line(r"Timeout, server (?P<host>\S+) not responding\.", "hung", "it no longer answers"),
    _line(r"Connection to (?P<host>\S+) closed by remote host\.", "lost_connection", _CLOSED),
    _line(
        r"(?:Read from remote host|packet_write_wait:|ssh_dispatch_run_fatal:|client_loop: send disconnect:) .*",
        "lost_connection",
        _LOST,
    ),
    # Where it only sees that the way to it, a jump host, has ended.
    _line(r"Connection (?:closed|reset) by UNKNOWN port (?:65535|-1)", "lost_connection", _CLOSED, last_resort=True),
    _line(r"Connection closed by \S+ port \d+", "lost_connection", _CLOSED),
    _line(r"Connection reset by \S+ port \d+", "lost_connection", _LOST),
    _line(r"(?:kex|ssh)_exchange_identification: .*closed.*", "lost_connection", _CLOSED, last_resort=True),
    _line(r"(?:kex|ssh)_exchange_identification: .*", "lost_connection", _LOST, last_resort=True),
)

_RSYNC = (
    _line(r"\[\w+\] io timeout after \d+ seconds.*", "hung", "it no longer reads or writes its files"),
    _line(r"rsync: .*: No space left on device(?: \(28\))?", "disk_full", "its disk is full"),
    _line(r"rsync: .*: Disk quota exceeded(?: \(122\))?", "disk_full", "its disk quota is used up"),
    _line(
        r"rsync: .*: Permission denied(?: \(13\))?",
        "not_permitted",
        "its files may not be read or written by this user",
    ),
    _line(r"rsync error: remote command not found .*", "environment_missing", "it has no rsync"),
    _line(r"rsync: connection unexpectedly closed.*", "lost_connection", _LOST, last_resort=True),
    _line(
        r"rsync: .*: (?:Broken pipe \(32\)|Connection reset by peer \(104\))",
        "lost_connection",
        _LOST,
        last_resort=True,
    ),
)

# What ssh started there: shells, sudo and Python.
_THERE = (
    _line(
        r"sudo: a (?:password|terminal) is required\b.*",
        "refused_key",
        "`sudo` asks for a password there: allow this user NOPASSWD",
    ),
    _line(r"Sorry, user \S+ (?:is not allowed to|may not) .*", "refused_key", "`sudo` does not allow it to this user"),
    _line(r"\S*sh: .*: Permission denied", "not_permitted", "its environment may not be used by this user"),
    _line(r"(?:OSError: \[Errno 28\] |\S*sh: .*: )No space left on device.*", "disk_full", "its disk is full"),
    _line(r"(?:OSError: \[Errno 122\] |\S*sh: .*: )Disk quota exceeded.*", "disk_full", "its disk quota is used up"),
    _line(
        r"\S*python[\d.]*: (?:Error while finding module specification for .*)?\(?(?:ModuleNotFoundError: )?"
        r"No module named .*",
        "environment_missing",
        "its environment lacks this package",
    ),
    _line(r"ModuleNotFoundError: No module named .*", "environment_missing", "its environment lacks a package"),
)


_NOT_FOUND = (126, 127)  # the exit status of a shell for a program that it cannot start


_SSH_FAILED = 255


# How Ansible begins the message that has ssh's lines in it.
_ANSIBLE = re.compile(r".*?(?:connect to the host via ssh|can be reached over ssh): ")


def _said(rc: int | None, stderr: Sequence[str]) -> Iterator[tuple[_Reason, str]]:
    """The lines that tell why a command with the status `rc` failed, the last one first, with what each means."""
    lines = [_ANSIBLE.sub("", line).strip() if rc is None else line.strip() for line in stderr]
    copied = any(line.startswith(("rsync: ", "rsync error: ")) for line in lines)
    reasons = [
        *(_SSH if copied or rc in (None, _SSH_FAILED) else ()),
        *(_RSYNC if copied else ()),
        *(_THERE if rc != _SSH_FAILED else ()),
    ]
    for line in reversed(lines):
        if reason := next((reason for reason in reasons if reason.pattern.fullmatch(line)), None):
            yield reason, line


def _reason(rc: int | None, stderr: Sequence[str]) -> tuple[_Reason, str] | None:
    """The line that tells why the command failed, and what it means; None where no line does."""
    if rc == GIVEN_UP:  # nothing that was said ended it
        return None
    said = list(_said(rc, stderr))
    return next((one for one in said if not one[0].last_resort), said[0] if said else None)


def _other_host(node: Node, reason: _Reason, line: str) -> str:
    """Which host the line is about, where it is not `node` but one on the way to it."""
    match = reason.pattern.fullmatch(line)
    host = (match.groupdict().get("host") or "") if match else ""
    host = host.lstrip("[").partition("]:")[0]
    known = ("", node.name, node.alias, node.address, node.host_key_alias)
    return "" if host in known else f", on the way to it: {host}"


def reason_kind(rc: int | None, stderr: Sequence[str]) -> str:
    """The kind of failure (`failures.KINDS`) of a command that did not reach a node's agent.

    `rc` is its exit status, None if unknown; `stderr` are its lines.
    """
    if found := _reason(rc, stderr):
        return found[0].kind
    if rc in _NOT_FOUND:
        return "environment_missing"
    return {GIVEN_UP: "hung", _SSH_FAILED: "unreachable"}.get(rc or 0, "unknown")


def setup_command(node: Node, role: str) -> str:
    """The command that brings the node's inventory to the state of `role`; never that of the default inventory."""
    return shlex.join(["runner", "setup", *(["-i", node.inventory] if node.inventory else []), "--tags", role])


def explain(node: Node, rc: int | None, stderr: Sequence[str]) -> str:
    """Why `node` did not answer, in one line; `rc` is the exit status (None if unknown), `stderr` are the lines."""
    if found := _reason(rc, stderr):
        reason, line = found
        if not BACKENDS[node.backend].by_ssh:
            return reason.meaning
        user = f", user {node.user}" if node.user else ""
        return f"{reason.meaning}{_other_host(node, reason, line)} ({node.endpoint}{user})"
    if rc in _NOT_FOUND:
        from runner.cluster.scaffold import PYTHON

        # Role conda_env does not read runner_python: another path would be missing afterwards, too.
        there = f", and set runner_python: {PYTHON} (or conda_env_prefix)" if node.python != PYTHON else ""
        return f"has no {node.python}: provision it with `{setup_command(node, 'conda_env')}`{there}"
    if rc == GIVEN_UP:
        return "is up but does not answer in time"
    lines = [line.strip() for line in stderr if line.strip()]
    first = next((line for line in lines if line.startswith("rsync: ")), None)  # the lines after it are a summary
    return first or (lines[-1] if lines else f"ended with status {rc} and no output")
