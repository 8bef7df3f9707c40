"""The settings of test `sft`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
    model_validator,
)

from runner.system.schema import ConfigFile, PositiveInt
from runner.workloads.sft import refusals


class SftTest(ConfigFile):
    """configs/tests/sft.yaml. A null is taken from the model or its DeepSpeed file.

    `samples` counts rows of the dataset, `seq_len` tokens, `global_batch` and `micro_batch` packed sequences. The
    planner decides an `auto` of `recompute`: which activations the backward pass computes again instead of keeping.
    An `auto` of `attention` is decided on the GPU (`attention.KINDS`). The trainer `reference` is DeepSpeed and
    Transformers alone: what `fast` learns is held against it. `precision` is that of matrix products; auto: the
    DeepSpeed file's. `tensor_parallel` counts the GPUs of a node that share each layer.
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
    trainer: Literal["fast", "reference"]
    attention: Literal["auto", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", "eager"]
    recompute: Literal["auto", "none", "selective", "full"]
    precision: Literal["auto", "fp8"]
    fp8_recipe: Literal["tensorwise", "rowwise"]
    liger: Literal["auto", "true", "false"]
    compile: bool
    tensor_parallel: PositiveInt
    timeout_s: PositiveFloat

    @model_validator(mode="after")
    def _reference_is_plain(self) -> SftTest:
        if reason := refusals.by_reference(self.model_dump()):
            raise ValueError(reason)
        return self
