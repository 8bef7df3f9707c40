"""Ansible and `runner` reach the same place: each of Ansible's variables is carried over, refused, or makes no difference."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from plans import request

from conftest import listing
from runner.cluster import inventory, known_hosts, reach, reasons, ssh
from runner.errors import UsageError
from runner.launch import copy, talk
from runner.plan import build
from runner.provision import playbook

ANSIBLE = Path(sys.executable).with_name("ansible")


def read(variables: dict, settings: dict | None = None) -> inventory.Node:
    return inventory.parse("inv", listing({"a": variables}), (), settings).nodes[0]


def resolved(config: Path | str, host: str) -> dict[str, str]:
    """What ssh makes of its configuration, by keyword; of several values the last line."""
    done = subprocess.run(["ssh", "-G", "-F", str(config), host], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@pytest.mark.parametrize(
    ("plugin", "table"), [("connection/ssh.py", reach.OPTIONS), ("become/sudo.py", reach.BECOME)], ids=["ssh", "sudo"]
)
def test_every_variable_of_ansibles_plugins_has_its_fate(plugin, table):
    """A new one of a newer Ansible makes this fail: decide what becomes of it."""
    import ansible

    text = Path(ansible.__file__).parent.joinpath("plugins", plugin).read_text()
    documented = yaml.safe_load(re.search(r'DOCUMENTATION = """(.*?)"""', text, re.DOTALL)[1])["options"]
    for option, entry in documented.items():
        names = tuple(variable["name"] for variable in entry.get("vars", ()))
        assert table[option].variables == names, option
    assert {"become", "become_method"} >= table.keys() - documented.keys() - {"sudo_chdir"}


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"ansible_ssh_port": 2201}, "Port 2201"),
        ({"ansible_port": 22, "ansible_ssh_port": 2201}, "Port 2201"),
        ({"ansible_ssh_user": "me"}, "User me"),
        ({"ansible_user": "other", "ansible_ssh_user": "me"}, "User me"),
        ({"ansible_private_key_file": "/k"}, 'IdentityFile "/k"'),
        ({"ansible_private_key_file": "/x", "ansible_ssh_private_key_file": "/k"}, 'IdentityFile "/k"'),
        ({"ansible_ssh_timeout": 42}, "ConnectTimeout 42"),
        ({"ansible_ssh_common_args": "-o ProxyJump=me@bastion:2222"}, "ProxyJump me@bastion:2222"),
        ({"ansible_ssh_common_args": "-J one,two"}, "ProxyJump one,two"),
        ({"ansible_ssh_extra_args": "-oForwardAgent=yes"}, "ForwardAgent yes"),
        ({"ansible_ssh_args": "-C -4 -o 'Ciphers aes256-ctr'"}, "Ciphers aes256-ctr"),
        (
            {"ansible_ssh_common_args": '-o ProxyCommand="ssh -W %h:%p -q me@bastion"'},
            "ProxyCommand ssh -W %h:%p -q me@bastion",
        ),
        (
            {"ansible_host": "10.0.0.7", "ansible_ssh_common_args": "-o 'ProxyCommand=connect %n %%n %p'"},
            "ProxyCommand connect 10.0.0.7 %%n %p",
        ),
        ({"ansible_ssh_extra_args": "-vvvi ~/.ssh/k -tt"}, "IdentityFile ~/.ssh/k"),
        ({"ansible_ssh_extra_args": "-l me -p 2200"}, "Port 2200"),
        ({"ansible_ssh_common_args": "-F '/etc/my ssh'"}, 'Include "/etc/my ssh"'),
        ({"ansible_ssh_args": "-F none -J b"}, 'Include "/dev/null"'),  # not the user's own configuration
    ],
)
def test_what_reaches_a_host_is_carried_over(variables, line):
    assert line in read(variables).ssh_options.splitlines()


def test_the_first_of_ansibles_command_line_counts_as_it_does_for_ssh(tmp_path):
    node = read({"ansible_ssh_args": "-o Port=1111", "ansible_port": 2222, "ansible_ssh_common_args": "-p 3333 -l z"})
    assert (node.port, node.user) == (1111, "z")
    config = tmp_path / "config"
    config.write_text("Host a\n" + node.ssh_options)
    assert resolved(config, "a")["port"] == "1111"


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ansible_password": "hunter2"}, "ansible_password: nodes are reached with a key"),
        ({"ansible_ssh_pass": "hunter2"}, "ansible_ssh_pass: nodes are reached with a key"),
        ({"ansible_ssh_private_key": "hunter2"}, "ansible_ssh_private_key: a key is read from a file"),
        ({"ansible_ssh_pkcs11_provider": "/x.so"}, "ansible_ssh_pkcs11_provider: a key that needs a PIN"),
        ({"ansible_host_key_checking": False}, "ansible_host_key_checking: host keys are always checked"),
        ({"ansible_ssh_host_key_checking": "no"}, "ansible_ssh_host_key_checking: host keys are always checked"),
        ({"ansible_ssh_common_args": "-o StrictHostKeyChecking=no"}, "StrictHostKeyChecking no: host keys are always"),
        ({"ansible_ssh_executable": "/opt/ssh"}, "ansible_ssh_executable: `ssh` is started from PATH"),
        ({"ansible_connection": "paramiko"}, "ansible_connection 'paramiko' is not supported"),
        ({"ansible_connection": "community.docker.docker"}, "ansible_connection 'community.docker.docker'"),
        ({"ansible_ssh_prviate_key_file": "/k"}, "did you mean 'ansible_ssh_private_key_file'"),
        ({"ansible_ssh_usr": "me"}, "did you mean 'ansible_ssh_user'"),
        ({"ansible_ssh_extra_args": "-o Prot=22"}, "ssh refuses 'Prot 22': Bad configuration option: prot"),
        ({"ansible_ssh_extra_args": "-o Port=s"}, "ssh refuses 'Port s': Bad port"),
        ({"ansible_ssh_extra_args": "-L 1:a:2"}, "-L: `runner` starts its own commands"),
        ({"ansible_ssh_extra_args": "-o RemoteCommand=id"}, "RemoteCommand: `runner` starts its own commands"),
        ({"ansible_ssh_extra_args": "-Z"}, "option -z not recognized"),
        ({"ansible_ssh_common_args": "-o ProxyCommand=ssh -W %h:%p b"}, "'b' is not an option of ssh: quote"),
        ({"ansible_ssh_common_args": "-o 'ProxyJump=b"}, "no closing quotation"),
        ({"ansible_port": "ssh"}, "ansible_port = 'ssh': not a port"),
        ({"ansible_become": True, "ansible_user": "u", "ansible_become_pass": "hunter2"}, "NOPASSWD"),
        ({"ansible_become": True, "ansible_user": "u", "ansible_become_method": "su"}, "only sudo is supported"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(variables, told):
    with pytest.raises(UsageError, match=re.escape(told)) as error:
        read(variables)
    assert "\n" not in str(error.value) and "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"ansible_scp_extra_args": "-O", "ansible_sftp_extra_args": "-q", "ansible_ssh_transfer_method": "piped"},
        {"ansible_ssh_args": "-C -o ControlMaster=auto -o ControlPersist=60s -o ServerAliveInterval=30"},
        {"ansible_ssh_executable": shutil.which("ssh"), "ansible_host_key_checking": "yes"},
        {"ansible_become": True, "ansible_user": "root"},
        {"ansible_become": False, "ansible_become_pass": "x"},
        {"ansible_ssh_common_args": "-o PermitLocalCommand=no -o RemoteCommand=none -oTunnel=no -o GatewayPorts=No"},
        {"ansible_ssh_public_key_file": "~/.ssh/id.pub", "ansible_ssh_host_fingerprint": "SHA256:x"},  # one's own
        {"ansible_ssh_key": "~/k", "ansible_ssh_private_key_path": "/x", "ansible_ssh_user_name": "me"},
        {"ansible_ssh_host_key_ed25519_public": "AAAA"},
    ],
)
def test_what_makes_no_difference_changes_nothing(variables):
    node = read(variables)
    assert (node.ssh_options.replace("User root", ""), node.become) == ("", None)


def test_ansible_cfg_and_the_environment_count_where_no_variable_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.yml").write_text("all: {hosts: {a: {}, b: {ansible_port: 2}}}")
    (tmp_path / "ansible.cfg").write_text(
        "[defaults]\nremote_user = me\nremote_port = 1\n[ssh_connection]\nssh_common_args = -o ProxyJump=bastion\n"
    )
    first, second = inventory.read("hosts.yml", tmp_path / "cache").nodes
    assert first.ssh_options.splitlines() == ["Port 1", "User me", "ProxyJump bastion"]
    assert (second.port, second.user) == (2, "me")
    monkeypatch.setenv("ANSIBLE_REMOTE_USER", "you")
    assert inventory.read("hosts.yml", tmp_path / "cache").nodes[0].user == "you"
    monkeypatch.setenv("ANSIBLE_HOST_KEY_CHECKING", "false")
    with pytest.raises(UsageError, match=r"host_key_checking of ansible\.cfg or the environment: host keys are always"):
        inventory.read("hosts.yml", tmp_path / "cache")


def test_templates_are_rendered_by_ansible(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.yml").write_text(
        "all: {hosts: {a: {}}, vars: {jump: bastion, ansible_ssh_common_args: '-J {{ jump }} -F {{ inventory_dir }}/c',"
        " runner_alias: '{{ inventory_hostname | upper }}'}}"
    )
    node = inventory.read(str(tmp_path), tmp_path / "cache").nodes[0]
    assert node.ssh_options == f'ProxyJump bastion\nInclude "{tmp_path}/c"' and node.alias == "A"
    (tmp_path / "hosts.yml").write_text("all: {hosts: {a: {ansible_port: '{{ nowhere }}'}}}")
    with pytest.raises(UsageError, match="a: ansible_port cannot be rendered: 'nowhere' is undefined") as error:
        inventory.read(str(tmp_path), tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_template_may_ask_for_the_bastion_by_hostvars(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.ini").write_text(
        "bastion ansible_host=203.0.113.5 ansible_user='{{ who }}' who=jump\r\n[gpu_nodes]\r\ngpu-[a:b]:2222\r\n"
        "[gpu_nodes:vars]\r\nansible_ssh_common_args=\"{% if 'bastion' in groups['all'] %}-o ProxyCommand='ssh -W %h:%p"
        " -p {{ hostvars['bastion'].ansible_port | default(22) }} {{ hostvars['bastion']['ansible_user'] }}"
        "@{{ hostvars['bastion'].ansible_host }}'{% endif %}\"\r\n"
    )
    node = inventory.read("hosts.ini", tmp_path / "cache").nodes[1]
    assert node.ssh_options.splitlines() == ["Port 2222", "ProxyCommand ssh -W %h:%p -p 22 jump@203.0.113.5"]


def test_what_cannot_be_read_of_a_host_matters_where_the_host_is_used(tmp_path, monkeypatch):
    """A vault stays closed for what is not needed, without its password too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.yml").write_text(
        "gpu_nodes: {hosts: {a: {}}}\n"
        "others: {hosts: {win: {ansible_connection: winrm, ansible_host: '{{ nowhere }}'}}}\n"
    )
    (tmp_path / "password").write_text("x")
    sealed = {
        name: subprocess.run(
            [ANSIBLE.with_name("ansible-vault"), "encrypt_string", "--vault-password-file", "password", "-n", name, "me"],
            capture_output=True, text=True, check=True,
        ).stdout
        for name in ("ansible_become_pass", "my_token", "ansible_user")
    }  # fmt: skip
    (tmp_path / "group_vars").mkdir()
    beside = tmp_path / "group_vars" / "gpu_nodes.yml"
    beside.write_text(sealed["ansible_become_pass"] + sealed["my_token"])
    assert [node.name for node in inventory.read("hosts.yml", tmp_path / "cache").nodes] == ["a"]
    beside.write_text(sealed["ansible_user"])
    with pytest.raises(UsageError, match=r"a: ansible_user cannot be rendered: .*Set ANSIBLE_VAULT_PASSWORD_FILE$"):
        inventory.read("hosts.yml", tmp_path / "cache")
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", "password")
    assert inventory.read("hosts.yml", tmp_path / "cache").nodes[0].user == "me"


