"""A process of benchmarks/sft_speed.py that trains without the product: `sft_speed_trainers.py FOLDER`.

FOLDER has the job.json of the product's cell and an arm.json (`Work`). Model, initial weights, data and optimizer are
those of the job; each step is written to rank0.jsonl as a rank of the product writes it. Three trainers:

    defaults  transformers.Trainer with bf16 and nothing else: batches of 8 samples, padded to the longest
    padded    the same Trainer with the product's optimizer and global batches, and the micro-batch that a short
              search finds
    trl       trl.SFTTrainer with packing (the product's sequences), no recomputation, and Liger's kernels where they
              are installed; attention and micro-batch by a search among what is installed

All keep float32 weights and compute under bf16 autocast: what the product's float32 master weights amount to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.workloads.data import IGNORED
from runner.workloads.job import Events, RankJob
from runner.workloads.sft.data import Batch, PackedData

LARGEST = 8  # sequences of a micro-batch that are tried


@dataclass(frozen=True)
class Work:
    """What arm.json asks for. `steps` are measured, after `warmup_steps`.

    `choice` is what an earlier process found (`Choice` as a dict); None: search, and begin no attempt when `search_s`
    seconds have passed.
    """

    trainer: str  # "defaults", "padded" or "trl"
    global_batch: int  # sequences
    steps: int
    warmup_steps: int
    choice: dict[str, Any] | None = None
    search_s: float = 30.0


@dataclass(frozen=True)
class Choice:
    """Attention as transformers calls it, and the micro-batch: sequences, or samples for `defaults`."""

    attention: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.micro_batch} with {self.attention}"


@dataclass(frozen=True)
class Step:
    """One optimizer step; `started_s` is Unix time, `positions` counts padding as well."""

    number: int
    started_s: float
    time_s: float
    tokens: int
    loss_tokens: int
    positions: int
    loss: float


# ---- data ----


def samples_of(sequence: Batch) -> list[dict[str, list[int]]]:
    """The samples of one packed sequence [1, seq_len], in order, each with its `input_ids` and `labels`; no padding."""
    ids, labels = sequence.input_ids[0], sequence.labels[0]
    starts = [int(start) for start in np.flatnonzero(sequence.position_ids[0] == 0) if start < sequence.tokens]
    ends = [*starts[1:], sequence.tokens]
    pairs = zip(starts, ends, strict=True)
    return [{"input_ids": ids[a:b].tolist(), "labels": labels[a:b].tolist()} for a, b in pairs]


def padded(samples: list[dict[str, list[int]]]) -> dict[str, Any]:
    """The samples as one batch, padded to the longest: int64 tensors [samples, longest]."""
    import torch

    shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, IGNORED)}
    batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
    for row, sample in enumerate(samples):
        n = len(sample["input_ids"])
        batch["input_ids"][row, :n] = torch.tensor(sample["input_ids"])
        batch["labels"][row, :n] = torch.tensor(sample["labels"])
        batch["attention_mask"][row, :n] = 1
    return batch


class Counted:
    """A collator that remembers (tokens, tokens in the loss, positions) of every batch that it makes, in order."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.made: list[tuple[int, int, int]] = []

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collate(examples)
        if "attention_mask" in batch:
            tokens = int(batch["attention_mask"].sum())
        else:
            tokens = sum(len(example["input_ids"]) for example in examples)
        self.made.append((tokens, int((batch["labels"] != IGNORED).sum()), batch["input_ids"].numel()))
        return batch


# ---- one training ----


