"""Why a cell failed and on which node, from the outcomes of all agents. Pure.

An error is {"kind", "message", "host", "stderr"}: `kind` is one of `KINDS`, `host` is None where no single
node can be named: a cause that cannot be determined is not assigned to a node. Where several nodes failed, it is the
first one's, and `also` has the errors of the others (`results.status.each_error`).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from runner.cluster import reasons
from runner.failures import KINDS, Problem
from runner.launch.talk import AgentSession
from runner.node.protocol import LAST_WORDS, Outcome, RankEnd, Stopped
from runner.results.celldir import LAUNCHER, rank_name
from runner.results.status import joined

# Clocks that differ by more make logs and time limits misleading; NTP keeps them within milliseconds.
CLOCK_OFF_S = 60.0


def error(kind: str, message: str, host: str | None = None, stderr: Sequence[str] = ()) -> dict[str, Any]:
    """The error of a cell in status.json."""
    return {"kind": kind, "message": message, "host": host, "stderr": list(stderr)}


def may_retry(found: Mapping[str, Any]) -> bool:
    """Whether a retry may help: the infrastructure failed, and neither a user nor a configuration caused it."""
    return found.get("kind") in KINDS and KINDS[found["kind"]].retry


def unusable(host: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """The error of a node that has `problems` (at least one): of the kind of the first one."""
    return error(problems[0].kind, "; ".join(problem.message for problem in problems), host)


def clock_problem(offset_s: float) -> Problem | None:
    """The problem of a node whose clock is `offset_s` ahead of the controller's; None up to CLOCK_OFF_S."""
    if abs(offset_s) <= CLOCK_OFF_S:
        return None
    side = "ahead of" if offset_s > 0 else "behind"
    return Problem("clock", f"its clock is {abs(offset_s):,.0f} s {side} the controller's")


# Why an agent under Slurm ended its ranks without a controller, and the kind of that failure.
LATE: Mapping[str | None, str] = {Stopped.TIME_LIMIT: "time_limit", Stopped.TIMED_OUT: "timed_out"}
# Why an agent ended its ranks: these ranks have not failed.
_STOPPED_BY_AGENT = (*LAST_WORDS, *LATE)
# What a rank prints when it notices that another rank has died.
_VICTIM = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Socket Timeout",
    "NCCL communicator was aborted",
    "Connection refused",
    "DistNetworkError",
    "DistStoreError",
)
# What a dying rank prints, and the kind of failure that it proves. Any other exception is a crash.
_WORDS = (
    ("CUDA out of memory", "cuda_out_of_memory"),
    ("uncorrectable ECC", "gpu_failed"),
    ("GPU has fallen off the bus", "gpu_failed"),
    ("No space left on device", "disk_full"),
    ("EADDRINUSE", "port_taken"),
    ("Address already in use", "port_taken"),
    ("ModuleNotFoundError", "environment_missing"),
    ("No module named", "environment_missing"),
)


