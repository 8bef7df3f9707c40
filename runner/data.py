"""Training data: instruction rows from a source, tokenised, packed into full sequences, cached by content.

`prepare` makes a folder that the `sft` workload reads through mmap:

    input_ids.npy     int32 [n_sequences, seq_len]
    labels.npy        int32 [n_sequences, seq_len]   the token itself, or -100 where it is not in the loss
    position_ids.npy  int32 [n_sequences, seq_len]   0 starts a segment; attention must not cross it
    n_tokens.npy      int32 [n_sequences]            real tokens of each sequence, padding excluded
    tokenizer.json, tokenizer_config.json            load with AutoTokenizer.from_pretrained(folder)
    manifest.json                                    what it holds; written last

Only the response and its end-of-sequence token are in the loss. The padding at the end of a sequence
is a segment of its own. The first token of a segment is never in the loss, so the usual shift by one
inside the model predicts nothing across samples.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner.errors import InfrastructureError, UsageError, disk_kind
from runner.sources import TEMPLATE, Content, Sample, Tokens, open_source, open_tokenizer

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
FORMAT = 1  # raise it when the same input gives other arrays: it is part of the cache's key
IGNORED = -100  # the label that cross-entropy passes over
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A prepared folder and its manifest."""

    path: Path
    manifest: dict[str, Any]


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/shakedown/data, or ~/.cache/shakedown/data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shakedown" / "data"


def prepare(
    source: str = "builtin",
    *,
    seq_len: int,
    tokenizer: str | None = None,
    cache_dir: Path,
    samples: int = 4096,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Prepared:
    """Tokenise and pack `source`, or return at once what an earlier call made of the same content.

    source: "builtin", "alpaca", a .json/.jsonl/.parquet file or a folder of them, or a hub id, better
    `id@commit`. Rows hold Alpaca's `instruction`, `input`, `output`, or chat `messages`.
    tokenizer: a Hugging Face id or folder; None is the built-in byte-level BPE.
    samples: how many rows `builtin` has; other sources have their own number.
    seed: makes the built-in rows, and the order of the sequences.
    on_progress: called with (samples tokenised, samples in all).

    Raises UsageError for a source or row that cannot be used, InfrastructureError for a hub that does
    not answer or a disk that cannot be written.
    """
    rows, vocabulary, key = _resolve(source, seq_len, tokenizer, samples, seed)
    folder = cache_dir / key
    if found := _cached(folder):
        return found
    try:
        with _alone(cache_dir, key):
            if found := _cached(folder):  # made by another process while this one waited
                return found
            with _replacing(folder) as temporary:
                manifest = {"schema": SCHEMA, "hash": key, "source": source, "tokenizer": tokenizer or "builtin"}
                manifest |= {"seq_len": seq_len, "seed": seed}
                manifest |= _build(temporary, rows, vocabulary, source, seq_len, seed, on_progress)
                if _resolve(source, seq_len, tokenizer, samples, seed)[2] != key:
                    raise UsageError(f"data {source!r} changed while it was read; prepare it again")
                manifest["bytes"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise InfrastructureError(
            f"cannot prepare data in {cache_dir}: {reason}; free space or choose another --cache-dir", disk_kind(error)
        ) from error
    return Prepared(folder, manifest)


# ---- the cache ----


def _resolve(source: str, seq_len: int, tokenizer: str | None, samples: int, seed: int) -> tuple[Content, Content, str]:
    """The source, the tokenizer, and the key of what they make together."""
    for name, value, least in (("seq-len", seq_len, 8), ("samples", samples, 1), ("seed", seed, 0)):
        if value < least:
            raise UsageError(f"data: {name} is {value}; give at least {least}")
    rows, vocabulary = open_source(source, samples, seed), open_tokenizer(tokenizer)
    parts = json.dumps([FORMAT, TEMPLATE, rows.digest, vocabulary.digest, seq_len, seed])
    return rows, vocabulary, hashlib.sha256(parts.encode()).hexdigest()[:32]


def _cached(folder: Path) -> Prepared | None:
    """The folder's content if it is whole: its manifest is its own and every file has its full size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["schema"] != SCHEMA or manifest["hash"] != folder.name:
            return None
        if any((folder / name).stat().st_size != size for name, size in manifest["bytes"].items()):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return Prepared(folder, manifest)


@contextlib.contextmanager
def _alone(cache_dir: Path, key: str) -> Iterator[None]:
    """One process at a time prepares one key; the kernel lets go of the lock of a killed one."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache_dir.glob(f"{key}.tmp-*"):  # of a killed process: this one holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends well, and is removed otherwise."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        yield temporary
        if folder.exists():  # found unfit by _cached
            folder.rename(Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent)) / "unfit")
        temporary.rename(folder)
    finally:
        for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)


