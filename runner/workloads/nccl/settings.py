"""The settings of test `nccl`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from runner.system.schema import ConfigFile, PositiveInt, Size

Collective = Literal[
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "all_to_all_v",
    "broadcast",
    "reduce",
    "send_recv",
    "gather",
    "scatter",
    "hypercube",
]
Split = Literal["none", "node", "rail"]
Dtype = Literal["float32", "float64", "float16", "bfloat16", "int8", "float8_e4m3", "float8_e5m2"]
Algorithm = Literal["Ring", "Tree", "CollnetDirect", "CollnetChain", "NVLS", "NVLSTree", "PAT"]
Protocol = Literal["LL", "LL128", "Simple"]

# Variables that the test sets itself, to keep and to read what NCCL says of its choices, or that would end it early.
_OWN = ("NCCL_DEBUG", "NCCL_TESTS_")


def _of_nccl(variables: Any) -> Any:
    for name in variables if isinstance(variables, dict) else (variables,):
        if not re.fullmatch(r"NCCL_[A-Z0-9_]+", str(name)) or not isinstance(variables, dict):
            raise ValueError("give NCCL's variables with their values: 'nccl.variables={NCCL_IB_TC: 106}'")
        if name.startswith(_OWN):
            raise ValueError(f"{name} is set by the test itself")
    return variables


class NcclTest(ConfigFile):
    """configs/tests/nccl.yaml: `min_bytes`, each size `factor` times the previous one, up to `max_bytes`.

    `warmup` and `iters` are iterations per size, `timeout_s` is the time limit of a cell in seconds. `splits` are the
    groups of GPUs in which `split_collectives` are measured, from `split_min_bytes` on; in split `none`, where all GPUs
    are one group, `collectives` are.
    """

    collectives: Annotated[tuple[Collective, ...], Field(min_length=1)]
    splits: Annotated[tuple[Split, ...], Field(min_length=1)]
    split_collectives: Annotated[tuple[Collective, ...], Field(min_length=1)]
    split_min_bytes: Size
    min_bytes: Size
    max_bytes: Size | None = Field(description="None: 8 GiB on GPUs, 1 MiB on CPUs")
    factor: Annotated[int, Field(ge=2)]
    warmup: Annotated[int, Field(ge=0)]
    iters: PositiveInt
    dtype: Dtype
    check: bool
    root: Annotated[str, Field(pattern=r"^/[\w./+-]*$")] | None = Field(
        description="an absolute path, of letters, digits and ./_+-"
    )
    nvls: bool | None
    collnet: bool | None
    gpudirect: bool | None
    buffsize: Size | None
    algo: Algorithm | None
    proto: Protocol | None
    net: Literal["IB", "Socket"] | None
    hca: Annotated[str, Field(pattern=r"^[\w:,=^.-]+$")] | None = Field(
        description="NICs as NCCL_IB_HCA names them, such as mlx5_0,mlx5_1"
    )
    qps_per_connection: PositiveInt | None
    variables: Annotated[dict[str, str | int], BeforeValidator(_of_nccl)]
    timeout_s: PositiveFloat

    @model_validator(mode="after")
    def _ordered(self) -> NcclTest:
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes {self.max_bytes} is below min_bytes {self.min_bytes}")
        return self
