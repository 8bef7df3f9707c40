"""What the kernel's log says of GPUs while a cell runs."""

from __future__ import annotations

from runner.node import kernel

XID = "NVRM: Xid (PCI:0000:{}:00): {}, pid=1, name=python, Something"


def log(tmp_path, *messages):
    """A kernel log with each of `messages` at its second."""
    path = tmp_path / "kmsg"
    path.write_text(
        "".join(f"4,{n},{s * 1_000_000},-;{text}\n SUBSYSTEM=pci\n" for n, (s, text) in enumerate(messages))
    )
    return path


def test_serious_xids_since_the_start_are_told_once_for_each_device(tmp_path):
    kmsg = log(
        tmp_path,
        (10, XID.format("3b", 79)),  # before the cell
        (100, XID.format("5d", 79)),
        (101, XID.format("5d", 79)),
        (102, XID.format("5d", 31)),  # a program's fault
        (103, "usb 1-1: new device"),
        (104, XID.format("9b", 48)),
    )
    assert kernel.gpu_errors(50, kmsg) == [XID.format("5d", 79), XID.format("9b", 48)]


def test_a_log_that_cannot_be_read_says_nothing(tmp_path):
    assert kernel.gpu_errors(0, tmp_path / "none") == []
    assert kernel.gpu_errors(0, log(tmp_path)) == []
    (tmp_path / "kmsg").write_bytes(b"\xff;\n4,1\nhalf")
    assert kernel.gpu_errors(0, tmp_path / "kmsg") == []
