"""The role roce_qos: which ports carry RoCE, what each setting is, and what is said where one differs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from role_modules import ROOT, carry_out, load

role = load("roce_qos")
roce = role.roce
STAND_INS = ROOT / "molecule" / "resources" / "stand-ins"
CAPTURED = Path(__file__).resolve().parents[3] / "shared" / "captured"
needs_captured = pytest.mark.skipif(not CAPTURED.is_dir(), reason=f"no captured outputs in {CAPTURED}")
ONE, TWO = "mlx5_0/enp26s0np0", "mlx5_1/enp60s0np0"


def _plant():
    loader = importlib.machinery.SourceFileLoader("plant_nics", str(STAND_INS / "plant-nics"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("plant_nics", loader))
    loader.exec_module(module)
    return module


STAND_IN = _plant()


def no_command(argv, timeout_s):
    return roce.Outcome(None, "", "no command")


class Node:
    """A node whose NICs are planted below a folder; its tools are the stand-ins that `tools` names."""

    def __init__(self, folder, monkeypatch):
        self.root, self.bin = folder / "root", folder / "bin"
        self.bin.mkdir()
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setenv("STAND_IN_QOS", str(self.root / "qos"))
        self.tools("mlnx_qos")

    def plant(self, changes=None, **what):
        """`changes` to the three NICs, by device."""
        STAND_IN.plant(str(self.root), {"changes": changes or {}, **what})

    def settle(self):
        if not self.root.exists():
            self.plant()

    def configured(self, changes=None, **what):
        """As `plant`, then as `configure` leaves it: without its commands, which would take seconds in all."""
        self.plant(changes, **what)
        for port in roce.find(str(self.root))[:2]:
            for setting in roce.settings(port, self.want(), no_command):
                setting.put()
            state = {**self.qos(port.netdev), "pfc": [0, 0, 0, 1, 0, 0, 0, 0], "dscp": [[26, 3]]}
            (self.root / "qos" / f"{port.netdev}.json").write_text(json.dumps(state))

    def tools(self, *names):
        for file in self.bin.iterdir():
            file.unlink()
        for name in names:
            (self.bin / name).symlink_to(STAND_INS / name)
        self.command("systemctl", "echo enabled")

    def command(self, name, body):
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def qos(self, netdev="enp26s0np0"):
        return json.loads((self.root / "qos" / f"{netdev}.json").read_text())

    def file(self, path):
        return self.root / "sys" / "class" / path

    def want(self, **settings):
        return {
            "hca": [],
            "nics_per_node": 2,
            "nic_gbit_per_s": 400,
            "priority": 3,
            "dscp": 26,
            "mtu": 9000,
            "sysctl": {"net.core.rmem_max": 67108864},
            "nic_sysctl": {"arp_ignore": 1},
            "gpudirect": True,
            "root": str(self.root),
            **settings,
        }

    def apply(self, *hca, **settings):
        """What the oneshot does at every start; returns its status."""
        self.settle()
        path = self.root / "roce.json"
        path.write_text(json.dumps(self.want(hca=hca or ["mlx5_0:1", "mlx5_1:1"], **settings)))
        return roce.main(str(path))

    def phase(self, name, check=False, **settings):
        self.settle()
        return carry_out(role.PHASES, name, self.want(**settings), check=check)

    def verify(self, **settings):
        """(what, expected, found) that `verify` finds, less what only `configure` leaves outside of the root."""
        answer = self.phase("verify", sysctl={}, nic_sysctl={}, **settings)
        kept = (role.PROGRAM, role.UNIT, role.WANTED, role.SYSCTL, role.FACT)
        return [
            (found["what"], found["expected"], found["found"])
            for found in answer.problems
            if not found["what"].startswith(kept)
        ]


@pytest.fixture
def node(tmp_path, monkeypatch):
    return Node(tmp_path, monkeypatch)


def _found(answer, what):
    return [(p["expected"], p["found"]) for p in answer.problems if p["what"] == what]


# --- which ports ---


def test_the_ports_of_the_wanted_rate_are_taken_and_the_management_nic_is_left_alone(node):
    answer = node.phase("validate")
    assert answer.ok
    assert answer.facts["roce"]["hca"] == ["mlx5_0:1", "mlx5_1:1"]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"rate": "200 Gb/sec (4X HDR)"}, "mlx5_1:1 200 Gb/s"),
        ({"state": "1: DOWN", "rate": "40 Gb/sec (4X QDR)"}, "mlx5_1:1 link DOWN"),
        ({"state": "2: INIT"}, "mlx5_1:1 link INIT"),
        ({"link_layer": "InfiniBand"}, "mlx5_1:1 link layer InfiniBand"),
        ({"netdev": ""}, "mlx5_1:1 no network device here"),
        ({"rate": "N/A"}, "mlx5_1:1 0 Gb/s"),
    ],
)
def test_a_port_that_is_slow_or_down_is_named_with_its_reason(node, broken, reason):
    node.plant({"mlx5_1": broken})
    answer = node.phase("validate")
    ((expected, found),) = _found(answer, "RoCE ports at 400 Gb/s")
    assert (expected, found) == ("2", f"1: mlx5_0:1 good, {reason}, mlx5_2:1 100 Gb/s")


def test_a_named_port_is_taken_whatever_else_is_there(node):
    answer = node.phase("validate", hca=["=mlx5_1"], nics_per_node=1)
    assert answer.ok
    assert answer.facts["roce"]["hca"] == ["mlx5_1:1"]


def test_a_named_port_that_is_not_there_or_slow_is_a_problem(node):
    answer = node.phase("validate", hca=["mlx5_2:1", "mlx5_7:1"])
    assert _found(answer, "RoCE port mlx5_2:1") == [("active at 400 Gb/s", "100 Gb/s")]
    assert _found(answer, "RoCE port mlx5_7:1")[0][1].startswith("no such port; there are mlx5_0:1")


def test_virtual_functions_are_not_ports_of_the_node(node):
    node.plant({"mlx5_2": {"rate": "400 Gb/sec (4X NDR)", "virtual": True}})
    assert node.phase("validate").ok


def test_without_a_number_the_fastest_ports_are_taken_as_many_as_there_are(node):
    answer = node.phase("validate", nics_per_node=0, nic_gbit_per_s=0)
    assert answer.ok and answer.facts["roce"]["hca"] == ["mlx5_0:1", "mlx5_1:1"]
    node.plant({"mlx5_0": {"state": "1: DOWN"}, "mlx5_1": {"state": "1: DOWN"}})
    assert node.phase("validate", nics_per_node=0, nic_gbit_per_s=0).facts["roce"]["hca"] == ["mlx5_2:1"]
    assert _found(node.phase("validate", nic_gbit_per_s=0), "RoCE ports at 100 Gb/s")[0][0] == "2"


@pytest.mark.parametrize("phase", ["validate", "configure", "verify"])
def test_without_a_number_a_node_without_a_port_has_nothing_to_set(node, phase):
    node.plant(nics=[])
    assert node.phase(phase, nics_per_node=0, nic_gbit_per_s=0).off == "no RoCE port here"
    node.plant({name: {"link_layer": "InfiniBand"} for name in ("mlx5_0", "mlx5_1", "mlx5_2")})
    reason = node.phase(phase, nics_per_node=0, nic_gbit_per_s=0).off
    assert reason.startswith("no RoCE port here: mlx5_0:1 link layer InfiniBand, ")


def test_a_node_without_rdma_devices_is_told_to_load_the_driver(node):
    node.plant(nics=[])
    answer = node.phase("validate")
    assert _found(answer, "RDMA devices") == [("2 RoCE ports", "none")]
    assert "mlx5_ib" in answer.msg


def test_settings_of_a_bond_go_to_the_devices_below_it(node):
    node.plant({"mlx5_0": {"netdev": "bond0", "bond": ["enp26s0f0np0", "enp26s0f1np1"]}})
    answer = node.phase("validate", hca=["mlx5_0"], nics_per_node=1)
    assert answer.facts["tools"] == {"enp26s0f0np0": "mlnx_qos", "enp26s0f1np1": "mlnx_qos"}
    assert "bond bond0 of enp26s0f0np0, enp26s0f1np1" in answer.warnings[0]
    node.apply("mlx5_0:1")
    assert node.qos("enp26s0f1np1")["pfc"] == [0, 0, 0, 1, 0, 0, 0, 0]


def test_devices_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("mlx5_10", "mlx5_2", "mlx5_bond_0", "bnxt_re0"):
        (tmp_path / name).mkdir()
    assert roce.names(tmp_path) == ["bnxt_re0", "mlx5_2", "mlx5_10", "mlx5_bond_0"]


@needs_captured
def test_a_port_of_a_real_bond(tmp_path):
    for line in (CAPTURED / "rdma/sysfs-mlx5-bond-0-counters-flat.txt").read_text().splitlines():
        path, _, value = line.partition(":")
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    (port,) = roce.find(str(tmp_path))
    assert (port.name, port.rate_gbit_per_s, port.state) == ("mlx5_bond_0:1", 200.0, "ACTIVE")
    assert port.unusable(200) == "no network device here"


# --- GID ---


def test_the_gid_index_is_found_wherever_it_moved(node):
    node.plant({"mlx5_0": {"gid_index": 5}, "mlx5_1": {"gid_index": 5}})
    fact = node.phase("validate").facts["roce"]
    assert fact["gid_index"] == 5
    assert fact["nics"][0]["gid"] == "0000:0000:0000:0000:0000:ffff:0a0a:0001"


def test_ports_with_different_gid_indexes_have_no_common_one(node):
    node.plant({"mlx5_1": {"gid_index": 5}})
    answer = node.phase("validate")
    assert answer.facts["roce"]["gid_index"] is None
    assert "mlx5_0 3, mlx5_1 5" in answer.warnings[0]


def test_a_port_without_an_address_has_no_gid_to_be_reached_by(node):
    node.plant({"mlx5_1": {"address": ""}})
    answer = node.phase("validate")
    expected = ("RoCE v2 with an IPv4 address", "none (types: IB/RoCE v1, RoCE v2)")
    assert _found(answer, f"{TWO} GID") == [expected]


def test_of_several_addresses_the_network_devices_first_decides(node):
    # The only real network device with a known address on every machine.
    node.plant({"mlx5_0": {"netdev": "lo", "address": "127.0.0.1", "gid_index": 5}})
    port = roce.find(str(node.root))[0]
    (Path(port.port) / "gids/3").write_text("0000:0000:0000:0000:0000:ffff:0a63:0001\n")
    (Path(port.port) / "gid_attrs/types/3").write_text("RoCE v2\n")
    (Path(port.port) / "gid_attrs/ndevs/3").write_text("lo\n")
    assert [index for index, _ in port.gids()] == [3, 5]
    assert port.gid() == (5, "0000:0000:0000:0000:0000:ffff:7f00:0001")


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_survives_its_gid(address):
    assert roce.ipv4(STAND_IN.mapped(str(address))) == str(address)


@pytest.mark.parametrize("gid", ["", "N/A", "fe80:0000:0000:0000:ba3f:d2ff:fe00:0001", "0000:0000", "ffff"])
def test_a_gid_without_an_ipv4_address_holds_none(gid):
    assert roce.ipv4(gid) == ""


# --- what the tools print ---

MLNX_QOS = """\
DCBX mode: Firmware controlled
Priority trust state: dscp
dscp2prio mapping:
\tprio:0 dscp:07,06,05,04,03,02,01,00,
\tprio:3 dscp:31,30,29,28,27,25,24,
\tprio:4 dscp:26,
default priority:
Receive buffer size (bytes): 130944,130944,0,0,0,0,0,0,total_size=1027728
Cable len: 7
PFC configuration:
\tpriority    0   1   2   3   4   5   6   7
\tenabled     0   0   0   1   0   0   0   0   
\tbuffer      0   0   0   1   0   0   0   0   
tc: 1 ratelimit: unlimited, tsa: vendor
\t priority:  0
tc: 0 ratelimit: unlimited, tsa: vendor
\t priority:  1
"""


def test_every_value_of_mlnx_qos_is_read():
    found, reason = roce.parse_mlnx_qos(MLNX_QOS)
    assert not reason
    assert found["dcbx"] == "firmware" and found["trust"] == "dscp"
    assert found["dscp"][26] == [4] and found["dscp"][24] == [3]
    assert found["pfc"] == found["prio_buffer"] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert found["buffer_size"][1] == 130944
    assert found["prio_tc"] is None, "six priorities were not printed"


@needs_captured
def test_a_real_configuration_of_another_priority():
    found, _ = roce.parse_mlnx_qos((CAPTURED / "rdma/rdma-qos-query-pfc5.txt").read_text())
    assert found["trust"] == "dscp"
    assert found["pfc"] == found["prio_buffer"] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert found["dcbx"] is None


@pytest.mark.parametrize("cut", range(0, len(MLNX_QOS), 23))
def test_a_cut_answer_gives_whole_values_or_a_reason(cut):
    found, reason = roce.parse_mlnx_qos(MLNX_QOS[:cut])
    assert bool(found) != bool(reason)
    if found:
        assert len(found["pfc"]) == 8


@given(st.text())
def test_garbage_is_no_configuration(text):
    assert roce.parse_mlnx_qos(text) == (None, "mlnx_qos: unknown format")


def test_newer_dcb_prints_more_than_pairs():
    pfc = {"prio_pfc": [False] * 3 + [True] + [False] * 4}
    found, _ = roce.parse_dcb(
        {"pfc": pfc, "app": {"dscp_prio": [[26, 3, " "]]}, "dcbx": None, "buffer": None, "ets": None}
    )
    assert found["dscp"] == {26: [3]} and found["trust"] == "dscp" and found["dcbx"] is None


@pytest.mark.parametrize("app", [[], {"dscp_prio": [1]}, {"dscp_prio": [["AF31"]]}, {"dscp_prio": [["AF31", 3]]}])
def test_an_answer_of_dcb_in_another_shape_is_refused(app):
    pfc = {"prio_pfc": [True] * 8}
    answers = {"pfc": pfc, "app": app, "dcbx": {}, "buffer": {}, "ets": {}}
    assert roce.parse_dcb(answers) == (None, "dcb: unknown format")


# --- which tool ---


def test_a_nic_that_knows_both_tools_is_asked_with_dcb(node):
    node.tools("dcb", "mlnx_qos")
    assert node.phase("validate").facts["tools"] == {"enp26s0np0": "dcb", "enp60s0np0": "dcb"}


def test_a_nic_that_dcb_does_not_reach_is_asked_with_mlnx_qos(node):
    node.command("dcb", "echo 'Attribute read: Operation not supported' >&2; exit 1")
    assert node.phase("validate").facts["tools"] == {"enp26s0np0": "mlnx_qos", "enp60s0np0": "mlnx_qos"}


def test_where_the_driver_keeps_trust_in_a_file_mlnx_qos_is_asked_first(node):
    node.tools("dcb", "mlnx_qos")
    node.plant()
    folder = node.file("net/enp26s0np0/qos")
    folder.mkdir()
    (folder / "trust").write_text("pcp\n")
    assert node.phase("validate").facts["tools"] == {"enp26s0np0": "mlnx_qos", "enp60s0np0": "dcb"}


def test_a_node_without_any_tool_is_told_what_to_install(node):
    node.tools()
    answer = node.phase("validate")
    expected = ("dcb or mlnx_qos answers", "dcb pfc: dcb: not found; mlnx_qos: mlnx_qos: not found")
    assert _found(answer, f"{ONE} tool") == [expected]
    assert "install iproute2" in answer.msg


def test_a_nic_of_another_vendor_is_unknown_and_not_wrong(node):
    node.command("dcb", "echo 'Attribute read: Operation not supported' >&2; exit 1")
    node.configured({name: {"vendor": "0x14e4", "ofed": False} for name in ("mlx5_0", "mlx5_1")})
    node.command("mlnx_qos", "exit 1")
    answer = node.phase("validate")
    assert answer.ok
    assert "unknown vendor 0x14e4, PFC is not set" in answer.warnings[0]
    assert node.verify() == []


# --- setting and reading back ---


@pytest.mark.parametrize("tool", ["dcb", "mlnx_qos"])
def test_every_setting_is_made_and_a_second_run_changes_nothing(node, tool, capsys):
    node.tools(tool)
    assert node.apply() == 0
    assert f"{ONE} pfc: 0,0,0,0,0,0,0,0 -> 0,0,0,1,0,0,0,0" in capsys.readouterr().out
    assert node.apply() == 0
    assert capsys.readouterr().out == ""
    assert node.qos()["pfc"] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert [26, 3] in node.qos()["dscp"]
    assert node.file("net/enp26s0np0/mtu").read_text() == "9000"
    for point in ("np", "rp"):
        assert node.file(f"net/enp26s0np0/ecn/roce_{point}/enable/3").read_text() == "1"
    assert node.file("infiniband/mlx5_1/tc/1/traffic_class").read_text() == "106"
    tos = node.root / "sys/kernel/config/rdma_cm/mlx5_1/ports/1/default_roce_tos"
    assert tos.read_text() == "106"
    assert node.qos("enp90s0f0np0")["pfc"] == [0] * 8, "management is left alone"


def test_a_firmware_that_holds_dcbx_gives_it_to_the_system(node):
    node.plant({"mlx5_0": {"qos": {"dcbx": "firmware"}}})
    assert node.apply() == 0
    assert node.qos()["dcbx"] == "host"


def test_what_the_device_accepts_and_does_not_keep_is_a_failure(node, capsys):
    node.plant({"mlx5_1": {"qos": {"ignore": ["pfc"]}}})
    assert node.apply() == 1
    assert capsys.readouterr().err == f"{TWO} pfc: expected 0,0,0,1,0,0,0,0, found 0,0,0,0,0,0,0,0\n"


def test_a_port_that_is_gone_does_not_keep_the_other_from_being_set(node, capsys):
    assert node.apply("mlx5_9:1", "mlx5_0:1") == 1
    assert capsys.readouterr().err == "mlx5_9:1: not found\n"
    assert node.qos()["pfc"][3] == 1


def test_the_traffic_class_is_read_as_the_driver_prints_it(node):
    node.configured()
    file = node.file("infiniband/mlx5_0/tc/1/traffic_class")
    file.write_text("Global tclass=106\ntclass=8 src_ip=10.0.0.1/32\n")
    assert node.verify() == []
    file.write_text("Global tclass=160\n")
    assert node.verify() == [("mlx5_0 traffic class", "106", "160")]
    file.write_text("\n")
    assert node.verify() == [("mlx5_0 traffic class", "106", "unset")]


def test_the_traffic_class_carries_the_dscp_and_ect():
    assert roce.traffic_class(26) == 106


@pytest.mark.parametrize(("mtu", "size"), [(9000, 4096), (4192, 4096), (4191, 2048), (1500, 1024), (300, 0)])
def test_rdmas_mtu_follows_from_the_network_devices(mtu, size):
    assert roce.roce_mtu(mtu) == size


# --- drift ---


@pytest.mark.parametrize(
    ("drift", "problem"),
    [
        ({"pfc": [1] * 8}, (f"{ONE} pfc", "0,0,0,1,0,0,0,0", "1,1,1,1,1,1,1,1")),
        ({"dscp": [[26, 4]]}, (f"{ONE} priority of DSCP 26", "3", "4")),
        ({"dscp": [[10, 1], [26, 3], [26, 4]]}, (f"{ONE} priority of DSCP 26", "3", "3,4")),
        ({"dcbx": "firmware"}, (f"{ONE} DCBX mode", "OS", "firmware")),
    ],
)
def test_drift_of_priorities_is_named_with_expected_and_found(node, drift, problem):
    node.configured()
    state = node.root / "qos" / "enp26s0np0.json"
    state.write_text(json.dumps({**node.qos(), **drift}))
    assert node.verify() == [problem]


def test_drift_of_files_is_named_with_expected_and_found(node):
    node.configured()
    node.file("net/enp60s0np0/mtu").write_text("1500\n")
    node.file("net/enp26s0np0/ecn/roce_rp/enable/3").write_text("0\n")
    assert sorted(node.verify()) == [(f"{ONE} ecn rp of priority 3", "1", "0"), (f"{TWO} mtu", "9000", "1500")]


def test_a_driver_without_ecn_and_traffic_class_leaves_them_unknown(node):
    node.configured({"mlx5_0": {"ofed": False}})
    answer = node.phase("verify")
    assert not [problem for problem in answer.problems if "ecn" in problem["what"]]
    names = f"{ONE} ecn np of priority 3, {ONE} ecn rp of priority 3, mlx5_0 traffic class"
    assert f"unknown, needs the driver of DOCA-OFED: {names}" in answer.warnings
    would_change = node.phase("configure", check=True, sysctl={}, nic_sysctl={}).diff
    assert not [diff for diff in would_change if "ecn" in diff["before_header"]]


def test_check_mode_says_what_would_change_and_changes_nothing(node):
    answer = node.phase("configure", check=True)
    assert answer.ok and answer.changed
    changes = {diff["before_header"]: (diff["before"].strip(), diff["after"].strip()) for diff in answer.diff}
    assert changes[f"{ONE} pfc"] == ("0,0,0,0,0,0,0,0", "0,0,0,1,0,0,0,0")
    assert changes[f"{TWO} mtu"] == ("1500", "9000")
    assert changes["net.core.rmem_max"] == ("212992", "67108864")
    assert json.loads(changes[role.FACT][1])["nics"][0]["mtu"] == 9000
    assert node.qos()["pfc"] == [0] * 8
    assert node.file("net/enp60s0np0/mtu").read_text() == "1500\n"


def test_nothing_is_configured_on_a_guess(node):
    node.plant({"mlx5_1": {"state": "1: DOWN"}})
    answer = node.phase("configure", check=True)
    assert not answer.ok and not answer.diff


def test_a_port_that_went_down_is_one_problem_not_ten(node):
    node.configured()
    node.file("infiniband/mlx5_1/ports/1/state").write_text("1: DOWN\n")
    ((what, _, found),) = node.verify()
    assert what == "RoCE ports at 400 Gb/s" and "mlx5_1:1 link DOWN" in found


@pytest.mark.parametrize(("setting", "value"), [("priority", 8), ("dscp", 64), ("mtu", 1500)])
def test_a_value_that_cannot_be_is_refused(node, setting, value):
    assert len(_found(node.phase("validate", **{setting: value}), f"roce_qos_{setting}")) == 1


# --- the published fact ---

FACT = {
    "hca": ["mlx5_0:1"],
    "nics": [{"device": "mlx5_0", "gid_index": 3, "mtu": 9000}],
    "gid_index": 3,
    "traffic_class": 106,
}


def test_the_fact_is_as_observed():
    assert role.fact_differences(json.dumps(FACT), FACT) == []


def test_a_gid_index_that_moved_is_two_differences_of_the_fact():
    seen = {**FACT, "gid_index": 5, "nics": [{**FACT["nics"][0], "gid_index": 5}]}
    different = [(f"{role.FACT} gid_index", 5, 3), (f"{role.FACT} mlx5_0 gid_index", 5, 3)]
    assert role.fact_differences(json.dumps(FACT), seen) == different


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nics": [1]}', "null", '{"hca"'])
def test_a_damaged_fact_is_no_traceback(text):
    assert role.fact_differences(text, FACT)


# --- sysctl ---


def test_a_dot_in_a_devices_name_is_a_slash_in_a_sysctls(node):
    node.plant({"mlx5_0": {"netdev": "enp26s0np0.100"}})
    port = roce.find(str(node.root))[0]
    assert list(role.sysctls(node.want(sysctl={}), [port])) == ["net.ipv4.conf.enp26s0np0/100.arp_ignore"]
    assert role.sysctl_path("net.ipv4.conf.enp26s0np0/100.arp_ignore") == "net/ipv4/conf/enp26s0np0.100/arp_ignore"
    assert role.sysctl_path("net/ipv4/conf/a.1/rp_filter") == "net/ipv4/conf/a.1/rp_filter"


def test_a_sysctl_in_several_numbers_is_compared_by_its_numbers(node):
    wanted = {"net.ipv4.tcp_rmem": "4096  131072 6291456"}
    answer = node.phase("configure", check=True, sysctl=wanted)
    assert "net.ipv4.tcp_rmem" not in {diff["before_header"] for diff in answer.diff}


# --- GPUDirect RDMA ---


@pytest.mark.parametrize(
    ("node_has", "way"),
    [
        ({"driver": "open"}, "dma-buf"),
        ({"driver": "proprietary", "peermem": True}, "nvidia_peermem"),
        ({"driver": "open", "kernel": "5.4.0-150-generic", "peermem": True}, "nvidia_peermem"),
    ],
)
def test_gpus_reach_the_nics_by(node, node_has, way):
    node.plant(**node_has)
    assert node.phase("verify").facts["gpudirect"] == way


@pytest.mark.parametrize(
    ("node_has", "found"),
    [
        ({"driver": "proprietary"}, "proprietary driver, kernel 6.8.0-45-generic, nvidia_peermem not loaded"),
        ({"kernel": "5.4.0-150"}, "open driver, kernel 5.4.0-150, nvidia_peermem not loaded"),
    ],
)
def test_gpus_that_do_not_reach_the_nics_are_a_problem(node, node_has, found):
    node.plant(**node_has)
    assert [problem[2] for problem in node.verify() if problem[0] == "GPUDirect RDMA"] == [found]
    assert not [problem for problem in node.verify(gpudirect=False) if problem[0] == "GPUDirect RDMA"]


def test_without_a_driver_gpudirect_is_unknown(node):
    node.plant(driver=None)
    assert "GPUDirect RDMA: unknown, no NVIDIA driver is loaded" in node.phase("verify").warnings


def test_a_switch_port_that_redirects_is_a_problem_only_above_a_nic_and_not_at_the_root(node):
    node.configured()
    node.tools("mlnx_qos", "lspci")
    (node.root / "qos/acs").write_text("0000:18:00.0\n0000:38:01.0\n")
    above = ("PCIe ACS of switch port 0000:18:00.0", "no redirection", "ReqRedir+ CmpltRedir+")
    assert node.verify() == [above]


def test_without_lspci_acs_is_unknown(node):
    assert "PCIe ACS: unknown, lspci: not found" in node.phase("verify").warnings


@needs_captured
def test_acs_of_a_real_node():
    text = (CAPTURED / "lspci/h100-pex890xx-acs-mixed.txt").read_text()
    assert role.parse_acs(text) == {
        "0000:00:0c.0": ("Root Port", []),
        "0000:82:00.0": ("Downstream Port", ["ReqRedir", "CmpltRedir"]),
        "0000:17:01.0": ("Downstream Port", []),
        "0000:17:02.0": ("Downstream Port", []),
    }
    whole = role.parse_acs(text)
    for cut in range(0, len(text), 997):
        assert role.parse_acs(text[:cut]).items() <= whole.items()
    assert role.parse_acs((CAPTURED / "lspci/a100-nn-nvidia-devices.txt").read_text()) == {}


# --- buffers ---


def test_a_lossless_priority_that_shares_its_buffer_or_queue_is_a_warning(node):
    qos = {
        "prio_buffer": [1, 0, 0, 1, 0, 0, 0, 0],
        "buffer_size": [9000, 0] + [0] * 6,
        "prio_tc": [3, 0, 2, 3, 4, 5, 6, 7],
    }
    node.configured({"mlx5_0": {"qos": qos}})
    assert [warning for warning in node.phase("verify").warnings if warning.startswith(ONE)] == [
        f"{ONE}: priority 3 shares its receive buffer with priority 0",
        f"{ONE}: priority 3 shares its traffic class with priority 0",
        f"{ONE}: the receive buffer of priority 3 has 0 bytes",
    ]


# --- what is kept ---


def test_the_program_on_the_node_is_the_file_that_the_module_uses():
    assert role.program() == (ROOT / "roles/roce_qos/module_utils/roce.py").read_text()


def test_a_service_that_is_not_enabled_is_a_problem(node):
    node.configured()
    node.command("systemctl", "echo disabled; exit 1")
    assert node.verify() == [("shakedown-roce.service", "enabled", "disabled")]


@pytest.mark.parametrize("name", ["PROGRAM", "UNIT", "WANTED", "SYSCTL", "FACT"])
def test_the_mode_of_each_file_is_named_by_verify_and_put_right_by_setup(node, tmp_path, monkeypatch, name):
    for file in ("PROGRAM", "UNIT", "WANTED", "SYSCTL", "FACT"):
        monkeypatch.setattr(role, file, str(tmp_path / "files" / file))
    node.configured()
    node.phase("install", sysctl={}, nic_sysctl={})
    assert node.phase("configure", sysctl={}, nic_sysctl={}).ok
    path = Path(getattr(role, name))
    right = path.stat().st_mode
    path.chmod(0o666)
    problems = node.phase("verify", sysctl={}, nic_sysctl={}, gpudirect=False).problems
    assert [(p["what"], p["found"]) for p in problems] == [(str(path), "mode 0666")]
    node.phase("install", sysctl={}, nic_sysctl={})
    node.phase("configure", sysctl={}, nic_sysctl={})
    assert path.stat().st_mode == right
