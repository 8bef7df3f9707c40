"""Files of known host keys, looked up as ssh does: hashed names, patterns, negation, ports, markers. See sshd(8)."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

CERT_AUTHORITY = "@cert-authority"
REVOKED = "@revoked"
# A number in the place of the key's type is of ssh's first protocol, which no ssh of today reads.
_ENTRY = re.compile(
    rf"[ \t]*(?:(?P<marker>{CERT_AUTHORITY}|{REVOKED})[ \t]+)?"
    r"(?P<hosts>[^@# \t][^ \t]*)[ \t]+(?P<key>[a-z][a-z0-9@.-]*[ \t]+[A-Za-z0-9+/]+=*(?:[ \t].*)?)"
)
_SPECIAL = re.compile(r"[|*?!]")


@dataclass(frozen=True)
class Entry:
    """One line: its marker or "", the field of hosts, and the key with its comment."""

    marker: str
    hosts: str
    key: str

    def under(self, name: str) -> str:
        """The line of a file in which the host is called `name`."""
        return " ".join(filter(None, (self.marker, name, self.key)))


def lines(content: bytes) -> list[str]:
    """The lines of a file as ssh tells them apart; a comment may be in any encoding."""
    return content.decode(errors="replace").split("\n")


def entries(lines: Iterable[str]) -> Iterator[Entry]:
    """The entries in the lines of a file; ssh passes over what is none, and so does this."""
    for line in lines:
        if match := _ENTRY.fullmatch(line.rstrip()):
            yield Entry(match["marker"] or "", match["hosts"], match["key"])


def matches(hosts: str, name: str) -> bool:
    """Whether the field `hosts` of an entry stands for `name`, a host or `[host]:port`."""
    name = name.lower()
    if hosts.startswith("|"):
        return _hashed(hosts, name)
    found = False
    for pattern in hosts.lower().split(","):
        negated = pattern.startswith("!")
        if _pattern(pattern[negated:]).fullmatch(name):
            if negated:
                return False
            found = True
    return found


def _hashed(hosts: str, name: str) -> bool:
    try:
        _, kind, salt, digest = hosts.split("|")
        wanted = base64.b64decode(digest, validate=True)
        return kind == "1" and hmac.digest(base64.b64decode(salt, validate=True), name.encode(), hashlib.sha1) == wanted
    except (ValueError, binascii.Error):
        return False


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in text))


class Known:
    """The entries of files, found by name. Plain names, the most, are looked up; the others are tried one by one."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._plain: dict[str, list[Entry]] = {}
        self._others: list[Entry] = []
        for entry in entries(lines):
            if _SPECIAL.search(entry.hosts):
                self._others.append(entry)
            else:
                for host in entry.hosts.lower().split(","):
                    self._plain.setdefault(host, []).append(entry)

    def find(self, name: str) -> list[Entry]:
        """The entries for `name`, a host or `[host]:port`."""
        return [*self._plain.get(name.lower(), ()), *(e for e in self._others if matches(e.hosts, name))]

    def lookup(self, names: Iterable[str], port: int) -> list[tuple[str, Entry]]:
        """The entries for a host that has these `names`, each with the name that it was found by.

        As ssh does, a name without a port is looked up for port 22, and where nothing is known of it with its port.
        """
        found = []
        for name in names:
            here = self.find(f"[{name}]:{port}") if port != 22 else []
            if all(entry.marker == REVOKED for entry in here):
                here += self.find(name)
            found += [(name, entry) for entry in here]
        return found
