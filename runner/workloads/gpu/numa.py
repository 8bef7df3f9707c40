"""The NUMA nodes of this machine: which is near a GPU, and how memory comes to lie on one.

Memory is placed by who touches it first: a thread that may run on the CPUs of one node only. That asks for no right
that a container lacks, as mbind(2) does, and the kernel says afterwards where the pages are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_NODES, _DEVICES = Path("/sys/devices/system/node"), Path("/sys/bus/pci/devices")
_PAGES = re.compile(r"\bN(\d+)=(\d+)")


def cpus(text: str) -> set[int]:
    """The CPUs of a list as Linux writes it: `0-3,8` are 0, 1, 2, 3 and 8."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found |= set(range(int(first), int(last or first) + 1))
    return found


def nodes(root: Path = _NODES) -> dict[int, set[int]]:
    """Node -> those of its CPUs that this thread may run on; nodes without one are left out.

    Where the machine does not say, it is one node.
    """
    allowed = os.sched_getaffinity(0)
    found = {}
    for folder in root.glob("node[0-9]*"):
        if mine := cpus((folder / "cpulist").read_text()) & allowed:
            found[int(folder.name[4:])] = mine
    return dict(sorted(found.items())) or {0: allowed}


def node_of(pci: str, root: Path = _DEVICES) -> int | None:
    """The node that a PCI device (`0000:18:00.0`) is attached to; None where the machine does not say."""
    try:
        node = int((root / pci / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def near_and_far(local: int | None, known: Mapping[int, object], root: Path = _NODES) -> list[int]:
    """The node `local` and the one farthest from it, of the nodes `known`; each once.

    Where `local` is not known or has no CPU for this process, the first and the last of them.
    """
    if not known:
        return []
    if local is None or local not in known:
        return sorted({min(known), max(known)})
    try:
        distances = [int(word) for word in (root / f"node{local}" / "distance").read_text().split()]
        order = sorted(int(folder.name[4:]) for folder in root.glob("node[0-9]*"))
        far_by = dict(zip(order, distances, strict=True))
    except (OSError, ValueError):
        far_by = {}
    far = max((node for node in known if node != local), key=lambda node: far_by.get(node, 0), default=local)
    return list(dict.fromkeys([local, far]))


@contextmanager
def on(allowed: set[int]) -> Iterator[None]:
    """This thread runs on these CPUs only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def holds(address: int, maps: str) -> int | None:
    """The node with most pages of the mapping that contains `address`, from the text of /proc/<pid>/numa_maps."""
    best: tuple[int, str] | None = None
    for line in maps.splitlines():
        start, _, rest = line.partition(" ")
        try:
            begin = int(start, 16)
        except ValueError:
            continue
        if begin <= address and (best is None or begin > best[0]):
            best = begin, rest
    pages = {int(node): int(count) for node, count in _PAGES.findall(best[1])} if best else {}
    return max(pages, key=lambda node: pages[node]) if pages else None


def where(address: int) -> int | None:
    """The node that this process's memory at `address` is on; None where the kernel does not say."""
    try:
        return holds(address, Path("/proc/self/numa_maps").read_text())
    except OSError:
        return None
