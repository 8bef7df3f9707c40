#!/usr/bin/python3
"""Reads driver, CUDA and GPUs of a node and judges them; publishes what it found as cuda.fact.

One `nvidia-smi -q` says nearly everything. Every check has three ends: as it should be (silence), not so (a problem),
not readable (a warning, never a pass and never an alarm).
"""

from __future__ import annotations

import datetime
import json
import re

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.nvidia import CUDA_FACT, NO_VALUE, parse_nvlink, parse_query, parse_xids, query, version
from ansible.module_utils.phase import Stop, main, read

RESET = "drain the node, then reset the GPU (nvidia-smi -r) or reboot"
REPLACE = "replace the GPU; NVIDIA's field diagnostic decides on the RMA"

# What nvidia-smi's return code asks for. Source: its man page, RETURN VALUE.
REMEDIES = {
    6: "see whether the PCI bus shows them: lspci -d 10de:",
    9: "install the driver and load its kernel module: modprobe nvidia; see dmesg",
    12: "install the driver's NVML library (libnvidia-ml.so)",
    15: "a GPU fell off the bus: reboot the node, see the kernel log for Xid 79",
    18: "driver and library have different versions: reboot, or reload the kernel modules",
}

CLOCKS = ("Clocks Event Reasons", "Clocks Throttle Reasons")  # the second before driver 535
# (what, fields in order of preference, as it should be, as it must not be, remedy, whether every GPU has it)
FLAGS = (
    (
        "pending row remap or page retirement",
        ("Remapped Rows/Pending", "Retired Pages/Pending Page Blacklist", "Retired Pages/Pending"),
        ("No",),
        ("Yes",),
        RESET,
        True,
    ),
    ("row remap failure", ("Remapped Rows/Remapping Failure Occurred",), ("No",), ("Yes",), REPLACE, False),
    ("SRAM error threshold exceeded", ("ECC Errors/Aggregate/SRAM Threshold Exceeded",), ("No",), ("Yes",), REPLACE, False),
    ("unrepairable memory", ("ECC Errors/Unrepairable Memory",), ("No",), ("Yes",), REPLACE, False),
    ("reset required", ("GPU Reset Status/Reset Required",), ("No",), ("Yes",), RESET, False),
    (
        "recovery action",
        ("GPU Recovery Action",),
        ("None",),
        ("Reset", "GPU Reset", "Reboot", "Node Reboot", "Drain P2P", "Drain and Reset"),
        "carry it out after draining the node",
        False,
    ),
    ("fabric health", ("Fabric/Health/Summary",), ("Healthy",), ("Unhealthy",), "see the fabric manager's log", False),
    *(
        (
            f"clocks: {name}",
            tuple(f"{section}/{middle}{name}" for section in CLOCKS for middle in ("HW Slowdown/", "")),
            ("Not Active",),
            ("Active",),
            remedy,
            True,
        )
        for name, remedy in (
            ("HW Thermal Slowdown", "look at the node's cooling"),
            ("HW Power Brake Slowdown", "look at the node's power supplies and power capping"),
            ("SW Thermal Slowdown", "look at the node's cooling"),
        )
    ),
)  # fmt: skip

PAGES_MAX = 64  # page retirements that a GPU before Ampere has room for; NVIDIA GPU Memory Error Management

# What to do about an Xid. Source: NVIDIA's Xid catalogue and the tables of clusters in production.
ISOLATE, REBOOT, NVLINK = {54}, {79}, {74}
RESETS = {48, 64, 95, 109, 110, 119, 120, 136, 140, 143}
MONITOR = {13, 31, 43, 63, 92, 94, 121, 126}
NVLINK5 = range(144, 151)  # say themselves whether they are fatal


