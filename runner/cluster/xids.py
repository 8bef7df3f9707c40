"""Xids and SXids, the errors that NVIDIA's driver writes into the kernel's log: one parser and one judgement, for all.

Standard library and Python 3.9 only: plugins/module_utils and roles/slurm_prolog/files have links to this file, by
which Ansible takes it to nodes. Sources: NVIDIA's Xid catalogue, and the health checks of clusters in production.
"""

from __future__ import annotations

import re

# `NVRM: Xid (PCI:0000:4b:00 GPU-I:05): 95, pid=…`: the address without `PCI:` before driver 295, with the MIG instance
# (GPU-I, GPU-CI) where the error is one of an instance. An SXid is an NVSwitch's.
_LINE = re.compile(
    r"(?:NVRM: (Xid)|nvidia-nvswitch\d+: (SXid)) \((?:PCI:)?([0-9A-F:.]+)(?: [^)]*)?\): (\d+)(?:, ?(.*))?",
    re.IGNORECASE,
)
_PROCESS = re.compile(r"(pid='?[^,]*, )?(name=[^,]*, )?")

RESET = "drain the node, then reset the GPU (nvidia-smi -r) or reboot"
WATCH = "watch it"
ACTIONS = {
    54: "isolate the node: check the GPU's power cables and supply",
    74: "check NVLink: nvidia-smi nvlink -s and -e; drain the node, then reset the GPUs",
    79: "drain and reboot the node; if it returns, replace the GPU",
    **dict.fromkeys((48, 64, 95, 109, 110, 119, 120, 136, 140, 143), RESET),
}
MONITOR = (13, 31, 43, 45, 63, 92, 94, 121, 126)
NVLINK5 = range(144, 151)  # their text says whether they are fatal
RECOVERY = 154  # its text says what the driver wants: nothing, or a reset, drain or reboot


class Xid:
    """One Xid of one GPU, or SXid of an NVSwitch (`switch`); `count` of messages, `text` of the most severe one."""

    def __init__(self, number, pci, switch, fatal, text):
        self.number, self.pci, self.switch, self.fatal, self.text, self.count = number, pci, switch, fatal, text, 1

    @property
    def name(self):
        """Its name, such as "Xid 79"."""
        return f"{'SXid' if self.switch else 'Xid'} {self.number}"


def address(text):
    """A PCI address in Linux's form, from nvidia-smi's or the driver's: "00000000:1B:00.0" -> "0000:1b:00.0".

    Raises ValueError where `text` is not a PCI address. The first drivers gave bus and slot alone ("0001:00").
    """
    *domain, bus, slot = text.lower().split(":")
    if len(domain) > 1 or not re.fullmatch(r"[0-9a-f]+(\.[0-7])?", slot):
        raise ValueError(text)
    return f"{int((domain or ['0'])[0], 16):04x}:{int(bus, 16):02x}:{slot if '.' in slot else slot + '.0'}"


def parse(text):
    """The Xids and SXids of a kernel log in any format (journalctl, dmesg, /dev/kmsg), one per number and device.

    Of an SXid, only the lines with its severity are used; the others are details.
    """
    found: dict[tuple[bool, int, str], Xid] = {}
    for line in text.splitlines():
        match = _LINE.search(line)
        if not match:
            continue
        switch, number, rest = bool(match[2]), int(match[4]), (match[5] or "").strip()
        if switch and not rest.startswith(("Fatal", "Non-fatal")):
            continue
        try:
            pci = address(match[3])
        except ValueError:
            pci = match[3]
        said = _PROCESS.sub("", rest, count=1)
        fatal = bool(re.search(r"\bFatal\b", said))
        known = found.get((switch, number, pci))
        if known is None:
            found[switch, number, pci] = Xid(number, pci, switch, fatal, said)
            continue
        known.count += 1
        if (fatal and not known.fatal) or (number == RECOVERY and wanted(said)):
            known.fatal, known.text = fatal, said
    return list(found.values())


def wanted(text):
    """The recovery that an Xid 154 asks for in its text, such as "Node Reboot Required"; "" for none."""
    match = re.search(r"\bto 0x[0-9a-f]+ \(([^)]*)\)", text, re.IGNORECASE)
    return match[1] if match and match[1].lower() != "none" else ""


def action(xid):
    """(whether the node must not be used, the recommended action) for an Xid."""
    if xid.switch:
        return xid.fatal, "drain the node, then reset all GPUs and NVSwitches or reboot" if xid.fatal else WATCH
    if xid.number in ACTIONS:
        return True, ACTIONS[xid.number]
    if xid.number in NVLINK5:
        return xid.fatal, ACTIONS[74] if xid.fatal else WATCH
    if xid.number == RECOVERY:
        return (
            (True, f"drain the node; the driver asks for: {wanted(xid.text)}") if wanted(xid.text) else (False, WATCH)
        )
    return False, WATCH if xid.number in MONITOR else "no action is known for it: see NVIDIA's Xid catalogue"


def serious(text):
    """The Xids and SXids of a kernel log after which the device must not be used, in order."""
    return [xid for xid in parse(text) if action(xid)[0]]
