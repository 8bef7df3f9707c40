"""Which address each node has for each other's name: resolved on the nodes, compared on the controller.

Swapped lines of one node's /etc/hosts send its traffic to another node, and nothing else tells.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

AT_ONCE = 32
MOST = 512  # names of one request: each node answers for each, which a thousand nodes would pay for with a minute
LIMIT_S = 3.0  # a name server that does not answer would take longer for each name
Resolved = Mapping[str, Sequence[str]]  # a name -> its addresses, without those of the node's loopback


class Node(Protocol):
    """What is needed of an inventory's node: agents, which resolve names, know no inventory."""

    @property
    def name(self) -> str:
        """Its name in the inventory."""

    @property
    def alias(self) -> str:
        """Its name by position."""

    @property
    def address(self) -> str:
        """Where it is reached: an address, or a name that resolves."""


def names(nodes: Sequence[Node]) -> list[str]:
    """The names by which `nodes` may be known to each other, MOST of them: all that is not an address."""
    words = dict.fromkeys(word for node in nodes for word in (node.name, node.alias, node.address))
    return [word for word in words if not _is_address(word)][:MOST]


def resolve(wanted: Sequence[str]) -> dict[str, list[str]]:
    """The addresses of each of the names `wanted` on this machine; those not known within LIMIT_S are left out."""
    found: dict[str, list[str]] = {}
    left = list(reversed(wanted))

    def look() -> None:
        with contextlib.suppress(IndexError):
            while name := left.pop():
                with contextlib.suppress(OSError, UnicodeError):
                    answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                    found[name] = sorted({str(answer[4][0]).partition("%")[0] for answer in answers})

    # Daemons, since a lookup cannot be ended.
    threads = [threading.Thread(target=look, daemon=True) for _ in wanted[:AT_ONCE]]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    # A node may have its own name at 127.0.1.1, as Debian writes it.
    elsewhere = {
        name: [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
        for name, addresses in dict(found).items()
    }
    return {name: addresses for name, addresses in elsewhere.items() if addresses}


def wrong(nodes: Sequence[Node], seen: Mapping[str, Resolved]) -> dict[str, str]:
    """{node: what is wrong}, in one line each, of what the nodes resolve: `seen` by the name of who was asked.

    An address is wrong if it is another node's, or if more than half of the others have another one and the inventory
    does not have it either. What only two nodes see differently blames nobody.
    """
    owner = {node.address: node for node in nodes if _is_address(node.address)}
    lines: dict[str, dict[str, str]] = {}  # of each node that was asked, by the node that it has wrongly
    for node in nodes:
        for word in dict.fromkeys((node.name, node.alias, node.address)):
            answers = {asked: frozenset(found[word]) for asked, found in seen.items() if found.get(word)}
            usual, count = Counter(answers.values()).most_common(1)[0] if answers else (frozenset(), 0)
            for asked, addresses in answers.items():
                if asked == node.name or node.address in addresses:
                    continue
                others = [owner[address] for address in sorted(addresses) if address in owner]
                text = ", ".join(sorted(addresses))
                if others:
                    said = f"{word} at {text}, which is {others[0].alias}"
                elif not addresses & usual and 2 * count > len(answers):
                    right = ", ".join(sorted(usual))
                    said = f"{word} at {text}, which the others have at {right}"
                else:
                    continue
                lines.setdefault(asked, {}).setdefault(node.name, said)
    return {asked: f"has {'; '.join(each.values())}: correct its /etc/hosts or DNS" for asked, each in lines.items()}


def _is_address(word: str) -> bool:
    try:
        ipaddress.ip_address(word.partition("%")[0])
    except ValueError:
        return False
    return True
