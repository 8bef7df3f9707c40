"""The inventory: Ansible's, as Ansible itself reads it, so that both use the same nodes.

Only the fields of `Node` are kept; no other variable (such as a vaulted one) is stored anywhere.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from runner import __version__
from runner.cluster import ansible, profiles
from runner.cluster import known_hosts as known_hosts_of
from runner.cluster import nccl as nccl_of
from runner.cluster import slurm as slurm_settings
from runner.cluster.backends import BACKENDS, LOCAL, SSH
from runner.cluster.reach import reach
from runner.errors import UsageError, unknown
from runner.system import places
from runner.system.files import write_json_atomic
from runner.system.schema import check

GROUP = "gpu_nodes"

# Names, addresses and paths are used in ssh_config, hostfiles and, through DeepSpeed's pdsh, in remote
# shells: characters that would need quoting there are refused here, once.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_ADDRESS = re.compile(r"[A-Za-z0-9.:_-]+(?:%[A-Za-z0-9._-]+)?")  # an IPv6 address may have a zone: fe80::1%eth0
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*\$?")
_PATH = re.compile(r"[A-Za-z0-9._/+@~-]+")
_KEY_FILE = re.compile(r"[^\"\x00-\x1f{}]+")
_SCRATCH = re.compile(r"(?!.*/\.\.?(/|$))/[A-Za-z0-9._/+@-]*[A-Za-z0-9._+@-]")
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*")
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY$", re.IGNORECASE)
_HOST_KEY = re.compile(r"(?:ssh|ecdsa|sk)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/=]+(?: .*)?")


@dataclass(frozen=True)
class Node:
    """One host. `alias` is its position (node008 may be ...-0009); `gpus` is the number per node, None until observed.

    `nic_gbit_per_s` is the rate of one NIC, one way; `python`, `scratch` and `nccl_root` are paths on the node.
    `inventory` is where it is declared, which remedies name. `nccl` is the NCCL that its ranks use, "torch" or "built"
    (below `nccl_root`); None: the built one where there is one. `user` None is
    whom ssh chooses, `become` the user that Ansible becomes after logging in, None for the same. `ssh_options` are the
    lines of an ssh_config by which Ansible reaches it (port and user among them). `known_hosts_files` is a path a line:
    files that the inventory names instead of the user's own, in which its key may be under `host_key_alias` as well.
    `pythons` has the path of each profile's Python there (`cluster.profiles`), of which `setup` installs `profiles`
    (None: the inventory leaves it open); agents run in `python`. `modules` are the environment modules that
    are loaded where ranks start. `shared` is a folder that this machine and all nodes
    see at the same path, None where the inventory names none.
    """

    name: str
    alias: str
    address: str
    port: int
    user: str | None
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
    inventory: str = ""
    nccl: str | None = None
    nccl_root: str = nccl_of.ROOT
    ssh_options: str = ""
    known_hosts_files: str = ""
    host_key_alias: str | None = None
    become: str | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)
    profiles: Sequence[str] | None = None
    modules: Sequence[str] = ()
    shared: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))  # a list where it comes from JSON; nodes are compared

    @property
    def endpoint(self) -> str:
        """`address:port` of its sshd, which is unique: two clusters may use the same node names."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def sudo(self) -> tuple[str, ...]:
        """The words before a command there that make it run as `become`."""
        return ("sudo", "-n", "-H", "-u", self.become, "--") if self.become else ()

    def of_profile(self, profile: str) -> Node:
        """This node with the Python of `profile` as its own; itself for "". Raises UsageError for one it has not."""
        if not profile:
            return self
        if profile not in self.pythons:
            raise unknown("profile", profile, self.pythons, f"{self.name}, runner_pythons of {self.inventory}")
        return replace(self, python=self.pythons[profile])


@dataclass(frozen=True)
class Inventory:
    """The nodes in inventory order, and the path they were read from; `slurm` has the keys of slurm.Settings.

    `known_hosts` are the lines of pinned host keys. `login` is the host that `runner_slurm` names for Slurm's commands,
    None where it is one of the nodes or not set.
    """

    source: str
    nodes: tuple[Node, ...]
    known_hosts: tuple[str, ...] = ()
    slurm: Mapping[str, Any] = field(default_factory=dict)
    login: Node | None = None

    @property
    def hosts(self) -> tuple[Node, ...]:
        """All hosts that are reached over ssh: the nodes, then the login host if there is one."""
        return (*self.nodes, self.login) if self.login else self.nodes


