"""The inventory: Ansible's, read through `ansible-inventory`, so that both see the same nodes.

What is kept of it are the fields of `Node`; no other variable (a vaulted one, say) is stored anywhere.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from runner import __version__, process
from runner.config import check
from runner.errors import UsageError, unknown

GROUP = "gpu_nodes"

# Names, addresses and paths end up in ssh_config, hostfiles and, over DeepSpeed's pdsh, in remote
# shells: what could need quoting there is refused here, once.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_ADDRESS = re.compile(r"[A-Za-z0-9.:_-]+")
_PATH = re.compile(r"[A-Za-z0-9._/+@~-]+")
_HOST_KEY = re.compile(r"(?:ssh|ecdsa|sk)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/=]+(?: .*)?")


@dataclass(frozen=True)
class Node:
    """One host. `alias` is its position (node008 may be ...-0009); `gpus` is None until observed."""

    name: str
    alias: str
    address: str
    port: int
    user: str
    key_file: str | None
    host_key: str | None
    python: str
    gpus: int | None
    device: Literal["auto", "cuda", "cpu"]
    hardware: str
    nics: int
    nic_gbit_per_s: float | None
    scratch: str
    min_free_disk_gib: float
    backend: str
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inventory:
    """The nodes in inventory order, and where they were read from."""

    source: str
    nodes: tuple[Node, ...]
    known_hosts: tuple[str, ...] = ()


class _Variables(BaseModel):
    """The variables of one host that the product reads; others belong to Ansible and its roles."""

    model_config = ConfigDict(extra="ignore")

    ansible_host: str | None = None
    ansible_port: PositiveInt = 22
    ansible_user: str = "root"
    ansible_ssh_private_key_file: str | None = None
    ansible_connection: str = "ssh"
    runner_alias: str | None = None
    runner_host_key: str | None = None
    runner_python: str | None = None
    runner_gpus_per_node: PositiveInt | Literal["auto"] = "auto"
    runner_device: Literal["auto", "cuda", "cpu"] = "auto"
    runner_hardware: str = "cpu"
    runner_nics_per_node: int = 1
    runner_nic_gbit_per_s: float | None = None
    runner_scratch: str = "/var/tmp/shakedown"
    runner_min_free_disk_gib: float = 1.0
    runner_env: dict[str, str | int | float] = Field(default_factory=dict)


def default_source() -> str:
    """The inventory of ansible.cfg: what `ansible-playbook site.yml` takes without -i."""
    root = Path(__file__).resolve().parent.parent
    for candidate in (os.environ.get("ANSIBLE_CONFIG"), "ansible.cfg", str(root / "ansible.cfg")):
        if candidate and Path(candidate).is_file():
            parser = configparser.ConfigParser(interpolation=None)
            parser.read(candidate)
            if source := parser.get("defaults", "inventory", fallback=None):
                return str(Path(candidate).resolve().parent / source)
    raise UsageError("no inventory: give one with -i, or name one in ansible.cfg")


def read(source: str, cache: Path) -> Inventory:
    """The inventory at `source` (a file or folder).

    `ansible-inventory` takes most of a second, so what it gave is kept in `cache`, keyed by the bytes
    of the source's files; executable (dynamic) inventories are read anew each time.
    """
    path = Path(source)
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        raise unknown("inventory", source, [str(path.parent / name) for name in near])
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    static = not any(os.access(p, os.X_OK) and p.suffix not in (".yml", ".yaml") for p in files)
    key = hashlib.sha256()
    for part in [__version__, str(path.resolve())]:
        key.update(part.encode())
    for file in files:
        # A key file is no part of the inventory's content; its bytes are not read.
        key.update(
            f"\0{file}\0".encode() + (file.read_bytes() if file.suffix in (".yml", ".yaml", ".ini", "") else b"")
        )
    kept = cache / f"{key.hexdigest()}.json"
    if static and kept.is_file():
        data = json.loads(kept.read_text())
        return Inventory(source, tuple(Node(**node) for node in data["nodes"]), tuple(data["known_hosts"]))
    inventory = parse(source, _list(source), _known_hosts(path))
    if static:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(
            json.dumps({"nodes": [asdict(n) for n in inventory.nodes], "known_hosts": inventory.known_hosts})
        )
        partial.replace(kept)
    return inventory


def _list(source: str) -> dict[str, Any]:
    import sys

    program = Path(sys.executable).with_name("ansible-inventory")
    env = {**os.environ, "ANSIBLE_INVENTORY_UNPARSED_FAILED": "true", "ANSIBLE_LOCALHOST_WARNING": "false"}
    outcome = process.run(
        [str(program) if program.exists() else "ansible-inventory", "-i", source, "--list"], timeout_s=60, env=env
    )
    if outcome.rc != 0:
        reason = next((line for line in outcome.stderr.splitlines() if "ERROR" in line), outcome.last_line)
        raise UsageError(f"inventory {source}: {reason.replace('[ERROR]:', '').strip()}")
    return json.loads(outcome.stdout)


def _known_hosts(path: Path) -> tuple[str, ...]:
    """Pinned keys beside the inventory, for clusters that keep them in a known_hosts file."""
    file = path / "known_hosts" if path.is_dir() else path.parent / "known_hosts"
    if not file.is_file():
        return ()
    return tuple(line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#"))


def parse(source: str, listing: Mapping[str, Any], known_hosts: Sequence[str] = ()) -> Inventory:
    """The nodes of `ansible-inventory --list`'s output: group `gpu_nodes`, or every host without it."""
    hostvars = listing.get("_meta", {}).get("hostvars", {})
    names = _members(listing, GROUP) if GROUP in listing else list(hostvars) or _members(listing, "all")
    if not names:
        raise UsageError(f"inventory {source} has no hosts: list them in the group {GROUP}")
    nodes = []
    for position, name in enumerate(names, start=1):
        nodes.append(_node(source, name, f"node{position:03d}", hostvars.get(name, {})))
    taken: dict[str, str] = {}
    for node in nodes:
        for word in {node.name, node.alias}:
            if word in taken:
                raise UsageError(f"inventory {source}: {node.name} and {taken[word]} are both called {word!r}")
            taken[word] = node.name
    if len({node.backend for node in nodes}) > 1 or (nodes[0].backend == "local" and len(nodes) > 1):
        raise UsageError(f"inventory {source}: ansible_connection local goes with one host alone")
    return Inventory(source, tuple(nodes), tuple(known_hosts))


