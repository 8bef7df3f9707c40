"""What NCCL's log proves of networks, adapters, paths and algorithms, in the spellings of its versions."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cluster.tools import nccl_log

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "captured" / "nccl-tests"

# Lines as NCCL of that version writes them.
TWO_RAILS = (
    "NCCL version 2.30.7+cuda13.0",
    "NCCL_IB_HCA set to mlx5_0,mlx5_1",
    "NCCL_NET_GDR_LEVEL set by environment to SYS.",
    "NET/IB : Made virtual device [0] name=mlx5_0 speed=400000 ndevs=1 rail=0 plane=0",
    "NET/IB : Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE [RO]; OOB eth0:10.0.0.1<0>",
    "Initialized NET plugin IB",
    "Assigned NET plugin IB to comm",
    "Using network IB",
    "DMA-BUF is available on GPU device 0",
    "NVLS multicast support is available on dev 0 (NVLS_NCHANNELS 16)",
    "Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA(PCI)/Shared",
    "Channel 01/0 : 8[0] -> 0[0] [receive] via NET/IB/1(1)/GDRDMA",
    "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read",
    "Channel 02/0 : 0[0] -> 1[1] via P2P/CUMEM",
    "Channel 02 : 0[0] -> 2[2] via SHM/direct/direct",
    "16 coll channels, 16 collnet channels, 16 nvls channels, 16 p2p channels, 2 p2p channels per peer",
    "ncclCommInitRank comm 0x1 rank 0 nranks 16 cudaDev 0 nvmlDev 0 busId 19000 commId 0x2 - Init COMPLETE",
    "AllReduce: 8 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..0}",
    "ReduceScatter: 1073741824 Bytes -> Algo NVLS proto SIMPLE channel{Lo..Hi}={0..15}",
)


def log(*lines, head="node1:12:34 [0] NCCL INFO "):
    return "".join(head + line + "\n" for line in lines)


def evidence(*lines):
    return nccl_log.parse(log(*lines))


def channels(found):
    return {path.via: path.channels for path in found.paths}


def used_nics(found):
    """The adapters or interfaces that paths go over, without those that are only there."""
    return tuple(dict.fromkeys(path.nic for path in found.paths if path.nic is not None))


def test_two_rails_with_gpudirect_and_nvls():
    found = evidence(*TWO_RAILS)
    assert (found.nccl_version, found.net, found.link, found.nics) == (
        "2.30.7+cuda13.0",
        "IB",
        "RoCE",
        ("mlx5_0", "mlx5_1"),
    )
    assert (found.gpudirect, found.dmabuf, found.nvls, found.collnet) == (True, True, True, False)
    assert used_nics(found) == ("mlx5_0", "mlx5_1")
    assert channels(found) == {
        "NET/IB/0/GDRDMA": 1, "NET/IB/1/GDRDMA": 1, "P2P/CUMEM": 2, "SHM": 1, "NVLS": 16,
    }  # fmt: skip
    assert found.algorithms == {("all_reduce", 8): ("RING", "LL"), ("reduce_scatter", 1 << 30): ("NVLS", "SIMPLE")}
    assert found.settings == {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_NET_GDR_LEVEL": "SYS"}


def test_a_rail_that_is_there_and_not_used():
    lines = [line.replace("NET/IB/1(1)", "NET/IB/0(0)") for line in TWO_RAILS]
    assert evidence(*lines).nics == ("mlx5_0", "mlx5_1") and used_nics(evidence(*lines)) == ("mlx5_0",)


def test_sockets_instead_of_infiniband():
    found = evidence(
        "NCCL_IB_DISABLE set by environment to 1.", "NET/IB : No device found.",
        "NET/Socket : Using [0]eth0:10.0.0.2<0> [1]eth1:fe80::1%eth1<0>", "Using network Socket",
        "Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0", "Channel 01/0 : 0[0] -> 1[0] [send] via NET/Socket/1",
        "2 coll channels, 0 collnet channels, 0 nvls channels, 2 p2p channels, 2 p2p channels per peer",
    )  # fmt: skip
    assert (found.net, found.nics, used_nics(found), found.link) == ("Socket", ("eth0", "eth1"), ("eth0", "eth1"), None)
    assert (found.gpudirect, found.nvls, found.collnet, found.dmabuf) == (False, False, False, False)
    assert found.settings == {"NCCL_IB_DISABLE": "1"}


def test_infiniband_is_found_and_sockets_are_in_use():
    """NCCL_NET=Socket: the adapters are there, and what is in use is said by the network and the channels."""
    found = evidence(
        "NET/IB : Using [0]mlx5_0:1/IB ; OOB ib0:10.0.0.1<0>", "NET/Socket : Using [0]ib0:10.0.0.1<0>", "Using network Socket",
    )  # fmt: skip
    assert (found.net, found.nics, found.link) == ("Socket", ("ib0",), None)


@pytest.mark.parametrize("line, via, nic", [
    ("Channel 00/0 : 0[7000] -> 8[b000] [send] via NET/IB/1/GDRDMA", "NET/IB/1/GDRDMA", "mlx5_1"),  # 2.12: bus ids
    ("Channel 04/1 : 0[0] -> 10[2] [send] via NET/AWS Libfabric/1(2)/GDRDMA/Shared", "NET/AWS Libfabric/1/GDRDMA", "1"),
    ("Channel 03/0 : 2[2] -> 11[3] [send] via NET/gIB/0/GDRDMA", "NET/gIB/0/GDRDMA", "mlx5_0"),
    ("Channel 00/0 : 7[3] -> 0[0] [receive] via NET/IBext_v8/1", "NET/IBext_v8/1", "mlx5_1"),
    ("CollNet 00/0 : 0 [receive] via COLLNET/SHARP/1/GDRDMA", "COLLNET/SHARP/1/GDRDMA", "mlx5_1"),
    ("CollNet 00 : 0 [send] via COLLNET/SHARP/0", "COLLNET/SHARP/0", "mlx5_0"),
    ("Channel 00/0 : 0[0] -> 1[1] via P2P/IPC/read", "P2P/IPC", None),
    ("Channel 00/0 : 0[0] -> 1[1] via P2P/IPC/read/CE", "P2P/IPC", None),
    ("Channel 00/0 : 0[0] -> 1[1] via P2P/MNNVL", "P2P/MNNVL", None),
    ("Channel 00/0 : 0[0] -> 1[1] via P2P/direct pointer/read", "P2P/direct pointer", None),
    ("Channel 00/0 : 0[0] -> 1[1] via P2P/indirect/3[3]", "P2P/indirect", None),
    ("Channel 00 : 0[7000] -> 1[b000] via SHM/CE/direct", "SHM", None),
    # RCCL
    ("Channel 00/0 : 0[d6000] -> 3[c6000] via P2P/IPC comm 0x9bbf3b0 nRanks 4096", "P2P/IPC", None),
    ("Channel 00/0 : 8[d6000] -> 0[d6000] [receive] via NET/IB/0/GDRDMA comm 0x9bbf3b0 nRanks 02", "NET/IB/0/GDRDMA", "mlx5_0"),
])  # fmt: skip
def test_the_paths_of_every_transport(line, via, nic):
    found = evidence("NET/IB : Using [0]mlx5_0:1/IB/SHARP [1]mlx5_1:1/IB/SHARP [RO]; OOB ib0:10.0.0.1<0>", line)
    (path,) = found.paths
    assert (path.via, path.nic, path.channels) == (via, nic, 1)
    assert path.gpudirect is (via.endswith("GDRDMA") if nic else None)
    assert found.collnet is (True if "COLLNET" in via else None)


def test_merged_ports_are_one_adapter():
    old = evidence("NET/IB : Using [0]={[0] mlx5_0:1/RoCE, [1] mlx5_1:1/RoCE} [1]mlx5_4:1/RoCE [RO]; OOB eth0:10.0.0.1<0>",
                   "Using network IB", "Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA")  # fmt: skip
    assert used_nics(old) == ("mlx5_0+mlx5_1",) and old.nics == ("mlx5_0+mlx5_1", "mlx5_4")
    new = evidence("NET/IB : Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE [RO]; OOB eth0:10.0.0.1<0>", "Using network IB",
                   "NET/IB : Made virtual device [2] name=mlx5_0+mlx5_1 speed=400000 ndevs=2",
                   "Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/2/GDRDMA")  # fmt: skip
    assert used_nics(new) == ("mlx5_0+mlx5_1",)


@pytest.mark.parametrize("port", ["1", "1:0", "1:3:1", "1::1"])
def test_an_adapters_rail_and_plane_stand_behind_its_port(port):
    """As NCCL 2.30 writes them where it knows them."""
    line = f"NET/IB : Using [0]mlx5_0:{port}/IB [1]mlx5_1:{port}/IB [RO]; OOB eth0:10.0.0.1<0>"
    assert evidence(line, "Using network IB").nics == ("mlx5_0", "mlx5_1")


def test_a_plugin_names_its_adapters_by_gpudirect():
    found = evidence("Using network Libfabric", "NET/Libfabric : GPU Direct RDMA Enabled for HCA 0 'rdmap86s0'",
                     "Channel 00/0 : 7[3] -> 0[0] [receive] via NET/Libfabric/0")  # fmt: skip
    assert (found.net, found.nics, used_nics(found), found.gpudirect) == (
        "Libfabric",
        ("rdmap86s0",),
        ("rdmap86s0",),
        False,
    )


@pytest.mark.parametrize("line, key, choice", [
    ("8 Bytes -> Algo 1 proto 0 time 5.600000", (None, 8), ("RING", "LL")),  # 2.21, 2.22
    ("AllReduce: 8 Bytes -> Algo 5 proto 2 time 5.600000", ("all_reduce", 8), ("NVLS_TREE", "SIMPLE")),  # 2.23
    ("AllGather: 64 Bytes -> Algo PAT proto SIMPLE channel{Lo..Hi}={0..3}", ("all_gather", 64), ("PAT", "SIMPLE")),
    ("AllReduce [Symmetric]: 1024 Bytes -> Kernel AllReduce_RSxLD_AGxST nchannels 1 nthreads 512 nWorks 1",
     ("all_reduce", 1024), ("SYMMETRIC", "AllReduce_RSxLD_AGxST")),
    ("AllGather [Copy Engine]: 64 Bytes -> cudaMemcpyBatchAsync", ("all_gather", 64), ("COPY ENGINE", "cudaMemcpyBatchAsync")),
])  # fmt: skip
def test_algorithms_of_several_versions(line, key, choice):
    assert evidence(line).algorithms == {key: choice}


@pytest.mark.parametrize("line, expected", [
    ("NVLS multicast support is available on dev 0", True),
    ("NVLS multicast support is not available on dev 0", False),
    ("4 coll channels, 0 nvls channels, 8 p2p channels, 2 p2p channels per peer", False),
    ("Connected NVLS tree", True),
    ("24 coll channels, 32 p2p channels, 32 p2p channels per peer", None),  # 2.12 has none
])  # fmt: skip
def test_nvls(line, expected):
    assert evidence(line).nvls is expected


def test_warnings_are_kept_once():
    warning = "[2026-11-27 09:00:00] node1:12:34 [0] misc/ibvwrap.cc:200 (wrap_ibv_reg_mr) NCCL WARN Call to ibv_reg_mr failed\n"
    assert nccl_log.parse("\n" + warning + "\n" + warning).warnings == ("Call to ibv_reg_mr failed",)


def test_lines_that_are_no_messages_stand_between_them():
    """A warning has several lines, and a program of MPI prints its own."""
    found = nccl_log.parse(
        "node001:12:12 [0] misc/socket.cc:50 NCCL WARN socketProgress: Connection closed by remote peer\n"
        "This is usually caused by another rank\n\n" + log("Using network IB")
    )
    assert found.net == "IB" and len(found.warnings) == 1


def test_labels_and_lines_that_ran_into_each_other():
    one, two = log("Using network IB").strip(), log("Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA")
    assert channels(nccl_log.parse(" 3: " + one + "\n 3: " + two)) == {"NET/IB/0/GDRDMA": 1}
    assert nccl_log.parse("[1,0]<stdout>:" + one + two).net == "IB"


def test_a_torn_path_is_none():
    assert evidence("Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDR").paths == ()


def test_silence_proves_nothing():
    found = nccl_log.parse("")
    assert (found.net, found.gpudirect, found.nvls, found.collnet, found.dmabuf, found.nics) == (
        None,
        None,
        None,
        None,
        None,
        (),
    )


@pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")
def test_the_captured_log_of_16_ranks():
    found = nccl_log.parse((CAPTURED / "a100x16-2n-srun-l-nccl-debug-info.txt").read_text())
    assert (found.nccl_version, found.net, found.gpudirect) == ("2.18.3+cuda12.2", "AWS Libfabric", True)
    assert (found.nvls, found.collnet) == (False, False)
    assert {path.via for path in found.paths} == {f"NET/AWS Libfabric/{i}/GDRDMA" for i in range(4)} | {"P2P/IPC"}
    assert channels(found)["P2P/IPC"] == 270


@given(st.text(max_size=300))
def test_nothing_raises(text):
    nccl_log.parse(text)
    nccl_log.parse("\n".join("node1:12:34 [0] NCCL INFO " + line for line in text.splitlines()))


@given(st.lists(st.sampled_from(TWO_RAILS), max_size=30), st.data())
def test_cut_lines_make_no_path_that_was_not_printed(lines, data):
    whole = log(*lines)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    printed = {path.via for path in nccl_log.parse(whole).paths}
    assert {path.via for path in nccl_log.parse(cut).paths} <= printed
