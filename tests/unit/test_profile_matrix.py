"""The judgement of benchmarks/profile_matrix.py: when profiles do not do the same. It itself downloads some 15 GB."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest

from role_modules import ROOT

spec = importlib.util.spec_from_file_location("profile_matrix", ROOT / "benchmarks" / "profile_matrix.py")
matrix = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = matrix  # where dataclasses look for types
spec.loader.exec_module(matrix)

ONES = np.ones(3, np.float32)
GOOD = matrix.Outcome(
    "current",
    versions={"torch": "2.13.0"},
    operations=49,
    losses={"random": [7.6, 6.3], "checkpoint": [7.5, 6.2]},
    rounded={"random": [7.6, 6.301], "checkpoint": [7.5, 6.2]},
    probe={"sdpa": ONES, "sdpa-alone": ONES, "sdpa-loss": np.float32(6.0)},
)


def other(**changed) -> matrix.Outcome:
    return replace(GOOD, **{"profile": "user", "rounded": {}, **changed})


def test_profiles_that_differ_by_rounding_do_the_same():
    rounded = other(
        losses={"random": [7.63, 6.29], "checkpoint": [7.5, 6.2]},
        probe={**GOOD.probe, "sdpa": ONES + np.float32(1e-5)},
    )
    text, good = matrix.report([GOOD, rounded], "", 60)
    assert good and "Result: the same loss everywhere." in text
    assert "| `user` | 49, 0 wrong | 7.6300 → 6.2900 | 0.395% | 7.5000 → 6.2000 | 0.000% | 1e-05 | 1e-05 |" in text


@pytest.mark.parametrize(
    "different",
    [
        other(losses={"random": [7.64, 6.3], "checkpoint": [7.5, 6.2]}),
        other(losses={"random": [7.6, 6.3], "checkpoint": [7.5, 6.24]}),
        other(losses={"random": [7.6], "checkpoint": [7.5, 6.2]}),
        other(probe={**GOOD.probe, "sdpa": ONES + np.float32(1.27)}),
        other(probe={name: value + np.float32(0.01) for name, value in GOOD.probe.items()}),
        other(operations=0),
        other(wrong=1),
        other(failure="runner: No module named 'deepspeed'"),
    ],
    ids=["loss", "loss from a checkpoint", "fewer steps", "crossing", "logits", "no operation", "wrong", "failed"],
)
def test_a_difference_is_a_bad_end(different):
    text, good = matrix.report([GOOD, different], "", 60)
    assert not good and "Result: NOT the same everywhere." in text


@pytest.mark.parametrize(
    "rounded",
    [
        {"random": [7.6, 6.308], "checkpoint": [7.5, 6.2]},
        {"random": [7.6, 6.3], "checkpoint": [7.5, 6.207]},
        {"random": [7.6], "checkpoint": [7.5, 6.2]},
        {},
    ],
    ids=["random", "checkpoint", "fewer steps", "not measured"],
)
def test_training_that_amplifies_rounding_compares_nothing(rounded):
    _, good = matrix.report([replace(GOOD, rounded=rounded), other()], "", 60)
    assert not good


def test_the_reason_of_a_failure_is_kept():
    text, _ = matrix.report([GOOD, other(failure="runner: first line\nlast line")], "", 60)
    assert text.endswith("`user` failed:\n\n    runner: first line\n    last line\n")
