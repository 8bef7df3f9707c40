"""How this node is connected and powered: its links, who reaches it and whom it reaches, what slows its CPUs down."""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runner.cluster import facts
from runner.errors import InfrastructureError
from runner.node.leash import Leash
from runner.node.output import send_message
from runner.node.protocol import POLL_S, SILENCE_S, Linked, Reached
from runner.node.requests import LinksRequest
from runner.system import process

CONNECT_S = 2.0  # a second try follows: one lost SYN is sent again after 1 s
REFUSED, NO_ANSWER, NO_ROUTE, NOT_PERMITTED = "refused", "no answer", "no route", "not permitted"
_AT_ONCE = 64
_WAITING = 1024  # connections that the kernel completes and nobody takes
_FIREWALL_S = 5.0

_BY_ERRNO = {
    errno.ECONNREFUSED: REFUSED,
    errno.EHOSTUNREACH: NO_ROUTE,
    errno.ENETUNREACH: NO_ROUTE,
    errno.EINVAL: NO_ROUTE,  # a route of the type blackhole
    errno.EACCES: NOT_PERMITTED,
    errno.EPERM: NOT_PERMITTED,
}


def probe(request: LinksRequest, early: bytes = b"") -> None:
    """Answer a `LinksRequest`; `early` is what came after it. Ends with its controller."""
    leash = Leash(SILENCE_S)
    leash.receive(early)
    listeners, taken = listen(request.ports)
    try:
        send_message(observe(request.env, taken))
        _wait(leash, for_go=True)
        if leash.reason is None:
            send_message(Reached(connect(request.peers, request.ports)))
            _wait(leash)
    finally:
        for listener in listeners:
            listener.close()


def _wait(leash: Leash, for_go: bool = False) -> None:
    while leash.reason is None and not (for_go and leash.go):
        if select.select([0], [], [], POLL_S)[0]:
            leash.read()
        leash.tick()


def listen(ports: Sequence[int]) -> tuple[list[socket.socket], list[int]]:
    """Sockets that listen on `ports`, on all addresses, and those of the ports that another process has."""
    listeners, taken = [], []
    for port in ports:
        try:
            listeners.append(_listener(port))
        except OSError:
            taken.append(port)
    return listeners, taken


def _listener(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            both = ("::", port)
            return socket.create_server(both, family=socket.AF_INET6, backlog=_WAITING, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # IPv6 is switched off
                raise
    return socket.create_server(("0.0.0.0", port), backlog=_WAITING)


def connect(peers: Mapping[str, str], ports: Sequence[int]) -> dict[str, dict[str, str]]:
    """By peer and port, as text, why no connection was made; all are tried at the same time."""
    pairs = [(name, address, port) for name, address in peers.items() for port in ports]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reasons = list(pool.map(lambda pair: _failure(pair[1], pair[2]), pairs))
    failed: dict[str, dict[str, str]] = {}
    for (name, _, port), reason in zip(pairs, reasons, strict=True):
        if reason:
            failed.setdefault(name, {})[str(port)] = reason
    return failed


def _failure(address: str, port: int) -> str:
    reason = ""
    for _ in range(2):
        try:
            with socket.create_connection((address, port), CONNECT_S):
                return ""
        except TimeoutError:
            reason = NO_ANSWER
        except socket.gaierror as error:
            return f"{address} is not known there: {error.strerror}"
        except OSError as error:
            return _BY_ERRNO.get(error.errno or 0) or error.strerror or str(error)
    return reason


def observe(environment: Mapping[str, str], taken: Sequence[int] = ()) -> Linked:
    """What this node says of itself; `environment` are the variables that ranks get here."""
    seen = facts.collect(environment)
    firewall, chain = _firewall()
    return Linked(
        nics=[nic for nic in seen["nics"] if nic["carries_traffic"]],
        driver=seen["driver"],
        power=slow_settings(),
        taken=taken,
        firewall=firewall,
        chain=chain,
    )


def slow_settings(root: Path = Path("/")) -> dict[str, str]:
    """The settings of power below `root` that hold the CPUs back, by their paths, with their values.

    The governor `powersave` of intel_pstate and amd-pstate in active mode is their only one for all loads: there the
    preference says how much is saved.
    """
    found: dict[str, str] = {}
    for cpu in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq")):
        driver, preference = _text(cpu / "scaling_driver"), cpu / "energy_performance_preference"
        if driver in ("intel_pstate", "amd-pstate-epp"):
            file, slow = preference, ("power", "balance_power")
        else:
            file, slow = cpu / "scaling_governor", ("powersave", "conservative")
        if (value := _text(file)) in slow:
            found.setdefault(f"/{file.relative_to(root)}", value)
            break  # one is enough to tell
    profile = root / "sys/firmware/acpi/platform_profile"
    if (value := _text(profile)) in ("low-power", "quiet", "cool"):
        found[f"/{profile.relative_to(root)}"] = value
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _firewall() -> tuple[str, str]:
    """The firewall of this node by the program that shows it, "" for none; and its chain of what comes in, of nft."""
    if shutil.which("ufw") and "ENABLED=yes" in _text(Path("/etc/ufw/ufw.conf")):
        return "ufw", ""
    if Path("/run/firewalld").exists():
        return "firewall-cmd", ""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    if nft := shutil.which("nft", path=path):
        return "nft", _input_chain(nft)
    return ("iptables", "") if shutil.which("iptables", path=path) else ("", "")


def _input_chain(nft: str) -> str:
    """The first base chain of what comes in, as nft takes it (`inet filter input`); "" where it cannot be seen."""
    try:
        outcome = process.run([nft, "-j", "list", "chains"], timeout_s=_FIREWALL_S)
        listed: list[dict[str, Any]] = json.loads(outcome.stdout or "{}").get("nftables", [])
    except (InfrastructureError, ValueError):
        return ""
    chains = (entry["chain"] for entry in listed if "chain" in entry)
    return next((f"{c['family']} {c['table']} {c['name']}" for c in chains if c.get("hook") == "input"), "")
