"""What a rank measures: its GPU, or a CPU where there is none. What is asked of CUDA itself is here."""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from runner.cluster import facts
from runner.errors import InfrastructureError
from runner.workloads.gpu import numa

FP8 = (8, 9)  # the least compute capability whose products take 8 bits
_SAYS = re.compile(r"CUDA|cuBLAS|NVIDIA", re.IGNORECASE)  # an error of the GPU, its driver or its libraries


class Device(Protocol):
    """A device that computes. Two of the same `model` give the same bits for the same product."""

    place: torch.device
    precisions: Sequence[str]
    model: str

    def synchronize(self) -> None:
        """Wait until all that was started has ended."""

    def release(self) -> None:
        """Give back memory that is not used any more."""

    @contextmanager
    def named(self, phase: str) -> Iterator[None]:
        """Errors of the device are raised as InfrastructureError, which names it, what it did and who else uses it."""
        yield


class Cpu:
    """A rank's share of a CPU."""

    def __init__(self) -> None:
        self.place = torch.device("cpu")
        self.precisions: Sequence[str] = ("float32", "bf16")
        self.model = f"{facts.cpu_model()}, PyTorch {torch.__version__}"

    def synchronize(self) -> None:
        """Nothing runs beside the caller."""

    def release(self) -> None:
        """Memory is given back at once."""

    @contextmanager
    def named(self, phase: str) -> Iterator[None]:
        """A CPU's errors name themselves."""
        yield


class Gpu:
    """The GPU that CUDA calls `local` in this process.

    For its errors: `index` and `uuid` as nvidia-smi has them, and `others`, who else uses it.
    """

    def __init__(self, local: int, index: int, uuid: str | None, others: str) -> None:
        self.place, self._name, self._others = torch.device("cuda", local), f"GPU {index} ({uuid})", others
        with self.named("starting"):
            torch.cuda.set_device(self.place)
            torch.zeros((), device=self.place)
            found = torch.cuda.get_device_properties(self.place)
        software = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuBLAS {_cublas()}"
        self.model = f"{found.name}, {found.multi_processor_count} SMs, {software}"
        self.precisions: Sequence[str] = ("bf16", "fp8") if (found.major, found.minor) >= FP8 else ("bf16",)

    def free_bytes(self) -> int:
        """Memory of the GPU that is free."""
        return int(torch.cuda.mem_get_info(self.place)[0])

    def synchronize(self) -> None:
        """Wait until all that was started on it has ended."""
        torch.cuda.synchronize(self.place)

    def release(self) -> None:
        """Return what PyTorch keeps for the next allocation."""
        torch.cuda.empty_cache()

    @contextmanager
    def named(self, phase: str) -> Iterator[None]:
        """Errors of CUDA are raised as InfrastructureError with the GPU, what it did and who else uses it."""
        try:
            yield
        except RuntimeError as error:
            said = (str(error).splitlines() or [""])[0]
            if not _SAYS.search(said):
                raise
            who = f"; {self._others}" if self._others else ""
            raise InfrastructureError(f"{self._name}, {phase}: {said}{who}") from error


def _cublas() -> str | None:
    """The version of the library that chooses the kernels of products, where a package brought it."""
    return next((found for name in ("nvidia-cublas", "nvidia-cublas-cu12") if (found := facts.version_of(name))), None)


@dataclass(frozen=True)
class Pair:
    """Two GPUs of a node, by CUDA's numbers, of which the first sends to the second."""

    source: int
    target: int

    def synchronize(self) -> None:
        """Wait until all that was started on either has ended."""
        torch.cuda.synchronize(self.source)
        torch.cuda.synchronize(self.target)

    @property
    def direct(self) -> bool:
        """Whether one reaches the other's memory by itself; else the driver copies through the host."""
        return torch.cuda.can_device_access_peer(self.target, self.source)


class Waits(Protocol):
    """Anything that waits for its work."""

    def synchronize(self) -> None:
        """Wait until all that was started has ended."""


def seconds(on: Waits, run: Callable[[], object], repeats: int) -> float:
    """The time of `repeats` calls of `run`, between two synchronisations."""
    on.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    on.synchronize()
    return time.perf_counter() - started


def touched(size_bytes: int) -> torch.Tensor:
    """Memory of 64-bit words that the caller's CPU was the first to write to, and of which the kernel tells the pages.

    It does not of what cudaHostAlloc returns.
    """
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.int64).zero_()  # which keeps the memory


class HostBuffer:
    """`size_bytes` of the host's memory that a GPU reads and writes by itself, on a NUMA node with the CPUs `cpus`.

    `words` are its 64-bit words. `node` is where they are, as the kernel says, or else where they were to be.
    """

    def __init__(self, size_bytes: int, node: int, cpus: set[int]) -> None:
        with numa.on(cpus):
            self.words = touched(size_bytes)
            code = torch.cuda.cudart().cudaHostRegister(self.words.data_ptr(), size_bytes, 0)
            self._registered = int(code) == 0
            if not self._registered:  # as on some virtual machines
                with suppress(RuntimeError):  # the next kernel raises the error that was only returned
                    torch.ones((), device="cuda")
                self.words = torch.zeros(size_bytes // 8, dtype=torch.int64, pin_memory=True)
        found = numa.where(self.words.data_ptr())
        self.node = node if found is None else found

    def free(self) -> None:
        """Give the memory back; the buffer must not be used any more."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.words.data_ptr())
        del self.words
