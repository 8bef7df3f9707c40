"""Speed and utilisation of packing: `python benchmarks/packing.py [--samples N] [--repeats R]`.

One process, no GPU, no network. Two seeded distributions of lengths in tokens, prompt included, cut at
the sequence's length:

    alpaca   45 + lognormal(median 60, sigma 0.9)    short answers behind Alpaca's long preamble
    chat     30 + lognormal(median 400, sigma 1.0)   conversations with a long tail, some cut

The constant is the length of the shortest sample (template and a few words); it leads to gaps that a
greedy packer cannot fill, so best-fit decreasing is shown next to `pack`. `least` is
ceil(tokens / seq_len): no packing needs fewer sequences. `pack s` is the assignment alone; `write s`
also includes building and writing all arrays to a temporary folder, for the first `--write-samples`
samples. Times are the median of the repeats (least–most).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from runner.workloads.data.pack import Flat, assemble, pack

DISTRIBUTIONS = {"alpaca": (45, 60, 0.9), "chat": (30, 400, 1.0)}


def lengths_of(name: str, samples: int, seq_len: int) -> np.ndarray:
    """int64 [samples]: lengths in tokens of a distribution's samples, at most `seq_len`; the same on each call."""
    shortest, median, sigma = DISTRIBUTIONS[name]
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, samples)
    return np.minimum(shortest + drawn.astype(np.int64), seq_len)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> int:
    """The number of bins of the usual greedy packing: each sample goes into the fullest bin that has room for it."""
    bins_with = [0] * (capacity + 1)  # by remaining space; a set bit of `open_` marks a space that some bin has
    n_bins = open_ = 0
    for length in np.sort(lengths)[::-1].tolist():
        fitting = open_ >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            bins_with[space] -= 1
            if not bins_with[space]:
                open_ ^= 1 << space
        else:
            space, n_bins = capacity, n_bins + 1
        bins_with[space - length] += 1
        open_ |= 1 << (space - length)
    return n_bins


def timed(call: Callable[[], object], repeats: int) -> str:
    """The time of `call` in s over `repeats` calls, as text: `median (least–most)`."""
    call()  # the first call includes imports and page faults
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return f"{statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f})"


def write(lengths: np.ndarray, seq_len: int) -> None:
    """Pack samples of these lengths, and build and write all arrays to a temporary folder."""
    n_tokens = int(lengths.sum())
    flat = Flat(np.zeros(n_tokens, np.int32), np.ones(n_tokens, np.bool_), lengths)
    with tempfile.TemporaryDirectory() as folder:
        assemble(Path(folder), flat, pack(lengths, seq_len), seq_len, pad=0)


def machine() -> str:
    """Processor, cores, load and versions of this machine, in one line."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, load {load:.1f}; "
        f"Python {platform.python_version()}, numpy {np.__version__}"
    )


def main() -> None:
    """Measure every distribution at every sequence length, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--write-samples", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{machine()}\n{options.samples:,} samples, {options.repeats} repeats\n")
    print(
        "| lengths | seq_len | tokens | sequences | least | utilisation % | best-fit decreasing % | pack s | write s |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in DISTRIBUTIONS:
        for seq_len in (512, 2048, 4096):
            lengths = lengths_of(name, options.samples, seq_len)
            tokens, sequences = int(lengths.sum()), int(pack(lengths, seq_len).max()) + 1
            packing = timed(lambda lengths=lengths, seq_len=seq_len: pack(lengths, seq_len), options.repeats)
            some = lengths[: options.write_samples]
            writing = timed(lambda some=some, seq_len=seq_len: write(some, seq_len), min(3, options.repeats))
            greedy = 100 * tokens / (best_fit_decreasing(lengths, seq_len) * seq_len)
            print(
                f"| {name} | {seq_len} | {tokens:,} | {sequences:,} | {-(-tokens // seq_len):,} "
                f"| {100 * tokens / (sequences * seq_len):.3f} | {greedy:.3f} | {packing} | {writing} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
