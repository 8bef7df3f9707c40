"""Reading nvidia-smi's and the driver's output, for the modules of several roles."""

from __future__ import annotations

import csv
import datetime
import glob
import io
import json
import os
import re

from ansible.module_utils.xids import address

CUDA_FACT = "/etc/ansible/facts.d/cuda.fact"  # written by the role cuda_check


def query(phase, fields, timeout_s=20):
    """One dictionary per GPU with `fields` of `nvidia-smi --query-gpu`, values as printed, without units.

    Returns (rows, ""), or ([], reason) where nvidia-smi is missing, fails, or exceeds `timeout_s`.
    """
    argv = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    outcome = phase.run(argv, timeout_s)
    if not outcome.ok:
        return [], outcome.last_line
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(outcome.stdout)) if row]
    if any(len(row) != len(fields) for row in rows):
        return [], f"nvidia-smi printed {len(rows[0])} columns instead of {len(fields)}"
    return [dict(zip(fields, row)) for row in rows], ""  # noqa: B905 - strict= is newer than a node's Python


def driver(phase):
    """(version of the driver, "") from cuda.fact or else from nvidia-smi; ("", reason) where both fail."""
    try:
        with open(CUDA_FACT, encoding="utf-8") as file:
            if version := json.load(file).get("driver"):
                return version, ""
    except (OSError, ValueError):
        pass  # the first run, or a damaged file: ask the driver itself
    rows, reason = query(phase, ["driver_version"])
    return (rows[0]["driver_version"], "") if rows else ("", reason or "no GPU")


def is_there(phase, root="/"):
    """Whether this machine has an NVIDIA GPU, with or without a driver: as its PCI bus says, or else nvidia-smi.

    Where a GPU is passed through without its bus (WSL, some containers), only the driver knows it.
    """
    for path in glob.glob(os.path.join(root, "sys/bus/pci/devices/*/class")):
        words = []
        for name in ("class", "vendor"):
            try:
                with open(os.path.join(os.path.dirname(path), name), encoding="ascii") as file:
                    words.append(file.read().strip())
            except (OSError, ValueError):
                words.append("")
        if words[0].startswith("0x03") and words[1] == "0x10de":  # a display controller of NVIDIA
            return True
    outcome = phase.run(["nvidia-smi", "-L"], 20)
    # 15: a GPU fell off the bus. 18: driver and library differ, so there is a driver. One that hangs is loaded as well.
    return "GPU 0:" in outcome.stdout or outcome.rc in (15, 18) or "gave no answer" in outcome.reason


def version(text):
    """A version as a tuple of numbers, for comparison: "560.35.03" -> (560, 35, 3). () where `text` has none."""
    numbers = []
    for part in str(text).strip().split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


# --- parsers; each accepts any text, and omits from its result what it cannot parse ---

NO_VALUE = re.compile(
    r"\[?(N/A|ERR!|unknown( error)?|not supported|not available|insufficient permissions|GPU is lost|"
    r"function not found|requested functionality has been deprecated)\]?|",
    re.IGNORECASE,
)


class Gpu:
    """One GPU of `nvidia-smi -q`: `fields` by path, such as "Remapped Rows/Pending"; values as printed."""

    def __init__(self, pci):
        self.pci, self.fields = pci, {}

    def get(self, *paths):
        """(value, "") of the first of `paths` that has one; (None, the text found instead) where none has."""
        instead = "missing"
        for path in paths:
            value = self.fields.get(path)
            if value is not None and not NO_VALUE.fullmatch(value):
                return value, ""
            if value is not None:
                instead = value or "nothing"
        return None, instead

    def number(self, *paths):
        """As `get`, for a number with or without a unit: "16x" -> 16, "143771 MiB" -> 143771."""
        value, instead = self.get(*paths)
        if value is None:
            return None, instead
        match = re.match(r"\d+(?=$|x$|[ .])", value)
        return (int(match[0]), "") if match else (None, value)


