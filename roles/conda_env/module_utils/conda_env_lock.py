"""A lock file, and what it says: which versions, for which CUDA. Used on the controller and on the nodes.

A lock is a requirements file of pip where every line pins one package with `==`, with `--hash=` or without. Comment
lines may say what the pins cannot:

    # cuda: 12.1      the CUDA that its torch is built for; `none` for a CPU build
    # index: URL      a further index that has what the default one lacks
"""

from __future__ import annotations

import hashlib
import re

from ansible.module_utils.phase import Stop

# The oldest driver for each major version of CUDA: within one, minor versions are compatible.
# Source: NVIDIA, CUDA Compatibility, "Minor Version Compatibility"; CUDA Toolkit Release Notes, table 2.
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}

# The CUDA of the role's own profiles, as their locks say; the first that fits is proposed.
PROFILES = {"current": "13.0", "user": "12.1", "cpu": "none"}

_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*==\s*(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"\s*(?P<marker>;.*?)?(?P<hashes>(?:\s+--hash=\S+)*)\s*"
)
_SAYS = re.compile(r"#\s*(cuda|index):\s*(\S+)\s*")


class Lock:
    """A lock file's `text`. `pins` {name: version} in canonical names, `lines` {name: its line};

    `conditional` holds the names whose line has a marker (`; python_version < "3.12"`), `errors` one line for each
    thing that is no pin, `cuda` is "12.1", "none", or "" where neither a comment nor torch's version says it.
    """

    def __init__(self, text):
        self.text = text
        self.pins, self.lines, self.conditional, self.errors = {}, {}, set(), []
        said = {}
        for line in text.splitlines():
            if match := _SAYS.fullmatch(line.strip()):
                said[match[1]] = match[2]
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line:
                self._read(line)
        self.index = said.get("index", "")
        self.cuda = said.get("cuda") or _built_for(self.pins.get("torch", ""))

    def _read(self, line):
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
    def sha256(self):
        return hashlib.sha256(self.text.encode()).hexdigest()


def _built_for(torch):
    """The CUDA that torch's local version names: "2.3.1+cu121" -> "12.1", "+cpu" -> "none", "" where it has none."""
    local = torch.partition("+")[2]
    if local == "cpu":
        return "none"
    match = re.fullmatch(r"cu(\d+)(\d)", local)
    return f"{match[1]}.{match[2]}" if match else ""


def canonical(name):
    """A package's name as all of its spellings have it. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def same(pinned, found):
    """Whether the version `found` is what `==pinned` asks for. Source: PEP 440, "Version matching".

    A pin without a local part (`+cu121`) takes any; 2.0 and 2.0.0 are one version.
    """
    if "+" not in pinned:
        found = found.partition("+")[0]
    return _plain(pinned) == _plain(found)


def _plain(version):
    public, _, local = version.lower().lstrip("v").partition("+")
    return re.sub(r"(\.0)+$", "", public), re.sub(r"[-_]", ".", local)


def oldest_driver(cuda):
    """The oldest driver for a build for `cuda` ("12.1"); "" for a CPU build and for a CUDA not in the table."""
    major = cuda.partition(".")[0]
    return OLDEST_DRIVER.get(int(major), "") if major.isdigit() else ""


def platform_parts(tag):
    """(28, "x86_64") of "manylinux_2_28_x86_64": glibc's minor version and the processor. Source: PEP 600."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag)
    if not match:
        raise Stop("conda_env_platform", "such as manylinux_2_28_x86_64", tag, "name the oldest glibc of all nodes")
    return int(match[1]), match[2]
