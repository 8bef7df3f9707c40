"""What NCCL says with NCCL_DEBUG=INFO of how it moves data: networks, adapters, paths, algorithms, warnings. Pure.

Reads NCCL 2.12 to 2.30 and RCCL, network plugins too, behind labels and with lines of others between. It is evidence of
what a rank uses, which its settings are not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from runner.cluster.tools.nccl_tests import MESSAGE, NCCL_VERSION


@dataclass(frozen=True)
class Path:
    """A way that data takes, and how many connections of channels take it.

    `via` as NCCL writes it, without what only tells of buffers: "NET/IB/0/GDRDMA", "P2P/CUMEM", "SHM", "NVLS",
    "COLLNET/SHARP/0". `transport` is its first word; `net` ("IB", "Socket", a plugin), `nic` (the adapter's or
    interface's name, its number if no line names it) and `gpudirect` are None where it leaves no node.
    """

    via: str
    transport: str
    net: str | None
    nic: str | None
    gpudirect: bool | None
    channels: int


@dataclass(frozen=True)
class Evidence:
    """What one rank's log says; None where it says nothing.

    `net` is the network in use, "IB", "Socket" or a plugin's name; `nics` the adapters or interfaces that it found, in
    its numbering, and `link` what they speak ("IB", "RoCE"). `gpudirect` says whether any path over the network reads
    or writes GPU memory itself, `dmabuf` whether the driver offers that by DMA-BUF, `nvls` whether NVLink SHARP has
    channels, and `collnet` whether the switches' SHARP is connected.

    `algorithms` has what was chosen for (collective, bytes) as (algorithm, protocol): only rank 0 writes them, the
    bytes are as NCCL counts them, for all_gather and reduce_scatter those of one rank, and the collective is None
    before NCCL 2.23. `settings` are those that NCCL took from the environment or its file.
    """

    nccl_version: str | None
    net: str | None
    nics: tuple[str, ...]
    link: str | None
    gpudirect: bool | None
    dmabuf: bool | None
    nvls: bool | None
    collnet: bool | None
    paths: tuple[Path, ...]
    algorithms: Mapping[tuple[str | None, int], tuple[str, str]]
    settings: Mapping[str, str]
    warnings: tuple[str, ...]


_LEVEL = re.compile(r"CCL (INFO|WARN) (.*)", re.DOTALL)
_NET = re.compile(r"(?:Using network |Assigned NET plugin )(.+?)(?: to comm)?\s*$")
_VIA = re.compile(
    r"(?:Channel|CollNet) \d+(?:/\d+)? : .* via "
    r"(?:(NET|COLLNET)/(.+?)/(\d+)(?:\(\d+\))?(/GDRDMA)?(?:\(PCI\))?(?:/Shared)?"
    r"|(P2P)/(CUMEM|IPC|MNNVL|direct pointer|indirect)(?:/.*)?|(SHM)(?:/.*)?)"
    r"(?: comm \S+ nRanks \d+)?\s*$"  # RCCL
)
_IB = re.compile(r"NET/\S+ : Using (\[.*)")
_DEVICE = re.compile(r"\[(\d+)\] ?([\w.-]+):\d+(?::\d*)*/(\w+)")  # port, and where they are known rail and plane
_MERGED = re.compile(r"\[(\d+)\]=\{([^}]*)\}")
_VIRTUAL = re.compile(r"Made virtual device \[(\d+)\] name=(\S+)")
_SOCKET = re.compile(r"NET/Socket : Using (\[.*)")
_INTERFACE = re.compile(r"\[(\d+)\]([^\s:<]+):")
_HCA = re.compile(r"NET/(.+?) ?: GPU Direct RDMA (Enabled|Disabled) for HCA (\d+) '([^']+)'")
_DMABUF = re.compile(r"DMA-BUF is available on GPU device")
_NVLS = re.compile(r"NVLS multicast support is (not )?available on dev")
_CHANNELS = re.compile(r"\b\d+ coll channels, (?:.*?(\d+) nvls channels, )?")
_NVLS_USED = re.compile(r"Connected NVLS tree|NVLS comm 0x\w+ headRank")
_COLLNET = re.compile(r"Connected (?:CollNet|Collnet Chains)")
_INITIALISED = re.compile(r"- Init COMPLETE|\bcoll channels\b|Connected all rings")
_CHOICE = re.compile(r"(?:(\w+): )?(\d+) Bytes -> Algo (\w+) proto (\w+)\b")
_SYMMETRIC = re.compile(r"(\w+) \[(Symmetric|Copy Engine|Hierarchical CE)\]: (\d+) Bytes -> (?:Kernel )?(\w+)")
_SETTING = re.compile(r"\b(NCCL_\w+) set (?:by environment )?to (.*?)\.?\s*$")

# The numbers by which NCCL 2.21 to 2.23 names algorithms and protocols.
_ALGORITHMS = ("TREE", "RING", "COLLNET_DIRECT", "COLLNET_CHAIN", "NVLS", "NVLS_TREE", "PAT")
_PROTOCOLS = ("LL", "LL128", "SIMPLE")
_MOST_WARNINGS = 50
_LONGEST = 1 << 14  # characters of a line: NCCL writes at most a few thousand

# NCCL's names of collectives as the tests of nccl-tests are called.
_COLLECTIVES = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "AlltoAll": "alltoall",
    "Broadcast": "broadcast",
    "Reduce": "reduce",
    "Gather": "gather",
    "Scatter": "scatter",
    "SendRecv": "sendrecv",
    "Send": "sendrecv",
    "Recv": "sendrecv",
}


def parse(text: str) -> Evidence:
    """The evidence in a rank's log, or in output that has its messages among others'."""
    version = net = link = None
    names: dict[tuple[str | None, int], str] = {}  # by network and number
    found: Counter[tuple[str, str | None, int, bool]] = Counter()  # transport, network, number, GPUDirect
    local: Counter[str] = Counter()
    supported: dict[str, bool] = {}
    nvls_channels: int | None = None
    algorithms: dict[tuple[str | None, int], tuple[str, str]] = {}
    settings: dict[str, str] = {}
    warnings: dict[str, None] = {}
    initialised = False
    for line in text.splitlines(keepends=True):
        line = line if len(line) < _LONGEST else line[:_LONGEST]
        if told := NCCL_VERSION.search(line):
            version = told[1]
        for message in _messages(line):
            level, words = message
            if level == "WARN":
                if len(warnings) < _MOST_WARNINGS:
                    warnings[words.strip()] = None
                continue
            initialised = initialised or bool(_INITIALISED.search(words))
            if via := _VIA.search(words):
                if not words.endswith("\n"):
                    continue  # cut there: whether /GDRDMA followed is not known
                if via[1]:
                    found[via[1], via[2], int(via[3]), bool(via[4])] += 1
                else:
                    local["SHM" if via[7] else f"P2P/{via[6]}"] += 1
            elif choice := _CHOICE.search(words):
                algorithms[_COLLECTIVES.get(choice[1], choice[1]), int(choice[2])] = (
                    _named(choice[3], _ALGORITHMS),
                    _named(choice[4], _PROTOCOLS),
                )
            elif choice := _SYMMETRIC.search(words):
                algorithms[_COLLECTIVES.get(choice[1], choice[1]), int(choice[3])] = (choice[2].upper(), choice[4])
            elif told := _NET.match(words):
                net = told[1]
            elif told := _SOCKET.match(words):
                names |= {("Socket", int(number)): name for number, name in _INTERFACE.findall(told[1])}
            elif told := _IB.match(words):
                links = {kind for _, _, kind in _DEVICE.findall(told[1]) if kind in ("IB", "RoCE")}
                link = "/".join(sorted(links)) or link
                merged = {
                    int(number): "+".join(name for _, name, _ in _DEVICE.findall(members))
                    for number, members in _MERGED.findall(told[1])
                }
                alone = {int(number): name for number, name, _ in _DEVICE.findall(_MERGED.sub("", told[1]))}
                names |= {("IB", number): name for number, name in (alone | merged).items()}
            elif told := _VIRTUAL.search(words):
                names["IB", int(told[1])] = told[2]
            elif told := _HCA.search(words):
                names.setdefault((_family(told[1]), int(told[3])), told[4])
            elif _DMABUF.search(words):
                supported["dmabuf"] = True
            elif told := _NVLS.search(words):
                supported["nvls"] = not told[1]
            elif _NVLS_USED.search(words):
                supported["nvls"] = True
            elif _COLLNET.search(words):
                supported["collnet"] = True
            elif (told := _CHANNELS.search(words)) and told[1]:
                nvls_channels = int(told[1])
            if told := _SETTING.search(words):
                settings[told[1]] = told[2]
    over_network = [key for key in found if key[0] == "NET"]
    net = net or next((key[1] for key in over_network), None)
    paths = [
        Path(
            f"{transport}/{network}/{number}{'/GDRDMA' if direct else ''}",
            transport,
            network,
            names.get((_family(network), number), str(number)),
            direct,
            count,
        )
        for (transport, network, number, direct), count in found.items()
    ]
    paths += [Path(via, via.partition("/")[0], None, None, None, count) for via, count in local.items()]
    if nvls_channels:
        paths.append(Path("NVLS", "NVLS", None, None, None, nvls_channels))
    if nvls_channels is not None:
        supported["nvls"] = nvls_channels > 0
    collnet = supported.get("collnet", False) or any(path.transport == "COLLNET" for path in paths)
    return Evidence(
        version,
        net,
        tuple(name for (network, _), name in sorted(names.items()) if network == _family(net)),
        link if _family(net) == "IB" else None,
        any(direct for _, _, _, direct in over_network) if over_network else None,
        True if supported.get("dmabuf") else (False if initialised else None),
        supported.get("nvls"),
        collnet if collnet or initialised else None,
        tuple(paths),
        MappingProxyType(algorithms),
        MappingProxyType(settings),
        tuple(warnings),
    )


def _messages(line: str) -> list[tuple[str, str]]:
    """The messages of NCCL on a line, as (level, words): several where lines ran into each other."""
    begins = [begin.start() for begin in MESSAGE.finditer(line)] or [0]
    split = (_LEVEL.search(line[begin:end]) for begin, end in zip(begins, [*begins[1:], len(line)], strict=True))
    return [(each[1], each[2]) for each in split if each]


def _named(text: str, names: tuple[str, ...]) -> str:
    """The name of an algorithm or protocol that is given by name or number."""
    return names[int(text)] if text.isdecimal() and int(text) < len(names) else text.upper()


def _family(net: str | None) -> str | None:
    """The network whose numbering of adapters a plugin has: those made from IB print its lines."""
    return "IB" if net is not None and net.startswith(("IB", "gIB", "SHARP")) else net
