"""`converse` with real child processes: whatever they do, none is left however it ends."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from runner.cluster.reasons import GIVEN_UP
from runner.errors import InfrastructureError
from runner.launch import talk as talk_module
from runner.launch.talk import AgentSession, converse
from runner.node.protocol import Line, Message

# What every script starts with: `say` sends a message, `request` is what it was asked.
PRELUDE = """
import json, os, signal, sys, time
def say(kind, **fields):
    sys.stdout.buffer.write(json.dumps({"message": kind, **fields}).encode() + b"\\n")
    sys.stdout.buffer.flush()
request = json.loads(sys.stdin.readline())
"""
IGNORES_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready'); time.sleep(60)"


def agent(script: str, name: str = "a", **request: Any) -> AgentSession:
    """A session with a Python program."""
    return AgentSession(name, [sys.executable, "-I", "-S", "-c", PRELUDE + script], request)


def messages_of(
    *sessions: AgentSession, word: Callable[[AgentSession], str | None] = lambda session: None, patience_s: float = 20.0
) -> list[Any]:
    """The text of each line that these sessions report, and each other message whole."""
    messages: list[Any] = []
    converse(sessions, lambda session, message: messages.append(message), word, patience_s)
    return [message.line if isinstance(message, Line) else message for message in messages]


@pytest.fixture(autouse=True)
def nothing_left():
    """No test leaves a child, a zombie or a descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert psutil.Process().children() == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_agent_gets_its_request_and_its_messages_are_passed_on():
    session = agent("say('line', file='out', line=request['text']); say('alive'); sys.exit(3)", text="é\n")
    assert messages_of(session) == ["é\n"]
    assert (session.rc, session.answered, session.stderr, session.last_word) == (3, True, [], None)


def test_without_talks_it_returns_at_once():
    assert messages_of() == []


@pytest.mark.parametrize("length", [65_535, 65_536, 10_000_000])
def test_lines_and_requests_may_have_any_length(length):
    session = agent(
        "say('line', file='out', line=request['text']); print('e' * len(request['text']), file=sys.stderr)",
        text="x" * length,
    )
    assert messages_of(session) == ["x" * length]
    assert session.stderr == ["e" * length] and session.rc == 0


def test_a_line_that_arrives_byte_by_byte_is_one_message():
    script = "for byte in json.dumps({'message': 'line', 'file': 'out', 'line': 1}).encode() + b'\\n\\n': os.write(1, bytes([byte]))"
    session = agent(script)
    assert messages_of(session) == [1]
    assert session.stderr == [""]


def test_output_that_is_no_message_is_kept_with_stderr():
    script = r"""
os.write(1, b'Welcome to \xff\r\n{"message": "line", "file": "out", "line": 1}\n[1]\n{"other": 2}\n"message"\n7\nunfinished')
os.write(2, b'bad \xfe key\r\n10 %\r20 %\nno end')
"""
    session = agent(script)
    assert messages_of(session) == [1]
    assert sorted(session.stderr) == sorted(
        [
            "Welcome to \ufffd",
            "[1]",
            '{"other": 2}',
            '"message"',
            "7",
            "unfinished",
            "bad \ufffd key",
            "10 %\r20 %",
            "no end",
        ]
    )


def test_a_last_message_without_a_newline_counts():
    assert messages_of(agent("""os.write(1, b'{"message": "line", "file": "out", "line": 1}')""")) == [1]


def test_a_banner_is_not_an_answer():
    session = agent("print('Welcome')")
    assert messages_of(session) == []
    assert not session.answered and session.stderr == ["Welcome"]


def test_a_signal_that_ended_the_command_is_in_its_status():
    session = agent("os.kill(os.getpid(), signal.SIGKILL)")
    messages_of(session)
    assert session.rc == 128 + signal.SIGKILL


def test_a_word_is_sent_once_and_obeyed():
    session = agent(
        "say('line', file='out', line=sys.stdin.readline()); say('line', file='out', line=sys.stdin.readline()); sys.exit(4)"
    )
    messages = messages_of(session, word=lambda session: "stop" if session.last_word else "go")
    assert messages == ["go\n", "stop\n"]
    assert (session.rc, session.last_word) == (4, "stop")


def test_heartbeats_are_empty_lines(monkeypatch):
    monkeypatch.setattr(talk_module, "HEARTBEAT_S", 0.2)
    started = time.monotonic()
    assert messages_of(agent("for _ in range(3): say('line', file='out', line=sys.stdin.readline())")) == ["\n"] * 3
    assert 0.4 < time.monotonic() - started < 10


