"""The inventory: names with a gap, aliases, folded sets, and nothing that could reach a shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import NAMES, ROOT, listing
from golden_files import check as golden
from runner.cluster import inventory, profiles, reasons, ssh
from runner.errors import UsageError
from runner.system import nodeset


def test_the_real_cluster_has_eight_nodes_a_gap_and_port_44222(tmp_path):
    read = inventory.read(str(ROOT / "inventory/fukushimadc-02"), tmp_path)
    assert [n.name for n in read.nodes] == NAMES
    assert [n.alias for n in read.nodes] == [f"node{i:03d}" for i in range(1, 9)]
    assert read.nodes[7].alias == "node008" and read.nodes[7].name.endswith("-0009")
    assert {(n.port, n.gpus, n.nics, n.nic_gbit_per_s, n.hardware) for n in read.nodes} == {
        (44222, 8, 2, 400.0, "h200-sxm")
    }
    assert read.nodes[0].address == "10.2.201.1"


def test_ansible_sees_the_same_nodes():
    program = Path(sys.executable).with_name("ansible-inventory")
    graph = subprocess.run(
        [program, "-i", ROOT / "inventory/fukushimadc-02", "--graph", "gpu_nodes"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.strip(" |-") for line in graph.stdout.splitlines()[1:]] == NAMES


def test_a_second_reading_comes_from_the_cache_and_a_change_is_seen(tmp_path):
    folder = tmp_path / "inv"
    folder.mkdir()
    hosts = folder / "hosts.yml"
    hosts.write_text("all: {hosts: {a: {secret_token: hunter2}}}")
    first = inventory.read(str(folder), tmp_path / "cache")
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1 and "hunter2" not in kept[0].read_text()
    kept[0].write_text(kept[0].read_text().replace('"port": 22', '"port": 23'))  # only the cache says 23
    assert inventory.read(str(folder), tmp_path / "cache").nodes[0].port == 23
    hosts.write_text("all: {hosts: {a: {}, b: {}}}")
    assert [n.name for n in inventory.read(str(folder), tmp_path / "cache").nodes] == ["a", "b"]
    assert first.nodes[0].port == 22


@pytest.mark.parametrize(
    ("hosts", "aliases"),
    [
        ("node[003-006]", ["node003", "node004", "node005", "node006"]),
        ("node008", ["node008"]),
        ("fukushimadc-02-hgx-[0007,0009]", ["node007", "node008"]),
        ("node002,fukushimadc-02-hgx-0001", ["node001", "node002"]),
        ("10.2.201.3", ["node003"]),
        (None, [f"node{i:03d}" for i in range(1, 9)]),
    ],
)
def test_names_aliases_addresses_and_folded_sets_select_nodes_in_inventory_order(cluster, hosts, aliases):
    assert [n.alias for n in inventory.select(cluster, hosts)] == aliases


@given(st.sets(st.integers(0, 7), min_size=1))
def test_folding_and_selecting_are_inverse(chosen):
    read = inventory.parse("x", listing({name: {} for name in NAMES}))
    wanted = [read.nodes[i] for i in sorted(chosen)]
    assert list(inventory.select(read, nodeset.fold([n.name for n in wanted]))) == wanted
    assert list(inventory.select(read, nodeset.fold([n.alias for n in wanted]))) == wanted


@pytest.mark.parametrize("hosts", ["node009", "fukushimadc-02-hgx-0008", "node[001-", "$(reboot)"])
def test_a_node_that_is_not_there_is_refused_in_one_line(cluster, hosts):
    with pytest.raises(UsageError) as error:
        inventory.select(cluster, hosts)
    assert "\n" not in str(error.value) and hosts in str(error.value)


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("a; reboot", {}),
        ("nœud1", {}),
        ("$(id)", {}),
        ("a", {"ansible_host": "10.0.0.1 -oProxyCommand=x"}),
        ("a", {"ansible_user": "root'"}),
        ("a", {"runner_alias": "node 1"}),
        ("a", {"runner_scratch": "/tmp/a b"}),
        ("a", {"runner_python": "/opt/$(x)/python"}),
        ("a", {"runner_host_key": "ssh-ed25519 AAAA\nProxyCommand x"}),
        ("-oProxyCommand=x", {}),
    ],
)
def test_what_a_shell_could_misread_never_gets_past_the_inventory(name, variables):
    with pytest.raises(UsageError) as error:
        inventory.parse("inv", listing({name: variables}))
    assert "not allowed" in str(error.value)


def test_an_address_in_the_place_of_a_name_is_told_what_to_write():
    with pytest.raises(UsageError, match="give the host a name, and ansible_host: '2001:db8::9'"):
        inventory.parse("inv", listing({"2001:db8::9": {"ansible_port": 2200}}))


def test_a_misspelt_variable_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="unknown variable 'runner_gpus_per_nod'; did you mean 'runner_gpus_per_node'"):
        inventory.parse("inv", listing({"a": {"runner_gpus_per_nod": 8}}))


def test_two_nodes_of_one_name_are_refused():
    with pytest.raises(UsageError, match="both called 'node001'"):
        inventory.parse("inv", listing({"a": {"runner_alias": "node001"}, "b": {"runner_alias": "node001"}}))


def test_ssh_config_pins_host_keys_and_carries_port_and_user(cluster):
    golden("ssh/ssh_config", ssh.ssh_config(cluster, "/run/x y/known_hosts"))
    golden("ssh/known_hosts", ssh.known_hosts(cluster))


def test_openssh_reads_the_rendered_config(cluster, tmp_path):
    path = tmp_path / "ssh_config"
    path.write_text(ssh.ssh_config(cluster, "/run/x y/known_hosts"))
    for word in ("node008", "fukushimadc-02-hgx-0009", "10.2.201.8"):
        told = subprocess.run(["ssh", "-G", "-F", path, word], capture_output=True, text=True, check=True).stdout
        values = dict(line.split(" ", 1) for line in told.splitlines() if " " in line)
        assert (values["hostname"], values["port"], values["user"]) == ("10.2.201.8", "44222", "root")
        assert values["hostkeyalias"] == "fukushimadc-02-hgx-0009"
        assert values["stricthostkeychecking"] == "true" and values["batchmode"] == "yes"
        assert "/run/x y/known_hosts" in values["userknownhostsfile"]


def test_broken_yaml_is_one_line(tmp_path):
    (tmp_path / "hosts.yml").write_text("all: [")
    with pytest.raises(UsageError) as error:
        inventory.read(str(tmp_path), tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_the_cache_holds_nothing_but_the_nodes_fields(cluster):
    assert "ansible" not in json.dumps([vars(n) for n in cluster.nodes])


def test_keys_of_ssh_keyscan_are_pins_and_a_pin_is_exclusive(tmp_path):
    """`ssh-keyscan -p 44222 NAME` writes [NAME]:44222; HostKeyAlias looks the plain name up."""
    (tmp_path / "hosts.yml").write_text("all: {hosts: {gpu-a: {ansible_port: 44222}, gpu-b: {ansible_port: 44222}}}")
    (tmp_path / "known_hosts").write_text("[gpu-a]:44222 ssh-ed25519 AAAA1\n[node001]:44222 ssh-rsa BBBB1\n")
    read = inventory.read(str(tmp_path), tmp_path / "cache")
    assert ssh.known_hosts(read) == "gpu-a ssh-ed25519 AAAA1\ngpu-a ssh-rsa BBBB1\n"
    config = tmp_path / "ssh_config"
    config.write_text(ssh.ssh_config(read, "/run/pins"))
    for name, files in (("gpu-a", "/run/pins"), ("gpu-b", "/run/pins ")):
        told = subprocess.run(["ssh", "-G", "-F", config, name], capture_output=True, text=True, check=True).stdout
        line = next(line for line in told.splitlines() if line.startswith("userknownhostsfile "))
        assert line.startswith(f"userknownhostsfile {files}")
        assert ("/.ssh/known_hosts" in line) == (name == "gpu-b")


@pytest.mark.parametrize("beside", ["group_vars/all.yml", "host_vars/a.json", "known_hosts"])
def test_what_lies_beside_an_inventory_file_counts(tmp_path, beside):
    hosts = tmp_path / "hosts.yml"
    hosts.write_text("all: {hosts: {a: {}}}")
    before = inventory.read(str(hosts), tmp_path / "cache")
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_text("a ssh-ed25519 AAAA" if beside == "known_hosts" else '{"ansible_port": 2202}')
    after = inventory.read(str(hosts), tmp_path / "cache")
    assert (after.nodes[0].port, after.known_hosts) != (before.nodes[0].port, before.known_hosts)


def test_a_damaged_cache_is_read_anew(tmp_path):
    (tmp_path / "hosts.yml").write_text("all: {hosts: {a: {}}}")
    first = inventory.read(str(tmp_path / "hosts.yml"), tmp_path / "cache")
    for kept in (tmp_path / "cache").iterdir():
        kept.write_text('{"nodes": [')
    assert inventory.read(str(tmp_path / "hosts.yml"), tmp_path / "cache") == first


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"runner_env": {"HF_TOKEN": "hf_x"}}, "leave secrets out of the inventory"),
        ({"runner_nccl": "biult"}, "unknown value 'biult'; did you mean 'built'"),
        ({"nccl_build_root": "/opt/nccl;x"}, "nccl_build_root '/opt/nccl;x' has characters that are not allowed"),
        ({"runner_env": {"A;B": "x"}}, "not a valid name of an environment variable"),
        ({"ansible_ssh_private_key_file": '/k"\n ProxyCommand touch /tmp/x'}, "not allowed"),
        ({"ansible_ssh_private_key_file": "{{ inventory_dir }}/key"}, "not allowed"),
        ({"runner_scratch": "/var/tmp/../../etc"}, "not allowed"),
        ({"runner_scratch": "/"}, "not allowed"),
        ({"runner_scratch": "scratch"}, "not allowed"),
        ({"ansible_port": 99999}, "ansible_port"),
        ({"runner_nic_gbit_per_s": float("nan")}, "runner_nic_gbit_per_s"),
    ],
)
def test_values_that_would_do_harm_later_are_refused_now(variables, said):
    with pytest.raises(UsageError, match=said) as error:
        inventory.parse("inv", listing({"a": variables}))
    assert "hf_x" not in str(error.value)


def test_hosts_called_like_aliases_keep_their_names():
    read = inventory.parse("inv", listing({f"node{i:03d}": {} for i in range(3)}))
    assert [n.name for n in read.nodes] == ["node000", "node001", "node002"]
    assert [n.name for n in inventory.select(read, "node001")] == ["node001"]


def test_a_login_node_is_reached_like_the_others_and_is_none_of_them(tmp_path):
    slurm = {"runner_slurm": {"login": "head", "shared": False}}
    hosts = {"a": slurm, "b": slurm, "head": {"ansible_host": "10.0.0.9", "ansible_port": 2222}}
    told = listing(hosts) | {"gpu_nodes": {"hosts": ["a", "b"]}}
    read = inventory.parse("inv", told)
    assert [node.name for node in read.nodes] == ["a", "b"] and read.login.name == "head"
    assert "Match originalhost head,10.0.0.9\n  HostName 10.0.0.9\n  HostKeyAlias head\n  Port 2222" in ssh.ssh_config(
        read, "k"
    )
    told["_meta"]["hostvars"].pop("head")
    with pytest.raises(UsageError, match="unknown host 'head'"):
        inventory.parse("inv", told)


@pytest.mark.parametrize(
    ("variables", "login"),
    [
        ({"slurm_cluster_enabled": True}, "a"),
        ({"slurm_cluster_enabled": "true"}, "a"),
        ({"slurm_cluster_enabled": True, "slurm_cluster_controller": "b"}, "b"),
        ({"slurm_cluster_enabled": True, "slurm_cluster_controller": "head", "slurm_cluster_group": "all"}, "head"),
        ({"slurm_cluster_enabled": True, "slurm_cluster_group": "heads"}, "head"),
        ({"slurm_cluster_enabled": True, "runner_slurm": {"login": "b"}}, "b"),
        ({"slurm_cluster_enabled": True, "slurm_cluster_controller": "{{ groups.heads | first }}"}, None),
        ({"slurm_cluster_enabled": False}, None),
        ({}, None),
        ({"slurm_cluster_enabled": True, "runner_backend": "slurm"}, None),
    ],
)
def test_slurms_commands_run_where_set_up_puts_its_controller(variables, login):
    told = listing({"a": variables, "b": variables, "head": {}})
    told |= {"gpu_nodes": {"hosts": ["a", "b"]}, "heads": {"hosts": ["head"]}}
    read = inventory.parse("inv", told)
    assert read.slurm.get("login") == login
    assert (read.login and read.login.name) == ("head" if login == "head" else None)


def test_a_plain_word_is_an_inventory_here_or_one_that_comes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inventory.read("local", tmp_path / "cache").source == str(ROOT / "inventory" / "local")
    (tmp_path / "inventory" / "mine").mkdir(parents=True)
    (tmp_path / "inventory" / "mine" / "hosts.yml").write_text("all: {hosts: {a: {}}}")
    assert inventory.read("mine", tmp_path / "cache").source == "inventory/mine"
    with pytest.raises(UsageError, match="unknown inventory 'mnie'; did you mean 'mine'"):
        inventory.read("mnie", tmp_path / "cache")


def test_without_any_inventory_one_line_says_how_to_get_one(tmp_path, monkeypatch):
    """As from a wheel, whose ansible.cfg names the checkout's example; one of the user's own is believed."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own" / "ansible.cfg"
    own.parent.mkdir()
    own.write_text("[defaults]\ninventory = inventory/example\n")
    with pytest.raises(UsageError, match="-i local, or write one with `runner inventory init DIR`"):
        inventory.default_source(own)
    (tmp_path / "ansible.cfg").write_text("[defaults]\ninventory = here\n")
    assert inventory.default_source(own) == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("inventory/lab", "`runner setup -i inventory/lab --tags conda_env`"),
        ("/srv/my lab/hosts.yml", "`runner setup -i '/srv/my lab/hosts.yml' --tags conda_env`"),
    ],
)
def test_a_remedy_would_set_up_the_inventory_in_use_and_no_other(source, command):
    node = inventory.parse(source, listing({"a": {}})).nodes[0]
    assert command in reasons.explain(node, 127, ["exec: /opt/shakedown/env/bin/python: not found"])