@pytest.mark.parametrize("address", ["fe80::1%eth0", "fe80::1:2%enp1s0.5", "2001:db8::7", "::1"])
def test_an_ipv6_address_with_a_zone_reaches_ssh_unchanged(tmp_path, address):
    read_in = inventory.parse("inv", listing({"a": {"ansible_host": address, "ansible_port": 2222}}))
    config = tmp_path / "config"
    config.write_text(ssh.ssh_config(read_in, "/k"))
    for word in ("a", "node001", address):
        assert resolved(config, word)["hostname"] == address and resolved(config, word)["port"] == "2222"
    assert read_in.nodes[0].endpoint == f"[{address}]:2222"


CPU = {"runner_gpus_per_node": 2, "runner_device": "cpu", "runner_python": "/p"}


def test_a_node_that_is_the_jump_host_of_the_others_is_not_reached_through_itself(tmp_path):
    hosts = {name: {"ansible_ssh_common_args": "-J me@gpu-a:22"} for name in ("gpu-a", "gpu-b")}
    config = tmp_path / "config"
    config.write_text(ssh.ssh_config(inventory.parse("inv", listing(hosts)), "/k"))
    assert resolved(config, "gpu-b")["proxyjump"].startswith("me@gpu-a") and "proxyjump" not in resolved(
        config, "gpu-a"
    )


