"""Facts: what a node is, as observed on it. Versions come from package metadata: importing torch costs a second."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "shakedown")


def collect(environment: Mapping[str, str]) -> dict[str, Any]:
    """The contents of facts.json; `environment` is what the ranks get on top of this process's."""
    uname = platform.uname()
    return {
        "hostname": uname.node,
        "kernel": uname.release,
        "boot_id": _text("/proc/sys/kernel/random/boot_id"),
        "os": _os_name(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count()},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **gpus(),
        "nccl": version_of(_first_package("nvidia-nccl-cu13", "nvidia-nccl-cu12")),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "nics": list(_nics()),
        "env": {
            key: value
            for key, value in sorted({**os.environ, **environment}.items())
            if key.startswith(("NCCL_", "GLOO_", "OMP_", "CUDA_VISIBLE"))
        },
    }


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _cpu_model() -> str | None:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def version_of(package: str | None) -> str | None:
    if package is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_package(*names: str) -> str | None:
    return next((name for name in names if version_of(name)), None)


def gpus() -> dict[str, Any]:
    """Driver and CUDA version and the GPUs that NVML shows; None and empty without a driver."""
    none: dict[str, Any] = {"driver": None, "cuda": None, "gpus": []}
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no GPU
        return none
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        found.append(
            {
                "index": index,
                "name": pynvml.nvmlDeviceGetName(handle),
                "uuid": pynvml.nvmlDeviceGetUUID(handle),
                "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
            }
        )
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "gpus": found,
    }


def _nics() -> Iterator[dict[str, Any]]:
    import psutil

    addresses = psutil.net_if_addrs()
    for name, state in sorted(psutil.net_if_stats().items()):
        if name == "lo":
            continue
        device = Path("/sys/class/net", name, "device", "driver")
        yield {
            "name": name,
            "speed_mbit_per_s": state.speed or None,
            "mtu": state.mtu,
            "driver": device.resolve().name if device.exists() else None,
            "address": [a.address for a in addresses.get(name, []) if a.family == socket.AF_INET],
        }
