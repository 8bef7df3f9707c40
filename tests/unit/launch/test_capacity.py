"""What Slurm has, and what is refused before anything is submitted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cluster import slurm_gres, slurm_states
from runner.cluster.slurm import Settings
from runner.launch.slurm import capacity
from runner.launch.slurm.answers import SEPARATOR
from runner.launch.slurm.capacity import Partition, SlurmNode

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "captured" / "slurm"
real_output = pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")


def captured(name):
    return (CAPTURED / name).read_text()


# --- what there is ---------------------------------------------------------------------------------


@real_output
def test_partitions_of_a_large_cluster():
    first, second, third = capacity.parse_partitions(captured("scontrol-show-partition-oneliner.txt")).values()
    assert (first.name, first.default, first.state, first.max_time_s, first.max_nodes) == (
        "partition1",
        True,
        "up",
        259200,
        None,
    )
    assert (len(first.nodes), first.nodes[0], first.nodes[-1]) == (3140, "node0201", "node7735")
    assert (second.max_nodes, second.default, len(second.nodes)) == (64, False, 1469) and third.name == "partition3"


def test_a_partition_without_nodes():
    text = "PartitionName=empty Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED Nodes=(null) State=DOWN\nnoise\n"
    assert capacity.parse_partitions(text) == {"empty": Partition("empty", "down", False, None, None, ())}


def test_nodes_once_each_with_reason_and_gres():
    text = (
        "node001|#idle|#gpu:h200:8(S:0-1)|#224|#2063937|#none\n"
        "node001|#idle|#gpu:h200:8(S:0-1)|#224|#2063937|#none\n"
        "node002|#drained*|#gpu:h200:8|#224+|#1|#bad cable | port 3\n"
        "node003|#allocated|#(null)|#?|#N/A|#none\nnode004|#broken"
    )
    assert capacity.parse_nodes(text) == {
        "node001": SlurmNode("node001", "idle", True, "", "gpu:h200:8(S:0-1)", 224, 2063937),
        "node002": SlurmNode("node002", "drained, not answering", False, "bad cable | port 3", "gpu:h200:8", 224, 1),
        "node003": SlurmNode("node003", "allocated", True, "", ""),
    }


# As sinfo's long and short columns and scontrol's State= have them, of Slurm 20.11 to 24.11.
@pytest.mark.parametrize(
    ("text", "verdict"),
    [(text, slurm_states.USABLE) for text in (
        "idle", "allocated", "alloc", "mixed", "mix-", "completing", "comp", "planned", "plnd", "allocated+", "mixed-",
        "idle~", "idle#", "idle%", "idle!", "idle@", "idle^", "reboot^", "alloc#", "blocked", "powered_down", "pow_dn",
        "powering_down", "POWERING_UP", "IDLE+CLOUD", "IDLE+CLOUD+POWERED_DOWN", "IDLE+DYNAMIC_NORM", "MIXED+PLANNED",
        "ALLOCATED+COMPLETING", "IDLE+CLOUD+NOT_RESPONDING+POWERING_UP", "IDLE+REBOOT_ISSUED+NOT_RESPONDING",
        "IDLE+SOMETHING_NEW",
    )]
    + [(text, slurm_states.RESERVED) for text in (
        "maint", "MAINT", "reserved", "resv", "allocated$", "mixed$", "idle$", "IDLE+MAINTENANCE", "ALLOCATED+RESERVED",
        "IDLE+MAINTENANCE+RESERVED", "MIXED-+RESERVED", "IDLE~+RESERVED",
    )]
    + [(text, slurm_states.UNUSABLE) for text in (
        "down", "down*", "down~", "down$", "idle*", "alloc*", "mixed*", "maint*", "reboot*", "drained", "drained$",
        "draining", "draining@", "drng", "drain*", "fail", "fail*", "failing", "failg", "inval", "unknown", "unk*",
        "error", "future", "futr", "IDLE+DRAIN", "DOWN+DRAIN", "MIXED+DRAIN", "IDLE+MAINTENANCE+DRAIN",
        "IDLE+INVALID_REG", "IDLE+FAIL", "DOWN+NOT_RESPONDING", "DOWN+CLOUD+POWERED_DOWN", "IDLE+NOT_RESPONDING",
        "FUTURE+DYNAMIC_FUTURE", "DOWN+REBOOT_ISSUED", "DOWN*+DRAIN", "DOWN*+RESERVED", "DOWN*+CLOUD", "IDLE*+PLANNED",
        "MIXED*+CLOUD", "DOWN#+CLOUD",
    )]
    + [(text, slurm_states.UNKNOWN) for text in ("?", "", "frobnicated", "EXTERNAL")],
)  # fmt: skip
def test_which_states_a_node_can_be_used_in(text, verdict):
    assert slurm_states.read(text)[1] == verdict
    usable = {slurm_states.USABLE: True, slurm_states.UNKNOWN: True}
    assert capacity.node_state(text)[1] is usable.get(verdict, False)
    assert capacity.node_state(text, reserved=True)[1] is (verdict != slurm_states.UNUSABLE)
    assert capacity.node_state(text, reserved=False)[1] is False


RESERVATIONS = """\
ReservationName=acceptance StartTime=2026-11-27T10:00:00 EndTime=2026-11-28T10:00:00 Duration=1-00:00:00 \
Nodes=node[001-002] NodeCnt=2 CoreCnt=448 Features=(null) PartitionName=(null) Flags=MAINT,SPEC_NODES TRES=cpu=448 \
Users=root Groups=(null) Accounts=(null) Licenses=(null) State=ACTIVE BurstBuffer=(null)
ReservationName=spare StartTime=2026-11-27T10:00:00 Nodes=node003 NodeCnt=1 Flags= Users=root State=INACTIVE
ReservationName=flexible Nodes=node004 NodeCnt=1 Flags=FLEX,SPEC_NODES State=ACTIVE
ReservationName=licences Nodes=(null) NodeCnt=0 Flags=ANY_NODES Licenses=matlab:4 State=ACTIVE
"""


@pytest.mark.parametrize(
    ("text", "name", "nodes"),
    [
        (RESERVATIONS, "acceptance", ("node001", "node002")),
        (RESERVATIONS, "acceptance,spare", ("node001", "node002", "node003")),
        (RESERVATIONS, "flexible", None),
        (RESERVATIONS, "licences", None),
        (RESERVATIONS, "nosuch", None),
        ("No reservations in the system\n", "acceptance", None),
    ],
)
def test_the_nodes_that_a_reservation_binds_its_jobs_to(text, name, nodes):
    assert capacity.nodes_of_reservation(text, name) == nodes


def test_with_a_reservation_its_nodes_are_used_and_no_others():
    text = "".join(f"{name}|#{state}|#gpu:8|#8|#1|#none\n" for name, state in (
        ("node001", "maint"), ("node002", "allocated$"), ("node003", "idle"), ("node004", "drained$"),
    ))  # fmt: skip
    without, within = capacity.parse_nodes(text), capacity.parse_nodes(text, ("node001", "node002", "node004"))
    assert [node.usable for node in without.values()] == [False, False, True, False]
    assert [node.usable for node in within.values()] == [True, True, False, False]
    assert without["node002"].state == "allocated, in a reservation (see slurm.reservation)"
    assert within["node003"].state == "idle, not in the reservation"


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("Prolog error", "prolog_failed"),
        ("Prolog error [slurm@2018-05-17T01:05:47]", "prolog_failed"),
        ("Job prolog failed", "prolog_failed"),
        ("prolog gpu_health: GPU 3 fell off the bus; prolog fabric: 1 of 2 links", "prolog_failed"),
        ("epilog leftover: process 7 survives SIGKILL", "node_failed"),
        ("to try the new prolog", "node_failed"),
        ("Job env setup error", "node_failed"),
        ("Kill task failed", "node_failed"),
        ("Not responding", "node_failed"),
        ("", "node_failed"),
    ],
)
def test_a_prolog_is_told_from_other_reasons(reason, kind):
    assert capacity.node_kind(reason) == kind


@real_output
@pytest.mark.parametrize(
    ("name", "pattern", "unusable"),
    [
        ("sinfo-N-state-pairs.txt", r",(\S+)$", {"down", "down*", "drained", "drained*", "draining", "fail*"}),
        ("sinfo-O-fixed-width.txt", r"/\d+ *\|(\w+\S?) *\|", {"drained$"}),
        ("sinfo-all-pipe-two-state-columns.txt", r"\|all \|(\S+)", {"drained*"}),
        ("sinfo-cpus-mem.txt", r"(\S+)\s*$", {"down"}),
    ],
)
def test_node_states_as_sinfo_really_gives_them(name, pattern, unusable):
    words = set(re.findall(pattern, captured(name), re.MULTILINE))
    assert {word for word in words if not capacity.node_state(word)[1]} == unusable and words - unusable


@real_output
@pytest.mark.parametrize("name", ["sinfo-json-2105-plugin.txt", "slurmrestd-node-h100.txt"])
def test_nodes_of_other_versions_have_known_states_and_gres(name):
    text = json.loads(captured(name))
    for node in text.get("nodes", [text]):
        states = node["state"] if isinstance(node["state"], list) else [node["state"], *node["state_flags"]]
        line = SEPARATOR.join((node["name"], "+".join(states), node["gres"], "8", "1", node["reason"]))
        (found,) = capacity.parse_nodes(line).values()
        assert found.usable == (not {"down", "drain"} & {word.lower() for word in states})
    if "h100" in name:
        assert (
            refusals(1, 1, "cuda", nodes=[found], partitions=[Partition("p", "up", True, None, None, (found.name,))])
            == []
        )


# --- refused before submission ---------------------------------------------------------------------

H200_NODES = [SlurmNode(f"node{n:03}", "idle", True, "", "gpu:h200:8(S:0-1)") for n in range(1, 9)]
GPU = Partition("gpu", "up", True, 86400, 16, tuple(node.name for node in H200_NODES))
LIMITED = replace(GPU, max_mem_mib=512000)


def refusals(
    num_nodes=8, gpus_per_node=8, device="cuda", hosts=(), settings=None, partitions=None, nodes=None, time_limit_s=3600
):
    return capacity.refusals(
        num_nodes,
        gpus_per_node,
        device,
        hosts,
        settings or Settings(),
        partitions or [GPU],
        nodes or H200_NODES,
        time_limit_s,
    )


def altered(**states):
    """The eight nodes, with `node003=("drained", "bad cable")`."""
    return [
        SlurmNode(node.name, *capacity.node_state(states[node.name][0]), states[node.name][1], node.gres)
        if node.name in states
        else node
        for node in H200_NODES
    ]


def test_what_can_run_is_not_refused():
    assert refusals() == []
    assert refusals(2, hosts=("node007", "node001"), settings=Settings(gres="gpu:h200:8", exclude=("node002",))) == []
    assert refusals(8, nodes=altered(node001=("allocated", ""), node002=("mixed", ""), node003=("idle~", ""))) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"settings": Settings(partition="gup")}, "slurm.partition: unknown partition 'gup'; did you mean 'gpu'?"),
        ({"partitions": [Partition("cpu", "up", False, None, None, ())]}, "Slurm has no default one; set slurm.partition: cpu"),
        ({"partitions": [Partition("gpu", "down", True, None, None, GPU.nodes)]}, "partition gpu is down"),
        ({"num_nodes": 9}, "9 nodes asked for, partition gpu has 8"),
        ({"settings": Settings(exclude=("node001",))}, "8 nodes asked for, partition gpu has 7 without the excluded ones"),
        (
            {"nodes": altered(node003=("drained", "bad cable"), node005=("down*", "Not responding"), node006=("down*", "Not responding"))},
            "8 nodes asked for, partition gpu has 8, of which 5 are usable: node003 drained (bad cable), "
            "node[005-006] down, not answering (Not responding)",
        ),
        ({"partitions": [Partition("gpu", "up", True, None, 4, GPU.nodes)]}, "8 nodes asked for, partition gpu allows 4 (MaxNodes)"),
        ({"time_limit_s": 90000}, "1-01:00:00 asked for, partition gpu allows 1-00:00:00 (MaxTime)"),
        ({"settings": Settings(gres="gpu:a100:8")}, "gpu:a100:8 asked for on each node, found: node[001-008] gpu:h200:8(S:0-1)"),
        ({"settings": Settings(mem="2T"), "partitions": [LIMITED]}, "2T of a node's memory asked for, partition gpu allows 512000M; set slurm.mem"),
        ({"settings": Settings(mem="0"), "partitions": [LIMITED], "nodes": [replace(n, mem_mib=2063937) for n in H200_NODES]},
         "all of a node's memory asked for, partition gpu allows 512000M"),
        ({"gpus_per_node": 16}, "gpu:16 asked for on each node, found: node[001-008] gpu:h200:8(S:0-1)"),
        ({"nodes": [SlurmNode(n.name, "idle", True, "", "") for n in H200_NODES]}, "gpu:8 asked for on each node, found: node[001-008] none"),
        ({"hosts": ("node001", "node099")}, "Slurm does not know node099; it has node[001-008]"),
        (
            {"hosts": ("node001", "other"), "nodes": [*H200_NODES, SlurmNode("other", "idle", True, "", "gpu:8")]},
            "partition gpu does not have other; it has node[001-008]",
        ),
        (
            {"hosts": ("node001", "node003"), "nodes": altered(node003=("draining", "firmware"))},
            "named but not usable: node003 draining (firmware)",
        ),
        ({"hosts": ("node001",), "settings": Settings(exclude=("node001",))}, "node001 is named, and excluded by slurm.exclude"),
    ],
)  # fmt: skip
def test_what_slurm_could_not_run_is_refused_with_what_there_is(asked, said):
    (reason,) = refusals(**asked)
    assert said in reason and "\n" not in reason


def test_every_reason_is_told_at_once():
    partition = Partition("gpu", "drain", True, 60, 2, GPU.nodes)
    reasons = refusals(9, 16, partitions=[partition], nodes=altered(node003=("down", "")))
    assert [reason.split(" asked")[0].split(",")[0] for reason in reasons] == [
        "partition gpu is drain; name another", "9 nodes", "0-01:00:00", "9 nodes", "gpu:16",
    ]  # fmt: skip


def test_of_several_partitions_one_that_can_is_enough():
    small = Partition("small", "up", False, None, 2, GPU.nodes)
    assert refusals(settings=Settings(partition="small,gpu"), partitions=[small, GPU]) == []
    assert len(refusals(20, settings=Settings(partition="small,gpu"), partitions=[small, GPU])) == 4


@pytest.mark.parametrize(
    ("there", "wanted", "enough"),
    [
        ("gpu:8", "gpu:8", True), ("gpu:8(S:0-1)", "gpu:8", True), ("gpu:h200:8", "gpu:8", True), ("gpu:8", "gpu:h200:8", False),
        ("gpu:h200:4,gpu:a100:4", "gpu:8", True), ("gpu:h200:4,gpu:a100:4", "gpu:h200:8", False), ("gpu:4,nic:2", "gpu:4,nic:2", True),
        ("gpu:4,nic:2(S:0,1)", "nic:3", False), ("", "gpu:1", False), ("gpu:nvidia_h100_80gb_hbm3:1(S:0)", "gpu:1", True),
        ("shard:1K", "shard:1024", True), ("gpu:H200:8", "gpu:h200:8", True),
        ("gpu:4090:8(S:0-1)", "gpu:8", True), ("gpu:4090:8(S:0-1)", "gpu:4090:8", True), ("gpu:4090:8", "gpu:3090:8", False),
        ("gpu:2080ti:4(S:0),gpu:2080ti:4(S:1)", "gpu:2080ti:8", True), ("gpu:1g.10gb:7", "gpu:1g.10gb:7", True),
        ("gpu:a100_1g.5gb:7(S:0,2-3)", "gpu:7", True), ("gpu:3g.20gb:2(S:0),gpu:1g.5gb+me:1(S:0)", "gpu:3g.20gb:2", True),
        ("gpu:3g.20gb:2(S:0),gpu:1g.5gb+me:1(S:0)", "gpu:1g.5gb+me:2", False), ("gpu:8(IDX:0-7)", "gpu:8", True),
        ("gpu:7g.80gb:8", "gpu:nvidia_h100_80gb_hbm3:8", False), ("gpu:tesla_v100-sxm2-32gb:8(IDX:0-3,5-7)", "gpu:8", True),
        ("gpu:(null):0", "gpu:1", False), ("gpu:(null):8(S:0-1)", "gpu:8", True), ("(null)", "gpu:1", False), ("gpu:tesla:2,mps:400", "mps:400", True),
        ("gpu:a10:2,shard:a10:1K(2)", "shard:1024", True), ("gpu:no_consume:8", "gpu:8", True), ("lustre:scratch:no_consume:4G", "lustre:scratch:2G", True),
        ("gpu:4090:8", "gres/gpu:4090=8", True), ("gpu:8", "none", True),
    ],
)  # fmt: skip
def test_gres_are_counted_with_and_without_their_type(there, wanted, enough):
    assert slurm_gres.holds(there, wanted) is enough
    node = SlurmNode("node001", "idle", True, "", there)
    partition = Partition("gpu", "up", True, None, None, ("node001",))
    found = refusals(1, settings=Settings(gres=wanted), partitions=[partition], nodes=[node])
    assert (found == []) is enough


@pytest.mark.parametrize("there", ["gpu:8(S:0", "gpu:h200 sxm:8", "gpu:a:b:8", "8", "gpu:h200:8)", "gpu::x y", "*"])
def test_resources_that_cannot_be_read_are_not_lacking(there):
    assert slurm_gres.holds(there, "gpu:8") is None
    assert slurm_gres.holds(f"{there},gpu:8", "gpu:8") in (None, True)
    node = SlurmNode("node001", "idle", True, "", there)
    partition = Partition("gpu", "up", True, None, None, ("node001",))
    assert refusals(1, partitions=[partition], nodes=[node]) == []


@given(st.text(max_size=40))
def test_any_text_of_resources_is_read(text):
    assert slurm_gres.holds(text, "gpu:8") in (True, False, None)


# --- memory ----------------------------------------------------------------------------------------

HGX_MIB = 2063937


@pytest.mark.parametrize(
    ("partition", "config", "sizes", "asked"),
    [
        ("MaxMemPerNode=UNLIMITED", "", [HGX_MIB], "0"),
        ("DefMemPerCPU=4000 MaxMemPerNode=UNLIMITED", "MaxMemPerNode           = UNLIMITED", [HGX_MIB], "0"),
        ("MaxMemPerNode=512000", "", [HGX_MIB], "512000M"),
        ("DefMemPerNode=64000 MaxMemPerNode=2063937", "", [HGX_MIB], "0"),
        ("DefMemPerNode=64000 MaxMemPerNode=2000000", "", [HGX_MIB, 515000], "515000M"),
        ("DefMemPerCPU=1000 MaxMemPerCPU=8000", "", [HGX_MIB], f"{8000 * 224}M"),
        ("MaxMemPerCPU=16000", "", [HGX_MIB], "0"),
        ("MaxMemPerNode=UNLIMITED", "MaxMemPerNode           = 1000000", [HGX_MIB], "1000000M"),
        ("MaxMemPerNode=1500000", "MaxMemPerNode           = 1000000", [HGX_MIB], "1500000M"),
        ("MaxMemPerNode=UNLIMITED", "MaxMemPerCPU            = 4096", [HGX_MIB], f"{4096 * 224}M"),
        ("MaxMemPerNode=512000", "", [1], "0"),  # RealMemory is not set: Slurm does not count with it
        ("MaxMemPerNode=512000", "", [], "0"),
    ],
)
def test_as_much_memory_is_asked_for_as_the_partition_allows(partition, config, sizes, asked):
    text = f"PartitionName=gpu Default=YES Nodes=node[001-008] State=UP {partition}\n"
    partitions = list(capacity.parse_partitions(text, config).values())
    nodes = [SlurmNode(f"node{n:03}", "idle", True, "", "", 224, mib) for n, mib in enumerate(sizes, 1)]
    assert capacity.memory(Settings(), partitions, nodes) == asked
    assert capacity.memory(Settings(mem="64G"), partitions, nodes) == "64G"


def test_of_several_partitions_the_smallest_limit_is_asked_for():
    partitions = [LIMITED, replace(GPU, name="large", max_mem_mib=1000000), replace(GPU, name="free")]
    nodes = [replace(node, mem_mib=HGX_MIB) for node in H200_NODES]
    assert capacity.memory(Settings(partition="large,gpu"), partitions, nodes) == "512000M"
    assert capacity.memory(Settings(partition="free"), partitions, nodes) == "0"
