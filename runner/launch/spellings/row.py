"""A row of the table: who says what, and the kind of failure that it proves. Pure."""

from __future__ import annotations

import re


class Spelling:
    """A row: the `kind` of failure, who says so (`source`), and what (`words`: regular expressions, any case)."""

    def __init__(self, kind: str, source: str, *words: str) -> None:
        self.kind, self.source, self.words = kind, source, words
        self._found = re.compile("|".join(f"(?:{each})" for each in words), re.IGNORECASE | re.MULTILINE)

    def matches(self, text: str) -> bool:
        """Whether `text` has one of the words."""
        return bool(self._found.search(text))


# What a rank says that has lost others: it proves that there is a failure, not where.
COMPLAINT = "lost_peers"
