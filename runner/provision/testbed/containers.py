"""`runner testbed`: N nodes on one machine, as containers with systemd and an sshd on port 44222.

Each node has its own host name, address, init, and sshd with a pinned host key; it differs from a real one only in
speed. The controller's Python is mounted into the nodes at the same path, as a home shared over NFS would be.

`layout` computes what to run, in pure functions; `up`, `down` and `status` here run it. Everything that a testbed
starts has a unique label, recorded before the first container, so that `down` finds exactly these containers even if
`up` was interrupted.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shlex
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.cluster import profiles
from runner.errors import InfrastructureError, UsageError
from runner.provision.testbed.layout import (
    DEFAULT_NAME,
    INSTALL,
    LABEL,
    NAME,
    SSH_PORT,
    SUBNETS,
    Base,
    Machine,
    Options,
    base_steps,
    bootstrapped_base,
    build_step,
    container_argv,
    generated,
    hosts_file,
    image_tag,
    inventory,
    known_hosts,
    lay_out,
    network_argv,
    network_name,
    outermost,
    shared,
)
from runner.system import process
from runner.system.places import IMPORT_ROOT, TESTBED
from runner.system.wording import counted

_READY_S = 90.0  # sshd took 1-3 s; 8 nodes on a busy machine of 2 cores took 10 s

# Called with the current step and the estimated number of seconds left in total.
OnProgress = Callable[[str, float], None]


# --- observed --------------------------------------------------------------------------------------


def this_machine(info: Mapping[str, Any]) -> Machine:
    """The description of this machine; `info` is the JSON of `podman info`.

    Raises InfrastructureError where runc is needed and not installed.
    """
    # crun refuses the v1 and hybrid hierarchies.
    runtime = "runc" if info["host"]["cgroupVersion"] == "v1" else None
    if runtime:
        _require(runtime)
    prefix, further = sys.base_prefix, profiles.folder()
    further.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is made in it later is seen in the nodes as well
    return Machine(
        python=sys.executable,
        # A venv's python is a link into base_prefix, which may be a link itself.
        mounts=outermost([sys.prefix, prefix, os.path.realpath(prefix), str(IMPORT_ROOT), str(further)]),
        runtime=runtime,
        max_open_files=_hard_limit(resource.RLIMIT_NOFILE),
        max_processes=_hard_limit(resource.RLIMIT_NPROC),
    )


def _hard_limit(kind: int) -> int:
    """The limit to set in a container: podman's default, a million, fails where the hard limit cannot be raised."""
    hard = resource.getrlimit(kind)[1]
    return 20000 if hard == resource.RLIM_INFINITY else min(hard, 20000)


def requested_base(options: Options) -> Base:
    """The base image for `options` on this machine. Raises UsageError for options that exclude each other."""
    if options.image and options.release:
        raise UsageError("--image and --release: an image has its own release, give one of them")
    if options.image:
        return Base(options.image)
    lines = Path("/etc/os-release").read_text().splitlines() if Path("/etc/os-release").exists() else []
    os_release = {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}
    indexes = ""
    if shutil.which("apt-get"):
        argv = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Identifier: Packages"]
        indexes = process.run(argv, timeout_s=30).stdout
    return bootstrapped_base(os_release, indexes, options.release)


def _definition() -> dict[str, str]:
    return {path.name: path.read_text() for path in TESTBED.iterdir() if path.suffix != ".sh"}


def _require(*programs: str) -> None:
    missing = [name for name in programs if not any(shutil.which(one) for one in name.split("|"))]
    if missing:
        names = ", ".join(name.replace("|", " or ") for name in missing)
        raise InfrastructureError(f"runner testbed needs {names}, not found on PATH: run {INSTALL}")


def _answers(address: str, timeout_s: float = 1.0) -> bool:
    """Whether an sshd sends its banner there. A hung node accepts connections and sends nothing."""
    try:
        with socket.create_connection((address, SSH_PORT), timeout=timeout_s) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


# --- the record of what is up ----------------------------------------------------------------------