def test_words_are_asked_for_while_another_agent_floods():
    flood = agent("\nwhile True: say('line', file='out', line='x' * 1000)", "flood")
    asked: list[float] = []

    def word(session: AgentSession) -> str | None:
        asked.append(time.monotonic())
        return "stop" if len(asked) > 10 else None

    converse([flood], lambda session, message: time.sleep(0.001), word, patience_s=0.1)
    assert flood.rc == GIVEN_UP
    assert max(later - earlier for earlier, later in itertools.pairwise(asked)) < 2


@pytest.mark.parametrize("word", ["stop", "done"])
def test_a_silent_agent_is_given_up_while_others_go_on(word):
    silent = agent("time.sleep(60)", "silent")
    other = agent("time.sleep(1.5); say('line', file='out', line='other')", "other")
    started = time.monotonic()
    messages = messages_of(silent, other, word=lambda session: word if session is silent else None, patience_s=0.3)
    assert messages == ["other"]
    assert (silent.rc, silent.last_word, other.rc) == (GIVEN_UP, word, 0)
    assert time.monotonic() - started < 10


def test_only_stop_and_done_limit_the_time_to_end():
    session = agent("time.sleep(1)")
    messages_of(session, word=lambda session: "stacks", patience_s=0.0)
    assert (session.rc, session.last_word) == (0, "stacks")


def test_a_command_that_ignores_term_is_killed_and_others_are_served_meanwhile(monkeypatch):
    monkeypatch.setattr(talk_module, "AGENT_END_S", 1.0)
    monkeypatch.setattr(talk_module, "HEARTBEAT_S", 0.1)
    deaf = agent(IGNORES_TERM, "deaf")
    other = agent("for _ in range(8): say('line', file='out', line=sys.stdin.readline())", "other")
    messages: list[dict[str, Any]] = []
    converse(
        [deaf, other],
        lambda session, message: messages.append(message),
        lambda session: "stop" if session is deaf and session.answered else None,
        patience_s=0.0,
    )
    assert [type(message) for message in messages].count(Line) == 8
    assert (deaf.rc, other.rc) == (GIVEN_UP, 0)


def test_an_agent_has_time_to_end_its_ranks(tmp_path):
    """Also when it writes more than a pipe holds meanwhile."""
    script = """
def end(*_):
    os.write(1, b'x' * 1_000_000)  # not by a buffer that the signal may have interrupted
    open(request['file'], 'w').write('ended')
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
say('ready')
time.sleep(60)
"""
    session = agent(script, file=str(tmp_path / "file"))
    with pytest.raises(RuntimeError):
        converse([session], lambda session, message: raise_(RuntimeError()))
    assert (tmp_path / "file").read_text() == "ended"
    assert session.rc == GIVEN_UP


def raise_(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("where", ["message", "word"])
def test_an_exception_ends_all_agents_at_the_same_time(where):
    script = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), os._exit(0))); say('ready'); time.sleep(60)"
    sessions = [agent(script, str(number)) for number in range(20)]

    def all_ready(*_: Any) -> None:
        if all(session.answered for session in sessions):
            ready.append(time.monotonic())
            raise KeyboardInterrupt

    ready: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        if where == "message":
            converse(sessions, all_ready)
        else:
            converse(sessions, lambda session, message: None, all_ready)
    assert time.monotonic() - ready[0] < 6
    assert {session.rc for session in sessions} == {GIVEN_UP}


def test_a_signal_handler_that_raises_ends_it_and_a_second_time_kills():
    """As the second Ctrl-C, and a third one while an agent takes its time."""

    def on_signal(number: int, frame: object) -> None:
        signals.append(time.monotonic())
        raise KeyboardInterrupt

    def on_message(session: AgentSession, message: Message) -> None:
        for after in (0.2, 1.0):
            timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            timers.append(timer)

    signals: list[float] = []
    timers: list[threading.Timer] = []
    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with pytest.raises(KeyboardInterrupt):
            converse([agent(IGNORES_TERM)], on_message)
        over = time.monotonic()
    finally:
        for timer in timers:
            timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(signals) == 2 and over - signals[1] < 2


def test_a_signal_handler_that_returns_stays_installed_and_the_agents_go_on():
    numbers: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        numbers.append(number)

    session = agent("say('ready'); sys.exit(5 if sys.stdin.readline() == 'stop\\n' else 6)")
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        converse(
            [session],
            lambda session, message: os.kill(os.getpid(), signal.SIGINT),
            lambda session: "stop" if numbers else None,
        )
        assert signal.getsignal(signal.SIGINT) is on_signal
    finally:
        signal.signal(signal.SIGINT, before)
    assert (numbers, session.rc) == ([signal.SIGINT], 5)


