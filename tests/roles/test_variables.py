"""Roles' variables and nodes' names as the inventory gives them: wrong ones are named before a node is asked."""

from __future__ import annotations

import importlib.util
import re

import pytest

from role_modules import ROLES, ROOT


def plugin(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / "plugins" / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


settings = plugin("lookup/role_settings")
site = plugin("filter/site")
OPTIONS = {"slurm_mtu": {"type": "int"}, "slurm_partition": {"type": "str"}}


def test_an_unknown_variable_is_named_with_the_nearest():
    assert settings.unknown("slurm", OPTIONS, ["slurm_partitoin", "slurm_mtu"], ["slurm"]) == [
        "unknown variable 'slurm_partitoin': did you mean 'slurm_partition'?"
    ]


def test_a_longer_prefix_is_another_roles():
    assert settings.unknown("slurm", OPTIONS, ["slurm_prolog_x"], ["slurm", "slurm_prolog"]) == []
    assert settings.unknown("slurm_prolog", {}, ["slurm_partition"], ["slurm", "slurm_prolog"]) == []


@pytest.mark.parametrize("value", [["a"], {"a": 1}, True])
def test_what_is_no_text_is_refused_for_a_text(value):
    assert settings.not_text("slurm_partition", OPTIONS["slurm_partition"], value)
    assert settings.not_text("slurm_mtu", OPTIONS["slurm_mtu"], value) is None  # Ansible's own check does that


@pytest.mark.parametrize("value", ["gpu", 560, 12.5])
def test_numbers_are_texts(value):
    assert settings.not_text("slurm_partition", OPTIONS["slurm_partition"], value) is None


def test_two_nodes_of_one_name_or_address_are_told():
    hostvars = {
        "a": {"runner_alias": "node001", "ansible_host": "10.0.0.1"},
        "b": {"runner_alias": "node001", "ansible_host": "10.0.0.2"},
        "c": {"ansible_host": "10.0.0.1"},
        "d": {},
        "e": {},
    }
    assert site.nodes_named_twice(list(hostvars), hostvars) == [
        "a and b have the same runner_alias node001: give each its own",
        "a and c have the same ansible_host 10.0.0.1: give each its own",
    ]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"ansible_host": "a", "ansible_port": 1, "ansible_user": "u"}, ["a", 1, "u"]),
        ({"ansible_ssh_host": "b", "ansible_ssh_port": 2, "ansible_ssh_user": "v"}, ["b", 2, "v"]),
        ({"ansible_host": "a", "ansible_ssh_host": "b", "ansible_port": 1, "ansible_ssh_port": 2}, ["b", 2, ""]),
        ({}, ["", "", ""]),
    ],
)
def test_roles_read_both_spellings_as_ansible_does(variables, place):
    assert [site.reached(variables, what) for what in ("host", "port", "user")] == place


def test_old_spellings_tell_nodes_apart_as_well():
    hostvars = {"a": {"ansible_ssh_host": "10.0.0.1"}, "b": {"ansible_host": "10.0.0.1"}}
    assert site.nodes_named_twice(["a", "b"], hostvars) == [
        "a and b have the same ansible_host 10.0.0.1: give each its own"
    ]


def test_ports_tell_nodes_behind_one_address_apart():
    hostvars = {name: {"ansible_host": "10.0.0.1", "ansible_port": port} for name, port in (("a", 1), ("b", 2))}
    assert site.nodes_named_twice(["a", "b"], hostvars) == []


def test_a_role_of_all_nodes_is_on_or_off_for_all():
    hostvars = {"a": {"ssh_mesh_enabled": False}, "b": {}, "c": {"roce_qos_enabled": False}}
    assert site.differing_roles(["a", "b", "c"], hostvars) == [
        "ssh_mesh_enabled differs between a and b: set it for the group gpu_nodes, or use --limit"
    ]
    assert site.differing_roles(["b", "c"], hostvars) == []


