"""The platform "cpu" for verl, and the rollout "hf": verl imports this module where `ENVIRONMENT` is set.

What verl 0.9.1 lacks for a CPU, and what is put in its place:

- a platform: it would take "nvidia", and NCCL with it. `Cpu` says gloo.
- process groups: verl asks for `cpu:gloo,<device>:<backend>`, which is `cpu` twice; torch refuses that.
- a critic: its attention is always Flash Attention, whatever is configured. `load_critic` takes what is configured.
- a reference: its parameters are offloaded into pinned memory, which takes a device to pin it for. `offload` pins none.
- a rollout: those registered need a GPU. `runner.workloads.rl.rollout` generates with transformers.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
import torch.distributed
import verl.utils.fsdp_utils
import verl.utils.model
import verl.workers.rollout.base
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.workers.rollout.replica import RolloutReplicaRegistry

from runner.workloads.rl import VERL

if (_found := metadata.version("verl")) != VERL:
    raise ImportError(f"the plugin for CPUs is for verl {VERL}, found {_found}; install the profile cpu-smoke again")


def _nothing(*_: object, **__: object) -> None:
    """What a device without memory of its own and without streams does."""


class Device(types.ModuleType):
    """`torch.cpu`, with what verl asks of `torch.cuda` beside that: no memory is counted, no cache is emptied."""

    BYTES = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.BYTES:
            return lambda *_, **__: 0
        if name == "mem_get_info":
            return lambda *_, **__: (1 << 34, 1 << 35)  # free and total bytes: never short of memory
        if name == "get_device_name":
            return lambda *_, **__: "cpu"
        if name in ("get_rng_state", "set_rng_state"):
            return getattr(torch, name)
        return getattr(torch.cpu, name, _nothing)


@PlatformRegistry.register(platform="cpu")
class Cpu(PlatformBase):
    """verl's platform for ranks that compute on a CPU and speak gloo."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = Device("runner.workloads.rl.device")

    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        """Every machine has a CPU."""
        return True

    def current_device(self) -> torch.device:
        """The device that tensors are put on."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """A rank sees one device, its own."""
        return 1

    def manual_seed(self, seed: int) -> None:
        """Seed torch's generator."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        """No compute capability."""
        return (None, None)

    def communication_backend_name(self) -> str:
        """The backend of process groups."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """A variable that nothing reads: a CPU is not hidden from anybody."""
        return "SHAKEDOWN_VISIBLE_CPUS"

    def ray_resource_name(self) -> str:
        """verl counts GPUs and NPUs alone, so Ray's nodes declare one GPU a rank."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Variables that keep Ray from hiding devices."""
        return []

    def is_ipc_supported(self) -> bool:
        """Weights are never shared as device memory."""
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No profiler reads ranges here."""
        yield


def without_repeats(start: Callable[..., Any]) -> Callable[..., Any]:
    """`init_process_group` as `start`, that takes `cpu:gloo,cpu:gloo` for `cpu:gloo`."""

    @functools.wraps(start)
    def begin(backend: str | None = None, *words: object, **named: object) -> Any:
        if isinstance(backend, str):
            backend = ",".join(dict.fromkeys(backend.split(",")))
        return start(backend, *words, **named)

    return begin


def load_critic(local_path: str, torch_dtype: torch.dtype, model_config: Any, trust_remote_code: bool) -> Any:
    """verl's `load_valuehead_model`, with the attention that `model_config` names."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation=model_config._attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def offload(pin_memory: bool = False) -> CPUOffloadPolicy:
    """FSDP2's policy that keeps parameters in the host's memory, which is never pinned."""
    return CPUOffloadPolicy(pin_memory=False)


def _replica() -> type:
    from runner.workloads.rl.rollout import Replica  # it needs Ray, which ranks of torchrun do not

    return Replica


torch.distributed.init_process_group = without_repeats(torch.distributed.init_process_group)
verl.utils.model.load_valuehead_model = load_critic
verl.utils.fsdp_utils.CPUOffloadPolicy = offload
verl.workers.rollout.base._ROLLOUT_REGISTRY["hf", "async"] = "runner.workloads.rl.rollout.Adapter"
RolloutReplicaRegistry.register("hf", _replica)