# ---- from samples to arrays ----


def _build(
    folder: Path,
    rows: Content,
    vocabulary: Content,
    source: str,
    seq_len: int,
    seed: int,
    on_progress: Progress | None,
) -> dict[str, Any]:
    """Write all files but the manifest; return the manifest's counts."""
    import numpy as np

    samples, tokens = rows.load(), vocabulary.load()
    flat = _tokenise(samples, tokens, seq_len, on_progress or (lambda done, total: None))
    if not len(flat.lengths):
        raise UsageError(f"data {source!r}: no sample has a response within {seq_len} tokens; give a longer --seq-len")
    bins = pack(flat.lengths, seq_len)
    n_sequences = int(bins.max()) + 1
    bins = np.random.default_rng(seed).permutation(n_sequences)[bins]
    assemble(folder, flat, bins, seq_len, tokens.pad)
    tokens.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(tokens), indent=1) + "\n")
    n_tokens = int(flat.lengths.sum())
    return {
        "vocab_size": tokens.tokenizer.get_vocab_size(),
        "pad_token_id": tokens.pad,
        "eos_token_id": tokens.eos,
        "bos_token_id": tokens.bos,
        "n_samples": len(flat.lengths),
        "n_truncated": flat.n_truncated,
        "n_dropped": flat.n_dropped,
        "n_sequences": n_sequences,
        "n_tokens": n_tokens,
        "n_loss_tokens": int(np.count_nonzero(flat.in_loss)),
        "packing_utilisation_pct": round(100 * n_tokens / (n_sequences * seq_len), 4),
    }


def _tokenizer_config(tokens: Tokens) -> dict[str, Any]:
    names = {"eos_token": tokens.eos, "pad_token": tokens.pad, "bos_token": tokens.bos}
    special = {name: tokens.tokenizer.id_to_token(i) for name, i in names.items() if i is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **special}


@dataclass(frozen=True)
class Flat:
    """All samples one after the other: tokens, whether each is in the loss, and the samples' lengths."""

    ids: np.ndarray  # int32 [n_tokens]
    in_loss: np.ndarray  # bool [n_tokens]
    lengths: np.ndarray  # int64 [n_samples]
    n_truncated: int = 0  # samples cut at their end to fit
    n_dropped: int = 0  # samples left out: nothing of a response fits


