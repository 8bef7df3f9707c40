"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from runner.system.wording import are, counted


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (0, ("node",), "0 nodes"),
        (1, ("node",), "1 node"),
        (2, ("GPU",), "2 GPUs"),
        (4096, ("wrong element",), "4,096 wrong elements"),
        (1, ("property", "properties"), "1 property"),
        (13, ("property", "properties"), "13 properties"),
    ],
)
def test_a_number_agrees_with_its_noun(number: int, words: tuple[str, ...], text: str) -> None:
    assert counted(number, *words) == text


def test_the_verb_agrees_too() -> None:
    assert [are(number) for number in range(3)] == ["are", "is", "are"]
