#!/usr/bin/python
"""Module of the role roce_qos: configures RoCEv2 on a node and verifies it."""

from __future__ import annotations

import json
import os
import re
import sys

from ansible.module_utils import roce
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.phase import Off, main, read

PROGRAM = "/usr/local/lib/shakedown/roce_apply.py"
WANTED = "/etc/shakedown/roce.json"
SERVICE = "shakedown-roce.service"
UNIT = f"/etc/systemd/system/{SERVICE}"
SYSCTL = "/etc/sysctl.d/90-shakedown-roce.conf"
FACT = "/etc/ansible/facts.d/roce.fact"
TIMEOUT_S = 20
MELLANOX = "0x15b3"
PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
CONFIGURE = "run `runner setup --tags roce_qos`"
# ACS flags that make a switch send packets between its ports up to the root complex. Source: PCI Express 5.0, 6.12.1.
REDIRECTS = ("ReqRedir", "CmpltRedir")
CHANGED_BY = "something else set it: a network manager, lldpad or a driver reload; " + CONFIGURE


# --- which ports ---


def choose(phase):
    """The Ports that carry RoCE on this node; records a problem for each that is missing, down or slow.

    Raises Off where there is none, and the settings name none and give no number.
    """
    want = phase.want
    ports = roce.find(want["root"])
    # Where no rate is given, that of the fastest port: the others are for management.
    gbit = want["nic_gbit_per_s"] or max([round(p.rate_gbit_per_s) for p in ports if not p.unusable(0)], default=0)
    reasons = {port.name: port.unusable(gbit) for port in ports}
    usable = [port for port in ports if not reasons[port.name]]
    named = [full_name(name) for name in want["hca"]]
    count = want["nics_per_node"] or len(named) or len(usable)
    if not count:
        raise Off(
            f"no RoCE port here{': ' if ports else ''}{', '.join(f'{name} {why}' for name, why in reasons.items())}"
        )
    if not ports:
        remedy = "load the NIC's RDMA driver (mlx5_ib), or install it: rdma-core or DOCA-OFED"
        phase.problem("RDMA devices", f"{count} RoCE ports", "none", remedy)
    elif named:
        for name in named:
            reason = reasons.get(name, "no such port; there are " + ", ".join(reasons))
            if reason:
                remedy = "see `rdma link` and `ethtool`, then cable, transceiver and switch port; or fix roce_qos_hca"
                phase.problem(f"RoCE port {name}", f"active at {gbit} Gb/s", reason, remedy)
        usable = [port for port in usable if port.name in named]
        if len(named) != count:
            remedy = "make roce_qos_hca and runner_nics_per_node agree"
            phase.problem("RoCE ports in roce_qos_hca", count, len(named), remedy)
    elif len(usable) != count:
        found = [f"{port.name} {reasons[port.name] or 'good'}" for port in ports]
        remedy = (
            "check cable, transceiver and switch port of the one that is down or slow; or name them in roce_qos_hca"
        )
        phase.problem(f"RoCE ports at {gbit} Gb/s", count, f"{len(usable)}: {', '.join(found)}", remedy)
    return usable


def full_name(name):
    """The full name of a port in NCCL_IB_HCA: "mlx5_0" and "=mlx5_0:1" are "mlx5_0:1"."""
    name = name.lstrip("=")
    return name if ":" in name else f"{name}:1"


def describe(phase, ports, mtu=None):
    """The content of roce.fact; records a problem for each port without an address.

    `mtu` in bytes replaces the current one, where it is about to be set.
    """
    nics = []
    for port in ports:
        index, gid = port.gid() or (None, None)
        if gid is None:
            address = roce.first_address(port.netdev) or "an IPv4 address"
            kinds = sorted(
                {roce.read(f"{port.port}/gid_attrs/types/{n}") or "" for n in roce.names(f"{port.port}/gids")}
            )
            found = f"none (types: {', '.join(filter(None, kinds)) or 'none'})"
            remedy = "give the network device its address, and see `show_gids` or cma_roce_mode"
            phase.problem(f"{port.device}/{port.netdev} GID", f"RoCE v2 with {address}", found, remedy)
        nics.append(
            {
                "device": port.device,
                "port": port.number,
                "netdev": port.netdev,
                "rate_gbit_per_s": round(port.rate_gbit_per_s),
                "mtu": mtu or port.mtu,
                "roce_mtu": roce.roce_mtu(mtu or port.mtu),
                "gid_index": index,
                "gid": gid,
            }
        )
    indexes = {nic["gid_index"] for nic in nics}
    if len(indexes) > 1 and None not in indexes:
        each = ", ".join(f"{nic['device']} {nic['gid_index']}" for nic in nics)
        phase.warn(f"GID index differs between ports ({each}): leave NCCL_IB_GID_INDEX unset, NCCL finds it per port")
    return {
        "hca": [port.name for port in ports],
        "nics": nics,
        "gid_index": indexes.pop() if len(indexes) == 1 else None,
        "traffic_class": roce.traffic_class(phase.want["dscp"]),
    }


