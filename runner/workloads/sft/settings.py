"""The settings of test `sft`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
)

from runner.system.schema import ConfigFile, PositiveInt


class SftTest(ConfigFile):
    """DeepSpeed supervised fine-tuning. What is left out comes from the model's DeepSpeed file."""

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
    activation_checkpointing: bool
    liger: Literal["auto", "true", "false"]
    compile: bool
    timeout_s: PositiveFloat
