"""RoCE ports of a node: find them, read their settings from the device, set what differs.

Run as a program, at every start of the node, it configures the ports listed in a file; its exit status is 1 where a
setting did not take effect:

    roce_apply.py /etc/shakedown/roce.json

The file has {"root", "hca": ["mlx5_0:1", ...], "priority", "dscp", "mtu"}. Standard library only: the role's
module imports this file and installs a copy of it on the node.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import re
import socket
import struct
import subprocess
import sys

TOOL_TIMEOUT_S = 20
# The maximum size of the Ethernet, IPv6, UDP and InfiniBand headers within the MTU, in bytes.
# Source: linux include/rdma/ib_addr.h, iboe_get_mtu.
ROCE_HEADERS = 96
ROCE_MTUS = (4096, 2048, 1024, 512, 256)
ETHERNET = "Ethernet"


def read(path):
    """The text of a sysfs file without its line end, None where it is missing or the kernel refuses to read it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def names(folder):
    """The entries of `folder` in natural order (mlx5_2 before mlx5_10); [] where it does not exist."""
    try:
        found = os.listdir(folder)
    except OSError:
        return []
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def traffic_class(dscp):
    """The traffic class byte of an IP header with `dscp` and ECN support of the sender (ECT(0))."""
    return dscp << 2 | 2


def roce_mtu(mtu):
    """The largest RDMA MTU, in bytes, that fits into the network device's `mtu`, in bytes; 0 where none fits."""
    return next((size for size in ROCE_MTUS if size + ROCE_HEADERS <= mtu), 0)


class Port:
    """One Ethernet or InfiniBand port of an RDMA device, read from sysfs below `root`.

    `name` in the form of NCCL_IB_HCA ("mlx5_0:1"); `netdev` is "" where there is none; `ports` are the network devices
    that carry the frames (the members of a bond); `rate_gbit_per_s` is the rate of the link.
    """

    def __init__(self, root, device, number):
        self.root, self.device, self.number = root, device, int(number)
        self.name = f"{device}:{number}"
        self.folder = os.path.join(root, "sys/class/infiniband", device)
        self.port = os.path.join(self.folder, "ports", str(number))
        self.link_layer = read(f"{self.port}/link_layer") or "unknown"
        self.state = (read(f"{self.port}/state") or "unknown").split(": ")[-1]
        rate = re.match(r"([\d.]+) Gb/sec", read(f"{self.port}/rate") or "")
        self.rate_gbit_per_s = float(rate.group(1)) if rate else 0.0
        self.virtual = os.path.exists(f"{self.folder}/device/physfn")
        self.vendor = read(f"{self.folder}/device/vendor") or ""
        self.netdev = self._netdev()
        slaves = read(self.net("bonding/slaves")) if self.netdev else None
        self.bonded = slaves is not None
        self.ports = slaves.split() if slaves else [self.netdev] if self.netdev else []
        self.seen = {}  # the last result of `qos` for each of them

    def _netdev(self):
        # The first GID belongs to the port's network device, also while the link is down. Older kernels keep the
        # entry empty until the link was up once: then it is the only network device of the PCI function.
        if name := read(f"{self.port}/gid_attrs/ndevs/0"):
            return name
        found = names(f"{self.folder}/device/net")
        return found[0] if len(found) == 1 else ""

    def net(self, path, netdev=None):
        """The path of the network device's sysfs file `path`; `netdev` is another device than the port's."""
        return os.path.join(self.root, "sys/class/net", netdev or self.netdev, path)

    @property
    def mtu(self):
        """MTU of the network device in bytes, 0 if unknown."""
        text = read(self.net("mtu")) if self.netdev else None
        return int(text) if text and text.isdigit() else 0

    def unusable(self, gbit_per_s):
        """The reason why this port cannot carry RoCE at `gbit_per_s` Gb/s, "" where it can."""
        if self.link_layer != ETHERNET:
            return f"link layer {self.link_layer}"
        if not self.netdev:
            return "no network device here"
        if self.state != "ACTIVE":
            return f"link {self.state}"
        if self.rate_gbit_per_s < gbit_per_s:
            return f"{self.rate_gbit_per_s:g} Gb/s"
        return ""

    def gids(self):
        """[(index, GID)] of RoCE v2 with IPv4 on this port's network device, by index."""
        found = []
        for name in names(f"{self.port}/gids"):
            kind = read(f"{self.port}/gid_attrs/types/{name}")
            gid = read(f"{self.port}/gids/{name}") or ""
            if kind != "RoCE v2" or read(f"{self.port}/gid_attrs/ndevs/{name}") != self.netdev:
                continue
            if ipv4(gid):
                found.append((int(name), gid))
        return found

    def gid(self):
        """(index, GID) by which peers reach this port: RoCE v2 with the network device's first IPv4 address.

        None where there is none. The index is never assumed: it changes when addresses are added or removed.
        """
        found, address = self.gids(), first_address(self.netdev)
        if address:
            found = [(index, gid) for index, gid in found if ipv4(gid) == address]
        return found[0] if found else None