def test_a_cached_inventory_is_named_as_it_was_asked_for_now(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for source in ("inventory/fukushimadc-02", str(ROOT / "inventory/fukushimadc-02"), "inventory/fukushimadc-02"):
        assert {node.inventory for node in inventory.read(source, tmp_path).nodes} == {source}


@pytest.mark.parametrize(
    ("variables", "python"),
    [
        ({"conda_env_prefix": "/srv/env"}, "/srv/env/bin/python"),
        ({"conda_env_prefix": "/srv/env", "runner_python": "/usr/bin/python3"}, "/usr/bin/python3"),
        ({}, sys.executable),
    ],
)
def test_the_environment_that_setup_makes_is_the_one_that_runs_use(variables, python):
    (node,) = inventory.parse("inv", listing({"a": variables})).nodes
    assert node.python == python


HERE = str(profiles.place("cpu-smoke") / "bin" / "python")


@pytest.mark.parametrize(
    ("variables", "python"),
    [
        ({"runner_python": "/opt/shakedown/env/bin/python"}, "/opt/shakedown/env-cpu-smoke/bin/python"),
        ({"conda_env_prefix": "/srv/env"}, "/srv/env-cpu-smoke/bin/python"),
        # The main environment may be of that profile itself.
        ({"conda_env_prefix": "/srv/env", "conda_env_profile": "cpu-smoke"}, "/srv/env/bin/python"),
        # Nodes that see the controller's Python see its profiles: this machine, a shared home, a testbed.
        ({}, HERE),
        ({"ansible_connection": "local"}, HERE),
        ({"runner_python": sys.executable}, HERE),
        ({"runner_python": "/sw/python/bin/python"}, "/sw/python/bin/python"),
        ({"runner_python": "/sw/python/bin/python", "runner_pythons": {"cpu-smoke": "/sw/rl/python"}}, "/sw/rl/python"),
    ],
)
def test_a_profile_has_its_python_where_setup_puts_it_or_the_site(variables, python):
    (node,) = inventory.parse("inv", listing({"a": variables})).nodes
    assert node.of_profile("cpu-smoke").python == python
    assert node.of_profile("") == node


def test_a_site_may_have_profiles_of_its_own_and_their_paths_are_checked():
    (node,) = inventory.parse("inv", listing({"a": {"runner_pythons": {"mine": "/sw/mine/python"}}})).nodes
    assert node.of_profile("mine").python == "/sw/mine/python"
    with pytest.raises(UsageError, match=r"mein.*mine"):
        node.of_profile("mein")
    with pytest.raises(UsageError, match="runner_pythons of mine"):
        inventory.parse("inv", listing({"a": {"runner_pythons": {"mine": "/sw/$(x)/python"}}}))


def test_another_lock_is_another_place(tmp_path, monkeypatch):
    before = profiles.place("cpu-smoke")
    (tmp_path / "cpu-smoke.txt").write_text(profiles.lock("cpu-smoke").read_text() + "numpy==1.0\n")
    monkeypatch.setattr(profiles, "lock", lambda name: tmp_path / f"{name}.txt")
    assert profiles.place("cpu-smoke") != before


def test_a_path_that_setup_does_not_make_is_said_with_the_one_that_it_makes():
    node = inventory.parse("inv", listing({"a": {"runner_python": "/home/me/.venv/bin/python"}})).nodes[0]
    assert reasons.explain(node, 127, []) == (
        "has no /home/me/.venv/bin/python: provision it with `runner setup -i inv --tags conda_env`, and set "
        "runner_python: /opt/shakedown/env/bin/python (or conda_env_prefix)"
    )