class Findings:
    """What was found of each GPU, told once for all GPUs of which it is so."""

    def __init__(self, total):
        self.total, self.bad, self.unreadable = total, {}, {}

    def problem(self, gpu, what, expected, found, remedy):
        self.bad.setdefault((what, str(expected), str(found), remedy), []).append(gpu.pci)

    def unknown(self, gpu, what, instead):
        self.unreadable.setdefault((what, instead), []).append(gpu.pci)

    def problems(self):
        """(what, expected, found, remedy) of each."""
        return [(f"{what} of {self.where(pcis)}", *rest) for (what, *rest), pcis in self.bad.items()]

    def warnings(self):
        """One line for each set of GPUs and reason, with all checks that gave no result there."""
        lines = {}
        for (what, instead), pcis in self.unreadable.items():
            lines.setdefault((self.where(pcis), instead), []).append(what)
        return [f"unknown on {where}: {', '.join(whats)} ({instead})" for (where, instead), whats in lines.items()]

    def where(self, pcis):
        if len(pcis) == self.total > 1:
            return f"all {self.total} GPUs"
        return f"GPU{'s' if len(pcis) > 1 else ''} {', '.join(pcis)}"


# --- judgement of one GPU; `want` are the role's settings ---


def judge_gpu(gpu, want, findings):
    name, instead = gpu.get("Product Name")
    if name is None:
        findings.unknown(gpu, "model", instead)
    elif want["gpu_model"] and not re.search(rf"\b{re.escape(want['gpu_model'])}\b", name, re.IGNORECASE):
        findings.problem(gpu, "model", want["gpu_model"], name, "correct cuda_check_gpu_model or the inventory")
    modes = []
    if want["ecc"]:
        modes.append(("ECC mode", "ECC Mode/Current", "nvidia-smi -e 1, then reset the GPU"))
    if want["persistence"]:
        remedy = "systemctl enable --now nvidia-persistenced, or set cuda_check_set_persistence"
        modes.append(("persistence mode", "Persistence Mode", remedy))
    for what, path, remedy in modes:
        judge_flag(gpu, findings, what, (path,), ("Enabled",), ("Disabled",), remedy, True)
    for flag in FLAGS:
        judge_flag(gpu, findings, *flag)
    judge_slowdown(gpu, findings)
    judge_errors(gpu, findings)
    judge_pages(gpu, findings)
    judge_pcie(gpu, findings)
    judge_fabric(gpu, want, findings)


def judge_flag(gpu, findings, what, paths, good, bad, remedy, everywhere):
    value, instead = gpu.get(*paths)
    if value in bad:
        findings.problem(gpu, what, good[0], value, remedy)
    elif value not in good and (everywhere or instead not in ("missing", "N/A")):
        findings.unknown(gpu, what, value or instead)


def judge_slowdown(gpu, findings):
    """HW Slowdown by itself; with a reason of its own below it, that one is told instead."""
    paths = tuple(f"{section}/HW Slowdown" for section in CLOCKS)
    reasons = [
        gpu.get(*(f"{path}/{name}" for path in paths))[0] for name in ("HW Thermal Slowdown", "HW Power Brake Slowdown")
    ]
    if "Active" not in reasons:
        remedy = "look at the node's power and cooling"
        judge_flag(gpu, findings, "clocks: HW Slowdown", paths, ("Not Active",), ("Active",), remedy, True)


def judge_errors(gpu, findings):
    """Uncorrectable errors since the driver was loaded ("Double Bit" before driver 418)."""
    if gpu.get("ECC Mode/Current")[0] == "Disabled":
        return
    counts, unreadable = {}, ""
    for path in gpu.fields:
        _, block, name = [*path.split("/", 2), "", ""][:3]
        if path.startswith("ECC Errors/Volatile/") and ("Uncorrectable" in name or "Double Bit" in name):
            count, instead = gpu.number(path)
            if count is None:
                unreadable = instead
            elif name != "Double Bit/Total":
                counts[name] = count
    sick = [f"{count} {name}" for name, count in counts.items() if count]
    if sick:
        findings.problem(gpu, "uncorrectable ECC errors", 0, ", ".join(sick), f"{RESET}; if they return: {REPLACE}")
    elif not counts:
        findings.unknown(gpu, "uncorrectable ECC errors", unreadable or "missing")


def judge_pages(gpu, findings):
    counts = [gpu.number(f"Retired Pages/{kind} Bit ECC")[0] for kind in ("Single", "Double")]
    if sum(count or 0 for count in counts) >= PAGES_MAX:
        findings.problem(gpu, "retired pages", f"fewer than {PAGES_MAX}", sum(count or 0 for count in counts), REPLACE)