def _tokenise(samples: list[Sample], tokens: Tokens, seq_len: int, on_progress: Progress) -> Flat:
    import numpy as np

    tokenizer = tokens.tokenizer
    tokenizer.encode_special_tokens = True  # "<|eos|>" inside a text is text, and ends nothing
    ids, in_loss, lengths = array("i"), bytearray(), array("q")
    n_truncated = n_dropped = 0
    head = [] if tokens.bos is None else [tokens.bos]
    for start in range(0, len(samples), 2048):  # one call encodes a batch on all cores
        batch = samples[start : start + 2048]
        # A response is encoded apart from its prompt: no token spans the two, as when generating.
        encoded = iter(
            tokenizer.encode_batch_fast([text for sample in batch for text, _ in sample], add_special_tokens=False)
        )
        for sample in batch:
            row, mask = list(head), [0] * len(head)
            for _, response in sample:
                piece = next(encoded).ids
                row += [*piece, tokens.eos] if response else piece
                mask += [response] * (len(row) - len(mask))
            mask[0] = 0  # else the last token of the sample before would be asked to predict it
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
    """Assign each sample to a bin so that few bins are used and none holds more than `capacity`.

    lengths: integers [n_samples], each in 1..capacity. Returns int64 [n_samples]: bin numbers
    0..n_bins-1, the same for the same input. Raises ValueError for a length out of range.

    Bins are filled with the longest sample left and then, longest first, with samples from which the
    rest of the bin can still be filled exactly: a subset-sum over the histogram of lengths, kept as the
    bits of an integer. A filling is repeated as often as its lengths last, so the work grows with the
    number of distinct lengths, not of samples. Where lengths vary it comes within a few bins of the
    least possible number; best-fit decreasing leaves gaps no shorter than the shortest sample, 1 % and
    more where prompts are long.
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
        if filling is None:  # the sums promise samples that have run out
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
    """Which totals samples can add up to: bit t of the first integer, bit capacity - t of the second."""
    every = (1 << (capacity + 1)) - 1
    sums, rest = 1, present
    while rest:
        length = (rest & -rest).bit_length() - 1
        if sums >> length == every >> length:
            break  # all totals from here on are possible already; longer samples add none
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
    """How many samples of which lengths go into the next bin; None if `strict` and the total is not met."""
    possible, mirrored = sums
    filling: dict[int, int] = {}
    length = present.bit_length() - 1
    # Aim at the largest total that fits beside the longest sample; no samples could fill what is left.
    wanted = length + (possible & ((1 << (capacity - length + 1)) - 1)).bit_length() - 1
    while length >= 0:
        filling[length] = filling.get(length, 0) + 1
        if filling[length] == count[length]:
            present ^= 1 << length
        wanted -= length
        # Bit L of the shifted integer says that wanted - L is a possible total: L leads to the aim.
        good = present & mirrored >> (capacity - wanted) if wanted else 0
        if wanted and not good:
            if strict:
                return None
            good = present & ((1 << (wanted + 1)) - 1)  # the aim is missed: whatever fits, longest first
        length = good.bit_length() - 1
    return filling


def assemble(folder: Path, flat: Flat, bins: np.ndarray, seq_len: int, pad: int) -> None:
    """Write the four arrays of the packed samples to `folder`; samples keep their order inside a bin."""
    import numpy as np

    n_sequences = int(bins.max()) + 1
    n_tokens = np.bincount(bins, weights=flat.lengths, minlength=n_sequences).astype(np.int64)
    # Padding is one more segment at the end of each sequence, taken from behind the last sample.
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
        step = max(1, (1 << 18) // seq_len)  # 1 MiB a chunk stays in the processor's cache
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


# ---- command line ----


@click.group()
def data() -> None:
    """Training data for the sft test."""


@data.command("prepare")
@click.option("--source", default="builtin", show_default=True, help="builtin, alpaca, a file or folder, or a hub id.")
@click.option("--tokenizer", help="Hugging Face id or folder.  [default: the built-in one]")
@click.option("--seq-len", type=int, default=2048, show_default=True, help="Tokens in a sequence.")
@click.option("--samples", type=int, help="Rows of the built-in set.  [default: 4096]")
@click.option("--seed", type=int, default=0, show_default=True, help="For the built-in rows and the order.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="[default: ~/.cache/shakedown/data]")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON on stdout.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
def prepare_command(
    source: str,
    tokenizer: str | None,
    seq_len: int,
    samples: int | None,
    seed: int,
    cache_dir: Path | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Tokenise and pack instruction data once; later calls find it in the cache."""
    if samples is not None and source != "builtin":
        raise UsageError(f"--samples is for builtin; {source!r} has its own number of rows: leave it out")
    cache_dir = cache_dir or default_cache_dir()
    samples = 4096 if samples is None else samples
    if dry_run:
        folder = cache_dir / _resolve(source, seq_len, tokenizer, samples, seed)[2]
        answer = {"path": str(folder), "cached": _cached(folder) is not None}
    else:
        with _progress_bar() as on_progress:
            found = prepare(
                source,
                seq_len=seq_len,
                tokenizer=tokenizer,
                cache_dir=cache_dir,
                samples=samples,
                seed=seed,
                on_progress=on_progress,
            )
        answer = {"path": str(found.path), **found.manifest}
    if as_json:
        click.echo(json.dumps(answer))
        return
    answer.pop("bytes", None)
    width = max(map(len, answer))
    for name, value in answer.items():
        click.echo(f"{name:<{width}}  {value:,}" if type(value) is int else f"{name:<{width}}  {value}")


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar with the time left on stderr, imported and drawn only when there is something to wait for."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def show(done: int, total: int) -> None:
            if not bars:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                columns = TextColumn("tokenise"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
                bars.append(stack.enter_context(Progress(*columns, console=Console(stderr=True))))
                bars[0].add_task("tokenise", total=total)
            bars[0].update(bars[0].task_ids[0], completed=done)

        yield show
