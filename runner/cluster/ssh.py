"""The OpenSSH configuration with which all tools reach the nodes, with the host keys that are known of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.cluster.inventory import Inventory, Node
from runner.cluster.known_hosts import CERT_AUTHORITY, REVOKED, Entry, Known, lines

# Where ssh looks for keys by default.
_OWN = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
# What ssh reads without -F: the way to a bastion is often written there.
_USERS = "Include ~/.ssh/config /etc/ssh/ssh_config"
_OF_ONE = ("Port ", "User ", "IdentityFile ")  # what Ansible says itself for each host
_NOTHING = 'Include "/dev/null"'
_INCLUDE = "Include "  # of a file that the inventory names with -F


def ssh_config(inventory: Inventory, known_hosts_file: str) -> str:
    """The text of the OpenSSH configuration that ClusterShell, pdsh, rsync, DeepSpeed and people use.

    `known_hosts_file` is the path of the file with the known keys. Host keys are always checked: only against the
    inventory's pins where a host has one, otherwise against the user's known_hosts. ssh never prompts. What the
    inventory leaves open, such as the way to a jump host, is as the user's own configuration has it.
    """
    # `originalhost`: a jump host is not taken for the node whose address it has, and then reached through itself.
    keys, shared = _Keys(inventory), _shared(inventory)
    lines = [f"# Rendered from {inventory.source!r}: `ssh -F THIS_FILE {inventory.nodes[0].alias}`"]
    for node in inventory.hosts:
        files = [known_hosts_file, *node.known_hosts_files.splitlines()]
        pinned = keys.pinned(node)
        lines += [
            "",
            f"Match originalhost {','.join(word for word in _words(node) if word not in shared)}",
            f"  HostName {node.address.replace('%', '%%')}",
            f"  HostKeyAlias {keys.name(node)}",
            *(f"  {line}" for line in node.ssh_options.splitlines() if not _elsewhere(line, node)),
        ]
        if pinned:  # a pin is exclusive: no other file may add another key
            lines += [f'  UserKnownHostsFile "{known_hosts_file}"', "  GlobalKnownHostsFile /dev/null"]
        elif len(files) > 1:
            lines += ["  UserKnownHostsFile " + " ".join(f'"{file}"' for file in files)]
    for address, nodes in shared.items():  # of several nodes behind it, Ansible says which by the port
        ours = [line for line in nodes[0].ssh_options.splitlines() if not line.startswith(_OF_ONE)]
        common = [line for line in ours if all(line in node.ssh_options.splitlines() for node in nodes)]
        if common := [line for line in common if not any(_elsewhere(line, node) for node in nodes)]:
            lines += ["", f"Match originalhost {address}", *(f"  {line}" for line in common)]
    names = [word for node in inventory.hosts for word in _words(node)]
    return "\n".join(
        [
            *lines,
            "",
            f"Match originalhost {','.join(dict.fromkeys(names))}",
            "  BatchMode yes",
            "  StrictHostKeyChecking yes",
            f'  UserKnownHostsFile "{known_hosts_file}" ~/.ssh/known_hosts ~/.ssh/known_hosts2',
            "  ConnectTimeout 10",
            "  ServerAliveInterval 5",
            "  ServerAliveCountMax 6",
            "  LogLevel ERROR",
            "  # Nothing but the command, and no process that outlives it.",
            "  RequestTTY no",
            "  ControlMaster no",
            "  ControlPath none",
            "  ClearAllForwardings yes",
            "",
            "# By the names here, which jump hosts have as well, then by the address that Ansible connects to.",
            "Host *",
            *(f"  {line}" for line in _includes(inventory)),
            "Match final all",
            *(f"  {line}" for line in _includes(inventory)),
            "",
            "# Jump hosts, where nothing else is said.",
            "Host *",
            "  BatchMode yes",
            "  StrictHostKeyChecking yes",
            "  ConnectTimeout 10",
            "  LogLevel ERROR",
            "  SendEnv -*",
            "",
        ]
    )


def known_hosts(inventory: Inventory) -> str:
    """The text of a known_hosts file with the keys of all hosts, each under the name that HostKeyAlias gives the host.

    These are the inventory's pins, and of a host without any what the user's own files know of it.
    """
    keys, shared = _Keys(inventory), _shared(inventory)
    lines = [entry.under(keys.name(node)) for node in inventory.hosts for entry in keys.of(node)]
    for address, nodes in shared.items():
        lines += [entry.under(f"[{address}]:{node.port}") for node in nodes for entry in keys.of(node)]
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))


def _includes(inventory: Inventory) -> list[str]:
    """The lines for files that hold what the inventory leaves open; one named there with -F replaces the user's own."""
    named = [
        [line for line in node.ssh_options.splitlines() if line.startswith(_INCLUDE)][:1] for node in inventory.hosts
    ]
    lines = list(dict.fromkeys(line for each in named for line in each))
    read = [line for line in lines if line != _NOTHING]  # which ssh does not include: anyone may write to it
    return read if all(named) else [*read, _USERS]