def test_a_hundred_agents():
    sessions = [
        agent("say('line', file='out', line=request['n']); sys.stdin.readline()", str(n), n=n) for n in range(100)
    ]
    messages = messages_of(
        *sessions, word=lambda session: "stop" if all(session.answered for session in sessions) else None
    )
    assert sorted(messages) == list(range(100))
    assert {session.rc for session in sessions} == {0}


def test_a_command_may_close_its_stdin_early(monkeypatch):
    monkeypatch.setattr(talk_module, "HEARTBEAT_S", 0.1)
    closes = agent("os.close(0); say('ready'); time.sleep(1); say('line', file='out', line='still here')", "closes")
    never_reads = AgentSession("never reads", ["sleep", "1"], {"text": "x" * 1_000_000})
    gone = AgentSession("gone", ["true"], {"text": "x" * 1_000_000})
    messages = messages_of(closes, never_reads, gone, word=lambda session: "go" if closes.answered else None)
    assert messages[-1] == "still here"
    assert (closes.rc, never_reads.rc, gone.rc) == (0, 0, 0)


def test_a_command_may_close_its_output_early():
    session = agent("os.close(1); os.close(2); time.sleep(0.5); os._exit(7)")
    messages_of(session)
    assert session.rc == 7


def test_a_process_that_inherited_the_output_does_not_keep_a_talk_alive(tmp_path):
    script = "say('line', file='out', line=1)\nif os.fork(): os._exit(0)\nopen(request['file'], 'w').write(str(os.getpid())); time.sleep(60)"
    session = agent(script, file=str(tmp_path / "pid"))
    started = time.monotonic()
    assert messages_of(session) == [1]
    assert session.rc == 0 and time.monotonic() - started < 20
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_what_a_command_wrote_before_it_ended_is_read_however_late(monkeypatch):
    monkeypatch.setattr(talk_module, "OUTPUT_END_S", 0.0)
    sessions = [
        agent('os.write(1, b\'{"message": "line", "file": "out", "line": 1}\\n\' * 1000); os._exit(0)', str(n))
        for n in range(10)
    ]
    assert messages_of(*sessions) == [1] * 10_000
    assert {session.rc for session in sessions} == {0}


def test_a_missing_program_is_named_and_the_other_commands_are_ended():
    sessions = [agent("time.sleep(60)"), AgentSession("b", ["/nowhere/program"], {}), agent("time.sleep(60)", "c")]
    with pytest.raises(InfrastructureError, match="'/nowhere/program' is not installed"):
        messages_of(*sessions)
    assert {session.rc for session in sessions} == {GIVEN_UP}


def test_it_may_be_called_from_another_thread():
    session = agent("say('line', file='out', line=1); sys.exit(2)")
    messages: list[Any] = []
    thread = threading.Thread(target=lambda: messages.extend(messages_of(session)))
    thread.start()
    thread.join(30)
    assert (messages, session.rc) == ([1], 2)


def test_it_works_without_descriptors_of_processes(monkeypatch):
    """Linux before 5.3, and other systems."""
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(talk_module, "AGENT_END_S", 0.5)
    stubborn, quick = agent(IGNORES_TERM, "stubborn"), agent("say('line', file='out', line=1); sys.exit(2)", "quick")
    messages_of(
        stubborn, quick, word=lambda session: "stop" if stubborn.answered and not quick.alive else None, patience_s=0
    )
    assert (stubborn.rc, quick.rc) == (GIVEN_UP, 2)


def test_a_talk_ends_as_soon_as_its_command():
    """Not at the next round: every request to a node would take that long."""
    taken = []
    for _ in range(10):
        started = time.monotonic()
        converse([AgentSession("a", ["true"], {})], lambda session, message: None)
        taken.append(time.monotonic() - started)
    assert min(taken) < talk_module.POLL_S / 2


def test_messages_of_an_agent_keep_their_order():
    sessions = [agent("for n in range(2000): say('line', file='out', line=n)", str(number)) for number in range(5)]
    messages: dict[str, list[int]] = {session.name: [] for session in sessions}
    converse(sessions, lambda session, message: messages[session.name].append(message.line))
    assert all(numbers == list(range(2000)) for numbers in messages.values())
