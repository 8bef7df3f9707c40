"""The module of ssh_mesh on a node made of folders: a real ssh-keygen, stand-ins for sshd and ssh."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import pwd
import shutil
import subprocess
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from role_modules import carry_out, load

mesh = load("ssh_mesh")
pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen on this machine")

ONE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGretx4I+glC2jVyV7O/m4KAfzeDdwHCjeJvRwXi+Pmg"
TWO = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMLi3YgwnVO33MyYIO+e/GOvKhegQa7fCklQHaw3PE1s"
RSA = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ"
ROWS = [["gpu-1", "node001", "10.0.0.1", 44222, ""], ["gpu-2", "node002", "10.0.0.2", 44222, ""]]


def keygen(path, kind="ed25519"):
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "x", "-f", str(path)], check=True, timeout=20)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


class Machine:
    """A node: a home, ssh's folder, and an sshd and an ssh that answer as they are told."""

    def __init__(self, root):
        self.etc, self.home, self.bin = root / "etc", root / "home", root / "bin"
        for folder in (self.etc, self.home, self.bin):
            folder.mkdir(mode=0o755)
        (self.etc / "ssh_config").write_text(f"Include {self.etc}/ssh_config.d/*.conf\nHost *\n")
        self.host_key = keygen(self.etc / "host_key")
        self.sshd()
        self.program("ssh", 'echo "$@" >> "$0.log"; exit 0')

    def program(self, name, script):
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n# A stand-in for {name}.\n{script}\n")
        path.chmod(0o755)

    def sshd(self, **values):
        settings = {
            "port": "44222", "pubkeyauthentication": "yes", "permitrootlogin": "prohibit-password",
            "strictmodes": "yes", "hostkey": self.etc / "host_key",
            "authorizedkeysfile": ".ssh/authorized_keys /etc/ssh/shared_keys", **values,
        }  # fmt: skip
        lines = [f"{keyword} {value}" for keyword, value in settings.items()]
        (self.etc / "sshd-T").write_text("\n".join(lines) + "\n")
        self.program("sshd", f"cat {self.etc}/sshd-T")

    def account(self, name):
        if name == "nobody-here":
            raise KeyError(name)
        return pwd.struct_passwd((name, "x", os.geteuid(), os.getegid(), "", str(self.home), "/bin/sh"))

    def __call__(self, phase, check=False, also=None, **changes):
        settings = {
            "user": "root", "accept_new_host_keys": False, "verify_peers": 15, "connect_timeout_s": 5,
            "name": "gpu-1", "nodes": ROWS, "peers": ["gpu-1", "gpu-2"], **changes,
        }  # fmt: skip
        phases = {
            name: functools.partial(f, account=self.account, etc=str(self.etc)) for name, f in mesh.PHASES.items()
        }
        return carry_out(phases, phase, settings, check, also=also)

    def converge(self, **changes):
        own = self("install").facts
        other = {"name": "gpu-2", "address": "", "host_keys": [TWO], "public_key": TWO}
        return self("configure", **{"seen": [own, other], **changes})

    def file(self, name):
        folders = {"authorized_keys": self.home / ".ssh", "90-shakedown.conf": self.etc / "ssh_config.d"}
        return folders.get(name, self.etc) / name


@pytest.fixture
def node(tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Machine(tmp_path)


def found(answer, what):
    return [problem["found"] for problem in answer.problems if what in problem["what"]]


# --- a node from nothing ---


def test_a_bare_node_gets_a_key_pair_pins_and_a_client_configuration(node):
    assert node("validate").ok
    answer = node.converge()
    assert answer.ok and answer.changed
    private = node.home / ".ssh" / "id_ed25519"
    assert private.stat().st_mode & 0o777 == 0o600 and (node.home / ".ssh").stat().st_mode & 0o777 == 0o700
    assert node.file("ssh_known_hosts").read_text().splitlines() == [
        f"[10.0.0.1]:44222,[gpu-1]:44222,[node001]:44222 {node.host_key} shakedown-mesh:gpu-1",
        f"[10.0.0.2]:44222,[gpu-2]:44222,[node002]:44222 {TWO} shakedown-mesh:gpu-2",
    ]
    assert f"{TWO} shakedown-mesh:gpu-2" in node.file("authorized_keys").read_text()
    assert node.file("authorized_keys").stat().st_mode & 0o777 == 0o600


def test_the_client_configuration_is_read_by_ssh_itself(node):
    node.converge()
    ssh = [p for p in ("/usr/bin/ssh", "/bin/ssh") if os.path.exists(p)]
    if not ssh:
        pytest.skip("no ssh on this machine")
    for spelling in ("gpu-2", "node002", "10.0.0.2"):
        argv = [ssh[0], "-G", "-F", str(node.file("90-shakedown.conf")), spelling]
        text = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True).stdout
        assert "\nport 44222\n" in text and "hostname 10.0.0.2\n" in text and "stricthostkeychecking true" in text


