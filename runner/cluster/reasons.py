"""Error messages of OpenSSH and shells, and what they mean for the user."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node

GIVEN_UP = -1  # the status of a talk that did not end when requested


# (a part of the message, the kind of failure, the meaning for the user)
_REASONS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "host_key_changed",
        "its host key differs from the pinned one: find out why before you trust it",
    ),
    ("host key is known for", "host_key_unknown", "no host key of it is known: pin it with ssh-keyscan"),
    ("is marked as revoked", "host_key_changed", "its host key is revoked in known_hosts: it must not be trusted"),
    ("Certificate invalid", "host_key_changed", "the certificate of its host key is not valid for it"),
    (
        "Host key verification failed",
        "host_key_changed",
        "its host key is not the pinned one: compare it, then correct the inventory",
    ),
    ("Permission denied", "refused_key", "it refuses the key for this user"),
    ("sudo: a password is required", "refused_key", "`sudo` asks for a password there: allow this user NOPASSWD"),
    # Of a node that is paused or overloaded the kernel still accepts connections.
    ("during banner exchange", "hung", "it accepts connections, but nothing answers on its SSH port"),
    ("Timeout, server", "hung", "it no longer answers"),
    ("io timeout after", "hung", "it no longer reads or writes its files"),
    ("No space left on device", "disk_full", "its disk is full"),
    ("Disk quota exceeded", "disk_full", "its disk quota is used up"),
    ("Connection refused", "unreachable", "nothing listens on its SSH port"),
    ("Connection timed out", "unreachable", "no answer on its SSH port"),
    ("Operation timed out", "unreachable", "no answer on its SSH port"),
    ("No route to host", "unreachable", "no route to it"),
    ("Could not resolve hostname", "unreachable", "its name does not resolve"),
    ("Connection closed", "lost_connection", "it closed the connection"),
    ("closed by remote host", "lost_connection", "it closed the connection"),
    ("Connection reset", "lost_connection", "the connection to it was lost"),
    ("Broken pipe", "lost_connection", "the connection to it was lost"),
    ("connection unexpectedly closed", "lost_connection", "the connection to it was lost"),
    ("No module named", "environment_missing", "its environment lacks this package"),
    ("ModuleNotFoundError", "environment_missing", "its environment lacks a package"),
)


_NOT_FOUND = (126, 127)  # the exit status of a shell for a program that it cannot start


_SSH_FAILED = 255


# How ssh names the host that its message is about: a jump host's own key or login may be what fails.
_NAMED = re.compile(r"host key is known for (\S+) and|^(?:\S+@)?(\S+): Permission denied", re.MULTILINE)


def _other_host(node: Node, text: str) -> str:
    """Which host the message is about, where it is not `node` but one on the way to it."""
    match = _NAMED.search(text)
    if match is None:
        return ""
    host = next(filter(None, match.groups())).lstrip("[").partition("]:")[0]
    known = (node.name, node.alias, node.address, node.host_key_alias)
    return "" if host in known else f", on the way to it: {host}"


def reason_kind(rc: int | None, stderr: Sequence[str]) -> str:
    """The kind of failure (`failures.KINDS`) of a command that did not reach a node's agent.

    `rc` is its exit status, None if unknown; `stderr` are its lines.
    """
    text = "\n".join(stderr)
    for needle, kind, _ in _REASONS:
        if needle in text:
            return kind
    if rc in _NOT_FOUND:
        return "environment_missing"
    return {GIVEN_UP: "hung", _SSH_FAILED: "unreachable"}.get(rc or 0, "unknown")


def setup_command(node: Node, role: str) -> str:
    """The command that brings the node's inventory to the state of `role`; never that of the default inventory."""
    return shlex.join(["runner", "setup", *(["-i", node.inventory] if node.inventory else []), "--tags", role])


def explain(node: Node, rc: int | None, stderr: Sequence[str]) -> str:
    """Why `node` did not answer, in one line; `rc` is the exit status (None if unknown), `stderr` are the lines."""
    text = "\n".join(stderr)
    for needle, _, meaning in _REASONS:
        if needle in text:
            if not BACKENDS[node.backend].by_ssh:
                return meaning
            user = f", user {node.user}" if node.user else ""
            return f"{meaning}{_other_host(node, text)} ({node.endpoint}{user})"
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
