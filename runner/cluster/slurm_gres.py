"""Lists of generic resources as Slurm writes them for nodes, and as a user asks for them. Text in, values out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_UNITS = " kmgtp"
_COUNT = re.compile(r"(\d+)([kmgtp]?)", re.IGNORECASE)
# Parts are separated by commas, of which those in "(S:0,2-3)" and "(IDX:0-3,7)" separate nothing.
_PART = re.compile(r"(?:[^,()]|\([^()]*\))+")
_WORD = re.compile(r"[^\s,:()=]+")  # "4090", "1g.10gb+me", "nvidia_h100_80gb_hbm3", "tesla_v100-sxm2-32gb"
_NAME = re.compile(r"[a-z_][\w-]*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Gres:
    """Resources of one kind: `gpu:h200:8` has the name "gpu", the type "h200" and the count 8; a type of None: any."""

    name: str
    type: str | None
    count: int


def parse(text: str) -> tuple[list[Gres], list[str]]:
    """The resources of a list such as "gpu:4090:8(S:0-1),gpu:1g.10gb:7", and the parts of it that cannot be read.

    Read as well: "gres/gpu:h100=8" as in TRES, "gpu:8(IDX:0-7)", "lustre:no_consume:4g". A part without a number is
    one. Names and types are in lower case: whether case matters is for sbatch to say.
    """
    found, strange = [], []
    for part in filter(None, (part.strip() for part in _parts(text))):
        gres = _one(part)
        found += [gres] if gres else []
        strange += [] if gres else [part]
    return found, strange


def _parts(text: str) -> list[str]:
    """The parts of a list; the whole of it where its brackets do not match."""
    plain = text.replace("(null)", "")
    return _PART.findall(plain) if re.fullmatch(r"(?:[^()]|\([^()]*\))*", plain) else [text]


def _one(part: str) -> Gres | None:
    plain = re.sub(r"\([^()]*\)", "", part).strip()
    plain = re.sub(r"^gres[/:]", "", plain, flags=re.IGNORECASE).replace("=", ":")
    name, *words = plain.split(":")
    words = [word for word in words if word and word.lower() != "no_consume"]
    # Of two words the last is the number, also where the type looks like one.
    number = _COUNT.fullmatch(words[-1]) if words else None
    types = words[:-1] if number else words
    if not _NAME.fullmatch(name) or len(types) > 1 or not all(_WORD.fullmatch(word) for word in types):
        return None
    count = int(number[1]) * 1024 ** _UNITS.index(number[2].lower() or " ") if number else 1
    return Gres(name.lower(), types[0].lower() if types else None, count)


def holds(there: str, wanted: str) -> bool | None:
    """Whether a node with `there` has `wanted` ("gpu:8", "gpu:4090:8", "gpu:4,nic:2"); None where that cannot be read.

    What is wanted without a type may be of any type, and of several.
    """
    asked, unclear = parse(wanted)
    have, strange = parse(there)
    if all(_counted(have, one) >= one.count for one in asked if one.name != "none"):
        return None if unclear else True
    return None if strange or unclear else False


def _counted(have: Iterable[Gres], wanted: Gres) -> int:
    return sum(one.count for one in have if one.name == wanted.name and wanted.type in (None, one.type))
