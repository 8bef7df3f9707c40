"""The layout of a testbed: nodes, image, containers, inventory. Pure functions."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from runner.cluster import profiles
from runner.errors import InfrastructureError, UsageError
from runner.system.places import TESTBED

SSH_PORT = 44222  # as testbed/sshd.conf


MAX_NODES = 16


DEFAULT_NAME = "testbed"


LABEL = "shakedown.testbed"


INSTALL = TESTBED / "install-system-packages.sh"


SUBNETS = tuple(f"10.89.{third}.0/24" for third in range(256))  # podman's own range for bridges


KEYS_IN_NODE = "/etc/ssh/testbed"  # as testbed/sshd.conf


NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


@dataclass(frozen=True)
class Options:
    """The user's options. `memory` in podman's format ("4g"), `cpus` in cores, both per node.

    `share` is a folder that is mounted read-write into every node at the same path, as a home on NFS would be.
    `release` is the nodes' release of this machine's distribution by its code name ("trixie"); None: this machine's.
    """

    nodes: int = 8
    name: str = DEFAULT_NAME
    inventory: Path | None = None
    memory: str | None = None
    cpus: float | None = None
    image: str | None = None
    release: str | None = None
    share: Path | None = None


@dataclass(frozen=True)
class Machine:
    """The properties of this machine that apply to the nodes: its Python, mounted folders, hard limits."""

    python: str
    mounts: tuple[str, ...]
    runtime: str | None
    max_open_files: int
    max_processes: int


@dataclass(frozen=True)
class Base:
    """The base image: `image`, built with debootstrap where `suite` and `mirror` are given."""

    image: str
    suite: str | None = None
    mirror: str | None = None
    components: str = "main"


@dataclass(frozen=True)
class Node:
    """One node: its host name, its alias (node001) and its IPv4 address."""

    name: str
    alias: str
    address: str


@dataclass(frozen=True)
class Step:
    """A command with a description for people and its expected duration in seconds."""

    what: str
    expected_s: float
    argv: tuple[str, ...]


def lay_out(count: int, subnet: str) -> list[Node]:
    """`count` nodes in `subnet`, named as those of the first real cluster: ...-0007 is followed by ...-0009.

    Raises UsageError for a count outside 1 to MAX_NODES.
    """
    if not 1 <= count <= MAX_NODES:
        raise UsageError(f"--nodes {count}: a testbed has 1 to {MAX_NODES} nodes")
    network = IPv4Network(subnet)
    return [
        Node(
            name=f"fukushimadc-02-hgx-{position + (position >= 8):04d}",
            alias=f"node{position:03d}",
            address=str(network[10 + position]),  # the gateway has the first
        )
        for position in range(1, count + 1)
    ]


def bootstrapped_base(os_release: Mapping[str, str], indexes: str, release: str | None = None) -> Base:
    """A base image of this machine's distribution, with which its Python works, from the mirror it uses itself.

    `os_release` has the fields of /etc/os-release, `indexes` the lines `site suite component` of
    `apt-get indextargets`; `release` is another release of the distribution, which the same mirror has. Raises
    UsageError for a name that is none, InfrastructureError where no mirror is found.
    """
    if release is not None and not re.fullmatch(r"[a-z]+", release):
        raise UsageError(f"--release {release!r}: give the code name of a release, e.g. trixie")
    own = os_release.get("VERSION_CODENAME", "")
    mirror = next((f[0] for f in map(str.split, indexes.splitlines()) if f[1:] == [own, "main"]), None)
    if not own or mirror is None:
        found = os_release.get("PRETTY_NAME", "an unknown system")
        raise InfrastructureError(
            f"no Debian or Ubuntu package mirror found for {found}: give an image with --image, e.g. debian:12"
        )
    suite = release or own
    # Ubuntu keeps pdsh in universe.
    components = "main,universe" if os_release.get("ID") == "ubuntu" else "main"
    return Base(f"localhost/shakedown-base:{suite}", suite, mirror.rstrip("/"), components)


def image_tag(base: Base, definition: Mapping[str, str]) -> str:
    """The image's name, with a hash of everything it is built from (`definition`: file name -> content)."""
    made_from = json.dumps([base.image, base.suite, base.mirror, sorted(definition.items())])
    return f"localhost/shakedown-testbed:{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"


def base_steps(base: Base, folder: str) -> list[Step]:
    """The commands that build `base` in the empty `folder`; none where it comes from a registry."""
    if base.suite is None or base.mirror is None:
        return []
    root, tar = f"{folder}/root", f"{folder}/base.tar"
    bootstrap = ("debootstrap", "--variant=minbase", f"--components={base.components}")
    return [
        Step(f"debootstrap of {base.suite}", 35, (*bootstrap, base.suite, root, base.mirror)),
        Step("packing the base system", 1, ("tar", "-C", root, "-cf", tar, ".")),
        Step("importing the base system", 4, ("podman", "import", "--quiet", tar, base.image)),
    ]


def build_step(base: Base, tag: str, definition: str = str(TESTBED)) -> Step:
    """The command that builds the image `tag` on `base`; `definition` is the folder of the Containerfile."""
    # chroot isolation and the host's network require the least of the kernel, and reach the mirror as the host does.
    argv = ("podman", "build", "--network", "host", "--isolation", "chroot", "--build-arg", f"BASE={base.image}")
    return Step("installing systemd, sshd and Python's libraries", 15, (*argv, "--tag", tag, definition))


def network_name(testbed: str) -> str:
    """The name of the podman network of `testbed`."""
    return f"shakedown-{testbed}"


