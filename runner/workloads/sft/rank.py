"""Test `sft`: supervised fine-tuning of Llama architectures with DeepSpeed, on GPUs or CPUs.

A step is one optimizer step: all of its micro-batches, from reading the data to the updated weights,
timed on every rank between two synchronisations with the device. The loss is the mean over all
loss-bearing tokens of the global batch, whatever the split into ranks and micro-batches, because
every micro-batch's sum is divided by the same count.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time
import warnings
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import UsageError
from runner.system.wording import counted
from runner.workloads.job import Events, RankJob
from runner.workloads.sft import layers, versions
from runner.workloads.sft.data import PackedData
from runner.workloads.sft.model import inputs, labels, token_loss
from runner.workloads.sft.resolve import Settings, resolve

if TYPE_CHECKING:
    import torch

    from runner.workloads.sft.engine import Built

GIB = 1 << 30
# The first collective of a rank waits for the slowest rank to read its weights.
PATIENCE = timedelta(minutes=10)


def run(job: RankJob, events: Events) -> None:
    """Train `warmup_steps` and then `steps` optimizer steps; every rank writes each step's values to `events`.

    Raises UsageError for settings or data that do not fit, for GPU memory that ran out, and for a loss that is not
    finite.
    """
    settings = resolve(job)
    model = job.model or {}
    # Otherwise DeepSpeed searches for accelerators, and prints what it finds.
    os.environ.setdefault("DS_ACCELERATOR", job.device)
    if not (settings.compile or settings.deepcompile):
        # DeepSpeed decorates an optimizer that is not used here, which imports the whole compiler (1.3 s).
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    total_steps = settings.warmup_steps + settings.steps
    events.progress(0, total_steps, "loading")

    # Imports make a million objects, all of which remain: nothing to collect among them, now and later.
    gc.disable()
    import torch

    device = torch.device(job.device, int(os.environ["LOCAL_RANK"])) if job.device == "cuda" else torch.device("cpu")
    dtype = getattr(torch, settings.dtype)
    ready = threading.Thread(target=_make_ready, args=(device, dtype), daemon=True)
    ready.start()
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports it, which tells what else it could use
        logging.getLogger(name).setLevel("ERROR")
    import deepspeed
    import torch.distributed as dist

    from runner.workloads.sft import attention, engine, matmul

    gc.freeze()
    gc.enable()
    ready.join()
    if events.rank == 0:
        events.value("import_time_s", process_age_s())
    # Not its own time: the controller prepared the data meanwhile.
    waited_s = events.wait_for_data(job)
    data = PackedData(Path(job.data or ""))
    data.check(job)
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed uses names that torch 2.13 has renamed: nothing that a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if job.device == "cuda":
        torch.cuda.set_device(device)
    else:
        # A faster all-reduce between ranks of one node, compiled on first use; nodes have no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        versions.finish_gathers()
    chosen = attention.choose(
        settings.attention, device, attention.shape(model, dtype, data.longest), plain=settings.plain
    )
    deepspeed.init_distributed(dist_backend=job.comm_backend, timeout=PATIENCE, verbose=False)
    try:
        with layers.compiling() if settings.compile else nullcontext():
            rate = matmul.tflop_per_s(model, settings.micro_batch * data.seq_len, device, dtype)
            events.value("matmul_tflop_per_s", rate)
            connected_s = process_age_s()
            built = engine.build(job, settings, chosen)
            if events.rank == 0:
                events("used", **built.used)
                events.value("build_time_s", process_age_s() - connected_s)
            _train(job, settings, data, built, dtype, events, waited_s)
    except torch.cuda.OutOfMemoryError as error:
        raise UsageError(
            f"out of GPU memory with {settings.micro_batch} × {data.seq_len} tokens a micro-batch on "
            f"{counted(job.world_size, 'GPU')}: lower sft.micro_batch (and raise sft.gradient_accumulation) or "
            f"sft.seq_len, use more nodes, or a DeepSpeed configuration that offloads ({str(error).splitlines()[0]})"
        ) from error
    if job.device == "cuda":
        # Only after success: after a failure it could wait for ranks that have ended. Not gloo's: torch 2.3 holds
        # Python's lock while it waits for a thread that may wait for that lock. The process ends now anyway.
        dist.destroy_process_group()


def _make_ready(device: torch.device, dtype: torch.dtype) -> None:
    """Create a GPU's context and load its library of matrix products: seconds without Python, beside the imports."""
    import torch

    if device.type == "cuda":
        with suppress(RuntimeError):  # whatever it is, the rank's own thread meets it again
            square = torch.ones((64, 64), device=device, dtype=dtype)
            torch.mm(square, square)
            torch.cuda.synchronize(device)


