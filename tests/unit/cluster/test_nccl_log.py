"""What NCCL says of itself, as it is read back."""

from __future__ import annotations

from runner.cluster.tools import nccl_log


def test_lines_that_are_no_messages_stand_between_them():
    """A warning has several lines, and a program of MPI prints its own."""
    text = "\n".join(
        (
            "node001:12:12 [0] misc/socket.cc:50 NCCL WARN socketProgress: Connection closed by remote peer",
            "This is usually caused by another rank",
            "",
            "node001:12:12 [0] NCCL INFO Using network IB",
        )
    )
    found = nccl_log.parse(text)
    assert found.net == "IB" and len(found.warnings) == 1