def ipv4(gid):
    """The IPv4 address in a GID such as 0000:0000:0000:0000:0000:ffff:0a02:c901, "" where it has none."""
    try:
        return str(ipaddress.IPv6Address(gid).ipv4_mapped or "")
    except ValueError:
        return ""


def first_address(netdev):
    """The first IPv4 address of a network device, "" where it has none. Source: netdevice(7), SIOCGIFADDR."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, 0x8915, struct.pack("256s", netdev.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def find(root):
    """All ports of all RDMA devices, in order; without virtual functions, whose settings are the host's."""
    folder = os.path.join(root, "sys/class/infiniband")
    ports = [Port(root, device, n) for device in names(folder) for n in names(os.path.join(folder, device, "ports"))]
    return [port for port in ports if not port.virtual]


# --- priorities: dcb of iproute2, or mlnx_qos of NVIDIA's driver package ---


def qos_of_dcb(netdev, run):
    """The settings of priorities, read with `dcb`: (dict as of parse_mlnx_qos, ""), or (None, reason)."""
    answers = {}
    for what in ("pfc", "app", "dcbx", "buffer", "ets"):
        # -N: DSCP as numbers instead of names such as AF31.
        outcome = run(["dcb", "-N", "-j", what, "show", "dev", netdev], TOOL_TIMEOUT_S)
        try:
            answers[what] = json.loads(outcome.stdout or "{}") if outcome.ok else None
        except ValueError:
            return None, f"dcb {what}: not JSON"
        if answers[what] is None and what in ("pfc", "app"):
            return None, f"dcb {what}: {outcome.last_line}"
    return parse_dcb(answers)


def parse_dcb(answers):
    """Parse the output of `dcb -j` by object (None: refused): (dict as of parse_mlnx_qos, ""), or (None, reason).

    Formats: iproute2 dcb/dcb_{pfc,app,dcbx,buffer,ets}.c.
    """
    try:
        mapping = {}
        for dscp, priority, *_ in answers["app"].get("dscp_prio", []):
            mapping.setdefault(int(dscp), []).append(int(priority))
        dcbx, buffer, ets = (answers[name] or {} for name in ("dcbx", "buffer", "ets"))
        return {
            "dcbx": None if answers["dcbx"] is None else "OS" if dcbx.get("host") else "firmware",
            "trust": "dscp" if mapping else "pcp",
            "dscp": mapping,
            "pfc": [int(on) for on in answers["pfc"]["prio_pfc"]],
            "prio_buffer": buffer.get("prio_buffer"),
            "buffer_size": buffer.get("buffer_size"),
            "prio_tc": ets.get("prio_tc"),
        }, ""
    except (KeyError, TypeError, ValueError, AttributeError):
        return None, "dcb: unknown format"


def qos_of_mlnx_qos(netdev, run):
    """The settings of priorities, read with `mlnx_qos`: (dict as of parse_mlnx_qos, ""), or (None, reason)."""
    outcome = run(["mlnx_qos", "-i", netdev], TOOL_TIMEOUT_S)
    return parse_mlnx_qos(outcome.stdout) if outcome.ok else (None, f"mlnx_qos: {outcome.last_line}")


