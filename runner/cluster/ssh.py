"""The one OpenSSH configuration by which everything reaches the nodes, with their pinned host keys."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.cluster.inventory import Inventory


def ssh_config(inventory: Inventory, known_hosts_file: str) -> str:
    """The one OpenSSH configuration that ClusterShell, pdsh, rsync, DeepSpeed and people use.

    Host keys are always checked: against the inventory's pins where it has some, and those alone, else
    against the user's own known_hosts. Nothing is asked.
    """
    pinned = {line.split()[0] for line in known_hosts(inventory).splitlines()}
    lines = [f"# Rendered from {inventory.source!r}: `ssh -F THIS_FILE {inventory.nodes[0].alias}`"]
    for node in inventory.hosts:
        lines += [
            "",
            f"Host {' '.join(dict.fromkeys((node.name, node.alias, node.address)))}",
            f"  HostName {node.address}",
            f"  HostKeyAlias {node.name}",
            f"  Port {node.port}",
            f"  User {node.user}",
        ]
        if node.name in pinned:  # a pin is exclusive: no other file may vouch for another key
            lines += [f'  UserKnownHostsFile "{known_hosts_file}"', "  GlobalKnownHostsFile /dev/null"]
        if node.key_file:
            lines += [f'  IdentityFile "{node.key_file}"', "  IdentitiesOnly yes"]
    return "\n".join(
        [
            *lines,
            "",
            "Host *",
            "  BatchMode yes",
            "  StrictHostKeyChecking yes",
            f'  UserKnownHostsFile "{known_hosts_file}" ~/.ssh/known_hosts',
            "  ConnectTimeout 10",
            "  ServerAliveInterval 5",
            "  ServerAliveCountMax 6",
            "  LogLevel ERROR",
            "",
        ]
    )


def known_hosts(inventory: Inventory) -> str:
    """The pinned host keys, by node name (HostKeyAlias makes addresses and ports irrelevant)."""
    names: dict[str, str] = {}
    for node in inventory.hosts:
        for word in (node.name, node.alias, node.address):
            names |= {word: node.name, f"[{word}]:{node.port}": node.name}
    pinned = [f"{node.name} {node.host_key}" for node in inventory.hosts if node.host_key]
    for line in inventory.known_hosts:
        hosts, _, key = line.partition(" ")
        # `ssh-keyscan -p 44222 HOST` writes [HOST]:44222, which HostKeyAlias would not find.
        for name in dict.fromkeys(names.get(host, host) for host in hosts.split(",")):
            pinned.append(f"{name} {key}")
    return "".join(f"{line}\n" for line in dict.fromkeys(pinned))


@contextmanager
def rendered(inventory: Inventory) -> Iterator[str]:
    """A private folder with the rendered ssh_config, on a path that pdsh and rsync can take unquoted."""
    # TMPDIR may hold spaces, which PDSH_SSH_ARGS cannot carry.
    with tempfile.TemporaryDirectory(prefix="shakedown-", dir="/tmp") as folder:
        pinned = Path(folder, "known_hosts")
        pinned.write_text(known_hosts(inventory))
        config = Path(folder, "ssh_config")
        config.write_text(ssh_config(inventory, str(pinned)))
        yield str(config)
