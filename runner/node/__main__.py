"""`python -m runner.node`: the product's one process on a node, started once per cell by any backend.

It reads one JSON request from stdin, does it, and answers with one JSON message a line on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from runner.node.agent import NodeCell
from runner.node.check import check, clean
from runner.node.output import say
from runner.node.slurm_step import run
from runner.system import process


def main() -> int:
    request = _request()
    kind = request.get("kind")
    if kind == "check":
        say("check", **check(request))
        return 0
    if kind == "cell":
        return run(request) if request.get("slurm") else NodeCell(request).run()
    if kind == "sweep":
        process.stop_marked(request["marker"], request["grace_s"])
        say("sweep")
        return 0
    if kind == "clean":
        say("clean", removed=clean(Path(request["scratch"]), request["run_id"]))
        return 0
    print(f"runner.node: unknown request {kind!r}", file=sys.stderr)
    return 2


def _request() -> dict[str, Any]:
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
