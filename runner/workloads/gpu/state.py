"""What NVML says of one GPU: who else uses it, and its clocks, temperature, power and errors while it works."""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import uuid as uuids
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from runner.workloads.gpu import condition

JOIN_S = 5.0  # NVML may not return from a GPU that is lost
PERIOD_S = 0.25  # between two readings, each of which takes well under a millisecond
# NVML's bits of what keeps clocks down, but for an idle GPU. A power cap is usual under matrix products.
REASONS = {
    "applications_clocks": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake": 0x80,
    "display_clocks": 0x100,
}
Value = tuple[str, float, dict[str, Any]]  # metric, value, context


def cuda_uuid(ordinal: int) -> str | None:
    """The UUID of the GPU that CUDA calls `ordinal` in this process, from the driver; no context is made on it."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    uuid_of = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), ordinal) or uuid_of(raw, device):
        return None
    return str(uuids.UUID(bytes=bytes(raw)))


@dataclass(frozen=True)
class Before:
    """A GPU before this process used it: memory and utilisation, and the processes that compute on it."""

    memory_used_gib: float | None
    memory_gib: float | None
    util_pct: float | None
    pids: tuple[int, ...]

    def values(self) -> Iterator[Value]:
        """As records."""
        if self.memory_used_gib is not None:
            yield "memory_used_before_gib", self.memory_used_gib, {"memory_gib": self.memory_gib}
        if self.util_pct is not None:
            yield "util_before_pct", self.util_pct, {}
        yield "other_processes", len(self.pids), {"pids": list(self.pids)}

    @property
    def others(self) -> str:
        """Who uses it, in words; empty if nobody is seen."""
        if self.pids:
            return f"it is used by others: pid {', '.join(map(str, self.pids))}"
        memory, used = condition.taken(self.memory_used_gib, self.memory_gib), condition.computes(self.util_pct)
        parts = [
            f"{self.memory_used_gib:.1f} GiB were taken" if memory else "",
            f"it was {self.util_pct:.0f} % busy" if used else "",
        ]
        return f"it is used by others: {' and '.join(filter(None, parts))} before the start" if memory or used else ""


class Monitor:
    """One GPU as NVML sees it. What a GPU, a container or a driver does not report is left out."""

    def __init__(self, handle: Any, index: int, uuid: str) -> None:
        self._handle, self.index, self.uuid = handle, index, uuid

    @classmethod
    def of(cls, ordinal: int) -> Monitor | None:
        """The GPU that CUDA calls `ordinal` in this process; None without a driver or NVML."""
        found = cuda_uuid(ordinal)
        if found is None:
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no library or no driver
            return None
        for kind in ("GPU", "MIG"):
            with suppress(pynvml.NVMLError):
                uuid = f"{kind}-{found}"
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                index = ordinal
                with suppress(pynvml.NVMLError):
                    index = pynvml.nvmlDeviceGetIndex(handle)
                return cls(handle, index, uuid)
        return None

    def _read(self, name: str, *arguments: Any) -> Any:
        """What one of NVML's functions says of this GPU, or None."""
        import pynvml

        try:
            return getattr(pynvml, name)(self._handle, *arguments)
        except (pynvml.NVMLError, AttributeError):  # not reported, or not in this version of the binding
            return None

    def before(self) -> Before:
        """Who uses the GPU, to be asked before this process does."""
        memory, used = self._read("nvmlDeviceGetMemoryInfo"), self._read("nvmlDeviceGetUtilizationRates")
        processes = self._read("nvmlDeviceGetComputeRunningProcesses") or ()
        return Before(
            memory_used_gib=round(memory.used / 2**30, 3) if memory else None,
            memory_gib=round(memory.total / 2**30, 1) if memory else None,
            util_pct=used.gpu if used else None,
            pids=tuple(sorted(each.pid for each in processes if each.pid != os.getpid())),
        )

    @property
    def exclusive(self) -> bool:
        """Whether the GPU lets one process use it only."""
        import pynvml

        alone = (pynvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD, pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)
        return self._read("nvmlDeviceGetComputeMode") in alone

    @property
    def pci(self) -> str | None:
        """The name of the device in /sys/bus/pci/devices."""
        info = self._read("nvmlDeviceGetPciInfo")
        if info is None:
            return None
        text = info.busId.decode() if isinstance(info.busId, bytes) else str(info.busId)
        return text.lower()[-12:]

    def links(self) -> Iterator[Value]:
        """PCIe now, which an idle GPU makes slower: its generation and width, and the most it has; and NVLinks."""
        for metric, now, most in (
            ("pcie_generation", "nvmlDeviceGetCurrPcieLinkGeneration", "nvmlDeviceGetMaxPcieLinkGeneration"),
            ("pcie_width", "nvmlDeviceGetCurrPcieLinkWidth", "nvmlDeviceGetMaxPcieLinkWidth"),
        ):
            if (value := self._read(now)) is not None:
                yield metric, value, {"max": self._read(most)}
        import pynvml

        states = [self._read("nvmlDeviceGetNvLinkState", link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)]
        if known := [each for each in states if each is not None]:
            yield "nvlinks_active", known.count(pynvml.NVML_FEATURE_ENABLED), {"links": len(known)}

    def sample(self) -> dict[str, float]:
        """Clock in MHz, temperature in °C, power in W, and the bits of `throttle`."""
        import pynvml

        readings = {
            "sm_clock_mhz": self._read("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
            "temperature_c": self._read("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
            "power_w": self._read("nvmlDeviceGetPowerUsage"),
            "throttle": self._read("nvmlDeviceGetCurrentClocksThrottleReasons"),
        }
        if readings["power_w"] is not None:
            readings["power_w"] /= 1000
        return {name: value for name, value in readings.items() if value is not None}

    def counters(self) -> dict[str, float]:
        """Errors since the driver was loaded (ECC, PCIe) and rows of memory that were ever replaced, by metric."""
        import pynvml

        rows = self._read("nvmlDeviceGetRemappedRows")
        ecc, since = "nvmlDeviceGetTotalEccErrors", pynvml.NVML_VOLATILE_ECC
        found = {
            "ecc_corrected": self._read(ecc, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, since),
            "ecc_uncorrected": self._read(ecc, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, since),
            "pcie_replays": self._read("nvmlDeviceGetPcieReplayCounter"),
        }
        if rows:
            names = ("remapped_rows_corrected", "remapped_rows_uncorrected", "remap_pending", "remap_failed")
            found |= dict(zip(names, map(int, rows), strict=False))
        return {name: value for name, value in found.items() if value is not None}

    def limits(self) -> Iterator[Value]:
        """What the GPU is allowed: its highest clock in MHz, and the power in W, beside the one it was built for."""
        import pynvml

        if (clock := self._read("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM)) is not None:
            yield "sm_clock_max_mhz", clock, {}
        if (power := self._read("nvmlDeviceGetEnforcedPowerLimit")) is not None:
            usual = self._read("nvmlDeviceGetPowerManagementDefaultLimit")
            yield "power_limit_w", power / 1000, {"default_w": usual / 1000 if usual else None}

    def xids(self) -> Callable[[], list[int]]:
        """What returns the Xid errors of this GPU since it was last called."""
        import pynvml

        try:
            events = pynvml.nvmlEventSetCreate()
            pynvml.nvmlDeviceRegisterEvents(self._handle, pynvml.nvmlEventTypeXidCriticalError, events)
        except pynvml.NVMLError:
            return lambda: []

        def read() -> list[int]:
            found = []
            with suppress(pynvml.NVMLError):  # a time-out: there are no more
                while True:
                    found.append(int(pynvml.nvmlEventSetWait_v2(events, 0).eventData))
            return found

        return read


@dataclass
class Watch:
    """The state of a GPU while something runs: `with Watch(monitor) as watch`, then `values`."""

    monitor: Monitor
    samples: list[Mapping[str, float]] = field(default_factory=list)
    found: list[int] = field(default_factory=list)  # Xid errors

    def __enter__(self) -> Watch:
        self._before = self.monitor.counters()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join(JOIN_S)

    def _watch(self) -> None:
        xids = self.monitor.xids()
        while True:
            over = self._over.wait(PERIOD_S)
            self.found += xids()
            if over:
                return
            self.samples.append(self.monitor.sample())

    def values(self) -> Iterator[Value]:
        """As records."""
        yield from summarised(self.samples)
        yield from self.monitor.limits()
        for metric, value in self.monitor.counters().items():
            yield metric, value, {"before": self._before.get(metric)}
        for xid in self.found:
            yield "xid", xid, {}


def summarised(samples: list[Mapping[str, float]]) -> Iterator[Value]:
    """Mean, least and most of what was read, and the share of the readings in which each reason kept clocks down."""
    for metric in ("sm_clock_mhz", "temperature_c", "power_w"):
        if read := [sample[metric] for sample in samples if metric in sample]:
            for statistic, of in (("mean", statistics.fmean), ("min", min), ("max", max)):
                yield metric, of(read), {"statistic": statistic}
    if bits := [int(sample["throttle"]) for sample in samples if "throttle" in sample]:
        times = Counter(reason for each in bits for reason, bit in REASONS.items() if each & bit)
        for reason in REASONS:
            yield "throttle_share_pct", 100 * times[reason] / len(bits), {"reason": reason}