def state_home() -> Path:
    """The folder of the records of running testbeds."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "shakedown" / "testbed"


def _record(home: Path, name: str) -> Path:
    if not NAME.fullmatch(name):
        raise UsageError(f"--name {name!r}: use lower-case letters, digits and hyphens, 31 at most")
    return home / f"{name}.json"


def _read_state(home: Path, name: str) -> dict[str, Any] | None:
    path = _record(home, name)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise InfrastructureError(
            f"{path} is damaged: remove the containers that `podman ps -a --filter label={LABEL}` lists, then the file"
        ) from None


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` to `path` atomically."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.touch(mode=mode)
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Lock the record `path` for one command at a time; the kernel releases the lock when its holder ends."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InfrastructureError(
                f"another `runner testbed` is already working on {path.stem!r}: wait for it"
            ) from None
        yield


# --- acting ----------------------------------------------------------------------------------------


def inventory_folder(options: Options, home: Path) -> Path:
    """The absolute path of the folder for the generated inventory; `home` is the folder of records."""
    if options.inventory:
        return options.inventory.absolute()
    return Path("inventory/testbed").absolute() if options.name == DEFAULT_NAME else home / options.name / "inventory"


def up(options: Options, on_progress: OnProgress = lambda what, left_s: None, *, home: Path | None = None) -> dict:
    """Start the testbed with `options` and write its inventory; does nothing if it already runs with them.

    `home` is the folder of records. Returns the recorded state, with `already` True when nothing was done. Raises
    UsageError for an invalid option, and InfrastructureError for a missing program or a failed command; then nothing
    is left running.
    """
    home = home or state_home()
    record = _record(home, options.name)
    folder = inventory_folder(options, home)
    if (hosts := folder / "hosts.yml").exists() and not hosts.read_text().startswith(generated(options.name)):
        raise UsageError(f"{hosts} does not belong to testbed {options.name!r}: choose another folder with --inventory")
    lay_out(options.nodes, SUBNETS[0])
    require_root()
    _require("podman", "ssh-keygen", "iptables|nft")
    options = _shared_folder(options)
    machine = this_machine(json.loads(_podman("info", "--format", "json")))
    base = requested_base(options)
    tag = image_tag(base, _definition())
    wanted = {
        "nodes": options.nodes, "memory": options.memory, "cpus": options.cpus, "image": tag,
        "inventory": str(folder), "python": machine.python, "mounts": list(machine.mounts),
        "share": str(options.share) if options.share else None, "shared": str(shared(home / options.name)),
    }  # fmt: skip
    with _locked(record):
        state = _read_state(home, options.name)
        if state and state["wanted"] == wanted and hosts.exists() and all(n["sshd"] for n in _observe(state)):
            return {**state, "already": True}
        if state:
            _remove(home, state)
        _build(home, base, tag, on_progress)
        on_progress(f"starting {counted(options.nodes, 'node')}", 4 + options.nodes)
        state = {
            "schema": 1, "name": options.name, "label": uuid.uuid4().hex, "wanted": wanted,
            "folder": str(folder), "network": network_name(options.name), "nodes": [],
        }  # fmt: skip
        _write(record, json.dumps(state, indent=1))
        try:
            return _start(home, state, options, machine, tag)
        except BaseException:
            _remove(home, state)
            raise


def _shared_folder(options: Options) -> Options:
    """`options` with the absolute path of the shared folder; podman would parse a colon in it as an option."""
    if options.share is None:
        return options
    share = options.share.absolute()
    if not share.is_dir() or ":" in str(share):
        raise UsageError(f"--share {options.share}: give a folder that exists and has no colon in its path")
    return replace(options, share=share)


def _start(home: Path, state: dict, options: Options, machine: Machine, image: str) -> dict:
    label, folder = state["label"], Path(state["folder"])
    nodes = lay_out(options.nodes, _create_network(options.name, label))
    own = home / options.name
    keys = own / "keys"
    shared(own).mkdir(parents=True, exist_ok=True)
    client_key = _make_key(folder / ".ssh" / "id_ed25519", f"testbed-{options.name}")
    host_keys = {}
    for node in nodes:
        host_keys[node.name] = _make_key(keys / node.alias / "ssh_host_ed25519_key", node.name)
        _write(keys / node.alias / "authorized_keys", f"{client_key}\n", 0o600)
        argv = container_argv(node, nodes, options, machine, image, label, own)
        # podman's monitor writes a file to its working directory when the kernel's OOM killer ends a process.
        outcome = process.run(argv, timeout_s=120, cwd=str(keys))
        if outcome.rc != 0:
            raise InfrastructureError(f"cannot start {node.name}: {outcome.last_line}")
        entry = {"name": node.name, "alias": node.alias, "address": node.address}
        state["nodes"].append({**entry, "container": outcome.stdout.strip()})
        _write(_record(home, options.name), json.dumps(state, indent=1))
    _wait(state)
    _check_python(state["nodes"][0], machine.python, image)
    content = inventory(nodes, host_keys, folder, machine.python, own, options.share)
    _write(folder / ".ssh" / "known_hosts", known_hosts(nodes, host_keys))
    _write(folder / "hosts.yml", hosts_file(options.name, content))
    _hand_over(folder)
    return {**state, "already": False}


def _hand_over(folder: Path) -> None:
    """Make the user of sudo the owner of the inventory: ssh refuses a key that belongs to another user."""
    if user := os.environ.get("SUDO_UID"):
        for path in (folder, folder / "hosts.yml", folder / ".ssh", *(folder / ".ssh").iterdir()):
            os.chown(path, int(user), int(os.environ.get("SUDO_GID", "-1")))


def _create_network(testbed: str, label: str) -> str:
    """Create the network in the first subnet that this machine does not use; returns the subnet."""
    for subnet in SUBNETS:
        outcome = process.run(network_argv(testbed, label, subnet), timeout_s=60)
        if outcome.rc == 0:
            return subnet
        if "already used" not in outcome.stderr:
            break
    raise InfrastructureError(
        f"cannot create the network {network_name(testbed)}: {outcome.last_line}; see `podman network ls`"
    )


def _build(home: Path, base: Base, tag: str, on_progress: OnProgress) -> None:
    """Build the image, unless one of the same definition exists; waits for another command that builds it."""
    if _has_image(tag):
        return
    with _locked(home / "IMAGE", wait=True), _scratch() as folder:
        if _has_image(tag):
            return
        steps = [] if _has_image(base.image) else base_steps(base, folder)
        _require(*{step.argv[0] for step in steps})
        steps.append(build_step(base, tag))
        for position, step in enumerate(steps):
            on_progress(f"image, once: {step.what}", sum(s.expected_s for s in steps[position:]) + 10)
            outcome = process.run(step.argv, timeout_s=1800)
            if outcome.rc != 0:
                raise InfrastructureError(f"{step.what} failed: {outcome.last_line} ({shlex.join(step.argv)})")


def _has_image(tag: str) -> bool:
    return process.run(["podman", "image", "exists", tag], timeout_s=60).rc == 0


@contextmanager
def _scratch() -> Iterator[str]:
    """An empty temporary folder; kept only where file systems of this machine are still mounted in it."""
    folder = tempfile.mkdtemp(prefix="shakedown-image-", dir="/var/tmp")
    try:
        yield folder
    finally:
        # A killed debootstrap leaves /proc and other file systems mounted, whose content must not be removed.
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if (target := line.split()[1]).startswith(f"{folder}/"):
                process.run(["umount", target], timeout_s=30)
        if f" {folder}/" not in Path("/proc/mounts").read_text():
            shutil.rmtree(folder, ignore_errors=True)


def _make_key(path: Path, comment: str) -> str:
    """Create a new key pair at `path` (mode 0600); returns the public key without its comment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in (path, path.with_name(f"{path.name}.pub")):
        old.unlink(missing_ok=True)
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
    process.run(argv, timeout_s=30, check=True)
    return " ".join(path.with_name(f"{path.name}.pub").read_text().split()[:2])