@dataclass
class Training:
    """A trainer's training of `steps` steps, warm-up included; `folder` is for its files."""

    job: RankJob
    work: Work
    choice: Choice
    accumulation: int
    steps: int
    folder: Path

    def __post_init__(self) -> None:
        self.data = PackedData(Path(self.job.data or ""))
        self.counted = Counted(None)

    def run(self, ended: Callable[[Step], None]) -> None:
        """Train, and call `ended` with each step."""
        trainer = {"defaults": self._defaults, "padded": self._padded, "trl": self._trl}[self.work.trainer]()
        trainer.add_callback(_clock(self, ended))
        trainer.train()

    def _model(self) -> Any:
        import torch

        from runner.workloads.sft.model import build_model

        with torch.device(self.job.device):
            model = self.job.model or {}
            return build_model(model, attention=self.choice.attention, dtype=torch.float32, seed=self.job.seed)

    def _arguments(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "trainer"),
            "max_steps": self.steps,
            "bf16": True,
            "use_cpu": self.job.device == "cpu",
            "seed": self.job.seed,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }

    def _same_batches(self) -> dict[str, Any]:
        """The optimizer and the batches of the product."""
        optimizer = (self.job.deepspeed or {})["optimizer"]["params"]
        return {
            "learning_rate": optimizer["lr"],
            "lr_scheduler_type": "constant",
            "adam_beta1": optimizer["betas"][0],
            "adam_beta2": optimizer["betas"][1],
            "adam_epsilon": optimizer["eps"],
            "weight_decay": optimizer["weight_decay"],
            "max_grad_norm": (self.job.deepspeed or {})["gradient_clipping"],
            "per_device_train_batch_size": self.choice.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
        }

    def _sequences(self) -> Iterator[Batch]:
        """The packed sequences in the order in which the product reads them, without end."""
        position = 0
        while True:
            yield self.data.read(position, 1, self.job.seed)
            position += 1

    def _defaults(self) -> Any:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(**self._arguments(), remove_unused_columns=False)
        needed = self.steps * self.choice.micro_batch
        samples: list[Any] = []
        for sequence in self._sequences():
            samples += samples_of(sequence)
            if len(samples) >= needed:
                break
        self.counted.collate = padded
        return _ordered(Trainer)(self._model(), arguments, self.counted, samples[:needed])

    def _padded(self) -> Any:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(**self._arguments(), **self._same_batches(), remove_unused_columns=False)
        needed = self.steps * self.accumulation * self.choice.micro_batch
        sequences = [samples_of(sequence) for sequence, _ in zip(self._sequences(), range(needed), strict=False)]
        self.counted.collate = lambda examples: padded([sample for example in examples for sample in example])
        return _ordered(Trainer)(self._model(), arguments, self.counted, sequences)

    def _trl(self) -> Any:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        # The product has packed already: its rows, in the form that TRL's own packing would have given them.
        config = SFTConfig(
            **self._arguments(),
            **self._same_batches(),
            packing=True,
            max_length=self.data.seq_len,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
            use_liger_kernel=has_liger(self.job.device),
        )
        needed = self.steps * self.accumulation * self.choice.micro_batch
        rows = []
        for sequence, _ in zip(self._sequences(), range(needed), strict=False):
            samples = samples_of(sequence)
            rows.append({
                "input_ids": [token for sample in samples for token in sample["input_ids"]],
                "labels": [label for sample in samples for label in sample["labels"]],
                "seq_lengths": [len(sample["input_ids"]) for sample in samples],
            })  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(str(self.job.data))
        trainer = _ordered(SFTTrainer)(
            self._model(), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        self.counted.collate, trainer.data_collator = trainer.data_collator, self.counted
        return trainer


def _ordered(trainer: type) -> Any:
    """A subclass of `trainer` that takes the data in their order instead of shuffling them."""
    from torch.utils.data import SequentialSampler

    def sampler(self: Any, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if dataset is None else dataset)

    return type(f"Ordered{trainer.__name__}", (trainer,), {"_get_train_sampler": sampler})


def _clock(training: Training, ended: Callable[[Step], None]) -> Any:
    """A callback that times the steps of `training`, and calls `ended` with each.

    A step lasts from the end of the step before, its log written, until the device has finished: reading the data is in
    it, the log is not, as in the product.
    """
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.number = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started_s, self.started = time.time(), time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if training.job.device == "cuda":
                torch.cuda.synchronize()
            self.time_s = time.perf_counter() - self.started

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" not in (logs or {}):
                return  # the summary of the training
            first = self.number * training.accumulation
            made = training.counted.made[first : first + training.accumulation]
            tokens, loss_tokens, positions = (sum(counts) for counts in zip(*made, strict=True))
            ended(Step(self.number, self.started_s, self.time_s, tokens, loss_tokens, positions, float(logs["loss"])))
            self.number += 1
            self.started_s, self.started = time.time(), time.perf_counter()

    return Clock()


def has_liger(device: str) -> bool:
    """Whether Liger's kernels are installed; they are for GPUs."""
    return device == "cuda" and importlib.util.find_spec("liger_kernel") is not None


# ---- choosing ----


def attentions(device: str, trainer: str) -> list[str]:
    """Implementations of attention to try, the most promising first; names as transformers has them.

    A padded batch takes transformers' own choice, as its users do. Packing needs one that stops at samples:
    FlashAttention where its package is installed, otherwise torch's flex attention; sdpa with a mask works everywhere.
    """
    if trainer != "trl":
        return ["sdpa"]
    packages = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
    found = [name for name, package in packages.items() if importlib.util.find_spec(package)]
    if device != "cuda":
        return ["sdpa"]
    return found or ["flex_attention", "sdpa"]


def candidates(device: str, trainer: str, global_batch: int) -> list[Choice]:
    """What a search tries, in this order: sequences a micro-batch that divide the global batch, at most LARGEST."""
    sizes = [n for n in range(1, min(LARGEST, global_batch) + 1) if global_batch % n == 0]
    middle = sorted(sizes, key=lambda n: (abs(n - 4), -n))
    choices = [Choice(attention, size) for attention in attentions(device, trainer) for size in middle]
    # A mask is as large as the square of a micro-batch's tokens, and all of it is computed: the smallest is the best.
    return [one for one in choices if trainer == "padded" or one.attention != "sdpa" or one.micro_batch <= 2]


def search(job: RankJob, work: Work, folder: Path) -> tuple[Choice, list[dict[str, Any]]]:
    """(The choice with the most real tokens/s, what was tried); each attempt is two steps of one micro-batch.

    Raises RuntimeError where nothing runs.
    """
    import torch

    tried: list[dict[str, Any]] = []
    began = time.monotonic()
    for choice in candidates(job.device, work.trainer, work.global_batch):
        if tried and time.monotonic() - began > work.search_s:
            break
        one: dict[str, Any] = dataclasses.asdict(choice)
        steps: list[Step] = []
        try:
            Training(job, work, choice, 1, 2, folder).run(steps.append)
            one["tokens_per_s"] = round(steps[1].tokens / steps[1].time_s)
        except torch.cuda.OutOfMemoryError:
            one["failure"] = "out of GPU memory"
        except Exception as error:
            traceback.print_exc()
            one["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        tried.append(one)
        free(job.device)
    good = [one for one in tried if "tokens_per_s" in one]
    if not good:
        raise RuntimeError("; ".join(f"{one['attention']}, {one['micro_batch']}: {one['failure']}" for one in tried))
    best = max(good, key=lambda one: one["tokens_per_s"])
    return Choice(best["attention"], best["micro_batch"]), tried


def free(device: str) -> None:
    """Give the memory of what is no longer used back to the device, and forget its peak."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- the process ----


def main(folder: Path) -> None:
    """Do what `folder`/arm.json asks for, and write the events of a rank there."""
    job = RankJob.load(folder)
    os.environ.update(job.env)
    work = Work(**json.loads((folder / "arm.json").read_text()))
    events = Events(folder, 0)
    events.start(world_size=1, pid=os.getpid(), device=job.device)
    import torch

    from runner.workloads.sft.rank import peak_rss_bytes

    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        tried: list[dict[str, Any]] = []
        if work.trainer == "defaults":
            choice, accumulation = Choice("sdpa", 8), 1
        else:
            if work.choice:
                choice = Choice(**work.choice)
            else:
                choice, tried = search(job, work, Path(scratch))
            accumulation = work.global_batch // choice.micro_batch
        # The fields of a rank of the product, and those of the search.
        events(
            "used",
            trainer=work.trainer,
            attention=choice.attention,
            precision="bf16",
            recompute="none",
            compile=False,
            liger="layers" if work.trainer == "trl" and has_liger(job.device) else "none",
            micro_batch=choice.micro_batch,
            gradient_accumulation=accumulation,
            tried=tried,
            search_s=time.monotonic() - began if tried else 0.0,
        )
        steps = work.warmup_steps + work.steps
        training = Training(job, work, choice, accumulation, steps, Path(scratch))
        training.run(lambda step: write(step, step.number >= work.warmup_steps, events))
    peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_rss_bytes()
    events.value("peak_memory_gib", peak / 2**30)
    events.end()


def write(step: Step, measured: bool, events: Events) -> None:
    """Write a step as a rank of the product does."""
    context = {"step": step.number, "measured": measured}
    events.value("step_time_s", step.time_s, **context, started_s=round(step.started_s, 3))
    for name in ("tokens", "loss_tokens", "positions", "loss"):
        events.value(name, getattr(step, name), **context)


if __name__ == "__main__":
    code = 1
    try:
        main(Path(sys.argv[1]))
        code = 0
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        sys.stderr.write(f"{type(error).__name__}: {first}\n")  # the last line is the reason that is shown
    sys.stderr.flush()
    os._exit(code)  # threads of a failed trainer could keep the process
