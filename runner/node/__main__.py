"""`python -m runner.node`: the product's one process on a node, started once per cell by any backend.

It reads one JSON request from stdin, carries it out, and answers with one JSON message per line on stdout.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from runner.node import leftovers
from runner.node.agent import NodeCell
from runner.node.check import check, clean
from runner.node.output import send_message
from runner.node.protocol import Cleaned, Swept
from runner.node.requests import (
    CellRequest,
    CheckRequest,
    EnvironmentRequest,
    LinksRequest,
    StepRequest,
    StoreRequest,
    SweepRequest,
    UnknownRequest,
    read_request,
)

_BLOCK = 65536
_LAST_LINE = re.compile(rb"^\}[ \t\r]*\n", re.MULTILINE)


def main() -> int:
    """Read one request from stdin and carry it out; returns the exit status, 2 for an unknown kind of request."""
    try:
        asked, early = _asked()
        request = read_request(asked)
    except UnknownRequest as error:
        print(f"runner.node: {error}", file=sys.stderr)
        return 2
    if isinstance(request, CellRequest):
        return NodeCell(request, early).run()
    if isinstance(request, StepRequest):
        from runner.node import slurm_step  # imports the engines, which only a Slurm step needs

        return slurm_step.run(request)
    if isinstance(request, CheckRequest):
        send_message(check(request))
    elif isinstance(request, SweepRequest):
        leftovers.remove(request.marker, request.grace_s)
        send_message(Swept())
    elif isinstance(request, StoreRequest):
        from runner.node import code

        send_message(code.store(request))
    elif isinstance(request, LinksRequest):
        from runner.node import links

        links.probe(request, early)
    elif isinstance(request, EnvironmentRequest):
        from runner.node import venv

        return venv.answer(request, early)
    else:
        send_message(Cleaned(clean(Path(request.scratch), request.run_id)))
    return 0


def _asked() -> tuple[dict[str, Any], bytes]:
    """One JSON object from stdin, and what had come after it: words of a controller that did not wait.

    Read unbuffered, since the leash reads on from there.
    """
    data = b""
    while (end := _end(data)) is None and (more := os.read(0, _BLOCK)):
        data += more
    return json.loads(data[:end] or b"{}"), data[end:] if end else b""


def _end(data: bytes) -> int | None:
    """Where the object ends: after its line, or, if it is indented, after a brace alone at the margin."""
    line = data.find(b"\n") + 1
    if not line or data[:line].strip() != b"{":
        return line or None
    last = _LAST_LINE.search(data, line)
    return last.end() if last else None


if __name__ == "__main__":
    sys.exit(main())
