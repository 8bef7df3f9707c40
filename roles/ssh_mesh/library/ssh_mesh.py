#!/usr/bin/python
"""Module of the role ssh_mesh: SSH from each node to every other, without prompts, with pinned host keys.

Besides the role's variables, its tasks add these settings:

    name    this node's name in the inventory
    nodes   [[name, alias, address, port, host key], ...] of all members, "" for what is not in the inventory
    pinned  [key, ...]: the keys that other nodes have pinned for this one (validate)
    seen    [{"name", "public_key", "host_keys", "address"}, ...]: of the nodes of this run (configure)
    peers   [name, ...]: the nodes of this run (verify)

A key is "type base64", as in a .pub file without its comment. In files that it shares with others, the mesh's lines
end with `shakedown-mesh:NAME`: all other lines are left unchanged, and the pins of a node that is not in this run can
be read back.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import os
import pwd
import random
import re
import shutil
import socket
import stat
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.phase import Stop, counted, main, read

TAG = "shakedown-mesh:"
_OURS = re.compile(r"^(?P<entry>\S.*\S)\s+" + TAG + r"(?P<name>\S+)\s*$")
# What is valid as a host in ssh_config: there `*` is a pattern, and a space starts another host.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*")
_NOT_MADE_YET = "ssh-ed25519 (made by this run)"
# Parallel connections from one node. Each node starts with another peer, so each gets about as many at once: sshd's
# default MaxStartups starts to refuse at ten.
_AT_ONCE = 4
SETUP = "run `runner setup --tags ssh_mesh`"

Member = namedtuple("Member", "name alias address port host_key")
# How a node is reached: its names and addresses, the first of which is connected to; the port; its pinned keys.
Pinned = namedtuple("Pinned", "hosts port keys")
# The settings of sshd (`sshd -T`), with lists where a keyword may occur more than once.
Sshd = namedtuple("Sshd", "ports host_key_files authorized_keys_files strict_modes refusal")


# --- content of the files: pure ---


def fingerprint(key):
    """The fingerprint (SHA256:...) of a key, as `ssh-keygen -l` prints it; `key` itself where it is not a key."""
    try:
        blob = base64.b64decode(key.split()[1], validate=True)
    except (IndexError, ValueError):
        return key
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def shown(keys):
    """`keys` as text, with type and fingerprint; "none" for no keys."""
    return ", ".join(f"{key.split()[0]} {fingerprint(key)}" for key in sorted(keys)) or "none"


def changed_keys(pinned, offered):
    """The keys of `pinned` that the node no longer offers, if that means it is another node; else [].

    A node that drops or adds a key type and keeps another pinned key is the same node.
    """
    gone = [key for key in pinned if key not in offered]
    types = {key.split()[0] for key in offered}
    if any(key in offered for key in pinned):
        gone = [key for key in gone if key.split()[0] in types]
    return sorted(set(gone))


def ours(text):
    """{name: [entry, ...]} of the mesh's lines in `text`."""
    found = {}
    for line in (text or "").splitlines():
        match = _OURS.match(line)
        if match and not line.startswith("#"):
            found.setdefault(match["name"], []).append(match["entry"])
    return found


def replaced(text, entries):
    """`text` with the mesh's lines replaced by `entries` ({name: [entry, ...]}), all other lines unchanged."""
    lines = [f"{entry} {TAG}{name}" for name in sorted(entries) for entry in entries[name]]
    kept, position = [], None
    for line in (text or "").split("\n"):
        if _OURS.match(line) and not line.startswith("#"):
            position = len(kept) if position is None else position
        else:
            kept.append(line)
    if position is None:
        # After the last line, which may have no line end.
        position = len(kept) - 1 if kept[-1] == "" else len(kept)
    kept[position:position] = lines
    return "\n".join(kept) + ("" if kept[-1] == "" or not lines else "\n")


def spelled(host, port):
    """The form of a host in known_hosts: with its port, unless that is 22."""
    return host if port == 22 else f"[{host}]:{port}"


