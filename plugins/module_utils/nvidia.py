"""What nvidia-smi says, for the modules of several roles."""

from __future__ import annotations

import csv
import io
import json

CUDA_FACT = "/etc/ansible/facts.d/cuda.fact"  # written by the role cuda_check


def query(phase, fields, timeout_s=20):
    """One dictionary a GPU with `fields` of `nvidia-smi --query-gpu`, values as printed, without units.

    Returns (rows, ""), or ([], reason) where nvidia-smi is missing, fails or does not answer in time.
    """
    argv = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    outcome = phase.run(argv, timeout_s)
    if not outcome.ok:
        return [], outcome.last_line
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(outcome.stdout)) if row]
    if any(len(row) != len(fields) for row in rows):
        return [], f"nvidia-smi printed {len(rows[0])} columns instead of {len(fields)}"
    return [dict(zip(fields, row)) for row in rows], ""  # noqa: B905 - strict= is newer than a node's Python


def driver(phase):
    """The driver's version as cuda.fact has it, else as nvidia-smi says; ("", reason) where neither knows."""
    try:
        with open(CUDA_FACT, encoding="utf-8") as file:
            if version := json.load(file).get("driver"):
                return version, ""
    except (OSError, ValueError):
        pass  # the first run, or a damaged file: ask the driver itself
    rows, reason = query(phase, ["driver_version"])
    return (rows[0]["driver_version"], "") if rows else ("", reason or "no GPU")


def version(text):
    """A version as a tuple of numbers, for comparing: "560.35.03" -> (560, 35, 3). () where there is none."""
    numbers = []
    for part in str(text).strip().split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
