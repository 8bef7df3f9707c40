"""Why a cell failed and whose fault it was, from what every node's agent said. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from runner.backends import Talk

LAUNCHER = "launcher"


def ended_well(outcome: Mapping[str, Any]) -> bool:
    return outcome.get("rc") == 0 and not outcome.get("error")


# What a rank prints when it is another's death that it noticed.
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


def blame(talks: Sequence[Talk], outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The host whose rank failed first-hand: {"message", "host", "stderr"}; host None if it cannot be told.

    A host whose ranks only report a lost peer is a victim. One host that is none is the culprit; several
    are not told apart.
    """
    suspects: list[tuple[str, str, list[str]]] = []
    victims: list[tuple[str, str, list[str]]] = []
    for talk in talks:
        outcome = outcomes.get(talk.name)
        if outcome is None:
            suspects.append((talk.name, "lost the connection to it", list(talk.stderr[-10:])))
        elif outcome.get("error"):
            suspects.append((talk.name, str(outcome["error"]), []))
        elif not ended_well(outcome) and outcome.get("stopped") not in ("stop", "done") and talk.name != LAUNCHER:
            dead = {name: rank for name, rank in outcome["ranks"].items() if not rank["ended"]}
            direct = {n: r for n, r in dead.items() if not any(w in line for line in r["stderr"] for w in _VICTIM)}
            name, rank = _first_to_die(direct or dead, outcome)
            if (outcome.get("rc") or 0) < 0:  # the engine itself was killed; what its ranks say came after
                name, rank = None, {"stderr": []}
            message = f"{name or 'the engine'} {_end(outcome)}{_last_words(rank['stderr'])}"
            (victims if dead and not direct else suspects).append((talk.name, message, rank["stderr"]))
    if len(suspects) == 1:
        host, message, stderr = suspects[0]
        return {"message": message, "host": host, "stderr": stderr}
    if suspects or victims:
        _, message, stderr = (suspects or victims)[0]
        names = ", ".join(host for host, _, _ in suspects or victims)
        what = "failed at once on" if suspects else "only lost peers are reported, by"
        return {"message": f"{what} {names}; first: {message}", "host": None, "stderr": stderr}
    launcher = outcomes.get(LAUNCHER, {})
    tail = list(launcher.get("engine_stderr", []))
    return {"message": f"the launcher {_end(launcher)}{_last_words(tail)}", "host": None, "stderr": tail}


# torchrun's table: the rank whose failure it saw first; the others it ended itself.
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


def _first_to_die(
    dead: Mapping[str, Mapping[str, Any]], outcome: Mapping[str, Any]
) -> tuple[str | None, Mapping[str, Any]]:
    """The rank that torchrun saw fail first, else one that said something; the engine where no rank started."""
    if not dead:
        return None, {"stderr": outcome["engine_stderr"]}
    cause = _ROOT_CAUSE.search("\n".join(outcome["engine_stderr"]))
    name = f"rank{cause[1]}" if cause else ""
    if name not in dead:
        name = next((n for n, rank in dead.items() if _last_words(rank["stderr"])), next(iter(dead)))
    return name, dead[name]


def _end(outcome: Mapping[str, Any]) -> str:
    """How a rank ended: torchrun reports its own status as 1 and the rank's in its table of failures."""
    cause = _ROOT_CAUSE.search("\n".join(outcome.get("engine_stderr", [])))
    status = int(cause[2]) if cause else outcome.get("rc")
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return "ended too soon" if status in (0, None) else f"died with status {status}"


def _last_words(stderr: Sequence[str]) -> str:
    """The last line that is no mere warning of torch's C++ side, such as `[W1121 04:58:56 socket.cpp:207]`."""
    said = (line.strip() for line in reversed(stderr))
    return next((f": {line}" for line in said if line and not re.match(r"(\[rank\d+\]:)?\[W\d", line)), "")
