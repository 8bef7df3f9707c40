"""What Slurm has, and what is refused before anything is submitted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

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
        "node001|#idle|#gpu:h200:8(S:0-1)|#none\n"
        "node001|#idle|#gpu:h200:8(S:0-1)|#none\n"
        "node002|#drained*|#gpu:h200:8|#bad cable | port 3\n"
        "node003|#allocated|#(null)|#none\nnode004|#broken"
    )
    assert capacity.parse_nodes(text) == {
        "node001": SlurmNode("node001", "idle", True, "", "gpu:h200:8(S:0-1)"),
        "node002": SlurmNode("node002", "drained, not answering", False, "bad cable | port 3", "gpu:h200:8"),
        "node003": SlurmNode("node003", "allocated", True, "", ""),
    }


@pytest.mark.parametrize(
    ("word", "usable"),
    [(word, True) for word in ("idle", "allocated", "mixed", "completing", "reserved", "maint", "planned", "idle~", "idle#",
                               "mixed-", "powered_down", "powering_down", "idle@", "IDLE+CLOUD")]
    + [(word, False) for word in ("down", "down*", "idle*", "drained", "draining", "drng", "fail*", "failing", "inval", "unknown",
                                  "unk", "error", "IDLE+DRAIN", "future")],
)  # fmt: skip
def test_which_nodes_can_be_used(word, usable):
    assert capacity.node_state(word)[1] is usable


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
        line = SEPARATOR.join((node["name"], "+".join(states), node["gres"], node["reason"]))
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
    ],
)  # fmt: skip
def test_gres_are_counted_with_and_without_their_type(there, wanted, enough):
    node = SlurmNode("node001", "idle", True, "", there)
    partition = Partition("gpu", "up", True, None, None, ("node001",))
    found = refusals(1, settings=Settings(gres=wanted), partitions=[partition], nodes=[node])
    assert (found == []) is enough