def network_argv(testbed: str, label: str, subnet: str) -> list[str]:
    """The command that creates the network: internal, so that no traffic leaves the machine, and without DNS.

    Names are in /etc/hosts. An internal network without DNS has a gateway, the controller's own address in it, only if
    one is given.
    """
    argv = ["podman", "network", "create", "--internal", "--disable-dns", "--subnet", subnet]
    argv += ["--gateway", str(IPv4Network(subnet)[1]), "--label", f"{LABEL}={label}"]
    return [*argv, network_name(testbed)]


def container_argv(
    node: Node, nodes: Sequence[Node], options: Options, machine: Machine, image: str, label: str, home: Path
) -> list[str]:
    """The command that starts `node`; `home` is the testbed's folder: `shared` of it is seen by all nodes, and `keys`
    has the node's own folder of SSH keys.
    """
    argv = ["podman", *(["--runtime", machine.runtime] if machine.runtime else []), "run", "--detach"]
    argv += ["--name", f"shakedown-{options.name}-{node.alias}", "--hostname", node.name]
    argv += ["--label", f"{LABEL}={label}", "--systemd=always"]
    # NET_ADMIN: routes, MTU and slow links (tc) can be set in the node, as on a real one.
    argv += ["--network", network_name(options.name), "--ip", node.address, "--cap-add", "NET_ADMIN"]
    argv += ["--dns", "127.0.0.1"]  # no server there: an unknown name fails at once instead of after 10 s
    for other in nodes:
        argv += ["--add-host", f"{other.name}:{other.address}", "--add-host", f"{other.alias}:{other.address}"]
    argv += ["--shm-size", "1g"]  # PyTorch's data loaders and gloo need more than a container's 64 MB
    for limit, value in (("nofile", machine.max_open_files), ("nproc", machine.max_processes)):
        argv += ["--ulimit", f"{limit}={value}:{value}"]
    if options.memory:
        argv += ["--memory", options.memory]
    if options.cpus:
        argv += ["--cpus", f"{options.cpus:g}"]
    for path in machine.mounts:
        argv += ["--volume", f"{path}:{path}:ro"]
    for folder in (shared(home), *([options.share] if options.share else [])):
        argv += ["--volume", f"{folder}:{folder}"]
    return [*argv, "--volume", f"{home}/keys/{node.alias}:{KEYS_IN_NODE}:ro", image]


def shared(home: Path) -> Path:
    """The folder that this machine and all nodes of the testbed in `home` see, for what a stage leaves to the next."""
    return home / "shared"


def inventory(
    nodes: Sequence[Node],
    host_keys: Mapping[str, str],
    folder: Path,
    python: str,
    home: Path,
    share: Path | None = None,
) -> dict[str, Any]:
    """The Ansible inventory of `nodes`; `host_keys` by node name, `folder` is the folder it is written to.

    `home` is the testbed's own folder, `share` the user's that the nodes share with this machine.
    """
    # For plain `ansible`; quoted twice, since ssh splits the option's value as well.
    known_hosts = shlex.quote(f'UserKnownHostsFile="{folder / ".ssh" / "known_hosts"}"')
    hosts = {
        node.name: {
            "ansible_host": node.address,
            "runner_alias": node.alias,
            "runner_host_key": host_keys[node.name],
        }
        for node in nodes
    }
    variables = {
        "ansible_port": SSH_PORT,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(folder / ".ssh" / "id_ed25519"),
        "ansible_ssh_common_args": f"-o StrictHostKeyChecking=yes -o {known_hosts}",
        "ansible_python_interpreter": "/usr/bin/python3",
        "runner_python": python,
        "runner_profiles": [profiles.ON_CPUS],
        "runner_gpus_per_node": 1,
        "runner_device": "cpu",
        "runner_hardware": "cpu",
        "runner_nics_per_node": 1,
        "runner_scratch": "/var/tmp/shakedown",
        "runner_shared": str(shared(home)),
        # Slurm's controller, and so its commands, are on the first node. With a shared folder it depends on where
        # results are written whether nodes see them: that is observed.
        "runner_slurm": {"login": nodes[0].name, **({} if share else {"shared": False})},
        "runner_env": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
        # For `runner setup`: the controller's environments are mounted, Slurm's packages are in apt's cache.
        "conda_env_enabled": False,
        "slurm_cluster_enabled": True,
        "slurm_cluster_proctrack": "linuxproc",
    }
    return {"all": {"children": {"gpu_nodes": {"hosts": hosts, "vars": variables}}}}


def generated(testbed: str) -> str:
    """The first line of a generated inventory: a file without it was not written by this testbed."""
    return f"# Written by `runner testbed up --name {testbed}`, removed by `runner testbed down --name {testbed}`.\n"


def hosts_file(testbed: str, content: Mapping[str, Any]) -> str:
    """The generated inventory as YAML, lists indented as ansible-lint wants them."""
    import yaml  # not for every command

    class Indented(yaml.SafeDumper):
        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

    return generated(testbed) + yaml.dump(content, Dumper=Indented, sort_keys=False, width=1000)


def known_hosts(nodes: Sequence[Node], host_keys: Mapping[str, str]) -> str:
    """The known_hosts lines of the nodes' pinned keys, by the address that Ansible connects to."""
    return "".join(f"[{node.address}]:{SSH_PORT} {host_keys[node.name]}\n" for node in nodes)


def outermost(paths: Sequence[str]) -> tuple[str, ...]:
    """`paths` without those below another one, and without /usr, which the image has itself; sorted."""
    distinct = sorted({path.rstrip("/") for path in paths} - {"/usr", ""})
    return tuple(p for p in distinct if not any(p != other and p.startswith(f"{other}/") for other in distinct))