def test_a_second_run_changes_nothing(node):
    node.converge()
    assert not node("install").changed and not node.converge().changed


def test_a_second_run_reads_in_validate_what_install_would_and_verifies_in_configure(node):
    assert not node("validate", also="install").also and not (node.home / ".ssh").exists()
    node.converge()
    found = node("validate", also="install")
    assert found.also and not found.changed and node("install").facts.items() <= found.facts.items()
    answer = node.converge(also="verify")
    assert answer.also and answer.facts["reached"] == 2


@pytest.mark.parametrize("name", ["authorized_keys", "ssh_known_hosts", "90-shakedown.conf"])
def test_drift_is_mended_by_a_second_run_and_then_verified_by_a_call_of_its_own(node, name):
    node.converge()
    text = node.file(name).read_text()
    node.file(name).write_text("".join(line for line in text.splitlines(True) if "gpu-2" not in line))
    answer = node.converge(also="verify")
    assert answer.changed and not answer.also and node.file(name).read_text() == text


def test_a_peer_that_does_not_answer_is_left_to_verify(node):
    node.converge()
    node.program("ssh", "exit 255")
    assert not node.converge(also="verify").also and node("verify").facts["reached"] == 0


def test_a_key_that_is_gone_or_open_is_installed_by_a_second_run(node):
    node.converge()
    (node.home / ".ssh" / "id_ed25519").chmod(0o644)
    assert not node("validate", also="install").also
    (node.home / ".ssh" / "id_ed25519").unlink()
    assert not node("validate", also="install").also and node("install").changed


def test_check_mode_shows_every_file_and_makes_none(node):
    own = node("install", check=True)
    assert own.changed and "made by this run" in own.facts["public_key"]
    answer = node("configure", check=True, seen=[own.facts])
    headers = " ".join(diff["after_header"] for diff in answer.diff)
    assert all(name in headers for name in ("ssh_known_hosts", "90-shakedown.conf", "authorized_keys"))
    assert not (node.home / ".ssh").exists() and not node.file("ssh_known_hosts").exists()


def test_the_private_key_is_in_no_answer(node):
    answer = node("install")
    text = (node.home / ".ssh" / "id_ed25519").read_text()
    assert not any(line in str(answer.__dict__) for line in text.splitlines()[1:-1])


def test_a_key_pair_that_is_there_is_used_and_repaired(node):
    (node.home / ".ssh").mkdir(0o700)
    public = keygen(node.home / ".ssh" / "id_ed25519")
    (node.home / ".ssh" / "id_ed25519").chmod(0o644)
    (node.home / ".ssh" / "id_ed25519.pub").write_text(f"{TWO} of another key\n")
    answer = node("install")
    assert answer.facts["public_key"] == public and answer.changed
    assert (node.home / ".ssh" / "id_ed25519").stat().st_mode & 0o777 == 0o600
    assert (node.home / ".ssh" / "id_ed25519.pub").read_text().startswith(public)


def test_what_a_killed_run_left_does_not_stop_the_next(node):
    (node.home / ".ssh").mkdir(0o700)
    (node.home / ".ssh" / ".shakedown-left").mkdir()
    (node.home / ".ssh" / ".authorized_keys.left").write_text("half")
    assert node.converge().ok


def test_configure_without_install_says_what_to_run(node):
    assert "run `runner setup --tags ssh_mesh`" in node("configure", seen=[]).msg


# --- files that belong to others too ---