def test_nodes_behind_one_address_are_told_apart_by_their_ports_for_ansible_as_well(tmp_path, keys):
    hosts = {
        name: {"ansible_host": "203.0.113.7", "ansible_port": port, "runner_host_key": public(keys[key]),
               "ansible_ssh_common_args": "-J bastion"}
        for name, port, key in (("gpu-a", 2201, "host"), ("gpu-b", 2202, "other"))
    }  # fmt: skip
    read_in = inventory.parse("inv", listing(hosts))
    config = tmp_path / "config"
    config.write_text(ssh.ssh_config(read_in, str(tmp_path / "known")))
    (tmp_path / "known").write_text(ssh.known_hosts(read_in))
    assert (resolved(config, "gpu-a")["port"], resolved(config, "node002")["port"]) == ("2201", "2202")
    by_address = resolved(config, "203.0.113.7")
    assert by_address["proxyjump"] == "bastion" and "hostkeyalias" not in by_address
    asked = ["ssh-keygen", "-F", "[203.0.113.7]:2202", "-f", tmp_path / "known"]
    assert public(keys["other"]) in subprocess.run(asked, capture_output=True, text=True, check=True).stdout


def test_an_address_with_a_zone_is_not_given_to_other_nodes():
    hosts = {name: {**CPU, "ansible_host": f"fe80::{n}%eth0"} for n, name in enumerate("ab", start=1)}
    read_in = inventory.parse("inv", listing(hosts))
    with pytest.raises(UsageError, match="a: ansible_host fe80::1%eth0 has a zone"):
        build.build(request(read_in, node_counts=(2,)), read_in.nodes)
    build.build(request(read_in, node_counts=(1,)), read_in.nodes)


