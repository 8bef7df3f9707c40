"""What Ray gets of this node: a folder, ports, CPUs and GPUs, an address. The standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.errors import InfrastructureError
from runner.node.leftovers import is_at, locked, remove_unused
from runner.node.meeting import listener
from runner.plan.engines import ray

# The address of a node that is alone: Ray replaces 127.0.0.1 by one of the network.
SOLO = "127.0.0.2"
_LOOPBACK = ("127.0.0.1", "::1")


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Ray's folder, for this user alone; removed by the last supervisor that has it, of which a machine that plays
    several nodes has several. What a killed one has left is removed first. Raises InfrastructureError where it is
    another's.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        try:
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise InfrastructureError(f"{path} is not a folder of this user alone: remove it", "not_permitted")
            held = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # the last one who had it has removed it
            continue
        if locked(held, fcntl.LOCK_EX) and is_at(held, path):  # nobody has it: what is in it was left
            for each in path.iterdir():
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        if locked(held, fcntl.LOCK_SH) and is_at(held, path):
            break
        os.close(held)
    try:
        yield path
    finally:
        remove_unused(held, path)
        os.close(held)


def ephemeral() -> range:
    """The ports that this node's kernel gives to outgoing connections."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except (OSError, ValueError):
        return range(32768, 61000)
    return range(int(first), int(last) + 1)


def hold(ports: ray.Ports, stack: contextlib.ExitStack) -> bool:
    """Listen on the first port of a block until `stack` is left; False if that or any other of the block is taken."""
    with contextlib.ExitStack() as taken:
        try:
            claimed = taken.enter_context(listener(ports["claim"]))
            for port in ports.all[1:]:
                listener(port).close()
        except OSError:
            return False
        stack.enter_context(claimed)
        taken.pop_all()
    return True


def grant(job: Mapping[str, Any], gpus: int) -> ray.Grant:
    """What Ray may use here. Ranks that are CPUs count as its GPUs, since trainers count those."""
    cpus = len(os.sched_getaffinity(0))
    if job.get("device") != "cuda":
        return ray.Grant(ray.granted(os.environ, cpus, gpus).cpus, gpus)
    granted, devices, there = ray.granted(os.environ, cpus, gpus), os.environ.get("CUDA_VISIBLE_DEVICES"), _gpus()
    seen = gpus if devices is None else ray.visible(devices)
    return ray.Grant(granted.cpus, min(gpus, granted.gpus, seen, gpus if there is None else there))


def _gpus() -> int | None:
    """How many GPUs the driver has here; None where it does not say."""
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return None


def own_address(named: str, *others: str) -> str:
    """The address of this node in Ray: the one that the inventory has, unless this node does not have it, or it is one
    that leads others to themselves; then the one from which it reaches the first of `others`.
    """
    with contextlib.suppress(OSError):
        found = str(socket.getaddrinfo(named, None, type=socket.SOCK_STREAM)[0][4][0])
        literal = found == named and found not in _LOOPBACK
        if (literal or not found.startswith(("127.", "::1"))) and _is_own(found):
            return found
    for other in others:
        with contextlib.suppress(OSError):
            family, kind, _, _, target = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # sends nothing
                return str(probe.getsockname()[0])
    return SOLO


def _is_own(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