class _Variables(BaseModel):
    """The product's own variables of one host; `reach` reads Ansible's, others are for its roles."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    runner_backend: Literal["ssh", "slurm"] | None = None
    runner_slurm: dict[str, Any] = Field(default_factory=dict)
    runner_alias: str | None = None
    runner_host_key: str | None = None
    runner_python: str | None = None
    runner_pythons: dict[str, str] = Field(default_factory=dict)
    runner_profiles: list[str] | None = None
    runner_modules: list[str] = Field(default_factory=list)
    runner_gpus_per_node: PositiveInt | Literal["auto"] = "auto"
    runner_device: Literal["auto", "cuda", "cpu"] = "auto"
    runner_hardware: str = "cpu"
    runner_nics_per_node: Annotated[int, Field(ge=0)] = 1
    runner_nic_gbit_per_s: PositiveFloat | None = None
    runner_shared: str | None = None
    runner_scratch: str = "/var/tmp/shakedown"
    runner_min_free_disk_gib: float = 1.0
    runner_env: dict[str, str | int | float] = Field(default_factory=dict)
    runner_nccl: nccl_of.Choice | None = None
    nccl_build_root: str = nccl_of.ROOT  # of role nccl_build
    conda_env_prefix: str | None = None  # of role conda_env, as is the next
    conda_env_profile: str | None = None


def default_source(own: Path = places.ANSIBLE_CFG) -> str:
    """The path of the inventory in ansible.cfg, the one that `ansible-playbook site.yml` uses without -i.

    `own` is the product's ansible.cfg; the inventory that it names exists in a checkout and not in a wheel. Raises
    UsageError where there is none.
    """
    for candidate in (os.environ.get("ANSIBLE_CONFIG"), "ansible.cfg", str(own)):
        if candidate and Path(candidate).is_file():
            parser = configparser.ConfigParser(interpolation=None)
            parser.read(candidate)
            source = parser.get("defaults", "inventory", fallback=None)
            path = Path(candidate).resolve().parent / (source or "")
            if source and (path.exists() or candidate != str(own)):
                return str(path)
    raise UsageError("no inventory: give one with -i, such as -i local, or write one with `runner inventory init DIR`")


def read(source: str, cache: Path) -> Inventory:
    """Read the inventory `source`: a file, a folder, or a plain name that `places.inventory` knows.

    Ansible takes most of a second, so the result is cached in the folder `cache`, keyed by the content of the
    source's files and Ansible's settings; executable (dynamic) inventories are read again each time. Raises
    UsageError where the inventory is missing or invalid.
    """
    path = places.inventory(source)
    if path is None:
        near = {str(hosts.parent) for hosts in Path(source).parent.glob("*/hosts.y*ml")}
        if "/" not in source:
            near |= {*places.inventories()}
        if not near:
            raise UsageError(f"no inventory {source}: write one with `runner inventory init {source}`, or name another")
        raise unknown("inventory", source, near)
    source = str(path)
    files = _read_by_ansible(path)
    static = not any(os.access(p, os.X_OK) and p.suffix not in (".yml", ".yaml") for p in files)
    key = hashlib.sha256()
    own = [str(profiles.place(profile)) for profile in profiles.LOCKS]
    for part in [__version__, sys.executable, *own, str(path.resolve()), str(Path.cwd())]:  # paths in it begin here
        key.update(f"{part}\0".encode())
    key.update(json.dumps(ansible.environment()).encode())
    for file in (*files, *ansible.files()):
        content = file.read_bytes()
        key.update(f"{file}\0{len(content)}\0".encode() + content)
    kept = cache / f"{key.hexdigest()}.json"
    if static and kept.is_file():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a damaged cache is ignored
            data = json.loads(kept.read_text())
            # The same inventory may be named by another spelling of its path now.
            login = Node(**{**data["login"], "inventory": source}) if data["login"] else None
            nodes = tuple(Node(**{**node, "inventory": source}) for node in data["nodes"])
            return Inventory(source, nodes, tuple(data["known_hosts"]), data["slurm"], login)
    listing = ansible.listing(source)
    meta = listing["_meta"]
    inventory = parse(source, listing, _known_hosts(path), meta["settings"])
    if static and meta["lasting"]:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json_atomic(kept, {key: value for key, value in asdict(inventory).items() if key != "source"})
    return inventory


def _read_by_ansible(path: Path) -> list[Path]:
    """Every file that can contribute to the inventory: for a file, also group_vars and host_vars beside it."""
    roots = [path] if path.is_dir() else [path.parent / "group_vars", path.parent / "host_vars"]
    inside = {p for root in roots for p in root.rglob("*") if p.is_file() and not _hidden(p, root)}
    beside = {p for p in (path, _known_hosts_file(path)) if p.is_file()}
    return sorted(inside | beside)


def _hidden(path: Path, root: Path) -> bool:
    """Whether `path` is below a dot folder (such as one with keys), which Ansible ignores too."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _known_hosts_file(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "known_hosts"