class Query:
    """The parsed output of `nvidia-smi -q`. Unknown values: "" for `driver` and `cuda`, None for `attached`."""

    def __init__(self, driver="", cuda="", attached=None):
        self.driver, self.cuda, self.attached, self.gpus, self.twice = driver, cuda, attached, [], []


def parse_query(text):
    """The Query for the output of `nvidia-smi -q`, of any driver version, complete or truncated.

    The path of a field is made of the less indented lines above it. An incomplete last line is ignored, since part of
    a value is a wrong value. A GPU that is listed twice is kept once and added to `twice`.
    """
    query, gpu, above = Query(), None, []
    seen = set()
    for line in text[: text.rfind("\n") + 1].splitlines():
        if match := re.fullmatch(r"GPU ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7])\s*", line):
            gpu, above = Gpu(address(match[1])), []
            (query.twice if gpu.pci in seen else query.gpus).append(gpu)
            seen.add(gpu.pci)
            continue
        match = re.fullmatch(r"(\s*)(\S.*?)(?:\s*:(?:\s(.*))?)?", line)
        if not match:
            continue
        indent, name, value = len(match[1]), match[2], match[3]
        value = value.strip() if value is not None else None
        if indent == 0:
            gpu = None if value is None else gpu  # another heading than a GPU's ends the GPU
            if name == "Driver Version" and value and not NO_VALUE.fullmatch(value):
                query.driver = value
            elif name == "CUDA Version" and value and not NO_VALUE.fullmatch(value):
                query.cuda = value
            elif name == "Attached GPUs" and value and value.isdigit():
                query.attached = int(value)
            continue
        while above and above[-1][0] >= indent:
            above.pop()
        above.append((indent, name))
        if gpu is not None and value is not None:
            gpu.fields.setdefault("/".join(name for _, name in above), value)
    query.twice = [gpu.pci for gpu in query.twice]
    return query


def parse_nvlink(text):
    """The links by UUID of the GPU, from the output of `nvidia-smi nvlink -s`: {"GPU-…": {0: 26.562, 1: 0.0, 2: None}}.

    Rates in GB/s, one way; 0 for an inactive link, None for an unknown rate.
    """
    gpus, links = {}, None
    for line in text[: text.rfind("\n") + 1].splitlines():
        if match := re.match(r"GPU \d+: .*\(UUID: (GPU-[0-9A-Fa-f-]+)\)", line):
            links = gpus.setdefault(match[1], {})
        elif (match := re.match(r"\s+Link (\d+): (.*)", line)) and links is not None:
            rate = re.fullmatch(r"(\d+(?:\.\d+)?) GB/s", match[2].strip())
            inactive = match[2].strip().strip("<>").lower() == "inactive"
            links[int(match[1])] = 0.0 if inactive else float(rate[1]) if rate else None
        elif "all links are inactive" in line.lower() and links is not None:
            links[0] = 0.0  # printed once instead of a list
    return gpus


# --- the kernel log ---


def kernel_log(phase, hours):
    """(the kernel's messages of this boot within the last `hours`, ""), or ("", reason) where none can be read."""
    argv = ["journalctl", "--dmesg", "--quiet", "--no-pager", "--output=short-iso", f"--since=-{int(hours * 3600)}s"]
    journal = phase.run(argv, 20)
    if journal.ok and journal.stdout.strip():
        return journal.stdout, ""
    # An empty journal may not collect the kernel's messages at all.
    ring = phase.run(["dmesg", "--time-format=iso"], 20)
    if not ring.ok:
        return "", ring.last_line
    return recent(ring.stdout, datetime.datetime.now().astimezone() - datetime.timedelta(hours=hours)), ""


def recent(text, since):
    """The lines of `dmesg --time-format=iso` not older than `since`; lines without a time are kept."""
    lines = []
    for line in text.splitlines():
        match = re.search(r"\b(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)[,.]\d+([+-]\d\d:\d\d)", line[:60])
        if not match or datetime.datetime.fromisoformat(match[1] + match[2]) >= since:
            lines.append(line)
    return "\n".join(lines)