def _members(listing: Mapping[str, Any], group: str) -> list[str]:
    entry = listing.get(group, {})
    members = list(entry.get("hosts", []))
    for child in entry.get("children", []):
        members += [name for name in _members(listing, child) if name not in members]
    return members


def _node(source: str, name: str, alias: str, variables: Mapping[str, Any]) -> Node:
    import sys

    where = f"inventory {source}: {name}"
    for key in variables:
        if key.startswith("runner_") and key not in _Variables.model_fields:
            raise unknown("variable", key, [f for f in _Variables.model_fields if f.startswith("runner_")], where)
    values = check(_Variables, dict(variables), where)
    address = values.ansible_host or name
    for what, word, pattern in (
        ("host name", name, _NAME),
        ("runner_alias", values.runner_alias or alias, _NAME),
        ("ansible_host", address, _ADDRESS),
        ("ansible_user", values.ansible_user, _NAME),
        ("runner_scratch", values.runner_scratch, _PATH),
        (
            "runner_python",
            values.runner_python or sys.executable,
            _PATH if values.ansible_connection != "local" else re.compile(".+"),
        ),
        ("runner_host_key", values.runner_host_key or "ssh-x x", _HOST_KEY),
    ):
        if not pattern.fullmatch(word):
            raise UsageError(f"{where}: {what} {word!r} has characters that are not allowed there ({pattern.pattern})")
    return Node(
        name=name,
        alias=values.runner_alias or alias,
        address=address,
        port=values.ansible_port,
        user=values.ansible_user,
        key_file=values.ansible_ssh_private_key_file,
        host_key=values.runner_host_key,
        python=values.runner_python or sys.executable,
        gpus=None if values.runner_gpus_per_node == "auto" else values.runner_gpus_per_node,
        device=values.runner_device,
        hardware=values.runner_hardware,
        nics=values.runner_nics_per_node,
        nic_gbit_per_s=values.runner_nic_gbit_per_s,
        scratch=values.runner_scratch,
        min_free_disk_gib=values.runner_min_free_disk_gib,
        backend="local" if values.ansible_connection == "local" else "ssh",
        env={key: str(value) for key, value in values.runner_env.items()},
    )


def select(inventory: Inventory, hosts: str | None) -> tuple[Node, ...]:
    """The nodes that `hosts` names (names, aliases, addresses, folded sets), in inventory order."""
    if hosts is None:
        return inventory.nodes
    from ClusterShell.NodeSet import NodeSet, NodeSetParseError

    by_word = {word: node for node in inventory.nodes for word in (node.address, node.alias, node.name)}
    try:
        wanted = NodeSet(hosts, resolver=None)
    except NodeSetParseError as error:
        raise UsageError(f"--hosts {hosts}: {error}; write sets as node[001-003,005] or a,b,c") from None
    chosen = set()
    for word in wanted:
        if word not in by_word:
            raise unknown(
                "node", word, [n for node in inventory.nodes for n in (node.name, node.alias)], f"--hosts {hosts}"
            )
        chosen.add(by_word[word].name)
    return tuple(node for node in inventory.nodes if node.name in chosen)


def fold(words: Sequence[str]) -> str:
    """`node[001-003]` for node001, node002, node003."""
    from ClusterShell.NodeSet import NodeSet

    return str(NodeSet.fromlist(list(words), resolver=None))


def ssh_config(inventory: Inventory, known_hosts_file: str) -> str:
    """The one OpenSSH configuration that ClusterShell, pdsh, rsync, DeepSpeed and people use.

    Host keys are pinned (strict checking, only the given file and the user's own); nothing is asked.
    """
    lines = [f"# Rendered from {inventory.source}: `ssh -F THIS_FILE {inventory.nodes[0].alias}`"]
    for node in inventory.nodes:
        lines += [
            "",
            f"Host {' '.join(dict.fromkeys((node.name, node.alias, node.address)))}",
            f"  HostName {node.address}",
            f"  HostKeyAlias {node.name}",
            f"  Port {node.port}",
            f"  User {node.user}",
        ]
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
    pinned = [f"{node.name} {node.host_key}" for node in inventory.nodes if node.host_key]
    return "".join(f"{line}\n" for line in [*pinned, *inventory.known_hosts])
