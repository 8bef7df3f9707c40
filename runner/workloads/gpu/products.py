"""Matrix products in the shapes of a model, whose results are the same bits whenever the same kernel repeats them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ON_GPU = 16384  # the most rows of a product: more are no faster
# Below this width a product on a GPU is the start of its kernel, and says nothing of the GPU.
SMALL = 1024
SQUARE = 8192
TILE = 16  # what products of 8 bits ask of their sizes
RESULT_BYTES = 2 << 30  # of a result, at most
ON_CPU = 256  # the most in any direction, where the rate is only to be of the right magnitude
PRECISIONS = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "float32": "float32"}


def weights(model: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(inputs, outputs, number) of the matrices of `model`, which has the fields of configs/models/."""
    hidden, inner, layers = model["hidden_size"], model["intermediate_size"], model["num_layers"]
    yield hidden, hidden, 2 * layers  # queries, output of attention
    yield hidden, hidden * model["num_kv_heads"] // model["num_heads"], 2 * layers  # keys, values
    yield hidden, inner, 2 * layers  # gate, up
    yield inner, hidden, layers  # down
    yield hidden, model["vocab_size"], 1  # the head


@dataclass(frozen=True)
class Shape:
    """A product [rows, inputs] · [outputs, inputs]ᵀ, as a layer computes it, and how many a forward pass has."""

    rows: int
    inputs: int
    outputs: int
    number: int

    @property
    def flop(self) -> int:
        """Of one product."""
        return 2 * self.rows * self.inputs * self.outputs

    def bytes(self, precision: str) -> int:
        """Memory of its operands, its result and the copy that the result is compared with."""
        operand = {"fp8": 1, "bf16": 2, "float32": 4}[precision]
        result = max(2, operand)
        read = self.rows * self.inputs + self.outputs * self.inputs
        return read * operand + 3 * self.rows * self.outputs * result  # a comparison takes as much again


def on_gpu(model: Mapping[str, Any], free_bytes: float, precisions: Sequence[str]) -> tuple[str, list[Shape]]:
    """(What the products are, their shapes) on a GPU with `free_bytes` of memory, half of which they may take.

    They are those of `model` with as many rows as fit; of a model that is too small to load a GPU, one square.
    """
    matrices, name, rows = list(weights(model)), str(model["name"]), ON_GPU
    if model["hidden_size"] < SMALL:
        matrices, name, rows = [(SQUARE, SQUARE, 1)], f"{SQUARE:,} x {SQUARE:,} ({name} is too small)", SQUARE
    while True:
        shapes = [
            Shape(_whole(min(rows, RESULT_BYTES // 2 // outputs)), _whole(inputs), _whole(outputs), number)
            for inputs, outputs, number in matrices
        ]
        if rows <= TILE or sum(shape.bytes(p) for shape in shapes for p in precisions) <= free_bytes / 2:
            return name, shapes
        rows //= 2


def on_cpu(model: Mapping[str, Any]) -> tuple[str, list[Shape]]:
    """(What the products are, their shapes) on a CPU: those of `model`, cut."""
    shapes = [
        Shape(ON_CPU, _whole(min(inputs, ON_CPU)), _whole(min(outputs, ON_CPU)), number)
        for inputs, outputs, number in weights(model)
    ]
    return f"{model['name']}, cut to {ON_CPU}", shapes


def _whole(size: int) -> int:
    """`size` as a multiple of TILE."""
    return max(TILE, size - size % TILE)


class Product:
    """A product of random numbers on a device, and its last result. `dtype` may be any of 8, 16 or 32 bits."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        import torch

        self.shape = shape
        draw = torch.Generator(device).manual_seed(seed)
        left, right = (
            torch.randn(size, generator=draw, device=device, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
            for size in ((shape.rows, shape.inputs), (shape.outputs, shape.inputs))
        )
        self._multiply = _multiplication(left.to(dtype), right.to(dtype))
        self.run()

    def run(self) -> None:
        """Compute it once more; on a GPU, the result is there once the device is synchronised."""
        self.result = self._multiply()

    @property
    def bits(self) -> torch.Tensor:
        """The last result as integers: what is not a number equals itself, and zeros have a sign."""
        import torch

        return self.result.view({2: torch.int16, 4: torch.int32}[self.result.dtype.itemsize])


class Repeated(Product):
    """A product whose later results are compared with its first one."""

    def __init__(self, shape: Shape, precision: str, device: torch.device, seed: int) -> None:
        import torch

        super().__init__(shape, getattr(torch, PRECISIONS[precision]), device, seed)
        self._first = self.bits.clone()

    def wrong_values(self) -> int:
        """The number of elements of the last result that differ from the first one in any bit."""
        return int((self.bits != self._first).sum())

    def digest(self) -> int:
        """A number for the first result, which another result has by chance only."""
        import torch

        return int(self._first.sum(dtype=torch.int64))


def _multiplication(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What computes left · rightᵀ, always into the same memory where that is possible."""
    import torch

    if left.dtype.itemsize > 1:
        result = torch.empty((left.shape[0], right.shape[0]), device=left.device, dtype=left.dtype)
        return lambda: torch.mm(left, right.T, out=result)
    one = torch.ones((), device=left.device)

    def scaled() -> torch.Tensor:
        result: Any = torch._scaled_mm(
            left, right.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return result[0] if isinstance(result, tuple) else result  # before torch 2.5 with the largest value

    return scaled


def repeats(shapes: Sequence[Shape], pass_s: float, block_s: float) -> list[int]:
    """How often each product is computed in a block of about `block_s`, where a forward pass takes `pass_s`."""
    return [max(1, round(shape.number * block_s / pass_s)) for shape in shapes]