def test_the_lines_of_others_stay_where_they_are(node):
    (node.home / ".ssh").mkdir(0o700)
    node.file("authorized_keys").write_text(f"# mine\n{ONE} me@laptop")
    node.file("ssh_known_hosts").write_text(f"github.com {RSA}\n")
    node.converge()
    assert node.file("authorized_keys").read_text().startswith(f"# mine\n{ONE} me@laptop\nssh-ed25519 ")
    assert node.file("ssh_known_hosts").read_text().startswith(f"github.com {RSA}\n[10.0.0.1]")


def test_bytes_that_are_no_utf8_are_never_rewritten(node):
    (node.home / ".ssh").mkdir(0o700)
    node.file("authorized_keys").write_bytes(b"ssh-ed25519 AAAA caf\xe9\n")
    answer = node.converge()
    assert found(answer, "authorized_keys") == ["other bytes"]
    assert node.file("authorized_keys").read_bytes() == b"ssh-ed25519 AAAA caf\xe9\n"


LINES = st.lists(
    st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=["Cs", "Zl", "Zp", "Cc"]), max_size=30)
)


@given(
    LINES, st.booleans(), st.dictionaries(st.from_regex(r"[a-z0-9-]{1,8}", fullmatch=True), st.just([ONE]), min_size=1)
)
def test_replacing_is_stable_and_touches_no_line_of_others(lines, ended, entries):
    text = "\n".join(lines) + ("\n" if ended else "")
    if mesh.ours(text):
        return
    once = mesh.replaced(text, entries)
    assert mesh.ours(once) == entries
    assert mesh.replaced(once, entries) == once
    assert [line for line in once.split("\n") if line and mesh.TAG not in line] == [line for line in lines if line]


def test_a_user_who_appends_a_line_causes_no_change():
    text = mesh.replaced("a\n", {"gpu-1": [ONE]}) + f"{TWO} new@laptop\n"
    assert mesh.replaced(text, {"gpu-1": [ONE]}) == text


@given(st.text())
def test_any_text_can_be_read_for_pins(text):
    assert isinstance(mesh.read_pins(text), dict)


def test_what_is_written_is_read_back():
    pins = {
        "a": mesh.Pinned(["10.0.0.1", "a"], 44222, [ONE, RSA]),
        "b": mesh.Pinned(["fd00::2", "b"], 44222, [TWO]),
        "c": mesh.Pinned(["c"], 22, [TWO]),
    }
    assert mesh.read_pins(mesh.replaced("", mesh.known_hosts(pins))) == pins


# --- nodes that are not in this run, come or go ---


def test_a_node_that_is_not_in_this_run_keeps_its_entries(node):
    node.converge()
    before = node.file("ssh_known_hosts").read_text(), node.file("authorized_keys").read_text()
    answer = node("configure", seen=[node("install").facts])
    assert answer.ok and not answer.changed
    assert (node.file("ssh_known_hosts").read_text(), node.file("authorized_keys").read_text()) == before


def test_a_node_that_left_the_inventory_loses_its_entries(node):
    node.converge()
    node("configure", nodes=ROWS[:1], seen=[node("install").facts])
    for name in ("ssh_known_hosts", "authorized_keys", "90-shakedown.conf"):
        assert "gpu-2" not in node.file(name).read_text()


def test_an_address_that_moved_belongs_to_the_node_that_was_seen_with_it():
    pins = {"old": mesh.Pinned(["10.0.0.9", "old"], 22, [ONE])}
    members = {name: mesh.Member(name, "", address, 22, "") for name, address in (("old", ""), ("new", "10.0.0.9"))}
    merged = mesh.merged(pins, [{"name": "new", "address": "", "host_keys": [TWO]}], members)
    assert merged["new"].hosts == ["10.0.0.9", "new"] and merged["old"].hosts == ["old"]


# --- reasons to stop ---


def test_a_changed_host_key_is_named_with_both_fingerprints(node):
    node.converge()
    old = node.host_key
    for name in ("host_key", "host_key.pub"):
        (node.etc / name).unlink()
    new = keygen(node.etc / "host_key")
    answer = node("validate")
    (problem,) = answer.problems
    assert problem["what"] == "changed host key"
    assert mesh.fingerprint(old) in problem["expected"] and mesh.fingerprint(new) in problem["found"]
    assert node("validate", accept_new_host_keys=True).ok
    assert found(node("verify"), "changed host key")
    assert node.converge().changed and node("verify").ok


