"""The settings of test `torch`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
    model_validator,
)

from runner.system.schema import ConfigFile, PositiveInt, Size

Collective = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv", "ping_pong", "barrier"
]


class TorchTest(ConfigFile):
    """configs/tests/torch.yaml: `min_bytes`, each size `factor` times the previous one, up to `max_bytes`.

    `warmup` and `iters` are iterations per size, `timeout_s` is the time limit of a cell in seconds.
    """

    collectives: Annotated[tuple[Collective, ...], Field(min_length=1)]
    min_bytes: Size
    max_bytes: Size | None = Field(description="None: 8 GiB on GPUs, 1 MiB on CPUs")
    factor: Annotated[int, Field(ge=2)]
    warmup: Annotated[int, Field(ge=0)]
    iters: PositiveInt
    dtype: Literal["float32", "bfloat16", "float16"]
    timeout_s: PositiveFloat

    @model_validator(mode="after")
    def _ordered(self) -> TorchTest:
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes {self.max_bytes} is below min_bytes {self.min_bytes}")
        return self