def judge_pcie(gpu, findings):
    """Width always; generation only under load, since an idle GPU lowers it to save power."""
    link = "PCI/GPU Link Info"
    now, instead = gpu.number(f"{link}/Link Width/Current")
    most, instead_most = gpu.number(f"{link}/Link Width/Max")
    if now is None or most is None:
        findings.unknown(gpu, "PCIe width", instead or instead_most)
    elif now < most:
        findings.problem(gpu, "PCIe width", f"x{most}", f"x{now}", "reseat or replace the GPU's board or riser")
    now, _ = gpu.number(f"{link}/PCIe Generation/Current")
    most, instead = gpu.number(f"{link}/PCIe Generation/Max")
    device, _ = gpu.number(f"{link}/PCIe Generation/Device Max")
    busy, _ = gpu.number("Utilization/GPU", "Utilization/Gpu")
    if most is None:
        findings.unknown(gpu, "PCIe generation", instead)
    elif now is not None and now < most and busy:
        findings.problem(gpu, "PCIe generation under load", most, now, "look for PCIe errors in the kernel log (AER)")
    if most and device and most < device:
        findings.unknown(gpu, "full PCIe speed", f"the platform limits it to generation {most} of {device}")


def judge_fabric(gpu, want, findings):
    """NVSwitch's fabric. "N/A" is a GPU without one; a driver before 525 does not tell."""
    state, instead = gpu.get("Fabric/State")
    status, instead_status = gpu.get("Fabric/Status")
    remedy = "see systemctl status nvidia-fabricmanager and its log; its version must be the driver's"
    if state in ("Not Started", "In Progress"):
        findings.problem(gpu, "fabric", "Completed", state, remedy)
    elif state == "Completed" and status not in ("Success", None):
        findings.problem(gpu, "fabric", "Success", status, remedy)
    elif state == "Completed" and status is None:
        findings.unknown(gpu, "fabric", instead_status)
    elif state != "Completed" and instead != "N/A" and want["nvlinks"]:
        findings.unknown(gpu, "fabric", state or instead)


def judge_nvlink(gpus, links, want, findings):
    """`links` is parse_nvlink's. The last GPU's list may be cut: fewer links there are unknown, not missing."""
    last = list(links)[-1] if links else None
    for gpu in gpus:
        uuid = gpu.get("GPU UUID")[0]
        rates = links.get(uuid)
        if not rates:
            findings.unknown(gpu, "NVLink", "not listed by nvidia-smi nvlink -s")
            continue
        up = [link for link, rate in rates.items() if rate != 0]
        down = [link for link, rate in rates.items() if rate == 0]
        remedy = "look for Xid 74 and SXids in the kernel log, restart the fabric manager, reset the GPUs"
        if down:
            names = ", ".join(map(str, down))
            findings.problem(gpu, "NVLink", f"{want['nvlinks']} links up", f"{len(up)} (inactive: {names})", remedy)
        elif len(up) < want["nvlinks"]:
            if uuid == last:
                findings.unknown(gpu, "NVLink", f"{len(up)} of {want['nvlinks']} links listed")
            else:
                findings.problem(gpu, "NVLink", f"{want['nvlinks']} links up", len(up), remedy)
        slow = {link: rate for link, rate in rates.items() if rate and rate < want["nvlink_gb_per_s"]}
        if slow:
            found = ", ".join(f"{rate:g} on link {link}" for link, rate in slow.items())
            findings.problem(gpu, "NVLink rate", f"at least {want['nvlink_gb_per_s']:g} GB/s", found, remedy)
        if None in rates.values():
            names = ", ".join(str(link) for link, rate in rates.items() if rate is None)
            findings.unknown(gpu, f"rate of NVLinks {names}", "no number")


# --- judgement of the node ---


def judge_versions(said, want):
    """[(what, expected, found, remedy)], [warning]: the driver and the CUDA that it supports."""
    problems, warnings = [], []
    for what, found, least in (("driver", said.driver, want["driver_min"]), ("CUDA", said.cuda, want["cuda_min"])):
        if not least:
            continue
        if not version(found):
            warnings.append(f"unknown: version of the {what} (nvidia-smi -q does not tell)")
        elif version(found) < version(least):
            problems.append((what, f"at least {least}", found, "upgrade the driver: its branch fixes both versions"))
    return problems, warnings