def test_become_is_carried_over_by_sudo_and_not_into_an_engine_that_logs_in_itself(monkeypatch):
    read_in = inventory.parse("inv", listing({"a": {**CPU, "ansible_user": "ubuntu", "ansible_become": True}}))
    nodes = read_in.nodes
    assert talk.ssh(nodes[0], ["-m", "x"], "F")[-1] == "exec sudo -n -H -u root -- /p -m x"
    commands = []
    monkeypatch.setattr(copy.process, "run", lambda argv, **_: commands.append(argv) or SimpleOutcome())
    copy.send(nodes, "F", "/from", "/to")
    copy.gather(nodes, "F", "/from", {"a": "/to"})
    assert all("--rsync-path=sudo -n -H -u root -- rsync" in argv for argv in commands) and len(commands) == 2
    with pytest.raises(UsageError, match="a: ansible_become: engine deepspeed starts ranks as the user that logs in"):
        build.build(request(read_in, node_counts=(1,), engine="deepspeed"), nodes)


class SimpleOutcome:
    rc, stderr = 0, ""


# --- known_hosts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    names = ("host", "other", "authority", "client")
    for name in names:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    return {name: folder / name for name in names}


def public(key: Path) -> str:
    return " ".join(key.with_suffix(".pub").read_text().split()[:2])


def hashed(name: str, key: str, folder: Path) -> str:
    """The line in which `ssh-keygen -H` hides the name."""
    file = folder / "to_hash"
    file.write_text(f"{name} {key}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", file], check=True, capture_output=True)
    return file.read_text().strip()


FORMS = {
    "a name": "gpu-a KEY",
    "an address": "10.0.0.7 KEY",
    "a port": "[10.0.0.7]:2222 KEY",
    "a list": "x,[gpu-a]:2222,y KEY",
    "tabs": "gpu-a\t KEY",
    "blanks before": "   gpu-a KEY  a comment",
    "capitals": "GPU-A KEY",
    "a pattern": "gpu-* KEY",
    "a pattern with a port": "[10.0.0.?]:2222 KEY",
    "a negation": "gpu-*,!gpu-b KEY",
    "an alias": "node001 KEY",
    "an authority": "@cert-authority gpu-* KEY",
    "revoked as well": "gpu-a KEY\n@revoked * ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOther",
}


