"""Backends: how the agent (`runner.node`) is reached on nodes.

A backend is a function from a node and a Python argument list to the command that runs it there;
`converse` starts one agent per node, feeds each its request, keeps the leash alive and passes on what
they say.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

from runner.cluster.inventory import Node
from runner.cluster.reasons import GIVEN_UP, explain, reason_kind
from runner.failures import Problem
from runner.node.protocol import HEARTBEAT_S, LAST_WORDS, POLL_S, Alive, Message, Request, Word, read_message
from runner.system import process

AGENT = ("-P", "-u", "-m", "runner.node")
AGENT_END_S = 15.0
OUTPUT_END_S = 1.0  # how long the output of a command that has ended may stay open: others may have inherited it
READ_BYTES = 65536  # what a pipe holds


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
    "done" it has `patience_s` to end before it is given up. A talk ends with `rc`: the command's (128 + N where
    signal N ended it), or GIVEN_UP. However this function is left, no command stays behind. It may be called from
    any thread. Raises InfrastructureError when a command cannot be started, and what the two functions raise.
    """
    conversation = _Conversation(talks, on_message, word, patience_s)
    try:
        conversation.run()
    finally:
        conversation.end()


class _Lines:
    """Puts lines together from the pieces in which a pipe delivers them; no line is too long."""

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
    """The command of one talk while it runs, its pipes, and what is still to be done with it."""

    def __init__(self, talk: Talk, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin and child.stdout and child.stderr
        self.talk, self.child, self.stdin = talk, child, child.stdin
        self.outputs = {child.stdout: _Lines(), child.stderr: _Lines()}  # those that have not ended
        self.exit_fd = process.exit_fd(child)
        self.unsent = bytearray()
        self.writing = False  # the pipe is full: the selector tells when it takes more
        self.give_up_at = self.kill_at = math.inf
        self.exited_at: float | None = None


class _Conversation:
    """All agents of one `converse` and the loop that serves them, by monotonic time in s.

    Selectors, not asyncio: one flat loop costs less per line, an exception raised by a signal handler leaves it as
    any other code, and it needs neither child watchers nor an event loop's own handler of SIGINT.
    """

    def __init__(
        self,
        talks: Sequence[Talk],
        on_message: Callable[[Talk, Message], None],
        word: Callable[[Talk], str | None],
        patience_s: float,
    ) -> None:
        self._talks, self._on_message, self._word, self._patience_s = talks, on_message, word, patience_s
        self._agents: list[_Agent] = []
        self._selector = selectors.DefaultSelector()
        self._beat = time.monotonic()
        self._tick_at = self._beat + POLL_S

    def run(self) -> None:
        """Start all agents and serve them until the last has ended."""
        for talk in self._talks:
            talk.heard = time.monotonic()
            self._start(talk)
        while self._agents:
            self._round()

    def end(self) -> None:
        """End whatever still runs: all are asked at once, and killed after AGENT_END_S or another interruption."""
        try:
            now = time.monotonic()
            for agent in self._agents:
                self._give_up(agent, now)
            while self._agents:
                self._round()
        finally:
            for talk in self._talks:
                if talk.alive:
                    talk.rc = GIVEN_UP
            for agent in list(self._agents):
                process.kill_group(agent.child)
                agent.child.wait()
                self._forget(agent)
            self._selector.close()

    def _start(self, talk: Talk) -> None:
        agent = _Agent(talk, process.spawn(talk.argv))
        self._agents.append(agent)
        os.set_blocking(agent.stdin.fileno(), False)
        for pipe in agent.outputs:
            self._selector.register(pipe, selectors.EVENT_READ, partial(self._read, agent, pipe))
        if agent.exit_fd is not None:
            self._selector.register(agent.exit_fd, selectors.EVENT_READ, partial(self._look, agent))
        self._send(agent, json.dumps(talk.request).encode() + b"\n")

    def _round(self) -> None:
        """Wait for what comes next and serve it; look after all agents every POLL_S, however much they send."""
        for key, _ in self._selector.select(max(0.0, self._tick_at - time.monotonic())):
            key.data()
            if time.monotonic() >= self._tick_at:
                self._tick()
        if time.monotonic() >= self._tick_at:
            self._tick()

    def _tick(self) -> None:
        """Ask for the words to send, keep the leashes alive, and end those whose time is over."""
        now = time.monotonic()
        self._tick_at = now + POLL_S
        beat = now - self._beat >= HEARTBEAT_S
        if beat:
            self._beat = now
        for agent in list(self._agents):
            talk = agent.talk
            if talk.alive:
                say = self._word(talk)
                if say and say != talk.told:
                    talk.told = say
                    if say in LAST_WORDS:
                        agent.give_up_at = min(agent.give_up_at, now + self._patience_s)
                    self._send(agent, say.encode() + b"\n")
                elif beat:
                    self._send(agent, b"\n")
                if now > agent.give_up_at:
                    self._give_up(agent, now)
            # Those that show no sign of an end are looked at less often: this is a system call for each.
            if beat or len(agent.outputs) < 2 or not talk.alive or agent.exited_at:
                self._look(agent)

    def _send(self, agent: _Agent, data: bytes) -> None:
        if not agent.stdin.closed:
            agent.unsent += data
            self._write(agent)

    def _write(self, agent: _Agent) -> None:
        """Write as much as the pipe takes; the rest follows when it takes more."""
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
            agent.talk.heard = time.monotonic()
            self._hear(agent, pipe, lines.add(data))
            return
        self._close_output(agent, pipe)
        self._hear(agent, pipe, lines.rest())
        if not agent.outputs:
            self._look(agent)

    def _hear(self, agent: _Agent, pipe: IO[bytes], lines: Sequence[bytes]) -> None:
        """Pass on the messages on stdout; everything else is kept to explain a failure."""
        talk = agent.talk
        for line in lines:
            if not talk.alive:  # given up: its output is read only so that it does not wait for that
                return
            message = read_message(line) if pipe is agent.child.stdout else None
            if message is None:
                talk.stderr.append(line.decode(errors="replace"))
                continue
            talk.answered = True
            if not isinstance(message, Alive):
                self._on_message(talk, message)

    def _give_up(self, agent: _Agent, now: float) -> None:
        """Ask an agent to end, by TERM: ssh does at once, and the agent behind it notices; a local agent
        needs a moment to end its ranks, which KILL would orphan.
        """
        if agent.talk.alive:
            agent.talk.rc = GIVEN_UP
        if agent.kill_at == math.inf:
            process.terminate(agent.child)
            agent.kill_at = now + AGENT_END_S

    def _look(self, agent: _Agent) -> None:
        """Note whether the command has ended; end the talk once its output has, too."""
        now = time.monotonic()
        status = agent.child.poll()
        if status is None:
            if now > agent.kill_at:
                process.kill_group(agent.child)
            return
        if agent.exited_at is None:
            agent.exited_at = now
            self._close_exit_fd(agent)
        # Who inherited its pipes may keep them open for ever.
        if agent.outputs and now - agent.exited_at < OUTPUT_END_S:
            return
        for pipe, lines in agent.outputs.items():
            os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(BlockingIOError):  # nothing came since the last look
                self._hear(agent, pipe, lines.add(os.read(pipe.fileno(), READ_BYTES)))
            self._hear(agent, pipe, lines.rest())
        if agent.talk.alive:
            agent.talk.rc = status if status >= 0 else 128 - status
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
        # Not registered where an exception came between two steps: it is closed all the same.
        with contextlib.suppress(KeyError):
            self._selector.unregister(file)

    def _forget(self, agent: _Agent) -> None:
        """Close what is open of an agent that has ended."""
        self._close_stdin(agent)
        self._close_exit_fd(agent)
        for pipe in list(agent.outputs):
            self._close_output(agent, pipe)
        if agent in self._agents:
            self._agents.remove(agent)


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
