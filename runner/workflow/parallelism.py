"""How a model is divided among GPUs, in training and in rollout, checked before anything is submitted. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runner.errors import UsageError
from runner.system.wording import counted

FSDP, MEGATRON = "fsdp2", "megatron"  # verl's names of what divides the model in training
_SHOWN = 3  # working sets that a refusal lists


@dataclass(frozen=True)
class Split:
    """Data, tensor and pipeline parallelism in training, and tensor parallelism in rollout. All at least 1."""

    data: int
    tensor: int = 1
    pipeline: int = 1
    rollout_tensor: int = 1

    @property
    def world_size(self) -> int:
        """How many GPUs training takes."""
        return self.data * self.tensor * self.pipeline

    @property
    def strategy(self) -> str:
        """verl's strategy: FSDP has no tensor and no pipeline parallelism, so these take Megatron."""
        return MEGATRON if self.tensor * self.pipeline > 1 else FSDP

    def __str__(self) -> str:
        return f"DP {self.data} × TP {self.tensor} × PP {self.pipeline}"


def split(
    nodes: int,
    gpus_per_node: int,
    *,
    data: int | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    rollout_tensor: int = 1,
    rollout_pipeline: int = 1,
) -> Split:
    """The division of a model on so many nodes; `data` None: what is left.

    Raises UsageError, with the nearest sets that work, unless DP × TP × PP is the number of GPUs and each replica of
    the rollout fits into a node; and by name for pipeline parallelism in rollout, which verl has not.
    """
    for name, value in (
        ("data parallelism", data),
        ("tensor parallelism", tensor),
        ("pipeline parallelism", pipeline),
        ("tensor parallelism in rollout", rollout_tensor),
        ("pipeline parallelism in rollout", rollout_pipeline),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: give 1 or more")
    if rollout_pipeline > 1:
        raise UsageError(
            f"pipeline parallelism {rollout_pipeline} in rollout: verl 0.9.1 has none (vllm, sglang and trtllm alike); "
            f"give 1, and tensor parallelism in rollout up to {gpus_per_node}"
        )
    _check_rollout(rollout_tensor, gpus_per_node)
    gpus = nodes * gpus_per_node
    if data is None and gpus % (tensor * pipeline) == 0:
        data = gpus // (tensor * pipeline)
    if data is None or data * tensor * pipeline != gpus:
        asked = f"DP {'?' if data is None else data} × TP {tensor} × PP {pipeline}"
        product = "" if data is None else f" = {data * tensor * pipeline}"
        near = list(nearest(gpus, gpus_per_node, data, tensor, pipeline))
        raise UsageError(
            f"{asked}{product} is not the {counted(gpus, 'GPU')} of {counted(nodes, 'node')} with "
            f"{gpus_per_node} each: nearest that works: {'; '.join(str(one) for one in near)}"
        )
    return Split(data, tensor, pipeline, rollout_tensor)


def _check_rollout(tensor: int, gpus_per_node: int) -> None:
    fitting = [number for number in range(1, gpus_per_node + 1) if gpus_per_node % number == 0]
    if tensor in fitting:
        return
    what = f"more than the {counted(gpus_per_node, 'GPU')} of a node" if tensor > gpus_per_node else (
        f"no divisor of the {counted(gpus_per_node, 'GPU')} of a node"
    )  # fmt: skip
    raise UsageError(
        f"tensor parallelism {tensor} in rollout is {what}, and a replica does not extend over nodes: give one of "
        f"{', '.join(map(str, fitting))}"
    )


def nearest(gpus: int, gpus_per_node: int, data: int | None, tensor: int, pipeline: int) -> Iterator[Split]:
    """The sets on so many GPUs that differ least from the one asked for: first those with the same TP and PP, then
    those with the smallest factors of change. Tensor parallelism stays inside a node, where NVLink is.
    """

    def distance(one: Split) -> tuple[float, float]:
        def change(found: int, asked: int | None) -> float:
            return 1.0 if not asked else max(found / asked, asked / found)

        kept = change(one.tensor, tensor) * change(one.pipeline, pipeline)
        return kept, change(one.data, data)

    tensors = [number for number in range(1, gpus_per_node + 1) if gpus_per_node % number == 0]
    every = [
        Split(gpus // (tp * pp), tp, pp)
        for tp in tensors
        for pp in range(1, gpus // tp + 1)
        if gpus % (tp * pp) == 0
    ]  # fmt: skip
    yield from sorted(every, key=lambda one: (distance(one), one.pipeline, one.tensor))[:_SHOWN]
