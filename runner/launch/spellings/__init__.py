"""The spellings of failures: what NCCL, CUDA, loaders, kernels and libraries say, and the kind that it proves. Pure.

Asked only of what ended a process (`node.lastwords`), never of other lines. The first row that matches decides, so a
row stands above those whose words its own message contains as well: what cannot be downloaded was refused a connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from runner.cluster import xids
from runner.launch.spellings.nodes import NODES, WAITED
from runner.launch.spellings.programs import PROGRAMS
from runner.launch.spellings.row import COMPLAINT, Spelling

__all__ = ("COMPLAINT", "SPELLINGS", "kind_of", "waited")

SPELLINGS = (*PROGRAMS, *NODES)

_WAITED = Spelling(COMPLAINT, "PyTorch", *WAITED)


def kind_of(texts: Iterable[str]) -> str | None:
    """The kind that the first of `texts` proves; a complaint only where none proves more. None: no known spelling."""
    complaint = None
    for text in texts:
        kind = _kind(text)
        if kind not in (None, COMPLAINT):
            return kind
        complaint = complaint or kind
    return complaint


@lru_cache(4096)  # the ranks of one cell say the same
def _kind(text: str) -> str | None:
    if xids.serious(text):
        return "gpu_failed"
    return next((row.kind for row in SPELLINGS if row.matches(text)), None)


def waited(text: str) -> bool:
    """Whether a rank says that others did not take part in a collective."""
    return _WAITED.matches(text)