def judge_count(said, want, before):
    """[(what, expected, found, remedy)], [warning]; `before` are the addresses in cuda.fact."""
    problems, warnings = [], []
    listed = [gpu.pci for gpu in said.gpus]
    for pci in said.twice:
        warnings.append(f"nvidia-smi -q lists GPU {pci} twice: counted once")
    if said.attached is None:
        warnings.append("unknown: number of GPUs (nvidia-smi -q does not tell)")
        return problems, warnings
    if len(listed) + len(said.twice) < said.attached:
        warnings.append(f"nvidia-smi -q lists {len(listed)} of {said.attached} GPUs: the others are unknown")
        gone = []
    else:
        gone = [pci for pci in before if pci not in listed]
    found = said.attached - len(said.twice)
    if found != (want["gpus"] or found or 1):
        where = f" (gone: {', '.join(gone)})" if gone else ""
        remedy = "see whether lspci -d 10de: shows it and the kernel log has Xid 79; reboot or reseat"
        problems.append(("GPUs", want["gpus"] or "at least 1", f"{found}{where}", remedy))
    return problems, warnings


def judge_xids(xids, hours):
    """[(what, expected, found, remedy)], [warning]."""
    problems, warnings = [], []
    for xid in xids:
        kind, place = ("SXid", "NVSwitch") if xid.switch else ("Xid", "GPU")
        found = f"{xid.count} on {place} {xid.pci}: {xid.text[:60]}"
        if xid.switch:
            remedy = "drain the node, then reset all GPUs and NVSwitches or reboot" if xid.fatal else None
        elif xid.number in NVLINK or (xid.number in NVLINK5 and xid.fatal):
            remedy = "look at NVLink: nvidia-smi nvlink -s and -e; drain the node, then reset the GPUs"
        elif xid.number in ISOLATE:
            remedy = "isolate the node: the GPU's power cables or supply"
        elif xid.number in REBOOT:
            remedy = "drain and reboot the node; if it returns, replace the GPU"
        elif xid.number in RESETS:
            remedy = RESET
        else:
            remedy = None
        if remedy:
            problems.append((f"{kind} {xid.number}", f"none in the last {hours:g} h", found, remedy))
            continue
        known = xid.switch or xid.number in MONITOR or xid.number in NVLINK5
        advice = "watch it" if known else "no action is known for it: see NVIDIA's Xid catalogue"
        warnings.append(f"{kind} {xid.number} in the last {hours:g} h: {found} ({advice})")
    return problems, warnings


def judge_drift(published, observed):
    """[(what, expected, found, remedy)]: `published` is cuda.fact's dictionary. Unreadable values are not compared.

    A GPU that is gone is judge_count's to tell.
    """
    problems = []
    remedy = "if the change is meant, publish it: run the role's configure phase"
    for key, value in observed.items():
        before = published.get(key)
        if key != "gpus" and None not in (value, before) and value != before:
            problems.append((f"cuda.fact: {key}", before, value, remedy))
    gpus = published.get("gpus")
    known = {gpu.get("pci_bus_id"): gpu for gpu in gpus if isinstance(gpu, dict)} if isinstance(gpus, list) else {}
    for gpu in observed["gpus"]:
        before = known.get(gpu["pci_bus_id"])
        if before is None:
            problems.append((f"cuda.fact: GPU {gpu['pci_bus_id']}", "none there", gpu["name"], remedy))
            continue
        for key in ("name", "uuid", "vbios", "memory_mib"):
            if None not in (gpu[key], before.get(key)) and gpu[key] != before[key]:
                problems.append((f"cuda.fact: {key} of GPU {gpu['pci_bus_id']}", before[key], gpu[key], remedy))
    return problems


# --- what the node is asked ---


def ask(phase):
    """The Query of `nvidia-smi -q`. Stop where it does not answer, fails, or answers with something else."""
    limit = phase.want["answer_s"]
    outcome = phase.run(["nvidia-smi", "-q"], limit)
    if outcome.rc is None:
        hung = "gave no answer" in outcome.reason
        expected = f"an answer within {limit:g} s" if hung else "the driver's tools"
        found = "no answer" if hung else outcome.last_line
        remedy = "the driver hangs: see the kernel log, reboot the node" if hung else "install the NVIDIA driver"
        raise Stop("nvidia-smi", expected, found, remedy)
    if not outcome.ok:
        remedy = REMEDIES.get(outcome.rc, "see the kernel log: journalctl -k --grep NVRM")
        raise Stop("nvidia-smi", "status 0", f"status {outcome.rc}: {outcome.last_line}", remedy)
    said = parse_query(outcome.stdout)
    if not said.driver and not said.gpus:
        raise Stop("nvidia-smi -q", "a report", f"{len(outcome.stdout)} characters without one", "run it by hand")
    return said