def parse_mlnx_qos(text):
    """Parse the output of `mlnx_qos -i DEV`: (dict, ""), or (None, reason) where trust or PFC are missing.

    dcbx "OS" or "firmware"; trust "dscp" or "pcp"; dscp {DSCP: [priority]}; pfc, prio_buffer, prio_tc: one number per
    priority; buffer_size in bytes, one per buffer. None for values that it did not print.
    """

    def row(label):
        match = re.search(rf"^\s*{label}\s+((?:\d+ +){{7}}\d+)\s*$", text, re.M)
        return [int(cell) for cell in match.group(1).split()] if match else None

    trust, pfc = re.search(r"^Priority trust state: (\w+)", text, re.M), row("enabled")
    if not trust or not pfc:
        return None, "mlnx_qos: unknown format"
    dcbx = re.search(r"^DCBX mode: (OS|Firmware) controlled", text, re.M)
    mapping = {}
    for priority, dscps in re.findall(r"^\s*prio:(\d) dscp:([\d,]+)", text, re.M):
        for dscp in filter(None, dscps.split(",")):
            mapping.setdefault(int(dscp), []).append(int(priority))
    sizes = re.search(r"^Receive buffer size \(bytes\): ((?:\d+,){8})", text, re.M)
    prio_tc = {}
    for block in re.split(r"^tc: ", text, flags=re.M)[1:]:
        for priority in re.findall(r"^\s+priority:\s+(\d)", block, re.M):
            prio_tc[int(priority)] = int(block.split()[0])
    return {
        "dcbx": {"OS": "OS", "Firmware": "firmware"}[dcbx.group(1)] if dcbx else None,
        "trust": trust.group(1),
        "dscp": mapping,
        "pfc": pfc,
        "prio_buffer": row("buffer"),
        "buffer_size": [int(size) for size in sizes.group(1).rstrip(",").split(",")] if sizes else None,
        "prio_tc": [prio_tc[priority] for priority in range(8)] if len(prio_tc) == 8 else None,
    }, ""


def commands(tool, netdev, priority, dscp):
    """{setting: argument list of the command that sets it} for the settings of priorities with `tool`."""
    pfc = pfc_list(priority)
    if tool == "mlnx_qos":
        base = ["mlnx_qos", "-i", netdev]
        return {
            "dcbx": [*base, "-d", "os"],
            "trust": [*base, "--trust", "dscp"],
            "dscp": [*base, "--dscp2prio", f"set,{dscp},{priority}"],
            "pfc": [*base, "--pfc", pfc],
        }
    mapping = ["dcb", "app", "replace", "dev", netdev, "dscp-prio", f"{dscp}:{priority}"]
    return {
        "dcbx": ["dcb", "dcbx", "set", "dev", netdev, "host", "ieee"],
        "trust": mapping,  # a NIC trusts DSCP as soon as one is mapped
        "dscp": mapping,
        "pfc": ["dcb", "pfc", "set", "dev", netdev, "prio-pfc", "all:off", f"{priority}:on"],
    }


def qos(port, netdev, run):
    """(tool, settings, "") of the first tool that works with the NIC, or ("", None, the reasons of all tools)."""
    reads = {"dcb": qos_of_dcb, "mlnx_qos": qos_of_mlnx_qos}
    # Where the driver has a separate file for trust, dcb does not report it.
    order = sorted(reads, reverse=os.path.exists(port.net("qos/trust", netdev)))
    reasons = []
    for tool in order:
        found, reason = reads[tool](netdev, run)
        if found:
            port.seen[netdev] = found
            return tool, found, ""
        reasons.append(reason)
    return "", None, "; ".join(reasons)


# --- settings ---


class Setting:
    """One setting of the node: `found` is None where it cannot be read, for the reason `unknown`.

    `put()` sets the device to `wanted` and returns an error or "". Only reading again shows whether it took effect.
    """

    def __init__(self, name, found, wanted, put, unknown=""):
        self.name, self.found, self.wanted, self.put, self.unknown = name, found, str(wanted), put, unknown

    @property
    def differs(self):
        """Whether the value found is known and is not the expected one."""
        return self.found is not None and self.found != self.wanted