@pytest.mark.parametrize("form", [*FORMS, "hashed", "hashed with a port"])
def test_a_known_key_is_found_in_every_form_as_ssh_finds_it(form, keys, tmp_path):
    key = public(keys["host"])
    if form.startswith("hashed"):
        text = hashed("[10.0.0.7]:2222" if "port" in form else "gpu-a", key, tmp_path)
    else:
        text = FORMS[form].replace("KEY", key)
    (tmp_path / "known").write_text(text + "\n")
    words = [word for name in ("10.0.0.7", "gpu-a", "node001") for word in (name, f"[{name}]:2222")]
    asked = [subprocess.run(["ssh-keygen", "-F", w, "-f", tmp_path / "known"], capture_output=True) for w in words]
    assert any(done.returncode == 0 for done in asked), "ssh-keygen itself finds it"
    read_in = inventory.parse(
        "inv", listing({"gpu-a": {"ansible_host": "10.0.0.7", "ansible_port": 2222}, "gpu-b": {}}), text.splitlines()
    )
    lines = [line for line in ssh.known_hosts(read_in).splitlines() if key in line]
    config = tmp_path / "config"
    config.write_text(ssh.ssh_config(read_in, "/pins"))
    alias = resolved(config, "gpu-a")["hostkeyalias"]
    marker = "@cert-authority " if form == "an authority" else ""
    assert any(line.startswith(f"{marker}{alias} {key}") for line in lines)
    assert "userknownhostsfile /pins" in f"userknownhostsfile {resolved(config, 'gpu-a')['userknownhostsfile']}"


@pytest.mark.parametrize(
    "text",
    [
        "gpu-ab KEY", "gpu-*,!gpu-a KEY", "[gpu-a]:22 KEY", "# gpu-a KEY", "gpu-a", "|1|bad|bad KEY", "gpu.a KEY",
        "@unknown gpu-a KEY", "10.0.0.70 KEY", "gpu-b KEY \x85gpu-a KEY", "gpu-b KEY \u2028gpu-a KEY",
        "gpu-b KEY\x0cgpu-a KEY", "gpu-b KEY\rgpu-a KEY", "gpu-a , gpu-b KEY", "gpu-a\xa0KEY",
    ],
)  # fmt: skip
def test_a_line_for_another_host_is_no_key_of_this_one(text, keys):
    lines = known_hosts.lines(text.replace("KEY", public(keys["host"])).encode())
    read_in = inventory.parse("inv", listing({"gpu-a": {"ansible_host": "10.0.0.7", "ansible_port": 2222}}), lines)
    assert public(keys["host"]) not in ssh.known_hosts(read_in)


@pytest.mark.parametrize("line", ["gpu-a 1024 35 1234567890", "gpu-a ssh-ed25519 no!key", "gpu-a , gpu-b ssh-rsa AAAA"])
def test_a_line_that_ssh_passes_over_is_no_pin(line):
    read_in = inventory.parse("inv", listing({"gpu-a": {}}), [line])
    assert line not in ssh.known_hosts(read_in) and "GlobalKnownHostsFile /dev/null" not in ssh.ssh_config(
        read_in, "/k"
    )


def test_pins_may_have_windows_lines_and_comments_in_any_encoding(tmp_path, keys):
    (tmp_path / "hosts.yml").write_text("all: {hosts: {gpu-a: {}}}")
    (tmp_path / "known_hosts").write_bytes(f"# caf\xe9\r\ngpu-a {public(keys['host'])} caf\xe9\r\n".encode("latin-1"))
    text = ssh.known_hosts(inventory.read(str(tmp_path), tmp_path / "cache"))
    assert text.startswith(f"gpu-a {public(keys['host'])} caf") and "\r" not in text


def test_ones_own_known_hosts_holds_where_the_inventory_has_no_pin(tmp_path, monkeypatch, keys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "known_hosts").write_text(hashed("10.0.0.7", public(keys["host"]), tmp_path) + "\n")
    hosts = {"gpu-a": {"ansible_host": "10.0.0.7"}, "gpu-b": {"runner_host_key": public(keys["other"])}}
    read_in = inventory.parse("inv", listing(hosts))
    assert ssh.known_hosts(read_in).splitlines() == [f"gpu-a {public(keys['host'])}", f"gpu-b {public(keys['other'])}"]