def recent(text, since):
    """The lines of `dmesg --time-format=iso` not older than `since`; those without a time stay."""
    lines = []
    for line in text.splitlines():
        match = re.search(r"\b(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)[,.]\d+([+-]\d\d:\d\d)", line[:60])
        if not match or datetime.datetime.fromisoformat(match[1] + match[2]) >= since:
            lines.append(line)
    return "\n".join(lines)


def kernel_log(phase, hours):
    """The kernel's messages of this boot and the last `hours`; None, with a warning, where none can be read."""
    argv = ["journalctl", "--dmesg", "--quiet", "--no-pager", "--output=short-iso", f"--since=-{int(hours * 3600)}s"]
    journal = phase.run(argv, 20)
    if journal.ok and journal.stdout.strip():
        return journal.stdout
    # An empty journal may be one that does not gather the kernel's messages.
    ring = phase.run(["dmesg", "--time-format=iso"], 20)
    if ring.ok:
        return recent(ring.stdout, datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours))
    phase.warn(f"unknown: Xids (no kernel log: {ring.last_line})")
    return None


def check_fabric_manager(phase, gpus):
    states = [gpu.get("Fabric/State")[0] for gpu in gpus]
    unit = phase.want["fabric_manager"]
    if not unit or not any(states):
        return
    outcome = phase.run(["systemctl", "show", "--property=LoadState,ActiveState", unit], 10)
    said = dict(line.split("=", 1) for line in outcome.stdout.splitlines() if "=" in line)
    load, active = said.get("LoadState"), said.get("ActiveState")
    if not outcome.ok or not load or not active:
        phase.warn(f"unknown: state of {unit} ({outcome.last_line})")
    elif load == "not-found" and set(states) == {"Completed"}:
        phase.warn(
            f"{unit} is not on this node, though the fabric is up: it runs elsewhere, as on a virtual machine's host"
        )
    elif (load, active) != ("loaded", "active"):
        found = active if load == "loaded" else load
        remedy = f"install it in the driver's version, then systemctl enable --now {unit}"
        phase.problem(unit, "active", found, remedy)


def check_toolkit(phase):
    least = phase.want["toolkit_min"]
    if not least:
        return
    nvcc = f"{phase.want['cuda_home']}/bin/nvcc"
    outcome = phase.run([nvcc, "--version"], 20)
    match = re.search(r"\brelease (\d+\.\d+)", outcome.stdout)
    found = match[1] if outcome.ok and match else outcome.last_line
    phase.facts["toolkit"] = match[1] if outcome.ok and match else None
    if not (outcome.ok and match) or version(found) < version(least):
        phase.problem("CUDA toolkit", f"at least {least}", found, "install it, or correct cuda_check_cuda_home")


def ask_nvlink(phase, said):
    """parse_nvlink's answer; None where NVLinks are not wanted or nvidia-smi does not tell, with a warning."""
    if not phase.want["nvlinks"] or not said.gpus:
        return None
    outcome = phase.run(["nvidia-smi", "nvlink", "-s"], phase.want["answer_s"])
    if outcome.ok:
        return parse_nvlink(outcome.stdout)
    phase.warn(f"unknown: NVLinks ({outcome.last_line})")
    return None


def describe(said, links, capabilities):
    """cuda.fact: what others need to know. None where nvidia-smi does not tell."""
    rows = [
        {
            "index": index,
            "name": gpu.get("Product Name")[0],
            "uuid": gpu.get("GPU UUID")[0],
            "pci_bus_id": gpu.pci,
            "vbios": gpu.get("VBIOS Version")[0],
            "memory_mib": gpu.number("FB Memory Usage/Total")[0],
        }
        for index, gpu in enumerate(said.gpus)
    ]
    return {
        "driver": said.driver or None,
        "cuda": said.cuda or None,
        "compute_capability": ",".join(sorted(set(capabilities))) or None,
        "nvlink_links": max(map(len, links.values())) if links else None,
        "gpus": rows,
    }


