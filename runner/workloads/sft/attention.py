"""Attention that stops at samples: the kinds there are, what each needs, and the one that a rank uses.

A *flat* kind gets all sequences of a micro-batch as one row with the boundaries of its samples, and computes nothing
across them. The others get rows, and a mask under which most of the scores that they compute count for nothing.

A flat kind has a kernel: a function of queries [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim],
boundaries int32 [samples + 1] on the same device, and a bound of the samples' lengths. The bound is the same for every
batch, since torch.compile would compile again for each new one, and tight, since kernels begin work for as many tokens
of each sample. The result has the shape of the queries. The scale is 1 ÷ √head_dim, as in every Llama.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import attention, functional

from runner.errors import UsageError

Kernel = Callable[..., torch.Tensor]

# The name at transformers. For names of its own kinds it looks for their packages, on the hub as well.
FLAT = "flat"
# In standard deviations: bfloat16 is off by some hundredths, the keys of another sample by some units.
TOLERANCE = 0.2


@dataclass(frozen=True)
class Shape:
    """What attention is to compute: a model's heads, their type, and the longest sample in tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    longest: int


def shape(model: Mapping[str, Any], dtype: torch.dtype, longest: int) -> Shape:
    """The attention of `model` (fields of configs/models/) in `dtype` over samples of at most `longest` tokens."""
    heads = model["num_heads"]
    return Shape(heads, model["num_kv_heads"], model["hidden_size"] // heads, dtype, longest)


class Unusable(Exception):
    """Why a kind cannot be used here, to follow its name. `broken`: all that it needs is there."""

    def __init__(self, reason: str, broken: bool = False) -> None:
        super().__init__(reason)
        self.broken = broken


@dataclass(frozen=True)
class Kind:
    """One way to compute attention.

    `load` imports the kernel of a flat kind, for which `package` has to be installed; a kind without is transformers'
    own. `majors` are the major compute capabilities that the kernel is made for, none: 8 and later. `plain`: the
    trainer `reference` may use it.
    """

    name: str
    detail: str
    device: Literal["cuda", "cpu", "any"] = "cuda"
    load: Callable[[], Kernel] | None = None
    package: str = ""
    majors: tuple[int, ...] = ()
    plain: bool = False

    def kernel(self, device: torch.device, shape: Shape) -> Kernel | None:
        """The kernel, after a trial on `device`; None for a kind that is transformers' own. Raises Unusable."""
        if self.device == "any":
            return None
        if self.device != device.type:
            raise Unusable("needs a GPU" if self.device == "cuda" else "is for CPUs")
        if self.device == "cuda":
            self.fits(torch.cuda.get_device_capability(device), shape)
        assert self.load is not None
        try:
            kernel = self.load()
        except ModuleNotFoundError as error:
            raise Unusable(f"needs {self.package} ({error})") from None
        except Exception as error:  # built for another torch: an undefined symbol, a missing operator
            raise Unusable(f"cannot be imported ({_line(error)})", broken=True) from error
        if kernel is not by_sample and (reason := trial(kernel, device, shape)):
            raise Unusable(reason, broken=True)
        return kernel

    def fits(self, capability: tuple[int, int], shape: Shape) -> None:
        """Raise Unusable where the kernel is not made for a GPU of this compute capability, or for `shape`."""
        major, minor = capability
        if major not in self.majors if self.majors else major < 8:
            needed = " or ".join(f"{major}.x" for major in self.majors) or "8.0 or later"
            raise Unusable(f"needs a GPU of compute capability {needed}, this one has {major}.{minor}")
        if shape.dtype not in (torch.bfloat16, torch.float16):
            raise Unusable("needs bf16 or fp16 in the DeepSpeed configuration")
        if shape.head_dim % 8 or shape.head_dim > 256:
            raise Unusable(f"needs heads of a multiple of 8 up to 256 values, this model's have {shape.head_dim}")


@dataclass(frozen=True)
class Attention:
    """The kind in use. `detail` says what computes it, and which broken kinds `auto` has passed over."""

    name: str
    detail: str
    kernel: Kernel | None = None

    @property
    def flat(self) -> bool:
        """Whether the model's inputs are one row with boundaries, instead of rows with a mask."""
        return self.kernel is not None

    def register(self) -> str:
        """Make it known to transformers. Returns the value for its argument `attn_implementation`."""
        if self.kernel is None:
            return self.name
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        # Nothing among its masks: of a name that is not there, transformers makes none, nor looks for samples.
        ALL_ATTENTION_FUNCTIONS.register(FLAT, partial(_forward, self.kernel))
        return FLAT


def choose(
    requested: str, device: torch.device, shape: Shape, *, plain: bool = False, kinds: Sequence[Kind] | None = None
) -> Attention:
    """The attention that `requested` (a name in KINDS, or auto) is on this machine.

    `auto` is the first of `kinds` (KINDS) that works, of the plain ones if `plain`. Raises UsageError where a requested
    kind does not work, and names those that do.
    """
    candidates = [kind for kind in (KINDS if kinds is None else kinds) if kind.plain or not plain]
    passed: list[tuple[Kind, Unusable]] = []
    for kind in candidates:
        if requested not in ("auto", kind.name):
            continue
        try:
            kernel = kind.kernel(device, shape)
        except Unusable as reason:
            passed.append((kind, reason))
            continue
        broken = [f"{kind.name} {reason}" for kind, reason in passed if reason.broken]
        return Attention(kind.name, "; ".join((kind.detail, *broken)), kernel)
    why = passed[0][1] if passed else "is unknown"
    works = dict.fromkeys(kind.name for kind in candidates if _works(kind, device, shape))
    raise UsageError(f"sft.attention={requested} {why}; on this machine work {', '.join(works)} and auto")


def _works(kind: Kind, device: torch.device, shape: Shape) -> bool:
    try:
        kind.kernel(device, shape)
    except Unusable:
        return False
    return True


def trial(kernel: Kernel, device: torch.device, shape: Shape) -> str | None:
    """Why `kernel` does not compute attention on `device`, forward and backward; None where it does.

    It takes milliseconds. Packages are often built for another torch or GPU, and what they compute wrongly no loss
    would show for long. `shape.longest` is the bound, as in training.
    """
    lengths = [1, 7, 64, 33, 128]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    draw = torch.Generator(device).manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    *inputs, towards = (
        torch.randn((sum(lengths), n, shape.head_dim), generator=draw, device=device, dtype=torch.float32)
        for n in heads
    )
    found = []
    for compute, dtype in ((kernel, shape.dtype), (by_sample, torch.float32)):
        # Both begin with what the type of the model keeps.
        leaves = [value.to(shape.dtype).to(dtype).requires_grad_() for value in inputs]
        try:
            result = compute(*leaves, bounds, max(shape.longest, *lengths))
            gradients = torch.autograd.grad(result, leaves, towards.to(shape.dtype).to(dtype))
            found.append([value.detach().float() for value in (result, *gradients)])
        except Exception as error:
            return f"does not work here ({_line(error)})"
    for name, value, right in zip(("result", "gradient", "gradient", "gradient"), *found, strict=True):
        off = ((value - right).abs().max() / right.std()).item()
        if not off <= TOLERANCE:  # a NaN is not either
            return f"computes a wrong {name} here (off by {off:.2g} standard deviations)"
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _forward(
    kernel: Kernel,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer: heads [1, heads, tokens, head_dim] to [1, tokens, heads, head_dim]."""
    result = kernel(*(x[0].transpose(0, 1) for x in (query, key, value)), cu_seq_lens_q, max_length_q)
    return result[None], None


# ---- kernels ----


def _repeated(query: torch.Tensor, *shared: torch.Tensor) -> list[torch.Tensor]:
    """Keys or values [tokens, kv_heads, head_dim] once for each head of the queries."""
    return [x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in shared]


@torch.compiler.disable
def by_sample(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """The kernel for CPUs: torch's attention of each sample by itself, which needs no mask."""
    lengths = bounds.diff().tolist()
    rows = [x.transpose(0, 1)[None].split(lengths, 2) for x in (query, *_repeated(query, key, value))]
    pieces = [functional.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in zip(*rows, strict=True)]
    return torch.cat(pieces, 2)[0].transpose(0, 1)


def from_torch(varlen_attn: Callable[..., Any]) -> Kernel:
    """The kernel that torch.nn.attention.varlen.varlen_attn is, in each of the forms that it had since torch 2.10."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known
    options |= {"enable_gqa": True} if grouped else {}

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        if not grouped:
            k, v = _repeated(q, k, v)
        result: torch.Tensor = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
        return result

    return kernel


def from_package(flash_attn_varlen_func: Callable[..., Any]) -> Kernel:
    """The kernel that a FlashAttention package's flash_attn_varlen_func is; some return more than the result."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        result = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
        found: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return found

    return kernel


def _varlen(implementation: str | None = None) -> Kernel:
    """torch's, with the FlashAttention `implementation` of a package ("FA3", "FA4") or the one that it contains."""
    from torch.nn.attention.varlen import varlen_attn

    if implementation is not None:
        attention.activate_flash_attention_impl(implementation)
    elif getattr(attention, "current_flash_attention_impl", lambda: None)() is not None:
        attention.restore_flash_attention_impl()
    return from_torch(varlen_attn)


def _flash_attention(implementation: str | None, module: str) -> Kernel:
    """The kernel of a package: through torch, where it can take `implementation` from it, or else its own function."""
    if implementation is not None and TAKES_OVER:
        return _varlen(implementation)
    return from_package(importlib.import_module(module).flash_attn_varlen_func)


TAKES_OVER = hasattr(attention, "activate_flash_attention_impl")
THROUGH = "through torch.nn.attention.varlen" if TAKES_OVER else "by its package's own function"
# From the fastest, for GPUs that it is made for. varlen comes before the package flash-attn, the same algorithm: it is
# in torch, and torch.compile knows its operator. Where there is no GPU, sdpa computes each sample by itself.
KINDS = (
    Kind(
        "flash_attention_3",
        f"FlashAttention 3 {THROUGH}",
        load=partial(_flash_attention, "FA3", "flash_attn_interface"),
        package="the package flash-attn-3",
        majors=(9,),
    ),
    Kind(
        "flash_attention_4",
        f"FlashAttention 4 {THROUGH}",
        load=partial(_flash_attention, "FA4", "flash_attn.cute"),
        package="the package flash-attn-4",
        majors=(9, 10),
    ),
    Kind("varlen", "torch.nn.attention.varlen", load=_varlen, package="torch 2.10 or later"),
    Kind(
        "flash_attention_2",
        "FlashAttention 2",
        load=partial(_flash_attention, None, "flash_attn.flash_attn_interface"),
        package="the package flash-attn",
        plain=True,
    ),
    Kind("sdpa", "scaled_dot_product_attention of each sample", device="cpu", load=lambda: by_sample),
    Kind("sdpa", "scaled_dot_product_attention with a mask between samples", device="any", plain=True),
    Kind("eager", "matrix products with a mask between samples", device="any", plain=True),
)