def _known_hosts(path: Path) -> tuple[str, ...]:
    """The lines of the known_hosts file beside the inventory; empty without one."""
    file = _known_hosts_file(path)
    lines = known_hosts_of.lines(file.read_bytes()) if file.is_file() else ()
    return tuple(line for line in lines if line.strip() and not line.startswith("#"))


def parse(
    source: str,
    listing: Mapping[str, Any],
    known_hosts: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Inventory:
    """The inventory from the output of `ansible-inventory --list`: the group `gpu_nodes`, or all hosts without it.

    `source` names it in errors, `known_hosts` are the lines of pinned keys, `settings` are Ansible's
    (`ansible.listing`). Raises UsageError where it is invalid.
    """
    settings = settings or {}
    hostvars = listing.get("_meta", {}).get("hostvars", {})
    unread = listing.get("_meta", {}).get("unread", {})
    names = _members(listing, GROUP) if GROUP in listing else list(hostvars) or _members(listing, "all")
    if not names:
        raise UsageError(f"inventory {source} has no hosts: list them in the group {GROUP}")
    nodes, known = [], set(names)
    for position, name in enumerate(names, start=1):
        # A host whose own name is node001 keeps that name; the host at that position then gets no alias.
        alias = f"node{position:03d}"
        _demand_read(source, name, unread)
        nodes.append(_node(source, name, name if alias in known else alias, hostvars.get(name, {}), settings))
    taken: dict[str, str] = {}
    for node in nodes:
        for word in {node.name, node.alias}:
            if word in taken:
                raise UsageError(f"inventory {source}: {node.name} and {taken[word]} are both called {word!r}")
            taken[word] = node.name
    backends = {node.backend for node in nodes}
    if not all(BACKENDS[backend].remote for backend in backends) and len(nodes) > 1:
        raise UsageError(f"inventory {source}: ansible_connection local allows a single host only")
    if len(backends) > 1:
        raise UsageError(f"inventory {source}: runner_backend differs between hosts: set it once, for {GROUP}")
    slurm = _slurm(source, [hostvars.get(n, {}) for n in names])
    if "login" not in slurm and BACKENDS[nodes[0].backend].by_ssh and (controller := _controller(listing, names)):
        slurm["login"] = controller
    head = slurm.get("login")
    login = None
    if head is not None and head not in by_word(nodes):
        _demand_read(source, head, unread)
        login = _login(source, head, hostvars, settings)
    return Inventory(source, tuple(nodes), tuple(known_hosts), slurm, login)


def _demand_read(source: str, name: str, unread: Mapping[str, str]) -> None:
    if name in unread:
        raise UsageError(f"inventory {source}: {name}: {unread[name]}")


def _login(source: str, name: str, hostvars: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> Node:
    if name not in hostvars:
        raise unknown("host", name, hostvars, f"inventory {source}: runner_slurm: login")
    return _node(source, name, name, hostvars[name], settings)


def _controller(listing: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The host on which the role slurm_cluster runs Slurm's controller; None where it sets up no Slurm, or where only
    a template says on which.
    """
    hostvars = listing.get("_meta", {}).get("hostvars", {})
    variables = hostvars.get(names[0], {})
    if str(variables.get("slurm_cluster_enabled", False)).lower() not in ("true", "yes", "1", "on"):
        return None
    members = _members(listing, str(variables.get("slurm_cluster_group", GROUP)))
    controller = variables.get("slurm_cluster_controller", members[0] if members else None)
    return controller if controller in hostvars else None


def _slurm(source: str, variables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`runner_slurm`, validated; it must be equal on all hosts."""
    first, *others = [host.get("runner_slurm", {}) for host in variables]
    if any(other != first for other in others):
        raise UsageError(f"inventory {source}: runner_slurm differs between hosts: set it once, for {GROUP}")
    if first:
        slurm_settings.settings(first, f"inventory {source}: runner_slurm")
    return dict(first)


def _members(listing: Mapping[str, Any], group: str) -> list[str]:
    entry = listing.get(group, {})
    members = list(entry.get("hosts", []))
    for child in entry.get("children", []):
        members += [name for name in _members(listing, child) if name not in members]
    return members


def _node(source: str, name: str, alias: str, variables: Mapping[str, Any], settings: Mapping[str, Any]) -> Node:
    where = f"inventory {source}: {name}"
    for key in variables:
        if key.startswith("runner_") and key not in _Variables.model_fields:
            raise unknown("variable", key, [f for f in _Variables.model_fields if f.startswith("runner_")], where)
    values = check(_Variables, dict(variables), where)
    made = f"{values.conda_env_prefix}/bin/python" if values.conda_env_prefix else sys.executable
    python = values.runner_python or made
    pythons = profiles.pythons(python, values.conda_env_prefix, values.conda_env_profile, values.runner_pythons)
    way = reach(where, name, variables, settings)
    for what, word, pattern in (
        ("host name", name, _NAME),
        ("runner_alias", values.runner_alias or alias, _NAME),
        ("ansible_host", way.address, _ADDRESS),
        ("ansible_user", way.user or "x", _USER),
        ("ansible_become_user", way.become or "x", _USER),
        ("runner_scratch", values.runner_scratch, _SCRATCH),
        ("runner_shared", values.runner_shared or "/-", _SCRATCH),
        ("nccl_build_root", values.nccl_build_root, _SCRATCH),
        ("ansible_ssh_private_key_file", way.key_file or "-", _KEY_FILE),
        *(
            (what, path, re.compile(".+") if way.local else _PATH)
            for what, path in (
                ("runner_python", python),
                *((f"runner_pythons of {profile}", path) for profile, path in pythons.items()),
            )
        ),
        ("runner_host_key", values.runner_host_key or "ssh-x x", _HOST_KEY),
    ):
        if what == "host name" and ":" in word:
            raise UsageError(f"{where}: an address is no name: give the host a name, and ansible_host: '{word}'")
        if not pattern.fullmatch(word):
            raise UsageError(f"{where}: {what} {word!r} has characters that are not allowed there ({pattern.pattern})")
    for profile in values.runner_profiles or ():
        if profile not in profiles.LOCKS:
            raise unknown("profile", profile, profiles.LOCKS, f"{where}: runner_profiles")
    for module in values.runner_modules:
        if not _MODULE.fullmatch(module):
            raise UsageError(
                f"{where}: runner_modules has {module!r}: give names as `module load` takes them, name/version"
            )
    for key in values.runner_env:
        if not _ENV.fullmatch(key):
            raise UsageError(f"{where}: runner_env has {key!r}, which is not a valid name of an environment variable")
        if _SECRET.search(key):
            raise UsageError(
                f"{where}: runner_env has {key}, and plans are saved: leave secrets out of the inventory and set "
                "HF_TOKEN or WANDB_API_KEY in the environment that runner is started from"
            )
    return Node(
        name=name,
        alias=values.runner_alias or alias,
        address=way.address,
        port=way.port,
        user=way.user,
        key_file=way.key_file,
        host_key=values.runner_host_key,
        python=python,
        gpus=None if values.runner_gpus_per_node == "auto" else values.runner_gpus_per_node,
        device=values.runner_device,
        hardware=values.runner_hardware,
        nics=values.runner_nics_per_node,
        nic_gbit_per_s=values.runner_nic_gbit_per_s,
        scratch=values.runner_scratch,
        shared=values.runner_shared,
        min_free_disk_gib=values.runner_min_free_disk_gib,
        backend=values.runner_backend or (LOCAL if way.local else SSH),
        env={key: str(value) for key, value in values.runner_env.items()},
        inventory=source,
        nccl=values.runner_nccl,
        nccl_root=values.nccl_build_root,
        ssh_options="\n".join(way.options),
        known_hosts_files="\n".join(way.known_hosts_files),
        host_key_alias=way.host_key_alias,
        become=way.become,
        pythons=pythons,
        profiles=values.runner_profiles,
        modules=tuple(values.runner_modules),
    )


def select(inventory: Inventory, hosts: str | None) -> tuple[Node, ...]:
    """The nodes in the set `hosts` (names, aliases, addresses, folded sets), in inventory order; None selects all.

    Raises UsageError for an unknown node or an invalid set.
    """
    if hosts is None:
        return inventory.nodes
    from ClusterShell.NodeSet import NodeSet, NodeSetParseError

    nodes = by_word(inventory.nodes)
    try:
        requested = NodeSet(hosts, resolver=None)
    except NodeSetParseError as error:
        raise UsageError(f"--hosts {hosts}: {error}; write sets as node[001-003,005] or a,b,c") from None
    if not requested:
        raise UsageError("--hosts names no node; write sets as node[001-003,005] or a,b,c")
    chosen = set()
    for word in requested:
        if word not in nodes:
            raise unknown(
                "node", word, [n for node in inventory.nodes for n in (node.name, node.alias)], f"--hosts {hosts}"
            )
        chosen.add(nodes[word].name)
    return tuple(node for node in inventory.nodes if node.name in chosen)


def by_word(nodes: Sequence[Node]) -> dict[str, Node]:
    """The nodes by each of their address, alias and name, one of which is the name in Slurm; names take precedence."""
    return {word: node for node in nodes for word in (node.address, node.alias, node.name)}
