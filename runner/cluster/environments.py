"""Python environments that are made from a lock: what a lock pins, and whether an environment is whole and is of it.

Standard library and Python 3.9 only: plugins/module_utils has a link to this file, by which Ansible takes it to nodes.

A lock is a requirements file of pip where every line pins one package with `==`, with `--hash=` or without. Comment
lines may add what pins cannot express:

    # cuda: 12.1      the CUDA that its torch is built for; `none` for a CPU build
    # index: URL      an additional index for packages that the default one does not have

An environment has a stamp, written last, that marks it as complete and lists its content.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

STAMP = ".shakedown.json"

# The oldest driver for each major version of CUDA: within one, minor versions are compatible.
# Source: NVIDIA, CUDA Compatibility, "Minor Version Compatibility"; CUDA Toolkit Release Notes, table 2.
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}

# The CUDA of the role's own locks, as in their files.
PROFILES = {
    "current": "13.0",
    "cuda12": "12.8",
    "user": "12.1",
    "cpu": "none",
    "gpu-vllm-cuda13": "13.0",
    "gpu-vllm-cuda12": "12.8",
    "cpu-smoke": "none",
}

# What is no lock but a choice of one by the driver: the first of these that it runs, the newest first. `user` is in
# none, since every driver for it runs `cuda12` too.
CHOICES = {"auto": ("current", "cuda12"), "gpu-vllm": ("gpu-vllm-cuda13", "gpu-vllm-cuda12")}

# For a node whose driver runs no build for CUDA that is like the lock: {lock: the one for CPUs that does the same}.
WITHOUT_GPU = {**dict.fromkeys(CHOICES["auto"], "cpu"), **dict.fromkeys(CHOICES["gpu-vllm"], "cpu-smoke")}

_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*==\s*(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"\s*(?P<marker>;.*?)?(?P<hashes>(?:\s+--hash=\S+)*)\s*"
)
_COMMENT = re.compile(r"#\s*(cuda|index):\s*(\S+)\s*")


class Lock:
    """A parsed lock file. `pins` is {canonical name: version}, `lines` {canonical name: its line}.

    `conditional` has the names whose line has a marker (`; python_version < "3.12"`), `errors` the lines that are not
    valid pins; `cuda` is "12.1", "none", or "" where neither a comment nor torch's version gives it; `index` is the
    additional index's URL or "".
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.pins: dict[str, str] = {}
        self.lines: dict[str, str] = {}
        self.conditional: set[str] = set()
        self.errors: list[str] = []
        comments = {}
        for line in text.splitlines():
            if match := _COMMENT.fullmatch(line.strip()):
                comments[match[1]] = match[2]
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line:
                self._read(line)
        self.index = comments.get("index", "")
        self.cuda = comments.get("cuda") or _built_for(self.pins.get("torch", ""))

    def _read(self, line: str) -> None:
        match = _PIN.fullmatch(line)
        if not match:
            self.errors.append(line)
            return
        name = canonical(match["name"])
        if name in self.pins and not match["marker"]:
            self.errors.append(f"{line} (a second time)")
        self.pins[name], self.lines[name] = match["version"], line
        if match["marker"]:
            self.conditional.add(name)

    @property
    def sha256(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def _built_for(torch: str) -> str:
    """The CUDA in torch's local version: "2.3.1+cu121" -> "12.1", "+cpu" -> "none", "" where it has none."""
    local = torch.partition("+")[2]
    if local == "cpu":
        return "none"
    match = re.fullmatch(r"cu(\d+)(\d)", local)
    return f"{match[1]}.{match[2]}" if match else ""


def canonical(name: str) -> str:
    """The canonical form of a package's name: lower case, with hyphens. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def same(pinned: str, found: str) -> bool:
    """Whether the version `found` satisfies `==pinned`. Source: PEP 440, "Version matching".

    A pin without a local part (`+cu121`) accepts any; 2.0 and 2.0.0 are equal.
    """
    if "+" not in pinned:
        found = found.partition("+")[0]
    return _plain(pinned) == _plain(found)


def _plain(version: str) -> tuple[str, str]:
    public, _, local = version.lower().lstrip("v").partition("+")
    return re.sub(r"(\.0)+$", "", public), re.sub(r"[-_]", ".", local)


def oldest_driver(cuda: str) -> str:
    """The oldest driver for a build for `cuda` ("12.1"); "" for a CPU build and for a CUDA not in the table."""
    major = cuda.partition(".")[0]
    return OLDEST_DRIVER.get(int(major), "") if major.isdigit() else ""


def fitting(found: str, locks: Sequence[str]) -> str:
    """The first of `locks`, names of the role's own, whose PyTorch build works with the driver `found`; "" for none."""
    return next((lock for lock in locks if numbers(found) >= numbers(oldest_driver(PROFILES[lock]))), "")


def installed(environment: str) -> dict[str, str]:
    """{canonical name: version} of every package in `environment`, from its metadata alone."""
    packages = {}
    for path in glob.glob(os.path.join(glob.escape(environment), "lib/python3*/site-packages/*.dist-info/METADATA")):
        head = _read(path).partition("\n\n")[0]
        fields = dict(re.findall(r"^(Name|Version): (.+)$", head, re.MULTILINE))
        if len(fields) == 2:
            packages[canonical(fields["Name"])] = fields["Version"].strip()
    return packages


def stamp(prefix: str) -> dict[str, Any]:
    """The content of the stamp in `prefix`; {} where it is missing or damaged: then the environment is incomplete."""
    try:
        content = json.loads(_read(os.path.join(prefix, STAMP)) or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("packages"), dict) else {}


def drift(expected: Mapping[str, str], found: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """[(package, expected version, found version)] where `found` differs from `expected`, both {package: version}."""
    return [
        (name, pinned, found.get(name, "not installed"))
        for name, pinned in sorted(expected.items())
        if name not in found or not same(pinned, found[name])
    ]


def fault(prefix: str, locks: Mapping[str, str] | None = None) -> str:
    """Why the environment at `prefix` is not usable, in a few words; "" if it is.

    `locks` are those of which it may be, their names by the SHA-256 of their texts; None: it is of the right one.
    """
    found = stamp(prefix)
    if not found:
        return "is incomplete" if os.path.exists(os.path.join(prefix, "bin")) else "is not installed"
    if locks is not None and found.get("lock_sha256") not in locks:
        ours = " or ".join(f"{name} {digest[:12]}" for digest, name in locks.items())
        return f"has the lock {found.get('profile')} {str(found.get('lock_sha256'))[:12]}, not {ours}"
    for name, pinned, there in drift(found["packages"], installed(prefix)):
        return f"has {name} {there}, not {pinned}"
    return "" if os.path.exists(os.path.join(prefix, "bin", "python")) else "has lost its Python"


def numbers(version: str) -> list[int]:
    """The numbers of a version, by which versions are in order; none of "" and of None."""
    return [int(part) for part in re.findall(r"\d+", version or "")]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
