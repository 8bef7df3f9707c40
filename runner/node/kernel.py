"""What the kernel's log says of this node's GPUs: first-hand, and before the ranks know."""

from __future__ import annotations

import os
from pathlib import Path

from runner.cluster import xids

KMSG = Path("/dev/kmsg")
_RECORD = 8192  # bytes: one read returns one record
_MOST = 20  # lines that are passed on; a GPU that fails repeats itself


def gpu_errors(since_s: float, log: Path = KMSG) -> list[str]:
    """The lines with a serious Xid since `since_s` (monotonic, in s), at most the first of each device and number.

    Empty where the log may not be read, as by a user without privileges or in a container.
    """
    lines = []
    for line in _read(log).decode(errors="replace").splitlines():
        head, _, text = line.partition(";")
        stamp = head.split(",")[2:3]
        if stamp and stamp[0].isdigit() and int(stamp[0]) / 1e6 >= since_s:
            lines.append(text)
    found: dict[tuple[str, str], str] = {}
    for line in lines:
        for xid in xids.serious(line):
            found.setdefault((xid.name, xid.pci), line)
    return list(found.values())[:_MOST]


def _read(log: Path) -> bytes:
    """All records of the kernel's ring buffer: `priority,number,microseconds,flags;text`."""
    records = []
    try:
        device = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        while True:
            try:
                record = os.read(device, _RECORD)
            except BrokenPipeError:
                continue  # overwritten while this is read
            except OSError:  # the end
                break
            if not record:
                break
            records.append(record)
    finally:
        os.close(device)
    return b"".join(records)