@pytest.mark.parametrize(
    ("found", "off"),
    [
        ({"a": {"verify": {"off": "no NVIDIA GPU here"}}}, True),
        ({"a": {"verify": {"skipped": True}, "validate": {"off": "no NVIDIA GPU here"}}}, True),  # setup --check
        ({"a": {"validate": {"off": "none"}}, "b": {"validate": {"off": "none"}}}, True),
        ({"a": {"validate": {"off": "none"}}, "b": {"validate": {"facts": {}}}}, False),
        ({"a": {"verify": {"failed": True}}}, False),  # the inventory says that it has some
        ({"a": {"validate": {"off": "none"}, "verify": {"failed": True}}}, False),
        ({"a": {}}, False),  # cuda_check did not run
        ({}, False),
    ],
)
def test_roles_that_need_gpus_are_off_where_no_node_has_any(found, off):
    hostvars = {
        name: {f"cuda_check_{phase}_result": result for phase, result in phases.items()}
        for name, phases in found.items()
    }
    assert site.without_gpus(list(found), hostvars) == ("no NVIDIA GPU here" if off else "")


OFF = {"ssh_mesh_enabled": "false", "ssh_mesh_off": "there is one node"}


@pytest.mark.parametrize(
    ("variables", "reasons"),
    [
        ({}, {}),
        (OFF, {"ssh_mesh": "there is one node"}),
        ({**OFF, "ssh_mesh_enabled": True}, {}),  # the inventory has the last word
        ({"slurm_cluster_enabled": False}, {"slurm_cluster": "not enabled in the inventory"}),
        ({"roce_qos_enabled": "no", "roce_qos_off": "", "foreign_enabled": False}, {"roce_qos": "not enabled in the inventory"}),
    ],
)  # fmt: skip
def test_a_role_that_is_off_says_why(variables, reasons):
    assert plugin("lookup/roles_off").roles_off(variables) == reasons


def test_why_is_one_line_without_ansibles_chain():
    chain = "Task failed: Finalization of task args for 'roce_qos' failed: Error while resolving value for 'settings': "
    assert site.why({"msg": f"{chain}The lookup plugin 'role_settings' failed: roce_qos:\n wrong"}) == "roce_qos: wrong"


def test_installs_facts_are_those_of_validate_where_it_found_nothing_to_install():
    nodes = [
        {"ssh_mesh_install_result": {"facts": {"name": "a"}}, "ssh_mesh_validate_result": {"facts": {"name": "old"}}},
        {
            "ssh_mesh_install_result": {"skipped": True},
            "ssh_mesh_validate_result": {"also": True, "facts": {"name": "b"}},
        },
        {"ssh_mesh_validate_result": {"also": False, "facts": {"name": "refused"}}},
        {"ssh_mesh_install_result": {"unreachable": True}},
        {},
    ]
    assert site.installed(nodes, "ssh_mesh") == [{"name": "a"}, {"name": "b"}]


GOOD = {"ssh_mesh_configure_result": {"also": True, "changed": False}}


@pytest.mark.parametrize(
    "other",
    [
        {},  # not reached, or left out
        {"ssh_mesh_configure_result": {"also": False, "changed": True}},
        {"ssh_mesh_configure_result": {"skipped": True}},
        {**GOOD, "ssh_mesh_verify_result": {"skipped": True}},  # verified before in this run
        {**GOOD, "slurm_cluster_install_result": {"changed": True}},
        {**GOOD, "slurm_prolog_configure_result": {"changed": True}},
    ],
)
def test_one_node_that_changed_or_was_not_verified_has_all_verified(other):
    assert site.verified([GOOD, GOOD], "ssh_mesh")
    assert not site.verified([GOOD, other], "ssh_mesh")


@pytest.mark.parametrize("role", ROLES)
def test_a_default_that_depends_on_the_connection_asks_for_the_nodes_own(role):
    """In a task that is delegated to this machine `ansible_connection` is this machine's: the role would be off there."""
    text = (ROOT / "roles" / role / "defaults" / "main.yml").read_text()
    assert not re.findall(r"(?<!hostvars\[inventory_hostname\]\.)\bansible_connection\b", text)
