"""Test `sft`: supervised fine-tuning of Llama architectures with DeepSpeed, on GPUs or CPUs.

A step is one optimizer step: all of its micro-batches, from reading the data to the updated weights,
timed on every rank between two synchronisations with the device. The loss is the mean over all
loss-bearing tokens of the global batch, whatever the split into ranks and micro-batches, because
every micro-batch's sum is divided by the same count.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import UsageError
from runner.workloads import Events, Job

if TYPE_CHECKING:
    import numpy as np
    import torch

GIB = 1 << 30
IGNORED = -100  # the label of a token outside the loss
# The first collective of a rank waits for the slowest rank to read its weights.
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Settings:
    """What a job asks for, resolved and found possible on its device."""

    steps: int
    warmup_steps: int
    micro_batch: int
    gradient_accumulation: int
    attention: str  # "sdpa", "eager" or "flash_attention_2"
    liger: bool
    dtype: str  # a name in torch
    deepspeed: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank, int32 arrays [micro_batch, seq_len], and what it counts for."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    tokens: int  # real ones, without padding

    @property
    def loss_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def bounds(self) -> np.ndarray:
        """int32 [segments + 1]: where segments begin and end in the flattened batch; attention crosses none."""
        import numpy as np

        starts = (self.position_ids.reshape(-1) == 0).nonzero()[0]
        return np.append(starts, self.position_ids.size).astype(np.int32)


def run(job: Job, events: Events) -> None:
    """Train `warmup_steps` and then `steps` optimizer steps; every rank emits each step's values."""
    settings = resolve(job)
    data = PackedData(Path(job.data or ""))
    data.check(job)
    # DeepSpeed would search for accelerators, and say so.
    os.environ.setdefault("DS_ACCELERATOR", job.device)
    if not job.params.get("compile", False):
        # DeepSpeed decorates an optimizer that is not used here, which imports the whole compiler (1.3 s).
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    total_steps = settings.warmup_steps + settings.steps
    events.progress(0, total_steps, "loading")

    import deepspeed
    import torch
    import torch.distributed as dist

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls torch by names that torch 2.13 has renamed: nothing that a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if job.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # A faster all-reduce between ranks of one node, compiled on first use; nodes have no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=job.comm_backend, timeout=PATIENCE, verbose=False)
    try:
        engine, counts = _engine(job, settings)
        _train(job, settings, data, engine, counts, events)
    except torch.cuda.OutOfMemoryError as error:
        raise UsageError(
            f"out of GPU memory with {settings.micro_batch} × {data.seq_len} tokens a micro-batch on "
            f"{job.world_size} GPUs: lower sft.micro_batch (and raise sft.gradient_accumulation) or sft.seq_len, "
            f"use more nodes, or a DeepSpeed configuration that offloads ({str(error).splitlines()[0]})"
        ) from error
    # Only after success: after a failure it could wait for ranks that never come.
    dist.destroy_process_group()


def resolve(job: Job) -> Settings:
    """Settings of `job`; raises UsageError for what its device or its DeepSpeed configuration cannot do."""
    params, config = job.params, job.deepspeed
    if job.model is None or config is None or job.data is None:
        raise UsageError("test sft needs a model, a DeepSpeed configuration and prepared data")
    if left := list(unresolved(config)):
        raise UsageError(f'DeepSpeed configuration: {", ".join(left)} is still "auto"; give a value')
    try:
        micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        total = config["train_batch_size"]
    except KeyError as error:
        raise UsageError(f"DeepSpeed configuration: {error.args[0]} is missing") from None
    if micro * accumulation * job.world_size != total:
        raise UsageError(
            f"DeepSpeed configuration: train_batch_size {total} is not micro-batch {micro} × accumulation "
            f"{accumulation} × {job.world_size} ranks = {micro * accumulation * job.world_size}"
        )
    if params.get("lr") is not None and "optimizer" in config:
        optimizer = config["optimizer"]
        config = {**config, "optimizer": {**optimizer, "params": {**optimizer.get("params", {}), "lr": params["lr"]}}}
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    return Settings(
        steps=params["steps"],
        warmup_steps=params["warmup_steps"],
        micro_batch=micro,
        gradient_accumulation=accumulation,
        attention=_attention(params.get("attention", "auto"), job.device),
        liger=_liger(str(params.get("liger", "auto")).lower(), job.device),
        dtype=next((dtypes[key] for key in dtypes if config.get(key, {}).get("enabled")), "float32"),
        deepspeed=config,
    )