@pytest.mark.parametrize(
    ("stderr", "kind", "told"),
    [
        ("No ED25519 host key is known for gpu-a and you have requested strict checking.\nHost key verification failed.",
         "host_key_unknown", "no host key of it is known: pin it with ssh-keyscan (10.0.0.7:22"),
        ("No ED25519 host key is known for [bastion]:2222 and you have requested strict checking.\n"
         "Host key verification failed.", "host_key_unknown", "on the way to it: bastion"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
         "host_key_changed", "differs from the pinned one"),
        ("The ED25519 host key for gpu-a is marked as revoked.\nHost key verification failed.",
         "host_key_changed", "revoked"),
        ("me@bastion: Permission denied (publickey).\nConnection closed by UNKNOWN port 65535",
         "refused_key", "on the way to it: bastion"),
        ("root@10.0.0.7: Permission denied (publickey).", "refused_key", "it refuses the key for this user (10.0.0.7:22"),
        ("ssh: connect to host bastion port 22: Connection refused\nConnection closed by UNKNOWN port 65535",
         "unreachable", "nothing listens on its SSH port, on the way to it: bastion"),
        ("kex_exchange_identification: Connection closed by remote host\n"
         "ssh: connect to host bastion port 22: No route to host", "unreachable", "on the way to it: bastion"),
        ("channel 0: open failed: connect failed: Connection refused\nstdio forwarding failed\n"
         "kex_exchange_identification: Connection closed by remote host\nConnection closed by UNKNOWN port 65535",
         "unreachable", "nothing listens on its SSH port (10.0.0.7:22"),
        ("channel 0: open failed: connect failed: Name or service not known\nstdio forwarding failed\n"
         "Connection closed by UNKNOWN port 65535", "unreachable", "does not resolve on the jump host (10.0.0.7:22"),
        ("ssh: Could not resolve hostname bastion: Name or service not known\nConnection closed by UNKNOWN port 65535",
         "unreachable", "its name does not resolve, on the way to it: bastion"),
    ],
)  # fmt: skip
def test_each_reason_of_ssh_has_its_own_words(stderr, kind, told):
    node = inventory.parse("inv", listing({"gpu-a": {"ansible_host": "10.0.0.7"}})).nodes[0]
    assert reasons.reason_kind(255, stderr.splitlines()) == kind
    assert told in reasons.explain(node, 255, stderr.splitlines())


