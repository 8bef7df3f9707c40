"""Starts the agent (`runner.node`) on nodes, locally or over ssh, and exchanges messages with it.

A backend is a function from a node and Python arguments to the command that runs them there; `converse` starts one
agent per node, sends each its request and its heartbeats, and passes on the messages received.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import shlex
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

from runner.cluster.inventory import Node
from runner.cluster.reasons import GIVEN_UP, explain, reason_kind
from runner.failures import Problem
from runner.node.protocol import HEARTBEAT_S, LAST_WORDS, POLL_S, Alive, Message, Word, read_message
from runner.node.requests import Request
from runner.system import process

AGENT = ("-P", "-u", "-m", "runner.node")
AGENT_END_S = 15.0
OUTPUT_END_S = 1.0  # how long the output of a command that has ended may stay open: others may have inherited it
READ_BYTES = 65536  # what a pipe holds


def local(node: Node, arguments: Sequence[str], ssh_config: str | None) -> list[str]:
    """The command that runs the node's Python with `arguments` on this machine; `ssh_config` is not used."""
    return [node.python, *arguments]


def ssh(node: Node, arguments: Sequence[str], ssh_config: str | None) -> list[str]:
    """The command that runs the node's Python with `arguments` there over ssh; `ssh_config` is a path."""
    # The remote login shell reads this string: the one place where it is quoted.
    return ["ssh", "-F", str(ssh_config), node.name, shlex.join(["exec", *node.sudo, node.python, *arguments])]


COMMANDS: dict[str, Callable[[Node, Sequence[str], str | None], list[str]]] = {"local": local, "ssh": ssh}


@dataclass
class AgentSession:
    """One agent: the command that starts it, its request, and how it ended.

    `rc` is the command's exit status (None: it runs), `stderr` all lines of output that are not messages.
    """

    name: str
    argv: Sequence[str]
    request: Mapping[str, Any]
    rc: int | None = None
    stderr: list[str] = field(default_factory=list)
    answered: bool = False  # it sent at least one message
    last_output: float = 0.0  # monotonic time of its last output, in s
    last_word: str | None = None  # the last word sent to it

    @property
    def alive(self) -> bool:
        """Whether the session has not ended."""
        return self.rc is None


def converse(
    sessions: Sequence[AgentSession],
    on_message: Callable[[AgentSession, Message], None],
    next_word: Callable[[AgentSession], str | None] = lambda session: None,
    patience_s: float = 20.0,
) -> None:
    """Run all sessions to their end, calling `on_message` for each message of an agent.

    `next_word(session)` is called every POLL_S; the word that it returns is sent once to that agent (None: nothing).
    After "stop" or "done" the agent has `patience_s` to end before it is given up. A session ends with an `rc`: the
    command's exit status (128 + N if signal N ended it), or GIVEN_UP. However this function ends, no command is left
    running. It may be called from any thread.

    Raises InfrastructureError if a command cannot be started, and whatever the two functions raise.
    """
    conversation = _Conversation(sessions, on_message, next_word, patience_s)
    try:
        conversation.run()
    finally:
        conversation.end()


class _Lines:
    """Joins the pieces that a pipe delivers into lines of any length."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def add(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their ends."""
        first, *others = data.split(b"\n")
        self._pieces.append(first)
        if not others:
            return []
        lines = [b"".join(self._pieces), *others[:-1]]
        self._pieces = [others[-1]]
        return [line.removesuffix(b"\r") for line in lines]

    def rest(self) -> list[bytes]:
        """The last line, if the stream ended within it."""
        last = b"".join(self._pieces)
        return [last] if last else []


