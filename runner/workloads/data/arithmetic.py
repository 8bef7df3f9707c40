"""The built-in arithmetic set of GSM8K's shape: seeded, for machines without access to a hub.

A row is a question and an answer with each calculation between `<<` and `>>` and the result after `####`, as verl's
reward function for openai/gsm8k reads it. Pure: the same count and seed give the same rows on every machine.
"""

from __future__ import annotations

import random

from runner.errors import UsageError

# Increase it with any change to the rows below: it is part of the cache key of prepared data.
VERSION = 1
MOST = 50_000  # rows, which are all different

Row = dict[str, str]  # GSM8K's fields: question, answer

_PEOPLE = ("Ada", "Bruno", "Carla", "Chen", "Elena", "Emeka", "Hana", "Ivan", "Kavya", "Leila", "Mateo", "Noah", "Olga",
           "Priya", "Sofia", "Tom")  # fmt: skip
_GOODS = ("apples", "books", "coins", "cups", "keys", "lamps", "marbles", "pears", "pencils", "plates", "shells",
          "stamps")  # fmt: skip


def require(samples: int) -> None:
    """Raise UsageError for a number of rows that there are not."""
    if not 1 <= samples <= MOST:
        raise UsageError(f"data: samples is {samples}; give 1 to {MOST:,}")


def generate(samples: int, seed: int) -> list[Row]:
    """`samples` rows without a question twice. Raises UsageError as `require`."""
    require(samples)
    rng = random.Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < samples:
        row = rng.choice(_KINDS)(rng)
        rows[row["question"]] = row
    return list(rows.values())


def _step(a: int, sign: str, b: int) -> tuple[int, str]:
    """The result of a calculation, and how GSM8K writes it."""
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return result, f"{a} {sign} {b} = <<{a}{sign}{b}={result}>>{result}"


def _gains(rng: random.Random) -> Row:
    who, what = rng.choice(_PEOPLE), rng.choice(_GOODS)
    a, b = rng.randint(2, 30), rng.randint(2, 20)
    total, text = _step(a, "+", b)
    verb = rng.choice(["buys", "finds", "gets"])
    return {
        "question": f"{who} has {a} {what} and {verb} {b} more. How many {what} does {who} have now?",
        "answer": f"{who} has {text} {what}.\n#### {total}",
    }


def _loses(rng: random.Random) -> Row:
    who, what = rng.choice(_PEOPLE), rng.choice(_GOODS)
    a, b = rng.randint(13, 40), rng.randint(2, 11)
    left, text = _step(a, "-", b)
    verb = rng.choice(["gives away", "loses", "sells"])
    return {
        "question": f"{who} has {a} {what} and {verb} {b}. How many {what} are left?",
        "answer": f"{who} has {text} {what}.\n#### {left}",
    }


def _packs(rng: random.Random) -> Row:
    who, what = rng.choice(_PEOPLE), rng.choice(_GOODS)
    a, b = rng.randint(2, 9), rng.randint(2, 12)
    total, text = _step(a, "*", b)
    return {
        "question": f"{who} has {a} boxes with {b} {what} each. How many {what} are that?",
        "answer": f"{who} has {text} {what}.\n#### {total}",
    }


def _twice(rng: random.Random) -> Row:
    who, what = rng.choice(_PEOPLE), rng.choice(_GOODS)
    a, b, c = rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 5)
    total, first = _step(a, "*", b)
    left, second = _step(total, "-", c)
    return {
        "question": f"{who} has {a} boxes with {b} {what} each and sells {c}. How many {what} are left?",
        "answer": f"At first {who} has {first} {what}.\nThen {who} has {second} {what}.\n#### {left}",
    }


_KINDS = (_gains, _loses, _packs, _twice)