def _elsewhere(line: str, node: Node) -> bool:
    """Whether the line has no place in the section of `node`: it reads a file, or would reach a jump host by itself."""
    keyword, _, value = line.partition(" ")
    hops = [hop.rpartition("@")[2].partition(":")[0] for hop in value.split(",")]
    return line.startswith(_INCLUDE) or (keyword.lower() == "proxyjump" and not {*hops}.isdisjoint(_words(node)))


def _shared(inventory: Inventory) -> dict[str, list[Node]]:
    """The addresses of several hosts, which differ in their ports."""
    holders: dict[str, list[Node]] = {}
    for node in inventory.hosts:
        holders.setdefault(node.address, []).append(node)
    return {address: nodes for address, nodes in holders.items() if len(nodes) > 1}


def _words(node: Node) -> list[str]:
    return list(dict.fromkeys((node.name, node.alias, node.address)))


@dataclass(frozen=True)
class _Found:
    pinned: bool
    entries: tuple[tuple[str, Entry], ...]


class _Keys:
    """The keys of all hosts of an inventory."""

    def __init__(self, inventory: Inventory) -> None:
        pins = Known(inventory.known_hosts)
        self._files: dict[str, Known] = {}
        self._found = {node.name: self._find(node, pins) for node in inventory.hosts}

    def pinned(self, node: Node) -> bool:
        """Whether the inventory itself has a key of `node`."""
        return self._found[node.name].pinned

    def of(self, node: Node) -> list[Entry]:
        """The keys of `node`."""
        return [entry for _, entry in self._found[node.name].entries]

    def name(self, node: Node) -> str:
        """The name by which keys of `node` are looked up; one that signs keys has signed them for a name as well."""
        signed = (word for word, entry in self._found[node.name].entries if entry.marker == CERT_AUTHORITY)
        return next(signed, node.name)

    def _find(self, node: Node, pins: Known) -> _Found:
        # Ansible's first: the address.
        words = list(dict.fromkeys(filter(None, (node.host_key_alias, node.address, node.name, node.alias))))
        found = [(node.name, Entry("", node.name, node.host_key))] if node.host_key else []
        found += pins.lookup(words, node.port)
        pinned = any(entry.marker != REVOKED for _, entry in found)
        if not pinned:
            files = (*node.known_hosts_files.splitlines(), *_OWN[2:]) if node.known_hosts_files else _OWN
            found += [pair for file in files for pair in self._read(file).lookup(words, node.port)]
        return _Found(pinned, tuple(found))

    def _read(self, file: str) -> Known:
        if file not in self._files:
            try:
                content = Path(file).expanduser().read_bytes()
            except (OSError, RuntimeError):  # not there, not readable, or no home
                content = b""
            self._files[file] = Known(lines(content))
        return self._files[file]


@contextmanager
def rendered(inventory: Inventory) -> Iterator[str]:
    """The path of the rendered ssh_config in a temporary private folder; pdsh and rsync need no quotes for it."""
    # TMPDIR may contain spaces, which PDSH_SSH_ARGS cannot carry.
    with tempfile.TemporaryDirectory(prefix="shakedown-", dir="/tmp") as folder:
        pinned = Path(folder, "known_hosts")
        pinned.write_text(known_hosts(inventory))
        config = Path(folder, "ssh_config")
        config.write_text(ssh_config(inventory, str(pinned)))
        yield str(config)