def blame(sessions: Sequence[AgentSession], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The error of a cell some of whose ranks or agents failed: one for each host that failed first-hand.

    A host whose ranks only report a lost peer is a victim, and is blamed for nothing while another host has failed.
    What no other try can change, and what fails alike on several hosts, is no fault of theirs: none is named.
    """
    suspects, victims = _told_apart(sessions, outcomes)
    if suspects:
        return _alike(suspects) or joined(suspects)
    if late := [o.stopped for o in outcomes.values() if o.stopped in LATE]:
        return hang_error(LATE[late[0]], str(late[0]), outcomes)
    if victims:
        names = ", ".join(one["host"] for one in victims)
        message = f"only lost peers were reported, by {names}; first: {victims[0]['message']}"
        return error("lost_peers", message, stderr=victims[0]["stderr"])
    launcher = outcomes.get(LAUNCHER, Outcome())
    tail = launcher.engine_stderr
    return error("launcher_failed", f"the launcher {_end(_status(launcher))}{_last_words(tail)}", stderr=tail)


def _alike(suspects: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The one error of several hosts that fail alike for good; None if they do not."""
    texts = {(one["kind"], re.sub(r"\d+", "", one["message"])) for one in suspects}
    if len(suspects) == 1 or len(texts) > 1 or may_retry(suspects[0]):
        return None
    names = ", ".join(one["host"] for one in suspects)
    message = f"failed at the same time on {names}; first: {suspects[0]['message']}"
    return error(suspects[0]["kind"], message, stderr=suspects[0]["stderr"])


def first_hand(sessions: Sequence[AgentSession], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """The errors of the hosts among `sessions` that failed first-hand, one for each."""
    return _told_apart(sessions, outcomes)[0]


def _told_apart(
    sessions: Sequence[AgentSession], outcomes: Mapping[str, Outcome]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The errors of the hosts that failed first-hand, and of those that only lost a peer.

    A launcher on this machine that fails together with nodes is a victim of them.
    """
    suspects: list[dict[str, Any]] = []
    victims: list[dict[str, Any]] = []
    for session in sessions:
        outcome = outcomes.get(session.name)
        if outcome is None:
            suspects.append(_no_outcome(session))
        elif outcome.error:
            suspects.append(error(outcome.kind or "unknown", outcome.error, session.name))
        elif not outcome.ended_well and outcome.stopped not in _STOPPED_BY_AGENT and session.name != LAUNCHER:
            dead = {name: rank for name, rank in outcome.ranks.items() if not rank.ended}
            direct = {n: r for n, r in dead.items() if not any(w in line for line in r.stderr for w in _VICTIM)}
            name, rank = _first_to_die(direct or dead, outcome)
            if (outcome.rc or 0) < 0:  # the engine itself was killed; the output of its ranks came after
                name, rank = None, RankEnd()
            status = _status(outcome, _seen_by_launcher(outcomes))
            kind = _kind(status, rank.stderr, outcome.oom_kills)
            message = f"{name or 'the engine'} {_end(status, kind)}{_last_words(rank.stderr)}"
            (victims if dead and not direct else suspects).append(error(kind, message, session.name, rank.stderr))
    of_nodes = [suspect for suspect in suspects if suspect["host"] != LAUNCHER]
    return of_nodes or suspects, victims


def _no_outcome(session: AgentSession) -> dict[str, Any]:
    """The error of an agent that sent no outcome."""
    stderr = session.stderr[-10:]
    if not session.answered:
        kind = reasons.reason_kind(session.rc, session.stderr)
        return error(kind, f"its agent did not answer{_last_words(stderr)}", session.name, stderr)
    if session.rc == reasons.GIVEN_UP:
        return error("hung", "it no longer answers", session.name, stderr)
    return error("lost_connection", "lost the connection to it", session.name, stderr)


# torchrun's table: the rank whose failure it saw first; the others it ended itself.
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)
# Under DeepSpeed's launcher a node's agent does not see how a rank ends; pdsh does: its launcher there ends as the
# rank did, with 256 - N after signal N. 255 is ssh's own failure.
_EXITED = re.compile(r"^pdsh@\S+: \S+: ssh exited with exit code (2[2-4]\d|25[0-4])$", re.MULTILINE)


def _first_to_die(dead: Mapping[str, RankEnd], outcome: Outcome) -> tuple[str | None, RankEnd]:
    """The rank that torchrun saw fail first, else one with output; the engine if no rank started."""
    if not dead:
        return None, RankEnd(stderr=outcome.engine_stderr)
    cause = _ROOT_CAUSE.search("\n".join(outcome.engine_stderr))
    name = rank_name(cause[1]) if cause else ""
    if name not in dead:
        name = next((n for n, rank in dead.items() if _last_words(rank.stderr)), next(iter(dead)))
    return name, dead[name]


def _seen_by_launcher(outcomes: Mapping[str, Outcome]) -> int | None:
    """The status of the only rank that a signal ended under DeepSpeed's launcher; None if there is no such rank."""
    found = _EXITED.findall("\n".join(outcomes.get(LAUNCHER, Outcome()).engine_stderr))
    return int(found[0]) - 256 if len(found) == 1 else None


def _status(outcome: Outcome, seen: int | None = None) -> int | None:
    """How the first rank to die ended: torchrun reports its own status as 1 and the rank's in its table."""
    cause = _ROOT_CAUSE.search("\n".join(outcome.engine_stderr))
    if cause:
        return int(cause[2])
    return outcome.rc if outcome.rc is not None else seen


def _kind(status: int | None, stderr: Sequence[str], oom_kills: int) -> str:
    if oom_kills and status in (-signal.SIGKILL, None):  # None: not known how it ended
        return "out_of_memory"
    if status == -signal.SIGKILL:
        return "rank_killed"
    text = "\n".join(stderr)
    otherwise = "unknown" if status in (0, None) else "rank_crashed"
    return next((kind for words, kind in _WORDS if words in text), otherwise)


def _end(status: int | None, kind: str = "") -> str:
    if kind == "out_of_memory":
        return "was killed by the kernel, which was out of memory"
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return "ended too soon" if status in (0, None) else f"died with status {status}"


def _last_words(stderr: Sequence[str]) -> str:
    """The last line that is not a warning of torch's C++ code, such as `[W1121 04:58:56 socket.cpp:207]`."""
    lines = (line.strip() for line in reversed(stderr))
    return next((f": {line}" for line in lines if line and not re.match(r"(\[rank\d+\]:)?\[W\d", line)), "")


# --- ranks that hang ------------------------------------------------------------------------------

# The innermost frame of a rank that waits for others: in a collective, or for a device on which one may be running.
# Frames of the workloads count as well: nothing else in them takes long without another frame.
_WAITING = ("torch/distributed/", "torch/cuda/", "torch/autograd/", "deepspeed/comm/", "runner/workloads/")
_STATES = {"T": "is stopped", "t": "is stopped by a debugger", "D": "waits in the kernel", "Z": "is dead"}


def hang_error(kind: str, reason: str, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The error of a cell that was stopped for `reason` while its ranks were alive, from their stacks.

    Ranks that wait for others are victims. A rank that cannot run, or that is elsewhere while others wait, is a
    suspect; if all suspects are on one host, a rank hung there. Otherwise the error is of `kind`.
    """
    stuck: list[tuple[str, str, list[str]]] = []
    busy: list[tuple[str, str, list[str]]] = []
    waiting: list[str] = []
    for host, outcome in outcomes.items():
        for name, rank in outcome.stacks.items():
            frames = list(rank.frames)
            if rank.state in _STATES:
                stuck.append((host, f"{name} {_STATES[rank.state]}", frames))
            elif not frames:
                stuck.append((host, f"{name} is alive but gives no stack", frames))
            elif frames[0].startswith(_WAITING):
                waiting.append(f"{name} in {frames[0]}")
            else:
                busy.append((host, f"{name} is in {frames[0]}", frames))
    suspects = stuck + (busy if waiting else [])
    if len({host for host, _, _ in suspects}) != 1:
        return error(kind, reason)
    host, first, frames = suspects[0]
    wait = "waits" if len(waiting) == 1 else "wait"
    others = f", while {len(waiting)} {wait} for others (first: {waiting[0]})" if waiting else ""
    return error("rank_hung", f"{reason}: {first}{others}", host, frames)