class _Agent:
    """The command of one session while it runs, its pipes, and its deadlines (monotonic, in s)."""

    def __init__(self, session: AgentSession, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin and child.stdout and child.stderr
        self.session, self.child, self.stdin = session, child, child.stdin
        self.outputs = {child.stdout: _Lines(), child.stderr: _Lines()}  # those that have not ended
        self.exit_fd = process.exit_fd(child)
        self.unsent = bytearray()
        self.writing = False  # the pipe is full: the selector reports when it can be written
        self.give_up_at = self.kill_at = math.inf
        self.exited_at: float | None = None


class _Conversation:
    """All agents of one `converse` call and the loop that serves them. Times are monotonic, in s.

    Selectors, not asyncio: one flat loop costs less per line, an exception raised by a signal handler leaves it as
    any other code, and it needs neither child watchers nor an event loop's own handler of SIGINT.
    """

    def __init__(
        self,
        sessions: Sequence[AgentSession],
        on_message: Callable[[AgentSession, Message], None],
        next_word: Callable[[AgentSession], str | None],
        patience_s: float,
    ) -> None:
        self._sessions, self._on_message, self._next_word, self._patience_s = (
            sessions,
            on_message,
            next_word,
            patience_s,
        )
        self._agents: list[_Agent] = []
        self._selector = selectors.DefaultSelector()
        self._beat = time.monotonic()
        self._tick_at = self._beat + POLL_S

    def run(self) -> None:
        """Start all agents and serve them until the last has ended."""
        for session in self._sessions:
            session.last_output = time.monotonic()
            self._start(session)
        while self._agents:
            self._round()

    def end(self) -> None:
        """End all agents that still run, at once: by TERM, then by KILL after AGENT_END_S or another interruption."""
        try:
            now = time.monotonic()
            for agent in self._agents:
                self._give_up(agent, now)
            while self._agents:
                self._round()
        finally:
            for session in self._sessions:
                if session.alive:
                    session.rc = GIVEN_UP
            for agent in list(self._agents):
                process.kill_group(agent.child)
                agent.child.wait()
                self._forget(agent)
            self._selector.close()

    def _start(self, session: AgentSession) -> None:
        agent = _Agent(session, process.spawn(session.argv))
        self._agents.append(agent)
        os.set_blocking(agent.stdin.fileno(), False)
        for pipe in agent.outputs:
            self._selector.register(pipe, selectors.EVENT_READ, partial(self._read, agent, pipe))
        if agent.exit_fd is not None:
            self._selector.register(agent.exit_fd, selectors.EVENT_READ, partial(self._look, agent))
        self._send(agent, json.dumps(session.request).encode() + b"\n")

    def _round(self) -> None:
        """Wait for the next event and handle it; check all agents every POLL_S, however much they send."""
        for key, _ in self._selector.select(max(0.0, self._tick_at - time.monotonic())):
            key.data()
            if time.monotonic() >= self._tick_at:
                self._tick()
        if time.monotonic() >= self._tick_at:
            self._tick()

    def _tick(self) -> None:
        """Send the next words and heartbeats, and end agents whose time is over."""
        now = time.monotonic()
        self._tick_at = now + POLL_S
        beat = now - self._beat >= HEARTBEAT_S
        if beat:
            self._beat = now
        for agent in list(self._agents):
            session = agent.session
            if session.alive:
                word = self._next_word(session)
                if word and word != session.last_word:
                    session.last_word = word
                    if word in LAST_WORDS:
                        agent.give_up_at = min(agent.give_up_at, now + self._patience_s)
                    self._send(agent, word.encode() + b"\n")
                elif beat:
                    self._send(agent, b"\n")
                if now > agent.give_up_at:
                    self._give_up(agent, now)
            # Agents that show no sign of ending are checked less often: each check is a system call.
            if beat or len(agent.outputs) < 2 or not session.alive or agent.exited_at:
                self._look(agent)

    def _send(self, agent: _Agent, data: bytes) -> None:
        if not agent.stdin.closed:
            agent.unsent += data
            self._write(agent)

    def _write(self, agent: _Agent) -> None:
        """Write as much as the pipe accepts; the rest follows when it accepts more."""
        if agent.stdin.closed:
            return
        try:
            with contextlib.suppress(BlockingIOError):
                del agent.unsent[: os.write(agent.stdin.fileno(), agent.unsent)]
        except ConnectionError:  # it has ended, or closed its stdin: its exit is what counts
            self._close_stdin(agent)
            return
        if agent.unsent and not agent.writing:
            self._selector.register(agent.stdin, selectors.EVENT_WRITE, partial(self._write, agent))
        elif agent.writing and not agent.unsent:
            self._unregister(agent.stdin)
        agent.writing = bool(agent.unsent)

    def _close_stdin(self, agent: _Agent) -> None:
        if agent.writing:
            self._unregister(agent.stdin)
        agent.writing = False
        agent.stdin.close()

    def _read(self, agent: _Agent, pipe: IO[bytes]) -> None:
        lines = agent.outputs.get(pipe)
        if lines is None:  # closed since the selector reported it
            return
        data = os.read(pipe.fileno(), READ_BYTES)
        if data:
            agent.session.last_output = time.monotonic()
            self._receive(agent, pipe, lines.add(data))
            return
        self._close_output(agent, pipe)
        self._receive(agent, pipe, lines.rest())
        if not agent.outputs:
            self._look(agent)

    def _receive(self, agent: _Agent, pipe: IO[bytes], lines: Sequence[bytes]) -> None:
        """Pass on the messages on stdout; everything else is kept to explain a failure."""
        session = agent.session
        for line in lines:
            if not session.alive:  # given up: its output is only read so that it does not block
                return
            message = read_message(line) if pipe is agent.child.stdout else None
            if message is None:
                session.stderr.append(line.decode(errors="replace"))
                continue
            session.answered = True
            if not isinstance(message, Alive):
                self._on_message(session, message)

    def _give_up(self, agent: _Agent, now: float) -> None:
        """End an agent by TERM: ssh ends at once, and the remote agent notices; a local agent needs some
        seconds to end its ranks, which KILL would orphan.
        """
        if agent.session.alive:
            agent.session.rc = GIVEN_UP
        if agent.kill_at == math.inf:
            process.terminate(agent.child)
            agent.kill_at = now + AGENT_END_S

    def _look(self, agent: _Agent) -> None:
        """Check whether the command has ended; end the session when its output has ended as well."""
        now = time.monotonic()
        status = agent.child.poll()
        if status is None:
            if now > agent.kill_at:
                process.kill_group(agent.child)
            return
        if agent.exited_at is None:
            agent.exited_at = now
            self._close_exit_fd(agent)
        # Processes that inherited its pipes may keep them open forever.
        if agent.outputs and now - agent.exited_at < OUTPUT_END_S:
            return
        for pipe, lines in agent.outputs.items():
            os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(BlockingIOError):  # nothing came since the last look
                self._receive(agent, pipe, lines.add(os.read(pipe.fileno(), READ_BYTES)))
            self._receive(agent, pipe, lines.rest())
        if agent.session.alive:
            agent.session.rc = status if status >= 0 else 128 - status
        self._forget(agent)

    def _close_exit_fd(self, agent: _Agent) -> None:
        if agent.exit_fd is not None:
            self._unregister(agent.exit_fd)
            os.close(agent.exit_fd)
            agent.exit_fd = None

    def _close_output(self, agent: _Agent, pipe: IO[bytes]) -> None:
        self._unregister(pipe)
        pipe.close()
        del agent.outputs[pipe]

    def _unregister(self, file: IO[bytes] | int) -> None:
        # Not registered if an exception was raised between two steps: it is closed all the same.
        with contextlib.suppress(KeyError):
            self._selector.unregister(file)

    def _forget(self, agent: _Agent) -> None:
        """Close all pipes of an agent that has ended."""
        self._close_stdin(agent)
        self._close_exit_fd(agent)
        for pipe in list(agent.outputs):
            self._close_output(agent, pipe)
        if agent in self._agents:
            self._agents.remove(agent)


def ask(
    nodes: Sequence[Node],
    backend: str,
    ssh_config: str | None,
    request: Request,
    timeout_s: float = 30.0,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Message], dict[str, Problem]]:
    """Send one short request to the agents of all `nodes`, at once.

    Returns the answers by node name, and the problem of each node that has not answered within `timeout_s`, or before
    `stopped` returned True.
    Raises InfrastructureError if a command cannot be started.
    """
    begun = sessions(nodes, backend, ssh_config, lambda node: request)
    answers: dict[str, Message] = {}
    deadline = time.monotonic() + timeout_s
    converse(
        begun,
        lambda session, message: answers.__setitem__(session.name, message),
        lambda session: Word.STOP if time.monotonic() > deadline or stopped() else None,
        patience_s=2.0,
    )
    return answers, unanswered(nodes, begun, answers)


def sessions(
    nodes: Sequence[Node], backend: str, ssh_config: str | None, request: Callable[[Node], Request]
) -> list[AgentSession]:
    """A session with the agent of each node, in their order, which is asked what `request` makes for it."""
    command = COMMANDS[backend]
    return [AgentSession(node.name, command(node, AGENT, ssh_config), request(node).to_json()) for node in nodes]


def unanswered(nodes: Sequence[Node], ended: Sequence[AgentSession], answers: Collection[str]) -> dict[str, Problem]:
    """The problem of each node whose name is not in `answers`; `ended` are the sessions of `nodes`, in their order."""
    return {
        node.name: Problem(reason_kind(end.rc, end.stderr), explain(node, end.rc, end.stderr))
        for node, end in zip(nodes, ended, strict=True)
        if node.name not in answers
    }