def _wait(state: Mapping[str, Any]) -> None:
    silent = list(state["nodes"])
    deadline = time.monotonic() + _READY_S
    while (silent := [node for node in silent if not _answers(node["address"])]) and time.monotonic() < deadline:
        time.sleep(0.1)
    if silent:
        node = silent[0]
        others = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        reason = process.run(["podman", "logs", "--tail", "1", node["container"]], timeout_s=30).last_line
        raise InfrastructureError(
            f"sshd of {node['name']}{others} did not answer on {node['address']}:{SSH_PORT} within {_READY_S:g} s"
            f"{f'; last log line: {reason}' if reason else ''}"
        )


def _check_python(node: Mapping[str, str], python: str, image: str) -> None:
    argv = ["podman", "exec", node["container"], python, "-c", "import ctypes, ssl, sqlite3, runner"]
    outcome = process.run(argv, timeout_s=120)
    if outcome.rc != 0:
        raise InfrastructureError(
            f"{python} does not run inside {image}: {outcome.last_line}; the image must be of this machine's "
            "distribution and not older (leave --image and --release out), and a system Python needs its packages in a "
            "virtual environment"
        )


def require_root() -> None:
    """Raise InfrastructureError unless this process runs as root."""
    if os.geteuid() != 0:
        raise InfrastructureError(
            "runner testbed must be run as root (found: an ordinary user, whose containers this machine cannot reach "
            "by address): use sudo"
        )