# --- settings ---


def read_settings(phase, ports):
    """The Settings of all ports and of the kernel, with their current values."""
    found = [setting for port in ports for setting in roce.settings(port, phase.want, phase.run)]
    for name, value in sysctls(phase.want, ports).items():
        path = os.path.join(phase.want["root"], "proc/sys", sysctl_path(name))
        found.append(roce.file_setting(name, path, value, "a kernel that has it"))
    return found


def sysctls(want, ports):
    """{name: value} in the form of sysctl.d(5), where a dot in a device's name is a slash."""
    each = {name: " ".join(str(value).split()) for name, value in want["sysctl"].items()}
    for port in ports:
        for name, value in want["nic_sysctl"].items():
            each[f"net.ipv4.conf.{port.netdev.replace('.', '/')}.{name}"] = str(value)
    return each


def sysctl_path(name):
    """The path of a sysctl below /proc/sys. Source: sysctl.d(5): the first separator determines the form."""
    first = next((character for character in name if character in "./"), ".")
    return name if first == "/" else name.translate(str.maketrans("./", "/."))


def warn_unknown(phase, settings):
    """Record one warning per reason for the settings that cannot be read."""
    reasons = {}
    for setting in settings:
        if setting.found is None:
            reasons.setdefault(setting.unknown, []).append(setting.name)
    for reason, names in reasons.items():
        phase.warn(f"unknown, {reason}: {', '.join(names)}")


# --- files on the node ---


def program():
    """The source of the program that configures the ports at every start: the module roce, used here too."""
    return roce.__loader__.get_source(roce.__name__)


def unit():
    """The text of the systemd unit that runs the program at every start."""
    python = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
    return f"""\
[Unit]
Description=RoCE settings of this node's NICs (Shakedown)
# Addresses and links come up first; jobs start after.
Wants=network-online.target
After=network-online.target openibd.service rdma-load-modules@rdma.service
Before=slurmd.service

[Service]
Type=oneshot
ExecStart={python} {PROGRAM} {WANTED}
TimeoutStartSec=300

[Install]
WantedBy=multi-user.target
"""


def files(want, ports):
    """{path: content} of the files that `configure` writes for `ports`."""
    settings = {name: want[name] for name in ("root", "priority", "dscp", "mtu")}
    settings["hca"] = [port.name for port in ports]
    lines = [f"{name} = {value}\n" for name, value in sysctls(want, ports).items()]
    return {WANTED: to_json(settings), SYSCTL: "# Written by the role roce_qos.\n" + "".join(lines)}