def known_hosts(pins):
    """{name: [known_hosts entry, ...]} of `pins` ({name: Pinned})."""
    return {
        name: [f"{','.join(spelled(host, pin.port) for host in pin.hosts)} {key}" for key in sorted(pin.keys)]
        for name, pin in pins.items()
    }


def read_pins(text):
    """{name: Pinned} of the mesh's lines in a known_hosts file."""
    pins = {}
    for name, entries in ours(text).items():
        for entry in entries:
            hosts, _, key = entry.partition(" ")
            parts = [re.fullmatch(r"\[(.+)\]:(\d+)|(.+)", host) for host in hosts.split(",")]
            if len(key.split()) != 2 or not all(parts):
                continue
            pin = pins.setdefault(name, Pinned([part[1] or part[3] for part in parts], int(parts[0][2] or 22), []))
            pin.keys.append(key)
    return pins


def merged(pins, seen, members):
    """The pins to write: those of the nodes `seen` in this run, and the existing ones of the other `members`.

    pins and the result {name: Pinned}; seen as in the settings; members {name: Member}. A name or address belongs to
    the node that was seen with it: an address that moved is removed from its previous node.
    """
    new = {}
    for node in seen:
        member = members.get(node["name"])
        if member:
            hosts = [member.address or member.name, member.name, member.alias, node["address"]]
            new[member.name] = Pinned(list(dict.fromkeys(filter(None, hosts))), member.port, node["host_keys"])
    taken = {host for pin in new.values() for host in pin.hosts}
    for name, pin in pins.items():
        hosts = [host for host in pin.hosts if host not in taken]
        if name in members and name not in new and hosts:
            new[name] = Pinned(hosts, pin.port, pin.keys)
    return new


def client_config(pins):
    """The text of an ssh_config in which each name and address reaches its node, on its port, without prompts."""
    lines = ["# Written by the role ssh_mesh. Host keys: ssh_known_hosts beside this folder."]
    for _, pin in sorted(pins.items()):
        lines += ["", f"Host {' '.join(pin.hosts)}", f"    HostName {pin.hosts[0]}", f"    Port {pin.port}"]
        lines += ["    StrictHostKeyChecking yes"]
    return "\n".join(lines) + "\n"


def shared(members):
    """[(what, value, [name, ...]), ...] of each name, alias or address that more than one member has."""
    users = {}
    for member in members:
        users.setdefault(("name", member.name), []).append(member.name)
        for kind, value in (("alias", member.alias), ("address", member.address)):
            if value and value != member.name:
                users.setdefault((kind, value), []).append(member.name)
    for member in members:
        if member.alias != member.name and ("name", member.alias) in users:
            users["name", member.alias].append(member.name)
    return [(kind, value, names) for (kind, value), names in sorted(users.items()) if len(names) > 1]