def put_file(path, value):
    """Write `value` to a file of the kernel; returns the error, "" for none."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(value))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def file_setting(name, path, wanted, needs):
    """The Setting of a file of the kernel. `needs` names what provides that file, for the case that it is missing."""
    text = read(path)
    found = " ".join(text.split()) if text is not None else None
    return Setting(name, found, wanted, lambda: put_file(path, wanted), f"needs {needs}")


def qos_settings(port, netdev, want, run):
    """Yields the Settings of priorities of one network device of `port`: DCBX mode, trust, DSCP mapping, PFC."""
    tool, found, reason = qos(port, netdev, run)
    priority, dscp = want["priority"], want["dscp"]
    argvs = commands(tool, netdev, priority, dscp)
    found = found or {}
    mapped = ",".join(str(value) for value in sorted(found.get("dscp", {}).get(dscp, []))) or "none"
    values = [
        ("dcbx", "DCBX mode", found.get("dcbx"), "OS"),
        ("trust", "trust", found.get("trust"), "dscp"),
        ("dscp", f"priority of DSCP {dscp}", mapped if found else None, priority),
        ("pfc", "pfc", ",".join(map(str, found["pfc"])) if found else None, pfc_list(priority)),
    ]
    for key, title, now, wanted in values:

        def put(argv=argvs[key]):
            outcome = run(argv, TOOL_TIMEOUT_S)
            return "" if outcome.ok else f"{tool}: {outcome.last_line}"

        yield Setting(f"{port.device}/{netdev} {title}", now, wanted, put, reason or f"{tool} does not report it")


def pfc_list(priority):
    """PFC of `priority` alone, as mlnx_qos writes it: 3 -> "0,0,0,1,0,0,0,0"."""
    return ",".join(str(int(number == priority)) for number in range(8))


def settings(port, want, run):
    """All Settings of one port, in the order in which they must be set.

    `run(argv, timeout_s)` runs a command and returns an object with `ok`, `stdout` and `last_line`.
    """
    label, priority, tos = f"{port.device}/{port.netdev}", want["priority"], traffic_class(want["dscp"])
    found = [file_setting(f"{label} mtu", port.net("mtu"), want["mtu"], "a network device")]
    for netdev in port.ports:
        found += qos_settings(port, netdev, want, run)
        for point in ("np", "rp"):
            path = port.net(f"ecn/roce_{point}/enable/{priority}", netdev)
            name = f"{port.device}/{netdev} ecn {point} of priority {priority}"
            found.append(file_setting(name, path, 1, "the driver of DOCA-OFED"))
    return [*found, class_setting(port, tos), tos_setting(port, tos)]


def class_setting(port, wanted):
    """The Setting of the traffic class of every RoCE packet of the device.

    The driver prints "Global tclass=106", and nothing until it is set; a plain file, as in tests, has the number only.
    """
    path = f"{port.folder}/tc/{port.number}/traffic_class"
    text = read(path)
    match = re.match(r"(?:Global tclass=)?(\d+)$", (text or "").partition("\n")[0])
    found = None if text is None else match.group(1) if match else "unset"
    name = f"{port.device} traffic class"
    return Setting(name, found, wanted, lambda: put_file(path, wanted), "needs the driver of DOCA-OFED")


def tos_setting(port, wanted):
    """The Setting of the default type of service of rdma_cm's connections.

    The device's folder must be created for its files to appear, and is kept, so that the value can be read.
    Source: linux Documentation/ABI/testing/configfs-rdma_cm.
    """
    base = os.path.join(port.root, "sys/kernel/config/rdma_cm")
    path = f"{base}/{port.device}/ports/{port.number}/default_roce_tos"
    found = (read(path) or "unset") if os.path.isdir(base) else None

    def put():
        try:
            os.makedirs(f"{base}/{port.device}", exist_ok=True)
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return put_file(path, wanted)

    return Setting(f"{port.device} rdma_cm tos", found, wanted, put, "needs rdma_cm and configfs")


def fix(read_settings, change):
    """Set the settings that differ, where `change(name, found, wanted)` returns True, then read them again.

    Returns [(setting, reason)] for each that still differs after it was set; `reason` is an error or "".
    """
    reasons = {}
    for setting in read_settings():
        if setting.differs and change(setting.name, setting.found, setting.wanted):
            reasons[setting.name] = setting.put()
    again = read_settings() if reasons else []
    return [(setting, reasons.get(setting.name, "")) for setting in again if setting.differs]


# --- the program ---


class Outcome:
    """The result of a command: whether it returned 0 (`ok`), its output, and its last line."""

    def __init__(self, rc, stdout, last_line):
        self.ok, self.stdout, self.last_line = rc == 0, stdout, last_line


def run_command(argv, timeout_s):
    """Run `argv` and return its Outcome, also when it is missing or exceeds `timeout_s`; never raises."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Outcome(None, "", f"{argv[0]}: {error}")
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return Outcome(done.returncode, done.stdout, lines[-1] if lines else f"status {done.returncode}")


def main(path):
    """Configure the ports of the file `path`; prints changes and errors. Returns the exit status, 1 for any error."""
    with open(path, encoding="utf-8") as file:
        want = json.load(file)
    ports = {port.name: port for port in find(want["root"])}
    failed = [f"{name}: not found" for name in want["hca"] if name not in ports]

    def change(name, found, wanted):
        print(f"{name}: {found} -> {wanted}")
        return True

    for name in want["hca"]:
        if port := ports.get(name):
            for setting, reason in fix(lambda port=port: settings(port, want, run_command), change):
                failed.append(f"{setting.name}: expected {setting.wanted}, found {setting.found} {reason}".rstrip())
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