def _podman(*arguments: str) -> str:
    return process.run(["podman", *arguments], timeout_s=120, check=True).stdout


def _labelled(label: str) -> list[dict[str, Any]]:
    return json.loads(_podman("ps", "--all", "--no-trunc", "--filter", f"label={LABEL}={label}", "--format", "json"))


def _remove(home: Path, state: Mapping[str, Any]) -> None:
    """Stop and remove everything that `state` records and that still exists; the record itself last."""
    if containers := [entry["Id"] for entry in _labelled(state["label"])]:
        _podman("rm", "--force", "--time", "0", *containers)
    if networks := _podman("network", "ls", "--quiet", "--filter", f"label={LABEL}={state['label']}").split():
        _podman("network", "rm", "--force", *networks)
    folder = Path(state["folder"])
    if (hosts := folder / "hosts.yml").exists() and hosts.read_text().startswith(generated(state["name"])):
        hosts.unlink()
    for name in ("id_ed25519", "id_ed25519.pub", "known_hosts"):
        (folder / ".ssh" / name).unlink(missing_ok=True)
    for empty in (folder / ".ssh", folder):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()
    shutil.rmtree(home / state["name"], ignore_errors=True)
    _record(home, state["name"]).unlink(missing_ok=True)


def down(name: str = DEFAULT_NAME, *, home: Path | None = None) -> bool:
    """Remove the testbed `name` in any state; returns False where there is none. Raises InfrastructureError."""
    home = home or state_home()
    if _read_state(home, name) is None:
        return False
    require_root()
    with _locked(_record(home, name)):
        if state := _read_state(home, name):
            _remove(home, state)
    return True


def status(name: str = DEFAULT_NAME, *, home: Path | None = None) -> list[dict]:
    """One dict per node: name, alias, address, container, state (podman's, or "missing"), sshd (answers: bool).

    Empty where the testbed `name` does not exist.
    """
    state = _read_state(home or state_home(), name)
    return _observe(state) if state else []


def _observe(state: Mapping[str, Any]) -> list[dict]:
    found = {entry["Id"]: entry["State"] for entry in _labelled(state["label"])}
    return [
        {**node, "state": found.get(node["container"], "missing"), "sshd": _answers(node["address"])}
        for node in state["nodes"]
    ]


def dry_run(options: Options, *, home: Path | None = None) -> list[str]:
    """The commands that `up` would run and the files it would write, one per line, starting from nothing."""
    home = home or state_home()
    options = _shared_folder(options)
    _require("podman")
    info = json.loads(_podman("info", "--format", "json"))
    machine, base = this_machine(info), requested_base(options)
    tag = image_tag(base, _definition())
    nodes = lay_out(options.nodes, SUBNETS[0])
    steps = [*base_steps(base, "/var/tmp/shakedown-image"), build_step(base, tag)]
    lines = [f"# image {tag}{' (already built)' if _has_image(tag) else ''}"]
    lines += [shlex.join(step.argv) for step in steps]
    lines += ["# nodes (in the first free subnet)", shlex.join(network_argv(options.name, "ID", SUBNETS[0]))]
    lines += [shlex.join(container_argv(n, nodes, options, machine, tag, "ID", home / options.name)) for n in nodes]
    folder = inventory_folder(options, home)
    return [*lines, "# files", *(str(folder / file) for file in ("hosts.yml", ".ssh/id_ed25519", ".ssh/known_hosts"))]