def test_a_reinstalled_node_that_has_forgotten_is_recognised_by_what_others_pinned(node):
    assert mesh.fingerprint(ONE) in node("validate", pinned=[ONE]).problems[0]["expected"]


@pytest.mark.parametrize(
    ("pinned", "offered", "changed"),
    [
        ([ONE], [ONE], []),
        ([ONE, RSA], [ONE], []),
        ([ONE], [ONE, RSA], []),
        ([ONE], [TWO], [ONE]),
        ([ONE, RSA], [TWO, RSA], [ONE]),
        ([ONE], [RSA], [ONE]),
        ([], [ONE], []),
    ],
)
def test_a_key_type_may_come_or_go_but_not_change(pinned, offered, changed):
    assert mesh.changed_keys(pinned, offered) == changed


def test_a_fingerprint_is_the_one_that_ssh_keygen_prints(node):
    out = subprocess.run(
        ["ssh-keygen", "-lf", node.etc / "host_key"], capture_output=True, text=True, timeout=20
    ).stdout
    assert mesh.fingerprint(node.host_key) == out.split()[1]
    assert mesh.fingerprint("garbage") == "garbage" and mesh.fingerprint("a b!") == "a b!"
    assert mesh.fingerprint("x aGk=") == "SHA256:" + base64.b64encode(hashlib.sha256(b"hi").digest()).decode().rstrip(
        "="
    )


def test_the_key_of_the_inventory_must_be_the_nodes(node):
    rows = [[*ROWS[0][:4], TWO], ROWS[1]]
    answer = node("validate", nodes=rows)
    assert mesh.fingerprint(TWO) in answer.problems[0]["expected"] and mesh.fingerprint(node.host_key) in answer.msg


def test_two_nodes_with_one_alias_or_address_are_refused_on_both():
    rows = [
        mesh.Member("a", "n1", "10.0.0.1", 22, ""),
        mesh.Member("b", "n1", "10.0.0.2", 22, ""),
        mesh.Member("c", "a", "10.0.0.2", 22, ""),
    ]
    assert mesh.shared(rows) == [
        ("address", "10.0.0.2", ["b", "c"]),
        ("alias", "n1", ["a", "b"]),
        ("name", "a", ["a", "c"]),
    ]
    assert mesh.shared([mesh.Member("a", "a", "a", 22, ""), mesh.Member("b", "", "", 22, "")]) == []


def test_a_shared_alias_names_both_nodes(node):
    rows = [ROWS[0], ["gpu-2", "node001", "10.0.0.2", 44222, ""]]
    assert found(node("validate", nodes=rows), "alias node001") == ["gpu-1 and gpu-2"]
    assert found(node("validate", nodes=[*rows, ["gpu-3", "n3", "10.0.0.3", 44222, ""]], name="gpu-3"), "alias") == []


@pytest.mark.parametrize("alias", ["node*", "node 1", "-oProxyCommand=x", "n\nHost *"])
def test_an_alias_that_ssh_would_read_otherwise_is_refused(node, alias):
    rows = [ROWS[0], ["gpu-2", alias, "10.0.0.2", 44222, ""]]
    assert found(node("validate", nodes=rows), "a name of gpu-2") == [repr(alias)]


def test_every_reason_is_found_in_one_run(node):
    node.sshd(port="22", permitrootlogin="no")
    node.home.chmod(0o777)
    (node.etc / "ssh_config").write_text("Host *\n")
    (node.home / ".ssh").mkdir()
    (node.home / ".ssh" / "id_ed25519").write_text("no key\n")
    (node.home / ".ssh" / "id_ed25519").chmod(0o600)
    answer = node("validate")
    whats = [problem["what"] for problem in answer.problems]
    assert whats == [
        "sshd for root",
        "port of sshd",
        f"{node.etc}/ssh_config",
        str(node.home),
        f"{node.home}/.ssh/id_ed25519",
    ]
    assert all(problem["remedy"] for problem in answer.problems)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"user": "nobody-here"}, "user nobody-here"),
        ({"name": "gpu-9"}, "ssh_mesh_members"),
    ],
)
def test_what_ends_validate_at_once_is_one_problem(node, change, what):
    assert [problem["what"] for problem in node("validate", **change).problems] == [what]


