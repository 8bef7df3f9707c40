"""Numbers with their nouns, as messages and reports write them. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 node`, `3 nodes`, `1,024 nodes`, `0 nodes`; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in order, neighbours folded: `2-5, 9`; empty for none."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


def size_text(size: float) -> str:
    """A number of bytes as text: `8 B`, `64 KiB`, `1.5 GiB`."""
    for name in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or name == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {name}"


def span_text(seconds: float | None) -> str:
    """A duration in s, min or h with its unit; empty for None."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def took_text(took_s: float | None, queued_s: float = 0.0) -> str:
    """The time that something ran and, where it waited in a queue, that time as well: `45 s, queued 6 min`."""
    return ", ".join(filter(None, (span_text(took_s), f"queued {span_text(queued_s)}" if queued_s >= 1 else "")))


def are(number: int) -> str:
    """`is` after 1, `are` after any other number."""
    return "is" if number == 1 else "are"


def was(number: int) -> str:
    """`was` after 1, `were` after any other number."""
    return "was" if number == 1 else "were"