def to_json(value):
    """`value` as the text of a JSON file."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def enabled(phase):
    """The state of the service in `systemctl is-enabled`, "not found" without one."""
    return phase.run(["systemctl", "is-enabled", SERVICE], TIMEOUT_S).stdout.strip() or "not found"


# --- GPUDirect RDMA ---


def parse_acs(text):
    """{address with domain: (kind, [enabled redirects])} of the PCIe ports in the output of `lspci -vvv`.

    Ports without an ACS capability, or truncated before it, are omitted. kind: "Root Port", "Downstream Port", ...
    """
    found, address, kind = {}, "", ""
    for line in text.splitlines():
        if match := re.match(r"((?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ", line):
            address, kind = match.group(1), ""
            address = address if PCI.match(address) else f"0000:{address}"
        elif match := re.search(r"Express \(v\d\) ((?:Root|Upstream|Downstream) Port)", line):
            kind = match.group(1)
        elif kind and (match := re.match(r"\s+ACSCtl:\s+(.*UpstreamFwd[+-].*)", line)):
            found[address] = (kind, [flag for flag in REDIRECTS if f"{flag}+" in match.group(1).split()])
    return found


def bridges(root, ports):
    """The set of addresses of the PCIe ports above the RoCE NICs and the GPUs."""
    drivers = os.path.join(root, "sys/bus/pci/drivers/nvidia")
    places = [f"{port.folder}/device" for port in ports]
    places += [f"{drivers}/{name}" for name in roce.names(drivers) if PCI.fullmatch(name)]
    return {address for place in places for address in PCI.findall(os.path.dirname(os.path.realpath(place)))}


def gpudirect(phase, ports):
    """Check GPUDirect RDMA: a problem where GPUs cannot reach the NICs, a warning where it is unknown.

    facts: gpudirect.
    """
    root = phase.want["root"]
    driver = roce.read(os.path.join(root, "proc/driver/nvidia/version"))
    if driver is None:
        phase.warn("GPUDirect RDMA: unknown, no NVIDIA driver is loaded")
        return
    release = roce.read(os.path.join(root, "proc/sys/kernel/osrelease")) or ""
    kernel = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    is_open = "Open Kernel Module" in driver
    if os.path.isdir(os.path.join(root, "sys/module/nvidia_peermem")):
        phase.facts["gpudirect"] = "nvidia_peermem"
    elif is_open and kernel >= (5, 12):
        phase.facts["gpudirect"] = "dma-buf"
    else:
        found = (
            f"{'open' if is_open else 'proprietary'} driver, kernel {release or 'unknown'}, nvidia_peermem not loaded"
        )
        remedy = "modprobe nvidia_peermem (and name it in /etc/modules-load.d), or use the open kernel modules"
        phase.problem("GPUDirect RDMA", "nvidia_peermem or DMA-BUF (open driver, kernel 5.12)", found, remedy)
    acs(phase, ports)
    if roce.names(os.path.join(root, "sys/class/iommu")):
        line = (roce.read(os.path.join(root, "proc/cmdline")) or "").split()
        if "iommu=pt" not in line and "iommu.passthrough=1" not in line:
            phase.warn("IOMMU translates addresses of NICs and GPUs: iommu=pt on the kernel's command line avoids that")


def acs(phase, ports):
    """Record a problem for each PCIe switch port above a NIC or GPU that redirects packets to the root complex."""
    above = bridges(phase.want["root"], ports)
    outcome = phase.run(["lspci", "-D", "-vvv"], TIMEOUT_S)
    if not outcome.ok:
        phase.warn(f"PCIe ACS: unknown, {outcome.last_line}")
        return
    if above and "Capabilities: <access denied>" in outcome.stdout:
        phase.warn("PCIe ACS: unknown, lspci shows capabilities to root only")
    for address, (kind, redirects) in sorted(parse_acs(outcome.stdout).items()):
        if redirects and address in above and kind != "Root Port":
            remedy = f"disable ACS in the firmware; until the next reboot: setpci -s {address} ECAP_ACS+0x6.w=0000"
            found = " ".join(f"{flag}+" for flag in redirects)
            phase.problem(f"PCIe ACS of switch port {address}", "no redirection", found, remedy)


# --- receive buffers and queues, read only ---


def warn_buffers(phase, port, netdev):
    """Warn where the lossless priority shares its receive buffer or queue, so that one lossy flow can block it."""
    found, priority = port.seen.get(netdev), phase.want["priority"]
    if not found:
        return
    buffers, sizes = found["prio_buffer"], found["buffer_size"]
    for what, row in (("receive buffer", buffers), ("traffic class", found["prio_tc"])):
        shared = [str(other) for other in range(8) if row and other != priority and row[other] == row[priority]]
        if shared:
            phase.warn(
                f"{port.device}/{netdev}: priority {priority} shares its {what} with priority {', '.join(shared)}"
            )
    if buffers and sizes and sizes[buffers[priority]] == 0:
        phase.warn(f"{port.device}/{netdev}: the receive buffer of priority {priority} has 0 bytes")


# --- phases ---


def validate(phase):
    """Check settings, ports, addresses and tools; changes nothing. facts: roce, tools."""
    want = phase.want
    for name, top in (("priority", 7), ("dscp", 63)):
        if not 0 <= want[name] <= top:
            phase.problem(f"roce_qos_{name}", f"0 to {top}", want[name], "see the role's README")
    if want["mtu"] - roce.ROCE_HEADERS < roce.ROCE_MTUS[0]:
        least = roce.ROCE_MTUS[0] + roce.ROCE_HEADERS
        phase.problem("roce_qos_mtu", f"at least {least}", want["mtu"], "9000 is usual; the switches must allow it")
    ports = choose(phase)
    phase.facts["roce"] = describe(phase, ports)
    for port in ports:
        if port.bonded:
            phase.warn(f"{port.name} is the bond {port.netdev} of {', '.join(port.ports)}: one rail to NCCL")
        for netdev in port.ports:
            tool, _, reason = roce.qos(port, netdev, phase.run)
            if tool:
                phase.facts.setdefault("tools", {})[netdev] = tool
            elif port.vendor == MELLANOX:
                remedy = "install iproute2 5.12 or newer (dcb), or mlnx-tools (mlnx_qos)"
                phase.problem(f"{port.device}/{netdev} tool", "dcb or mlnx_qos answers", reason, remedy)
            else:
                phase.warn(f"{port.device}/{netdev}: unknown vendor {port.vendor or 'id'}, PFC is not set: {reason}")


def install(phase):
    """Install the program and the systemd unit that runs it at every start."""
    written = [phase.write(PROGRAM, program(), 0o755), phase.write(UNIT, unit())]
    if written[1] and not phase.check:
        phase.run(["systemctl", "daemon-reload"], TIMEOUT_S)


def configure(phase):
    """Write the configuration, set the ports and read them back, enable the service, and publish roce.fact."""
    ports = choose(phase)
    fact = describe(phase, ports, mtu=phase.want["mtu"])
    if phase.problems:
        return  # otherwise wrong ports would be configured at every start
    for path, content in files(phase.want, ports).items():
        phase.write(path, content)
    warn_unknown(phase, read_settings(phase, ports))
    for setting, reason in roce.fix(lambda: read_settings(phase, ports), phase.change):
        found = setting.found + (f" ({reason})" if reason else " after it was set without an error")
        remedy = "see `dmesg`; the firmware or another manager (lldpad, NetworkManager) may control it"
        phase.problem(setting.name, setting.wanted, found, remedy)
    state = enabled(phase)
    if state != "enabled" and phase.change(SERVICE, state, "enabled"):
        outcome = phase.run(["systemctl", "enable", SERVICE], TIMEOUT_S)
        if not outcome.ok:
            phase.problem(SERVICE, "enabled", f"{state} ({outcome.last_line})", "see `systemctl status`")
    if not phase.problems:
        phase.write(FACT, to_json(fact))
        phase.done.append(f"RoCE on {', '.join(fact['hca'])}, traffic class {fact['traffic_class']}")


def verify(phase):
    """Check settings, files, fact, service, buffers and GPUDirect; changes nothing. facts: roce, gpudirect."""
    ports = choose(phase)
    fact = describe(phase, ports)
    complete = not phase.problems
    phase.facts["roce"] = fact
    found = read_settings(phase, ports)
    warn_unknown(phase, found)
    for setting in found:
        if setting.differs:
            phase.problem(setting.name, setting.wanted, setting.found, CHANGED_BY)
    kept = {PROGRAM: program(), UNIT: unit()}
    if complete:  # with a port missing, all files that name the ports would differ too
        kept.update(files(phase.want, ports))
        for difference in fact_differences(read(FACT), fact):
            phase.problem(*difference, f"{CONFIGURE}, then nccl_build: /etc/nccl.conf follows {FACT}")
    for path, content in kept.items():
        compare(phase, path, read(path), content)
    for path in (*kept, FACT):
        phase.own(path, 0o755 if path == PROGRAM else 0o644, remedy=CONFIGURE)
    state = enabled(phase)
    if state != "enabled":
        phase.problem(SERVICE, "enabled", state, CONFIGURE)
    for port in ports:
        for netdev in port.ports:
            warn_buffers(phase, port, netdev)
    if phase.want["gpudirect"]:
        gpudirect(phase, ports)


def compare(phase, path, now, expected):
    """Record a problem where the content `now` of the file `path`, None for no file, is not `expected`."""
    if now != expected:
        phase.problem(path, "as configured", "no such file" if now is None else "another content", CONFIGURE)


def fact_differences(text, fact):
    """[(what, expected, found)] of the values in which the text of roce.fact differs from the observed `fact`."""
    try:
        published = json.loads(text) if text is not None else None
        nics = {nic["device"]: nic for nic in published["nics"]} if published is not None else {}
    except (ValueError, KeyError, TypeError):
        return [(FACT, "as observed", "not valid")]
    if published is None:
        return [(FACT, "as observed", "no such file" if text is None else "not valid")]
    different = [
        (f"{FACT} {name}", fact[name], published.get(name))
        for name in ("hca", "gid_index", "traffic_class")
        if published.get(name) != fact[name]
    ]
    for nic in fact["nics"]:
        known = nics.get(nic["device"], {})
        for name in nic:
            if known and known.get(name) != nic[name]:
                different.append((f"{FACT} {nic['device']} {name}", nic[name], known.get(name)))
    return different


PHASES = {"validate": validate, "install": install, "configure": configure, "verify": verify}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
