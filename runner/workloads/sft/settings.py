"""The settings of test `sft`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
)

from runner.system.schema import ConfigFile, PositiveInt


class SftTest(ConfigFile):
    """configs/tests/sft.yaml. A null is taken from the model or its DeepSpeed file.

    `samples` counts rows of the dataset, `seq_len` tokens, `global_batch` and `micro_batch` packed sequences. The
    planner decides an `auto` of `recompute`: which activations the backward pass computes again instead of keeping.
    """

    steps: PositiveInt
    warmup_steps: Annotated[int, Field(ge=0)]
    lr: PositiveFloat | None
    dataset: str
    tokenizer: str | None
    samples: PositiveInt
    seq_len: PositiveInt | None
    global_batch: PositiveInt | None
    micro_batch: PositiveInt | None
    gradient_accumulation: PositiveInt | None
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"]
    recompute: Literal["auto", "none", "full"]
    liger: Literal["auto", "true", "false"]
    compile: bool
    timeout_s: PositiveFloat
