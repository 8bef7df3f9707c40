"""The testbed as decided before anything is started: names, addresses, commands, inventory, image."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from conftest import NAMES
from golden_files import check as golden
from runner.cli import testbed
from runner.cluster import inventory
from runner.errors import InfrastructureError, UsageError
from runner.provision.testbed import containers, layout

SUBNET = "10.89.3.0/24"
MACHINE = layout.Machine(
    python="/srv/shakedown/.venv/bin/python",
    mounts=("/opt/python 3.11", "/srv/shakedown"),
    runtime="runc",
    max_open_files=20000,
    max_processes=20000,
)
DEBIAN = {"ID": "debian", "VERSION_CODENAME": "bookworm", "PRETTY_NAME": "Debian GNU/Linux 12"}
INDEXES = """http://mirror.example/debian bookworm-updates main
http://security.example/debian-security bookworm-security main
http://third.example/packages stable main
http://mirror.example/debian/ bookworm main
"""
UBUNTU = {"ID": "ubuntu", "VERSION_CODENAME": "noble", "PRETTY_NAME": "Ubuntu 24.04"}


def generated(folder: Path, count: int = 8) -> dict:
    nodes = layout.lay_out(count, SUBNET)
    keys = {node.name: f"ssh-ed25519 AAAAC3Nza{node.alias}" for node in nodes}
    return layout.inventory(nodes, keys, folder, MACHINE.python, Path("/state/testbed"))


def test_eight_nodes_are_named_as_the_real_cluster_with_its_gap():
    nodes = layout.lay_out(8, SUBNET)
    assert [node.name for node in nodes] == NAMES
    assert (nodes[7].name, nodes[7].alias) == ("fukushimadc-02-hgx-0009", "node008")
    assert [node.alias for node in nodes] == [f"node{i:03d}" for i in range(1, 9)]


def test_names_go_on_after_0009():
    assert [node.name[-4:] for node in layout.lay_out(10, SUBNET)][-3:] == ["0009", "0010", "0011"]


@given(count=st.integers(1, layout.MAX_NODES), subnet=st.sampled_from(layout.SUBNETS))
def test_every_node_has_its_own_name_and_an_address_that_is_not_the_gateways(count, subnet):
    nodes = layout.lay_out(count, subnet)
    network = IPv4Network(subnet)
    assert len({node.name for node in nodes}) == len({node.alias for node in nodes}) == count
    assert len({node.address for node in nodes} - {str(network[0]), str(network[1])}) == count
    assert not any(node.name.endswith("-0008") for node in nodes)
    assert layout.lay_out(layout.MAX_NODES, subnet)[:count] == nodes  # more nodes rename none


@pytest.mark.parametrize("count", [0, -1, 17])
def test_a_testbed_has_one_to_sixteen_nodes(count):
    with pytest.raises(UsageError, match=f"--nodes {count}: a testbed has 1 to 16 nodes"):
        layout.lay_out(count, SUBNET)


def test_the_commands_that_start_a_testbed():
    nodes = layout.lay_out(2, SUBNET)
    options = layout.Options(nodes=2, memory="4g", cpus=0.5)
    commands = [layout.network_argv("testbed", "c0ffee", SUBNET)]
    commands += [
        layout.container_argv(
            n, nodes, options, MACHINE, "localhost/shakedown-testbed:1a2b", "c0ffee", Path("/state/testbed")
        )
        for n in nodes
    ]
    golden("testbed/commands.txt", "".join(f"{shlex.join(c).replace(' --', chr(10) + '  --')}\n\n" for c in commands))


def test_without_limits_none_are_set_and_podmans_own_runtime_is_taken():
    nodes = layout.lay_out(1, SUBNET)
    machine = layout.Machine(MACHINE.python, MACHINE.mounts, None, 20000, 20000)
    argv = layout.container_argv(nodes[0], nodes, layout.Options(), machine, "image", "id", Path("/testbed"))
    assert not {"--runtime", "--memory", "--cpus"} & set(argv)


def test_the_generated_inventory():
    golden("testbed/hosts.yml", layout.hosts_file("testbed", generated(Path("/home/a b/testbed"), 2)))


def test_the_product_reads_its_own_inventory_beside_the_keys(tmp_path):
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_ed25519").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (tmp_path / "hosts.yml").write_text(layout.hosts_file("x", generated(tmp_path)))
    nodes = inventory.read(str(tmp_path), tmp_path / "cache").nodes
    assert [(n.name, n.alias) for n in nodes] == [(n.name, n.alias) for n in layout.lay_out(8, SUBNET)]
    assert {(n.port, n.user, n.device, n.gpus, n.backend) for n in nodes} == {(44222, "root", "cpu", 1, "ssh")}
    assert nodes[7].host_key == "ssh-ed25519 AAAAC3Nzanode008"
    assert nodes[0].python == MACHINE.python
    assert nodes[0].env == {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("folder", ["/srv/testbed", "/home/a b/te'st", "/home/$(id)/é;x"])
def test_ssh_gets_the_known_hosts_file_as_one_word(folder):
    variables = generated(Path(folder))["all"]["children"]["gpu_nodes"]["vars"]
    assert shlex.split(variables["ansible_ssh_common_args"]) == [
        "-o", "StrictHostKeyChecking=yes", "-o", f'UserKnownHostsFile="{folder}/.ssh/known_hosts"',
    ]  # fmt: skip


def test_known_hosts_pins_each_address_on_the_port():
    nodes = layout.lay_out(2, SUBNET)
    lines = layout.known_hosts(nodes, {nodes[0].name: "ssh-ed25519 AAA1", nodes[1].name: "ssh-ed25519 AAA2"})
    assert lines == "[10.89.3.11]:44222 ssh-ed25519 AAA1\n[10.89.3.12]:44222 ssh-ed25519 AAA2\n"


def test_sshd_takes_keys_only_on_the_port_of_the_inventory():
    lines = [line for line in (layout.TESTBED / "sshd.conf").read_text().splitlines() if line[:1] not in ("#", "")]
    settings = dict(line.split(maxsplit=1) for line in lines)
    assert settings["Port"] == str(layout.SSH_PORT) == "44222"
    assert settings["PermitRootLogin"] == "prohibit-password"
    assert settings["PasswordAuthentication"] == settings["KbdInteractiveAuthentication"] == "no"
    assert settings["HostKey"].startswith(f"{layout.KEYS_IN_NODE}/")
    assert f"{layout.KEYS_IN_NODE}/authorized_keys" in settings["AuthorizedKeysFile"].split()


def test_the_image_is_this_distribution_from_the_mirror_that_the_machine_uses():
    base = layout.bootstrapped_base(DEBIAN, INDEXES)
    assert (base.suite, base.mirror, base.components) == ("bookworm", "http://mirror.example/debian", "main")
    argv = layout.base_steps(base, "/scratch")[0].argv
    assert argv == (
        "debootstrap", "--variant=minbase", "--components=main",
        "bookworm", "/scratch/root", "http://mirror.example/debian",
    )  # fmt: skip


def test_another_release_comes_from_the_same_mirror_and_makes_another_image():
    own = layout.bootstrapped_base(DEBIAN, INDEXES)
    other = layout.bootstrapped_base(DEBIAN, INDEXES, "trixie")
    assert (other.suite, other.mirror, other.components) == ("trixie", own.mirror, own.components)
    assert other.image != own.image
    assert layout.image_tag(other, {}) != layout.image_tag(own, {})
    assert layout.bootstrapped_base(DEBIAN, INDEXES, "bookworm") == own


@pytest.mark.parametrize("name", ["", "13", "../x", "trixie; id", "trixie --help"])
def test_a_release_is_a_code_name(name):
    with pytest.raises(UsageError, match=r"--release .*: give the code name of a release, e.g. trixie"):
        layout.bootstrapped_base(DEBIAN, INDEXES, name)


def test_an_image_has_its_own_release():
    with pytest.raises(UsageError, match=r"--image and --release: an image has its own release, give one of them"):
        containers.requested_base(layout.Options(image="debian:12", release="trixie"))


def test_ubuntu_needs_universe_for_pdsh():
    base = layout.bootstrapped_base(UBUNTU, "http://mirror.example/ubuntu noble main\n")
    assert "--components=main,universe" in layout.base_steps(base, "/scratch")[0].argv


@pytest.mark.parametrize("os_release", [DEBIAN, UBUNTU, {"ID": "fedora", "PRETTY_NAME": "Fedora 43"}, {}])
def test_a_machine_without_a_mirror_is_told_to_give_an_image(os_release):
    with pytest.raises(InfrastructureError, match="give an image with --image") as error:
        layout.bootstrapped_base(os_release, "")
    assert "\n" not in str(error.value)


def test_an_image_of_a_registry_needs_no_debootstrap():
    base = layout.Base("debian:12")
    assert layout.base_steps(base, "/scratch") == []
    assert "BASE=debian:12" in layout.build_step(base, "tag").argv


def test_a_changed_definition_makes_another_image_and_an_equal_one_is_reused():
    base, definition = layout.Base("debian:12"), {"Containerfile": "FROM x", "sshd.conf": "Port 1"}
    tag = layout.image_tag(base, definition)
    assert tag == layout.image_tag(base, dict(reversed(definition.items())))
    assert tag != layout.image_tag(base, {**definition, "sshd.conf": "Port 2"})
    assert tag != layout.image_tag(layout.Base("debian:13"), definition)


@given(st.lists(st.sampled_from(["/usr", "/opt", "/opt/python", "/opt/python/", "/opting", "/srv/x/.venv", "/srv/x"])))
def test_mounts_cover_every_path_once(paths):
    kept = layout.outermost(paths)
    for path in paths:
        above = [k for k in kept if path.rstrip("/") == k or path.startswith(f"{k}/")]
        assert len(above) == (0 if path == "/usr" else 1)


def test_an_inventory_of_somebody_else_is_never_overwritten(tmp_path):
    hosts = tmp_path / "hosts.yml"
    hosts.write_text("all: {}\n")
    with pytest.raises(UsageError, match="does not belong to testbed 'mine'"):
        containers.up(layout.Options(name="mine", inventory=tmp_path), home=tmp_path / "state")
    hosts.write_text(layout.generated("other"))
    with pytest.raises(UsageError, match="does not belong to testbed 'mine'"):
        containers.up(layout.Options(name="mine", inventory=tmp_path), home=tmp_path / "state")
    assert hosts.read_text() == layout.generated("other")


def test_what_is_not_up_can_be_taken_down_and_asked_for(tmp_path):
    assert containers.down("nothing", home=tmp_path) is False
    assert containers.status("nothing", home=tmp_path) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", "A", "x" * 32, "a b", "x\n"])
def test_a_name_is_a_plain_word(name, tmp_path):
    for act in (containers.down, containers.status):
        with pytest.raises(UsageError, match="use lower-case letters"):
            act(name, home=tmp_path)


def test_a_damaged_record_is_named_with_the_way_out(tmp_path):
    (tmp_path / "x.json").write_text('{"schema": 1, "na')
    with pytest.raises(InfrastructureError, match=r"x.json is damaged: remove the containers that `podman ps"):
        containers.status("x", home=tmp_path)


def test_only_one_command_works_on_a_testbed_at_a_time(tmp_path):
    with containers._locked(tmp_path / "x.json"):
        with containers._locked(tmp_path / "y.json"):
            pass
        with (
            pytest.raises(InfrastructureError, match="another `runner testbed` is already working on 'x'"),
            containers._locked(tmp_path / "x.json"),
        ):
            pass
    with containers._locked(tmp_path / "x.json"):
        pass


@pytest.mark.parametrize("arguments", [["--nodes", "17"], ["--nodes", "0"], ["--cpus", "0"], ["--memory", "lots"]])
def test_impossible_options_are_refused_before_anything_starts(arguments):
    result = CliRunner().invoke(testbed.testbed, ["up", "--name", "never", *arguments])
    assert result.exit_code == 2 or isinstance(result.exception, UsageError)
    assert containers.status("never") == []


def test_importing_the_module_is_light():
    code = "import sys, json, runner.cli.testbed; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "ansible", "yaml", "rich", "pydantic"} & set(json.loads(out))