def test_an_sshd_that_does_not_answer_is_named_with_its_reason(node):
    node.program("sshd", "echo 'sshd: no hostkeys available -- exiting.' >&2; exit 255")
    assert found(node("validate"), "sshd -T") == ["sshd: no hostkeys available -- exiting."]
    node.program("sshd", "echo 'Missing privilege separation directory: /run/sshd' >&2; exit 255")
    assert found(node("validate"), "sshd") == ["stopped: Missing privilege separation directory: /run/sshd"]


def test_an_sshd_without_a_file_for_each_user_is_refused(node):
    node.sshd(authorizedkeysfile="/etc/ssh/shared_keys none")
    assert found(node("validate"), "AuthorizedKeysFile") == ["/etc/ssh/shared_keys none"]


def test_host_keys_that_are_not_there_are_one_problem(node):
    node.sshd(hostkey="/nowhere/key")
    assert "ssh-keygen -A" in node("validate").msg


# --- sshd's own rules ---


@pytest.mark.parametrize(
    ("patterns", "path"),
    [
        (".ssh/authorized_keys", "/home/amy/.ssh/authorized_keys"),
        ("/etc/ssh/shared .ssh/authorized_keys2", "/home/amy/.ssh/authorized_keys2"),
        ("/etc/keys/%u/keys", "/etc/keys/amy/keys"),
        ("%h/%%x", "/home/amy/%x"),
        ("none", None),
        ("/etc/ssh/shared", None),
    ],
)
def test_the_users_own_file_of_sshds_list_is_taken(patterns, path):
    account = pwd.struct_passwd(("amy", "x", 7, 7, "", "/home/amy", "/bin/sh"))
    assert mesh.own_file(patterns.split(), account) == path


def test_strict_modes_are_judged_as_sshd_does(node):
    account = node.account("root")
    keys = node.file("authorized_keys")
    keys.parent.mkdir(mode=0o700)
    keys.write_text("")
    keys.chmod(0o644)
    assert mesh.unsafe(str(keys), account) == []
    keys.chmod(0o664)
    keys.parent.chmod(0o777)
    assert mesh.unsafe(str(keys), account) == [(str(keys), "mode 0664"), (str(keys.parent), "mode 0777")]


def test_a_folder_that_sshd_refuses_is_named_by_verify_and_mended_by_configure(node):
    node.converge()
    (node.home / ".ssh").chmod(0o777)
    assert found(node("verify"), "/.ssh") == ["mode 0777"]
    assert node("install").changed and node.converge().ok and node("verify").ok


@pytest.mark.parametrize(
    ("file", "mode"),
    [
        ("etc/ssh_known_hosts", 0o666),
        ("etc/ssh_config.d/90-shakedown.conf", 0o600),
        ("etc/sshd_config", 0o666),
        ("etc/sshd_config.d/50-site.conf", 0o664),
        ("etc/sshd_config.d", 0o777),
        ("home/.ssh/authorized_keys", 0o644),
        ("home/.ssh/id_ed25519.pub", 0o666),
    ],
)
def test_the_mode_of_each_file_is_named_by_verify_and_put_right_by_setup(node, tmp_path, file, mode):
    (node.etc / "sshd_config.d").mkdir()
    (node.etc / "sshd_config.d" / "50-site.conf").write_text("Port 44222\n")
    (node.etc / "sshd_config").write_text("Include /etc/ssh/sshd_config.d/*.conf\n")
    node.converge()
    assert node("verify").ok
    path = tmp_path / file
    path.chmod(mode)
    ((what, told),) = [(p["what"], p["found"]) for p in node("verify").problems]
    assert (what, told) == (str(path), f"mode {mode:04o}")
    assert node("install").changed or node.converge().changed
    assert node.converge().ok and node("verify").ok


def test_strict_modes_switched_off_are_not_judged(node):
    node.sshd(strictmodes="no")
    node.home.chmod(0o777)
    assert node("validate").ok


