"""The settings of test `gpu`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, model_validator

from runner.system.schema import ConfigFile, Size

BESIDE_S = 300  # that a cell may take beside the soak


class GpuTest(ConfigFile):
    """configs/tests/gpu.yaml: `soak_s` seconds of matrix products, then copies of these sizes.

    Each rate is measured `blocks` times, that of the products at least as often. `timeout_s` is the time limit of a
    cell in seconds.
    """

    soak_s: PositiveFloat | None = Field(description="None: 20 s on GPUs, 2 s on CPUs")
    copy_bytes: Size | None = Field(description="None: 1 GiB on GPUs, 64 MiB on CPUs")
    host_bytes: Size
    peer_bytes: Size
    blocks: Annotated[int, Field(ge=5, strict=True)]
    timeout_s: PositiveFloat

    @model_validator(mode="after")
    def _in_time(self) -> GpuTest:
        if self.soak_s is not None and self.soak_s + BESIDE_S > self.timeout_s:
            needed = f"{self.soak_s + BESIDE_S:g}"
            raise ValueError(f"timeout_s {self.timeout_s:g} is too short for soak_s {self.soak_s:g}: give {needed}")
        return self
