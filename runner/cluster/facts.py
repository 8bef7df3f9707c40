"""Facts: a node as observed on it. Packages' versions come from their metadata: importing torch takes a second."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.cluster import nccl

# The beginning of the name of a property: that of an interface which ranks send their messages through.
TRAFFIC = "traffic nic"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "shakedown")


def collect(environment: Mapping[str, str]) -> dict[str, Any]:
    """The contents of facts.json, observed on this machine.

    `environment` are the variables that the ranks get in addition to those of this process.
    """
    uname = platform.uname()
    variables = {**os.environ, **environment}
    library, built = nccl.to_load(variables), nccl.built()
    return {
        "hostname": uname.node,
        "kernel": uname.release,
        "boot_id": _text("/proc/sys/kernel/random/boot_id"),
        "os": _os_name(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count()},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **gpus(),
        "nccl": nccl.version_of(library) if library else None,  # until ranks have said what they loaded
        "nccl_built": vars(built) if built else None,
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "nics": list(_nics({**nccl.settings(variables), **variables})),
        "env": relevant({**nccl.settings(variables), **variables}),
    }


_SETTINGS = ("NCCL_", "GLOO_", "OMP_", "CUDA_VISIBLE")
# Variables of container images, module files and builds with the same prefix that NCCL does not read: its version there
# and where it is installed. The version that is loaded is recorded as `nccl`.
_NO_SETTINGS = re.compile(r"NCCL_(VERSION|HOME|ROOT|DIR|(ROOT|INCLUDE|LIB|LIBRARY)_(DIR|PATH)|TESTS_\w+)")


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings that affect measurements, sorted: those of NCCL, gloo and OpenMP, and the visible GPUs."""
    return {
        key: value
        for key, value in sorted(environment.items())
        if key.startswith(_SETTINGS) and not _NO_SETTINGS.fullmatch(key)
    }


def comparable(facts: Mapping[str, Any]) -> dict[str, str]:
    """The properties in facts.json that a measurement depends on, as property -> text. Pure.

    Properties that are unique to a node (host name, boot id, addresses, UUIDs) are left out, so that the environments
    of two nodes, or of one node at two times, are comparable.
    """
    cpu = facts.get("cpu") or {}
    flat: dict[str, Any] = {
        "os": facts.get("os"),
        "kernel": facts.get("kernel"),
        "cpu": f"{cpu.get('model', '?')}, {cpu.get('cores', '?')} cores" if cpu else None,
        "memory": f"{facts['memory_gib']:.0f} GiB" if facts.get("memory_gib") else None,
    }
    gpus = Counter(f"{g.get('name')}, {g.get('memory_gib', 0):.0f} GiB" for g in facts.get("gpus") or [])
    flat["gpus"] = "; ".join(f"{count} × {name}" for name, count in sorted(gpus.items())) or None
    for name in ("driver", "cuda", "nccl", "python"):
        flat[name] = facts.get(name)
    flat["modules"] = ", ".join(facts.get("modules") or [])
    flat |= {f"packages.{name}": value for name, value in sorted((facts.get("packages") or {}).items())}
    for nic in sorted(facts.get("nics") or [], key=lambda nic: str(nic.get("name"))):
        carries = nic.get("carries_traffic")
        if not (nic.get("driver") or carries):  # bridges and the like, which come and go with containers
            continue
        speed = nic.get("speed_mbit_per_s")
        parts = [f"{speed / 1000:g} Gbit/s"] if speed and speed > 0 else []
        parts += [f"MTU {nic.get('mtu')}", *([str(nic["driver"])] if nic.get("driver") else [])]
        flat[f"{TRAFFIC if carries else 'nic'} {nic.get('name')}"] = ", ".join(parts)
    flat |= {f"env.{name}": value for name, value in relevant(facts.get("env") or {}).items()}  # older facts have more
    return {name: str(value) for name, value in flat.items() if value not in (None, "")}


