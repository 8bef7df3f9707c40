"""Reading prepared sequences on a rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import UsageError
from runner.workloads.data import IGNORED
from runner.workloads.job import RankJob

if TYPE_CHECKING:
    import numpy as np


LOOKED_THROUGH = 1 << 30  # bytes of positions: less than a second, where they have just been copied


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank as int32 arrays [micro_batch, seq_len].

    `longest` is a bound of the lengths of its samples in tokens, the same for all batches of the data.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    tokens: int  # without padding
    longest: int

    @property
    def loss_tokens(self) -> int:
        """The number of tokens whose label counts in the loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def bounds(self) -> np.ndarray:
        """int32 [segments + 1]: boundaries of segments in the flattened batch, which attention does not cross."""
        import numpy as np

        starts = (self.position_ids.reshape(-1) == 0).nonzero()[0]
        return np.append(starts, self.position_ids.size).astype(np.int32)


class PackedData:
    """The sequences in a folder that `runner data prepare` wrote, read through mmap: ranks of a node share the pages.

    Raises UsageError where the folder holds no prepared data.
    """

    def __init__(self, folder: Path) -> None:
        import numpy as np

        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            arrays = ("input_ids", "labels", "position_ids", "n_tokens")
            self._ids, self._labels, self._positions, self._tokens = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in arrays
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"no prepared data in {folder} ({error}); make it with `runner data prepare`") from None
        self.count, self.seq_len = self._ids.shape

    def check(self, job: RankJob) -> None:
        """Raise UsageError where the job's model cannot train on these sequences (length, vocabulary)."""
        model = job.model or {}
        expected = job.params.get("seq_len") or self.seq_len
        if expected != self.seq_len:
            raise UsageError(f"data is packed to {self.seq_len} tokens, the job expects {expected}; prepare it again")
        if self.seq_len > model["max_seq_len"]:
            raise UsageError(
                f"sequences of {self.seq_len} tokens, but {model['name']} takes {model['max_seq_len']}: "
                f"lower sft.seq_len"
            )
        if self.manifest["vocab_size"] > model["vocab_size"]:
            raise UsageError(
                f"the data's tokenizer has {self.manifest['vocab_size']} tokens, {model['name']} embeds "
                f"{model['vocab_size']}: prepare the data with the model's tokenizer"
            )

    def read(self, first: int, count: int, seed: int) -> Batch:
        """Sequences [first, first + count) of the endless shuffled stream that all ranks share, given by `seed`."""
        rows = [place(first + i, self.count, seed) for i in range(count)]
        tokens = int(self._tokens[rows].sum())
        return Batch(self._ids[rows], self._labels[rows], self._positions[rows], tokens, self.longest)

    @cached_property
    def longest(self) -> int:
        """The longest run of padding or sample in tokens; of a large data set, which would take long, `seq_len`."""
        return int(self._positions.max()) + 1 if self._positions.nbytes <= LOOKED_THROUGH else self.seq_len


def place(position: int, count: int, seed: int) -> int:
    """The index of the sequence at `position` of the stream: each epoch has all `count` once, in a different order."""
    epoch, within = divmod(position, count)
    return int(_order(count, seed, epoch)[within])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    import numpy as np

    # Not default_rng(seed): the data was shuffled with it, and default_rng([seed, 0]) is the same generator, which
    # would restore the order in which the sequences were packed.
    return np.random.default_rng([0x5F7, seed, epoch]).permutation(count)
