"""Backends: how the agent (`runner.node`) is reached on nodes. ClusterShell does the fan-out.

A backend is a function from a node and a Python argument list to the command that runs it there;
`converse` starts one agent per node, feeds each its request, keeps the leash alive and passes on what
they say.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.cluster.inventory import Node
from runner.cluster.reasons import GIVEN_UP, explain, reason_kind
from runner.failures import Problem
from runner.node.protocol import HEARTBEAT_S, LAST_WORDS, POLL_S, Alive, Message, Request, Word, read_message
from runner.system import process

AGENT = ("-P", "-u", "-m", "runner.node")
AGENT_END_S = 15.0


def local(node: Node, arguments: Sequence[str], ssh_config: str | None) -> list[str]:
    return [node.python, *arguments]


def ssh(node: Node, arguments: Sequence[str], ssh_config: str | None) -> list[str]:
    # The remote login shell reads this string: the one place where it is quoted.
    return ["ssh", "-F", str(ssh_config), node.name, shlex.join(["exec", node.python, *arguments])]


COMMANDS: dict[str, Callable[[Node, Sequence[str], str | None], list[str]]] = {"local": local, "ssh": ssh}


@dataclass
class Talk:
    """One conversation with one agent: what starts it, what it is asked, how it ended."""

    name: str
    argv: Sequence[str]
    request: Mapping[str, Any]
    rc: int | None = None
    stderr: list[str] = field(default_factory=list)
    answered: bool = False  # it sent at least one message
    heard: float = 0.0  # monotonic time of its last output
    told: str | None = None  # the last word sent to it

    @property
    def alive(self) -> bool:
        return self.rc is None


def converse(
    talks: Sequence[Talk],
    on_message: Callable[[Talk, Message], None],
    word: Callable[[Talk], str | None] = lambda talk: None,
    patience_s: float = 20.0,
) -> None:
    """Run all talks to their end, calling `on_message` for each message of an agent.

    `word(talk)` is asked ten times a second; what it returns is sent once to that agent. After "stop" or
    "done" it has `patience_s` to end before it is given up. A talk ends with `rc`: the command's, or GIVEN_UP.
    However this function is left, no command stays behind.
    """
    from ClusterShell.Event import EventHandler
    from ClusterShell.Task import task_self
    from ClusterShell.Worker.Exec import ExecClient, ExecWorker

    class Client(ExecClient):  # type: ignore[misc]
        """An ExecClient that starts an argument list in a session of its own."""

        def _build_cmd(self) -> tuple[list[str], None]:
            return list(self.command), None

        def _exec_nonblock(
            self, commandlist: list[str], shell: bool = False, env: Any = None
        ) -> subprocess.Popen[bytes]:
            child = process.spawn(commandlist)
            # ClusterShell closes descriptors by number: it gets its own, not those of the file objects,
            # which would close the same numbers again when they belong to somebody else.
            for name, pipe in (
                ("SNAME_STDERR", child.stderr),
                ("SNAME_STDOUT", child.stdout),
                ("SNAME_STDIN", child.stdin),
            ):
                assert pipe is not None
                stream = getattr(self.worker, name)
                if pipe is child.stdin:
                    self.streams.set_writer(stream, os.dup(pipe.fileno()), retain=False)
                else:
                    self.streams.set_reader(stream, os.dup(pipe.fileno()))
                pipe.close()
            return child

        def _close(self, abort: bool, timeout: bool) -> None:
            # ssh ends at once, and the agent behind it notices; a local agent needs a moment to end
            # its ranks, which a KILL would orphan.
            if abort and self.popen is not None and self.popen.poll() is None:
                self.popen.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.popen.wait(AGENT_END_S)
            super()._close(abort, timeout)

    class Worker(ExecWorker):  # type: ignore[misc]
        SHELL_CLASS = Client

    class Handler(EventHandler):  # type: ignore[misc]
        def __init__(self, talk: Talk) -> None:
            self.talk = talk

        def ev_read(self, worker: Any, node: str, sname: str, msg: bytes) -> None:
            self.talk.heard = time.monotonic()
            if sname == worker.SNAME_STDERR:
                self.talk.stderr.append(msg.decode(errors="replace"))
                return
            message = read_message(msg)
            if message is None:
                self.talk.stderr.append(msg.decode(errors="replace"))  # a banner, or the shell's complaint
                return
            self.talk.answered = True
            if not isinstance(message, Alive):
                on_message(self.talk, message)

        def ev_hup(self, worker: Any, node: str, rc: int) -> None:
            self.talk.rc = rc

    workers: list[tuple[Talk, Any]] = []
    given_up: dict[str, float] = {}

    class Clock(EventHandler):  # type: ignore[misc]
        beat = time.monotonic()

        def ev_timer(self, timer: Any) -> None:
            now = time.monotonic()
            beat = now - self.beat >= HEARTBEAT_S
            if beat:
                self.beat = now
            for talk, worker in workers:
                if not talk.alive:
                    continue
                say = word(talk)
                if say and say != talk.told:
                    talk.told = say
                    if say in LAST_WORDS:
                        given_up.setdefault(talk.name, now + patience_s)
                    worker.write(say.encode() + b"\n")
                elif beat:
                    worker.write(b"\n")
                if now > given_up.get(talk.name, now):
                    talk.rc = GIVEN_UP
                    worker.abort()

    # An agent that ended while a heartbeat was on its way is no news.
    logging.getLogger("ClusterShell").setLevel(logging.ERROR)
    task = task_self()
    task.set_info("fanout", max(64, len(talks)))
    task.set_default("stderr", True)
    task.set_default("stdout_msgtree", False)
    task.set_default("stderr_msgtree", False)
    try:
        for talk in talks:
            worker = Worker(talk.name, Handler(talk), command=tuple(talk.argv), stderr=True)
            talk.heard = time.monotonic()
            workers.append((talk, worker))
            worker.write(json.dumps(talk.request).encode() + b"\n")
            task.schedule(worker)
        task.timer(POLL_S, Clock(), interval=POLL_S, autoclose=True)
        task.run()
    finally:
        for talk, worker in workers:
            if talk.alive:
                talk.rc = GIVEN_UP
                worker.abort()
        task.abort()


def ask(
    nodes: Sequence[Node], backend: str, ssh_config: str | None, request: Request, timeout_s: float = 30.0
) -> tuple[dict[str, Message], dict[str, Problem]]:
    """Put one short request to the agents of all `nodes`: (answers by name, why there is none by name)."""
    reach = COMMANDS[backend]
    talks = {node.name: Talk(node.name, reach(node, AGENT, ssh_config), request.to_json()) for node in nodes}
    answers: dict[str, Message] = {}
    deadline = time.monotonic() + timeout_s
    converse(
        list(talks.values()),
        lambda talk, message: answers.__setitem__(talk.name, message),
        lambda talk: Word.STOP if time.monotonic() > deadline else None,
        patience_s=2.0,
    )
    failures = {}
    for node in nodes:
        if node.name not in answers:
            rc, stderr = talks[node.name].rc, talks[node.name].stderr
            failures[node.name] = Problem(reason_kind(rc, stderr), explain(node, rc, stderr))
    return answers, failures