def changes(before: Mapping[str, str | None], now: Mapping[str, str]) -> list[str]:
    """The differences between two environments, such as `torch 2.13.0 -> 2.12.1`.

    A property that is None in `before` may have any value now.
    """
    accepted = {name for name, value in before.items() if value is None}
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    return [
        f"{name.removeprefix('packages.')} {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in names
        if name not in accepted
    ]


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


def cpu_model() -> str | None:
    """The name of this machine's CPU, None where it has none."""
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def version_of(package: str) -> str | None:
    """The version of an installed Python package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> dict[str, Any]:
    """{"driver", "cuda", "gpus"}: the driver's version, the CUDA version it supports, and the GPUs that NVML lists.

    Without a driver the versions are None and the list is empty. `memory_gib` of a GPU is in GiB.
    """
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


def _nics(environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    import psutil

    addresses = psutil.net_if_addrs()
    states = {name: state for name, state in sorted(psutil.net_if_stats().items()) if name != "lo"}
    of_node = _addresses_of(socket.gethostname())
    ours = {name for name in states if of_node & {a.address for a in addresses.get(name, [])}}
    carriers = carrying(environment, states, _interfaces_of_hca, ours | _default_route())
    for name, state in states.items():
        settings = Path("/sys/class/net", name)
        device = settings / "device" / "driver"
        yield {
            "name": name,
            "speed_mbit_per_s": state.speed or None,
            "duplex": {psutil.NIC_DUPLEX_FULL: "full", psutil.NIC_DUPLEX_HALF: "half"}.get(state.duplex),
            "wireless": (settings / "wireless").exists() or (settings / "phy80211").exists(),
            "mtu": state.mtu,
            "driver": device.resolve().name if device.exists() else None,
            "address": [a.address for a in addresses.get(name, []) if a.family == socket.AF_INET],
            "carries_traffic": name in carriers,
        }


def carrying(
    environment: Mapping[str, str],
    names: Collection[str],
    interfaces_of: Callable[[str], Collection[str]],
    default: Collection[str],
) -> set[str]:
    """Those of the interfaces `names` that ranks with this environment send their messages through.

    These are what the settings of NCCL and gloo name, the interfaces of the HCAs that NCCL may use (`interfaces_of`
    returns those of one; NCCL's lists are of beginnings of names, `=` makes them whole names, `^` excludes), and
    `default` where a library chooses itself.
    """
    found: set[str] = set()
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = environment.get(variable, "").strip()
        words = [word.strip() for word in wanted.lstrip("^=").split(",") if word.strip()]
        exact = wanted.startswith(("=", "^=")) or variable.startswith("GLOO")
        named = {n for n in names if any(n == word if exact else n.startswith(word) for word in words)}
        if not words or wanted.startswith("^"):
            found |= set(default) - named
        else:
            found |= named
    hcas = environment.get("NCCL_IB_HCA", "").strip()
    if not hcas.startswith("^"):
        for word in hcas.lstrip("=").split(","):
            found |= set(interfaces_of(word.partition(":")[0].strip())) if word.strip() else set()
    return found & set(names)


def _addresses_of(hostname: str) -> set[str]:
    """The addresses that a name has here: gloo listens on the first one of the node's own."""
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(hostname, None)}
    except OSError:
        return set()


def _default_route() -> set[str]:
    """The interfaces of the default route; empty without one."""
    rows = (line.split() for line in (_text("/proc/net/route") or "").splitlines()[1:])
    return {row[0] for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"}


def _interfaces_of_hca(beginning: str) -> set[str]:
    """The interfaces of the HCAs whose names begin so: their own, and a bond that they are part of."""
    found: set[str] = set()
    for hca in Path("/sys/class/infiniband").glob(f"{beginning}*"):
        found |= {path.name for path in hca.glob("device/net/*")}
        found |= {name for path in hca.glob("ports/*/gid_attrs/ndevs/*") if (name := _text(path))}
    return found
