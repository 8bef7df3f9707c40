"""Sets of node names: folding, and expansion in written order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable


def fold(words: Iterable[str]) -> str:
    """The names as one folded set: `node[001-003]` for node001, node002, node003."""
    from ClusterShell.NodeSet import NodeSet

    return str(NodeSet.fromlist(list(words), resolver=None))


def expand(nodelist: str) -> tuple[str, ...]:
    """The names of a Slurm node list in its written order, the order of ranks (ClusterShell's sets sort).

    Raises ValueError where `nodelist` is not a node list.
    """
    names: list[str] = []
    for part in re.split(r",(?![^\[\]]*\])", nodelist.strip()):
        if not re.fullmatch(r"(?!$)[\w.-]*(\[\d+(-\d+)?(,\d+(-\d+)?)*\][\w.-]*)*", part, re.ASCII):
            raise ValueError(f"{nodelist!r} is not a list of nodes; write node[001-003],other")
        words = re.split(r"\[(.*?)\]", part)  # text, ranges, text, ranges, text
        choices = [_numbers(word) if n % 2 else [word] for n, word in enumerate(words)]
        names += ("".join(pieces) for pieces in itertools.product(*choices))
    return tuple(dict.fromkeys(names))


def _numbers(ranges: str) -> list[str]:
    bounds = [(first, last or first) for first, _, last in (part.partition("-") for part in ranges.split(","))]
    return [f"{n:0{len(first)}}" for first, last in bounds for n in range(int(first), int(last) + 1)]
