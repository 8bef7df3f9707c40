"""What `runner check` makes of how nodes are connected: every direction of every pair, with its remedy."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from conftest import NAMES
from runner.cli import setup
from runner.launch import links, talk
from runner.launch.links import TRIED, Survey
from runner.node.protocol import Linked
from runner.provision.board import Board, failures, warnings

ETH = {"name": "eth0", "speed_mbit_per_s": 10000, "duplex": "full", "wireless": False}
DOWN = dict.fromkeys(map(str, TRIED), "no answer")


def of(cluster, blocked, linked=None, count=4):
    nodes = cluster.nodes[:count]
    failed = {node.name: {} for node in nodes}
    for (source, target), reasons in blocked.items():
        failed[NAMES[source]][NAMES[target]] = reasons
    linked = linked or {}
    return Survey(nodes, {n.name: linked.get(i, Linked([ETH])) for i, n in enumerate(nodes)}, failed)


def lines(survey):
    return {
        name: [" ".join(filter(None, map(p.get, ("what", "expected", "found", "remedy")))) for p in problems]
        for name, problems in survey.problems().items()
    }


def test_all_that_reach_each_other_are_one_line(cluster):
    survey = of(cluster, {})
    assert survey.problems() == {}
    assert survey.described() == f"4 nodes reach each other in both directions, TCP ports {TRIED[0]}, 20000, {TRIED[2]}"
    assert survey.matrix()["node001"] == {"node002": {}, "node003": {}, "node004": {}}


def test_one_direction_that_is_blocked_is_named_from_source_to_target(cluster):
    survey = of(cluster, {(0, 1): {"29500": "no answer"}}, {1: Linked([ETH], firewall="nft", chain="inet fw IN")})
    address, target = cluster.nodes[0].address, cluster.nodes[1].address
    assert lines(survey) == {
        NAMES[1]: [
            f"node001 → node002 ({target}): TCP no answer on 29500 see `sudo nft list ruleset` on node002; fix it with "
            f"`sudo nft insert rule inet fw IN ip saddr {address} accept` there"
        ]
    }
    assert survey.matrix()["node001"]["node002"] == {"29500": "no answer"}
    assert survey.matrix()["node002"]["node001"] == {}
    title, head, _, first, second, rest = survey.described().splitlines()
    assert title.startswith("from (rows) to (columns)") and head.split() == ["node001", "node002"]
    assert first.split(maxsplit=2) == ["node001", "–", "no answer (29500)"] and second.split() == ["node002", "ok", "–"]
    assert rest == "2 further nodes reached and reach all"


def test_a_node_that_lets_nobody_in_is_one_problem_of_it(cluster):
    survey = of(cluster, {(source, 2): DOWN for source in (0, 1, 3)}, {2: Linked([ETH], firewall="ufw")})
    ((name, (line,)),) = lines(survey).items()
    assert name == NAMES[2] and line.startswith("node[001-002,004] → node003")
    assert "see `sudo ufw status verbose` on node003" in line and "for each of them" in line


def test_a_node_that_reaches_nobody_is_one_problem_of_it_and_not_of_the_others(cluster):
    survey = of(cluster, {(2, target): DOWN for target in (0, 1, 3)}, {2: Linked([ETH], firewall="iptables")})
    ((name, (line,)),) = lines(survey).items()
    assert name == NAMES[2] and line.startswith("node003 → node[001-002,004]: TCP no answer on 29500, 20000")


def test_two_nodes_that_see_nothing_of_each_other_are_two_directions(cluster):
    blocked = {(0, 1): DOWN, (1, 0): DOWN}
    assert set(lines(of(cluster, blocked, count=2))) == set(NAMES[:2])
    assert set(lines(of(cluster, {**blocked}))) == set(NAMES[:2])


@pytest.mark.parametrize(
    ("firewall", "shows", "fixes"),
    [
        ("ufw", "ufw status", "ufw allow from"),
        ("firewall-cmd", "firewall-cmd --list-all", "--add-source="),
        ("nft", "nft list ruleset", "nft insert rule inet filter input ip saddr"),
        ("iptables", "iptables -S INPUT", "iptables -I INPUT -s"),
        ("", "tracepath", "where the network is managed"),
    ],
)
def test_each_firewall_has_its_commands(cluster, firewall, shows, fixes):
    (line,) = lines(of(cluster, {(0, 1): DOWN}, {1: Linked([ETH], firewall=firewall)}))[NAMES[1]]
    assert shows in line and fixes in line


def test_a_missing_route_is_looked_for_at_the_source(cluster):
    (line,) = lines(of(cluster, {(0, 1): dict.fromkeys(map(str, TRIED), "no route")}))[NAMES[1]]
    assert f"see `ip route get {cluster.nodes[1].address}` on node001; fix it with `sudo ip route del" in line


def test_a_port_that_another_process_has_is_no_fault(cluster):
    taken = {1: Linked([ETH], taken=(29500,))}
    assert lines(of(cluster, {(0, 1): {"29500": "refused"}}, taken)) == {}
    assert lines(of(cluster, {(0, 1): {"29500": "no answer"}}, taken)), "that is none of this process's answers"
    assert lines(of(cluster, {(0, 1): {"29500": "refused"}})), "somebody else than the agent has refused it"


def test_a_node_that_has_not_answered_is_told_elsewhere_and_is_tried_by_nobody(cluster):
    nodes = cluster.nodes[:3]
    survey = Survey(nodes, {n.name: Linked([ETH]) for n in nodes[:2]}, {n.name: {} for n in nodes[:2]})
    assert survey.problems() == {} and "node003" not in survey.matrix()["node001"]


# --- links, drivers, power ---


@pytest.mark.parametrize(
    ("nic", "words"),
    [
        ({**ETH, "name": "wlan0", "wireless": True, "speed_mbit_per_s": None},
         ["wlan0", "a wired link", "a wireless one", "`iw dev wlan0 link`", "NCCL_SOCKET_IFNAME"]),
        ({**ETH, "duplex": "half"}, ["duplex of eth0", "`ethtool eth0`", "autoneg on"]),
        ({**ETH, "speed_mbit_per_s": 1000}, ["speed of eth0 10 Gbit/s as most nodes 1 Gbit/s", "`ethtool eth0`"]),
        ({**ETH, "name": "enp3s0", "speed_mbit_per_s": 2500}, ["speed of enp3s0 10 Gbit/s as most nodes 2.5 Gbit/s"]),
    ],
)  # fmt: skip
def test_a_link_that_differs_is_named_with_its_commands(cluster, nic, words):
    found = lines(of(cluster, {}, {2: Linked([nic])}))
    assert set(found) == {NAMES[2]} and len(found[NAMES[2]]) == 1
    assert all(word in found[NAMES[2]][0] for word in words)


def test_links_that_are_slow_on_all_nodes_are_slow(cluster):
    slow = {i: Linked([{**ETH, "speed_mbit_per_s": 100}]) for i in range(4)}
    assert all("1 Gbit/s or more 0.1 Gbit/s" in line for (line,) in lines(of(cluster, {}, slow)).values())


def test_a_fabric_is_not_compared_with_the_interface_of_management(cluster):
    both = Linked([{**ETH, "speed_mbit_per_s": 1000}, {**ETH, "name": "ib0", "speed_mbit_per_s": 400000}])
    assert lines(of(cluster, {}, dict.fromkeys(range(4), both))) == {}
    torn = Linked([{**ETH, "speed_mbit_per_s": 1000}, {**ETH, "name": "ib0", "speed_mbit_per_s": 100000}])
    assert list(lines(of(cluster, {}, {**dict.fromkeys(range(4), both), 3: torn}))) == [NAMES[3]]


def test_a_speed_that_is_not_known_is_no_fault(cluster):
    for unknown in (None, -1, 0):
        assert lines(of(cluster, {}, {1: Linked([{**ETH, "speed_mbit_per_s": unknown}])})) == {}


def test_another_driver_is_named_with_the_one_that_most_have(cluster):
    linked = {i: Linked([ETH], driver="570.86.15" if i != 1 else "550.54.14") for i in range(4)}
    ((name, (line,)),) = lines(of(cluster, {}, linked)).items()
    assert name == NAMES[1] and "570.86.15 as most nodes 550.54.14 see `nvidia-smi --query-gpu" in line
    assert "nvidia-driver-570" in line
    assert lines(of(cluster, {}, {0: linked[0]})) == {}, "a node without one is the matter of other checks"


@pytest.mark.parametrize(
    ("path", "fixes"),
    [
        ("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "cpupower frequency-set --governor performance"),
        ("/sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference", "cpupower set --epp performance"),
        ("/sys/firmware/acpi/platform_profile", "powerprofilesctl set performance"),
    ],
)
def test_a_power_plan_that_saves_is_named_with_its_commands(cluster, path, fixes):
    (line,) = lines(of(cluster, {}, {3: Linked([ETH], power={path: "power"})}))[NAMES[3]]
    assert f"see `cat {path}` there; fix it with `" in line and fixes in line


# --- asked, and in the table ---


def test_agents_are_asked_at_once_and_the_one_that_is_silent_is_tried_by_nobody(cluster, monkeypatch):
    """Three agents on this machine, in place of ssh; one of them ends at once."""
    monkeypatch.setattr(links, "TRIED", (20017,))

    def here(node, arguments, ssh_config):
        return ["false"] if node.name == NAMES[1] else [sys.executable, *arguments]

    monkeypatch.setitem(talk.COMMANDS, "ssh", here)
    nodes = [replace(node, address="127.0.0.1", env={}) for node in cluster.nodes[:3]]
    survey = links.survey(nodes, None)
    assert set(survey.linked) == {NAMES[0], NAMES[2]} == set(survey.failed)
    assert sum(20017 in linked.taken for linked in survey.linked.values()) == 1, "they are one machine"
    assert survey.blocked() == {}
    json.dumps(survey.to_json())


def test_the_table_has_a_column_of_links_and_one_machine_alone_is_only_warned(cluster, monkeypatch):
    power = {"/sys/firmware/acpi/platform_profile": "low-power"}
    monkeypatch.setattr(links, "survey", lambda nodes, _: of(cluster, {}, {0: Linked([ETH], power=power)}, len(nodes)))
    board = Board({node.name: node.alias for node in cluster.nodes[:2]})
    setup._add_links(board, cluster.nodes[:2], None)
    assert [(f.nodes, f.role, f.what, f.found) for f in failures(board)] == [
        ("node001", "links", "power plan", "low-power")
    ]
    assert board.state(NAMES[1], "links") == "ok"
    alone = Board({NAMES[0]: "node001"})
    setup._add_links(alone, cluster.nodes[:1], None)
    assert failures(alone) == [] and "power plan: low-power (see `cat" in warnings(alone)[0][2]
