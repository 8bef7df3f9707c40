"""The folder of one cell on one node: the only module that knows the names of the files in it."""

from __future__ import annotations

MESSAGES = "messages.jsonl"  # in a cell's folder: what its agent says, where nobody hears its stdout


LAUNCHER = "launcher"