# --- against a real sshd, through a real jump host --------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def sshd(folder: Path, host_key: Path, authorized: Path, *more: str) -> Iterator[int]:
    """An sshd of this user's on a port of this machine."""
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(program).exists():
        pytest.skip("no sshd on this machine")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    port = free_port()
    lines = [
        f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {host_key}", f"AuthorizedKeysFile {authorized}",
        "PidFile none", "StrictModes no", "UsePAM no", "PasswordAuthentication no", *more,
    ]  # fmt: skip
    config = folder / f"sshd_{port}"
    config.write_text("\n".join([*lines, ""]))
    with open(folder / f"log_{port}", "w") as log:
        server = subprocess.Popen([program, "-D", "-e", "-f", config], stderr=log)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"ansible_ssh_private_key_file": "keys/id"}, 'IdentityFile "{here}/keys/id"'),
        ({"ansible_private_key_file": "./id"}, 'IdentityFile "{here}/id"'),
        ({"ansible_ssh_common_args": "-i keys/id"}, 'IdentityFile "{here}/keys/id"'),
        (
            {"ansible_ssh_extra_args": "-o 'CertificateFile=\"my keys/id-cert.pub\"'"},
            'CertificateFile "{here}/my keys/id-cert.pub"',
        ),
        ({"ansible_ssh_args": "-o UserKnownHostsFile=known"}, '"{here}/known"'),
        ({"ansible_ssh_private_key_file": "~/.ssh/id"}, 'IdentityFile "~/.ssh/id"'),
        ({"ansible_ssh_private_key_file": "/keys/id"}, 'IdentityFile "/keys/id"'),
        ({"ansible_ssh_common_args": "-o IdentityFile=%d/id"}, "IdentityFile %d/id"),
        ({"ansible_ssh_common_args": "-o IdentityFile=none"}, "IdentityFile none"),
    ],
)
def test_relative_paths_begin_in_the_users_folder_wherever_ssh_is_started(variables, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ssh.ssh_config(inventory.parse("inv", listing({"gpu-a": variables})), "/k")
    assert line.format(here=tmp_path) in config


# The words of other failures, in a banner and in what a login script prints.
WORDS = "Host key verification failed? Permission denied, Connection refused, No route to host: call 1234"


@pytest.mark.parametrize(
    ("failure", "kind", "told"),
    [
        ("another key", "refused_key", "it refuses the key for this user"),
        ("hangs up", "lost_connection", "it closed the connection"),
        ("no such program", "environment_missing", "has no "),
        ("no such module", "environment_missing", "lacks this package"),
        ("something else", "unknown", "the cause"),
    ],
)
def test_a_banner_and_a_login_script_of_a_real_sshd_change_nothing(failure, kind, told, tmp_path, keys):
    authorized = tmp_path / "authorized"
    key = keys["other" if failure == "another key" else "client"]
    ends = {
        "hangs up": "kill -9 $PPID; sleep 5",
        "no such program": "/no/such/python -m runner.node",
        "no such module": f"exec {sys.executable} -m no_such_module",
        "something else": "echo the cause >&2; exit 1",
    }
    login = f"echo '{WORDS}' >&2; {ends.get(failure, 'true')}"
    authorized.write_text(f'command="{login}" ' + key.with_suffix(".pub").read_text())
    (tmp_path / "banner").write_text(f"{WORDS}\n")
    host_key = tmp_path / "host"
    shutil.copy(keys["host"], host_key)
    with sshd(tmp_path, host_key, authorized, f"Banner {tmp_path}/banner") as port:
        variables = {"ansible_host": "127.0.0.1", "ansible_port": port, "ansible_private_key_file": str(keys["client"])}
        read_in = inventory.parse("inv", listing({"gpu-a": variables}), [f"127.0.0.1 {public(keys['host'])}"])
        with ssh.rendered(read_in) as config:
            command = ["ssh", "-F", config, "-o", "LogLevel=INFO", "gpu-a", "true"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    assert WORDS in lines
    assert reasons.reason_kind(done.returncode, lines) == kind, done.stderr
    assert told in reasons.explain(read_in.nodes[0], done.returncode, lines), done.stderr


@pytest.mark.parametrize(
    "form", ["an address", "an address with its port", "hashed", "a name", "an authority", "unknown"]
)
def test_a_real_sshd_is_reached_where_its_key_is_known_in_whatever_form(form, tmp_path, keys):
    authorized = tmp_path / "authorized"
    authorized.write_text(keys["client"].with_suffix(".pub").read_text())
    host_key = tmp_path / "host"
    for suffix in ("", ".pub"):
        shutil.copy(f"{keys['host']}{suffix}", f"{host_key}{suffix}")
    sign = ["ssh-keygen", "-q", "-s", keys["authority"], "-I", "x", "-h", "-n", "127.0.0.1", f"{host_key}.pub"]
    more = [f"HostCertificate {host_key}-cert.pub"] if form == "an authority" else []
    if more:
        subprocess.run(sign, check=True)
    with sshd(tmp_path, host_key, authorized, *more) as port:
        key = public(keys["host"])
        lines = {
            "an address": f"127.0.0.1 {key}",
            "an address with its port": f"[127.0.0.1]:{port}\t{key}",
            "hashed": hashed(f"[127.0.0.1]:{port}", key, tmp_path),
            "a name": f"gpu-* {key}",
            "an authority": f"@cert-authority *,!10.* {public(keys['authority'])}",
            "unknown": f"elsewhere {key}",
        }
        variables = {"ansible_host": "127.0.0.1", "ansible_port": port, "ansible_private_key_file": str(keys["client"])}
        read_in = inventory.parse("inv", listing({"gpu-a": variables}), [lines[form]])
        with ssh.rendered(read_in) as config:
            done = subprocess.run(["ssh", "-F", config, "gpu-a", "true"], capture_output=True, text=True, timeout=60)
    if form == "unknown":
        stderr = done.stderr.splitlines()
        assert reasons.reason_kind(done.returncode, stderr) == "host_key_unknown", done.stderr
        assert "no host key of it is known" in reasons.explain(read_in.nodes[0], done.returncode, stderr)
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("pinned", "state"), [("host", "complete"), ("other", "failed")])
def test_setup_checks_the_host_key_as_bench_does(pinned, state, tmp_path, keys):
    """ansible-runner turns Ansible's check of host keys off, unless it is told; what the inventory says of ssh is in
    the file that both use, and does not go before it or in its place.
    """
    authorized = tmp_path / "authorized"
    authorized.write_text(keys["client"].with_suffix(".pub").read_text())
    book = tmp_path / "book.yml"
    book.write_text("- {hosts: all, gather_facts: false, tasks: [{name: It answers, ansible.builtin.raw: 'true'}]}")
    with sshd(tmp_path, keys["host"], authorized) as port:
        variables = {"ansible_host": "127.0.0.1", "ansible_port": port, "ansible_private_key_file": str(keys["client"]),
                     "ansible_python_interpreter": sys.executable, "runner_host_key": public(keys[pinned]),
                     "ansible_ssh_args": "-o HostKeyAlias=x", "ansible_ssh_extra_args": "-F /dev/null"}  # fmt: skip
        (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"gpu-a": variables}}}))
        events: list[playbook.Event] = []
        with ssh.rendered(inventory.read(str(tmp_path / "hosts.yml"), tmp_path / "cache")) as config:
            call = playbook.Call(str(book), str(tmp_path / "hosts.yml"), ("gpu-a",), config)
            ended, _ = playbook.play(call, events.append, lambda name, role: None)
    assert ended == state
    assert [event.status for event in events] == ["changed" if state == "complete" else "unreachable"]