def capabilities(phase):
    rows, reason = query(phase, ["compute_cap"], phase.want["answer_s"])
    if reason:
        phase.warn(f"unknown: compute capability ({reason})")
    return [row["compute_cap"] for row in rows if not NO_VALUE.fullmatch(row["compute_cap"])]


def published(fact):
    """cuda.fact as a dictionary, empty where it is damaged; None where there is none."""
    text = read(fact)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def report(phase, problems, warnings):
    for problem in problems:
        phase.problem(*problem)
    for warning in warnings:
        phase.warn(warning)


def inspect(phase, fact):
    """All checks. Returns (the Query, parse_nvlink's answer)."""
    want = phase.want
    if want["xid_hours"]:  # first: it says why nvidia-smi hangs
        text = kernel_log(phase, want["xid_hours"])
        report(phase, *judge_xids(parse_xids(text or ""), want["xid_hours"]))
    check_toolkit(phase)
    said = ask(phase)
    problems, warnings = judge_versions(said, want)
    if phase.name == "validate" and want["driver_package"]:
        warnings += [
            f"{what}: expected {least}, found {found}; install comes next" for what, least, found, _ in problems
        ]
        problems = []
    report(phase, problems, warnings)
    gpus = (published(fact) or {}).get("gpus")
    before = [gpu.get("pci_bus_id") for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    report(phase, *judge_count(said, want, before))
    findings = Findings(len(said.gpus))
    for gpu in said.gpus:
        judge_gpu(gpu, want, findings)
    links = ask_nvlink(phase, said)
    if links is not None:
        judge_nvlink(said.gpus, links, want, findings)
    report(phase, findings.problems(), findings.warnings())
    check_fabric_manager(phase, said.gpus)
    several = {
        what: ", ".join(sorted({value for gpu in said.gpus if (value := gpu.get(path)[0])}))
        for what, path in (("gpu", "Product Name"), ("vbios", "VBIOS Version"))
    }
    phase.facts["versions"] = {"driver": said.driver, "cuda": said.cuda, **several}
    phase.done.append(f"{len(said.gpus)} × {several['gpu'] or 'GPU'}, driver {said.driver}, CUDA {said.cuda}")
    return said, links


# --- phases ---


def validate(phase, fact=CUDA_FACT):
    if phase.want["set_persistence"]:
        phase.want["persistence"] = False  # configure mends it
    try:
        inspect(phase, fact)
    except Stop as stop:
        if not phase.want["driver_package"]:
            raise
        what, expected, found, _ = stop.problem
        phase.warn(f"{what}: expected {expected}, found {found}; install comes next")


def configure(phase, fact=CUDA_FACT):
    try:
        said = ask(phase)
    except Stop:
        if phase.check and phase.want["driver_package"]:
            phase.warn("cuda.fact: not known before the driver is installed")
            return
        raise
    if said.attached != len(said.gpus) + len(said.twice):
        raise Stop("GPUs in nvidia-smi -q", said.attached, len(said.gpus), "its output was cut: run again")
    if phase.want["set_persistence"]:
        set_persistence(phase, said.gpus)
    facts = describe(said, ask_nvlink(phase, said), capabilities(phase))
    phase.write(fact, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    phase.facts.update(facts)


def set_persistence(phase, gpus):
    off = [gpu.pci for gpu in gpus if gpu.get("Persistence Mode")[0] == "Disabled"]
    if not off or not all([phase.change(f"persistence mode of GPU {pci}", "Disabled", "Enabled") for pci in off]):
        return
    outcome = phase.run(["nvidia-smi", "-pm", "1"], phase.want["answer_s"])
    if not outcome.ok:
        phase.problem("persistence mode", "Enabled", outcome.last_line, "run as root; see nvidia-smi -pm 1")


def verify(phase, fact=CUDA_FACT):
    said, links = inspect(phase, fact)
    before = published(fact)
    if before is None:
        phase.problem(fact, "a published fact", "none", "run the role's configure phase")
        return
    report(phase, judge_drift(before, describe(said, links, capabilities(phase))), [])


PHASES = {"validate": validate, "configure": configure, "verify": verify}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
