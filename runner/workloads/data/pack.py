"""Tokenising samples, and packing them into sequences of one length."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.workloads.data import IGNORED
from runner.workloads.data.sources import Sample, Tokens

if TYPE_CHECKING:
    import numpy as np


Progress = Callable[[int, int], None]  # called with (samples done, samples in total)


@dataclass(frozen=True)
class Flat:
    """All samples concatenated: token ids, whether each token is in the loss, and the samples' lengths in tokens."""

    ids: np.ndarray  # int32 [n_tokens]
    in_loss: np.ndarray  # bool [n_tokens]
    lengths: np.ndarray  # int64 [n_samples]
    n_truncated: int = 0  # samples truncated at their end to fit
    n_dropped: int = 0  # samples dropped because no token of a response fits


def tokenise(samples: list[Sample], tokens: Tokens, seq_len: int, on_progress: Progress) -> Flat:
    """Tokenise `samples` with `tokens`; each is truncated to `seq_len` tokens, or dropped without a response.

    Responses and the end-of-sequence token after each are in the loss; prompts and the first token are not.
    """
    import numpy as np

    tokenizer = tokens.tokenizer
    tokenizer.encode_special_tokens = True  # "<|eos|>" inside a text is encoded as text
    ids, in_loss, lengths = array("i"), bytearray(), array("q")
    n_truncated = n_dropped = 0
    head = [] if tokens.bos is None else [tokens.bos]
    for start in range(0, len(samples), 2048):  # one call encodes a batch on all cores
        batch = samples[start : start + 2048]
        # A response is encoded separately from its prompt: no token spans both, as in generation.
        encoded = iter(
            tokenizer.encode_batch_fast([text for sample in batch for text, _ in sample], add_special_tokens=False)
        )
        for sample in batch:
            row, mask = list(head), [0] * len(head)
            for _, response in sample:
                piece = next(encoded).ids
                row += [*piece, tokens.eos] if response else piece
                mask += [response] * (len(row) - len(mask))
            mask[0] = 0  # otherwise the last token of the previous sample would have to predict it
            if not any(mask[:seq_len]):
                n_dropped += 1
                continue
            n_truncated += len(row) > seq_len
            ids.extend(row[:seq_len])
            in_loss.extend(mask[:seq_len])
            lengths.append(min(len(row), seq_len))
        on_progress(start + len(batch), len(samples))
    return Flat(
        np.frombuffer(ids, np.int32),
        np.frombuffer(in_loss, np.bool_),
        np.frombuffer(lengths, np.int64),
        n_truncated,
        n_dropped,
    )


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign each sample to a bin so that few bins are used and none has more than `capacity` tokens.

    lengths: integers [n_samples], each in 1..capacity. Returns int64 [n_samples]: bin numbers
    0..n_bins-1, the same for the same input. Raises ValueError for a length out of range.

    Each bin starts with the longest remaining sample and then, longest first, gets samples with which the
    rest of the bin can still be filled exactly: a subset sum over the histogram of lengths, stored as the
    bits of an integer. A filling is repeated while samples of its lengths remain, so the work grows with the
    number of distinct lengths, not of samples. With varied lengths the result is within a few bins of the
    minimum; best-fit decreasing leaves gaps no shorter than the shortest sample, 1 % and more where prompts
    are long.
    """
    import numpy as np

    lengths = np.asarray(lengths)
    bins = np.empty(len(lengths), np.int64)
    if not len(lengths):
        return bins
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must lie in 1..{capacity}, found {lengths.min()}..{lengths.max()}")
    by_length = np.argsort(lengths, kind="stable")
    histogram = np.bincount(lengths, minlength=capacity + 1)
    ready = (np.cumsum(histogram) - histogram).tolist()  # where in by_length the next sample of a length is
    count: list[int] = histogram.tolist()
    present = sum(1 << length for length in range(1, capacity + 1) if count[length])
    sums, fresh = _sums(present, count, capacity), True
    n_bins = 0
    while present:
        filling = _filling(present, count, capacity, sums, strict=not fresh)
        if filling is None:  # the sums include samples that are used up
            sums, fresh = _sums(present, count, capacity), True
            continue
        times = min(count[length] // k for length, k in filling.items())
        for length, k in filling.items():
            chosen = by_length[ready[length] : ready[length] + times * k]
            bins[chosen] = np.repeat(np.arange(n_bins, n_bins + times), k)
            ready[length] += times * k
            count[length] -= times * k
            if not count[length]:
                present ^= 1 << length
                fresh = False
        n_bins += times
    return bins


def _sums(present: int, count: list[int], capacity: int) -> tuple[int, int]:
    """The totals that samples can add up to: total t is bit t of the first integer, bit capacity - t of the second."""
    every = (1 << (capacity + 1)) - 1
    sums, rest = 1, present
    while rest:
        length = (rest & -rest).bit_length() - 1
        if sums >> length == every >> length:
            break  # all totals from here on are already possible; longer samples add none
        rest &= rest - 1
        left, part = min(count[length], capacity // length), 1
        while left:  # parts of 1, 2, 4 … samples make every number of them
            part = min(part, left)
            sums |= sums << part * length
            left -= part
            part *= 2
        sums &= every
    return sums, int(f"{sums:0{capacity + 1}b}"[::-1], 2)


def _filling(
    present: int, count: list[int], capacity: int, sums: tuple[int, int], strict: bool
) -> dict[int, int] | None:
    """{length: number of samples} for the next bin; None if `strict` and the target total is not reached."""
    possible, mirrored = sums
    filling: dict[int, int] = {}
    length = present.bit_length() - 1
    # The target: the largest total that fits besides the longest sample; no sample could fill the remainder.
    target = length + (possible & ((1 << (capacity - length + 1)) - 1)).bit_length() - 1
    while length >= 0:
        filling[length] = filling.get(length, 0) + 1
        if filling[length] == count[length]:
            present ^= 1 << length
        target -= length
        # Bit L of the shifted integer is set if target - L is a possible total: then L can be used.
        good = present & mirrored >> (capacity - target) if target else 0
        if target and not good:
            if strict:
                return None
            good = present & ((1 << (target + 1)) - 1)  # the target cannot be reached: any that fits, longest first
        length = good.bit_length() - 1
    return filling


def assemble(folder: Path, flat: Flat, bins: np.ndarray, seq_len: int, pad: int) -> None:
    """Write the four arrays of the packed samples (see `prepare`) to `folder`; samples keep their order within a bin.

    `bins` has the bin of each sample, `seq_len` is the length of a sequence in tokens, `pad` the id of the padding
    token. Raises OSError for a full disk.
    """
    import numpy as np

    n_sequences = int(bins.max()) + 1
    n_tokens = np.bincount(bins, weights=flat.lengths, minlength=n_sequences).astype(np.int64)
    # Padding is one more segment at the end of each sequence, copied from after the last sample.
    ids = np.concatenate([flat.ids, np.full(seq_len, pad, np.int32)])
    in_loss = np.concatenate([flat.in_loss, np.zeros(seq_len, np.bool_)])
    short = np.flatnonzero(n_tokens < seq_len)
    owner = np.concatenate([bins, short])
    length = np.concatenate([flat.lengths, seq_len - n_tokens[short]])
    source = np.concatenate([np.cumsum(flat.lengths) - flat.lengths, np.full(len(short), len(flat.ids))])
    order = np.argsort(owner, kind="stable")
    length, source = length[order], source[order]
    first_segment = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=n_sequences))])

    np.save(folder / "n_tokens.npy", n_tokens.astype(np.int32))
    names = ("input_ids", "labels", "position_ids")
    with contextlib.ExitStack() as stack:
        # Not memory-mapped: a full disk would kill the process instead of raising an error.
        files = [stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in names]
        header = {"descr": "<i4", "fortran_order": False, "shape": (n_sequences, seq_len)}
        for file in files:
            np.lib.format.write_array_header_1_0(file, header)
        step = max(1, (1 << 18) // seq_len)  # chunks of 1 MiB stay in the processor's cache
        for start in range(0, n_sequences, step):
            here = slice(first_segment[start], first_segment[min(start + step, n_sequences)])
            lengths = length[here]
            begins = np.cumsum(lengths) - lengths
            position = np.arange(lengths.sum()) - np.repeat(begins, lengths)
            index = np.repeat(source[here], lengths) + position
            chunk = ids[index]
            labels = np.where(in_loss[index], chunk, np.int32(IGNORED))
            for file, values in zip(files, (chunk, labels, position.astype(np.int32)), strict=True):
                file.write(memoryview(values))
