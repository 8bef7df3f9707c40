"""The product's trainer beside the stock Trainer and TRL: real tokens/s of the same model on the same data, one device.

    .venv/bin/python benchmarks/sft_speed.py                          # a GPU: 7B's width with 8 layers; a CPU: tiny
    .venv/bin/python benchmarks/sft_speed.py --model llama-3.2-1b --minutes 8
    .venv/bin/python benchmarks/sft_speed.py --arms fast,fast-fp8 --set sft.micro_batch=4 --set sft.recompute=none

Arms, most important first (`--arms` chooses):

    fast           the product as it comes, with what `runner tune` has found for this GPU and what `--set` adds
    fast-fp8       the same with sft.precision=fp8, which compiles its layers, on GPUs with FP8
    trl            trl.SFTTrainer tuned: packing, no recomputation, Liger, attention and micro-batch by a short search
    stock          transformers.Trainer with its defaults in bf16: batches of 8 samples, padded
    stock-tuned    the same with the best padded batch of a short search
    reference      the product with sft.trainer=reference
    fast-compiled  the product with sft.compile=true; only on request

The arms of the product are planned by `runner bench --dry-run` and run as its ranks run; sft_speed_trainers.py has the
others. TRL is no dependency: `pip install --no-deps trl==1.16.0`, or its arm is left out.

Each arm runs in two processes of its own, interleaved (A B C … C B A), each with three blocks of measured steps after
warm-up. Within `--minutes`, preparation included, the second round has as many steps, and then as many arms, as the
first has shown to fit; what is left out is said. All arms but `stock` train on the same global batches from the same
weights with the same optimizer, so that their losses must agree within 0.5 % at every step: the exit code is 1 where
they do not, or where `fast` did not run. The page is written anew after each process.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import shlex
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from runner.cluster import limits
from runner.errors import RunnerError, UsageError
from runner.node import sampler
from runner.plan import config
from runner.plan.plan import Plan, job
from runner.results.celldir import CellDir
from runner.system import process
from runner.workloads.data import instructions
from runner.workloads.data.prepare import default_cache_dir, prepare
from runner.workloads.sft.data import PackedData

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = Path(__file__).resolve().with_name("sft_speed_trainers.py")
BLOCKS = 3  # of measured steps in each process
MOST_APART = 0.005  # as a part of the loss
MOST_SPREAD = 0.05  # that passes without a word
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "trl", "liger-kernel", "torchao", "flash-attn")
UNKNOWN_GPU = ("sft.micro_batch=4", "sft.recompute=none")  # of all arms of the product, unless `--set` says otherwise
SHORTEST_S = 20.0  # less time is not enough for any process
FP8_SINCE = (8, 9)  # compute capability


@dataclass(frozen=True)
class Arm:
    """One way to train: with settings of the product, or with a `trainer` of sft_speed_trainers.py."""

    settings: tuple[str, ...] = ()
    trainer: str = ""
    same_batches: bool = True
    asked: bool = True  # by default
    extra: bool = False  # whether `--set` applies


# In the order of their importance.
ARMS = {
    "fast": Arm(extra=True),
    "fast-fp8": Arm(("sft.precision=fp8",), extra=True),
    "trl": Arm(trainer="trl"),
    "stock": Arm(trainer="defaults", same_batches=False),
    "stock-tuned": Arm(trainer="padded"),
    "reference": Arm(("sft.trainer=reference",)),
    "fast-compiled": Arm(("sft.compile=true",), asked=False, extra=True),
}


@dataclass(frozen=True)
class Scale:
    """Sizes for a device: sequences of a global batch, steps of a block and before the first; those of `stock` are
    `small` times as many, since its batches are small.
    """

    global_batch: int
    block: int
    warmup: int
    small: int


SCALES = {"cuda": Scale(global_batch=8, block=2, warmup=2, small=10), "cpu": Scale(4, 1, 1, 2)}


# ---- what a process did ----


@dataclass(frozen=True)
class Step:
    """One optimizer step. `started_s` is Unix time; `positions` counts padding as well, `tokens` does not."""

    started_s: float
    time_s: float
    tokens: float
    positions: float
    loss: float
    measured: bool


@dataclass(frozen=True)
class Process:
    """What one process of an arm did; `failure` is why it ended early, "" where it did not."""

    wall_s: float
    steps: tuple[Step, ...] = ()
    used: Mapping[str, Any] = field(default_factory=dict)
    peak_gib: float | None = None
    matmul_tflop_per_s: float | None = None
    gpu_util_pct: float | None = None
    failure: str = ""

    @property
    def blocks(self) -> list[list[Step]]:
        """The measured steps in BLOCKS parts that are as equal as possible; fewer where there are fewer steps."""
        measured = [step for step in self.steps if step.measured]
        n = min(BLOCKS, len(measured))
        return [measured[i * len(measured) // n : (i + 1) * len(measured) // n] for i in range(n)]

    @property
    def rates(self) -> list[float]:
        """Real tokens/s of each block."""
        return [rate(block, "tokens") for block in self.blocks]


def rate(steps: Sequence[Step], counted: str) -> float:
    """Sum of `counted` ("tokens", "positions") over steps ÷ their seconds."""
    return sum(getattr(step, counted) for step in steps) / sum(step.time_s for step in steps)


def read(folder: Path) -> dict[str, Any]:
    """The fields of a Process that are in the events of rank 0 in `folder`: the steps that are complete, in order."""
    found: dict[str, Any] = {}
    values: dict[int, dict[str, Any]] = defaultdict(dict)
    names = {"peak_memory_gib": "peak_gib", "matmul_tflop_per_s": "matmul_tflop_per_s"}
    with contextlib.suppress(FileNotFoundError):
        for line in CellDir(folder).events(0).read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "used":
                found["used"] = {
                    name: value for name, value in event.items() if name not in ("event", "rank", "time_s")
                }
            elif event["event"] == "value" and "step" in event["context"]:
                at = values[event["context"]["step"]]
                at[event["metric"]] = event["value"]
                at.update(event["context"])
            elif event["event"] == "value" and event["metric"] in names:
                found[names[event["metric"]]] = event["value"]
    steps = []
    for _, at in sorted(values.items()):
        if {"step_time_s", "tokens", "positions", "loss", "started_s"} <= at.keys():
            steps.append(
                Step(at["started_s"], at["step_time_s"], at["tokens"], at["positions"], at["loss"], at["measured"])
            )
    return {**found, "steps": tuple(steps)}


# ---- what an arm did ----


@dataclass(frozen=True)
class Row:
    """An arm's line of the table. Rates are medians over the blocks of all its processes.

    `over_blocks` is the range of a process's blocks ÷ their median, of the process where it is largest; `between` the
    range of the processes' medians ÷ the median, None with one process.
    """

    name: str
    tokens_per_s: float
    positions_per_s: float
    over_blocks: float
    between: float | None
    losses: tuple[float, ...]  # of each step, warm-up included
    apart: float | None  # from the losses of the arm that all are compared with, as a part of the loss

    @property
    def widest(self) -> float:
        """The larger of both ranges."""
        return max(self.over_blocks, self.between or 0.0)


def row(name: str, processes: Sequence[Process], basis: Sequence[float] | None) -> Row | None:
    """The row of an arm; None where no block was measured. `basis` has the losses to compare with, by step."""
    measured = [one for one in processes if one.rates]
    if not measured:
        return None
    medians = [statistics.median(one.rates) for one in measured]
    positions = [rate(block, "positions") for one in measured for block in one.blocks]
    return Row(
        name=name,
        tokens_per_s=statistics.median([r for one in measured for r in one.rates]),
        positions_per_s=statistics.median(positions),
        over_blocks=max(relative_range(one.rates) for one in measured),
        between=relative_range(medians) if len(measured) > 1 else None,
        losses=tuple(step.loss for step in max(measured, key=lambda one: len(one.steps)).steps),
        apart=None if basis is None else float(np.max([apart([s.loss for s in one.steps], basis) for one in measured])),
    )


def relative_range(values: Sequence[float]) -> float:
    """(Largest - smallest) ÷ median."""
    return (max(values) - min(values)) / statistics.median(values)


def apart(losses: Sequence[float], basis: Sequence[float]) -> float:
    """The largest difference of two series of losses over the steps that both have, as a part of `basis`.

    It is NaN where a loss is, which `max` would pass over.
    """
    return float(np.max([abs(a - b) / b for a, b in zip(losses, basis, strict=False)]))


# ---- time ----


@dataclass(frozen=True)
class Cost:
    """What a process of an arm takes, as an earlier one has shown.

    `outside_s` are the seconds before and after its steps, `step_s` those of one; `block` are the steps of a block
    where there is time.
    """

    outside_s: float
    step_s: float
    warmup: int
    block: int

    def seconds(self, block: int) -> float:
        """The time of a process with blocks of `block` steps."""
        return self.outside_s + (self.warmup + BLOCKS * block) * self.step_s

    @classmethod
    def of(cls, one: Process, warmup: int, block: int) -> Cost:
        """That of a process that ran: its search, if it had one, is not made again."""
        inside = sum(step.time_s for step in one.steps) + one.used.get("search_s", 0.0)
        measured = [step.time_s for step in one.steps if step.measured]
        return cls(max(0.0, one.wall_s - inside), statistics.mean(measured), warmup, block)


def fitting(costs: Mapping[str, Cost], left_s: float) -> dict[str, int]:
    """Steps of a block for each arm that is still to run, within `left_s` seconds in all; an arm without is left out.

    The longest blocks are shortened first, down to one step; after that the least important arms (the last of ARMS) go.
    """
    blocks = {name: cost.block for name, cost in costs.items()}
    while blocks and sum(costs[name].seconds(block) for name, block in blocks.items()) > left_s:
        longest = max(blocks, key=lambda name: (blocks[name] > 1, blocks[name] * costs[name].step_s))
        if blocks[longest] > 1:
            blocks[longest] -= 1
        else:
            del blocks[max(blocks, key=list(ARMS).index)]
    return blocks


def rounds(names: Sequence[str]) -> list[list[str]]:
    """The order of the processes: all arms, and then all again from the last to the first."""
    return [list(names), list(reversed(names))]


# ---- the page ----


@dataclass
class Page:
    """What is written: facts about the run, and what each arm did so far; `ratios` is whether rates are compared."""

    device: str  # its name
    about: list[str]
    model: Mapping[str, Any]
    flop_per_token: float
    processes: dict[str, list[Process]]
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # arm -> what, and why
    ratios: bool = True

    @property
    def matmul_tflop_per_s(self) -> float | None:
        """The median of what the product's ranks measured before their first step; None where none did."""
        found = [one.matmul_tflop_per_s for every in self.processes.values() for one in every]
        known = [value for value in found if value]
        return statistics.median(known) if known else None

    def _basis(self) -> Process:
        """The process with which the losses of others are compared: the longest of `reference`, or else of `fast`."""
        for name in ("reference", *ARMS):
            every = [one for one in self.processes.get(name, ()) if one.rates]
            if every and ARMS[name].same_batches:
                return max(every, key=lambda one: len(one.steps))
        return Process(0.0)

    def rows(self) -> dict[str, Row | None]:
        """Arm -> its row, None without a measurement."""
        basis = [step.loss for step in self._basis().steps] or None
        return {
            name: row(name, every, basis if ARMS[name].same_batches else None) for name, every in self.processes.items()
        }

    def faults(self) -> list[str]:
        """What makes the result bad: other losses or other data than the arm that is compared with, no product."""
        rows, basis = self.rows(), [step.tokens for step in self._basis().steps]
        wrong = [
            f"`{name}`: its losses are {100 * found.apart:.2f} % apart"
            for name, found in rows.items()
            if found and found.apart is not None and not found.apart <= MOST_APART
        ]
        for name, every in self.processes.items():
            counts = [[step.tokens for step in one.steps] for one in every]
            if ARMS[name].same_batches and any(a != b for c in counts for a, b in zip(c, basis, strict=False)):
                wrong.append(f"`{name}`: its steps have other tokens")
        if "fast" in rows and rows["fast"] is None:
            wrong.append("`fast`: not measured")
        return wrong

    def text(self) -> str:
        """The page in Markdown."""
        rows, peak = self.rows(), self.matmul_tflop_per_s
        lines = [f"# Fine-tuning on one device: {self.model['name']}, {self.device}", "", *self.about, ""]
        lines += [
            "| arm | used | tokens/s | spread %: blocks, processes | × stock | × TRL | of matmul % | positions/s "
            "| GPU util % | peak GiB | loss, first → last | apart % |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, every in self.processes.items():
            lines.append(self._line(name, every, rows, peak))
        lines += ["", *self._notes(rows, peak)]
        return "\n".join(lines) + "\n"

    def _line(self, name: str, every: Sequence[Process], rows: Mapping[str, Row | None], peak: float | None) -> str:
        found = rows[name]
        if found is None:
            reason = next((one.failure for one in every if one.failure), "") or "; ".join(self.left_out[name])
            return f"| `{name}` | {cell(reason or 'not yet')} |" + " – |" * 10
        used = next((one.used for one in every if one.used), {})
        utilisation = [one.gpu_util_pct for one in every if one.gpu_util_pct is not None]
        memory = [one.peak_gib for one in every if one.peak_gib is not None]
        between = "–" if found.between is None else f"{100 * found.between:.1f}"
        share = self.flop_per_token * found.tokens_per_s / (peak * 1e12) if peak else None
        values = [
            f"`{name}`",
            cell(described(used)),
            f"{found.tokens_per_s:,.0f}",
            f"{100 * found.over_blocks:.1f}, {between}",
            *(ratio(found, rows.get(other) if self.ratios else None) for other in ("stock", "trl")),
            f"{100 * share:.1f}" if share else "–",
            f"{found.positions_per_s:,.0f}",
            f"{statistics.mean(utilisation):.0f}" if utilisation else "–",
            f"{max(memory):.1f}" if memory else "–",
            f"{found.losses[0]:.4f} → {found.losses[-1]:.4f}",
            "–" if found.apart is None else f"{100 * found.apart:.3f}",
        ]
        return f"| {' | '.join(values)} |"

    def _notes(self, rows: Mapping[str, Row | None], peak: float | None) -> list[str]:
        counts = [
            f"`{name}` {'; '.join(' + '.join(str(len(block)) for block in one.blocks) for one in every if one.blocks)}"
            for name, every in self.processes.items()
            if rows[name]
        ]
        notes = [f"Measured steps, block by block, of each process: {', '.join(counts)}."] if counts else []
        if peak:
            notes.append(
                f"Matmul rate of this run: {peak:,.1f} TFLOP/s, measured by the product's ranks before their first "
                f"step; {self.flop_per_token / 1e9:.3g} GFLOP a real token."
            )
        for name, every in self.processes.items():
            for one in every:
                if tried := one.used.get("tried"):
                    told = (f"{t['attention']} × {t['micro_batch']}: {outcome(t)}" for t in tried)
                    notes.append(f"`{name}` is the best of {'; '.join(told)}.")
        wide = [f"`{name}`" for name, found in rows.items() if found and found.widest > MOST_SPREAD]
        if wide:
            notes.append(
                f"The spread of {', '.join(wide)} is above {MOST_SPREAD:.0%}: no smaller difference means much."
            )
        cut = [
            *((name, one.failure) for name, every in self.processes.items() for one in every if one.failure),
            *((name, why) for name, every in self.left_out.items() for why in every),
        ]
        notes += [f"`{name}`: {why}." for name, why in dict.fromkeys(cut) if rows.get(name)]
        faults = self.faults()
        notes.append(f"Result: {'; '.join(faults)}." if faults else "Result: no fault.")
        return [f"- {note}" for note in notes]


def cell(text: str) -> str:
    """Text for a cell of a table: one line, at most 160 characters, no bar."""
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= 160 else line[:159] + "…"


def outcome(tried: Mapping[str, Any]) -> str:
    """How an attempt of a search ended."""
    return f"{tried['tokens_per_s']:,} tokens/s" if "tokens_per_s" in tried else tried["failure"]


def ratio(one: Row, other: Row | None) -> str:
    """How many times as fast `one` is as `other`."""
    return f"{one.tokens_per_s / other.tokens_per_s:.2f}" if other else "–"


def described(used: Mapping[str, Any]) -> str:
    """What was used, as a few words: micro-batch × accumulation, attention, and what is not plain bf16."""
    unit = " samples" if used.get("trainer") == "defaults" else ""
    words = [f"{used['micro_batch']}{unit} × {used['gradient_accumulation']}"] if "micro_batch" in used else []
    words += [str(used[name]) for name in ("attention", "precision") if used.get(name)]
    words += [f"{name} {used[name]}" for name in ("recompute", "liger") if used.get(name, "none") != "none"]
    words += ["compiled"] if used.get("compile") else []
    return ", ".join(words)


# ---- running ----


class Bench:
    """One run: plans, starts the processes, and keeps the page up to date. `folder` is for its files."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.deadline = time.monotonic() + 60 * options.minutes
        names = sampler.gpu_names()
        self.device = options.device or ("cuda" if names else "cpu")
        if self.device == "cuda" and not names:
            raise UsageError("--device cuda: NVML finds no GPU here; on a CPU leave it out")
        self.visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.card = names[0] if self.device == "cuda" else f"CPU ({cpu_name()})"
        self.scale = SCALES[self.device]
        self.global_batch = options.global_batch or self.scale.global_batch
        self.block = options.block_steps or self.scale.block
        self.inventory = folder / "inventory.json"
        host = {"ansible_connection": "local", "ansible_host": "127.0.0.1", "runner_gpus_per_node": 1}
        host["runner_device"] = self.device
        self.inventory.write_text(json.dumps({"all": {"children": {"gpu_nodes": {"hosts": {"localhost": host}}}}}))
        self.model = self._model_file()
        self.dataset = options.dataset or "builtin"
        if options.dataset is None and self.device == "cuda":
            self.dataset = str(folder / "conversations.jsonl")
            write_conversations(Path(self.dataset))
        self.plain = self._job(())
        # Without its memory nothing is chosen from it, and one sequence at a time says little about a GPU.
        self.given = UNKNOWN_GPU if self.plain["hardware"]["name"] == "unknown" and not options.settings else ()
        if self.given:
            self.plain = self._job(self.given)
        data = PackedData(Path(self.plain["data"]))
        model = self.plain["model"]
        self.page = Page(
            device=self.card,
            about=self._about(data),
            model=model,
            flop_per_token=limits.flops_per_token(model, round(attended(data)), causal=True),
            processes={name: [] for name in options.arms},
            ratios=self.device == "cuda",
        )
        self.jobs: dict[str, dict[str, Any]] = {}
        self.choices: dict[str, dict[str, Any]] = {}

    def _model_file(self) -> str:
        """What `--model` of the product gets: a name, or the path of a file."""
        name, layers = self.options.model, self.options.layers
        if name is None:
            name, layers = ("llama-2-7b", layers or 8) if self.device == "cuda" else ("tiny", layers)
        if layers is None:
            return name
        model = config.load_model(name).model_dump()
        file = self.folder / "model.yaml"
        file.write_text(yaml.safe_dump({**model, "num_layers": layers, "name": f"{model['name']}-{layers}-layers"}))
        return str(file)

    def _job(self, settings: Sequence[str]) -> dict[str, Any]:
        """The job.json of the cell that the product plans with these settings; raises UsageError with its refusal."""
        argv = [sys.executable, "-m", "runner.cli.main", "bench", "-i", str(self.inventory), "--model", self.model]
        argv += ["--test", "sft", "--dry-run", "--json"]
        own = {"global_batch": self.global_batch, "warmup_steps": self.scale.warmup, "dataset": self.dataset}
        for setting in (*(f"sft.{name}={value}" for name, value in own.items()), *settings):
            argv += ["--set", setting]
        planned = process.run(argv, timeout_s=120)
        if planned.rc:
            raise UsageError(planned.last_line)
        plan = Plan.from_dict(json.loads(planned.stdout))
        (only,) = plan.cells
        params = only.params
        data = prepare(
            params["dataset"],
            seq_len=params["seq_len"],
            tokenizer=params["tokenizer"],
            cache_dir=default_cache_dir(),
            samples=params["samples"],
            seed=plan.seed,
        )
        return job(plan, only, plan.nodes[0], str(data.path))

    def _about(self, data: PackedData) -> list[str]:
        versions = []
        for package in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions.append(f"{package} {importlib.metadata.version(package)}")
        manifest = data.manifest
        mean = manifest["n_tokens"] / manifest["n_samples"]
        versions.insert(0, f"Python {platform.python_version()}")
        meaning = (
            []
            if self.device == "cuda"
            else ["On a CPU the losses count, and that every arm runs; the rates say nothing and are not compared."]
        )
        return [
            f"{datetime.date.today()}, {self.card}{driver()}, {', '.join(versions)}.",
            f"Global batch {self.global_batch} sequences of {data.seq_len} tokens (`stock`: 8 samples), data "
            f"`{Path(self.dataset).name}` with {mean:.0f} tokens a sample. Rates are medians over blocks of measured "
            "steps; tokens are real ones, without padding, which positions count as well.",
            *meaning,
            *(
                [f"No file of configs/hardware describes this GPU: planned with {' '.join(self.given)}."]
                if self.given
                else []
            ),
            "",
            f"    {shlex.join(['python', os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])}",
        ]

    def run(self) -> None:
        """All processes in their order; the page is written after each."""
        for number, names in enumerate(rounds(self.options.arms), 1):
            waiting = list(names)
            for name in names:
                waiting.remove(name)
                every = self.page.processes[name]
                if number == 2 and not (every and every[0].rates and not every[0].failure):
                    continue  # what failed once is not tried again
                left = self.deadline - time.monotonic()
                if number == 1:
                    block = self.block * (1 if ARMS[name].same_batches else self.scale.small)
                    if left < SHORTEST_S and any(self.page.processes.values()):
                        block = 0
                    # One that hangs must not take the time of all.
                    limit = min(left, max(60.0, 3 * left / (1 + len(waiting) + len(names))))
                else:
                    costs = {other: self._cost(other) for other in (name, *waiting) if self._ran(other)}
                    block, limit = fitting(costs, left).get(name, 0), left
                if block == 0:
                    self.page.left_out[name].append(f"no time was left for its process of round {number}")
                else:
                    every.append(self._process(name, block, limit))
                    self._say(name, number)
                self._write()

    def _ran(self, name: str) -> bool:
        every = self.page.processes[name]
        return bool(every and every[0].rates and not every[0].failure)

    def _cost(self, name: str) -> Cost:
        first = self.page.processes[name][0]
        measured = sum(step.measured for step in first.steps)
        return Cost.of(first, len(first.steps) - measured, measured // BLOCKS)

    def _process(self, name: str, block: int, limit_s: float) -> Process:
        """Run one process of an arm with blocks of `block` steps, for at most `limit_s` seconds."""
        arm, started = ARMS[name], time.monotonic()
        if reason := self._obstacle(name):
            return Process(0.0, failure=reason)
        try:
            if name not in self.jobs:
                extra = self.options.settings if arm.extra and self.options.settings else self.given
                self.jobs[name] = self._job((*arm.settings, *extra)) if arm.settings or extra else self.plain
        except RunnerError as error:
            return Process(time.monotonic() - started, failure=str(error))
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        planned = self.jobs[name]
        params = {**planned["params"], "steps": BLOCKS * block}
        CellDir(folder).job.write_text(json.dumps({**planned, "params": params}))
        if arm.trainer:
            work = {"trainer": arm.trainer, "global_batch": self.global_batch, "steps": BLOCKS * block}
            work |= {"warmup_steps": self.scale.warmup, "choice": self.choices.get(name), "search_s": limit_s / 4}
            (folder / "arm.json").write_text(json.dumps(work))
            argv = [sys.executable, str(TRAINERS), str(folder)]
        else:
            argv = [sys.executable, "-m", "runner.workloads", str(folder)]
        failure = ""
        with Utilisation(int(self.visible) if self.visible.isdigit() else 0) as utilisation:
            try:
                ended = process.run(argv, timeout_s=limit_s, env=self._environment(bool(arm.trainer)))
                if ended.rc:
                    failure = ended.last_line
                    (folder / "stderr").write_text(ended.stderr)
            except RunnerError:
                failure = f"ended after {limit_s:.0f} s, the time that it had"
        found = read(folder)
        if self.device == "cpu":
            found.pop("matmul_tflop_per_s", None)  # there it is no ceiling
        if not arm.trainer:
            batch = planned["deepspeed"]
            sizes = {"micro_batch": batch["train_micro_batch_size_per_gpu"]}
            found["used"] = {
                **sizes, "gradient_accumulation": batch["gradient_accumulation_steps"], **found.get("used", {})
            }  # fmt: skip
        elif found.get("used", {}).get("tried"):
            used = found["used"]
            self.choices[name] = {"attention": used["attention"], "micro_batch": used["micro_batch"]}
        busy = utilisation.mean([step for step in found["steps"] if step.measured])
        return Process(time.monotonic() - started, gpu_util_pct=busy, failure=failure, **found)

    def _obstacle(self, name: str) -> str:
        """Why an arm cannot run here; "" where nothing is known."""
        if name == "trl" and importlib.util.find_spec("trl") is None:
            return "trl is not installed: pip install --no-deps trl==1.16.0"
        if name == "fast-fp8":
            if self.device == "cpu":
                return "needs a GPU with FP8"
            if (found := capability()) and found < FP8_SINCE:
                return f"this GPU has no FP8: its compute capability is {found[0]}.{found[1]}"
        return ""

    def _environment(self, trainer: bool) -> dict[str, str]:
        """Of one process on one device: a rank of a world of one, or no rank at all."""
        without = {process.MARKER, "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        env = {name: value for name, value in os.environ.items() if name not in without}
        env |= {
            "CUDA_VISIBLE_DEVICES": self.visible if self.device == "cuda" else "",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if not trainer:
            env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": str(free_port())}
        return env

    def _say(self, name: str, number: int) -> None:
        one = self.page.processes[name][-1]
        told = f"{statistics.median(one.rates):,.0f} tokens/s" if one.rates else "no measurement"
        why = f"; {one.failure}" if one.failure else ""
        print(f"round {number}, {name}: {told}, {one.wall_s:.0f} s{why}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        new = self.options.out.with_name(f".{self.options.out.name}.new")
        new.write_text(self.page.text())
        new.replace(self.options.out)


class Utilisation:
    """Samples NVML's utilisation of the GPU `index` five times a second, while its context lasts."""

    def __init__(self, index: int) -> None:
        self.key = f"gpu{index}_util_pct"
        self.samples: list[tuple[float, float]] = []  # (Unix time, s; %)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Utilisation:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        source = sampler.Sampler()
        while not self._over.wait(0.2):
            sample = source.sample()
            if self.key in sample:
                self.samples.append((sample["time_s"], sample[self.key]))

    def mean(self, steps: Sequence[Step]) -> float | None:
        """The mean in % over the samples within these steps; None without one."""
        within = [
            value
            for at, value in self.samples
            if any(step.started_s <= at <= step.started_s + step.time_s for step in steps)
        ]
        return statistics.mean(within) if within else None


def write_conversations(file: Path, count: int = 4096) -> None:
    """Write `count` samples of the lengths of instruction data, some 180 tokens: the built-in rows, 1 to 5 in a talk.

    On a GPU the built-in rows alone, of 68 tokens, would make padded batches slower than they are for their users.
    """
    draw = random.Random(0)
    turns = [draw.choice((1, 1, 2, 2, 3, 3, 4, 5)) for _ in range(count)]
    rows = iter(instructions.generate(sum(turns), seed=0))
    with open(file, "w") as out:
        for number in turns:
            messages = []
            for row in itertools.islice(rows, number):
                asked = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": row["output"]})
            out.write(json.dumps({"messages": messages}) + "\n")


def attended(data: PackedData) -> float:
    """The mean length of a sample, weighted by its tokens: as much as attention sees, of which causality halves it."""
    spans = list(lengths(data))
    return float(sum(n * n for n in spans) / sum(spans))


def lengths(data: PackedData) -> Iterator[int]:
    """The tokens of each sample of an epoch; padding is none."""
    for position in range(data.count):
        sequence = data.read(position, 1, 0)
        starts = np.flatnonzero(sequence.position_ids[0] == 0)
        yield from np.diff(np.append(starts[starts < sequence.tokens], sequence.tokens)).tolist()


def capability() -> tuple[int, int] | None:
    """The compute capability of the first GPU; None without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return tuple(pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except Exception:
        return None


def driver() -> str:
    """ ", driver VERSION", or "" without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return f", driver {pynvml.nvmlSystemGetDriverVersion()}"
    except Exception:
        return ""


def cpu_name() -> str:
    """The processor and the number of cores that this process may use."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def arms_of(text: str) -> list[str]:
    """The arms in `text`, separated by commas, in the order of ARMS."""
    asked = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [name for name in asked if name not in ARMS]:
        raise argparse.ArgumentTypeError(f"unknown arm {wrong[0]!r}; known: {', '.join(ARMS)}")
    return [name for name in ARMS if name in asked]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=arms_of, default=[name for name, arm in ARMS.items() if arm.asked])
    parser.add_argument("--model", help="a name in configs/models, or the path of a file; default: by the device")
    parser.add_argument("--layers", type=int, help="the model with so many layers")
    parser.add_argument("--minutes", type=float, default=5.0, help="the time for all; default: 5")
    parser.add_argument("--global-batch", type=int, help="sequences of a step")
    parser.add_argument("--block-steps", type=int, help="measured steps of a block, where there is time")
    parser.add_argument("--device", choices=list(SCALES), help="default: a GPU where there is one")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SFT.KEY=VALUE",
                        help="of the product's arms but reference")  # fmt: skip
    parser.add_argument("--dataset", help="as sft.dataset; default: built-in rows, on a GPU several in a sample")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sft_speed.md")
    return parser.parse_args(argv)


def main() -> int:
    """Run the benchmark, print its page, and return the exit code."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("sft_speed: ended by a signal"))  # with what it has started
    with tempfile.TemporaryDirectory(prefix="sft_speed-") as folder:
        try:
            bench = Bench(options, Path(folder))
        except RunnerError as error:
            print(f"sft_speed: {error}", file=sys.stderr)
            return 2
        bench.run()
        print(bench.page.text())
        return 1 if bench.page.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
