"""The driver's errors in the kernel's log: one parser for roles, the prolog and whatever reads logs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from runner.cluster import xids

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "captured" / "kernel"

# A line of a kernel log, and (name, address, text) of what it says. Sources: the driver's comments on contained
# errors, the Xid catalogue, and logs of clusters and of drivers from 2007 on.
LINES = [
    ("NVRM: Xid (PCI:0000:4b:00 GPU-I:05): 95, pid=7194, Uncontained: FBHUB", "Xid 95", "0000:4b:00.0", "Uncontained: FBHUB"),
    ("NVRM: Xid (PCI:0000:3b:00 GPU-I:01 GPU-CI:02): 79, pid=9, name=a, GPU has fallen off the bus.", "Xid 79", "0000:3b:00.0", "GPU has fallen off the bus."),
    ("[...] NVRM: Xid (0000:03:00): 48, An uncorrectable double bit error", "Xid 48", "0000:03:00.0", "An uncorrectable double bit error"),
    ("Sep 20 08:28:06 host kernel: [17298520.2] NVRM: Xid (0001:00): 64, Channel 00000002", "Xid 64", "0000:01:00.0", "Channel 00000002"),
    ("NVRM: Xid (PCI:0000:01:00): 79, ", "Xid 79", "0000:01:00.0", ""),
    ("NVRM: Xid (PCI:0000:01:00): 79", "Xid 79", "0000:01:00.0", ""),
    ("[Sun Feb 23 16:24:18 2025] NVRM: Xid (PCI:0000:9b:00): 119, pid=7, name=nvidia-smi, Timeout after 6s", "Xid 119", "0000:9b:00.0", "Timeout after 6s"),
    ("kern  :warn  : 2025-01-21T04:41:44,287197+00:00 NVRM: Xid (PCI:0000:38:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal", "Xid 74", "0000:38:00.0", "NVLink: fatal"),
    ("4,813,9000000000,-;NVRM: Xid (PCI:0008:01:00): 149, NETIR Fatal XC0 i0 Link -1 (0x000fe406)", "Xid 149", "0008:01:00.0", "NETIR Fatal XC0 i0 Link -1 (0x000fe406)"),
    ("NVRM: Xid (PCI:0008:01:00): 145, pid=1, name=ray::Worker, RLW Fatal XC0", "Xid 145", "0008:01:00.0", "RLW Fatal XC0"),
    ("NVRM: Xid (PCI:0000:5D:00.0): 120, GSP Error", "Xid 120", "0000:5d:00.0", "GSP Error"),
    ("[6781753.4] nvidia-nvswitch1: SXid (PCI:0000:06:00.0): 20034, Fatal, Link 48 LTSSM Fault Up", "SXid 20034", "0000:06:00.0", "Fatal, Link 48 LTSSM Fault Up"),
    ("NVRM: Xid (PCI:0000:01:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)", "Xid 154", "0000:01:00.0", "GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)"),
]  # fmt: skip

QUIET = [
    "NVRM: Xid (PCI:0000:38:00): 13, pid=1, name=python, Graphics SM Warp Exception",
    "NVRM: Xid (PCI:0000:38:00): 31, pid=1, MMU Fault",
    "NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: No",
    "NVRM: Xid (PCI:0000:dc:00): 45, pid=1, name=python3, Ch 00000001 caused by previous Xid 149",
    "NVRM: Xid (PCI:0018:01:00): 149, NETIR_BER_EVENT Nonfatal XC0 i0 Link 03",
    "nvidia-nvswitch2: SXid (PCI:0000:07:00.0): 12028, Non-fatal, Link 28 egress non-posted PRIV error",
    "NVRM: Xid (PCI:0000:01:00): 154, GPU recovery action changed from 0x2 (Node Reboot Required) to 0x0 (None)",
    "NVRM: Xid (PCI:0000:01:00): 999, something new",
]
NONE = [
    "nvidia-nvswitch2: SXid (PCI:0000:07:00.0): 20034, Severity 1 Engine instance 60 Sub-engine instance 00",
    "nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Data {0x10000000, 0x10000000}",
    "NVRM: GPU at PCI:0000:06:00: GPU-9fe1319c-8dd3-44e4-2b74-de93f8b02c6a",
    "a user writes of Xid 79",
    "",
]


@pytest.mark.parametrize(("line", "name", "pci", "text"), LINES)
def test_an_error_that_ends_a_gpu_is_read_in_every_format(line, name, pci, text):
    (found,) = xids.serious(f"something before\n{line}\n SUBSYSTEM=pci\n")
    assert (found.name, found.pci, found.text) == (name, pci, text)


@pytest.mark.parametrize("line", QUIET)
def test_an_error_to_watch_is_read_and_not_serious(line):
    (found,) = xids.parse(line)
    assert not xids.action(found)[0] and xids.serious(line) == []


@pytest.mark.parametrize("line", NONE)
def test_other_lines_are_none(line):
    assert xids.parse(line) == []


def test_equal_errors_of_a_device_are_counted_and_the_worst_is_shown():
    line = "NVRM: Xid (PCI:0008:01:00): 149, NETIR {} XC0"
    (found,) = xids.parse("\n".join([line.format("Nonfatal"), line.format("Fatal"), line.format("Nonfatal")]))
    assert (found.count, found.text, found.fatal) == (3, "NETIR Fatal XC0", True)


@given(st.text() | st.from_regex(r"NVRM: Xid \((PCI:)?[0-9a-f:. ]{0,12}( GPU-I:\d)?\): \d{1,3}(, .*)?"))
def test_any_text_is_read(text):
    assert all(xid.name and xid.pci for xid in xids.parse(text))


def test_there_is_one_parser():
    """Roles and the prolog have links to it, and nothing else knows the format."""
    source = ROOT / "runner" / "cluster" / "xids.py"
    links = [ROOT / "plugins/module_utils/xids.py", ROOT / "roles/slurm_prolog/files/xids.py"]
    assert all(link.is_symlink() and link.resolve() == source for link in links)
    others = [
        str(path.relative_to(ROOT))
        for folder in ("runner", "roles", "plugins")
        for path in (ROOT / folder).rglob("*.py")
        if path.resolve() != source and "Xid \\(" in path.read_text()
    ]
    assert others == []
    imported = {
        name.name
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imported == {"re"}


REAL = {
    "fabricmanager-h100-healthy.txt": [],
    "ib-lost-carrier-syslog.txt": [],
    "kmsg-raw-healthy.txt": [],
    "kmsg-raw-peermem-invalid-context.txt": [],
    "nccl-segfault-decode-iso.txt": [],
    "pcie-limited-by-gen4-switch.txt": [],
    "pstore-erst-panic.txt": [],
    "sxid20034-ltssm-h100.txt": ["SXid 20034"] * 3 + ["Xid 79"],
    "xid119-gsp-timeout-h100-dmesgT.txt": ["Xid 119"],
    "xid13-43-and-oom-decode-iso.txt": [],
    "xid145-149-nvlink5-nonfatal-mix.txt": ["Xid 149"] * 3,
    "xid48-63-94-iso-with-peermem-noise.txt": ["Xid 48"],
}


@pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")
def test_every_real_kernel_log_gets_its_verdict():
    found = {
        path.name: sorted(x.name for x in xids.serious(path.read_text(errors="replace"))) for path in CAPTURED.iterdir()
    }
    assert {name: found[name] for name in REAL} == REAL and found.keys() >= REAL.keys()
