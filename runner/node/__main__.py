"""`python -m runner.node`: the product's one process on a node, started once per cell by any backend.

It reads one JSON request from stdin, carries it out, and answers with one JSON message per line on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from runner.node.agent import NodeCell
from runner.node.check import check, clean
from runner.node.output import send_message
from runner.node.protocol import (
    CellRequest,
    CheckRequest,
    Cleaned,
    StepRequest,
    SweepRequest,
    Swept,
    UnknownRequest,
    read_request,
)
from runner.system import process


def main() -> int:
    """Read one request from stdin and carry it out; returns the exit status, 2 for an unknown kind of request."""
    try:
        request = read_request(_object())
    except UnknownRequest as error:
        print(f"runner.node: {error}", file=sys.stderr)
        return 2
    if isinstance(request, CellRequest):
        return NodeCell(request).run()
    if isinstance(request, StepRequest):
        from runner.node import slurm_step  # imports the engines, which only a Slurm step needs

        return slurm_step.run(request)
    if isinstance(request, CheckRequest):
        send_message(check(request))
    elif isinstance(request, SweepRequest):
        process.stop_marked(request.marker, request.grace_s)
        send_message(Swept())
    else:
        send_message(Cleaned(clean(Path(request.scratch), request.run_id)))
    return 0


def _object() -> dict[str, Any]:
    """One JSON object from stdin: on one line, or indented, when a brace alone at the margin ends it."""
    lines = [sys.stdin.buffer.readline()]
    if lines[0].strip() == b"{":
        for line in sys.stdin.buffer:
            lines.append(line)
            if line.rstrip() == b"}":
                break
    return json.loads(b"".join(lines) or b"{}")


if __name__ == "__main__":
    sys.exit(main())