# What of ssh's configuration decides where a connection goes, and as whom.
PLACE = (
    "hostname", "port", "user", "proxyjump", "proxycommand", "identityfile", "identitiesonly", "addressfamily",
)  # fmt: skip


def test_ansible_and_runner_reach_the_same_place_through_a_jump_host(tmp_path, monkeypatch, keys):
    """The bastion is an alias of one's own ssh configuration, as it is in the wild; the node refuses other sources."""
    monkeypatch.setenv("HOME", str(tmp_path))  # of Ansible; ssh asks the system for its user's home
    authorized = tmp_path / "authorized"
    authorized.write_text(keys["client"].with_suffix(".pub").read_text())
    known = tmp_path / "known"
    with sshd(tmp_path, keys["host"], authorized) as port, sshd(tmp_path, keys["other"], authorized) as jump:
        known.write_text(
            f"[127.0.0.1]:{port} {public(keys['host'])}\n{hashed(f'[127.0.0.1]:{jump}', public(keys['other']), tmp_path)}\n"
        )
        bastion = tmp_path / "bastion"
        bastion.write_text(
            f"Host bastion\n HostName 127.0.0.1\n Port {jump}\n IdentityFile {keys['client']}\n"
            f" UserKnownHostsFile {known}\n"
        )
        user = os.environ.get("USER") or "root"
        variables = {
            "ansible_ssh_host": "127.0.0.1",
            "ansible_ssh_port": port,
            "ansible_ssh_user": user,
            "ansible_private_key_file": str(keys["client"]),
            "ansible_python_interpreter": sys.executable,
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={known} -F {bastion}",
            "ansible_ssh_extra_args": "-o ProxyJump=bastion -4",
            "ansible_ssh_args": "",
        }
        source = tmp_path / "hosts.yml"
        source.write_text(yaml.safe_dump({"all": {"hosts": {"gpu-a": variables}}}))
        monkeypatch.chdir(tmp_path)
        told = subprocess.run(
            [ANSIBLE, "all", "-i", source, "-vvv", "-m", "ansible.builtin.raw", "-a", "echo $SSH_CONNECTION"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert told.returncode == 0, told.stdout + told.stderr
        command = shlex.split(re.search(r"SSH: EXEC (ssh .*)", told.stdout)[1])
        ansible = dict(
            line.split(" ", 1)
            for line in subprocess.run(
                [command[0], "-G", *command[1:]], capture_output=True, text=True, check=True
            ).stdout.splitlines()
            if " " in line
        )
        read_in = inventory.read(str(source), tmp_path / "cache")
        with ssh.rendered(read_in) as config:
            ours = resolved(config, "gpu-a")
            assert {key: ours.get(key) for key in PLACE} == {key: ansible.get(key) for key in PLACE}
            done = subprocess.run(
                ["ssh", "-F", config, "gpu-a", "echo $SSH_CONNECTION"], capture_output=True, text=True, timeout=30
            )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[2:] == ["127.0.0.1", str(port)]
        assert f"Accepted publickey for {user}" in (tmp_path / f"log_{jump}").read_text()