def _train(
    job: RankJob,
    settings: Settings,
    data: PackedData,
    built: Built,
    dtype: torch.dtype,
    events: Events,
    waited_s: float,
) -> None:
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    parts = settings.tensor_parallel  # neighbours, which read the same rows
    share_of_data, shares = rank // parts, world // parts
    micro, accumulation = settings.micro_batch, settings.gradient_accumulation
    engine, flat = built.engine, built.flat
    on_gpu = job.device == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    total_steps = settings.warmup_steps + settings.steps
    loss_of = torch.compile(token_loss) if settings.compile else token_loss
    squares = lengths = 0

    for step in range(total_steps):
        if step == 0:
            setup_time_s = process_age_s() - waited_s
        synchronize()
        started = time.perf_counter()
        started_s = round(time.time(), 3)
        first = step * accumulation * shares * micro
        places = [first + (k * shares + share_of_data) * micro for k in range(accumulation)]
        batches = [data.read(place, micro, job.seed) for place in places]
        loss_tokens = sum(batch.loss_tokens for batch in batches)
        # DeepSpeed averages gradients over ranks and micro-batches: with this divisor that is a mean over tokens.
        share = torch.tensor(float(loss_tokens), device=engine.device)
        dist.all_reduce(share)
        share /= accumulation * world
        loss_sum = torch.zeros((), device=engine.device)
        for batch in batches:
            arguments = inputs(batch, flat=flat, device=engine.device, dtype=dtype)
            expected = labels(batch, flat=flat, device=engine.device)
            if settings.compile:
                layers.mark_dynamic(arguments)
            if settings.liger != "none":  # computes it with the output layer, so that the logits are never in memory
                loss = engine(**arguments, labels=expected, num_items_in_batch=share).loss
            else:
                loss = loss_of(engine(**arguments).logits, expected, share)
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
        synchronize()
        step_time_s = time.perf_counter() - started
        if step == 0:
            time_to_first_step_s = process_age_s() - waited_s

        dist.all_reduce(loss_sum)
        mean_loss = float(loss_sum) / (accumulation * world)
        if not math.isfinite(mean_loss):
            raise UsageError(f"the loss of step {step} is {mean_loss}: training diverged; lower sft.lr")
        context = {"step": step, "measured": step >= settings.warmup_steps}
        # `started_s` selects the telemetry that was taken during measured steps.
        events.value("step_time_s", step_time_s, **context, started_s=started_s)
        events.value("tokens", sum(batch.tokens for batch in batches) / parts, **context)
        events.value("loss_tokens", loss_tokens / parts, **context)
        events.value("positions", sum(batch.input_ids.size for batch in batches) / parts, **context)
        if rank == 0:
            events.value("loss", mean_loss, **context)
            for batch in batches:
                spans = (batch.bounds[1:] - batch.bounds[:-1]).astype("int64")
                squares += int((spans**2).sum())
                lengths += int(spans.sum())
        events.progress(step + 1, total_steps, "training" if context["measured"] else "warm-up")

    events.value("peak_memory_gib", (torch.cuda.max_memory_allocated() if on_gpu else peak_rss_bytes()) / GIB)
    if rank == 0:
        events.value("setup_time_s", setup_time_s)
        events.value("time_to_first_step_s", time_to_first_step_s)
        for metric, value in built.counts.items():
            events.value(metric, value)
        events.value("packing_utilisation_pct", data.manifest["packing_utilisation_pct"])
        # The mean over tokens, not over samples: the attention length of the average token.
        events.value("sample_tokens_mean", squares / lengths)


def process_age_s() -> float:
    """Seconds since the kernel started this process: the interpreter's start and all imports included."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes; 0 where unknown.

    getrusage would include the memory of its parent before exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