def unresolved(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is still "auto"."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from unresolved(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key


def _attention(asked: str, device: str) -> str:
    installed = importlib.util.find_spec("flash_attn") is not None
    if asked == "auto":
        return "flash_attention_2" if device == "cuda" and installed else "sdpa"
    if asked == "flash_attention_2" and not (device == "cuda" and installed):
        need = "the package flash-attn, which is not installed" if device == "cuda" else "a GPU"
        raise UsageError(f"sft.attention=flash_attention_2 needs {need}; sdpa works everywhere")
    return asked


def _liger(asked: str, device: str) -> bool:
    installed = importlib.util.find_spec("liger_kernel") is not None
    if asked == "true" and not (device == "cuda" and installed):
        need = "the package liger-kernel, which is not installed" if device == "cuda" else "a GPU"
        raise UsageError(f"sft.liger=true needs {need}; leave it on auto")
    return asked != "false" and device == "cuda" and installed


class PackedData:
    """The sequences of a prepared folder, read through mmap: ranks of a node share the pages."""

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

    def check(self, job: Job) -> None:
        """Raise UsageError where these sequences cannot feed the job's model."""
        model = job.model or {}
        asked = job.params.get("seq_len") or self.seq_len
        if asked != self.seq_len:
            raise UsageError(f"data is packed to {self.seq_len} tokens, the job asks for {asked}; prepare it again")
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
        """Sequences [first, first + count) of the endless shuffled stream that all ranks share."""
        rows = [place(first + i, self.count, seed) for i in range(count)]
        return Batch(self._ids[rows], self._labels[rows], self._positions[rows], tokens=int(self._tokens[rows].sum()))


def place(position: int, count: int, seed: int) -> int:
    """The sequence at `position` of the stream: each epoch holds every sequence once, in an order of its own."""
    epoch, within = divmod(position, count)
    return int(_order(count, seed, epoch)[within])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    import numpy as np

    # A stream of its own: the data was shuffled with default_rng(seed), and default_rng([seed, 0]) is the
    # same generator, which would put the sequences back into the order they were packed in.
    return np.random.default_rng([0x5F7, seed, epoch]).permutation(count)


def build_model(model: Mapping[str, Any], *, attention: str, dtype: torch.dtype, weights: str | None = None) -> Any:
    """A LlamaForCausalLM of a configs/models/ architecture: random weights, or those of `weights`.

    Under ZeRO-3 (an HfDeepSpeedConfig is alive) each parameter is divided among the ranks as soon as it
    exists, so no rank ever holds the whole model.

    Raises UsageError when `weights` cannot be read or are not of this architecture.
    """
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    expected = {
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["intermediate_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "vocab_size": model["vocab_size"],
        "tie_word_embeddings": model["tie_embeddings"],
    }
    if weights is None:
        config = LlamaConfig(
            **expected,
            max_position_embeddings=model["max_seq_len"],
            rms_norm_eps=model["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
        )
        return LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype)
    try:
        config = LlamaConfig.from_pretrained(weights)
    except OSError as error:
        raise UsageError(f"cannot read weights {weights!r}: {str(error).splitlines()[0]}") from error
    if config.model_type != "llama":
        raise UsageError(f"weights {weights!r} are of type {config.model_type!r}, test sft trains Llama architectures")
    for field, value in expected.items():
        if getattr(config, field) != value:
            raise UsageError(
                f"weights {weights!r} have {field} {getattr(config, field)}, model {model['name']} says {value}: "
                f"choose the --model that matches"
            )
    return LlamaForCausalLM.from_pretrained(weights, config=config, attn_implementation=attention, dtype=dtype)


def inputs(batch: Batch, *, flash: bool, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the model's forward pass.

    Position ids that restart at 0 tell transformers where samples begin; without an attention mask it
    then masks across them itself. FlashAttention wants one long row with the boundaries instead: given
    here, it need not find them again in every layer, which would wait for the GPU each time.
    """
    import torch

    shape = (1, -1) if flash else batch.input_ids.shape

    def on_device(array: np.ndarray) -> torch.Tensor:
        # Embedding and loss take 64-bit indices.
        return torch.from_numpy(array.reshape(shape)).to(device, torch.int64, non_blocking=True)

    arguments: dict[str, Any] = {
        "input_ids": on_device(batch.input_ids),
        "labels": on_device(batch.labels),
        "position_ids": on_device(batch.position_ids),
        "use_cache": False,
    }
    if flash:
        bounds = batch.bounds
        longest = int((bounds[1:] - bounds[:-1]).max())
        on_gpu = torch.from_numpy(bounds).to(device, non_blocking=True)
        arguments |= {"cu_seq_lens_q": on_gpu, "cu_seq_lens_k": on_gpu}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
    return arguments


def _engine(job: Job, settings: Settings) -> tuple[Any, dict[str, int]]:
    """(DeepSpeed's engine around the model and its optimizer, parameter counts)."""
    import deepspeed
    import torch
    from transformers.integrations import HfDeepSpeedConfig

    torch.manual_seed(job.seed)
    config = dict(settings.deepspeed)
    alive = HfDeepSpeedConfig(config)  # transformers looks for it, weakly, to build under ZeRO-3
    if settings.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = build_model(
        job.model or {}, attention=settings.attention, dtype=getattr(torch, settings.dtype), weights=job.weights
    )
    del alive
    if job.params.get("activation_checkpointing", True):
        # DeepSpeed's own, so that the configuration's section of that name holds.
        deepspeed.checkpointing.configure(None, deepspeed_config=config)
        model._set_gradient_checkpointing(True, deepspeed.checkpointing.checkpoint)
    model.train()
    size = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    total = sum(size.values())
    tied = model.config.tie_word_embeddings
    embedding = model.get_input_embeddings().weight
    counts = {
        "model_parameters": total,
        # A tied table is the output projection too, a matrix product like any other.
        "model_parameters_non_embedding": total - (0 if tied else getattr(embedding, "ds_numel", embedding.numel())),
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if job.params.get("compile", False):
        engine.compile()
    return engine, counts


def _train(
    job: Job, settings: Settings, data: PackedData, engine: Any, counts: Mapping[str, int], events: Events
) -> None:
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    micro, accumulation = settings.micro_batch, settings.gradient_accumulation
    flash = settings.attention == "flash_attention_2"
    on_gpu = job.device == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    total_steps = settings.warmup_steps + settings.steps
    squares = lengths = 0

    for step in range(total_steps):
        if step == 0:
            setup_time_s = process_age_s()
        synchronize()
        started = time.perf_counter()
        started_s = round(time.time(), 3)
        first = step * accumulation * world * micro
        batches = [data.read(first + (k * world + rank) * micro, micro, job.seed) for k in range(accumulation)]
        loss_tokens = sum(batch.loss_tokens for batch in batches)
        # DeepSpeed averages gradients over ranks and micro-batches: with this divisor that is a mean over tokens.
        share = torch.tensor(float(loss_tokens), device=engine.device)
        dist.all_reduce(share)
        share /= accumulation * world
        loss_sum = torch.zeros((), device=engine.device)
        for batch in batches:
            arguments = inputs(batch, flash=flash, device=engine.device)
            loss = engine(**arguments, num_items_in_batch=share).loss
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
        synchronize()
        step_time_s = time.perf_counter() - started
        if step == 0:
            time_to_first_step_s = process_age_s()

        dist.all_reduce(loss_sum)
        mean_loss = float(loss_sum) / (accumulation * world)
        if not math.isfinite(mean_loss):
            raise UsageError(f"the loss of step {step} is {mean_loss}: training diverged; lower sft.lr")
        context = {"step": step, "measured": step >= settings.warmup_steps}
        # When it was: telemetry counts only while a measured step ran.
        events.value("step_time_s", step_time_s, **context, started_s=started_s)
        events.value("tokens", sum(batch.tokens for batch in batches), **context)
        events.value("loss_tokens", loss_tokens, **context)
        events.value("positions", sum(batch.input_ids.size for batch in batches), **context)
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
        for metric, value in counts.items():
            events.value(metric, value)
        events.value("packing_utilisation_pct", data.manifest["packing_utilisation_pct"])
        # The mean over tokens, not over samples: the length of the attention that the average token takes part in.
        events.value("sample_tokens_mean", squares / lengths)


def process_age_s() -> float:
    """Seconds since the kernel started this process: the interpreter's start and all imports included."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def peak_rss_bytes() -> int:
    """This process's largest resident memory. getrusage would count what its parent had before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
