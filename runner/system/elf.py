"""Dynamic symbols of shared libraries (ELF, 64-bit, little-endian), read without loading them."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_DYNSYM = 11  # type of the section with dynamic symbols
_WEAK = 2  # binding of a symbol that may be missing


def symbols(path: Path, prefix: str) -> tuple[set[str], set[str]]:
    """The dynamic symbols of a library whose names begin with `prefix`: (those it needs, those it provides).

    Only the tables are read, a few MB of a library of 1 GB. Raises OSError where the file cannot be read, and
    ValueError where it is no such library.
    """
    needs: set[str] = set()
    provides: set[str] = set()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:6] != b"\x7fELF\x02\x01":
                raise ValueError(f"{path}: not a 64-bit library")
            (start,) = struct.unpack_from("<Q", content, 0x28)
            size, count = struct.unpack_from("<HH", content, 0x3A)
            # Of each section: type, offset, size, and the section that it refers to.
            fields = [struct.unpack_from("<4xI16xQQI", content, start + size * index) for index in range(count)]
            _, offset, length, names_in = next(each for each in fields if each[0] == _DYNSYM)
            _, names_offset, names_length, _ = fields[names_in]
            names = content[names_offset : names_offset + names_length]
            start_of = prefix.encode()
            for place, info, section in struct.iter_unpack("<IBxH16x", content[offset : offset + length]):
                if names.startswith(start_of, place):  # a name may be the end of another one
                    name = names[place : names.index(b"\0", place)].decode(errors="replace")
                    if section != 0:
                        provides.add(name)
                    elif info >> 4 != _WEAK:
                        needs.add(name)
    except (struct.error, StopIteration, IndexError):
        raise ValueError(f"{path}: its tables cannot be read") from None
    return needs, provides
