"""The settings of the tests that a workflow consists of: `runner workflow` makes them, no file and no user does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from runner.system.schema import ConfigFile

Absolute = Annotated[str, Field(pattern=r"^/")]
Words = Annotated[tuple[str, ...], Field(min_length=1)]


class _Stage(ConfigFile):
    """`timeout_s` is the time limit of a stage in seconds."""

    timeout_s: PositiveFloat = 86400.0


class RlSftTest(_Stage):
    """`words` are the overrides of verl's trainer, which writes into the folder `checkpoint`."""

    words: Words
    checkpoint: Absolute


class RlTest(RlSftTest):
    """As for fine-tuning, with the algorithm, and the seconds in which all nodes have to join Ray."""

    program: Literal["ppo", "grpo"]
    join_s: PositiveFloat = 300.0


class RlMergeTest(_Stage):
    """The newest checkpoint in the folder `checkpoint`, which `program` wrote with the engine `backend`, becomes the
    model in the folder `target`, which is asked `question`.
    """

    program: Literal["sft", "ppo", "grpo"]
    checkpoint: Absolute
    target: Absolute
    backend: Literal["fsdp", "megatron"]
    question: Annotated[str, Field(min_length=1)]
