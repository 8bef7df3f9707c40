"""What the report says in words: signs, headlines, titles, and the glossary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner import failures
from runner.judge import metrics
from runner.system.wording import counted

SIGNS = {"pass": "✓", "fail": "✕", "inconclusive": "?", "not_judged": "–"}


VERDICTS = {"pass": "pass", "fail": "fail", "inconclusive": "inconclusive", "not_judged": "not judged"}


HEADLINES = {
    "pass": "The cluster meets its targets",
    "fail": "The cluster does not meet its targets",
    "inconclusive": "Undecided: more repeats are needed",
    "not_judged": "It works; its speed was not judged",
}


# metric -> what it means; docs/metrics.md has the formulas and sources.
GLOSSARY = {
    "tokens_per_s": "Tokens that count in the loss, of all ranks, per second of measured steps. "
    "A step lasts as long as its slowest rank.",
    "tokens_per_s_per_gpu": "tokens_per_s ÷ number of GPUs (ranks).",
    "processed_tokens_per_s": "All real tokens, prompts included and padding excluded, per second.",
    "scaling_efficiency": "tokens_per_s_per_gpu on N nodes ÷ that on the smallest node count, median over repeats, "
    "with a 95 % bootstrap interval over repeats and steps.",
    "step_time_s": "One optimizer step, all accumulation included; p50, p95 and MAD (median absolute deviation) "
    "over measured steps.",
    "mfu": "Model FLOP utilisation: useful arithmetic ÷ the GPUs' dense bf16 peak. Recomputation counts for nothing.",
    "gpu_util_pct_mean": "Share of time in which NVML saw a kernel on the GPU, over measured steps. "
    "It does not say how well the kernel used the GPU: read MFU beside it.",
    "peak_memory_gib": "Largest memory of any rank: allocated GPU memory, or resident memory on a CPU.",
    "packing_utilisation_pct": "Real tokens ÷ positions of the packed sequences.",
    "busbw_gb_per_s": "Bus bandwidth: message size ÷ time, scaled by what the wires carry, so that collectives and "
    "sizes compare with a link's rate. 1 GB = 10⁹ B.",
    "latency_us": "Time of one operation at the smallest size (8 bytes, or one element a rank), the slowest rank's. "
    "For ping_pong half of a round trip.",
    "ceiling": "The highest bus bandwidth that the node's NICs or NVLink allow for any algorithm.",
    "wrong_values": "Elements of a collective's result that differ from the exact answer.",
}


def title(kind: str) -> str:
    """What a finding of this kind is called."""
    return failures.KINDS[failures.current(kind)].title


def headline(summary: Mapping[str, Any]) -> str:
    """The verdict in plain words."""
    every = len(summary["cells"])
    lost = sum(cell["state"] != "complete" for cell in summary["cells"])
    unfinished = f"{lost} of {counted(every, 'cell')} did not finish"
    if summary["state"] == "failed":
        return f"The run failed: {unfinished}"
    if summary["state"] == "incomplete":
        return f"The run is incomplete: {unfinished}"
    if summary["state"] == "cancelled":
        return f"The run was stopped: {unfinished}"
    kinds = {failures.current(finding["kind"]) for finding in summary["findings"]}
    if len(kinds) > 1:
        return f"The cluster has {counted(len(summary['findings']), 'problem')}"
    if kinds and (said := failures.KINDS[kinds.pop()].headline):
        return said
    return HEADLINES[summary["verdict"]]


def target_text(target: Mapping[str, Any]) -> str:
    """`at least 98 %`, `at most 50 µs`."""
    word = "at least" if target["direction"] == "min" else "at most"
    return f"{word} {target['value']:g} {metrics.unit(target['metric'])}".strip()