def chosen(names, name, most):
    """The nodes of `names` to which the node `name` connects: itself, then at most `most` others, in ring order.

    Half of them are the next ones in the ring, half are evenly distributed over the rest, at the same distances for
    every node: each node gets as many connections as it makes.
    """
    ring = sorted(names)
    here, count = ring.index(name), len(ring)
    if count - 1 <= most:
        steps = list(range(count))
    else:
        near = (most + 1) // 2
        far = most - near
        steps = [*range(near + 1), *(near + 1 + (count - 1 - near) * position // far for position in range(far))]
    return [ring[(here + step) % count] for step in steps]


# --- observing ---


def read_sshd(text, user):
    """The Sshd for the output of `sshd -T`; `refusal` is the setting that refuses the key of `user`, or None."""
    values = {}
    for line in text.splitlines():
        keyword, _, value = line.partition(" ")
        values.setdefault(keyword.lower(), []).append(value.strip())
    last = {keyword: found[-1] for keyword, found in values.items()}
    refusal = None
    if last.get("pubkeyauthentication") == "no":
        refusal = "PubkeyAuthentication no"
    elif user == "root" and last.get("permitrootlogin") in ("no", "forced-commands-only"):
        refusal = f"PermitRootLogin {last['permitrootlogin']}"
    return Sshd(
        ports=[int(port) for port in values.get("port", []) if port.isdigit()],
        host_key_files=values.get("hostkey", []),
        authorized_keys_files=last.get("authorizedkeysfile", "none").split(),
        strict_modes=last.get("strictmodes") != "no",
        refusal=refusal,
    )


def own_file(patterns, account):
    """The first file of AuthorizedKeysFile that is for this user only, or None. Source: sshd_config(5)."""
    values = {"%h": account.pw_dir, "%u": account.pw_name, "%U": str(account.pw_uid), "%%": "%"}
    for pattern in patterns:
        alone = not pattern.startswith("/") or any(token in pattern for token in ("%h", "%u", "%U"))
        if alone and pattern != "none":
            path = re.sub("%[huU%]", lambda token: values[token[0]], pattern)
            return os.path.join(account.pw_dir, path)
    return None


def unsafe(path, account):
    """[(path, found), ...] of the modes and owners for which sshd's StrictModes refuses `path`.

    A file and its folders up to the home (up to / elsewhere) must belong to the user or root and must not be writable
    by anybody else. Source: openssh misc.c, safe_path().
    """
    home = os.path.realpath(account.pw_dir)
    path = os.path.realpath(path)
    found = []
    while True:
        if os.path.lexists(path):
            status = os.stat(path)
            if status.st_uid not in (0, account.pw_uid):
                found.append((path, f"owner {status.st_uid}"))
            if status.st_mode & 0o022:
                found.append((path, f"mode {stat.S_IMODE(status.st_mode):04o}"))
        if path in (home, "/"):
            return found
        path = os.path.dirname(path)


def own_address(address, name):
    """This node's address for other nodes, where the inventory has none; "" if it has one or it is unknown."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(address)
        return ""
    with contextlib.suppress(OSError):
        for *_, place in socket.getaddrinfo(address or name, None, type=socket.SOCK_STREAM):
            # Debian writes a node's own name into /etc/hosts as 127.0.1.1.
            if not ipaddress.ip_address(place[0].partition("%")[0]).is_loopback:
                return place[0]
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return connection[2] if len(connection) == 4 else ""


class Node:
    """This node: its user, its sshd and its keys.

    `account(name)` returns the passwd entry of a user or raises KeyError, `etc` is ssh's folder. Raises Stop where the
    user does not exist or sshd's settings cannot be read or used.
    """

    def __init__(self, phase, account, etc):
        self.phase, self.etc = phase, etc
        want = phase.want
        try:
            self.account = account(want["user"])
        except KeyError:
            remedy = "create the user, or set ssh_mesh_user"
            raise Stop(f"user {want['user']}", "present", "no such user", remedy) from None
        self.name = want["name"]
        self.members = {row[0]: Member(row[0], row[1], row[2], int(row[3]), row[4]) for row in want["nodes"]}
        if self.name not in self.members:
            raise Stop(
                "ssh_mesh_members", f"{self.name} among them", "missing", "add the node to the inventory's group"
            )
        self.member = self.members[self.name]
        self.home = self.account.pw_dir
        self.private_key = os.path.join(self.home, ".ssh", "id_ed25519")
        self.known_hosts = os.path.join(etc, "ssh_known_hosts")
        self.sshd = self._sshd()
        self.authorized_keys = own_file(self.sshd.authorized_keys_files, self.account)
        if self.authorized_keys is None:
            found = " ".join(self.sshd.authorized_keys_files)
            raise Stop("sshd's AuthorizedKeysFile", "a file of each user", found, "add .ssh/authorized_keys to it")

    def _sshd(self):
        # Match blocks are evaluated for a connection of this user; without one, an sshd with such blocks refuses -T.
        connection = f"user={self.account.pw_name},host={self.name},addr={self.member.address or '127.0.0.1'}"
        path = shutil.which("sshd") or "/usr/sbin/sshd"
        outcome = self.phase.run([path, "-T", "-C", connection], timeout_s=10)
        if not outcome.ok and "separation directory" in outcome.last_line:  # it is made by the service
            raise Stop("sshd", "running", f"stopped: {outcome.last_line}", "start it: systemctl start ssh (or sshd)")
        if not outcome.ok:
            raise Stop(
                "sshd -T", "its settings", outcome.last_line, "is it installed and running, and is this run as root?"
            )
        return read_sshd(outcome.stdout, self.account.pw_name)

    @contextlib.contextmanager
    def as_user(self):
        """Run the block as the user: for the right owner, without following links to others' files, and on NFS."""
        # Nothing to do for root itself, for tests of an ordinary user, and inside another such block.
        if os.geteuid() != 0 or self.account.pw_uid == 0:
            yield
            return
        own_group = os.getegid()
        os.setegid(self.account.pw_gid)
        os.seteuid(self.account.pw_uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(own_group)

    def in_home(self, path):
        """A context for writing `path`: as the user in the home, as root elsewhere."""
        return self.as_user() if path.startswith(f"{self.home.rstrip('/')}/") else contextlib.nullcontext()

    def mode_of_keys(self):
        """The mode of the file of authorized keys: outside the home root owns it, and sshd reads it as the user."""
        return 0o600 if self.authorized_keys.startswith(f"{self.home.rstrip('/')}/") else 0o644

    def host_keys(self):
        """The public host keys that sshd offers, sorted; read from its files, never over the network. Raises Stop."""
        keys = set()
        for path in self.sshd.host_key_files:
            outcome = self.phase.run(["ssh-keygen", "-y", "-P", "", "-f", path], timeout_s=10)
            # With an agent for host keys, sshd names the public file.
            text = outcome.stdout if outcome.ok else (read(f"{path}.pub") or "")
            keys.update(" ".join(line.split()[:2]) for line in text.splitlines()[:1] if len(line.split()) > 1)
        if not keys:
            files = ", ".join(self.sshd.host_key_files) or "none"
            raise Stop("host keys of sshd", "at least one", f"none readable of {files}", "ssh-keygen -A makes them")
        return sorted(keys)

    def open_mode(self):
        """The mode of the private key if others can read it, which ssh refuses; else None."""
        with self.as_user():
            mode = stat.S_IMODE(os.stat(self.private_key).st_mode) if os.path.exists(self.private_key) else 0
        return mode if mode & 0o077 else None

    def public_key(self):
        """The user's public key; None where there is no key pair, "" where it cannot be read (yet)."""
        with self.as_user():
            if not os.path.lexists(self.private_key):
                return None
            if self.open_mode():
                return ""
            outcome = self.phase.run(["ssh-keygen", "-y", "-P", "", "-f", self.private_key], timeout_s=10)
        if not outcome.ok:
            expected = "a key that opens without a passphrase"
            remedy = "move it away; the role makes a new one"
            self.phase.problem(self.private_key, expected, outcome.last_line, remedy)
            return ""
        return " ".join(outcome.stdout.split()[:2])

    def judge_host_key(self, offered, pinned):
        """Record a problem where the host keys differ from those pinned, unless new keys are accepted."""
        gone = changed_keys(pinned, offered)
        if gone and not self.phase.want["accept_new_host_keys"]:
            command = "`runner setup --tags ssh_mesh --set ssh_mesh_accept_new_host_keys=true`"
            remedy = f"if the node was reinstalled on purpose, run {command} once"
            types = {key.split()[0] for key in gone}
            now = [key for key in offered if key.split()[0] in types] or offered
            self.phase.problem("changed host key", shown(gone), shown(now), remedy)

    def own_sshds_files(self, remedy=""):
        """Take the right to write sshd's configuration from all but root: whoever has it can log in as anybody."""
        folder = os.path.join(self.etc, "sshd_config.d")
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        for path in (
            self.etc,
            os.path.join(self.etc, "sshd_config"),
            folder,
            *(os.path.join(folder, n) for n in names),
        ):
            self.phase.own(path, None, remedy=remedy)

    def judge_key_pair(self, accepted):
        """Record a problem where the user's key pair is not there, not usable, or not what this node accepts itself."""
        public = self.public_key()
        if public is None:
            self.phase.problem(self.private_key, "a key pair", "no such file", SETUP)
        elif mode := self.open_mode():
            self.phase.problem(
                self.private_key, "readable by its owner alone, or ssh refuses it", f"mode {mode:04o}", SETUP
            )
        elif public and accepted and public not in accepted:
            remedy = f"{SETUP}: other nodes know the former one"
            self.phase.problem(self.private_key, shown(accepted), shown([public]), remedy)

    def fix_folder(self, path):
        """Create the user's folder `path`, or fix its mode, so that sshd's StrictModes accepts it."""
        with self.in_home(path):
            if not os.path.lexists(path):
                if self.phase.change(path, None, "folder, mode 0700"):
                    os.mkdir(path, 0o700)
                return
            mode = stat.S_IMODE(os.stat(path).st_mode)
            if mode & 0o022 and self.phase.change(path, f"mode {mode:04o}", f"mode {mode & ~0o022:04o}"):
                os.chmod(path, mode & ~0o022)

    def text_of(self, path):
        """The text of a file that others write to too, None without one. Raises Stop where it is not UTF-8."""
        text = read(path)
        if text and "\ufffd" in text:
            raise Stop(path, "UTF-8 text", "other bytes", "fix its comments; the rest of the file is never changed")
        return text


# --- the phases ---


def validate(phase, account=pwd.getpwnam, etc="/etc/ssh"):
    """Check inventory, programs, sshd, home and host keys; changes nothing. facts: host_keys, pinned. Raises Stop.

    `account` and `etc` as for Node, in all phases.
    """
    for kind, value, names in shared([Member(*row) for row in phase.want["nodes"]]):
        if phase.want["name"] in names:
            phase.problem(f"{kind} {value}", "one node", " and ".join(sorted(names)), "correct the inventory")
    for row in phase.want["nodes"]:
        for host in filter(None, row[:3]):
            if not _HOST.fullmatch(host):
                phase.problem(f"a name of {row[0]}", "a host name or an address", repr(host), "correct the inventory")
    for program in ("ssh", "ssh-keygen"):
        if not shutil.which(program):
            phase.problem(program, "on PATH", "not found", "install openssh-client (openssh-clients)")
    node = Node(phase, account, etc)
    if node.sshd.refusal:
        remedy = "change it in sshd_config, or set ssh_mesh_user"
        phase.problem(f"sshd for {node.account.pw_name}", "keys accepted", node.sshd.refusal, remedy)
    if node.sshd.ports and node.member.port not in node.sshd.ports:
        found = ", ".join(map(str, node.sshd.ports))
        phase.problem("port of sshd", node.member.port, found, "correct ansible_port or sshd's Port")
    config = read(os.path.join(etc, "ssh_config")) or ""
    if not re.search(r"(?im)^\s*Include\s.*ssh_config\.d/\*\.conf", config):
        line = f"Include {etc}/ssh_config.d/*.conf"
        phase.problem(f"{etc}/ssh_config", "its drop-in folder included", "no such line", f"put `{line}` at its top")
    if not os.access(etc, os.W_OK, effective_ids=True):
        phase.problem(etc, "writable", "not writable", "run as root; is the file system mounted read-only?")
    _validate_home(phase, node)
    node.public_key()
    offered = node.host_keys()
    if node.member.host_key and " ".join(node.member.host_key.split()[:2]) not in offered:
        expected = shown([" ".join(node.member.host_key.split()[:2])])
        remedy = "is this the right node? else correct runner_host_key"
        phase.problem("host key of the inventory", expected, shown(offered), remedy)
    pins = read_pins(read(node.known_hosts))
    own = pins[node.name].keys if node.name in pins else []
    node.judge_host_key(offered, sorted({*own, *phase.want.get("pinned", [])}))
    phase.facts["host_keys"] = offered
    phase.facts["pinned"] = {name: sorted(pin.keys) for name, pin in pins.items()}


def _validate_home(phase, node):
    home, user = node.home, node.account.pw_name
    with node.as_user():
        if not os.path.isdir(home):
            raise Stop(f"home of {user}", home, "no such folder", "create it")
        refused = unsafe(home, node.account) if node.sshd.strict_modes else []
    for path, found in refused:
        remedy = f"chown {user} {path}; chmod go-w {path}"
        phase.problem(path, "writable by its owner alone (StrictModes)", found, remedy)
    for path in {os.path.dirname(node.private_key), os.path.dirname(node.authorized_keys)}:
        with node.in_home(path):
            existing = path
            while not os.path.lexists(existing):
                existing = os.path.dirname(existing)
            if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
                phase.problem(existing, f"writable for {user}", "not writable", f"chown {user} {existing}")


def install(phase, account=pwd.getpwnam, etc="/etc/ssh"):
    """Create the user's key pair where there is none. facts: name, address, host_keys, public_key. Raises Stop."""
    node = Node(phase, account, etc)
    node.fix_folder(os.path.dirname(node.private_key))
    mode = node.open_mode()
    if mode and phase.change(node.private_key, f"mode {mode:04o}", "mode 0600"):
        with node.as_user():
            os.chmod(node.private_key, 0o600)
    public = node.public_key()
    if public is None:
        public = _make_key_pair(phase, node)
    if public:
        path = f"{node.private_key}.pub"
        with node.as_user():
            # ssh offers the key in this file.
            if " ".join((read(path) or "").split()[:2]) != public:
                phase.write(path, f"{public} {node.account.pw_name}@{node.name}\n")
            else:
                phase.own(path, 0o644)
    address = own_address(node.member.address, node.name)
    phase.facts.update(name=node.name, address=address, host_keys=node.host_keys(), public_key=public or _NOT_MADE_YET)
    phase.done.append(f"{node.private_key}: {fingerprint(public)}" if public else "a key pair would be made")


def _make_key_pair(phase, node):
    if not phase.change(node.private_key, None, "ed25519 key pair, made on this node"):
        return None
    with node.as_user():
        scratch = tempfile.mkdtemp(prefix=".shakedown-", dir=os.path.dirname(node.private_key))
        try:
            made = os.path.join(scratch, "key")
            comment = f"{node.account.pw_name}@{node.name}"
            outcome = phase.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", made], timeout_s=10
            )
            if not outcome.ok:
                raise Stop("ssh-keygen", "a key pair", outcome.last_line)
            # Atomic; where nodes share a home, all use the key of the first one.
            with contextlib.suppress(FileExistsError):
                os.link(made, node.private_key)
        finally:
            shutil.rmtree(scratch)
    return node.public_key()


def configure(phase, account=pwd.getpwnam, etc="/etc/ssh"):
    """Write the pinned host keys, ssh's configuration and the authorized keys of all nodes. Raises Stop."""
    node = Node(phase, account, etc)
    seen = sorted(phase.want["seen"], key=lambda one: one["name"])
    if node.name not in [one["name"] for one in seen]:
        raise Stop("keys of this node", "collected by the phase install", "none", SETUP)
    text = node.text_of(node.known_hosts)
    pins = merged(read_pins(text), seen, node.members)
    node.own_sshds_files()
    phase.write(node.known_hosts, replaced(text, known_hosts(pins)))
    phase.write(os.path.join(etc, "ssh_config.d", "90-shakedown.conf"), client_config(pins))
    node.fix_folder(os.path.dirname(node.authorized_keys))
    with node.in_home(node.authorized_keys):
        text = node.text_of(node.authorized_keys)
        keys = {name: entries for name, entries in ours(text).items() if name in node.members}
        keys.update({one["name"]: [one["public_key"]] for one in seen if one["name"] in node.members})
        phase.write(node.authorized_keys, replaced(text, keys), node.mode_of_keys())
    phase.done.append(f"{counted(len(pins), 'node')} pinned, {counted(len(keys), 'key')} accepted")


def verify(phase, account=pwd.getpwnam, etc="/etc/ssh"):
    """Check keys and files, and connect to other nodes; changes nothing. Raises Stop.

    facts: reached, elapsed_s; pairs {node: {ssh's last line: [name, ...]}}, {} for a node that answers by all names.
    The action ssh_mesh_pairs says who is at fault where one does not: it has all nodes' pairs.
    """
    node = Node(phase, account, etc)
    rerun = SETUP
    pins = read_pins(read(node.known_hosts))
    peers = [name for name in phase.want["peers"] if name in node.members]
    with node.in_home(node.authorized_keys):
        accepted = ours(read(node.authorized_keys))
        phase.own(node.authorized_keys, node.mode_of_keys(), remedy=SETUP)
        refused = unsafe(os.path.dirname(node.authorized_keys), node.account) if node.sshd.strict_modes else []
    with node.as_user():
        phase.own(f"{node.private_key}.pub", 0o644, remedy=SETUP)
    for path, found in refused:
        expected = "writable by its owner alone, or sshd refuses all keys"
        phase.problem(path, expected, found, f"{rerun}, or chmod go-w {path}")
    node.own_sshds_files(SETUP)
    phase.own(node.known_hosts, 0o644, remedy=SETUP)
    phase.own(os.path.join(etc, "ssh_config.d", "90-shakedown.conf"), 0o644, remedy=SETUP)
    offered = node.host_keys()
    if node.name in pins:
        node.judge_host_key(offered, pins[node.name].keys)
    node.judge_key_pair(accepted.get(node.name, []))
    for what, missing in (
        (node.known_hosts, [name for name in peers if name not in pins]),
        (node.authorized_keys, [name for name in {*peers, *pins} if name in node.members and name not in accepted]),
    ):
        if missing:
            phase.problem(what, "an entry of each node", f"none of {', '.join(sorted(missing))}", rerun)
    targets = chosen({*peers, node.name}, node.name, phase.want["verify_peers"])
    targets = [name for name in targets if name in pins]
    # Itself by each of its names, a peer by one of them that depends on its distance in the ring: the mesh tries all.
    calls = {name: spellings(pins[name].hosts, step) for step, name in enumerate(targets)}
    started = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        pairs = dict(zip(targets, pool.map(lambda name: _connect(phase, node, calls[name]), targets)))  # noqa: B905
    silent = [name for name, failures in pairs.items() if failures]
    if silent:
        phase.left_to_others(f"ssh to {', '.join(silent)}")
    reached = len(targets) - len(silent)
    phase.facts.update(pairs=pairs, reached=reached, elapsed_s=round(time.monotonic() - started, 2))
    phase.done.append(
        f"{reached} of {counted(len(targets), 'node')} {'answers' if reached == 1 else 'answer'}, this one included"
    )


def spellings(hosts, step):
    """The names of `hosts` by which the node at distance `step` in the ring is connected to; 0 is this node itself."""
    return hosts if step == 0 else [hosts[step % len(hosts)]]


def _connect(phase, node, hosts):
    """Open a session by each of `hosts`, names of one node; returns {ssh's last line: [name, ...]} of the failures."""
    failures = {}
    for host in hosts:
        argv = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={phase.want['connect_timeout_s']}"]
        # A new session, not one that is already open; the cheaper key exchange first, since there are many.
        argv += ["-o", "ControlPath=none", "-o", "LogLevel=ERROR", "-o", "KexAlgorithms=^curve25519-sha256"]
        argv += [host, "true"]
        if os.geteuid() == 0 and node.account.pw_uid != 0:
            argv = ["runuser", "-u", node.account.pw_name, "--", *argv]
        for attempt in range(3):
            outcome = phase.run(argv, timeout_s=3 * phase.want["connect_timeout_s"])
            # sshd's behaviour beyond MaxStartups: try again.
            if outcome.ok or attempt == 2 or not re.search("exchange_identification|closed by remote", outcome.stderr):
                break
            time.sleep(random.uniform(0.1, 0.5))
        if not outcome.ok:
            failures.setdefault(outcome.last_line, []).append(host)
    return failures


PHASES = {"validate": validate, "install": install, "configure": configure, "verify": verify}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