def test_garbage_of_sshd_gives_no_settings_and_no_crash():
    sshd = mesh.read_sshd("\n\nport x\nhostkey\n\x00", "root")
    assert sshd.ports == [] and sshd.refusal is None and sshd.authorized_keys_files == ["none"]


# --- verify ---


def test_a_node_calls_itself_by_each_of_its_spellings_and_a_peer_by_one(node):
    node.converge()
    answer = node("verify")
    calls = (node.bin / "ssh.log").read_text().splitlines()
    assert answer.ok and answer.facts["reached"] == 2
    called = [line.split()[-2] for line in calls]
    assert {*ROWS[0][:3]} <= {*called} and len(called) == 4 and len({*called} & {*ROWS[1][:3]}) == 1
    assert all("BatchMode=yes" in line and "StrictHostKeyChecking" not in line for line in calls)


@given(st.integers(4, 40))
def test_the_mesh_as_a_whole_calls_every_node_by_each_of_its_spellings(count):
    names, hosts = [f"n{number:02d}" for number in range(count)], ["address", "alias", "name"]
    called = {name: set() for name in names}
    for caller in names:
        for step, peer in enumerate(mesh.chosen(names, caller, 15)):
            called[peer] |= {*mesh.spellings(hosts, step)} if peer != caller else set()
    assert all(spelled == {*hosts} for spelled in called.values())


def test_a_peer_that_does_not_answer_is_named_with_the_last_line_of_ssh(node):
    node.converge()
    node.program(
        "ssh",
        'case "$*" in *gpu-2*|*node002*|*0.0.2*) echo "ssh: connect to host 10.0.0.2 port 44222: Connection refused" >&2; exit 255;; esac',
    )
    answer = node("verify")
    assert answer.ok and answer.facts["reached"] == 1 and answer.facts["pairs"]["gpu-1"] == {}
    ((reason, (spelling,)),) = answer.facts["pairs"]["gpu-2"].items()
    assert reason.endswith("Connection refused") and spelling in ROWS[1][:3]


def test_a_connection_that_sshd_drops_when_busy_is_tried_again(node):
    node.converge()
    node.program(
        "ssh",
        'if mkdir "$0.busy" 2>/dev/null; then echo "kex_exchange_identification: Connection closed by remote host" >&2; exit 255; fi',
    )
    assert node("verify").ok


@pytest.mark.parametrize(
    ("break_it", "found_text"),
    [
        (lambda key: key.unlink(), "no such file"),
        (lambda key: key.chmod(0o644), "mode 0644"),
        (lambda key: (key.unlink(), key.with_suffix(".pub").unlink(), keygen(key)), "ssh-ed25519 SHA256:"),
    ],
)
def test_a_key_pair_that_is_gone_open_or_another_is_named_on_its_own_node(node, break_it, found_text):
    node.converge()
    key = node.home / ".ssh" / "id_ed25519"
    break_it(key)
    ((what, told),) = [(p["what"], p["found"]) for p in node("verify").problems]
    assert what == str(key) and told.startswith(found_text)


def test_an_entry_that_somebody_removed_is_drift(node):
    node.converge()
    keys = node.file("authorized_keys")
    keys.write_text("".join(line for line in keys.read_text().splitlines(True) if "gpu-2" not in line))
    assert found(node("verify"), "authorized_keys") == ["none of gpu-2"]


def test_before_the_first_run_verify_names_what_is_missing(node):
    answer = node("verify")
    assert found(answer, "ssh_known_hosts") == found(answer, "authorized_keys") == ["none of gpu-1, gpu-2"]


@given(st.integers(1, 60), st.integers(1, 20))
def test_every_node_is_reached_by_as_many_as_it_reaches(count, most):
    names = [f"n{number:02d}" for number in range(count)]
    reached = Counter()
    for name in names:
        chosen = mesh.chosen(names, name, most)
        assert chosen[0] == name and len(set(chosen)) == len(chosen) == min(count, most + 1)
        reached.update(chosen)
    assert set(reached.values()) == {min(count, most + 1)}


def test_an_address_of_the_inventory_needs_no_other(monkeypatch):
    assert mesh.own_address("10.0.0.1", "gpu-1") == ""
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.250 5022 10.0.0.7 44222")
    assert mesh.own_address("", "no-such-name.invalid") == "10.0.0.7"
